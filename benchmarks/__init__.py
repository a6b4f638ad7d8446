"""
Benchmarks: the same work done by us, and by what a user would use instead.

Run them with ``make bench``, or ``python -m benchmarks [TABLE]...`` in an environment in which
statepool is installed; ``--list`` names the tables. They take about ten minutes, and six GiB of
room in a temporary directory in ``--place`` (the current directory if not given). ``--write`` also
puts the tables into ``benchmarks/RESULTS.md``. A machine that does nothing else gives the figures
that count.

How a figure is made: we and a named peer do the same work alternately in the same run, at least
nine times each, the peer first in every other pair. ``sync`` comes before each, and what one has
written is deleted before the other begins, so that nobody waits for the writes of somebody else.
The figure is the median of the ratios of the pairs (or of the differences, where a limit is in
seconds); its spread, the lowest and the highest, stands beside it. Nothing is left out. What a peer
does not do, such as checking what it copied, is said in a column, and not added to its time.

The rooms:

* ``measure``: pairs, figures and tables, and when a figure meets its limit;
* ``bench``: what all tables share: sizes, a directory, chains of real images;
* a module for each table: ``cold``, ``trusted``, ``sets``, ``start``, ``locks``, ``appends``,
  ``peers``, ``ssh``, ``pytest_runs``;
* ``i2n`` and ``i2n_worker``: avocado-i2n, in an environment of its own that is made when it is
  first needed (``.venv-bench``).
"""
