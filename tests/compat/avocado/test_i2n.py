"""
The real avocado-i2n drives our backends. The scenarios are in i2n_scenarios.py, which runs where it
is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import statepool
from tests.support.machines import Lab
from tests.support.sshd import Sshd

ROOT = Path(__file__).resolve().parents[3]

RunI2n = Callable[..., None]


@pytest.mark.parametrize(
    "scenario", ["images", "registered", "machines", "their_pool", "mirrors", "roots", "files"]
)
def test_scenario(run_i2n: RunI2n, qemu_img: Callable[..., str], scenario: str) -> None:
    run_i2n(scenario)


def test_a_pool_on_another_host(run_i2n: RunI2n, qemu_img: Callable[..., str], sshd: Sshd) -> None:
    pool = sshd.directory_for("avocado-i2n")
    location = sshd.location(pool)
    statepool.init(location, settings=sshd.settings())
    environ = {
        "STATEPOOL_SSH_CONFIG": str(sshd.ssh_config),
        "STATEPOOL_KNOWN_HOSTS": str(sshd.known_hosts),
    }
    run_i2n("ssh", location.path, str(location.port), str(location.user), **environ)


@pytest.mark.slow
def test_a_machine_that_runs(run_i2n: RunI2n, guests: Lab) -> None:
    run_i2n("running", str(ROOT / ".guest"))
