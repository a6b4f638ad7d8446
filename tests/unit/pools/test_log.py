from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from statepool.errors import BadRecord, IntegrityError, UnsupportedFormat
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.pools import layout
from statepool.pools import log as log_module
from statepool.pools.fold import Change, Fold, Publish, Remove
from statepool.pools.log import MachineLog, fold_all
from statepool.pools.records import Record
from statepool.testing.memory import MemoryTransport
from statepool.transports import base
from statepool.transports.local import LocalTransport

State = Callable[..., Manifest]


@pytest.fixture
def nonces() -> Iterator[str]:
    return (f"n{number}" for number in itertools.count(1))


@pytest.fixture
def open_log(transport: MemoryTransport, nonces: Iterator[str]) -> Callable[[], MachineLog]:
    """Another writer or reader of the same log."""
    transport.make_directory(layout.log("vm1"))
    return lambda: MachineLog(transport, "vm1", nonce=lambda: next(nonces), clock=lambda: 1000.0)


@pytest.fixture
def log(open_log: Callable[[], MachineLog]) -> MachineLog:
    return open_log()


@pytest.fixture
def short_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second record makes a checkpoint, and two records stay behind it."""
    monkeypatch.setattr(log_module, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(log_module, "KEEP_RECORDS", 2)


def write(log: MachineLog, *changes: Change) -> None:
    for change in changes:
        log.append(lambda fold, change=change: [change])  # type: ignore[misc]
        log.compact()


def record(transport: MemoryTransport, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(transport.read(layout.record("vm1", number)))
    return found


def rewrite(transport: MemoryTransport, number: int, data: dict[str, Any] | bytes) -> None:
    transport.remove(layout.record("vm1", number))
    transport.create(
        layout.record("vm1", number), data if isinstance(data, bytes) else json.dumps(data).encode()
    )


# -- records ---------------------------------------------------------------------------------------


def test_an_empty_log(log: MachineLog) -> None:
    assert log.fold().number == 0
    assert not log.fold().states
    assert log.records() == []


def test_what_is_appended_is_seen_by_all(
    log: MachineLog, open_log: Callable[[], MachineLog], state: State
) -> None:
    other = open_log()
    assert not other.fold().states
    fold, written = log.append(lambda fold: [Publish(state("install"))])
    assert written
    assert dict(fold.states) == dict(other.fold().states) == dict(open_log().fold().states)
    assert [found.number for found in other.records()] == [1]


def test_nothing_to_do_writes_nothing(log: MachineLog, transport: MemoryTransport) -> None:
    fold, written = log.append(lambda fold: [])
    assert (fold.number, written) == (0, False)
    assert transport.scan(layout.log("vm1")) == []


def test_a_change_that_breaks_a_rule_is_never_written(
    log: MachineLog, transport: MemoryTransport, state: State
) -> None:
    with pytest.raises(BadRecord):
        log.append(lambda fold: [Publish(state("customize", parent=state("install")))])
    assert transport.scan(layout.log("vm1")) == []


def test_whoever_loses_the_race_plans_again(
    log: MachineLog, open_log: Callable[[], MachineLog], state: State
) -> None:
    seen = []

    def plan(fold: object) -> list[Change]:
        seen.append(set(fold.states))  # type: ignore[attr-defined]
        if len(seen) == 1:
            write(open_log(), Publish(state("other")))
        return [Publish(state("mine"))]

    fold, written = log.append(plan)  # type: ignore[arg-type]
    assert written
    assert seen == [set(), {state("other").id}]
    assert fold.number == 2
    assert set(open_log().fold().states) == {state("other").id, state("mine").id}


def test_a_record_is_read_back(state: State) -> None:
    install = state("install")
    changes = (Remove(install.id, install.digest), Publish(install, supersedes=Digest.of(b"old")))
    record = Record(3, "nonce", 1.5, "host:1", changes)
    assert Record.from_bytes(record.to_bytes(), 3, "here") == record


def test_the_fold_is_read_anew_only_where_it_changed(
    log: MachineLog, open_log: Callable[[], MachineLog], state: State
) -> None:
    write(log, Publish(state("install")))
    reader = open_log()
    first = reader.fold()
    assert reader.fold() is first
    write(log, Publish(state("customize", parent=state("install"))))
    assert reader.fold().number == 2


# -- checkpoints -----------------------------------------------------------------------------------


def test_checkpoints_stand_for_what_was_deleted(
    short_logs: None, log: MachineLog, open_log: Callable[[], MachineLog], state: State
) -> None:
    early = open_log()
    early.fold()
    for number in range(9):
        write(log, Publish(state(f"s{number}")))
    checkpoints, records = log.entries()
    assert checkpoints == [6, 8]
    assert records == [7, 8, 9]
    for reader in (early, open_log()):
        fold = reader.fold()
        assert fold.number == 9
        assert {found.state for found in fold.states} == {f"s{number}" for number in range(9)}
    assert [found.number for found in open_log().records()] == [7, 8, 9]


def test_a_superseded_state_outlives_its_record(
    short_logs: None, log: MachineLog, open_log: Callable[[], MachineLog], state: State
) -> None:
    old, new = state("install"), state("install", "new")
    child = state("customize", parent=old)
    write(
        log,
        Publish(old),
        Publish(child),
        Publish(new, supersedes=old.digest),
        *(Publish(state(f"s{number}")) for number in range(6)),
    )
    assert log.entries()[1][0] > 3
    fold = open_log().fold()
    assert fold.superseded == [old]
    assert fold.chain(child) == (child, old)


def test_a_record_that_comes_too_late_is_taken_back(
    short_logs: None, log: MachineLog, open_log: Callable[[], MachineLog], state: State
) -> None:
    other = open_log()
    write(log, Publish(state("s0")))
    tries = []

    def plan(fold: object) -> list[Change]:
        tries.append(fold.number)  # type: ignore[attr-defined]
        if len(tries) == 1:
            for number in range(1, 7):
                write(other, Publish(state(f"s{number}")))
        return [Publish(state("late"))]

    fold, written = log.append(plan)  # type: ignore[arg-type]
    assert (tries, written, fold.number) == ([1, 7], True, 8)
    assert open_log().fold().states.keys() == fold.states.keys()
    assert log.entries()[1] == [5, 6, 7, 8]


def test_a_record_that_came_too_late_vouches_for_nothing(
    short_logs: None,
    log: MachineLog,
    open_log: Callable[[], MachineLog],
    transport: MemoryTransport,
    state: State,
) -> None:
    reader, behind = open_log(), open_log()
    write(log, Publish(state("s0")))
    behind.fold()
    write(log, Publish(state("s1")))
    assert reader.fold().number == 2
    for number in range(2, 7):
        write(log, Publish(state(f"s{number}")))
    # A writer that folded record 1, and slept ever since, wakes up and dies before it looks for a
    # checkpoint.
    transport.create(
        layout.record("vm1", 2),
        Record(2, "late", 0.0, "host:1", (Publish(state("late")),)).to_bytes(),
    )
    for someone in (reader, behind, open_log()):
        assert someone.fold().number == 7
        assert state("late").id not in someone.fold().states
    assert (
        "late" not in {found.nonce for found in reader.records()} or 2 not in reader.fold().nonces
    )


def test_a_checkpoint_is_written_once(
    short_logs: None, log: MachineLog, open_log: Callable[[], MachineLog], state: State
) -> None:
    write(log, Publish(state("s0")), Publish(state("s1")))
    assert open_log().compact() == []
    assert log.entries() == ([2], [1, 2])


def test_large_logs_are_compacted_more_seldom(log: MachineLog, state: State) -> None:
    log.append(
        lambda fold: [
            Publish(state(f"s{number}")) for number in range(40 * log_module.CHECKPOINT_EVERY)
        ]
    )
    for number in range(log_module.CHECKPOINT_EVERY):
        fold, _ = log.append(lambda fold, number=number: [Publish(state(f"t{number}"))])  # type: ignore[misc]
    assert fold.number > log_module.CHECKPOINT_EVERY
    assert not log.is_checkpoint_due(fold)


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def written(log: MachineLog, state: State) -> MachineLog:
    """Three records."""
    install = state("install")
    write(
        log, Publish(install), Publish(state("customize", parent=install)), Publish(state("other"))
    )
    return log


def test_a_gap(
    written: MachineLog, open_log: Callable[[], MachineLog], transport: MemoryTransport
) -> None:
    transport.remove(layout.record("vm1", 2))
    with pytest.raises(BadRecord, match="gap"):
        open_log().fold()


def test_a_lost_beginning(
    written: MachineLog, open_log: Callable[[], MachineLog], transport: MemoryTransport
) -> None:
    transport.remove(layout.record("vm1", 1))
    with pytest.raises(BadRecord, match="gap"):
        open_log().fold()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        b'{"format":"1"}',
        b'{"format":0}',
        b'{"format":true}',
        b"[" * 100_000,
    ],
)
def test_a_record_that_is_none(
    written: MachineLog,
    open_log: Callable[[], MachineLog],
    transport: MemoryTransport,
    content: bytes,
) -> None:
    rewrite(transport, 3, content)
    with pytest.raises(BadRecord, match=r"00000000000000000003\.json"):
        open_log().fold()


def test_a_record_of_a_newer_format(
    written: MachineLog, open_log: Callable[[], MachineLog], transport: MemoryTransport
) -> None:
    rewrite(transport, 3, {**record(transport, 3), "format": layout.FORMAT + 1})
    with pytest.raises(UnsupportedFormat, match="format 2"):
        open_log().fold()


@pytest.mark.parametrize(
    "lie",
    [
        {"nonce": None},
        {"nonce": "\ud800"},
        {"by": "worker\udfff"},
        {"time": "now"},
        {"time": True},
        {"by": 1},
        {"changes": []},
        {"changes": {}},
        {"changes": [{}]},
        {"changes": [{"publish": {}, "remove": {}}]},
        {"changes": [{"publish": {}}]},
        {"changes": [{"remove": {"object": "vm1/disk"}}]},
        {"changes": [{"remove": {"object": "vm1/disk", "state": "install", "kind": "else"}}]},
        {"changes": [{"remove": {"object": "vm1/disk", "state": "\ud800"}}]},
        {"changes": [{"remove": {"object": "vm1/disk", "state": "install"}}]},
    ],
    ids=ascii,
)
def test_a_record_that_lies(
    written: MachineLog,
    open_log: Callable[[], MachineLog],
    transport: MemoryTransport,
    lie: dict[str, Any],
) -> None:
    rewrite(transport, 3, {**record(transport, 3), **lie})
    with pytest.raises(BadRecord, match=r"00000000000000000003\.json"):
        open_log().fold()


def publishing(**lie: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def tell(change: dict[str, Any]) -> dict[str, Any]:
        return {**change, "publish": {**change["publish"], **lie}}

    return tell


@pytest.mark.parametrize(
    "lie",
    [
        publishing(digest="blake3:00"),
        publishing(digest="md5:" + "0" * 32),
        publishing(digest=None),
        publishing(size=-1),
        publishing(size="1"),
        publishing(parent={"state": "install", "digest": str(Digest.of(b"else"))}),
        publishing(parent={"state": "../install", "digest": str(Digest.of(b"install"))}),
        publishing(parent="install"),
        publishing(object="vm2/disk"),
        publishing(object="vm1/../vm2"),
        publishing(state="install"),
        publishing(state="a/b"),
        lambda change: {**change, "supersedes": str(Digest.of(b"else"))},
        lambda change: {**change, "supersedes": "else"},
    ],
)
def test_a_record_that_lies_about_a_state(
    written: MachineLog,
    open_log: Callable[[], MachineLog],
    transport: MemoryTransport,
    lie: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    data = record(transport, 2)
    rewrite(transport, 2, {**data, "changes": [lie(change) for change in data["changes"]]})
    with pytest.raises(BadRecord, match=r"00000000000000000002\.json"):
        open_log().fold()


def test_damage_that_comes_later_is_seen_by_whoever_folded_before(
    written: MachineLog, transport: MemoryTransport
) -> None:
    assert written.fold().number == 3
    transport.create(layout.record("vm1", 4), b"{")
    with pytest.raises(BadRecord, match=r"00000000000000000004\.json"):
        written.fold()


@pytest.mark.parametrize(
    "lie",
    [
        {"number": 3},
        {"nonces": []},
        {"nonces": {"4": "\ud800"}},
        {"nonces": {"4": 4}},
        {"states": {}},
        {"superseded": None},
        {"states": [{}]},
        {"states": []},
    ],
    ids=ascii,
)
def test_a_checkpoint_that_lies(
    short_logs: None,
    log: MachineLog,
    open_log: Callable[[], MachineLog],
    transport: MemoryTransport,
    state: State,
    lie: dict[str, Any],
) -> None:
    old, new = state("install"), state("install", "new")
    write(
        log,
        Publish(old),
        Publish(state("customize", parent=old)),
        Publish(new, supersedes=old.digest),
        Publish(state("tip", parent=new)),
    )
    path = layout.checkpoint("vm1", 4)
    data = json.loads(transport.read(path))
    transport.remove(path)
    if lie == {"states": []}:
        lie = {"superseded": []}
    transport.create(path, json.dumps({**data, **lie}).encode())
    with pytest.raises(BadRecord):
        open_log().fold()


def test_other_files_in_the_log_are_ignored(
    written: MachineLog, open_log: Callable[[], MachineLog], transport: MemoryTransport
) -> None:
    for name in (".nfs0001", "00000000000000000004.json.tmp", "README"):
        transport.create(f"{layout.log('vm1')}/{name}", b"")
    assert open_log().fold().number == 3


# -- written by an enemy ---------------------------------------------------------------------------


def test_a_record_with_a_number_far_from_all_others_is_a_gap(
    written: MachineLog, open_log: Callable[[], MachineLog], transport: MemoryTransport
) -> None:
    transport.create(layout.record("vm1", 10**18), b"{}")
    with pytest.raises(BadRecord, match="gap"):
        open_log().fold()


@pytest.mark.parametrize("time", [10**400, 1e300, float("inf"), float("nan"), -1e13], ids=str)
def test_a_time_beyond_all_clocks(
    written: MachineLog, open_log: Callable[[], MachineLog], transport: MemoryTransport, time: float
) -> None:
    rewrite(transport, 1, {**record(transport, 1), "time": time})
    with pytest.raises(BadRecord, match="has no time"):
        open_log().fold()


def test_a_checkpoint_with_numbers_that_no_record_has(
    log: MachineLog, transport: MemoryTransport, state: State, short_logs: None
) -> None:
    write(log, *(Publish(state(f"s{number}")) for number in range(3)))
    newest = log.entries()[0][-1]
    path = layout.checkpoint("vm1", newest)
    data = json.loads(transport.read(path))
    data["nonces"] = {**data["nonces"], "9" * 5000: "n"}
    transport.remove(path)
    transport.create(path, json.dumps(data).encode())
    assert len(MachineLog(transport, "vm1").fold().states) == 3


# -- what nobody could read ------------------------------------------------------------------------


def test_a_change_that_nobody_could_read_is_not_written(
    log: MachineLog, transport: MemoryTransport, state: State
) -> None:
    """
    Whoever hands over labels of another kind, or a hundred, would take the machine from everybody.
    """
    write(log, Publish(state("install")))
    for facts in (
        {"labels": {"a": 5}},
        {"labels": {f"k{number}": "v" for number in range(100)}},
        {"created": -1.0},
    ):
        with pytest.raises(BadRecord):
            log.append(lambda fold, facts=facts: [Publish(state("bad", **facts))])  # type: ignore[misc]
    assert log.entries() == ([], [1])
    assert list(MachineLog(transport, "vm1").fold().states) == [state("install").id]


def test_a_record_or_a_checkpoint_that_is_too_long_to_be_read_is_not_written(
    log: MachineLog, transport: MemoryTransport, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "MAX_RECORD", 2000)
    with pytest.raises(BadRecord, match="too long"):
        log.append(lambda fold: [Publish(state(f"s{number}")) for number in range(100)])
    monkeypatch.setattr(log_module, "FIRST_CHECKPOINT", 2)
    write(log, *(Publish(state(f"s{number}")) for number in range(30)))
    checkpoints, records = log.entries()
    assert records == list(range(1, 31))
    assert all(
        len(transport.read(layout.checkpoint("vm1", number))) <= 2000 for number in checkpoints
    )
    assert len(MachineLog(transport, "vm1").fold().states) == 30


def test_a_checkpoint_that_would_be_too_long_leaves_the_extents_out(
    log: MachineLog, transport: MemoryTransport, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evolve(
        state("s"), size=1 << 20, extents=tuple((number << 9, 1) for number in range(500))
    )
    monkeypatch.setattr(log_module, "MAX_RECORD", 8000)
    monkeypatch.setattr(log_module, "FIRST_CHECKPOINT", 2)
    write(log, Publish(whole), Publish(evolve(state("t"), size=whole.size, extents=whole.extents)))
    log.compact()
    assert log.entries()[0] == [2]
    (found,) = [
        one for one in MachineLog(transport, "vm1").fold().states.values() if one.state == "s"
    ]
    assert found == evolve(whole, extents=())


# -- many logs -------------------------------------------------------------------------------------


def test_one_that_is_damaged_does_not_hide_the_others(
    transport: MemoryTransport, state: State
) -> None:
    logs = [MachineLog(transport, f"vm{number}") for number in range(4)]
    for number, log in enumerate(logs):
        transport.make_directory(layout.log(f"vm{number}"))
        log.append(
            lambda fold, number=number: [
                Publish(state(f"s{index}", object=f"vm{number}/disk")) for index in range(5)
            ]
        )  # type: ignore[misc]
    bad = {**json.loads(transport.read(layout.record("vm1", 1)))}
    bad["changes"][3]["publish"]["size"] = -1  # one of those that are looked at together
    for machine, content in (("vm1", json.dumps(bad).encode()), ("vm2", b"rot")):
        transport.remove(layout.record(machine, 1))
        transport.create(layout.record(machine, 1), content)
    first, second, third, fourth = fold_all(
        transport, [MachineLog(transport, f"vm{number}") for number in range(4)]
    )
    assert isinstance(first, Fold)
    assert isinstance(fourth, Fold)
    assert first.states == logs[0].fold().states
    assert fourth.states == logs[3].fold().states
    assert isinstance(second, BadRecord)
    assert isinstance(third, BadRecord)
    assert "'size'" in second.message
    assert "vm2" in third.message
    assert "statepool sync" in (third.hint or "")


@pytest.mark.parametrize("damage", ["hole", "fifo", "link", "directory"])
def test_a_file_that_cannot_be_read_does_not_hide_other_logs(
    tmp_path: Path, state: State, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Nor is more of it read than small files may have together, whatever the pool says how long they
    are.
    """
    monkeypatch.setattr(base, "MOST_TOGETHER", 1 << 20)
    read: list[int] = []
    inner = LocalTransport.read
    monkeypatch.setattr(
        LocalTransport, "read", lambda *args, **options: _counted(read, inner(*args, **options))
    )
    transport = LocalTransport(Location("file", str(tmp_path)))
    logs = []
    for machine in ("vm1", "vm2", "vm3"):
        transport.make_directory(layout.log(machine))
        MachineLog(transport, machine).append(
            lambda fold, machine=machine: [Publish(state("one", object=f"{machine}/disk"))]
        )  # type: ignore[misc]
        logs.append(MachineLog(transport, machine))
    for number in (2, 3, 4):
        path = tmp_path / layout.record("vm2", number)
        if damage == "hole":
            path.touch()
            os.truncate(path, 64 << 20)
        elif damage == "fifo":
            os.mkfifo(path)
        elif damage == "link":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
    read.clear()
    first, second, third = fold_all(transport, logs)
    assert isinstance(first, Fold)
    assert isinstance(third, Fold)
    assert isinstance(second, IntegrityError)
    assert (
        "more than 1 MiB" in str(second)
        if damage == "hole"
        else "not a regular file" in str(second)
    )
    assert sum(read) < 5 << 20
    with pytest.raises(IntegrityError):
        logs[1].fold()


def _counted(counts: list[int], content: bytes) -> bytes:
    counts.append(len(content))
    return content


def test_more_records_than_any_writer_leaves(
    written: MachineLog, open_log: Callable[[], MachineLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "MOST_RECORDS", 1)
    with pytest.raises(
        BadRecord, match="records after its last checkpoint, more than the 1 that are read"
    ):
        open_log().fold()
