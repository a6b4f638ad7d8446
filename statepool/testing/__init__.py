"""
For authors of transports and backends: contract suites, a pool in memory, and faults on demand.

- :mod:`statepool.testing.transports`: what every transport must do, as tests; a new one needs a
  fixture
- :mod:`statepool.testing.backends`: what every backend must do, as tests; a new one needs to say
  how its object is worked on
- :mod:`statepool.testing.memory`: a transport whose files are in memory
- :mod:`statepool.testing.faults`: a transport around another one, which injects faults
- :mod:`tests.support.interleave`: every interleaving of several actors, with all pauses and deaths,
  on :mod:`tests.support.replay`
- :mod:`tests.support.pool_worlds`: actors on a pool, and the invariants of all their actions
- :mod:`statepool.testing.trees`: snapshots of directories, to show that nothing was changed
"""

import sys

if "pytest" in sys.modules:
    import pytest

    # Before they are imported, so that pytest rewrites their assertions as in a test file.
    names = ("transports", "transport_names", "journeys", "backends")
    pytest.register_assert_rewrite(*(f"statepool.testing.{name}" for name in names))
