"""When which source was asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from statepool.beneath import Tree
from statepool.cache.lookup_cache import LookupCache
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, StateId
from statepool.pools.json_files import Notes

INSTALL = StateId("vm1/disk", "install")
DIGEST = Digest.of(b"install")


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def notes(cache: Path) -> Notes:
    (cache / ".statepool").mkdir(exist_ok=True)
    return Notes(Tree(cache), ("fresh",))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fresh(tmp_path: Path, clock: Clock) -> LookupCache:
    return LookupCache(notes(tmp_path), 60, clock)


def test_what_was_never_asked(fresh: LookupCache) -> None:
    assert fresh.answers(INSTALL) == {}


@pytest.mark.parametrize(
    ("later", "expected"), [(0, True), (59.9, True), (60, False), (3600, False), (-1, False)]
)
def test_an_answer_holds_for_the_period(
    fresh: LookupCache, clock: Clock, later: float, expected: bool
) -> None:
    """
    One from the future does not: the clock was put back, and nobody knows how long ago it was.
    """
    fresh.note(INSTALL, "file:///pool", "log:1:a", DIGEST)
    answer = fresh.answers(INSTALL)["file:///pool"]
    clock.now += later
    assert fresh.is_fresh(answer) is expected
    assert (answer.token, answer.digest, answer.at) == ("log:1:a", DIGEST, 1_000_000.0)


def test_nothing_is_fresh_with_a_period_of_zero(tmp_path: Path, clock: Clock) -> None:
    fresh = LookupCache(notes(tmp_path), 0, clock)
    fresh.note(INSTALL, "file:///pool", "log:1:a", DIGEST)
    assert not fresh.is_fresh(fresh.answers(INSTALL)["file:///pool"])


def test_each_source_and_each_state_for_itself(fresh: LookupCache) -> None:
    fresh.note(INSTALL, "file:///a", "log:1:a", DIGEST)
    fresh.note(INSTALL, "file:///b", "none", None)
    fresh.note(StateId("vm1/disk", "root"), "file:///a", "log:7:a", None)
    fresh.note(StateId("vm1", "install", Kind.RAM), "file:///a", "log:8:a", None)
    assert {source: answer.token for source, answer in fresh.answers(INSTALL).items()} == {
        "file:///a": "log:1:a",
        "file:///b": "none",
    }
    assert fresh.answers(INSTALL)["file:///b"].digest is None
    assert fresh.answers(StateId("vm1/disk", "root"))["file:///a"].token == "log:7:a"
    fresh.note(INSTALL, "file:///a", "log:2:b", None)
    assert {source: answer.token for source, answer in fresh.answers(INSTALL).items()} == {
        "file:///a": "log:2:b",
        "file:///b": "none",
    }


def test_names_do_not_meet(fresh: LookupCache) -> None:
    states = [
        StateId("vm1/disk", "a"),
        StateId("vm1/disk", "a.image"),
        StateId("vm1/disk.a", "image"),
        StateId("vm1", "a", Kind.RAM),
        StateId("vm1", "a", Kind.MACHINE),
    ]
    for number, state in enumerate(states):
        fresh.note(state, "file:///pool", str(number), None)
    assert [fresh.answers(state)["file:///pool"].token for state in states] == [
        "0",
        "1",
        "2",
        "3",
        "4",
    ]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b'{"answers": []}', b'{"answers": {"a": {}}}']
)
def test_a_note_that_was_torn(fresh: LookupCache, tmp_path: Path, content: bytes) -> None:
    fresh.note(INSTALL, "file:///pool", "log:1:a", DIGEST)
    (file,) = (path for path in (tmp_path / ".statepool/fresh").rglob("*") if path.is_file())
    file.write_bytes(content)
    assert fresh.answers(INSTALL) == {}
    fresh.note(INSTALL, "file:///pool", "log:1:a", DIGEST)
    assert set(fresh.answers(INSTALL)) == {"file:///pool"}


def test_forgotten(fresh: LookupCache) -> None:
    fresh.note(INSTALL, "file:///pool", "log:1:a", DIGEST)
    fresh.forget(INSTALL)
    fresh.forget(INSTALL)
    assert fresh.answers(INSTALL) == {}
