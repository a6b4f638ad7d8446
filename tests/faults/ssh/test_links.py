"""
The link is cut or falls silent, or the server dies: the right error, nothing visible that is not
whole, and the next run goes on from there.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from statepool.copying.push import Push
from statepool.errors import TransportError
from statepool.model.outcomes import Presence, StoredAt
from statepool.pools import layout
from statepool.transports.base import Transfer

if TYPE_CHECKING:
    from conftest import Lab

MIB = 1 << 20
SIZE = 12 * MIB
CUTS = int(os.environ.get("CUTS", "4"))
"""Moments at which a connection is cut in each test; a hundred take some minutes."""

pytestmark = pytest.mark.timeout(1200 + 10 * CUTS)


def push(lab: Lab, **knobs: object) -> StoredAt:
    return Push(lab.cache("cache"), lab.pool(**knobs)).attempt(lab.chain("cache", "install"))


def push_or_raise(lab: Lab) -> StoredAt:
    return Push(lab.cache("cache"), lab.pool()).run(lab.chain("cache", "install"))


def places(seed: int, count: int) -> list[int]:
    """
    :returns: after how many bytes to cut: some at the beginning, where the small questions are, the
        rest anywhere
    """
    chosen = random.Random(seed)
    return sorted(
        [
            *(chosen.randrange(40_000) for _ in range(count // 4)),
            *(chosen.randrange(SIZE) for _ in range(count - count // 4)),
        ]
    )


def start_again(lab: Lab) -> None:
    """The pool is empty again."""
    shutil.rmtree(lab.there)
    lab.there.mkdir()
    assert lab.pool().create()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_an_upload_that_is_cut_is_an_error_and_is_resumed(filled: Lab, direction: str) -> None:
    failures = 0
    for place in places(1, CUTS):
        if direction == "down":
            place //= 1000  # answers are short
        filled.proxy.cut_after(**{direction: place})
        try:
            push_or_raise(filled)
        except TransportError:
            failures += 1
            filled.proxy.cut_after()
            assert filled.states(filled.there) <= {"install"}
            left = max((path.stat().st_size for path in filled.parts()), default=0)
            second = push(filled)
            assert second.result in (Presence.STORED, Presence.PRESENT)
            # the server may have written more since
            assert second.result is Presence.PRESENT or second.resumed >= left
        filled.proxy.cut_after()
        assert filled.states(filled.there) == {"install"}
        assert filled.parts() == []
        start_again(filled)
    assert failures >= CUTS // 4


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_download_that_is_cut_is_an_error_and_is_resumed(filled: Lab, direction: str) -> None:
    assert push(filled).result is Presence.STORED
    failures = resumed = 0
    for number, place in enumerate(places(2, CUTS)):
        cache = f"elsewhere-{number}"
        if direction == "up":
            place //= 2000  # questions are short
        image = filled.image(cache)
        filled.proxy.cut_after(**{direction: place})
        try:
            image.get("install")
        except TransportError:
            failures += 1
            filled.proxy.cut_after()
            if (filled.root / cache).exists():
                assert filled.states(filled.root / cache) <= {"install"}
            resumed += image.get("install").resumed
        filled.proxy.cut_after()
        assert filled.states(filled.root / cache) == {"install"}
        assert list((filled.root / cache / layout.INCOMING).iterdir()) == []
    assert failures >= CUTS // 4
    # all questions have been asked before much of the answer is there
    assert resumed > MIB or direction == "up"


def test_tries_of_one_command_go_on_where_the_last_one_stopped(filled: Lab) -> None:
    filled.proxy.cut_after(up=5 * MIB)
    stored = push(filled, retries=3, retry_pause=0.01)
    assert stored.result is Presence.STORED
    assert stored.again < 5 * MIB
    assert stored.bytes < SIZE + 6 * MIB
    filled.proxy.cut_after(down=5 * MIB)
    got = filled.image("elsewhere", retries=3, retry_pause=0.01).get("install")
    assert got.bytes < SIZE + 6 * MIB
    assert filled.states(filled.there) == filled.states(filled.root / "elsewhere") == {"install"}


def test_bytes_that_somebody_spoilt_meanwhile_are_brought_anew(filled: Lab) -> None:
    filled.proxy.cut_after(up=6 * MIB)
    assert push(filled).result is Presence.FAILED
    (part,) = filled.parts()
    with open(part, "r+b") as file:
        file.seek(MIB)
        file.write(b"spoilt")
    stored = push(filled)
    assert (stored.result, stored.resumed) == (Presence.STORED, 0)

    filled.proxy.cut_after(down=6 * MIB)
    with pytest.raises(TransportError):
        filled.image("elsewhere").get("install")
    (part,) = (
        path
        for path in (filled.root / "elsewhere" / layout.INCOMING).iterdir()
        if layout.part_of(path.name)
    )
    assert part.stat().st_size > MIB
    with open(part, "r+b") as file:
        file.seek(MIB)
        file.write(b"spoilt")
    got = filled.image("elsewhere").get("install")
    assert (got.resumed, got.again) == (0, 0), (
        "the source's list of pieces tells before anything is moved"
    )
    assert filled.states(filled.there) == filled.states(filled.root / "elsewhere") == {"install"}


def test_the_server_dies_on_the_way(filled: Lab) -> None:
    for direction, work in (
        ("up", lambda: push_or_raise(filled)),
        ("down", lambda: filled.image("elsewhere").get("install")),
    ):
        filled.proxy.rate = 16 * MIB
        end = filled.proxy.moved[direction] + 5 * MIB
        killer = threading.Thread(target=_kill_when, args=(filled, direction, end))
        killer.start()
        try:
            with pytest.raises(TransportError) as caught:
                work()
            assert caught.value.transient
        finally:
            killer.join()
            filled.proxy.rate = None
        assert filled.states(filled.there) <= {"install"}
        assert push(filled).result in (Presence.STORED, Presence.PRESENT)
    assert filled.image("elsewhere").get("install").resumed > MIB


def _kill_when(lab: Lab, direction: str, end: int) -> None:
    while lab.proxy.moved[direction] < end:
        time.sleep(0.005)
    lab.server.kill_sessions()


@pytest.mark.parametrize("what", ["asking", "storing", "getting"])
def test_a_silent_link_is_an_error_within_twice_the_timeout(filled: Lab, what: str) -> None:
    seconds = 3.0
    if what != "storing":
        assert push(filled).result is Presence.STORED
    filled.pool(timeout=seconds).transport.scan("")
    if what == "asking":
        filled.proxy.silent = True
    elif what == "storing":
        filled.proxy.fall_silent_after(up=4 * MIB)
    else:
        filled.proxy.fall_silent_after(down=4 * MIB)
    transport = filled.pool(timeout=seconds).transport
    chain = filled.chain("cache", "install")
    digest = chain[0].digest
    assert digest is not None
    source = os.open(filled.cache("cache").data(digest), os.O_RDONLY)
    target = os.open(filled.root / "target", os.O_RDWR | os.O_CREAT)
    # that it comes at all is the point: nothing else would end this
    with pytest.raises(TransportError) as caught:
        if what == "asking":
            transport.scan("")
        elif what == "storing":
            transport.store(source, "part", Transfer(os.fstat(source).st_size))
        else:
            transport.fetch(layout.data(digest), target, Transfer(chain[0].size))
    assert caught.value.transient
    filled.proxy.speak()
    filled.proxy.cut()
    os.close(source)
    os.close(target)
    assert Path(filled.there).is_dir()
