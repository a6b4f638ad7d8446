"""Claims keep all but one waiting, for as long as the one shows that it is alive, and no longer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from statepool.errors import LockTimeout, TransportError
from statepool.model.location import Location
from statepool.pools import layout
from statepool.pools.claims import Claims, Epoch, epochs, is_claim
from statepool.pools.collect import ABANDONED, Collector
from statepool.pools.pool import Pool
from statepool.pools.writer import Writer
from statepool.testing.faults import Call, FaultyTransport, Stop, on
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.transports.base import Transport
from statepool.transports.local import LocalTransport

ELSEWHERE = Writer("another-host", "another-boot", 1, 1, 1)

FOREVER = 1e9
"""Seconds: nobody is taken for dead by his beat in these tests."""


class Time:
    """A clock that only moves when somebody waits, and what happens meanwhile."""

    def __init__(self, meanwhile: Callable[[float], object] = lambda now: None) -> None:
        self.now = 5000.0
        self._meanwhile = meanwhile

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self._meanwhile(self.now)


@pytest.fixture
def place(pool: Pool) -> Transport:
    """A pool in memory: it has no locks."""
    return pool.transport


def files(transport: Transport) -> set[str]:
    return {entry.name for entry in transport.scan(layout.LOCKS)}


def put(transport: Transport, name: str, writer: Writer = ELSEWHERE) -> None:
    transport.create(
        f"{layout.LOCKS}/{name}", json.dumps({"format": 1, "writer": writer.to_json()}).encode()
    )


def claims(transport: Transport, time: Time, stale: float = 20.0) -> Claims:
    return Claims(transport, stale=stale, beat=FOREVER, monotonic=time, sleep=time.sleep)


def test_names() -> None:
    assert is_claim("store-1f.1")
    assert is_claim("store-1f.12.34")
    assert is_claim("store-1f.12.end")
    for name in (
        "log-vm1.lock",
        "store-1f",
        "store-1f.0",
        "store-1f.1.0",
        "store-1f.01",
        "store-1f.1.end.1",
        "../x.1",
        "-.1",
        "store-1f.1\n",
    ):
        assert not is_claim(name), name


def test_a_listing_is_put_in_order() -> None:
    found = epochs(
        [
            "store-a.10",
            "store-a.9.end",
            "store-b.1.end",
            "store-b.1.7",
            "store-a.10.3",
            "store-a.10.4",
            "log-vm1.lock",
        ]
    )
    assert [epoch.number for epoch in found["store-a"]] == [9, 10]
    assert found["store-a"][1] == Epoch(
        10, ("store-a.10", "store-a.10.3", "store-a.10.4"), frozenset({"3", "4"}), ended=False
    )
    assert found["store-b"] == [
        Epoch(1, ("store-b.1.end", "store-b.1.7"), frozenset({"7"}), ended=True)
    ]
    assert set(found) == {"store-a", "store-b"}


def test_each_holder_has_the_next_epoch_and_old_ones_go(place: Transport) -> None:
    for number in range(1, 6):
        with Claims(place).hold("store-a", 0):
            assert f"store-a.{number}" in files(place)
    assert files(place) == {"store-a.4.end", "store-a.5.end"}


def test_claims_of_other_names_are_others(place: Transport) -> None:
    with Claims(place).hold("store-a", 0), Claims(place).hold("store-b", 0):
        assert files(place) == {"store-a.1", "store-b.1"}


def test_an_error_inside_lets_go(place: Transport) -> None:
    with pytest.raises(KeyError), Claims(place).hold("store-a", 0):
        raise KeyError
    with Claims(place).hold("store-a", 0):
        pass


def test_whoever_does_not_want_to_wait_is_told_who_has_it(place: Transport) -> None:
    put(place, "store-a.3")
    with (
        pytest.raises(LockTimeout, match="another-host:1 has store-a") as caught,
        Claims(place).hold("store-a", 0),
    ):
        pass
    assert caught.value.seconds == 0
    assert caught.value.path == f"{layout.LOCKS}/store-a.3"
    assert files(place) == {"store-a.3"}


def test_a_name_that_is_none_is_refused(place: Transport) -> None:
    with pytest.raises(ValueError, match="not a name"), Claims(place).hold("../a", 0):
        pass


def test_where_nothing_can_be_claimed_everybody_works() -> None:
    transport = MemoryTransport(MemoryStore())
    with Claims(transport).hold("store-a", 0), Claims(transport).hold("store-a", 0):
        pass
    assert transport.scan("") == []


# -- who is alive ----------------------------------------------------------------------------------


def test_a_holder_of_whom_nothing_moves_is_left_behind(place: Transport) -> None:
    put(place, "store-a.3")
    time = Time()
    with claims(place, time, stale=20.0).hold("store-a", 3600.0):
        assert files(place) == {"store-a.3", "store-a.4"}
    assert 20.0 <= time.now - 5000.0 < 22.0


def test_a_holder_that_shows_a_beat_is_waited_for(place: Transport) -> None:
    put(place, "store-a.3")
    beats = iter(range(1, 10_000))

    def beat(now: float) -> None:
        put(place, f"store-a.3.{next(beats)}")

    time = Time(beat)
    with pytest.raises(LockTimeout), claims(place, time, stale=2.0).hold("store-a", 600.0):
        pass
    assert time.now - 5000.0 >= 600.0


def test_time_counts_from_the_last_beat_seen(place: Transport) -> None:
    put(place, "store-a.3")
    seen: list[float] = []

    def beat_once(now: float) -> None:
        if now > 5015.0 and not seen:
            put(place, "store-a.3.1")
            seen.append(now)

    time = Time(beat_once)
    with claims(place, time, stale=20.0).hold("store-a", 3600.0):
        pass
    assert time.now - seen[0] >= 20.0


@pytest.mark.parametrize("clock", [lambda: 0, lambda: 2**62], ids=["long ago", "far ahead"])
def test_no_clock_of_another_host_is_asked(clock: Callable[[], int]) -> None:
    pool = Pool(MemoryTransport(MemoryStore(clock=clock)))
    pool.create()
    put(pool.transport, "store-a.3")
    with (
        pytest.raises(LockTimeout),
        claims(pool.transport, Time(), stale=20.0).hold("store-a", 19.0),
    ):
        pass


def test_a_beat_shows_while_the_work_goes_on(place: Transport) -> None:
    with Claims(place, beat=0.001).hold("store-a", 0):
        shown: set[str] = set()
        while len(shown) < 5:
            shown |= epochs(files(place))["store-a"][0].beats
    assert files(place) == {"store-a.1.end"}


def test_a_beat_that_fails_disturbs_nobody(place: Transport) -> None:
    broken = FaultyTransport(
        place, Stop(matches=on("create", path="*.[0-9].*")), Stop(matches=on("rename"))
    )
    with Claims(broken, beat=0.001).hold("store-a", 0):
        while sum(call.operation == "create" for call in broken.calls) < 5:
            pass
    assert files(place) == {"store-a.1"}, (
        "nobody could be told that the work is done, and it is all the same"
    )


def test_a_holder_whose_work_has_lost_the_pool_does_not_try_to_tell_it(place: Transport) -> None:
    """It would only meet the same trouble. This process knows, and does not wait for itself."""
    watched = FaultyTransport(place)
    with pytest.raises(TransportError), claims(watched, Time()).hold("store-a", 0):
        before = len(watched.calls)
        raise TransportError("the connection broke", transient=True)
    assert len(watched.calls) == before
    assert files(place) == {"store-a.1"}
    time = Time()
    with claims(place, time).hold("store-a", 0):
        assert files(place) == {"store-a.1", "store-a.2"}
    assert time.now == 5000.0


def test_a_beat_that_hangs_keeps_nobody_whose_work_has_lost_the_pool(place: Transport) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    class Hanging(Stop):
        def before(self, call: Call) -> None:
            hangs.set()
            goes_on.wait()

    broken = FaultyTransport(place, Hanging(matches=on("create", path="*.[0-9].*")))
    with pytest.raises(TransportError), Claims(broken, beat=0.001).hold("store-a", 0):
        hangs.wait()
        raise TransportError("the connection broke", transient=True)
    goes_on.set()


# -- races -----------------------------------------------------------------------------------------


def test_an_epoch_made_too_late_is_void(place: Transport) -> None:
    """A waiter that was paused creates an epoch that had been taken, ended and cleared away."""

    class Slow(MemoryTransport):
        def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
            if path.endswith("store-a.2") and not late:
                late.append(path)
                for _ in range(4):  # epochs 2 to 5, the first of which is cleared away
                    with Claims(place).hold("store-a", 0):
                        pass
            super().create(path, data, flush=flush)

    late: list[str] = []
    with Claims(place).hold("store-a", 0):
        pass
    assert isinstance(place, MemoryTransport)
    with Claims(Slow(place.memory)).hold("store-a", 0):
        assert "store-a.6" in files(place)
    assert late == [f"{layout.LOCKS}/store-a.2"]
    assert files(place) == {"store-a.5.end", "store-a.6.end"}


def test_threads_take_turns(place: Transport) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            with Claims(place, sleep=lambda seconds: threading.Event().wait(0.001)).hold(
                "store-a", FOREVER
            ):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(most) == 40
    assert max(most) == 1


WORKER = """
import os, sys
from statepool.model.location import Location
from statepool.pools.claims import Claims
from statepool.transports.local import LocalTransport
place, turns, die = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "die"
claims = Claims(LocalTransport(Location("file", place)), stale=1e9, beat=0.05)
for turn in range(turns):
    with claims.hold("store-a", 100):
        os.mkdir(f"{place}/inside")
        if die:
            os.rmdir(f"{place}/inside")
            print("held", flush=True)
            os.kill(os.getpid(), 9)
        os.rmdir(f"{place}/inside")
"""


@pytest.fixture
def start(local_pool: Pool) -> Iterator[Callable[[int, str], subprocess.Popen[bytes]]]:
    """
    Workers in processes of their own, each of which makes a directory that must not be there, in
    each of its turns.
    """
    started: list[subprocess.Popen[bytes]] = []

    def work(turns: int, how: str = "live") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", WORKER, local_pool.location.path, str(turns), how]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        return started[-1]

    yield work
    for process in started:
        process.kill()
        process.communicate()


def test_processes_take_turns_though_some_are_killed(
    local_pool: Pool, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    dying = [start(1, "die") for _ in range(2)]
    living = [start(10) for _ in range(2)]
    assert [process.wait(100) for process in living] == [0, 0]
    assert [process.wait(100) for process in dying] == [-9, -9]
    numbers = {epoch.number for epoch in epochs(files(local_pool.transport))["store-a"]}
    assert max(numbers) == 22, "each turn had an epoch of its own"
    assert numbers == {21, 22}


def test_nobody_waits_for_the_beat_of_a_process_of_this_host_that_was_killed(
    local_pool: Pool, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    holder = start(1, "die")
    assert holder.wait(100) == -9
    with Claims(local_pool.transport, stale=FOREVER).hold("store-a", 0):
        assert "store-a.2" in files(local_pool.transport)


# -- clearing away ---------------------------------------------------------------------------------


def test_there_are_never_very_many(place: Transport) -> None:
    for number in range(150):
        with Claims(place).hold(f"store-{number:03}", 0):
            pass
    assert len(files(place)) <= 66


def test_collecting_takes_those_that_are_over() -> None:
    now = [10**9]
    pool = Pool(MemoryTransport(MemoryStore(clock=lambda: now[0] * 10**9)))
    pool.create()
    with Claims(pool.transport).hold("store-done", 0):
        pass
    put(pool.transport, "store-dead.1")
    put(pool.transport, "store-dead.1.17")
    assert [gone for gone in Collector(pool).sweep() if "claim" in gone.what] == []
    now[0] += 2 * 3600
    assert [gone.path for gone in Collector(pool).sweep(dry_run=True)] == [
        f"{layout.LOCKS}/store-done.1.end"
    ]
    assert [gone.path for gone in Collector(pool).sweep()] == [f"{layout.LOCKS}/store-done.1.end"]
    now[0] += ABANDONED
    assert {gone.path.rpartition("/")[2] for gone in Collector(pool).sweep()} == {
        "store-dead.1",
        "store-dead.1.17",
    }
    assert files(pool.transport) == set()


def test_a_pool_that_is_gone_meanwhile_is_no_reason_to_fail(tmp_path: Path) -> None:
    root = tmp_path / "pool"
    root.mkdir()
    pool = Pool(LocalTransport(Location("file", str(root))))
    pool.create()
    with Claims(pool.transport).hold("store-a", 0):
        shutil.rmtree(root)
    assert not root.exists()
