"""Working images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.beneath import Beneath
from statepool.cache import working
from statepool.cache.cache import Cache
from statepool.cache.chains import key_of, temporary_name
from statepool.cache.get_journal import Place, make_together
from statepool.cache.working import (
    check_place,
    make_working,
    prepare_working,
    refuse_inside,
    throw_away,
)
from statepool.errors import (
    AccessDenied,
    DigestMismatch,
    FileInTheWay,
    InUse,
    NotFound,
    RefusedError,
    StatePoolError,
    UnsafeImage,
)
from statepool.model.manifest import Manifest
from statepool.qcow2.header import read_header_file
from tests.support.privileges import permissions_count


def in_use(cache: Cache) -> dict[Any, list[str]]:
    return cache.chains.in_use()


def temporaries(directory: Path) -> list[Path]:
    return list(directory.glob(".statepool-*"))


# -- the place -------------------------------------------------------------------------------------


def test_a_free_place(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("work.qcow2", Path("work.qcow2"), b"work.qcow2"):
        assert check_place(name, cache, [], overwrite=False) == tmp_path / "work.qcow2"
    assert list(tmp_path.iterdir()) == [cache.root]


def test_a_place_that_is_closed_to_us(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    with (
        permissions_count(),
        pytest.raises(
            AccessDenied, match=f"cannot create {closed}/work.qcow2: Permission denied"
        ) as caught,
    ):
        make_working(cache, chain, closed / "work.qcow2")
    assert caught.value.path == str(closed / "work.qcow2")
    assert caught.value.hint
    assert in_use(cache) == {}


def test_a_place_without_a_directory(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no directory"):
        check_place(tmp_path / "no/work.qcow2", cache, [], overwrite=True)


def test_a_directory(cache: Cache, tmp_path: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(FileInTheWay, match="is a directory"):
            check_place(tmp_path, cache, [], overwrite=overwrite)


def test_a_place_that_is_taken(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "work.qcow2"
    for make in (lambda: path.write_text("mine"), lambda: path.symlink_to("nowhere")):
        make()
        with pytest.raises(FileInTheWay, match="--overwrite"):
            check_place(path, cache, [], overwrite=False)
        assert check_place(path, cache, [], overwrite=True) == path
        path.unlink()


def test_a_place_that_somebody_has_open(cache: Cache, tmp_path: Path) -> None:
    import subprocess
    import sys

    path = tmp_path / "work.qcow2"
    path.touch()
    program = "import sys; file = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(InUse):
            check_place(path, cache, [], overwrite=True)
        process.communicate(timeout=60)
    assert check_place(path, cache, [], overwrite=True) == path


def test_inside_of_the_cache_only_where_working_images_go(cache: Cache, tmp_path: Path) -> None:
    assert check_place(cache.working_directory() / "work.qcow2", cache, [], overwrite=False)
    (tmp_path / "link").symlink_to(cache.root / ".statepool")
    for directory in (
        cache.root,
        cache.root / ".statepool" / "data",
        tmp_path / "link" / "data",
        cache.root / ".statepool" / "working" / "..",
    ):
        with pytest.raises(
            RefusedError, match=f"it is inside the cache {cache.root}.*outside"
        ) as caught:
            check_place(directory / "work.qcow2", cache, [], overwrite=True)
        assert caught.value.pool == str(cache.pool)


@pytest.mark.parametrize("scheme", ["file", "link"])
def test_inside_of_a_source(lab: Any, cache: Cache, tmp_path: Path, scheme: str) -> None:
    source = lab.pool("pool", scheme=scheme)
    (tmp_path / "link").symlink_to("pool")
    for directory in (tmp_path / "pool", tmp_path / "pool" / "vm1", tmp_path / "link" / "vm1"):
        with pytest.raises(RefusedError, match=f"it is inside the pool {scheme}://{tmp_path}/pool"):
            refuse_inside(directory, cache, [source])
    refuse_inside(tmp_path / "pool-beside", cache, [source])
    refuse_inside(tmp_path, cache, [source])


def test_where_the_cache_is_inside_of_a_source(lab: Any) -> None:
    cache = lab.cache("pool/cache")
    source = lab.pool("pool")
    refuse_inside(cache.working_directory(), cache, [source])


def test_where_another_tool_has_its_files(lab: Any, cache: Cache) -> None:
    lab.unmanaged("pool", "install")
    source = lab.pool("pool", create=False)
    assert check_place(lab.root / "pool/vm1/work.qcow2", cache, [source], overwrite=False)


# -- making ----------------------------------------------------------------------------------------


def test_an_overlay_on_the_chain(cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path) -> None:
    path = make_working(cache, chain, tmp_path / "work.qcow2")
    header = read_header_file(path)
    assert header.backing_name == os.fsencode(cache.chains.path(chain))
    assert header.backing_format == b"qcow2"
    assert header.virtual_size == chain[0].virtual_size
    assert in_use(cache) == {key_of(chain): [str(path)]}
    assert temporaries(tmp_path) == []


def test_what_is_there_stays(cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path) -> None:
    """Somebody put it there after we had looked."""
    path = tmp_path / "work.qcow2"
    path.write_text("mine")
    with pytest.raises(FileInTheWay):
        make_working(cache, chain, path)
    assert path.read_text() == "mine"
    assert in_use(cache) == {}
    assert temporaries(tmp_path) == []


def test_what_is_there_gives_way_when_asked_for(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path
) -> None:
    path = make_working(cache, chain[1:], tmp_path / "work.qcow2")
    make_working(cache, chain, path, overwrite=True)
    assert in_use(cache) == {key_of(chain): [str(path)]}
    assert temporaries(tmp_path) == []


def uses(cache: Cache, chain: tuple[Manifest, ...]) -> list[Path]:
    return list((cache.chains.directory_of(key_of(chain)) / ".uses").iterdir())


@pytest.mark.parametrize("first", [0, 1])
def test_two_gets_to_one_place(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path, first: int
) -> None:
    """The record of the image that stays is there, whoever was first."""
    to = tmp_path / "work.qcow2"
    chains = (chain, chain[1:])
    fresh = [prepare_working(cache, one, to, standing_on=one) for one in chains]
    fresh[first].settle(overwrite=True)
    assert in_use(cache).keys() == {key_of(one) for one in chains}
    fresh[1 - first].settle(overwrite=True)
    assert in_use(cache) == {key_of(chains[1 - first]): [str(to)]}
    assert temporaries(tmp_path) == []


def test_two_gets_of_one_state_to_one_place(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path
) -> None:
    to = tmp_path / "work.qcow2"
    one, two = (prepare_working(cache, chain, to, standing_on=chain) for _ in range(2))
    os.replace(two.temporary, to)
    one.settle(overwrite=True)
    assert uses(cache, chain) == [Path(one.record)]
    cache.chains.release(to, besides=two.record)
    assert uses(cache, chain) == [Path(two.record)], (
        "its own record had been taken for one of what was there before"
    )
    assert in_use(cache) == {key_of(chain): [str(to)]}


def test_a_get_that_ends_before_the_image_of_another_is_written(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "work.qcow2"
    real = working.create_overlay

    def late(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(working, "create_overlay", real)
        make_working(cache, chain[1:], to, overwrite=True)
        assert key_of(chain) not in in_use(cache)
        cache.chains.prune_all(set())
        real(*arguments, **options)

    monkeypatch.setattr(working, "create_overlay", late)
    make_working(cache, chain, to, overwrite=True)
    assert in_use(cache) == {key_of(chain): [str(to)]}
    assert cache.chains.members(key_of(chain)) == {manifest.digest for manifest in chain}


def test_an_image_that_is_written_while_its_record_is_removed(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "work.qcow2"
    record = cache.chains.use(chain, to)
    real = Beneath.remove

    def remove(file: Beneath) -> bool:
        removed = real(file)
        if file == record:
            temporary_name(to, record).touch()
        return removed

    monkeypatch.setattr(Beneath, "remove", remove)
    cache.chains.release(to)
    assert uses(cache, chain) == [Path(record)]


def test_images_of_a_machine_keep_their_records_while_another_get_ends(
    cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "work.qcow2"
    to.touch()
    real = Place.put

    def put(place: Place) -> None:
        make_working(cache, chain[1:], to, overwrite=True)
        assert in_use(cache).keys() == {key_of(chain), key_of(chain[1:])}
        real(place)

    monkeypatch.setattr(Place, "put", put)
    make_together(cache, {to: chain}, overwrite=True)
    assert in_use(cache) == {key_of(chain): [str(to)]}
    assert temporaries(tmp_path) == []


def test_a_link_gives_way_itself(cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "work.qcow2").symlink_to("precious")
    make_working(cache, chain, tmp_path / "work.qcow2", overwrite=True)
    assert not (tmp_path / "work.qcow2").is_symlink()
    assert (tmp_path / "precious").read_text() == "mine"


def test_bytes_that_are_gone(cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path) -> None:
    assert chain[1].digest is not None
    cache.data(chain[1].digest).unlink()
    with pytest.raises(DigestMismatch, match="damaged or gone"):
        make_working(cache, chain, tmp_path / "work.qcow2")
    assert not (tmp_path / "work.qcow2").exists()
    assert in_use(cache) == {}


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")]
)
def test_a_place_that_fails(
    cache: Cache,
    chain: tuple[Manifest, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
) -> None:
    def fail(*names: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(working.os, "link", fail)
    with pytest.raises(
        AccessDenied if isinstance(error, PermissionError) else StatePoolError
    ) as caught:
        make_working(cache, chain, tmp_path / "work.qcow2")
    assert caught.value.path == str(tmp_path / "work.qcow2")
    assert caught.value.__cause__ is error
    assert in_use(cache) == {}
    assert temporaries(tmp_path) == []


def test_thrown_away(cache: Cache, chain: tuple[Manifest, ...], tmp_path: Path) -> None:
    path = make_working(cache, chain, tmp_path / "work.qcow2")
    throw_away(cache, path)
    throw_away(cache, path)
    assert not path.exists()
    assert in_use(cache) == {}


@pytest.mark.parametrize("content", [b"print()\n", b"QFI", bytes(4096)])
def test_what_is_no_image_is_not_thrown_away(cache: Cache, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.py"
    path.write_bytes(content)
    pool = statepool.StatePool(cache.root, [])
    with pytest.raises(UnsafeImage, match="no working image"):
        pool.throw_away(path)
    assert path.read_bytes() == content
    with pytest.raises(UnsafeImage):
        pool.throw_away(tmp_path)
    pool.throw_away(tmp_path / "gone.qcow2")


def test_what_a_power_cut_left_of_one_is_thrown_away(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "work.qcow2").touch()
    statepool.StatePool(cache.root, []).throw_away(tmp_path / "work.qcow2")
    assert not (tmp_path / "work.qcow2").exists()


def test_what_is_no_file_does_not_give_way(cache: Cache, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    for path in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(FileInTheWay, match="is a device, a socket or a FIFO"):
            check_place(path, cache, [], overwrite=True)
    assert check_place(tmp_path / "link", cache, [], overwrite=True) == tmp_path / "link", (
        "a link can give way: what it leads to stays"
    )
