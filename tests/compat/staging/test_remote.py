"""The stage action with peers that are reached by SSH."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from statepool.errors import DigestMismatch, TransportError
from statepool.model.digest import Digest
from statepool.model.settings import Settings
from statepool.staging import files as files_module
from statepool.staging.ready import NotReady
from statepool.staging.settings import Ignore, Peer, StageSettings
from statepool.staging.stage import PeerResult, Stage, Staged
from statepool.transports.registry import open_transport
from statepool.transports.ssh.transport import SSHTransport
from tests.support.sshd import Sshd, free_port
from tests.support.staging import tree

MIB = 1 << 20


@define
class World:
    """A peer on a server, and a staging directory."""

    root: Path
    server: Sshd
    place: Path
    ignore: Ignore = Ignore.NONE
    knobs: dict[str, Any] = field(factory=dict)

    def fill(self, **content: bytes) -> None:
        for name, data in {**content, "cback.collect": b""}.items():
            path = self.place / name
            path.write_bytes(data)
            then = time.time() - 3600
            os.utime(path, (then, then))

    @property
    def settings(self) -> Settings:
        return self.server.settings(retries=1, retry_pause=0.0, **self.knobs)

    def stage(self, port: int | None = None) -> Staged:
        peer = Peer("far", self.server.location(self.place, port), ignore_failures=self.ignore)
        settings = StageSettings(self.root / "staging", (peer,))
        return Stage(settings, self.settings).run()

    def one(self, port: int | None = None) -> PeerResult:
        (result,) = self.stage(port).peers
        return result

    @property
    def day(self) -> Path:
        (found,) = (self.root / "staging").glob("????/??/??")
        return found


@pytest.fixture
def world(tmp_path: Path, sshd: Sshd) -> World:
    place = tmp_path / "collect"
    place.mkdir()
    return World(tmp_path, sshd, place)


@pytest.fixture
def without_shell(tmp_path: Path, chrooted_sshd: Sshd) -> Iterator[World]:
    place = chrooted_sshd.directory_for(f"collect-{time.time_ns()}")
    yield World(tmp_path, chrooted_sshd, place)
    shutil.rmtree(place)


def test_files_arrive_and_are_not_brought_again(world: World) -> None:
    world.fill(a=os.urandom(3 * MIB), b=b"", c=bytes(5 * MIB))
    result = world.one()
    assert result.succeeded
    assert result.brought.new == 4
    assert tree(world.day / "far") == {
        path.name: path.read_bytes() for path in world.place.iterdir() if path.name != "cback.stage"
    }
    made_there = [one.digest for one in result.brought.staged if one.size]
    assert all(digest.startswith(("sha256:", "blake3:")) for digest in made_there)
    assert (world.place / "cback.stage").exists()
    assert (world.day / "far/c").stat().st_blocks * 512 < MIB
    again = world.one()
    assert (again.brought.new, again.brought.sent) == (1, 0)
    assert world.one().brought.new == 0


def test_an_account_without_a_shell(without_shell: World) -> None:
    """There are no digests of the far side; lengths and times are compared."""
    world = without_shell
    world.fill(a=os.urandom(2 * MIB))
    result = world.one()
    assert result.succeeded, result.error
    assert (world.day / "far/a").read_bytes() == (world.place / "a").read_bytes()
    assert (world.place / "cback.stage").exists()
    assert world.one().brought.sent == 0


def test_what_an_interrupted_run_has_brought_is_only_checked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fill(a=os.urandom(3 * MIB))

    def break_off(*_: object) -> None:
        raise TransportError("the connection was lost")

    with monkeypatch.context() as patched:
        patched.setattr(files_module.FileStager, "_settle", break_off)
        assert not world.one().succeeded
    assert not (world.day / "far/a").exists()
    result = world.one()
    assert result.succeeded
    assert result.brought.sent == 0
    assert (world.day / "far/a").read_bytes() == (world.place / "a").read_bytes()


def test_wrong_bytes_of_an_interrupted_run_are_found(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fill(a=os.urandom(3 * MIB))

    def break_off(*_: object) -> None:
        raise TransportError("the connection was lost")

    with monkeypatch.context() as patched:
        patched.setattr(files_module.FileStager, "_settle", break_off)
        world.one()
    for part in (world.day / ".staging/far").iterdir():
        if part.stat().st_size > MIB:
            os.truncate(part, MIB)  # a power cut
            with part.open("r+b") as file:
                file.write(bytes(4096))
    result = world.one()
    assert result.succeeded, result.error
    assert result.brought.sent > 3 * MIB
    assert (world.day / "far/a").read_bytes() == (world.place / "a").read_bytes()


def test_bytes_that_are_never_those_of_the_peer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fill(a=b"a" * 1000)
    wrong = Digest("sha256", "0" * 64)

    def lie(_: object, found: dict[str, int]) -> list[Digest | None]:
        return [wrong if name == "a" else None for name in found]

    monkeypatch.setattr(SSHTransport, "far_digests", lie)
    result = world.one()
    assert isinstance(result.error, DigestMismatch)
    assert result.error.hint
    assert not (world.day / "far/a").exists()
    assert not (world.place / "cback.stage").exists()


def test_a_peer_that_cannot_be_reached(world: World) -> None:
    result = world.one(free_port())
    assert isinstance(result.error, NotReady)
    assert "refused" in str(result.error)
    assert not (world.day / "cback.stage").exists()
    world.ignore = Ignore.ALL
    assert world.stage(free_port()).complete


def test_digests_of_many_files_are_made_there(sshd: Sshd, tmp_path: Path) -> None:
    names = [
        "plain",
        "with blank",
        "quo'te",
        'double"',
        "$(x)",
        "-n",
        "*",
        *(f"{number:03}{'x' * 200}" for number in range(300)),
    ]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    os.symlink("plain", tmp_path / "link")
    transport = open_transport(sshd.location(tmp_path), sshd.settings())
    algorithm = transport.far_algorithm
    assert algorithm in ("sha256", "blake3")
    sizes = {name: len(name.encode()) for name in names}
    found = transport.far_digests({**sizes, "link": 5, "none": 1})
    whole = transport.far_digests({"plain": 4})
    transport.close()
    assert found[-2:] == [None, None]
    assert whole == [None]  # of another length
    assert all(digest is not None for digest in found[:-2])
    if algorithm == "sha256":
        import hashlib

        assert [digest.hex for digest in found[:-2] if digest is not None] == [
            hashlib.sha256(name.encode()).hexdigest() for name in names
        ]


def test_a_name_that_no_shell_can_be_given(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "back\\slash").write_bytes(b"x")
    transport = open_transport(sshd.location(tmp_path), sshd.settings())
    assert transport.far_digests({"back\\slash": 1}) == [None]
    transport.close()


def test_peers_of_other_hosts_are_reached_as_the_configured_account(sshd: Sshd) -> None:
    """Their keys belong to that account; so does what is staged, and not a step is root's."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another account")
    nobody = pwd.getpwnam("nobody")
    root = Path(tempfile.mkdtemp(prefix="statepool-stage-", dir="/var/tmp"))
    try:
        root.chmod(0o755)
        (root / "near").mkdir(mode=0o700)  # only root can read it
        (root / "far").mkdir()
        for name in ("near", "far"):
            (root / name / "a").write_bytes(name.encode())
            (root / name / "cback.collect").touch()
        key = root / "key"
        key.write_bytes(sshd.identity.read_bytes())
        key.chmod(0o600)
        os.chown(key, nobody.pw_uid, -1)
        config = root / "ssh_config"
        config.write_text(sshd.ssh_config.read_text().replace(str(sshd.identity), str(key)))
        known = sshd.known_hosts.read_text()
        (root / "known_hosts").write_text(known)
        config.write_text(
            config.read_text().replace(str(sshd.known_hosts), str(root / "known_hosts"))
        )
        (root / "statepool.toml").write_text(
            f'[stage]\ndirectory = "{root}/staging"\nuser = "nobody"\n'
            f'ssh-config = "{config}"\n'
            f'[[stage.peers]]\nname = "near"\nlocation = "{root}/near"\n'
            f'[[stage.peers]]\nname = "far"\nlocation = "ssh://store{root}/far"\n'
        )
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "statepool",
                "--config",
                str(root / "statepool.toml"),
                "stage",
                "-v",
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )
        assert done.returncode == 0, done.stderr
        (day,) = (root / "staging").glob("????/??/??")
        assert tree(day)["far/a"] == b"far"
        assert tree(day)["near/a"] == b"near"
        owners = {str(path.relative_to(day)): path.stat().st_uid for path in day.rglob("*")}
        assert set(owners.values()) == {nobody.pw_uid}, owners
    finally:
        shutil.rmtree(root)
