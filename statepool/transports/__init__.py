"""
Transports move one file to or from a pool, and offer the few operations on names on which
everything above is built.

Transports know nothing of states, logs or chains: only of files under one directory. A new
transport is a class with the methods of :class:`statepool.transports.base.Transport`, registered by
its URL scheme in the entry point group ``statepool.transports``.
"""
