"""
States of virtual machines for tests: a marker names the state from which a test starts, and the
plugin does the rest.

::

    @pytest.mark.vm_state("vm1/disk", "customize")
    def test_network(vm_state):
        boot(vm_state.path)

    @pytest.mark.vm_state("vm1", "loggedin")
    def test_browser(vm):
        assert vm.is_running

pytest loads this in every run on the machine, so nothing of statepool is imported before a test
asks for a state.
"""

from pytest_statepool.builders import vm_state_builder
from pytest_statepool.fixtures import (
    _vm_state_provisioners,
    make_vm,
    make_vm_state,
    vm,
    vm_config,
    vm_state,
    vm_state_config,
    vm_state_pool,
    vm_state_provisioner,
)
from pytest_statepool.hooks import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_configure_node,
    pytest_report_collectionfinish,
    pytest_report_header,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_runtest_teardown,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
    pytest_unconfigure,
)

__all__ = [
    "vm_state_builder",
    "vm_state",
    "vm_state_pool",
    "vm_state_config",
    "vm_state_provisioner",
    "make_vm_state",
    "vm",
    "make_vm",
    "vm_config",
    "_vm_state_provisioners",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_configure_node",
    "pytest_report_collectionfinish",
    "pytest_report_header",
    "pytest_runtest_makereport",
    "pytest_runtest_setup",
    "pytest_runtest_teardown",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_testnodedown",
    "pytest_unconfigure",
]
