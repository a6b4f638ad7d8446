"""
Files of another host: by a real sshd on loopback, one that gives a shell, and one that has locked
the account up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from statepool.testing.transports import TransportContract
from statepool.transports.base import Transport
from statepool.transports.ssh import SSHTransport
from tests.support.sshd import Sshd, run_sshd, sshd_program

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


@pytest.fixture(params=["openssh", "paramiko"])
def carrier(request: pytest.FixtureRequest) -> str:
    """What carries SSH."""
    return str(request.param)


def reached(server: Sshd, tmp_path: Path, carrier: str) -> Iterator[Transport]:
    directory = server.directory_for(tmp_path.name)
    transport = SSHTransport(server.location(directory), server.settings(carrier=carrier))
    yield transport
    transport.close()


class TestWithAShell(TransportContract):
    deaths = 2

    @pytest.fixture
    def transport(self, with_shell: Sshd, tmp_path: Path, carrier: str) -> Iterator[Transport]:
        yield from reached(with_shell, tmp_path, carrier)


class TestChrooted(TransportContract):
    deaths = 2

    @pytest.fixture
    def transport(self, chrooted: Sshd, tmp_path: Path, carrier: str) -> Iterator[Transport]:
        yield from reached(chrooted, tmp_path, carrier)


@pytest.mark.parametrize(
    ("directory", "file"), [(0o755, 0o644), (0o2750, 0o640), (0o2770, 0o664), (0o700, 0o600)]
)
def test_who_may_look_into_a_pool_may_read_its_records(
    strict: Sshd, tmp_path: Path, directory: int, file: int
) -> None:
    """Whatever the umask of the account there."""
    place = strict.directory_for(tmp_path.name)
    place.chmod(directory)
    transport = SSHTransport(strict.location(place), strict.settings())
    transport.create("record", b"1")
    transport.close()
    assert (place / "record").stat().st_mode & 0o777 == file


@pytest.fixture(scope="module")
def strict() -> Iterator[Sshd]:
    before = os.umask(0o077)
    try:
        with run_sshd() as server:
            os.umask(before)
            yield server
    finally:
        os.umask(before)
