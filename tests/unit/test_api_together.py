"""A state pool in several threads and processes at once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import statepool
from statepool.model.outcomes import Verified
from statepool.model.settings import Settings

MIB = 1 << 20
SIZE = 1 * MIB
BLOCK = 64 << 10

Make = Callable[..., Path]


def open_pool(root: Path, cache: str = "cache", **settings: Any) -> statepool.StatePool:
    return statepool.StatePool(root / cache, [root / "pool"], settings=Settings(**settings))


def test_eight_threads_get(filled: Path) -> None:
    """One moves the bytes; the others wait and use them."""
    disk = open_pool(filled).image("vm1/disk")
    together = threading.Barrier(8)

    def get(number: int) -> statepool.GetResult:
        together.wait()
        return disk.get("customize", to=filled / f"work-{number}.qcow2")

    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(get, range(8)))
    assert {got.digest for got in found} == {found[0].digest}
    # Each member once, perhaps not all of them by one.
    assert (
        sum(got.bytes for got in found)
        == open_pool(filled, "other").image("vm1/disk").get("customize").bytes
    )
    assert len({got.working for got in found}) == 8
    log = open_pool(filled).log()
    assert [logged.number for logged in log if logged.pool == f"file://{filled}/cache"] == [1, 2]
    assert list((filled / "cache/.statepool/incoming").iterdir()) == []


def test_threads_that_do_different_things(filled: Path, make_image: Make) -> None:
    pool = open_pool(filled)
    images = [
        make_image(filled / f"new-{number}.qcow2", SIZE, writes=[(0, BLOCK, number + 1)])
        for number in range(4)
    ]

    def work(number: int) -> None:
        disk = pool.image("vm1/disk")
        disk.set(f"new-{number}", source=images[number])
        disk.get("customize")
        assert pool.show("vm1/disk")
        disk.unset(f"new-{number}", scope="all")

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(work, range(4)))
    assert {listed.manifest.state for listed in pool.show()} == {"install", "customize"}
    assert all(checked.problem is None for checked in pool.verify())


def _get_in_a_child(pool: statepool.StatePool, to: Path, answer: Any) -> None:
    answer.send((os.getpid(), pool.image("vm1/disk").get("customize", to=to)))


def test_after_a_fork(filled: Path) -> None:
    pool = open_pool(filled)
    pool.image("vm1/disk").get("install")
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_get_in_a_child, args=(pool, filled / "work.qcow2", there))
    child.start()
    pid, got = here.recv()
    child.join(60)
    assert child.exitcode == 0
    assert pid != os.getpid()
    assert got.verified is Verified.ARRIVED
    assert pool.image("vm1/disk").get("customize").verified is Verified.TRUSTED


def _outcomes(filled: Path, work: Path) -> Iterator[object]:
    pool = open_pool(filled)
    disk = pool.image("vm1/disk")
    yield disk.get("customize")
    yield disk.set("new", source=work)
    yield pool.show()
    yield pool.verify()
    yield pool.log()
    yield pool.doctor()
    yield disk.unset("new", scope="all")
    yield pool.gc(everywhere=True)


def test_outcomes_can_be_sent_to_other_processes(filled: Path, make_image: Make) -> None:
    for outcome in _outcomes(filled, make_image(filled / "work.qcow2", SIZE)):
        assert pickle.loads(pickle.dumps(outcome)) == outcome
