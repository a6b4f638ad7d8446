"""What is trusted is the file that was hashed, whatever has its name before, meanwhile or after."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.cache import check_cached as check_cached_module
from statepool.cache.cache import Cache
from statepool.cache.check_cached import check_cached, rehash
from statepool.cache.trust import FileStatus
from statepool.capture import capture
from statepool.capture.capture import Capture
from statepool.care.verify import verify
from statepool.copying import adopt, fetch
from statepool.copying.adopt import Adoption
from statepool.errors import InUse
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, StateId
from statepool.pools import layout
from statepool.pools.pool import Pool

INSTALL = StateId("vm1/disk", "install")
DAY = 24 * 3600 * 10**9


def grow_old(path: Path) -> None:
    """A file of another pool gets a signature only when its time lies back for a while."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - DAY))


def file_in(pool: Pool, manifest: Manifest) -> Path:
    assert manifest.digest is not None
    path = pool.transport.local_path(layout.data(manifest.digest))
    assert path is not None
    return path


def evil(path: Path) -> bytes:
    content = path.read_bytes()
    return content[:-1] + bytes([content[-1] ^ 1])


def replace(path: Path) -> None:
    """By a file with other bytes, of the same size and time."""
    status, other = path.stat(), path.with_name("evil")
    other.write_bytes(evil(path))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


def overwrite(path: Path) -> None:
    """In its place, and the time is put back."""
    status, content = path.stat(), evil(path)
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.write(content)
    path.chmod(0o444)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


SWAPS = pytest.mark.parametrize("swap", [replace, overwrite])


def after(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, do: Callable[[], None]) -> None:
    """After the first call of a function, something happens."""
    real, calls = getattr(place, name), []

    def call(*arguments: Any, **options: Any) -> Any:
        answer = real(*arguments, **options)
        if not calls:
            calls.append(name)
            do()
        return answer

    monkeypatch.setattr(place, name, call)


def file_status(cache: Cache, manifest: Manifest) -> FileStatus:
    assert manifest.digest is not None
    return cache.trust.file_status(manifest.digest, cache.status(manifest.digest))


# -- link pools ------------------------------------------------------------------------------------


def test_an_honest_link_is_trusted(lab: Any, cache: Cache, pool: Pool) -> None:
    install = lab.put(pool, "install")
    grow_old(file_in(pool, install))
    lab.fetch(cache, lab.pool(scheme="link"), "install")
    assert file_status(cache, install) is FileStatus.TRUSTED


@SWAPS
@pytest.mark.parametrize(
    "moment", ["hash_open", "note_use"], ids=["once it is hashed", "once it is looked into"]
)
def test_the_owner_of_a_link_pool_swaps_a_file(
    lab: Any,
    cache: Cache,
    pool: Pool,
    monkeypatch: pytest.MonkeyPatch,
    swap: Callable[[Path], None],
    moment: str,
) -> None:
    install = lab.put(pool, "install")
    file = file_in(pool, install)
    grow_old(file)
    after(monkeypatch, fetch, moment, lambda: swap(file))
    lab.fetch(cache, lab.pool(scheme="link"), "install")
    assert file_status(cache, install) is FileStatus.DOUBTFUL
    assert check_cached(cache, [install]).bad == (install,)
    with pytest.raises(statepool.DigestMismatch):
        statepool.StatePool(cache.root, [f"link://{lab.root}/pool"]).image("vm1/disk").get(
            "install", to=lab.root / "work.qcow2"
        )


@SWAPS
def test_the_owner_of_a_link_pool_changes_a_file_while_it_is_hashed(
    lab: Any,
    cache: Cache,
    pool: Pool,
    monkeypatch: pytest.MonkeyPatch,
    swap: Callable[[Path], None],
) -> None:
    install = lab.put(pool, "install")
    file = file_in(pool, install)
    grow_old(file)
    lab.fetch(cache, lab.pool(scheme="link"), "install")
    assert install.digest is not None
    cache.trust.note_source(install.digest, f"link://{lab.root}/pool")
    os.utime(file)
    grow_old(file)
    after(monkeypatch, check_cached_module, "hash_file", lambda: swap(file))
    rehash(cache, install)
    assert file_status(cache, install) is FileStatus.DOUBTFUL


def test_a_link_pool_of_another_tool(
    lab: Any, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lab.unmanaged("pool", "install")
    digest = Digest.of(path.read_bytes())
    grow_old(path)
    after(monkeypatch, fetch, "hash_open", lambda: replace(path))
    lab.fetch(cache, lab.pool(scheme="link", create=False), "install")
    assert cache.trust.file_status(digest, cache.status(digest)) is FileStatus.DOUBTFUL


# -- the cache itself ------------------------------------------------------------------------------


@SWAPS
def test_a_file_of_the_cache_that_is_replaced_while_it_is_hashed(
    lab: Any,
    cache: Cache,
    pool: Pool,
    monkeypatch: pytest.MonkeyPatch,
    swap: Callable[[Path], None],
) -> None:
    install = lab.put(pool, "install")
    lab.fetch(cache, pool, "install")
    assert install.digest is not None
    cache.trust.forget(install.digest)
    after(monkeypatch, check_cached_module, "hash_file", lambda: swap(cache.data(install.digest)))
    rehash(cache, install)
    assert file_status(cache, install) is FileStatus.DOUBTFUL
    assert check_cached(cache, [install]).bad == (install,)


def test_a_file_of_the_cache_that_is_replaced_before_it_is_signed(
    lab: Any, cache: Cache, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = lab.put(pool, "install")
    after(monkeypatch, fetch.Fetch, "_show", lambda: replace(cache.data(install.digest)))
    lab.fetch(cache, pool, "install")
    assert file_status(cache, install) is FileStatus.DOUBTFUL


def test_a_signature_of_another_process_stays(lab: Any, cache: Cache, pool: Pool) -> None:
    """
    It has set the time of the file back, which looks like a change to the one that hashed it at the
    same moment.
    """
    install = lab.put(pool, "install")
    lab.fetch(cache, pool, "install")
    assert install.digest is not None
    cache.sign(install.digest, None, flushed=False, source=None)
    assert file_status(cache, install) is FileStatus.TRUSTED


def test_verify_looks_into_the_file_that_it_hashed(
    lab: Any, cache: Cache, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = lab.put(pool, "install")
    lab.fetch(cache, pool, "install")
    file = cache.data(install.digest)

    def spoil() -> None:
        os.rename(file, file.with_name("aside"))
        file.write_bytes(b"?" * install.size)

    after(monkeypatch, check_cached_module, "hash_file", spoil)
    assert [found.problem for found in verify(cache.pool, None, None, cache=cache)] == [None]
    assert file_status(cache, install) is FileStatus.DOUBTFUL


# -- working images, and files of other tools ------------------------------------------------------


@pytest.mark.parametrize("how", ["hardlink", "copy"])
@pytest.mark.parametrize("moved", [True, False], ids=["moved away", "replaced"])
def test_a_working_image_that_is_replaced_while_it_is_hashed(
    lab: Any, cache: Cache, monkeypatch: pytest.MonkeyPatch, how: str, moved: bool
) -> None:
    work = lab.root / "work.qcow2"
    work.write_bytes(lab.image("work"))
    if how == "copy":
        os.link(work, lab.root / "second")
    other = lab.root / "other"
    other.write_bytes(b"what somebody else wants to keep")

    def swap() -> None:
        if moved:
            os.rename(work, lab.root / "moved.qcow2")
        os.replace(other, work)

    after(monkeypatch, capture, "hash_file" if how == "hardlink" else "copy", swap)
    with pytest.raises(InUse, match="replaced by another file"):
        Capture(cache, INSTALL, {INSTALL: work}).run()
    assert work.read_bytes() == b"what somebody else wants to keep"
    assert cache.pool.fold("vm1").states == {}
    assert lab.leftovers(cache.pool) == []


def test_an_adopted_file_that_is_replaced_while_it_is_hashed(
    lab: Any, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lab.unmanaged("pool", "install")
    after(monkeypatch, adopt, "hash_open", lambda: replace(path))
    (adopted,) = Adoption(pool).run()
    assert adopted.problem is not None
    assert "another file took the place" in adopted.problem
    assert pool.fold("vm1").states == {}
    assert lab.leftovers(pool) == []


def test_an_adopted_file_is_looked_into_by_the_descriptor_that_is_hashed(
    lab: Any, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lab.unmanaged("pool", "install")
    good = path.read_bytes()

    def spoil() -> None:
        path.unlink()
        path.write_bytes(good[:200] + b"\xff" * (len(good) - 200))

    after(monkeypatch, adopt, "unmanaged_chain", spoil)
    (adopted,) = Adoption(pool).run()
    assert adopted.problem is not None
    assert pool.fold("vm1").states == {}
