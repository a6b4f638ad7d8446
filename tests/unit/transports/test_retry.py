"""
What failed for a reason that may pass is tried again, as often as settings say, and nothing is done
twice by it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from statepool.errors import FileExists, MissingFile, NoSpace, TransportError
from statepool.model.digest import Digest
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.testing.faults import Call, Fault, FaultyTransport, Lose, Stop, on
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.testing.transport_names import pattern
from statepool.testing.transports import Counter
from statepool.transports.base import Transfer, Transport
from statepool.transports.retry import LONGEST_PAUSE, Retrying

DATA = pattern(4 << 20)

Opened = Callable[..., int]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def retrying(
    store: MemoryStore, *faults: Fault, retries: int = 3, resumes: bool = True
) -> tuple[Retrying, FaultyTransport]:
    faulty = FaultyTransport(MemoryTransport(store, resumes=resumes), *faults)
    return Retrying(faulty, retries=retries, pause=0), faulty


def calls(faulty: FaultyTransport, operation: str) -> int:
    return sum(call.operation == operation for call in faulty.calls)


# -- how often, and when ---------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1, 5])
def test_it_is_tried_as_often_as_settings_say(store: MemoryStore, retries: int) -> None:
    transport, faulty = retrying(store, Stop(matches=on("scan")), retries=retries)
    with pytest.raises(TransportError, match="the connection broke") as caught:
        transport.scan("")
    assert calls(faulty, "scan") == retries + 1
    assert transport.is_transient(caught.value)


def test_pauses_grow_up_to_a_limit_and_are_not_alike(store: MemoryStore) -> None:
    pauses: list[float] = []
    numbers = iter([0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    faulty = FaultyTransport(MemoryTransport(store), Stop())
    transport = Retrying(
        faulty, retries=8, pause=0.5, sleep=pauses.append, jitter=lambda: next(numbers)
    )
    with pytest.raises(TransportError):
        transport.stat("a")
    assert pauses == [0.25, 1.5, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE]


@pytest.mark.parametrize(
    "error",
    [
        MissingFile("no"),
        FileExists("no"),
        NoSpace("no"),
        TransportError("no"),
        KeyboardInterrupt(),
        OSError("no"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(store: MemoryStore, error: BaseException) -> None:
    def make(call: Call) -> BaseException:
        return error

    transport, faulty = retrying(store, Stop(error=make))
    with pytest.raises(type(error)):
        transport.create("a", b"1")
    assert len(faulty.calls) == 1


# -- lost answers ----------------------------------------------------------------------------------


def test_a_create_whose_answer_was_lost_succeeded(store: MemoryStore) -> None:
    transport, faulty = retrying(store, Lose(matches=on("create"), times=1))
    transport.create("a", b"with a nonce")
    assert calls(faulty, "create") == 2
    assert transport.read("a") == b"with a nonce"


@pytest.mark.parametrize("content", [b"another nonce", b"with a nonce and more", b""])
def test_a_create_that_somebody_else_won_meanwhile_failed(
    store: MemoryStore, content: bytes
) -> None:
    class Rival(Stop):
        def before(self, call: Call) -> None:
            MemoryTransport(store).create("a", content)
            super().before(call)

    transport, _ = retrying(store, Rival(matches=on("create"), times=1))
    with pytest.raises(FileExists):
        transport.create("a", b"with a nonce")
    assert MemoryTransport(store).read("a") == content


def test_a_create_that_was_lost_at_once_is_lost(store: MemoryStore) -> None:
    """The same content that was there before is not ours if no attempt of ours can have made it."""
    MemoryTransport(store).create("a", b"same")
    transport, faulty = retrying(store)
    with pytest.raises(FileExists):
        transport.create("a", b"same")
    assert len(faulty.calls) == 1


def test_a_link_whose_answer_was_lost(store: MemoryStore) -> None:
    transport, _ = retrying(store, Lose(matches=on("link"), times=1))
    transport.create("a", b"1")
    transport.link("a", "b")
    assert transport.read("b") == b"1"


@pytest.mark.parametrize("identity", [True, False], ids=["told", "not told"])
def test_a_link_that_somebody_else_made_of_another_file(store: MemoryStore, identity: bool) -> None:
    class Rival(Stop):
        def before(self, call: Call) -> None:
            MemoryTransport(store).create("b", b"2")
            super().before(call)

    transport, faulty = retrying(store, Rival(matches=on("link"), times=1))
    if not identity:
        faulty.inner.stat_many = lambda paths: [None, None]  # type: ignore[method-assign]
    transport.create("a", b"1")
    with pytest.raises(FileExists):
        transport.link("a", "b")


def test_a_rename_whose_answer_was_lost(store: MemoryStore) -> None:
    transport, _ = retrying(store, Lose(matches=on("rename"), times=1))
    transport.create("a", b"1")
    transport.rename("a", "b")
    assert transport.read("b") == b"1"


def test_a_rename_whose_source_was_taken_by_somebody_else(store: MemoryStore) -> None:
    class Rival(Stop):
        def before(self, call: Call) -> None:
            MemoryTransport(store).rename("a", "elsewhere")
            super().before(call)

    transport, _ = retrying(store, Rival(matches=on("rename"), times=1))
    transport.create("a", b"1")
    with pytest.raises(MissingFile):
        transport.rename("a", "b")


def test_removals_whose_answers_were_lost(store: MemoryStore) -> None:
    transport, _ = retrying(store, Lose(matches=on("remove", "remove_directory"), times=2))
    transport.create("a", b"1")
    transport.make_directory("d")
    assert transport.remove("a") is True
    assert transport.remove_directory("d") is True


def test_a_directory_that_is_not_empty_stays_however_often(store: MemoryStore) -> None:
    transport, _ = retrying(store, Lose(matches=on("remove_directory"), times=1))
    transport.make_directory("d/below")
    assert transport.remove_directory("d") is False


def test_a_pool_works_though_every_answer_is_lost_once(store: MemoryStore) -> None:
    seen: set[tuple[str, str]] = set()

    def new(call: Call) -> bool:
        known = (call.operation, call.path) in seen
        seen.add((call.operation, call.path))
        return not known

    pool = Pool(retrying(store, Lose(matches=new))[0])
    assert pool.create()
    assert pool.is_managed
    staging = pool.stage([Digest.of(b"1")])
    pool.transport.create(staging.path(Digest.of(b"1")), b"1")
    staging.settle([Digest.of(b"1")])
    staging.end()
    assert [entry.name for entry in pool.transport.scan(layout.INCOMING)] == []
    assert pool.transport.read(layout.data(Digest.of(b"1"))) == b"1"


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resumes", [True, False])
def test_a_fetch_goes_on_where_it_stopped(
    store: MemoryStore, opened: Opened, resumes: bool
) -> None:
    transport, faulty = retrying(
        store, Stop(matches=on("fetch"), after=1 << 20, times=2), resumes=resumes
    )
    transport.store(opened("source", DATA), "a", Transfer(len(DATA)))
    progress, target = Counter(), opened("target")
    moved = transport.fetch("a", target, Transfer(len(DATA), progress=progress))
    assert os.pread(target, len(DATA) + 1, 0) == DATA
    assert moved.digest == Digest.of(DATA)
    assert progress.done == len(DATA), "each byte is told of once"
    assert calls(faulty, "fetch") == 3
    assert moved.sent == len(DATA) + moved.again
    assert moved.again == (0 if resumes else 1 << 20)


@pytest.mark.parametrize("resumes", [True, False])
def test_a_store_goes_on_where_it_stopped(
    store: MemoryStore, opened: Opened, resumes: bool
) -> None:
    transport, faulty = retrying(
        store, Stop(matches=on("store"), after=1 << 20, times=2), resumes=resumes
    )
    progress = Counter()
    moved = transport.store(opened("source", DATA), "a", Transfer(len(DATA), progress=progress))
    assert transport.read("a") == DATA
    assert moved.digest == Digest.of(DATA)
    assert progress.done == len(DATA)
    assert calls(faulty, "store") == 3
    assert moved.sent == len(DATA) + moved.again
    assert moved.again == (0 if resumes else 1 << 20)


def test_a_store_does_not_go_on_from_bytes_that_are_not_there_any_more(
    store: MemoryStore, opened: Opened
) -> None:
    """As after a power cut between two attempts: the length survived, the bytes did not."""

    def lose_power(seconds: float) -> None:
        place = MemoryTransport(store)
        found = place.stat("a")
        assert found is not None
        place.remove("a")
        place.create("a", bytes(found.size))

    faulty = FaultyTransport(
        MemoryTransport(store, resumes=True), Stop(matches=on("store"), after=1 << 20, times=1)
    )
    progress = Counter()
    moved = Retrying(faulty, retries=1, pause=0, sleep=lose_power).store(
        opened("source", DATA), "a", Transfer(len(DATA), progress=progress)
    )
    assert MemoryTransport(store).read("a") == DATA
    assert moved.digest == Digest.of(DATA)
    assert moved.again == 1 << 20
    assert progress.done == len(DATA)


def test_a_digest_is_told_of_once(store: MemoryStore) -> None:
    transport, _ = retrying(store, Lose(matches=on("digest"), times=2))
    transport.create("a", DATA)
    progress = Counter()
    assert transport.digest("a", Transfer(len(DATA), progress=progress)) == Digest.of(DATA)
    assert progress.done == len(DATA)


# -- what is passed through ------------------------------------------------------------------------


class Locking(MemoryTransport):
    """Has a lock that fails at first."""

    def __init__(self, *events: str) -> None:
        super().__init__(MemoryStore())
        self.coming = list(events)
        self.held = 0

    @contextmanager
    def _lock(self) -> Iterator[None]:
        if self.coming and self.coming.pop(0) == "broken":
            raise TransportError("the connection broke", transient=True)
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    def hold(self, path: str, timeout: float) -> AbstractContextManager[None] | None:
        return self._lock()


def test_a_lock_is_taken_again() -> None:
    inner = Locking("broken", "broken", "taken")
    lock = Retrying(inner, retries=3, pause=0).hold("a.lock", 1)
    assert lock is not None
    with lock:
        assert inner.held == 1
    assert inner.held == 0


def test_what_fails_while_a_lock_is_held_is_not_the_lock_s() -> None:
    inner = Locking()
    lock = Retrying(inner, retries=3, pause=0).hold("a.lock", 1)
    assert lock is not None
    with pytest.raises(TransportError, match="at work"), lock:
        raise TransportError("at work", transient=True)
    assert inner.held == 0


def test_a_place_without_locks_has_none(store: MemoryStore) -> None:
    assert retrying(store)[0].hold("a.lock", 1) is None


def test_everything_else_is_that_of_the_inner_one(tmp_path: Path) -> None:
    class Inner(MemoryTransport):
        identity = "the very same"

        def local_path(self, path: str) -> Path:
            return tmp_path / path

    inner = Inner(MemoryStore())
    transport: Transport = Retrying(inner, retries=1, pause=0)
    assert transport.identity == "the very same"
    assert transport.capabilities == inner.capabilities
    assert transport.local_path("a") == tmp_path / "a"
    assert transport.location == inner.location
    transport.create("d", b"1")
    assert transport.read_many(["d", "e"], 9) == [b"1", None]
    assert [stat is not None for stat in transport.stat_many(["d", "e"])] == [True, False]
    assert [
        [entry.name for entry in entries] for entries in transport.scan_many(["", "nowhere"])
    ] == [["d"], []]
    assert transport.survey() == inner.survey()
