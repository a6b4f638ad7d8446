"""
kill -9 in the middle of making an archive of a pool, of keeping older ones, of pruning and of a
restore: a whole generation is always there, and the next command goes on by itself.

KILLS says at how many system calls of each step (5 if not given); SEED, at which.
"""

from __future__ import annotations

import os
import random

import pytest

from statepool.errors import StatePoolError
from statepool.pools import layout
from statepool.testing.trees import photograph
from tests.support.crash import SystemCall, changing_calls, kill_at
from tests.support.pool_archives import open_local
from tests.support.shelf import CHECKS, Shelf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("strace", "alone"),
]

KILLS = int(os.environ.get("KILLS", "5"))
SEED = int(os.environ.get("SEED", "1"))

ESSENTIAL = {
    "level": {"link", "write", "fsync", "rename", "unlink"},
    "keep": {"link", "write", "fsync", "rename", "unlink"},
    "overwrite": {"link", "write", "fsync", "rename", "unlink"},
    "prune": {"write", "fsync", "rename", "unlink"},
    "restore": {"mkdir", "pwrite64", "symlink", "rename", "fsync"},
}
"""What a step is known to do: a trace without these would show nothing."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("killed"))


def chosen(calls: list[SystemCall]) -> list[SystemCall]:
    """Those that a kill makes a difference to: what was flushed only shows after a power cut."""
    telling = [call for call in calls if call.name not in ("fsync", "fdatasync")]
    return random.Random(SEED).sample(telling, min(KILLS, len(telling)))


@pytest.mark.parametrize("step", list(ESSENTIAL))
def test_killed(shelf: Shelf, step: str) -> None:
    shelf.reset()
    calls = changing_calls(shelf.step(step), cwd=shelf.root)
    assert {call.kind for call in calls} >= ESSENTIAL[step]
    failures = []
    for call in chosen(calls):
        shelf.reset()
        before = shelf.stored()
        pool = photograph(shelf.root / "pool")
        kill_at(shelf.step(step), call, cwd=shelf.root)
        try:
            assert (photograph(shelf.root / "pool").items() ^ pool.items()) == set() or _marked(
                shelf
            )
            CHECKS[step](shelf, step, before)
        except (AssertionError, StatePoolError) as error:
            failures.append(f"after {step} was killed at {call}: {type(error).__name__}: {error}")
    assert not failures, "\n\n".join(failures)


def _marked(shelf: Shelf) -> bool:
    """:returns: whether only the marker of the process that was killed is left in the pool"""
    incoming = shelf.root / "pool" / layout.INCOMING
    (marker,) = incoming.iterdir()
    open_local(shelf.root / "pool").folds(["vm1"])
    return marker.suffix == ".json"
