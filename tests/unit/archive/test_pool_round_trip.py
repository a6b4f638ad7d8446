"""Archives of pools: what is restored is what was there when each level was made."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import statepool
from statepool.archive.directory import ArchiveDirectory
from statepool.archive.pool_archiver import PoolArchiver
from statepool.archive.pool_contents import in_blocks
from statepool.archive.pool_reader import read_index, verify_archive
from statepool.archive.pool_writer import PoolWriter
from statepool.archive.registry import archiver_class
from statepool.archive.restore import Restore
from statepool.archive.verify import verify as verify_any
from statepool.care.verify import verify
from statepool.errors import IntegrityError, NotFound, StatePoolError, UsageError
from statepool.model.manifest import Kind, StateId
from statepool.pools.fold import KEEP_NONCES
from tests.support.bundles import DISK as CACHED_DISK
from tests.support.bundles import World
from tests.support.pool_archives import DISK, Store, open_local, states_of, superseded_of
from tests.support.sshd import Sshd

EXAMPLES = int(os.environ.get("EXAMPLES", "0"))
KINDS = pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst"])


@KINDS
def test_a_level_is_what_came_after_the_one_below(store: Store, kind: str) -> None:
    before = states_of(store.path)
    first = store.archive(kind=kind)
    assert (first.manifest.level, first.machines, first.states) == (0, 2, 5)
    store.put("new", b"new" * 1000, on="customize")
    store.remove("customize", cascade=True)
    store.put("other", b"other" * 1000, on="install")
    between = states_of(store.path)
    second = store.archive(1, kind=kind)
    assert (second.manifest.level, second.machines, second.states) == (1, 2, 1)
    third = store.archive(2, kind=kind)  # nothing happened
    assert third.states == 0
    assert third.manifest.base == second.manifest.key
    for made in (first, second, third):
        assert verify_archive(made.path, made.manifest.digest).problem is None
    store.restore(0, "then", kind)
    assert states_of(store.root / "then") == before
    for level in (1, 2):
        assert store.restore(level, f"now-{level}", kind).states == len(between)
        assert states_of(store.root / f"now-{level}") == between


def test_real_images_verify_after_a_restore(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.log_in()
    store = Store(tmp_path, "unused")
    store.path = tmp_path / "home"
    store.archive()
    world.home.image(CACHED_DISK).unset("customize")
    store.archive(1)
    for level, states in ((0, 6), (1, 5)):
        back = store.restore(level, f"back-{level}").path
        checked = list(verify(open_local(back), None, None))
        assert [one.problem for one in checked] == [None] * len(checked)
        assert len(checked) == states - 1  # the machine state itself has no bytes
    away = statepool.StatePool(tmp_path / "new", sources=[tmp_path / "back-0"])
    assert away.image(CACHED_DISK).get("customize").chain == ("customize", "install")


def test_level_0_unpacked_by_tar_is_a_pool_and_so_are_the_next_ones(store: Store) -> None:
    store.archive()
    store.put("new", b"new" * 1000, on="customize")
    between = states_of(store.path)
    store.archive(1)
    place = store.root / "unpacked"
    place.mkdir()
    for level in (0, 1):
        subprocess.run(["tar", "-C", place, "-xf", store.archive_path(level)], check=True)
    assert states_of(place) == between
    Store.put(_at(store, place), "later", b"later")  # and it can be written


def test_a_restored_pool_is_used_and_archived_as_the_old_one(store: Store) -> None:
    store.archive()
    store.restore()
    shutil.rmtree(store.path)
    (store.root / "back").rename(store.path)
    again = _at(store, store.path)
    again.put("later", b"later", on="customize")
    for _ in range(40):  # also past checkpoints of its own
        again.put("busy", b"busy", object="vm2/data")
        again.remove("busy", object="vm2/data")
    assert again.archive(1).states == 1
    store.restore(1, "twice")
    assert states_of(store.root / "twice") == states_of(again.path)


def test_records_that_were_deleted_are_replaced_by_a_checkpoint(store: Store) -> None:
    store.archive()
    for number in range(KEEP_NONCES + 50):
        store.put("busy", str(number).encode())
        store.remove("busy")
    store.put("new", b"new")
    store.collect()
    store.archive(1)
    index = read_index(store.archive_path(1))
    assert ["checkpoint" in log.name for log in index.logs] == [True, False]
    store.put("newer", b"newer", on="new")
    store.archive(2)
    (log,) = read_index(store.archive_path(2)).logs
    assert "checkpoint" not in log.name
    store.restore(2)
    assert states_of(store.root / "back") == states_of(store.path)


def test_states_without_a_name_are_kept_as_long_as_others_stand_on_them(store: Store) -> None:
    store.put("install", b"another" * 1000, supersede=True)
    assert superseded_of(store.path)
    store.archive()
    store.put("install", b"a third" * 1000, supersede=True)
    store.archive(1)
    store.restore(1)
    assert states_of(store.root / "back") == states_of(store.path)
    assert superseded_of(store.root / "back") == superseded_of(store.path)


def test_a_log_that_was_removed_and_begins_again(store: Store) -> None:
    store.archive()
    shutil.rmtree(store.path / ".statepool/log/vm2")
    shutil.rmtree(store.path / "vm2")
    store.archive(1)
    store.pool = open_local(store.path)
    store.put("other", b"other", object="vm2/disk")
    store.archive(2)
    for level, machines in ((0, {"vm1", "vm2"}), (1, {"vm1"}), (2, {"vm1", "vm2"})):
        store.restore(level, f"back-{level}")
        assert {state.machine for state in states_of(store.root / f"back-{level}")} == machines
    assert states_of(store.root / "back-2") == states_of(store.path)


def test_bytes_that_come_back_are_not_archived_again(store: Store) -> None:
    store.put("passing", b"passing" * 1000)
    store.archive()
    store.remove("passing")
    store.archive(1)
    store.put("again", b"passing" * 1000)
    assert store.archive(2).states == 0
    store.restore(2)
    assert states_of(store.root / "back") == states_of(store.path)


def test_the_same_bytes_under_two_names_are_there_once(store: Store) -> None:
    store.put("same", b"install" * 5000, object="vm2/disk")
    assert store.archive().states == 5
    store.restore()
    assert states_of(store.root / "back") == states_of(store.path)


def test_an_empty_pool(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.archive().states == 0
    store.put("first", b"first")
    assert store.archive(1).states == 1
    assert store.restore(0, "empty").states == 0
    store.restore(1)
    assert states_of(tmp_path / "back") == states_of(store.path)


def test_two_archives_of_the_same_are_the_same_file(store: Store) -> None:
    def content() -> bytes:
        writer, found = PoolWriter(open_local(store.path), now=lambda: 1.0), bytearray()
        with writer.protected() as (contents, _):
            writer.write(contents, found.extend, store.root)
        return bytes(found)

    assert content() == content()


# -- selections ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objects", "exclude", "expected"),
    [
        (["vm2/*"], [], {"vm2/disk install"}),
        (["vm1/disk"], ["*:customize"], {"vm1/disk install", "vm1/disk loggedin"}),
        ([], ["vm1*"], {"vm2/disk install"}),
        # what a machine state lists is there, although it is not selected
        (["vm1"], [], {"vm1 loggedin", "vm1 loggedin (RAM)", "vm1/disk loggedin"}),
        # and what a state stands on, although it is excluded
        (["*:customize"], ["*:install"], {"vm1/disk install", "vm1/disk customize"}),
    ],
)
def test_some_objects(
    store: Store, objects: Sequence[str], exclude: Sequence[str], expected: set[str]
) -> None:
    store.archive(objects=objects, exclude=exclude)
    store.put("new", b"new", object="vm3/disk")
    store.put("new", b"new and", on="customize")
    store.remove("new")
    store.archive(1, objects=objects, exclude=exclude)
    store.restore(1)
    back = states_of(store.root / "back")
    assert set(map(str, back)) == expected | ({"vm3/disk new"} if not objects else set())
    there = states_of(store.path)
    assert all(there[state] == found for state, found in back.items())


def test_another_selection_for_a_level(store: Store) -> None:
    store.archive(objects=["vm2/*"])
    store.archive(1)
    store.archive(2, exclude=["vm2*"])
    store.restore(1, "all")
    assert states_of(store.root / "all") == states_of(store.path)
    store.restore(2, "some")
    assert {state.machine for state in states_of(store.root / "some")} == {"vm1"}


def test_a_selection_of_nothing(store: Store) -> None:
    with pytest.raises(NotFound, match="no state"):
        store.archive(objects=["vm9*"])
    assert not store.archive_path(0).exists()


def test_a_damaged_log_of_an_excluded_machine_is_not_read(store: Store) -> None:
    (store.path / ".statepool/log/vm2/00000000000000000001.json").write_text("{")
    with pytest.raises(StatePoolError, match="vm2"):
        store.archive()
    store.archive(exclude=["vm2*"])
    store.restore()
    assert {state.machine for state in states_of(store.root / "back")} == {"vm1"}


# -- pools on other hosts --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "tar.zst"])
def test_a_pool_that_is_reached_by_ssh(store: Store, sshd: Sshd, kind: str) -> None:
    place = sshd.directory_for(f"archived-{kind}")
    subprocess.run(["cp", "-a", f"{store.path}/.", place], check=True)
    subprocess.run(["chmod", "-R", "a+rwX", place], check=True)
    far: dict[str, Any] = {
        "root": str(sshd.location(place)),
        "settings": sshd.settings(),
        "kind": kind,
    }
    assert store.archive(**far).manifest.root.startswith("ssh://")
    _at(store, place).put("new", bytes(5 << 20) + b"new", on="customize")
    assert store.archive(1, **far).states == 1
    store.restore(1, kind=kind)
    assert states_of(store.root / "back") == states_of(place)
    assert not list((place / ".statepool/incoming").iterdir())


# -- any history -----------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "d"])
OBJECTS = st.sampled_from(["vm1/disk", "vm1/data", "vm2/disk"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), OBJECTS, NAMES, st.none() | NAMES, st.integers(0, 5)),
        st.tuples(st.just("replace"), OBJECTS, NAMES, st.none(), st.integers(0, 5)),
        st.tuples(st.just("machine"), st.just("vm1"), NAMES, st.none(), st.integers(0, 5)),
        st.tuples(st.just("remove"), OBJECTS, NAMES, st.none(), st.just(0)),
        st.tuples(st.just("archive"), st.just(""), st.just(""), st.none(), st.just(0)),
        st.tuples(st.just("collect"), st.just(""), st.just(""), st.none(), st.just(0)),
    ),
    max_size=24,
)


@given(steps=STEPS)
@settings(max_examples=EXAMPLES or 25)
def test_any_history(
    steps: Sequence[tuple[str, str, str, str | None, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    store = Store(tmp_path_factory.mktemp("history"))
    levels: list[object] = []

    def archive() -> None:
        store.archive(len(levels))
        levels.append(states_of(store.path))

    archive()
    for what, on, name, parent, seed in steps:
        try:
            if what == "archive":
                archive()
            elif what == "collect":
                store.collect()
            elif what == "machine":
                store.put_machine(name, bytes([seed]) * 100)
            elif what == "remove":
                store.remove(name, object=on, cascade=True)
            else:
                data = bytes([seed, len(on)]) * 300
                store.put(name, data, object=on, on=parent, supersede=what == "replace")
        except StatePoolError:
            continue  # not allowed on what is there: the history goes on
    archive()
    for level, expected in enumerate(levels):
        store.restore(level, f"back-{level}")
        assert states_of(store.root / f"back-{level}") == expected
        assert verify_archive(store.archive_path(level)).problem is None


# -- extents ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 3000)), max_size=8), st.data())
def test_extents_become_whole_blocks(parts: list[tuple[int, int]], data: st.DataObject) -> None:
    extents, end = [], 0
    for gap, length in parts:
        extents.append((end + gap, length))
        end += gap + length
    size = end + data.draw(st.integers(0, 2000))
    found = in_blocks(tuple(extents), size) or ((0, size),)
    covered = {at for offset, length in found for at in range(offset, offset + length)}
    if extents:
        assert {
            at for offset, length in extents for at in range(offset, offset + length)
        } <= covered
    ends = [0]
    for offset, length in found:
        assert offset >= ends[-1]
        assert offset % 512 == 0
        assert length % 512 == 0 or offset + length == size
        ends.append(offset + length)
    assert ends[-1] <= size
    assert len(covered) <= sum(length + 1022 for _, length in extents) or not extents or not size


def _at(store: Store, path: Path) -> Store:
    """:returns: the same archives, and another pool"""
    other = Store.__new__(Store)
    other.root, other.path, other.pool = store.root, path, open_local(path)
    return other


def test_what_is_stored_is_shown(store: Store) -> None:
    """The support of these tests finds a state whose bytes or place are wrong."""
    assert set(states_of(store.path)) >= {
        StateId(DISK, "install"),
        StateId("vm1", "loggedin", Kind.RAM),
    }
    manifest = store.put("damaged", b"damaged")
    store.file(manifest).chmod(0o644)
    store.file(manifest).write_bytes(b"d@maged")
    with pytest.raises(AssertionError):
        states_of(store.path)


def test_the_ways_of_all_archives_lead_to_pools_too(store: Store) -> None:
    store.archive(kind="tar.zst")
    store.put("new", b"new")
    store.archive(1, kind="tar.zst")
    directory = ArchiveDirectory(store.root, "pool")
    stored = directory.stored()
    last = max(stored)
    assert last.level == 1
    assert verify_any(directory, stored, last).error is None
    work = Restore(directory, last)
    assert work.to(store.root / "back").members == len(states_of(store.path))
    assert states_of(store.root / "back") == states_of(store.path)
    with pytest.raises(UsageError, match="as a whole"):
        work.one("vm1/disk/new.qcow2", store.root / "new.qcow2")
    path = store.archive_path(1, "tar.zst")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert isinstance(verify_any(directory, stored, last).error, IntegrityError)
    with pytest.raises(IntegrityError):
        work.to(store.root / "again")
    assert not (store.root / "again").exists()


def test_archivers_are_found_by_their_names() -> None:
    assert archiver_class("pool") is PoolArchiver
