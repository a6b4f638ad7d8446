"""
Two hosts with a cache each work in one pool, through two servers, and are killed again and again:
nothing is torn, and no promise is broken.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import statepool
from tests.support.sshd import Sshd, run_sshd

if TYPE_CHECKING:
    from conftest import Lab

MIB = 1 << 20
WORKER = Path(__file__).with_name("worker.py")


class Host:
    """
    A worker that is started again whenever it was killed.

    :param name: of the host
    :param server: through which it reaches the pool
    """

    def __init__(self, name: str, server: Sshd, lab: Lab, image: Path) -> None:
        self.journal = lab.root / f"journal-{name}"
        self.errors = lab.root / f"errors-{name}"
        location = str(server.location(lab.there))
        self._command = [
            name,
            str(lab.root / f"cache-{name}"),
            location,
            str(server.ssh_config),
            str(server.known_hosts),
            str(image),
            str(self.journal),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.errors, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), *self._command], stderr=errors
            )

    def kill(self) -> None:
        assert self._process is not None
        assert self._process.poll() is None, f"it ended by itself: {self.errors.read_text()}"
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    @property
    def promised(self) -> set[str]:
        """The states that were set, and that nobody began to unset."""
        found: set[str] = set()
        for line in self.journal.read_text().splitlines() if self.journal.exists() else []:
            what, _, state = line.partition(" ")
            (found.add if what == "set" else found.discard)(state)
        return found


SECONDS = float(os.environ.get("SOAK_SECONDS", "10"))
"""How long two hosts work against each other."""


@pytest.mark.timeout(1200 + 2 * SECONDS)
def test_no_acknowledged_state_is_lost(lab: Lab, make_image: Callable[..., Path]) -> None:
    image = make_image(
        lab.root / "image.qcow2", 4 * MIB, writes=[(0, 64 << 10, 1), (3 * MIB, 64 << 10, 2)]
    )
    chance = random.Random(3)
    with run_sshd() as second:
        hosts = [Host("first", lab.server, lab, image), Host("second", second, lab, image)]
        for host in hosts:
            host.start()
        end, longest = time.monotonic() + SECONDS, 6.0
        while time.monotonic() < end or not all(host.promised for host in hosts):
            time.sleep(chance.uniform(1.0, longest))  # the moment at which one of them is killed
            host = chance.choice(hosts)
            host.kill()
            host.start()
            if not host.promised:
                longest *= 1.5  # this machine is so busy that a worker does nothing in that time
        for host in hosts:
            host.kill()
        promised = {state for host in hosts for state in host.promised}
        assert promised
        assert lab.states(lab.there) >= promised
        checked = statepool.StatePool(cache=lab.root / "judge", sources=[lab.there]).verify()
        assert {one.state for one in checked if one.problem is None} >= promised
        for host in hosts:
            assert (
                lab.states(lab.root / f"cache-{'first' if host is hosts[0] else 'second'}")
                >= host.promised
            )
