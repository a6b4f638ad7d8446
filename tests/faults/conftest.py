"""
A lab: a pool, a cache and working images, in a directory that can be set back to what it was; and
what must be true of it whatever happened.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attrs import frozen

import statepool
from statepool.cache.cache import Cache
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import StateId
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.qcow2 import files, opened
from statepool.transports.copying import hash_file
from statepool.transports.registry import open_transport
from tests.support.crash import missing_tool

OBJECT = "vm1/disk"
KIB = 1 << 10
LIMIT = 600


def qemu(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    )
    return done.stdout


def write(image: Path, value: int, offset: int, length: int = 256 * KIB) -> None:
    qemu("qemu-io", "-f", "qcow2", "-c", f"write -P {value} {offset} {length}", image)


@frozen
class Lab:
    """
    A directory with ``pool``, ``cache`` (install <- customize, and leaf) and working images.

    :param root: where it is
    :param template: what it is set back to
    :param expected: what the guest sees, as raw images by the names of states and working images
    """

    root: Path
    template: Path
    expected: Path

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        # cp keeps hard links and holes.
        qemu("cp", "-a", self.template, self.root)

    # -- asking ------------------------------------------------------------------------------------

    def pool(self, name: str) -> Pool:
        """:returns: the pool in a directory of the lab, as a process sees it that has just begun"""
        return Pool(open_transport(Location("file", str(self.root / name))))

    def handle(
        self, cache: str, *, settings: statepool.Settings | None = None
    ) -> statepool.ImageHandle:
        return self.state_pool(cache, settings=settings).image(OBJECT)

    def state_pool(
        self, cache: str, *, settings: statepool.Settings | None = None
    ) -> statepool.StatePool:
        return statepool.StatePool(
            cache=self.root / cache, sources=[self.root / "pool"], settings=settings
        )

    def pools(self) -> list[str]:
        return [
            name
            for name in ("pool", "cache", "other")
            if (self.root / name / layout.POOL_FILE).exists()
        ]

    def digests(self, pool: str) -> dict[str, str]:
        """:returns: the digests of the states that a pool has, by their names"""
        return {
            state.state: str(manifest.digest)
            for state, manifest in self.pool(pool).fold("vm1").states.items()
        }

    def step(self, name: str) -> list[str]:
        return [sys.executable, "-B", str(Path(__file__).with_name("step.py")), name]

    # -- what must be true -------------------------------------------------------------------------

    def require_whole(self) -> None:
        """
        Nothing torn, no state without its bytes or its parents, nothing in the view that is not
        what its name says. Changes nothing.
        """
        for name in self.pools():
            self._require_bytes(self.root / name)
            self._require_states(self.pool(name))
            self._require_view(name)

    def _require_bytes(self, root: Path) -> None:
        for path in (root / layout.DATA).glob("*[0-9a-f]"):
            digest = Digest.from_file_name(path.name)
            assert digest is not None, f"{path} is no name of bytes"
            assert digest_of(path) == digest, f"{path} is torn"

    def _require_states(self, pool: Pool) -> None:
        fold = pool.fold("vm1")
        for manifest in fold.manifests:
            for link in fold.chain(manifest):
                assert link.digest is not None
                assert self._has(pool, link.digest), (
                    f"{manifest.id} in {pool} is visible, and the bytes of {link.state} are not"
                    " there"
                )
            assert manifest.parent is None or fold.parent_of(manifest) is not None, (
                f"{manifest.id} in {pool} has lost its parent"
            )

    def _has(self, pool: Pool, digest: Digest) -> bool:
        root = self.root / Path(pool.location.path).name
        trashed = (layout.trashed(path.name) for path in (root / layout.TRASH).iterdir())
        return (root / layout.data(digest)).exists() or digest in trashed

    def _require_view(self, name: str) -> None:
        fold = self.pool(name).fold("vm1")
        for path in (self.root / name / "vm1").rglob("*"):
            if path.is_dir():
                continue
            assert path.is_symlink(), f"{path} is not a link"
            state = fold.states.get(StateId(OBJECT, path.stem))
            if state is not None and state.digest is not None and path.exists():
                assert digest_of(path) == Digest.from_file_name(Path(os.readlink(path)).name), (
                    f"{path} shows other bytes than it says"
                )

    def require_usable(self, image: str, *contents: str) -> None:
        """
        A working image is there and clean, and a guest sees in it what it should see: one of some
        contents.
        """
        path = self.root / image
        assert path.is_file(), f"{path} is gone"
        qemu("qemu-img", "check", "-q", "-f", "qcow2", path)
        assert any(self.is_like(path, content) for content in contents), (
            f"a guest sees something else in {image} than {contents}"
        )

    def is_like(self, path: Path, content: str) -> bool:
        command = [
            "qemu-img",
            "compare",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            str(path),
            str(self.expected / f"{content}.raw"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert done.returncode in (0, 1), f"{path} cannot be read: {done.stderr}"
        return done.returncode == 0

    def require_clean(self) -> None:
        """Nothing is left over once rubbish has been collected."""
        self._collect()
        for name in self.pools():
            root = self.root / name
            left = [
                str(path)
                for directory in (layout.INCOMING, layout.TRASH)
                for path in (root / directory).iterdir()
            ]
            left += [
                str(path)
                for pattern in ("chains/.gone-*", "**/*tmp*")
                for path in root.glob(f"{layout.OURS}/{pattern}")
            ]
            assert not left, f"left over: {left}; {[why_kept(Path(path)) for path in left]}"
            self._require_needed(name)
        assert not list(self.root.glob(".statepool-*")), "half a working image is left over"

    def _collect(self) -> None:
        # A few temporary files do not say whose they are, and are left alone until they are an hour
        # old.
        for path in self.root.glob(f"*/{layout.OURS}/**/*tmp*"):
            os.utime(path, (0, 0), follow_symlinks=False)
        self.state_pool("cache").gc(everywhere=True)
        if "other" in self.pools():
            self.state_pool("other").gc()

    def _require_needed(self, name: str) -> None:
        pool = self.pool(name)
        held = (
            Cache.open(pool, statepool.Settings()).chains.gc_roots()
            if name != "pool"
            else frozenset[Digest]()
        )
        there = {
            Digest.from_file_name(path.name)
            for path in (self.root / name / layout.DATA).glob("*[0-9a-f]")
        }
        assert there == pool.needed() | held, (
            f"not all bytes of {name} are needed, or some are missing"
        )
        shown = {
            path.relative_to(self.root / name).as_posix()
            for path in (self.root / name / "vm1").rglob("*.qcow2")
        }
        assert shown == {layout.view(state) for state in pool.fold("vm1").states}, (
            f"the view of {name} is not what its log says"
        )


def why_kept(path: Path) -> str:
    """
    :returns: which processes have a file open, to explain why it was left
    """
    try:
        with opened.exclusive(path):
            return "nobody has it open"
    except statepool.StatePoolError as error:
        return str(error)


def digest_of(path: Path) -> Digest:
    with open(path, "rb") as file:
        return hash_file(file.fileno(), os.fstat(file.fileno()).st_size)


def build(root: Path, expected: Path) -> None:
    """Make the lab, as a user would."""
    root.mkdir()
    expected.mkdir()
    statepool.init(root / "pool")
    disk = statepool.StatePool(cache=root / "cache", sources=[root / "pool"]).image(OBJECT)
    work = root / "work.qcow2"

    def remember(name: str, image: Path) -> None:
        qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, expected / f"{name}.raw")

    qemu("qemu-img", "create", "-q", "-f", "qcow2", work, "1M")
    for number, state in enumerate(("install", "customize", "leaf")):
        write(work, number + 1, number * 256 * KIB)
        disk.set(state, source=work)
        remember(state, work)
    # "leaf" has a child nowhere, and other content would replace it.
    for name, offset in (("work", 512 * KIB), ("linked", 768 * KIB)):
        disk.get("customize", to=root / f"{name}.qcow2", overwrite=True)
        write(root / f"{name}.qcow2", 9, offset)
        remember(name, root / f"{name}.qcow2")
    # With another name it must not be changed in place, so it is copied.
    os.link(root / "linked.qcow2", root / "linked-too.qcow2")
    disk.get("install", to=root / "spare.qcow2")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    No other process is there: a file that one waits to be closed can only be our own, and the
    kernel would end that after 45 seconds.
    """

    def refuse(path: object, flags: int) -> None:
        raise AssertionError(f"{path} is opened while this process holds a lease on it")

    monkeypatch.setattr(files, "_open_patiently", refuse)


@pytest.fixture(scope="session")
def built_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
        pytest.skip("qemu-img is not installed (Debian: qemu-utils)")
    base = tmp_path_factory.mktemp("lab")
    made = Lab(base / "lab", base / "template", base / "expected")
    build(made.root, made.expected)
    # Working images name their chain by its absolute path, so the lab is always used where it was
    # made.
    made.root.rename(made.template)
    return made


@pytest.fixture
def lab(built_lab: Lab) -> Iterator[Lab]:
    """A lab as it was made."""
    built_lab.reset()
    return built_lab


@pytest.fixture(scope="session")
def strace() -> None:
    if (reason := missing_tool()) is not None:
        pytest.skip(reason)


@pytest.fixture
def new_lab(tmp_path: Path) -> Callable[[Path], Lab]:
    """``new_lab(directory)``: a lab of its own in a directory that is to be made."""

    def make(root: Path) -> Lab:
        made = Lab(root, root, tmp_path / "expected")
        build(made.root, made.expected)
        return made

    return make
