"""
For those who write transports and backends: contract suites, a pool in memory, and faults on
demand.

- :mod:`statepool.testing.transports`: what every transport must do, as tests; a new one needs a
  fixture
- :mod:`statepool.testing.backends`: what every backend must do, as tests; a new one needs to say
  how its object is worked on
- :mod:`statepool.testing.memory`: a transport whose files are in memory
- :mod:`statepool.testing.faults`: a transport around another one, in which things go wrong
- :mod:`tests.support.interleave`: every interleaving of several actors, with all pauses and deaths,
  on :mod:`tests.support.replay`
- :mod:`tests.support.pool_worlds`: actors on a pool, and what must hold whatever they do
- :mod:`statepool.testing.trees`: photographs of directories, to show that something changed nothing
"""

import sys

if "pytest" in sys.modules:
    import pytest

    # Before they are imported, so that their assertions say as much as those in a test file do.
    names = ("transports", "transport_names", "journeys", "backends")
    pytest.register_assert_rewrite(*(f"statepool.testing.{name}" for name in names))
