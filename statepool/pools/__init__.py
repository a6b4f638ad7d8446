"""
What a pool is: its layout, the log that is the truth about it, publishing and removing, the view
for people, and locks that save work.

The invariants of ``docs/design.rst`` live here, and are made of nothing but the operations of
:class:`statepool.transports.base.Transport`.
"""
