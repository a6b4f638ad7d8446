"""Files of another host: by a real sshd on loopback, one that gives a shell, and one that has locked the account up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from statepool.testing.sshd import Sshd, run_sshd, sshd_program
from statepool.testing.transports import TransportContract
from statepool.transports.base import Transport
from statepool.transports.ssh import SSHTransport

pytestmark = pytest.mark.skipif(sshd_program() is None, reason="sshd is not installed")


@pytest.fixture(scope="module")
def with_shell() -> Iterator[Sshd]:
    with run_sshd() as server:
        yield server


@pytest.fixture(scope="module")
def chrooted() -> Iterator[Sshd]:
    if os.geteuid() != 0:
        pytest.skip("only root can make a chroot")
    with run_sshd(chrooted=True) as server:
        yield server


def reached(server: Sshd, tmp_path: Path) -> Iterator[Transport]:
    directory = server.directory_for(tmp_path.name)
    transport = SSHTransport(server.location(directory), server.settings())
    yield transport
    transport.close()


class TestWithAShell(TransportContract):
    @pytest.fixture
    def transport(self, with_shell: Sshd, tmp_path: Path) -> Iterator[Transport]:
        yield from reached(with_shell, tmp_path)


class TestChrooted(TransportContract):
    @pytest.fixture
    def transport(self, chrooted: Sshd, tmp_path: Path) -> Iterator[Transport]:
        yield from reached(chrooted, tmp_path)
