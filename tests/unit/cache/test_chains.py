"""What working images stand on, and who they are."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from statepool.beneath import Beneath, Tree
from statepool.cache.cache import Cache
from statepool.cache.chains import GRACE, Chains, key_of
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.pools.writer import Writer
from tests.support.images import CHILD
from tests.support.privileges import permissions_count

DAY = 24 * 3600


@pytest.fixture
def work(cache: Cache, tmp_path: Path) -> Callable[..., Path]:
    """``work(chain)``: a working image on a chain, with the record of it."""

    def make(chain: tuple[Manifest, ...], name: str = "work.qcow2") -> Path:
        path = tmp_path / name
        cache.chains.use(chain, path)
        path.write_bytes(evolve(CHILD, backing=os.fsencode(cache.chains.path(chain))).build())
        return path

    return make


def records(cache: Cache, chain: tuple[Manifest, ...]) -> list[Path]:
    return sorted((cache.chains.directory_of(key_of(chain)) / ".uses").iterdir())


def digests(chain: tuple[Manifest, ...]) -> set[Digest]:
    return {manifest.digest for manifest in chain if manifest.digest is not None}


def test_a_directory_of_links_is_a_chain(cache: Cache, chain: tuple[Manifest, ...]) -> None:
    tip = cache.chains.prepare(chain)
    assert tip == cache.chains.path(chain)
    assert tip.name == "customize.qcow2"
    for manifest in chain:
        link = tip.with_name(manifest.file_name)
        assert link.is_symlink()
        assert not os.path.isabs(os.readlink(link))
        assert link.resolve() == cache.data(manifest.digest or Digest.of(b""))
    assert cache.chains.members(key_of(chain)) == digests(chain)
    assert cache.chains.prepare(chain) == tip


def test_the_same_bytes_over_another_parent(cache: Cache, chain: tuple[Manifest, ...]) -> None:
    moved = (chain[0], evolve(chain[1], digest=Digest.of(b"another parent")))
    assert key_of(moved) != key_of(chain)
    assert cache.chains.prepare(chain) != cache.chains.prepare(moved)


def test_what_a_backing_name_stands_for(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path
) -> None:
    tip = cache.chains.prepare(chain)
    standing = cache.chains.parse(str(tip))
    assert standing is not None
    assert (standing.key, standing.digest, standing.state) == (
        key_of(chain),
        chain[0].digest,
        "customize",
    )
    (tmp_path / "other-way").symlink_to(tmp_path / "cache")
    assert cache.chains.parse(str(tip).replace("/cache/", "/other-way/")) == standing
    below = cache.chains.parse(str(tip.with_name("install.qcow2")))
    assert below is not None
    assert below.digest == chain[1].digest


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "install.qcow2",
        "{cache}/vm1/disk/customize.qcow2",
        "{chain}/nothing.qcow2",
        "{chain}/customize.raw",
        "{chain}/.uses",
        "{chain}",
        "{chain}/../customize.qcow2",
        "{chain}/../{zeros}/customize.qcow2",
    ],
)
def test_a_backing_name_that_leads_elsewhere(
    cache: Cache, chain: tuple[Manifest, ...], name: str
) -> None:
    tip = cache.chains.prepare(chain)
    assert (
        cache.chains.parse(
            name.format(
                cache=cache.root, chain=tip.parent, zeros=Digest("blake3", "0" * 64).file_name
            )
        )
        is None
    )


def test_what_a_working_image_stands_on_is_held(
    cache: Cache, chain: tuple[Manifest, ...], work: Callable[..., Path]
) -> None:
    assert cache.chains.gc_roots() == frozenset()
    path = work(chain)
    assert cache.chains.gc_roots() == digests(chain)
    assert cache.chains.in_use() == {key_of(chain): [str(path)]}
    cache.chains.release(path)
    assert cache.chains.gc_roots() == digests(chain)
    path.unlink()
    cache.chains.release(path)
    assert cache.chains.gc_roots() == frozenset()


def test_what_a_process_has_open_is_held(
    cache: Cache, chain: tuple[Manifest, ...], lab: Any
) -> None:
    """A machine whose working image was moved away, and whose record with it."""
    import subprocess
    import sys

    cache.chains.prepare(chain)
    program = (
        "import sys; file = open(sys.argv[1], 'rb'); print('open', flush=True); sys.stdin.read()"
    )
    assert chain[1].digest is not None
    command = [sys.executable, "-c", program, str(cache.data(chain[1].digest))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        assert cache.chains.gc_roots() == {chain[1].digest}
        process.communicate(timeout=60)
    assert cache.chains.gc_roots() == frozenset()


def test_only_the_others_are_forgotten(
    cache: Cache, chain: tuple[Manifest, ...], work: Callable[..., Path], tmp_path: Path
) -> None:
    work(chain)
    work(chain, "other.qcow2")
    mine = cache.chains.use(chain, tmp_path / "work.qcow2")
    cache.chains.release(tmp_path / "work.qcow2", besides=mine)
    assert Path(mine) in records(cache, chain)
    assert sorted(
        json.loads(record.read_bytes())["working"] for record in records(cache, chain)
    ) == [
        str(tmp_path / "other.qcow2"),
        str(tmp_path / "work.qcow2"),
    ]


def test_an_image_that_vanished_is_waited_for(
    cache: Cache, chain: tuple[Manifest, ...], work: Callable[..., Path]
) -> None:
    path = work(chain)
    key, start = key_of(chain), 1_000_000.0
    path.unlink()
    assert cache.chains.users(key, now=start) == [str(path)]
    assert cache.chains.users(key, now=start + GRACE - 1) == [str(path)]
    assert cache.chains.users(key, now=start + GRACE) == []
    assert records(cache, chain) == []
    assert GRACE == 7 * DAY


def test_an_image_that_came_back_is_waited_for_anew(
    cache: Cache, chain: tuple[Manifest, ...], work: Callable[..., Path]
) -> None:
    path = work(chain)
    key, start = key_of(chain), 1_000_000.0
    away = path.rename(path.with_name("away"))
    assert cache.chains.users(key, now=start)
    away.rename(path)
    assert cache.chains.users(key, now=start + 6 * DAY)
    path.unlink()
    assert cache.chains.users(key, now=start + 8 * DAY)
    assert cache.chains.users(key, now=start + 8 * DAY + GRACE) == []


@pytest.mark.parametrize("content", [b"raw now", CHILD.build()])
def test_an_image_that_stands_on_something_else_now(
    cache: Cache,
    chain: tuple[Manifest, ...],
    work: Callable[..., Path],
    content: bytes,
    tmp_path: Path,
) -> None:
    path = work(chain)
    path.write_bytes(content)
    start = 1_000_000.0
    users = (
        cache.chains.users(key_of(chain), now=start),
        cache.chains.users(key_of(chain), now=start + GRACE),
    )
    # What cannot be read may still stand on it; what stands on another chain does not.
    assert users == (([str(path)],) * 2 if content == b"raw now" else ([str(path)], []))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b'{"working": "/x", "missing_since": "long ago"}',
        b'{"working": "/x", "writer": 7}',
    ],
)
def test_a_record_that_was_torn(
    cache: Cache, chain: tuple[Manifest, ...], work: Callable[..., Path], content: bytes
) -> None:
    work(chain).unlink()
    (record,) = records(cache, chain)
    record.write_bytes(content)
    key, start = key_of(chain), 1_000_000.0
    assert cache.chains.users(key, now=start)
    assert cache.chains.users(key, now=start + GRACE - 1)
    assert cache.chains.users(key, now=start + GRACE) == []


def test_pruned_when_nobody_needs_it(
    cache: Cache, chain: tuple[Manifest, ...], work: Callable[..., Path]
) -> None:
    path = work(chain)
    directory = cache.chains.directory_of(key_of(chain))
    cache.chains.prune(digests(chain), set())
    assert directory.is_dir()  # in use
    path.unlink()
    cache.chains.release(path)
    cache.chains.prune(digests(chain), digests(chain))
    assert directory.is_dir()  # a state needs it
    cache.chains.prune({Digest.of(b"other")}, set())
    assert directory.is_dir()  # not spoken of
    assert cache.chains.idle(set()) == [key_of(chain)]
    cache.chains.prune(digests(chain), set())
    assert not directory.exists()
    assert cache.chains.idle(set()) == []


def test_all_that_are_idle_are_pruned(
    cache: Cache, chain: tuple[Manifest, ...], lab: Any, work: Callable[..., Path]
) -> None:
    other = lab.chain(cache.pool, "alone")
    cache.chains.prepare(other)
    work(chain)
    cache.chains.prune_all(set())
    assert cache.chains.directory_of(key_of(chain)).is_dir()
    assert not cache.chains.directory_of(key_of(other)).exists()


def test_a_removal_that_was_interrupted(
    cache: Cache, chain: tuple[Manifest, ...], work: Callable[..., Path]
) -> None:
    """Nobody used it, or somebody began to, just then."""
    path = work(chain)
    directory = cache.chains.directory_of(key_of(chain))
    aside = directory.with_name(f".gone-0123456789abcdef-{directory.name}")
    directory.rename(aside)
    cache.chains.recover()
    assert not aside.exists()
    assert cache.chains.in_use() == {key_of(chain): [str(path)]}
    assert cache.chains.members(key_of(chain)) == digests(chain)

    path.unlink()
    cache.chains.release(path)
    directory.rename(aside)
    cache.chains.recover()
    assert not aside.exists()
    assert not directory.exists()


def at_call(number: int, do: Callable[[], object], then: Callable[[], object]) -> bool:
    """
    Do something, and something else after its call ``number`` into the system. :returns: whether
    there were so many
    """
    count = 0

    def look(frame: object, event: str, argument: Any) -> None:
        nonlocal count
        if event == "c_return" and getattr(argument, "__module__", None) == "posix":
            count += 1
            if count == number:
                then()

    sys.setprofile(look)
    try:
        do()
    finally:
        sys.setprofile(None)
    return count >= number


@pytest.mark.parametrize("first", ["removal", "use"])
def test_a_removal_and_a_use_at_the_same_moment(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path, first: str
) -> None:
    """
    Whatever comes between two calls of one of them: a chain with a record of use is whole, and one
    without is gone, or whole.
    """
    path, other = tmp_path / "work.qcow2", Chains(Tree(cache.root), lambda digest: None)
    directory = cache.chains.directory_of(key_of(chain))
    used: list[Beneath] = []

    def use() -> None:
        used.append(other.use(chain, path))

    def remove() -> None:
        cache.chains.prune_all(set())

    number = 1
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        used.clear()
        other.prepare(chain)
        more = at_call(
            number, remove if first == "removal" else use, use if first == "removal" else remove
        )
        if used:
            assert used[-1].stat() is not None, number
            assert other.members(key_of(chain)) == digests(chain), number
        if not more:
            break
        number += 1
    assert number > 10


def test_a_directory_that_cannot_be_renamed(
    cache: Cache, chain: tuple[Manifest, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a lower layer of overlayfs."""
    cache.chains.prepare(chain)
    directory = cache.chains.directory_of(key_of(chain))
    (directory / ".uses/half.tmp").write_bytes(b"")

    def refuse(*names: Any, **options: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "rename", refuse)
    cache.chains.prune_all(set())
    assert not directory.exists()


def test_what_a_removal_that_was_killed_has_left_goes_with_the_next(
    cache: Cache, chain: tuple[Manifest, ...]
) -> None:
    cache.chains.prepare(chain)
    directory = cache.chains.directory_of(key_of(chain))
    for link in directory.glob("*.qcow2"):
        link.unlink()
    cache.chains.prune_all(set())
    assert not directory.exists()


def leave(note: os.PathLike[str]) -> Path:
    """
    As if the writer of a record had been killed over the image. :returns: what it left of that
    """
    record = Path(note)
    data = json.loads(record.read_bytes())
    data["writer"] = evolve(Writer.current(), pid=2**22 + 1).to_json()
    record.write_text(json.dumps(data))
    temporary = Path(data["working"]).with_name(f".statepool-{record.stem}.tmp")
    temporary.write_bytes(b"half")
    return temporary


def test_a_working_image_that_was_never_finished(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = cache.chains.use(chain, tmp_path / "work.qcow2")
    temporary = tmp_path / f".statepool-{Path(record).stem}.tmp"
    temporary.write_bytes(b"half")
    Chains(cache.tree, cache.bytes).recover()
    assert temporary.exists()  # its writer, this process, is at work
    leave(record)
    Chains(cache.tree, cache.bytes).recover()
    assert not temporary.exists()


def test_what_a_killed_process_left_goes_with_its_record(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path
) -> None:
    """By a process that had looked for such files before."""
    cache.chains.recover()
    temporary = leave(cache.chains.use(chain, tmp_path / "work.qcow2"))
    cache.chains.release(tmp_path / "work.qcow2")
    assert not temporary.exists()
    assert records(cache, chain) == []


def test_what_a_killed_process_left_where_we_may_not_go(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    temporary = leave(cache.chains.use(chain, closed / "work.qcow2"))
    for mode in (0o500, 0):
        closed.chmod(mode)
        with permissions_count():
            Chains(cache.tree, cache.bytes).recover()
    closed.chmod(0o700)
    assert temporary.exists()


def test_without_a_directory(tmp_path: Path) -> None:
    chains = Chains(Tree(tmp_path / "nothing"), lambda digest: None)
    chains.recover()
    chains.prune_all(set())
    assert chains.gc_roots() == frozenset()
    assert chains.in_use() == {}
    assert chains.parse(str(tmp_path / "nothing/x/y.qcow2")) is None


def test_a_copy_of_a_cache_whose_links_were_followed(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path
) -> None:
    """There are files where the links were: they become links again, or go with the chain."""
    cache.chains.prepare(chain)
    directory = cache.chains.directory_of(key_of(chain))
    shutil.copytree(directory, tmp_path / "copy", symlinks=False)
    shutil.rmtree(directory)
    shutil.copytree(tmp_path / "copy", directory)
    cache.chains.prune_all(set())
    assert not directory.exists()

    shutil.copytree(tmp_path / "copy", directory)
    cache.chains.use(chain, tmp_path / "work.qcow2")
    assert cache.chains.members(key_of(chain)) == digests(chain)
    assert all(path.is_symlink() for path in directory.glob("*.qcow2"))
