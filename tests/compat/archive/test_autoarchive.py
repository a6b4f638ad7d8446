"""
Forty nights with restarts and keeping, beside AutoArchive 2.1.1.

What AutoArchive did is in ``autoarchive.json``. With AUTOARCHIVE=1 it is installed and run again,
and the file is compared with what it does.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks.autoarchive import AutoArchive, install_autoarchive
from benchmarks.environments import Unavailable
from statepool.archive.levels import Restarts, next_level
from tests.support.archives import Place
from tests.support.nights import AFTER_COUNT, AFTER_LEVEL, KEPT, NIGHTS, archives_in, pass_day

RECORDED = Path(__file__).with_name("autoarchive.json")


def test_the_same_names_and_sizes(tmp_path: Path) -> None:
    place = Place(tmp_path, backup_type="tar.gz")
    rules = Restarts(AFTER_LEVEL, full_after_count=AFTER_COUNT)
    expected = json.loads(RECORDED.read_text())
    assert len(expected) == NIGHTS
    for night in range(NIGHTS):
        pass_day(place.root, night)
        possible = place.archiver.get_max_backup_level(place.definition)
        chosen = next_level(place.directory.stored(), possible, rules, time.time())
        place.archiver.backup_files_incrementally(
            place.definition, level=chosen.level, keep=KEPT, facts=chosen.facts
        )
        found = archives_in(place.to)
        assert sorted(found) == sorted(expected[night]), f"night {night}"
        for name, size in found.items():
            assert abs(size - expected[night][name]) < 0.05 * size + 1024, f"{name}, night {night}"


@pytest.mark.skipif(
    "AUTOARCHIVE" not in os.environ, reason="AutoArchive is run only if AUTOARCHIVE is set"
)
def test_autoarchive_does_what_is_recorded(tmp_path: Path) -> None:
    try:
        python = install_autoarchive()
    except Unavailable as error:
        pytest.skip(str(error))
    root, to = tmp_path / "root", tmp_path / "to"
    archiver = AutoArchive(python, tmp_path / "aa", root, to)
    seen = []
    for night in range(NIGHTS):
        pass_day(root, night)
        archiver.create(
            "--incremental",
            "--keep-old-backups",
            f"--number-of-old-backups={KEPT}",
            "--restarting",
            f"--restart-after-level={AFTER_LEVEL}",
            f"--full-restart-after-count={AFTER_COUNT}",
            "--remove-obsolete-backups",
        )
        seen.append(archives_in(to))
    if os.environ["AUTOARCHIVE"] == "record":
        RECORDED.write_text(json.dumps(seen, indent=0) + "\n")
    recorded = json.loads(RECORDED.read_text())
    assert [sorted(night) for night in seen] == [sorted(night) for night in recorded]
