"""How often one waits for the other side: not more often because there is more to be looked at."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import statepool
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.pools.fold import Publish
from statepool.pools.pool import Pool
from statepool.transports.local import LocalTransport
from statepool.transports.ssh import SSHTransport
from statepool.transports.ssh.sftp import Sftp
from tests.support.sshd import Sshd


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """
    ``trips()``: how often since the last call something was asked after something else had been
    heard.
    """
    state = {"count": 0, "heard": True}
    write, receive = Sftp._write, Sftp._receive

    def writing(self: Sftp, data: bytes) -> None:
        state["count"] += state["heard"]
        state["heard"] = False
        write(self, data)

    def receiving(self: Sftp) -> int:
        state["heard"] = True
        return receive(self)

    monkeypatch.setattr(Sftp, "_write", writing)
    monkeypatch.setattr(Sftp, "_receive", receiving)

    def trips() -> int:
        count, state["count"] = state["count"], 0
        return count

    return trips


@pytest.fixture
def place(sshd: Sshd, tmp_path: Path) -> Path:
    return sshd.directory_for(f"{tmp_path.name}-{os.urandom(4).hex()}")


def test_many_small_questions_are_asked_at_once(
    sshd: Sshd, place: Path, trips: Callable[[], int]
) -> None:
    for number in range(150):
        (place / f"d{number}").mkdir()
        (place / f"d{number}/f").write_bytes(b"%d" % number)
    transport = SSHTransport(sshd.location(place), sshd.settings())
    transport.stat("")

    def asked(count: int) -> list[int]:
        directories = [f"d{number}" for number in range(count)]
        files = [f"{directory}/f" for directory in directories]
        trips()
        assert [len(entries) for entries in transport.scan_many(directories)] == [1] * count
        scans = trips()
        assert all(stat is not None for stat in transport.stat_many(files))
        stats = trips()
        assert transport.read_many([*files, "none"], 100) == [
            *(b"%d" % number for number in range(count)),
            None,
        ]
        return [scans, stats, trips()]

    asked(1)  # what is asked once on each connection
    assert asked(2) == asked(150)
    assert max(asked(150)) <= 4


def test_a_listing_takes_as_many_trips_for_many_states_as_for_few(
    sshd: Sshd, place: Path, tmp_path: Path, trips: Callable[[], int]
) -> None:
    statepool.init(place)
    pool = Pool(LocalTransport(Location("file", str(place))))

    def publish(first: int, last: int) -> None:
        for number in range(first, last):
            digest = Digest.of(b"%d" % number)
            pool.append(
                "vm1",
                lambda _, digest=digest, number=number: [
                    Publish(Manifest("vm1/disk", f"s{number}", size=1, digest=digest))
                ],
            )  # type: ignore[misc]

    def shown(cache: str) -> int:
        states = statepool.StatePool(
            cache=tmp_path / cache, sources=[str(sshd.location(place))], settings=sshd.settings()
        )
        trips()
        listed = len(states.image("vm1/disk").show())
        assert listed == count
        return trips()

    count = 3
    publish(0, count)
    shown("a")
    few = shown("b")
    publish(count, 70)
    count = 70
    assert shown("c") <= few
