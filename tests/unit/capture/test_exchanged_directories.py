"""
Directories of working images whose owner exchanges them, or what is in them, while this account is
at work there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from statepool.cache import get_journal, working
from statepool.cache.cache import Cache
from statepool.cache.get_journal import Place, make_together
from statepool.cache.working import make_working
from statepool.capture import capture_journal, scratch
from statepool.capture.capture import Capture, files_of
from statepool.errors import BadRecord, FileInTheWay, InUse
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.qcow2.overlay import create_overlay

if TYPE_CHECKING:
    from tests.support.lab import Lab

ON = StateId("vm1", "on", Kind.MACHINE)


@pytest.fixture
def chain(lab: Lab) -> tuple[Manifest, ...]:
    cache = lab.cache()
    lab.put(cache.pool, "base")
    return lab.chain(cache.pool, "base")


@pytest.fixture
def cache(lab: Lab, chain: tuple[Manifest, ...]) -> Cache:  # it must have that state
    return lab.cache()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    place.mkdir()
    return place


class Elsewhere:
    """
    Another directory, in which there is something under every name that is in the first.

    :param place: which becomes a link to it
    """

    def __init__(self, place: Path) -> None:
        self.path = place.with_name("elsewhere")
        self._place = place
        self._before: dict[str, str] = {}

    def exchange(self) -> None:
        if self._place.is_symlink():
            return
        self.path.mkdir()
        for file in (*self._place.iterdir(), Path("vm.qcow2"), Path("ram")):
            (self.path / file.name).write_text("precious")
        self._before = self._found()
        self._place.rename(self._place.with_name("real"))
        self._place.symlink_to(self.path)

    def _found(self) -> dict[str, str]:
        return {
            file.name: file.read_bytes().decode(errors="replace") for file in self.path.iterdir()
        }

    def check(self) -> None:
        assert self._before, "nothing was exchanged"
        assert self._found() == self._before


@pytest.fixture
def elsewhere(place: Path) -> Elsewhere:
    return Elsewhere(place)


def first(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, do: Callable[[], object]) -> None:
    """Do something before a function is called."""
    real = getattr(where, name)

    def function(*arguments: Any, **options: Any) -> Any:
        do()
        return real(*arguments, **options)

    monkeypatch.setattr(where, name, function)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_working_image(
    cache: Cache,
    chain: tuple[Manifest, ...],
    place: Path,
    elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
) -> None:
    first(monkeypatch, working, "_settle", elsewhere.exchange)
    if overwrite:
        (place / "vm.qcow2").touch()
    make_working(cache, chain, place / "vm.qcow2", overwrite=overwrite)
    elsewhere.check()
    assert [file.name for file in place.with_name("real").iterdir()] == ["vm.qcow2"]


def test_a_working_image_that_does_not_come_about(
    cache: Cache,
    chain: tuple[Manifest, ...],
    place: Path,
    elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first(monkeypatch, working.Fresh, "drop", elsewhere.exchange)
    (place / "vm.qcow2").touch()
    with pytest.raises(FileInTheWay):
        make_working(cache, chain, place / "vm.qcow2")
    elsewhere.check()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another account")
def test_no_other_file_is_given_away(
    cache: Cache, chain: tuple[Manifest, ...], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A file of this account in the attacker's directory gets the name of the one that was just made.
    """
    secret = place / "secret"
    secret.write_text("precious")
    secret.chmod(0o600)
    (place / "vm.qcow2").touch()
    os.chown(place / "vm.qcow2", 64_321, 64_321)

    def exchange() -> None:
        (temporary,) = place.glob(".statepool-*")
        secret.rename(temporary)

    first(monkeypatch, working.Fresh, "finish", exchange)
    with pytest.raises(InUse, match="as soon as it was made"):
        make_working(cache, chain, place / "vm.qcow2", overwrite=True)
    assert [
        file
        for file in place.iterdir()
        if file.read_bytes() == b"precious" and file.stat().st_uid != os.geteuid()
    ] == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_working_images_of_a_machine(
    cache: Cache,
    chain: tuple[Manifest, ...],
    place: Path,
    elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
) -> None:
    first(monkeypatch, get_journal.Place, "put", elsewhere.exchange)
    if overwrite:
        (place / "vm.qcow2").touch()
    make_together(cache, {place / "vm.qcow2": chain}, overwrite=overwrite)
    elsewhere.check()
    assert [file.name for file in place.with_name("real").iterdir()] == ["vm.qcow2"]


def test_a_marker_of_a_get_names_nothing_else(cache: Cache, place: Path) -> None:
    (place / "precious").touch()
    good = place / ".statepool-0123456789abcdef-0.tmp"
    for to, temporary in (
        (place / "a", place / "precious"),
        (place / "a", place.parent / good.name),
    ):
        staging = cache.stage(
            [], intent=get_journal.INTENT, places=get_journal._to_text([Place(to, temporary, "")])
        )
        with pytest.raises(BadRecord, match="no passing name"):
            get_journal.recover_together(cache, staging.marker)
        staging.end()
    assert (place / "precious").exists()


def test_the_ram_of_a_machine(
    lab: Lab, cache: Cache, place: Path, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "ram").write_bytes(b"memory")
    (lab.root / "disk.qcow2").write_bytes(lab.image("x"))
    first(monkeypatch, capture_journal, "_settle", elsewhere.exchange)
    Capture(
        cache,
        ON,
        files_of(ON, {"disk": lab.root / "disk.qcow2"}, place / "ram"),
        fingerprint={"cpu": "max"},
    ).run()
    elsewhere.check()


def test_a_directory_for_images_that_do_not_last(cache: Cache, chain: tuple[Manifest, ...]) -> None:
    """In a cache that a group shares, its members can exchange the directories above it."""
    cache.root.chmod(0o2775)
    (cache.root / ".statepool").chmod(0o2775)
    shared = Cache.open(cache.pool, cache.settings)
    with scratch.scratch(shared) as made:
        make_working(shared, chain, made.path / "vm.qcow2")
        accounts = cache.root / ".statepool/accounts"
        assert made.path.is_relative_to(accounts)
        victim = cache.root.parent / "victim"
        victim.mkdir()
        (victim / "vm.qcow2").write_text("precious")
        accounts.rename(accounts.with_name("real"))
        Path(accounts, str(os.geteuid()), "working").mkdir(parents=True)
        Path(made.path).symlink_to(victim)
    assert (victim / "vm.qcow2").read_text() == "precious"


def test_qemu_img_writes_the_file_that_was_made(place: Path) -> None:
    """What it is asked for is not laid out by ourselves."""
    (place / "precious").write_text("precious")

    class Tool:
        def create_overlay(
            self, path: str, backing_name: str, virtual_size: int, *, cluster_size: int
        ) -> None:
            (place / "vm.qcow2").unlink()
            (place / "vm.qcow2").symlink_to(place / "precious")
            Path(path).write_text("overlay")

    create_overlay(place / "vm.qcow2", 1 << 30, "parent.qcow2", cluster_size=4096, tool=Tool())  # type: ignore[arg-type]
    assert (place / "precious").read_text() == "precious"
