"""
States of virtual machines for tests of avocado: a dependency in a test's docstring says which one
it starts from, and everything else happens.

::

    class Network(Test):
        def test(self):
            \"\"\"
            :avocado: dependency={"type": "vm-state", "uri": "vm1/disk/customize"}
            \"\"\"
            boot(avocado_statepool.working("vm1/disk"))

avocado loads its plugins in every run on the machine, so nothing of statepool is imported before a
state is asked for. For avocado-i2n there is :mod:`avocado_statepool.states`.
"""

from avocado_statepool.record import working

__all__ = ["working"]
