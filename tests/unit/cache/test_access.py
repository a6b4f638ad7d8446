"""
Who may do what with a working image, before and after another file took its place, and at each
moment between.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from attrs import evolve

from statepool.cache import access
from statepool.cache.access import Access
from statepool.cache.cache import Cache
from statepool.cache.get_journal import make_together
from statepool.cache.working import check_place, make_working
from statepool.capture import capture, capture_journal
from statepool.capture.capture import Capture, files_of
from statepool.capture.frozen import Names
from statepool.capture.squash import Squash
from statepool.errors import AccessDenied, Conflict, InUse, StatePoolError
from statepool.model.manifest import Kind, StateId
from statepool.pools.staging import Marker
from statepool.testing.trees import photograph
from tests.support.images import CHILD
from tests.support.privileges import permissions_count

if TYPE_CHECKING:
    from tests.support.lab import Lab

STRANGER, FRIENDS, DAEMON = 65534, 60, 1
BASE = StateId("vm1/disk", "base")
MINE = StateId("vm1/disk", "mine")
ACL = "system.posix_acl_access"
DEFAULT_ACL = "system.posix_acl_default"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give files to somebody else"
)

MACHINE = StateId("vm1", "mine", Kind.MACHINE)


def acl(owner: int, group: int, other: int, *, mask: int, **named: int) -> bytes:
    """
    :returns: an ACL in which DAEMON may do what ``named`` says, as ``linux/posix_acl_xattr.h`` has
        it
    """
    entries = [
        (1, owner, 0xFFFFFFFF),
        (2, named["daemon"], DAEMON),
        (4, group, 0xFFFFFFFF),
        (0x10, mask, 0xFFFFFFFF),
        (0x20, other, 0xFFFFFFFF),
    ]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def set_attribute(path: Path, name: str, value: bytes) -> None:
    try:
        os.setxattr(path, name, value)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip(f"the file system of temporary files has no {name}")


@pytest.fixture
def cache(lab: Lab) -> Cache:
    cache = lab.cache()
    lab.put(cache.pool, "base")
    return cache


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    place.mkdir()
    return place


@pytest.fixture
def work(cache: Cache, place: Path) -> Path:
    backing = os.fsencode(cache.chains.prepare(cache.pool.chain(BASE)))
    path = place / "work.qcow2"
    path.write_bytes(evolve(CHILD, backing=backing).build())
    return path


WAYS = ["set", "set-copied", "set-machine", "squash", "get", "get-machine"]


@pytest.fixture(params=WAYS)
def replace(request: pytest.FixtureRequest, cache: Cache, work: Path) -> Callable[[], object]:
    """Puts another image in the place of the working image."""
    if request.param == "set-copied":
        os.link(work, work.parent.parent / "second-name.qcow2")
    if request.param == "squash" and shutil.which("qemu-img") is None:
        pytest.skip("squashing needs qemu-img")
    chain = cache.pool.chain(BASE)
    ways: dict[str, Callable[[], object]] = {
        "set": lambda: Capture(cache, MINE, {MINE: work}).run(),
        "set-copied": lambda: Capture(cache, MINE, {MINE: work}).run(),
        "set-machine": lambda: Capture(cache, MACHINE, files_of(MACHINE, {"disk": work})).run(),
        "squash": lambda: Squash(Capture(cache, BASE, {BASE: work})).run(),
        "get": lambda: make_working(
            cache, chain, check_place(work, cache, (), overwrite=True), overwrite=True
        ),
        "get-machine": lambda: make_together(
            cache, {check_place(work, cache, (), overwrite=True): chain}, overwrite=True
        ),
    }
    return ways[request.param]


def seen(path: Path) -> tuple[int, int, int, dict[str, bytes]]:
    access = Access.of(path)
    return access.uid, access.gid, access.mode, dict(access.attributes)


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o640, 0o400, 0o666, 0o604])
def test_owner_group_and_mode_stay(work: Path, replace: Callable[[], object], mode: int) -> None:
    os.chown(work, STRANGER, FRIENDS)
    work.chmod(mode)
    inode = work.stat().st_ino
    replace()
    assert work.stat().st_ino != inode
    assert seen(work)[:3] == (STRANGER, FRIENDS, mode)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_umask_changes_nothing(work: Path, replace: Callable[[], object], umask: int) -> None:
    work.chmod(0o640)
    before = os.umask(umask)
    try:
        replace()
    finally:
        os.umask(before)
    assert seen(work)[2] == 0o640


def test_acl_and_attributes_stay(cache: Cache, work: Path, replace: Callable[[], object]) -> None:
    """
    And none of them on the bytes of a state: nobody else may write to these, nor read there what
    was noted on the image.
    """
    work.chmod(0o600)
    set_attribute(work, ACL, acl(6, 0, 0, mask=6, daemon=6))
    set_attribute(work, "user.owner", b"me")
    set_attribute(work, "security.test", b"label")
    before = seen(work)
    replace()
    assert seen(work) == before
    for path in (cache.root / ".statepool/data").iterdir():
        assert not {ACL, "user.owner"} & set(os.listxattr(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_default_acl_and_setgid_of_the_directory_add_nothing(
    place: Path, work: Path, replace: Callable[[], object]
) -> None:
    work.chmod(0o600)
    os.chown(place, 0, FRIENDS)
    place.chmod(0o2775)
    set_attribute(place, DEFAULT_ACL, acl(7, 7, 7, mask=7, daemon=7))
    replace()
    assert seen(work) == (0, os.getegid(), 0o600, {})


def test_it_is_never_open_to_more(
    cache: Cache, place: Path, work: Path, replace: Callable[[], object]
) -> None:
    """
    After each call into the system, no file beside the image, nor the image, nor a copy that is
    being made, is open to others than it was to.
    """
    os.chown(work, STRANGER, FRIENDS)
    work.chmod(0o640)
    os.chmod(place, 0o2777)
    wider: list[str] = []
    published: set[str] = {entry.name for entry in os.scandir(cache.root / ".statepool/data")}

    def look(frame: object, event: str, argument: Any) -> None:
        if event != "c_return" or getattr(argument, "__module__", None) != "posix":
            return
        for entry in os.scandir(place):
            found = entry.stat(follow_symlinks=False)
            if found.st_mode & 0o027 or (found.st_mode & 0o040 and found.st_gid != FRIENDS):
                wider.append(
                    f"{entry.name} {found.st_uid}:{found.st_gid} {found.st_mode:o} after"
                    f" {argument.__name__}"
                )

    umask = os.umask(0)
    sys.setprofile(look)
    try:
        replace()
    finally:
        sys.setprofile(None)
        os.umask(umask)
    assert wider == []
    assert published


@pytest.mark.parametrize("way", ["image", "machine"])
def test_a_set_that_fails_gives_all_of_it_back(
    cache: Cache, work: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = private(work)

    def fail(*names: Any, **options: Any) -> bool:
        assert seen(work)[:3:2] == (0, 0o400)
        raise Conflict("somebody else was faster")

    monkeypatch.setattr(cache.pool, "publish", fail)
    with pytest.raises(Conflict):
        take(cache, work, way)
    assert seen(work) == before


@pytest.mark.parametrize("way", ["image", "machine"])
@pytest.mark.parametrize("forwards", [True, False])
def test_after_a_crash_it_is_the_same(
    lab: Lab, cache: Cache, work: Path, way: str, forwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = private(work)
    inode = work.stat().st_ino
    with monkeypatch.context() as crash:
        die(crash, cache)
        with pytest.raises(Conflict, match="the end"):
            take(cache, work, way)
    if not forwards:
        refuse = Conflict("somebody else was faster")
        monkeypatch.setattr(cache.pool, "publish", raising(refuse))
    capture_journal.recover(cache)
    assert seen(work) == before
    assert (work.stat().st_ino == inode) != forwards
    assert lab.leftovers(cache.pool) == []
    made = cache.pool.find(MINE)
    assert (made is not None) == forwards
    if made is not None and made.digest is not None:
        assert seen(cache.data(made.digest)) == (0, FRIENDS, 0o444, {})


def test_a_copy_that_goes_back_is_the_same(
    lab: Lab, cache: Cache, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The bytes have got their name, and somebody else needs them under it: the image becomes a copy
    of them.
    """
    before = private(work)
    with monkeypatch.context() as crash:
        die(crash, cache, after_naming=True)
        with pytest.raises(Conflict, match="the end"):
            take(cache, work, "image")
    (named,) = [
        path
        for path in (cache.root / ".statepool/data").iterdir()
        if os.path.samestat(path.stat(), work.stat())
    ]
    monkeypatch.setattr(capture_journal, "finish", raising(Conflict("somebody else was faster")))
    monkeypatch.setattr(capture_journal, "_unnamed", lambda *arguments: False)
    capture_journal.recover(cache)
    assert seen(work) == before
    assert not os.path.samestat(named.stat(), work.stat())
    assert seen(named) == (0, FRIENDS, 0o444, {})
    assert lab.leftovers(cache.pool) == []


def test_what_was_written_to_a_half_taken_image_goes_back_with_it(
    cache: Cache, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Root may write to it all the same, and make it longer: no command fails for that, and the guest
    finds what it wrote.
    """
    with monkeypatch.context() as crash:
        die(crash, cache, after_naming=True)
        with pytest.raises(Conflict, match="the end"):
            take(cache, work, "image")
    with work.open("r+b") as image:
        image.seek(0, os.SEEK_END)
        image.write(b"\x07" * 65536)
    written = work.read_bytes()[4096:]
    monkeypatch.setattr(capture_journal, "_unnamed", lambda *arguments: False)
    capture_journal.recover(cache)
    assert work.read_bytes()[4096:] == written
    assert not list((cache.root / ".statepool/incoming").iterdir())


def test_markers_without_an_owner_are_read(cache: Cache, work: Path) -> None:
    """As they were written before."""
    manifest = json.dumps(cache.pool.chain(BASE)[0].to_json())
    facts = {
        "intent": "set",
        "working": str(work),
        "backing": "",
        "mode": str(0o600),
        "owner": "7",
        "replace": "no",
        "manifest": manifest,
    }
    (part,) = capture_journal.Journal.from_facts(facts).parts
    assert part.access.uid == 7
    del facts["owner"]
    os.chown(work, STRANGER, FRIENDS)
    (part,) = capture_journal.Journal.from_facts(facts).parts
    with open(work, "rb") as file:
        assert part.opened(file.fileno()).access == Access(STRANGER, FRIENDS, 0o600)


@pytest.mark.parametrize("way", ["image", "machine"])
def test_an_owner_that_is_not_root_may_have_noted_something(
    lab: Lab, cache: Cache, work: Path, way: str
) -> None:
    """
    As browsers note on a file where it came from: its owner may not remove that from a file that
    nobody may write to.
    """
    set_attribute(work, "user.xdg.origin.url", b"https://example.org")
    with permissions_count():
        take(cache, work, way)
    manifest = cache.pool.find(MINE)
    assert manifest is not None
    assert manifest.digest is not None
    assert seen(cache.data(manifest.digest))[2:] == (0o444, {})
    assert seen(work)[3] == {"user.xdg.origin.url": b"https://example.org"}
    assert lab.leftovers(cache.pool) == []


@pytest.mark.parametrize("to", [(STRANGER, 0), (0, FRIENDS)], ids=["owner", "group"])
def test_where_we_may_not_it_is_refused_first(
    lab: Lab, work: Path, replace: Callable[[], object], to: tuple[int, int]
) -> None:
    os.chown(work, *to)
    work.chmod(0o666)
    # That a parent was hashed may be noted.
    before = photograph(lab.root, besides=["/trust/"])
    with (
        permissions_count(owners_too=True),
        pytest.raises(AccessDenied, match="may not make another file in its place") as refused,
    ):
        replace()
    assert refused.value.hint
    assert photograph(lab.root, besides=["/trust/"]) == before


def test_what_a_link_leads_to_says_who_may_read(lab: Lab, cache: Cache, place: Path) -> None:
    private = lab.root / "private.qcow2"
    private.write_bytes(b"")
    private.chmod(0o600)
    (place / "link.qcow2").symlink_to(private)
    (place / "dead.qcow2").symlink_to(lab.root / "nowhere")
    chain = cache.pool.chain(BASE)
    for name in ("link.qcow2", "dead.qcow2"):
        make_working(
            cache, chain, check_place(place / name, cache, (), overwrite=True), overwrite=True
        )
        assert not (place / name).is_symlink()
    assert seen(place / "link.qcow2")[2] == 0o600


def test_a_running_machine_goes_on_in_an_image_that_is_as_open(work: Path) -> None:
    before = private(work)
    names = Names.new(work)
    names.prepare(1 << 20)
    assert seen(names.live) == seen(names.below) == before
    names.clear()


def test_its_owner_who_waits_to_write_does_not_write_to_the_state(
    lab: Lab, cache: Cache, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What was opened before the file was closed stays open; the kernel lets it in when we give up our
    lease.
    """
    os.chown(work, STRANGER, FRIENDS)
    content = work.read_bytes()
    closing = access.close_to_others

    def asked_for(descriptor: int) -> bool:
        with pytest.raises(BlockingIOError):
            os.open(work, os.O_RDWR | os.O_NONBLOCK)
        return closing(descriptor)

    monkeypatch.setattr(access, "close_to_others", asked_for)
    with pytest.raises(InUse):
        Capture(cache, MINE, {MINE: work}).run()
    assert cache.pool.find(MINE) is None
    assert (work.read_bytes(), seen(work)[0]) == (content, STRANGER)
    assert lab.leftovers(cache.pool) == []


# -- below -----------------------------------------------------------------------------------------


def private(work: Path) -> tuple[int, int, int, dict[str, bytes]]:
    os.chown(work, STRANGER, FRIENDS)
    work.chmod(0o600)
    set_attribute(work, ACL, acl(6, 0, 0, mask=6, daemon=6))
    set_attribute(work, "user.owner", b"me")
    return seen(work)


def take(cache: Cache, work: Path, way: str) -> object:
    return (
        Capture(cache, MINE, {MINE: work}).run()
        if way == "image"
        else Capture(cache, MACHINE, files_of(MACHINE, {"disk": work})).run()
    )


def die(crash: pytest.MonkeyPatch, cache: Cache, *, after_naming: bool = False) -> None:
    """The process ends where it would publish."""
    crash.setattr(capture, "give_back", lambda cache, marker, *rest: remember(marker))

    def fail(manifests: Any, staging: Any, **options: Any) -> bool:
        if after_naming:
            staging.settle([manifest.digest for manifest in manifests])
        raise Conflict("this is the end")

    crash.setattr(cache.pool, "publish", fail)


def remember(marker: Marker) -> None:
    capture_journal.keep_for_later(marker)


def raising(error: StatePoolError) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail
