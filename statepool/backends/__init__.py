"""
The operations on the states of one kind of object.

A new backend is a subclass of :class:`statepool.backends.base.StateBackend`, registered in the
entry point group ``statepool.backends``.
"""
