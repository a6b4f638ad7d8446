"""
Pools: the layout, the log that determines the states, publication and removal, the view for people,
and locks that save work.

This package keeps the invariants of ``docs/design.rst``. It uses only the operations of
:class:`statepool.transports.base.Transport`.
"""
