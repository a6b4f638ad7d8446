"""
Pools on other hosts that are missing, closed, hostile or odd: one clear line and its exit code, and
nothing is changed; never a hang.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.model.location import Location
from statepool.model.outcomes import Level
from statepool.model.settings import Settings
from statepool.testing.trees import photograph
from tests.support.sshd import Sshd, make_key, run_sshd

KIB = 1 << 10
USAGE, REFUSED, INTEGRITY, TRANSPORT = 2, 4, 5, 7


class There:
    """A pool on another host, and the command line that uses it."""

    def __init__(
        self,
        run: Callable[..., Any],
        settings: Settings,
        directory: Path,
        location: Location,
        here: Path,
    ) -> None:
        self.run_statepool = run
        self.settings = settings
        self.directory = directory
        self.location = location
        self.here = here
        self.environ = {
            "STATEPOOL_SSH_CONFIG": str(settings.ssh_config),
            "STATEPOOL_KNOWN_HOSTS": str(settings.known_hosts),
            "STATEPOOL_RETRIES": "0",
            "STATEPOOL_TIMEOUT": "20",
        }

    def run(
        self,
        *arguments: str | Path,
        code: int | None = 0,
        env: Mapping[str, str] = {},
        cache: str = "cache",
    ) -> Any:
        source = () if arguments[0] in ("init", "adopt") else ("--source", str(self.location))
        return self.run_statepool(
            "--cache",
            self.here / cache,
            *source,
            *arguments,
            code=code,
            env={**self.environ, **env},
        )

    def refused(self, code: int, *arguments: str | Path, **more: Any) -> str:
        """:returns: the one line that says why. Nothing there was changed."""
        before = photograph(self.directory) if self.directory.is_dir() else None
        ran = self.run(*arguments, code=code, **more)
        assert ran.err.startswith("statepool: "), ran.err
        assert ran.err.count("\n") == 1, ran.err
        assert before is None or photograph(self.directory) == before
        return ran.err

    def states(self, cache: str = "cache") -> statepool.StatePool:
        """:returns: the same in this process, which is faster"""
        return statepool.StatePool(
            cache=self.here / cache, sources=[self.location], settings=self.settings
        )

    def findings(self) -> str:
        return "\n".join(
            f"{finding.what} ({finding.cure})"
            for finding in self.states().doctor()
            if finding.where == str(self.location)
        )

    def get(self, state: str = "customize") -> None:
        """Into a cache that has nothing yet."""
        self.states("second").image("vm1/disk").get(state)


@pytest.fixture
def on(run_statepool: Callable[..., Any], tmp_path: Path) -> Callable[..., There]:
    """``on(server, directory)``: a pool on a server, whether it is there or not."""

    def make(server: Any, directory: Path, **knobs: Any) -> There:
        location = (
            server.location(directory)
            if isinstance(server, Sshd)
            else Location("ssh", str(directory), "127.0.0.1", "kim", server.port)
        )
        return There(
            run_statepool, server.settings(retries=0, **knobs), directory, location, tmp_path
        )

    return make


@pytest.fixture
def filled(
    sshd: Sshd, on: Callable[..., There], tmp_path: Path, make_image: Callable[..., Path]
) -> There:
    """A pool with ``install`` and ``customize``."""
    place = on(sshd, tmp_path / "pool")
    fill(place, make_image, by=place.directory)
    return place


def fill(place: There, make_image: Callable[..., Path], by: Path | None = None) -> None:
    """
    :param by: the directory itself, where it does not matter how the states have come there
    """
    where = by or place.location
    statepool.init(where, settings=place.settings)
    work = make_image(place.here / "work.qcow2", 1024 * KIB, writes=[(0, 256 * KIB, 1)])
    image = statepool.StatePool(
        cache=place.here / "cache", sources=[where], settings=place.settings
    ).image("vm1/disk")
    for state in ("install", "customize"):
        image.set(state, source=work)


# -- hosts that do not let us in


def test_an_unknown_host(filled: There) -> None:
    line = filled.refused(
        TRANSPORT,
        "show",
        env={"STATEPOOL_KNOWN_HOSTS": os.devnull, "STATEPOOL_SSH_CONFIG": os.devnull},
    )
    assert "is not known" in line
    assert "ssh-keyscan" in line


def test_a_wrong_key_and_a_password_that_is_not_shown(
    sshd: Sshd, on: Callable[..., There], tmp_path: Path
) -> None:
    config = tmp_path / "wrong_config"
    config.write_text(
        f"Host *\n  IdentityFile {make_key(tmp_path / 'wrong')}\n  HostKeyAlias sshd-under-test\n"
    )
    place = on(sshd, tmp_path)
    env = {
        "STATEPOOL_SSH_CONFIG": str(config),
        "STATEPOOL_SSH_PASSWORD": "hunter2",
        "STATEPOOL_SSH_PASSPHRASE": "open sesame",
    }
    for verbose in ((), ("-v",)):
        ran = place.run("show", *verbose, code=TRANSPORT, env=env)
        assert "does not let us in" in ran.err
        assert "hunter2" not in ran.out + ran.err
        assert "sesame" not in ran.out + ran.err


# -- directories that are no pools


def test_a_path_that_is_not_there(sshd: Sshd, on: Callable[..., There], tmp_path: Path) -> None:
    place = on(sshd, tmp_path / "missing")
    assert "is not a pool" in place.refused(TRANSPORT, "show")
    assert not (tmp_path / "missing").exists(), "an empty pool is not guessed"


def test_an_empty_directory(sshd: Sshd, on: Callable[..., There], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in (("show",), ("verify",), ("get", "vm1/disk", "install")):
        assert "is not a pool" in on(sshd, tmp_path / "empty").refused(TRANSPORT, *arguments)


def test_a_path_that_is_a_file(sshd: Sshd, on: Callable[..., There], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    place = on(sshd, tmp_path / "file")
    for arguments in (("show",), ("init", str(place.location))):
        assert str(place.location) in place.refused(TRANSPORT, *arguments)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_below_a_file(sshd: Sshd, on: Callable[..., There], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    place = on(sshd, tmp_path / "file/pool")
    for arguments in (("show",), ("init", str(place.location))):
        place.refused(TRANSPORT, *arguments)


def test_a_path_outside_of_what_the_account_may_see(
    chrooted_sshd: Sshd, on: Callable[..., There], tmp_path: Path
) -> None:
    place = on(chrooted_sshd, chrooted_sshd.root)
    place.location = Location(
        "ssh", "/../../etc", "127.0.0.1", chrooted_sshd.user, chrooted_sshd.port
    )
    place.refused(TRANSPORT, "show")


@pytest.mark.parametrize(
    "arguments", [("show",), ("get", "vm1/disk", "install"), ("init", "LOCATION")]
)
def test_a_directory_that_the_account_may_not_enter(
    chrooted_sshd: Sshd, on: Callable[..., There], arguments: tuple[str, ...]
) -> None:
    directory = chrooted_sshd.directory_for(f"closed-{arguments[0]}")
    os.chown(directory, 0, 0)
    directory.chmod(0o700)
    place = on(chrooted_sshd, directory)
    line = place.refused(
        TRANSPORT,
        *(str(place.location) if argument == "LOCATION" else argument for argument in arguments),
    )
    assert "Permission denied" in line


def test_a_pool_that_the_account_may_only_read(
    chrooted_sshd: Sshd, on: Callable[..., There], make_image: Callable[..., Path]
) -> None:
    place = on(chrooted_sshd, chrooted_sshd.directory_for("read-only"))
    fill(place, make_image)
    for path in (place.directory, *place.directory.rglob("*")):
        if not path.is_symlink():
            os.chown(path, 0, 0)
    other = make_image(place.here / "other.qcow2", 1024 * KIB)
    before = photograph(place.directory)
    ran = place.run("set", "vm1/disk", "other", "--from", other, code=TRANSPORT)
    assert "Permission denied" in ran.out + ran.err
    assert photograph(place.directory) == before
    place.get()
    assert "cannot write there" in place.findings()


# -- directories with what does not belong there


def names(place: There) -> list[str]:
    return sorted(str(item.manifest.id) for item in place.states("none").show())


def test_names_that_are_not_ours(filled: There) -> None:
    there = os.fsencode(filled.directory)
    expected = names(filled)
    for directory in (
        b"",
        b"/vm1",
        b"/vm1/disk",
        b"/.statepool/log",
        b"/.statepool/log/vm1",
        b"/.statepool/incoming",
        b"/.statepool/data",
    ):
        for name in (
            b"\xff\xfe.qcow2",
            b"line\nbreak.qcow2",
            b" ",
            b"-rf",
            b"$(reboot)",
            b"a" * 255,
            b"...",
        ):
            Path(os.fsdecode(there + directory + b"/" + name)).write_bytes(b"x")
    (filled.directory / "vm1/disk" / "dir.qcow2").mkdir()
    os.mkfifo(filled.directory / "vm1/disk/fifo.qcow2")
    assert names(filled) == expected
    filled.get()
    states = filled.states()
    assert all(checked.problem is None for checked in states.verify())
    states.gc(everywhere=True)
    assert not [finding for finding in states.doctor() if finding.level is Level.ERROR]
    for arguments in (("show",), ("tree",), ("doctor",)):
        filled.run(*arguments)


def test_links_in_the_place_of_states(filled: There, tmp_path: Path) -> None:
    """A view's place with a link that is not ours: it is neither followed nor shown."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    expected = names(filled)
    (filled.directory / "vm1/disk/stolen.qcow2").symlink_to(secret)
    (filled.directory / "vm1/disk/up.qcow2").symlink_to("../../../secret")
    (filled.directory / "vm2").symlink_to("..")
    assert names(filled) == expected


def test_bytes_that_are_a_link(filled: There, tmp_path: Path) -> None:
    """
    The very same bytes behind a link are not believed either: it can lead elsewhere in the next
    moment.
    """
    for file in (filled.directory / ".statepool/data").iterdir():
        moved = tmp_path / file.name
        shutil.move(file, moved)
        file.symlink_to(moved)
    line = filled.refused(INTEGRITY, "get", "vm1/disk", "customize", cache="second")
    assert "not a regular file" in line
    assert not any((filled.here / "second").rglob("*.qcow2"))


def test_records_that_are_links(filled: There, tmp_path: Path) -> None:
    record = next((filled.directory / ".statepool/log/vm1").iterdir())
    shutil.move(record, tmp_path / "record")
    record.symlink_to(tmp_path / "record")
    filled.refused(INTEGRITY, "get", "vm1/disk", "customize", cache="second")


def test_a_record_that_is_a_fifo(filled: There) -> None:
    record = next((filled.directory / ".statepool/log/vm1").iterdir())
    record.unlink()
    os.mkfifo(record)
    ran = filled.run("get", "vm1/disk", "customize", code=INTEGRITY, cache="second")
    assert "not a regular file" in ran.err


def test_bytes_that_are_not_those_promised(filled: There) -> None:
    for file in (filled.directory / ".statepool/data").iterdir():
        file.chmod(0o600)
        with file.open("r+b") as changed:
            changed.seek(-1, os.SEEK_END)
            changed.write(b"\xee")
    filled.refused(INTEGRITY, "get", "vm1/disk", "customize", cache="second")
    ran = filled.run("verify", code=INTEGRITY)
    assert "whole" in ran.out, "those in the cache are"


# -- servers that cannot, or know the time otherwise


def test_a_server_without_any_extension(
    bare_server: Callable[..., Any], on: Callable[..., There], make_image: Callable[..., Path]
) -> None:
    server = bare_server()
    place = on(server, server.directory / "pool")
    fill(place, make_image)
    assert names(place) == ["vm1/disk customize", "vm1/disk install"]
    place.get()
    place.states().gc(everywhere=True)
    assert all(checked.problem is None for checked in place.states().verify())
    findings = place.findings()
    for words in (
        "cannot flush files",
        "no hard links",
        "does not replace a file in one step",
        "how much space is free",
        "32 KiB at a time",
        "no shell",
    ):
        assert words in findings
    pool = place.states("third")
    work = make_image(place.here / "more.qcow2", 1024 * KIB, writes=[(0, 64 * KIB, 9)])
    stored = pool.image("vm1/disk").set("more", source=work)
    assert [there.durable for there in stored.pools] == [True, False]
    pool.image("vm1/disk").unset("customize", scope="shared")
    assert not pool.image("vm1/disk").check("customize")
    assert pool.image("vm1/disk").check("more")
    pool.close()


@pytest.mark.parametrize("ahead", [86400, -86400])
def test_a_clock_that_is_a_day_off(
    bare_server: Callable[..., Any],
    on: Callable[..., There],
    make_image: Callable[..., Path],
    ahead: int,
) -> None:
    server = bare_server(ahead=ahead)
    place = on(server, server.directory / "pool")
    fill(place, make_image)
    # A writer of another host is at work just now: a file without a marker yet is no leftover, by
    # any clock.
    young = place.directory / ".statepool/incoming/00000000-bytes"
    young.write_bytes(b"x")
    place.states().gc(everywhere=True)
    assert young.exists()
    place.get()
    place.states().image("vm1/disk").set("third", source=place.here / "work.qcow2")
    assert re.search(
        rf"its clock is about 86(399|40[0-9]) seconds {'ahead of' if ahead > 0 else 'behind'} ours",
        place.findings(),
    )


def test_what_doctor_says_of_a_good_host(filled: There) -> None:
    findings = filled.findings()
    assert "OpenSSH" in findings
    assert "SFTP has fsync, hardlink, posix-rename, statvfs, limits" in findings
    assert "a shell with " in findings
    assert "bytes are free" in findings
    assert "its clock" not in findings


@pytest.fixture
def slow_cipher_server(on: Callable[..., There], tmp_path: Path) -> Iterator[There]:
    with run_sshd(options={"Ciphers": "aes256-ctr"}) as server:
        yield on(server, tmp_path / "pool")


def test_what_doctor_says_of_a_slow_cipher(slow_cipher_server: There) -> None:
    statepool.init(slow_cipher_server.location, settings=slow_cipher_server.settings)
    assert "aes256-ctr is a slow cipher here" in slow_cipher_server.findings()


def test_a_path_that_is_not_utf8_is_one_like_others(sshd: Sshd, on: Callable[..., There]) -> None:
    place = on(sshd, sshd.directory_for("of \udcff"))
    place.run("init", str(place.location))
    assert (place.directory / ".statepool").is_dir()
    assert place.findings() != ""
