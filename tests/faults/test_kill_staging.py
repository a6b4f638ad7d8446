"""
kill -9 at random moments of a stage: no half file is ever under its name, and the next run
completes the day.

KILLS says how many (6 if not given); SEED, with which seed: it is printed, for another time.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.sshd import Sshd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("KILLS", "6"))
SEED = int(os.environ.get("SEED", random.randrange(1 << 30) if "KILLS" in os.environ else 1))
SIZES = [*(1 << 16 for _ in range(40)), 1 << 24, 1 << 22, 0, 1]


class World:
    """A peer here and one on a server."""

    def __init__(self, root: Path, sshd: Sshd, chance: random.Random) -> None:
        self.root, self.chance = root, chance
        peers = {"near": root / "near", "far": root / "far"}
        places = {"near": str(peers["near"]), "far": f"ssh://store{peers['far']}"}
        self.sources = peers
        for place in peers.values():
            place.mkdir()
            self.change(place)
        self.config = root / "statepool.toml"
        self.config.write_text(
            f'[stage]\ndirectory = "{root}/staging"\nssh-config = "{sshd.ssh_config}"\n'
            + "".join(
                f'[[stage.peers]]\nname = "{name}"\nlocation = "{place}"\n'
                for name, place in places.items()
            )
        )

    def change(self, place: Path) -> None:
        """Make some of the files anew."""
        for number, size in enumerate(SIZES):
            path = place / f"file-{number}"
            if not path.exists() or self.chance.random() < 0.3:
                # Renamed to its name, as collects do.
                path.with_suffix(".new").write_bytes(self.chance.randbytes(size))
                path.with_suffix(".new").rename(path)
        (place / "cback.collect").touch()

    def start(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "statepool", "--config", str(self.config), "-q", "stage"]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def day(self) -> Path | None:
        return next((self.root / "staging").glob("????/??/??"), None)

    def require_whole(self, versions: dict[str, dict[str, set[bytes]]]) -> None:
        """Each file that has its name is one that its peer has or had, as a whole."""
        day = self.day()
        for name, known in versions.items() if day is not None else ():
            assert day is not None
            for path in (day / name).glob("*"):
                assert path.read_bytes() in known[path.name], f"{path} is half"

    def require_complete(self) -> None:
        day = self.day()
        assert day is not None
        assert (day / "cback.stage").exists()
        for name, source in self.sources.items():
            ours = {path.name: path.read_bytes() for path in (day / name).iterdir()}
            theirs = {path.name: path.read_bytes() for path in source.iterdir()}
            theirs.pop("cback.stage")
            ours.pop("cback.stage", None)
            assert ours == theirs
            assert (source / "cback.stage").exists()
        assert not list((day / ".staging").glob("*/*"))
        assert not [path for path in day.iterdir() if path.name.endswith(".tmp")]


def test_killed_at_random(tmp_path: Path, sshd: Sshd) -> None:
    print(f"KILLS={KILLS} SEED={SEED}")  # noqa: T201  to repeat the run
    chance = random.Random(SEED)
    world = World(tmp_path, sshd, chance)
    versions: dict[str, dict[str, set[bytes]]] = {}

    def note() -> None:
        for name, source in world.sources.items():
            for path in source.iterdir():
                known = versions.setdefault(name, {}).setdefault(path.name, set())
                known.add(path.read_bytes())

    note()
    begun = time.monotonic()
    with world.start() as process:
        said = process.communicate()[0]
    assert process.returncode == 0, said
    longest = time.monotonic() - begun
    world.require_complete()
    for number in range(KILLS):
        if chance.random() < 0.5:
            day = world.day()
            assert day is not None
            shutil.rmtree(day)
        for source in world.sources.values():
            world.change(source)
        note()
        with world.start() as process:
            time.sleep(chance.uniform(0, longest * 1.1))
            process.send_signal(signal.SIGKILL)
        world.require_whole(versions)
        with world.start() as process:
            said = process.communicate()[0]
        assert process.returncode == 0, f"{number}: {said!r}"
        world.require_complete()
