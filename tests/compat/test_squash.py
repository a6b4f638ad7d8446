"""Setting a state from a working image that stands on this very state."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import statepool
from statepool.errors import Conflict, HasDependants, InUse
from statepool.qcow2.tool import QemuImg
from statepool.testing.trees import photograph

SIZE = 1 << 20
BLOCK = 64 << 10

Make = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]


class Lab:
    """
    A cache and a pool with the chain ``customize``, ``install``, and a working image on its tip
    that was written to.
    """

    def __init__(self, root: Path, make: Make, write: Write, qemu_img: Callable[..., str]) -> None:
        self.root, self.write, self.qemu_img = root, write, qemu_img
        statepool.init(root / "pool")
        self.pool = statepool.StatePool(root / "cache", [root / "pool"])
        self.disk = self.pool.image("vm1/disk")
        self.work = make(root / "work.qcow2", SIZE, writes=[(0, BLOCK, 1)])
        self.disk.set("install", source=self.work)
        write(self.work, [(BLOCK, BLOCK, 2), (2 * BLOCK, BLOCK, 2)])
        self.disk.set("customize", source=self.work)
        write(self.work, [(2 * BLOCK, BLOCK, 3), (3 * BLOCK, BLOCK, 3)])

    def content(self, path: Path) -> list[int]:
        """:returns: the first byte of each of the first blocks of an image"""
        raw = self.root / "content.raw"
        self.qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        return [raw.read_bytes()[number * BLOCK] for number in range(5)]

    def state(self, name: str, cache: str = "other") -> list[int]:
        """:returns: the same of a state, as another host gets it"""
        path = self.root / f"{name}-{cache}.qcow2"
        statepool.StatePool(self.root / cache, [self.root / "pool"]).image("vm1/disk").get(
            name, to=path
        )
        return self.content(path)


@pytest.fixture
def lab(
    tmp_path: Path, make_image: Make, write_to_image: Write, qemu_img: Callable[..., str]
) -> Lab:
    return Lab(tmp_path, make_image, write_to_image, qemu_img)


def test_both_become_the_new_content(lab: Lab) -> None:
    before = {listed.manifest.state: listed.manifest for listed in lab.disk.show()}
    stored = lab.disk.set("customize", source=lab.work, squash=True)
    assert [str(at.result) for at in stored.pools] == ["stored", "stored"]
    after = {listed.manifest.state: listed.manifest for listed in lab.disk.show()}
    assert set(after) == {"customize", "install"}
    assert after["customize"].parent == before["customize"].parent  # a new file, on the old parent
    assert after["customize"].digest != before["customize"].digest
    assert lab.state("customize") == [1, 2, 3, 3, 0]
    assert lab.content(lab.work) == [1, 2, 3, 3, 0]
    lab.write(lab.work, [(4 * BLOCK, BLOCK, 4)])
    assert lab.disk.set("connect", source=lab.work).complete
    assert lab.state("connect") == [1, 2, 3, 3, 4]
    assert all(checked.problem is None for checked in lab.pool.verify())


def test_nothing_is_left_of_the_old_content(lab: Lab) -> None:
    lab.disk.set("customize", source=lab.work, squash=True)
    digests = {str(listed.manifest.digest).replace(":", "-") for listed in lab.disk.show()}
    for place in ("cache", "pool"):
        assert {path.name for path in (lab.root / place / ".statepool/data").iterdir()} == digests
        assert list((lab.root / place / ".statepool/incoming").iterdir()) == []
    assert list((lab.root / "cache/.statepool/working").iterdir()) == []
    assert len(list((lab.root / "cache").rglob(".uses/*.json"))) == 1
    assert sorted(path.name for path in lab.root.iterdir()) == ["cache", "pool", "work.qcow2"]


def test_a_state_that_stands_on_nothing(lab: Lab) -> None:
    lab.disk.unset("customize", scope="all")
    lab.disk.get("install", to=lab.work, overwrite=True)
    lab.write(lab.work, [(BLOCK, BLOCK, 9)])
    assert lab.disk.set("install", source=lab.work, squash=True).complete
    (listed,) = lab.disk.show()
    assert listed.manifest.parent is None
    assert lab.state("install") == [1, 9, 0, 0, 0]


def test_without_asking_it_is_a_conflict(lab: Lab) -> None:
    before = photograph(lab.root)
    for options in ({}, {"replace": True}):
        with pytest.raises(Conflict, match="stands on vm1/disk customize itself"):
            lab.disk.set("customize", source=lab.work, **options)
    assert photograph(lab.root) == before


def test_where_nothing_was_written_uploads_are_completed(lab: Lab) -> None:
    lab.disk.get("customize", to=lab.work, overwrite=True)
    lab.disk.unset("customize", scope="shared")
    stored = lab.disk.set("customize", source=lab.work, squash=True)
    assert [str(at.result) for at in stored.pools] == ["present", "stored"]
    assert lab.state("customize") == [1, 2, 2, 0, 0]


def test_another_name_is_set_as_ever(lab: Lab) -> None:
    assert lab.disk.set("connect", source=lab.work, squash=True).complete
    assert lab.state("connect") == [1, 2, 3, 3, 0]
    assert lab.state("customize") == [1, 2, 2, 0, 0]


def test_refused_while_something_stands_on_it(lab: Lab) -> None:
    other = lab.root / "other.qcow2"
    lab.disk.get("customize", to=other)
    lab.write(other, [(4 * BLOCK, BLOCK, 7)])
    lab.disk.set("connect", source=other)
    before = photograph(lab.root)
    with pytest.raises(HasDependants) as caught:
        lab.disk.set("customize", source=lab.work, squash=True)
    assert caught.value.dependants == ("vm1/disk connect",)
    assert photograph(lab.root) == before


def test_refused_while_a_machine_runs(lab: Lab) -> None:
    before = photograph(lab.root)
    descriptor = os.open(lab.work, os.O_RDWR)
    try:
        with pytest.raises(InUse):
            lab.disk.set("customize", source=lab.work, squash=True)
    finally:
        os.close(descriptor)
    assert photograph(lab.root) == before


def test_a_dry_run(lab: Lab) -> None:
    before = photograph(lab.root)
    assert (
        lab.disk.set("customize", source=lab.work, squash=True, dry_run=True).pools[0].result
        == "stored"
    )
    assert photograph(lab.root) == before


def test_when_it_fails_half_way(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise statepool.ToolError("qemu-img went away")

    before = photograph(lab.root)
    with monkeypatch.context() as patch:
        patch.setattr(QemuImg, "rebase", fail)
        with pytest.raises(statepool.ToolError):
            lab.disk.set("customize", source=lab.work, squash=True)
    after = photograph(lab.root)
    # The links of the parent's chain stay, which gc takes away.
    assert {
        path for path in after if after[path] != before.get(path) and "/chains/" not in path
    } == set()
    assert set(before) <= set(after)
    assert lab.disk.set("customize", source=lab.work, squash=True).complete
    assert lab.state("customize") == [1, 2, 3, 3, 0]


def test_an_image_with_a_second_name(lab: Lab) -> None:
    """
    It cannot be taken over, since somebody means it by the other name: so its content is copied.
    """
    os.link(lab.work, lab.root / "second-name.qcow2")
    assert lab.disk.set("customize", source=lab.work, squash=True).complete
    assert lab.state("customize") == [1, 2, 3, 3, 0]
    assert not lab.work.samefile(lab.root / "second-name.qcow2")
