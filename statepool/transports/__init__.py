"""
How one file moves to and from a pool, and the few operations on names that everything above is
built from.

Transports know nothing of states, logs or chains: only of files under one directory. A new one is a
class with the methods of :class:`statepool.transports.base.Transport`, registered by its URL scheme
in the entry point group ``statepool.transports``.
"""
