"""
Benchmarks: the same work done by this library, and by the tools that a user would use instead.

Run them with ``make bench``, or ``python -m benchmarks [TABLE]...`` in an environment in which
statepool is installed; ``--list`` names the tables. They take about ten minutes, and six GiB of
room in a temporary directory in ``--place`` (the current directory if not given). ``--write`` also
puts the tables into ``benchmarks/RESULTS.md``. Only an otherwise idle machine gives meaningful
figures.

How a figure is made: this library and a named peer do the same work alternately in the same run, at
least nine times each, the peer first in every other pair. ``sync`` runs before each, and the files
of one are deleted before the other begins, so that neither waits for the writes of the other. The
figure is the median of the ratios of the pairs (or of the differences, if a limit is in seconds).
Its spread, the lowest and the highest value, is shown beside it. No measurement is left out. Work
that a peer does not do, such as checking what it copied, is named in a column, and not added to its
time.

The modules:

* ``measure``: pairs, figures and tables, and when a figure meets its limit;
* ``bench``: what all tables share: sizes, a directory, chains of real images;
* a module for each table: ``cold``, ``trusted``, ``sets``, ``start``, ``locks``, ``appends``,
  ``peers``, ``ssh``, ``pytest_runs``;
* ``i2n`` and ``i2n_worker``: avocado-i2n, in an environment of its own that is made when it is
  first needed (``.venv-bench``).
"""
