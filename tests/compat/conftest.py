"""A cache, a pool and a working image, and the command line that must refuse to do something with them."""

from __future__ import annotations

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
from statepool.pools.pool import Pool
from statepool.testing.trees import photograph
from statepool.transports.registry import open_transport

SIZE = 1 << 20
PATTERN = 64 << 10

Make = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]


@frozen
class Place:
    """A directory with a cache, a pool, and a working image that stands on the tip of a chain of two in both."""

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

    def shell(self, *words: str | Path, cache: Path | None = None, source: str | Path | None = None) -> tuple[int, str, str]:
        """:returns: the exit code, and what was said on standard output and standard error"""
        self.capture.readouterr()
        arguments = ["--cache", str(cache or self.cache), "--source", str(source or self.pool), *map(str, words)]
        code = cli.main(arguments, standalone_mode=False)
        said = self.capture.readouterr()
        return code, said.out, said.err

    def refused(self, code: int, *words: str | Path, **options: Any) -> str:
        """Run a command that must fail with ``code``, in one line, and change nothing. :returns: the line"""
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
        """Publish bytes as a state of vm1/disk, with a record that vouches for them, whatever they are. :returns: their digest"""
        place = Pool(open_transport(Location.parse(str(pool))))
        digest = Digest.of(content)
        staging = place.stage([digest])
        (pool / staging.path(digest)).write_bytes(content)
        place.publish([Manifest("vm1/disk", name, size=len(content), digest=digest, parent=parent)], staging)
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
def empty(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
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
