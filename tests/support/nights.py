"""Forty nights of backups of a tree that changes each day in the same way."""

from __future__ import annotations

import random
from pathlib import Path

NIGHTS = 40
KEPT, AFTER_LEVEL, AFTER_COUNT = 3, 4, 2
"""Archives that are kept; the highest level; restarts until a full one."""


def pass_day(root: Path, night: int) -> None:
    """Change the tree as on this day: a new file, a changed one, and some days a deleted one."""
    chance = random.Random(night)
    root.mkdir(exist_ok=True)
    (root / f"new{night:02}").write_bytes(chance.randbytes(20_000 + 1000 * night))
    (root / "changed").write_bytes(chance.randbytes(10_000))
    if night % 3 == 2:
        (root / f"new{night - 2:02}").unlink()


def archives_in(directory: Path) -> dict[str, int]:
    """:returns: the sizes of all archives, by their names"""
    return {
        path.name: path.stat().st_size
        for path in sorted(directory.iterdir())
        if path.name.endswith(".tar.gz")
    }
