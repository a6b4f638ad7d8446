"""Any tree on any levels: what is restored is what was there, and GNU tar agrees."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from statepool.archive.restore import Restore
from tests.conftest import EXAMPLES
from tests.support.archives import Place, facts_of

NAMES = [b"a", b"b", b"-x", b"o dd\n\t'\"\\", b"\xff\xfe", "é".encode(), b"x" * 130, b"*", b"a: b"]
"""Names, few of them, so that steps meet."""


class Tree:
    """A tree that changes at random. Any number gives a step, whatever is there."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.chance = os.fsencode(root), random.Random(seed)

    def change(self, count: int) -> None:
        steps: list[Callable[[bytes], None]] = [
            self._file, self._file, self._directory, self._directory, self._link, self._hard_link,
            self._hole, self._fifo, self._socket, self._remove, self._rename, self._future,
            self._mode,
        ]  # fmt: skip
        for _ in range(count):
            self.chance.choice(steps)(self._place())

    def _all(self, *, directories: bool) -> list[bytes]:
        found = [self.root] if directories else []
        for above, below, files in os.walk(self.root):
            names = [name for name in below if not os.path.islink(os.path.join(above, name))]
            found += [os.path.join(above, name) for name in (names if directories else files)]
        return sorted(found)

    def _place(self) -> bytes:
        """:returns: a path where there is nothing"""
        above = self.chance.choice(self._all(directories=True))
        path = os.path.join(above, self.chance.choice(NAMES))
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)
        if os.path.lexists(path + b"-socket"):
            os.unlink(path + b"-socket")
        return path

    def _file(self, path: bytes) -> None:
        with open(path, "wb") as file:
            file.write(self.chance.randbytes(self.chance.choice([0, 1, 511, 512, 513, 20_000])))

    def _directory(self, path: bytes) -> None:
        os.mkdir(path)

    def _link(self, path: bytes) -> None:
        os.symlink(self.chance.choice(NAMES), path)

    def _hard_link(self, path: bytes) -> None:
        if files := [one for one in self._all(directories=False) if os.path.isfile(one)]:
            os.link(self.chance.choice(files), path, follow_symlinks=False)

    def _hole(self, path: bytes) -> None:
        with open(path, "wb") as file:
            file.truncate(1 << 20)
            file.seek(self.chance.choice([0, 4096, 500_000]))
            file.write(b"data")

    def _fifo(self, path: bytes) -> None:
        os.mkfifo(path)

    def _socket(self, path: bytes) -> None:
        # a name of its own: a file whose name a socket takes stays in the lists of GNU tar
        os.mknod(path + b"-socket", stat.S_IFSOCK | 0o600)

    def _remove(self, path: bytes) -> None:
        """Do nothing more: the place was made free."""

    def _rename(self, path: bytes) -> None:
        below = [one for one in self._all(directories=True) if one != self.root]
        movable = [one for one in below if not path.startswith(one + b"/")]
        if movable:
            os.rename(self.chance.choice(movable), path)

    def _future(self, path: bytes) -> None:
        self._file(path)
        os.utime(path, ns=(0, 4_000_000_000_123_456_789))

    def _mode(self, path: bytes) -> None:
        self._file(path)
        os.chmod(path, self.chance.choice([0o000, 0o600, 0o4755, 0o1777]))


@hypothesis.settings(max_examples=EXAMPLES or 12)
@hypothesis.given(
    st.integers(0, 1 << 32),
    st.lists(st.integers(0, 25), min_size=1, max_size=4),
    st.sampled_from(["tar", "tar.gz"]),
)
def test_levels(
    tmp_path_factory: pytest.TempPathFactory, seed: int, counts: list[int], backup_type: str
) -> None:
    base = tmp_path_factory.mktemp("tree")
    place = Place(base, backup_type=backup_type)
    tree = Tree(place.root, seed)
    facts = []
    for level, count in enumerate(counts):
        tree.change(count)
        place.make()
        facts.append(facts_of(place.root))
        if level == 0:
            _require_agreement(place.to / str(place.name(0)), place.root)
    for level, expected in enumerate(facts):
        target = base / f"target{level}"
        Restore(place.directory, place.name(level)).to(target)
        assert facts_of(target) == expected
        _require_agreement(place.to / str(place.name(level)), target)
    over = base / "target0"
    Restore(place.directory, place.name(len(facts) - 1)).to(over, overwrite=True)
    assert facts_of(over) == facts[-1]
    shutil.rmtree(base)


@hypothesis.settings(max_examples=EXAMPLES or 8)
@hypothesis.given(st.integers(0, 1 << 32), st.integers(0, 30))
def test_without_other_programs(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int
) -> None:
    base = tmp_path_factory.mktemp("tree")
    place = Place(base, "internal")
    Tree(place.root, seed).change(count)
    place.archiver.backup_files(place.definition)
    Restore(place.directory, place.name()).to(base / "target")
    assert facts_of(base / "target") == facts_of(place.root)
    _require_agreement(place.to / "one.tar", base / "target")
    shutil.rmtree(base)


def _require_agreement(archive: Path, tree: Path) -> None:
    """
    Have GNU tar compare an archive with a tree. The lists of directories in the archive have the
    names of sockets, which are not in it: for these directories GNU tar tells a difference.
    """
    command = ["tar", "--warning=no-unknown-keyword", "--quoting-style=literal", "--compare"]
    command += [f"--file={archive}", f"--directory={tree}"]
    done = subprocess.run(command, capture_output=True, check=False)
    differing = done.stdout.split(b": Contents differ\n")
    assert differing.pop() == b""
    assert all(os.path.isdir(os.path.join(os.fsencode(tree), name)) for name in differing)
    assert (done.returncode, done.stderr) == (1 if differing else 0, b"")


def test_a_directory_that_gets_the_name_of_a_file(tmp_path: Path) -> None:
    """GNU tar itself cannot restore this."""
    place = Place(tmp_path)
    (place.root / "d/in").mkdir(parents=True)
    (place.root / "f").write_text("f")
    (place.root / "g/in").mkdir(parents=True)
    place.make()
    (place.root / "f").unlink()
    (place.root / "d").rename(place.root / "f")
    (place.root / "g/in").rename(place.root / "d")
    place.make()
    manifest = place.directory.stored()[place.name(1)].manifest
    assert manifest is not None
    assert manifest.renames
    Restore(place.directory, place.name(1)).to(tmp_path / "target")
    assert facts_of(tmp_path / "target") == facts_of(place.root)


def test_directories_that_change_names(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for name in ("a", "b", "c"):
        (place.root / name).mkdir()
        (place.root / name / f"in-{name}").write_text(name)
    place.make()
    for old, new in (("a", "t"), ("b", "a"), ("c", "b"), ("t", "c")):
        (place.root / old).rename(place.root / new)
    place.make()
    Restore(place.directory, place.name(1)).to(tmp_path / "target")
    assert facts_of(tmp_path / "target") == facts_of(place.root)


def test_holes_stay_holes(tmp_path: Path) -> None:
    place = Place(tmp_path)
    with (place.root / "hole").open("wb") as file:
        file.truncate(1 << 30)
    place.make()
    assert (place.to / "one.tar").stat().st_size < 1 << 20
    Restore(place.directory, place.name()).to(tmp_path / "target")
    status = (tmp_path / "target/hole").stat()
    assert (status.st_size, status.st_blocks) == (1 << 30, 0)
