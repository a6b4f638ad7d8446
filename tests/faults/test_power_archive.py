"""
Power cuts in the middle of making an archive of a pool, of keeping older ones and of pruning: a
whole older generation is always there, and the next command goes on by itself.

KILLS says at how many moments of each step (3 if not given); SEED, at which.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from statepool.errors import StatePoolError
from tests.support.crash import changing_calls, kill_at
from tests.support.power import Disk, between, disk_with
from tests.support.shelf import CHECKS, Shelf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("strace", "alone"),
]

KILLS = int(os.environ.get("KILLS", "3"))
SEED = int(os.environ.get("SEED", "1"))


@pytest.fixture(scope="module")
def shelf_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shelf, Disk]]:
    shelves: list[Shelf] = []
    place = tmp_path_factory.mktemp("power")
    with disk_with(place, lambda mounted: shelves.append(Shelf(mounted))) as disk:
        yield shelves[0], disk


@pytest.mark.parametrize("step", ["level", "keep", "overwrite", "prune"])
def test_cut(shelf_disk: tuple[Shelf, Disk], step: str) -> None:
    shelf, disk = shelf_disk
    disk.renew()
    calls = between(changing_calls(shelf.step(step), cwd=shelf.root))
    disk.unmount()
    assert len(calls) > 10
    failures = []
    for call in random.Random(SEED).sample(calls, min(KILLS, len(calls))):
        disk.renew()
        before = shelf.stored()
        kill_at(shelf.step(step), call, cwd=shelf.root)
        disk.cut()
        try:
            CHECKS[step](shelf, step, before)
        except (AssertionError, StatePoolError, OSError) as error:
            failures.append(f"after a cut of {step} at {call}: {type(error).__name__}: {error}")
        disk.unmount()
    assert not failures, "\n\n".join(failures)
