"""The named safety checks, on every kind of hostile image, without a tool."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from statepool.errors import MissingFile, UnsafeImage
from statepool.model.names import MAX_LENGTH
from statepool.qcow2.chain import walk
from statepool.qcow2.checks import (
    CHECKS,
    LARGE,
    Backing,
    check_file,
    check_header,
    check_image,
    check_parent_place,
    sibling_of,
    warnings,
)
from statepool.qcow2.header import EXTENSION_BITMAPS, Header, read_header
from tests.support.images import CHILD, GOOD, HOSTILE, Forged, HostileImage, hostile_images


def header_of(forged: Forged) -> Header:
    data = forged.build()
    return read_header(lambda offset, size: data[offset : offset + size], len(data), "an image")


def check(forged: Forged, **given: Any) -> Header:
    data = forged.build()
    return check_image(
        lambda offset, size: data[offset : offset + size], len(data), "an image", **given
    )


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this process opens; running a program fails the test."""
    names: list[str] = []
    real = os.open

    def watched(path: Any, flags: int, *arguments: Any, **keywords: Any) -> int:
        names.append(os.fspath(path))
        return real(path, flags, *arguments, **keywords)

    def no_program(*_: Any, **__: Any) -> None:
        pytest.fail("a program was run")

    monkeypatch.setattr(os, "open", watched)
    monkeypatch.setattr(subprocess, "Popen", no_program)
    monkeypatch.setattr(os, "posix_spawn", no_program)
    return names


def refusal_of(image: HostileImage, backing: Backing, open_in: Any) -> UnsafeImage:
    if not image.walk:
        with pytest.raises(UnsafeImage) as caught:
            check_file(image.path, backing=backing)
    else:
        with open_in(image.path.parent) as open_image, pytest.raises(UnsafeImage) as caught:
            walk(image.name, open_image, backing=backing)
    return caught.value


def test_every_hostile_image_is_refused_by_its_check_without_a_tool(
    tmp_path: Path, opened: list[str], open_in: Any
) -> None:
    directory = tmp_path.resolve()
    images = list(hostile_images(directory))
    del opened[:]
    got = {image.name: refusal_of(image, Backing.SIBLING, open_in).check for image in images}
    assert got == {image.name: image.check for image in images}
    assert {Path(name).parent for name in opened} == {directory}
    check_file(directory / "parent.qcow2", parent=None)
    check_file(directory / "child.qcow2", parent="parent")


def test_a_directory_before_a_backing_name_is_all_that_unmanaged_images_may_have_more(
    tmp_path: Path, open_in: Any
) -> None:
    for image in hostile_images(tmp_path):
        if image.name == "backing-absolute-image":
            assert sibling_of(check_file(image.path, backing=Backing.UNMANAGED)) == "parent"
        else:
            expected = "backing-sibling" if image.name == "backing-absolute" else image.check
            assert refusal_of(image, Backing.UNMANAGED, open_in).check == expected


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (_, check) in HOSTILE.items()
        if check in ("backing-json", "backing-protocol", "backing-characters")
    ],
)
def test_working_images_have_no_protocols_either(name: str) -> None:
    data = HOSTILE[name][0]()
    with pytest.raises(UnsafeImage) as caught:
        check_image(
            lambda offset, size: data[offset : offset + size],
            len(data),
            "an image",
            backing=Backing.WORKING,
        )
    assert caught.value.check == HOSTILE[name][1]


@pytest.mark.parametrize("snapshots", [0, 2])
def test_a_file_is_not_far_longer_than_its_disk_can_need(snapshots: int) -> None:
    disk = 1 << 20
    longest = (LARGE + 4 * disk) * (1 + snapshots)
    header = evolve(
        header_of(GOOD),
        virtual_size=disk,
        snapshots=snapshots,
        snapshots_offset=1 << 20,
        file_size=longest,
    )
    check_header(header, "an image", backing=Backing.NONE)
    with pytest.raises(
        UnsafeImage, match=f"it has {longest + 1} bytes, for a disk of {disk}"
    ) as caught:
        check_header(evolve(header, file_size=longest + 1), "an image", backing=Backing.NONE)
    assert caught.value.check == "proportion"


def test_every_check_has_a_reason_and_an_image_that_it_refuses(tmp_path: Path) -> None:
    assert all(reason.endswith(".") and len(reason) > 20 for reason in CHECKS.values())
    shown_elsewhere = {
        "proportion",
        "backing",
        "backing-relative",
        "backing-elsewhere",
        "parent",
        "l2-tables",
        "clusters",
    }
    # tests/unit/qcow2/test_clusters.py
    shown_elsewhere |= {"l2-entries", "cluster-alignment", "cluster-overlap", "compressed"}
    assert {image.check for image in hostile_images(tmp_path)} | shown_elsewhere == set(CHECKS)


def place(
    backing: bytes,
    *,
    root: str = "/srv/pool",
    own: str = "vm2/disk/custom.qcow2",
    links: bool = False,
) -> None:
    parent = "vm2/disk/install.qcow2"
    check_parent_place(
        header_of(evolve(CHILD, backing=backing)),
        "vm2/disk custom",
        root=root,
        own=own,
        parent=parent,
        links=links,
    )


@pytest.mark.parametrize(
    "directory",
    [
        "",
        "/srv/pool/vm2/disk/",
        "/srv//pool/./vm2/disk/",
        "/mnt/pool/vm1/disk/",
        "/srv/pool-beside/vm1/disk/",
        "/",
    ],
)
def test_a_parent_beside_an_image_or_of_another_place(directory: str) -> None:
    for links in (False, True):
        place(f"{directory}install.qcow2".encode(), links=links)


@pytest.mark.parametrize(
    "directory",
    ["/srv/pool/vm1/disk/", "/srv/pool/", "//srv//pool/vm2/", "/srv/pool/.statepool/chains/x/"],
)
def test_a_parent_that_is_another_object_of_the_same_pool(directory: str) -> None:
    for links in (False, True):
        with pytest.raises(UnsafeImage, match="another place of this pool") as caught:
            place(f"{directory}install.qcow2".encode(), links=links)
        assert caught.value.check == "backing-elsewhere"
        assert "rebase -u" in (caught.value.hint or "")


def test_a_root_image_on_what_is_beside_it() -> None:
    with pytest.raises(UnsafeImage, match="backing-elsewhere"):
        place(b"install.qcow2", own="vm2/disk.qcow2")
    place(b"/srv/pool/vm2/disk/install.qcow2", own="vm2/disk.qcow2")


def test_a_pool_behind_a_symbolic_link(tmp_path: Path) -> None:
    for machine in ("vm1", "vm2"):
        (tmp_path / "pool" / machine / "disk").mkdir(parents=True)
    (tmp_path / "link").symlink_to("pool")
    for here, there in (("pool", "link"), ("link", "pool")):
        place(
            os.fsencode(tmp_path / there / "vm2/disk/install.qcow2"),
            root=str(tmp_path / here),
            links=True,
        )
        with pytest.raises(UnsafeImage, match="backing-elsewhere"):
            place(
                os.fsencode(tmp_path / there / "vm1/disk/install.qcow2"),
                root=str(tmp_path / here),
                links=True,
            )


def test_what_may_back_a_working_image() -> None:
    assert (
        check(evolve(CHILD, backing=b"/any/where/../x:y.img"), backing=Backing.WORKING).backing_name
        == b"/any/where/../x:y.img"
    )
    assert check(GOOD, backing=Backing.WORKING).backing_name is None
    with pytest.raises(UnsafeImage) as caught:
        check(CHILD, backing=Backing.WORKING)
    assert caught.value.check == "backing-relative"


def test_where_nothing_may_back_an_image() -> None:
    assert check(GOOD, backing=Backing.NONE).backing_name is None
    with pytest.raises(UnsafeImage) as caught:
        check(CHILD, backing=Backing.NONE)
    assert caught.value.check == "backing"


@pytest.mark.parametrize(
    ("forged", "parent"), [(CHILD, "other"), (CHILD, "paren"), (CHILD, None), (GOOD, "parent")]
)
def test_another_parent_than_the_known_one_is_refused(forged: Forged, parent: str | None) -> None:
    with pytest.raises(UnsafeImage) as caught:
        check(forged, parent=parent)
    assert caught.value.check == "parent"


@pytest.mark.parametrize("backing", [Backing.SIBLING, Backing.UNMANAGED])
def test_the_known_parent_is_accepted(backing: Backing) -> None:
    check(CHILD, parent="parent", backing=backing)
    check(GOOD, parent=None, backing=backing)
    check(CHILD, backing=backing)
    check(GOOD, backing=backing)


@pytest.mark.parametrize(
    "forged",
    [
        evolve(CHILD, version=2),
        evolve(CHILD, incompatible=8, compression=1),
        evolve(CHILD, compatible=1),
        evolve(CHILD, compatible=1 << 40, autoclear=1 << 40),
        evolve(CHILD, extensions=((0x12345678, b"something of a later version"),)),
        evolve(GOOD, virtual_size=0, l1_size=0, l1_offset=0, length=3 << 12),
        evolve(CHILD, refcount_order=0),
        evolve(CHILD, refcount_order=6),
        evolve(CHILD, snapshots=2, snapshots_offset=4 << 12, length=1 << 16),
        evolve(CHILD, backing=b"0root.qcow2"),
        evolve(CHILD, backing=b"a" * MAX_LENGTH + b".qcow2"),
    ],
)
def test_what_is_unusual_but_sound_is_accepted(forged: Forged) -> None:
    check(forged)


@pytest.mark.parametrize(
    "name",
    [b"a" * (MAX_LENGTH + 1) + b".qcow2", b".qcow2", b"x.qcow2.qcow2", b"x.lock.qcow2", b"X.QCOW2"],
)
def test_backing_names_are_names_of_states(name: bytes) -> None:
    with pytest.raises(UnsafeImage) as caught:
        check(evolve(CHILD, backing=name))
    assert caught.value.check == "backing-sibling"


def test_siblings_are_told_without_their_directory() -> None:
    assert sibling_of(header_of(GOOD)) is None
    assert sibling_of(header_of(CHILD)) == "parent"
    assert sibling_of(header_of(evolve(CHILD, backing=b"/srv/x/parent.qcow2"))) == "parent"
    with pytest.raises(UnsafeImage) as caught:
        sibling_of(header_of(evolve(CHILD, backing=b"/etc/hostname")))
    assert caught.value.check == "backing-sibling"


def test_snapshots_and_bitmaps_are_warned_of() -> None:
    bitmaps = ((EXTENSION_BITMAPS, struct.pack(">IIQQ", 1, 0, 32, 5 << 12)),)
    header = check(
        evolve(
            GOOD,
            snapshots=2,
            snapshots_offset=4 << 12,
            autoclear=1,
            extensions=bitmaps,
            length=1 << 16,
        )
    )
    assert warnings(header) == (
        "it has 2 internal snapshots, which its children do not see",
        "it has 1 persistent bitmap, which its children do not see",
    )
    assert warnings(header_of(GOOD)) == ()


def test_messages_show_strange_names_harmlessly() -> None:
    with pytest.raises(UnsafeImage) as caught:
        check_header(header_of(evolve(CHILD, backing=b"a\n\x1b[31m" + b"b" * 500)), "vm1/disk x")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        check_file(tmp_path / "nothing.qcow2")
