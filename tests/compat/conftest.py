"""
A cache, a pool and a working image, and the command line that must refuse to do something with
them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

import statepool
from statepool.cli.main import cli
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest, Parent
from statepool.model.scope import Scope
from statepool.model.settings import Settings
from statepool.pools.pool import Pool
from statepool.sources.pool_source import PoolSource
from statepool.testing.faults import Fault, FaultyTransport
from statepool.testing.trees import photograph
from statepool.transports.registry import open_transport

SIZE = 1 << 20
PATTERN = 64 << 10

Make = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]


@frozen
class Place:
    """
    A directory with a cache, a pool, and a working image that stands on the tip of a chain of two
    in both.
    """

    root: Path
    capture: Any

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def pool(self) -> Path:
        return self.root / "pool"

    @property
    def work(self) -> Path:
        return self.root / "work.qcow2"

    def shell(
        self, *words: str | Path, cache: Path | None = None, source: str | Path | None = None
    ) -> tuple[int, str, str]:
        """:returns: the exit code, and what was said on standard output and standard error"""
        self.capture.readouterr()
        arguments = [
            "--cache",
            str(cache or self.cache),
            "--source",
            str(source or self.pool),
            *map(str, words),
        ]
        code = cli.main(arguments, standalone_mode=False)
        said = self.capture.readouterr()
        return code, said.out, said.err

    def refused(self, code: int, *words: str | Path, **options: Any) -> str:
        """
        Run a command that must fail with ``code``, in one line, and change nothing. :returns: the
        line
        """
        before = photograph(self.root)
        actual, out, err = self.shell(*words, **options)
        assert actual == code, (actual, out, err)
        assert err.startswith("statepool: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "internal" not in err
        assert "Traceback" not in err
        assert photograph(self.root) == before
        return err

    def other_cache(self) -> Path:
        """:returns: another cache, which is there and empty"""
        return self.made_cache(self.root / "other-cache")

    @staticmethod
    def forge(pool: Path, name: str, content: bytes, *, parent: Parent | None = None) -> Digest:
        """
        Publish bytes as a state of vm1/disk, with a record that vouches for them, whatever they
        are. :returns: their digest
        """
        place = Pool(open_transport(Location.parse(str(pool))))
        digest = Digest.of(content)
        staging = place.stage([digest])
        (pool / staging.path(digest)).write_bytes(content)
        place.publish(
            [Manifest("vm1/disk", name, size=len(content), digest=digest, parent=parent)], staging
        )
        staging.end()
        return digest

    @staticmethod
    def data_file(pool: Path, state: str) -> Path:
        """:returns: the file that holds the bytes of a state of vm1/disk"""
        return (pool / f"vm1/disk/{state}.qcow2").resolve(strict=True)

    def made_cache(self, path: Path) -> Path:
        """:returns: a cache, which is there and empty"""
        statepool.StatePool(path)._cache.prepare()
        return path


@pytest.fixture
def empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Place:
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path, capsys)
    statepool.init(place.pool)
    place.made_cache(place.cache)
    return place


@pytest.fixture
def place(empty: Place, make_image: Make, write_to_image: Write) -> Place:
    make_image(empty.work, SIZE, writes=[(0, PATTERN, 1)])
    disk = statepool.StatePool(empty.cache, [empty.pool]).image("vm1/disk")
    disk.set("install", source=empty.work)
    write_to_image(empty.work, [(PATTERN, PATTERN, 2)])
    disk.set("customize", source=empty.work)
    write_to_image(empty.work, [(2 * PATTERN, PATTERN, 3)])
    return empty


# -- several sources -------------------------------------------------------------------------------

MIRRORED = ("connect", "customize", "install")
"""The chain that all of them have, tip first."""


@frozen
class Site:
    """
    A directory with a pool ``good`` that has a chain of three, a cache that is empty, and copies of
    the pool that are spoilt.
    """

    root: Path
    make: Make
    write: Write
    qemu_img: Callable[..., str]

    def pool(self, name: str) -> Path:
        """:returns: a copy of the good pool"""
        return Path(shutil.copytree(self.root / "good", self.root / name, symlinks=True))

    def empty(self, name: str) -> Path:
        statepool.init(self.root / name)
        return self.root / name

    def data(self, pool: str, state: str) -> Path:
        """:returns: the file with the bytes of a state"""
        return (self.root / pool / f"vm1/disk/{state}.qcow2").resolve(strict=True)

    def source(self, name: str, *faults: Fault, scope: Scope = Scope.SHARED) -> PoolSource:
        """:returns: a pool as a source in which things go wrong"""
        transport = open_transport(Location("file", str(self.root / name)))
        return PoolSource(
            Pool(FaultyTransport(transport, *faults) if faults else transport), name, scope
        )

    def open(self, *sources: Any, cache: str = "cache", **settings: Any) -> statepool.StatePool:
        return statepool.StatePool(
            self.root / cache,
            [self.source(name) if isinstance(name, str) else name for name in sources],
            settings=Settings(**settings),
        )

    def calls(self, source: PoolSource) -> list[str]:
        transport = source.pool.transport
        assert isinstance(transport, FaultyTransport)
        return [f"{call.operation} {call.path}" for call in transport.calls]

    def change(
        self,
        pool: str,
        state: str,
        value: int,
        *,
        on_top_of: str | None = None,
        replace: bool = False,
    ) -> None:
        """Set a state in one pool only."""
        other = self.open(pool, cache=f"cache-of-{pool}")
        work = self.root / f"work-{pool}.qcow2"
        work.unlink(missing_ok=True)
        if on_top_of is not None:
            other.image("vm1/disk").get(on_top_of, to=work)
            self.write(work, [(0, PATTERN, value)])
        else:
            self.make(work, SIZE, writes=[(0, PATTERN, value)])
        assert other.image("vm1/disk").set(state, source=work, replace=replace).complete

    def require_whole(self, cache: str = "cache") -> None:
        """The chain in the cache is what it was made as."""
        work = self.root / f"whole-{cache}.qcow2"
        statepool.StatePool(self.root / cache).image("vm1/disk").get("connect", to=work)
        raw = self.root / "whole.raw"
        self.qemu_img("convert", "-f", "qcow2", "-O", "raw", work, raw)
        content = raw.read_bytes()
        assert [content[index * PATTERN] for index in range(4)] == [1, 2, 3, 0]
        assert all(
            checked.problem is None for checked in statepool.StatePool(self.root / cache).verify()
        )


@pytest.fixture
def site(
    tmp_path: Path, make_image: Make, write_to_image: Write, qemu_img: Callable[..., str]
) -> Site:
    statepool.init(tmp_path / "good")
    work = make_image(tmp_path / "work.qcow2", SIZE, writes=[(0, PATTERN, 1)])
    disk = statepool.StatePool(tmp_path / "seed", [tmp_path / "good"]).image("vm1/disk")
    for number, state in enumerate(reversed(MIRRORED)):
        if number:
            write_to_image(work, [(number * PATTERN, PATTERN, number + 1)])
        disk.set(state, source=work)
    return Site(tmp_path, make_image, write_to_image, qemu_img)
