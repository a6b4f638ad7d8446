"""
States of virtual machines for tests of avocado: a dependency in a test's docstring names the state
from which it starts, and the plugin does the rest.

::

    class Network(Test):
        def test(self):
            \"\"\"
            :avocado: dependency={"type": "vm-state", "uri": "vm1/disk/customize"}
            \"\"\"
            boot(avocado_statepool.working("vm1/disk"))

avocado loads its plugins in every run on the machine, so nothing of statepool is imported before a
test asks for a state. For avocado-i2n there is :mod:`avocado_statepool.states`.
"""

from avocado_statepool.record import working

__all__ = ["working"]
