"""
Working images and pools on file systems without hard links: exFAT, SMB, directories that virtual
machines share with their hosts.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from statepool import beneath
from statepool.cache import get_journal
from statepool.cache.cache import Cache
from statepool.cache.get_journal import make_together, recover_together
from statepool.cache.working import make_working
from statepool.capture.frozen import Names
from statepool.errors import AccessDenied, FileExists, FileInTheWay, TransportError
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.pools.collect import Collector
from statepool.pools.pool import Pool
from statepool.pools.staging import read_markers
from statepool.qcow2.header import read_header_file
from statepool.transports.local import LocalTransport

if TYPE_CHECKING:
    from tests.support.lab import Lab


def refuse(number: int) -> Callable[..., None]:
    def fail(*names: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def cache(lab: Lab) -> Cache:
    return lab.cache()


@pytest.fixture
def chain(lab: Lab, cache: Cache) -> tuple[Manifest, ...]:
    return lab.chain(cache.pool, "install", "customize")


@pytest.fixture(params=["renames", "only names"])
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, chain: object) -> str:
    """
    There are no hard links in the directory ``place``; nor exclusive renames, if there are only
    names.
    """
    original = os.link

    def link(source: str, target: str, *, dst_dir_fd: int | None = None, **options: Any) -> None:
        where = (
            os.path.dirname(target)
            if dst_dir_fd is None
            else os.readlink(f"/proc/self/fd/{dst_dir_fd}")
        )
        if os.path.basename(where) == "place":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        original(source, target, dst_dir_fd=dst_dir_fd, **options)

    monkeypatch.setattr(os, "link", link)
    if request.param == "only names":
        monkeypatch.setattr(beneath, "rename_new", refuse(errno.EOPNOTSUPP))
    return str(request.param)


@pytest.mark.usefixtures("no_links")
def test_a_working_image(cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path) -> None:
    path = tmp_path / "place/work.qcow2"
    path.parent.mkdir()
    make_working(cache, chain, path)
    assert read_header_file(path).backing_name == os.fsencode(cache.chains.path(chain))
    with pytest.raises(FileInTheWay):
        make_working(cache, chain, path)
    make_working(cache, chain, path, overwrite=True)
    assert os.listdir(path.parent) == ["work.qcow2"]


@pytest.mark.usefixtures("no_links")
def test_an_image_that_comes_in_the_way_stays(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path
) -> None:
    path = tmp_path / "place/work.qcow2"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(FileInTheWay):
        make_working(cache, chain, path)
    assert (os.listdir(path.parent), path.read_bytes()) == (["work.qcow2"], b"mine")


@pytest.mark.usefixtures("no_links")
@pytest.mark.parametrize("overwrite", [False, True])
def test_images_of_a_machine(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path, overwrite: bool
) -> None:
    places = places_of(tmp_path, overwrite)
    make_together(cache, dict.fromkeys(places, chain), overwrite=overwrite)
    require_new(cache, chain, places)


@pytest.mark.usefixtures("no_links")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("put", [0, 1, 2, 3])
def test_images_of_a_machine_after_a_crash(
    cache: Cache,
    chain: tuple[Manifest, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
    put: int,
) -> None:
    """When one is in its place, all will be; before that, none."""
    places = places_of(tmp_path, overwrite)
    number = 0
    original = get_journal.Place.put

    def killed(place: get_journal.Place) -> None:
        nonlocal number
        if number == put:
            raise KeyboardInterrupt
        number += 1
        original(place)

    with monkeypatch.context() as crash:
        crash.setattr(get_journal.Place, "put", killed)
        crash.setattr(get_journal, "_take_back", lambda *arguments, **options: None)
        crash.setattr("statepool.pools.staging.Staging.end", lambda staging: None)
        if put < len(places):
            with pytest.raises(KeyboardInterrupt):
                make_together(cache, dict.fromkeys(places, chain), overwrite=overwrite)
        else:
            make_together(cache, dict.fromkeys(places, chain), overwrite=overwrite)
    (marker,) = read_markers(cache.pool.transport)
    recover_together(cache, marker)
    if put:
        require_new(cache, chain, places)
    else:
        assert [path.read_bytes() for path in places if path.exists()] == (
            [b"old"] * 3 if overwrite else []
        )
    assert [path.name for path in places[0].parent.iterdir() if path not in places] == []
    assert read_markers(cache.pool.transport) == []


@pytest.mark.usefixtures("no_links")
@pytest.mark.parametrize("overwrite", [False, True])
def test_images_of_a_machine_that_fail(
    cache: Cache,
    chain: tuple[Manifest, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
) -> None:
    places = places_of(tmp_path, overwrite)
    original = get_journal.Place.put

    def full(place: get_journal.Place) -> None:
        if place.to == places[1]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(place)

    monkeypatch.setattr(get_journal.Place, "put", full)
    with pytest.raises(OSError, match="error"):
        make_together(cache, dict.fromkeys(places, chain), overwrite=overwrite)
    assert sorted(os.listdir(places[0].parent)) == (
        [path.name for path in places] if overwrite else []
    )
    assert read_markers(cache.pool.transport) == []


def test_a_pool_needs_exclusive_names_only(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(LocalTransport, "_open_anonymous", lambda transport, directory: None)
    pool = lab.pool("share")
    chain = lab.chain(pool, "install", "customize")
    lab.put(pool, "customize", chain[1], tag="other", replace=True)
    assert sorted(
        state.state for state in Pool(LocalTransport(pool.location)).fold("vm1").states
    ) == ["customize", "install"]
    with pytest.raises(FileExists):
        pool.transport.create(".statepool/pool.json", b"again")
    assert lab.leftovers(pool) == []


def test_a_pool_without_symbolic_links_has_no_view(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "symlink", refuse(errno.EPERM))
    pool = lab.pool("share")
    lab.put(pool, "install")
    assert os.listdir(lab.root / "share") == [".statepool"]
    assert not pool.transport.capabilities.symlinks


def test_a_pool_where_nothing_is_exclusive_is_refused_in_true_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(beneath, "rename_new", refuse(errno.EOPNOTSUPP))
    monkeypatch.setattr(LocalTransport, "_open_anonymous", lambda transport, directory: None)
    with pytest.raises(TransportError, match=r"pool\.json") as caught:
        Pool(LocalTransport(Location("file", str(tmp_path / "pool")))).create()
    assert "no hard links" in (caught.value.hint or "")


def test_a_cache_without_symbolic_links_is_refused_in_true_words(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "symlink", refuse(errno.EPERM))
    with pytest.raises(AccessDenied) as caught:
        make_working(cache, chain, tmp_path / "work.qcow2")
    assert "symbolic links" in (caught.value.hint or "")
    assert not (tmp_path / "work.qcow2").exists()


def places_of(tmp_path: Path, overwrite: bool) -> list[Path]:
    places = [tmp_path / f"place/{name}.qcow2" for name in ("a", "b", "c")]
    places[0].parent.mkdir()
    for path in places if overwrite else ():
        path.write_bytes(b"old")
    return places


def require_new(cache: Cache, chain: tuple[Manifest, ...], places: list[Path]) -> None:
    assert sorted(os.listdir(places[0].parent)) == [path.name for path in places]
    assert {read_header_file(path).backing_name for path in places} == {
        os.fsencode(cache.chains.path(chain))
    }
    users: Any = cache.chains.in_use()
    assert sorted(user for found in users.values() for user in found) == [
        str(path) for path in places
    ]


def test_links_that_cannot_be_read(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    As by sshfs, which refuses those that have ".." in them: a pool does without a view, and leaves
    that of others alone.
    """
    pool = lab.pool("share")
    install = lab.put(pool, "install")
    monkeypatch.setattr(os, "readlink", refuse(errno.EPERM))
    there = Pool(LocalTransport(pool.location))
    lab.put(there, "customize", install)
    there.remove(install.id, cascade=True)
    assert sorted(os.listdir(lab.root / "share/vm1/disk")) == ["install.qcow2"]
    lab.put(there, "install", tag="again")
    assert [state.state for state in there.fold("vm1").states] == ["install"]
    assert lab.leftovers(there) == []
    monkeypatch.undo()
    Collector(pool).sweep()
    assert (lab.root / "share/vm1/disk/install.qcow2").read_bytes() == lab.image("again")


def test_a_running_machine_needs_hard_links(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "work.qcow2"
    path.write_bytes(b"")
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    with pytest.raises(AccessDenied) as caught:
        Names.new(path).prepare(1 << 20)
    assert "no hard links" in (caught.value.hint or "")
    assert sorted(os.listdir(tmp_path)) == ["cache", "work.qcow2"]
