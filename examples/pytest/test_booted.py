"""Tests that begin after the machine has booted."""

import pytest


@pytest.mark.vm_state("vm1", "booted")
@pytest.mark.parametrize("number", range(3))
def test_it_is_up_at_once(vm, console, number):
    assert vm.is_running
    console.write(f"number-{number}")
