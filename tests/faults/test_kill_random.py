"""
kill -9 at 300 random moments of sets, gets and unsets, one after the other in one lab: what one
leaves behind, the next one has to live with.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROUNDS, KILLS = 10, 30
LONGEST = 0.12
"""Seconds until a kill; a set takes about a third of it."""


@pytest.fixture
def kill_one(lab: Lab) -> Iterator[Callable[[int, float], None]]:
    """``kill_one(seed, seconds)``: a process works in the lab, and is killed."""
    shutil.copy(lab.root / "work.qcow2", lab.root / "trial.qcow2")
    command = [sys.executable, str(Path(__file__).with_name("loop.py"))]
    with subprocess.Popen(
        command, cwd=lab.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        requests, answers = nursery.stdin, nursery.stdout

        def kill(seed: int, seconds: float) -> None:
            requests.write(f"{seed} {seconds}\n")
            requests.flush()
            assert answers.readline() == "done\n"

        yield kill
        requests.close()


@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_at_random(lab: Lab, kill_one: Callable[[int, float], None], number: int) -> None:
    chance = random.Random(number)
    for _ in range(KILLS):
        kill_one(chance.randrange(1 << 30), chance.uniform(0.0, LONGEST))
        failed = lab.root / "failed.txt"
        assert not failed.exists(), failed.read_text()
        lab.require_whole()
        for image in ("trial", "work", "linked", "spare"):
            assert (lab.root / f"{image}.qcow2").is_file(), f"{image}.qcow2 is gone"
        for image in ("near", "far"):
            if (lab.root / f"{image}.qcow2").exists():
                lab.require_usable(f"{image}.qcow2", "work", "linked")
    lab.handle("cache").get("install")
    lab.require_usable("trial.qcow2", "work", "linked")
    lab.require_clean()
    lab.require_whole()
    for image in ("trial", "near", "far"):
        if (lab.root / f"{image}.qcow2").exists():
            lab.require_usable(f"{image}.qcow2", "work", "linked")
    for image, content in (("work", "work"), ("linked", "linked"), ("spare", "install")):
        lab.require_usable(f"{image}.qcow2", content)
