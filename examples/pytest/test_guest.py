"""Tests of the content of the disk."""

import pytest


@pytest.mark.vm_state("vm1/disk", "customize")
def test_a_disk_can_be_spoilt(console):
    console.write("spoilt")
    assert console.read() == "spoilt"


@pytest.mark.vm_state("vm1/disk", "customize")
def test_every_test_has_a_fresh_disk(console):
    assert console.read() == "customized"
