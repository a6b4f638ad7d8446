"""
The workshop of these tests: what they share beside ``statepool.testing``, and no author of a
transport or a backend needs.

- :mod:`tests.support.carts`: the service of carts, curl, and archives that misbehave
- :mod:`tests.support.crash`: a process that ends, or fails, at a system call of our choice
- :mod:`tests.support.images`: images byte by byte, good ones and hostile ones
- :mod:`tests.support.interleave`: every interleaving of several actors, with all pauses and deaths,
  on :mod:`tests.support.replay`
- :mod:`tests.support.machines`: running guests
- :mod:`tests.support.pool_worlds`: actors on a pool, and what must hold whatever they do
- :mod:`tests.support.privileges`: root, for whom permissions count
- :mod:`tests.support.proxy`: a connection that is cut, or falls silent
- :mod:`tests.support.sshd`: a real sshd
"""
