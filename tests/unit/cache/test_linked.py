"""Caches that refer to the files of a pool, and what the pool knows of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

import statepool
from statepool.cache import linked
from statepool.cache.cache import Cache
from statepool.cache.linked import UNSETTLED, note_use, refuse_linked, users
from statepool.care.gc import gc_cache, gc_pool
from statepool.copying import fetch
from statepool.errors import InUse, MissingFile
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.pools.writer import Writer
from tests.support.privileges import permissions_count


@pytest.fixture
def install(lab: Any, pool: Pool) -> Manifest:
    made: Manifest = lab.put(pool, "install")
    return made


def records(pool: Pool) -> list[Path]:
    directory = pool.transport.local_path(layout.USES)
    assert directory is not None
    return list(directory.iterdir())


def grow_old(pool: Pool) -> None:
    for path in records(pool):
        os.utime(path, (time.time() - UNSETTLED - 1,) * 2)


def interrupted(
    monkeypatch: pytest.MonkeyPatch, place: object, name: str, between: Callable[[], object]
) -> None:
    """After the first call of a function, something happens."""
    real, calls = getattr(place, name), []

    def call(*arguments: Any) -> Any:
        answer = real(*arguments)
        if not calls:
            calls.append(arguments)
            between()
        return answer

    monkeypatch.setattr(place, name, call)


def test_a_use_before_its_link_stays(cache: Cache, pool: Pool, install: Manifest) -> None:
    assert install.digest is not None
    note_use(pool.transport, install.digest, cache.root)
    with pytest.raises(InUse):
        refuse_linked(pool, {install.digest})
    grow_old(pool)
    assert users(pool) == {}
    assert records(pool) == []


def test_caches_of_two_hosts_of_one_name_are_two(
    cache: Cache, pool: Pool, install: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert install.digest is not None
    here = Writer.current()
    with monkeypatch.context() as there:
        there.setattr(
            Writer,
            "current",
            classmethod(lambda cls: evolve(here, machine="0" * 32, boot="another")),
        )
        note_use(pool.transport, install.digest, cache.root)
    note_use(pool.transport, install.digest, cache.root)
    assert len(records(pool)) == 2
    grow_old(pool)
    assert len(users(pool)[install.digest]) == 1, (
        "ours is over, and nothing is known of that of the other"
    )


def test_a_use_of_a_host_that_was_renamed_is_its_own(
    cache: Cache, pool: Pool, install: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert install.digest is not None
    here = Writer.current()
    with monkeypatch.context() as before:
        before.setattr(
            Writer, "current", classmethod(lambda cls: evolve(here, host="its-old-name"))
        )
        note_use(pool.transport, install.digest, cache.root)
    grow_old(pool)
    assert users(pool) == {}


def test_a_use_that_is_as_old_as_the_clock_of_this_process_is_wrong(
    cache: Cache, lab: Any, install: Manifest
) -> None:
    assert install.digest is not None
    ahead = Pool(lab.pool().transport, clock=lambda: time.time() + 8 * 24 * 3600)
    note_use(ahead.transport, install.digest, cache.root)
    assert list(users(ahead)) == [install.digest]


def test_a_use_that_is_taken_away_before_the_link_is_made(
    lab: Any, cache: Cache, pool: Pool, install: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, fetch, "note_use", lambda: [path.unlink() for path in records(pool)])
    lab.fetch(cache, lab.pool(scheme="link"), "install")
    assert users(pool) == {install.digest: [f"{cache.root} on {os.uname().nodename}"]}


def test_bytes_that_are_removed_before_the_link_is_made(
    lab: Any, cache: Cache, pool: Pool, install: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove() -> None:
        for path in records(pool):
            path.unlink()
        pool.remove(install.id)
        gc_pool(pool)

    interrupted(monkeypatch, fetch, "note_use", remove)
    with pytest.raises(MissingFile, match="were removed while they were linked"):
        lab.fetch(cache, lab.pool(scheme="link"), "install")


def test_bytes_that_a_collector_holds_come_back(
    lab: Any, cache: Cache, pool: Pool, install: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert install.digest is not None
    aside, digest = layout.trash("05b1066973e496ba", install.digest), install.digest
    interrupted(
        monkeypatch, fetch, "note_use", lambda: pool.transport.rename(layout.data(digest), aside)
    )
    lab.fetch(cache, lab.pool(scheme="link"), "install")
    assert cache.data(install.digest).exists()


def test_a_link_that_is_made_while_its_use_is_taken_away(
    cache: Cache, pool: Pool, install: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert install.digest is not None
    note_use(pool.transport, install.digest, cache.root)
    grow_old(pool)
    digest = install.digest
    interrupted(
        monkeypatch,
        linked,
        "_is_over",
        lambda: cache.data(digest).symlink_to(lab_file(pool, digest)),
    )
    users(pool)
    assert list(users(pool)) == [install.digest]


def lab_file(pool: Pool, digest: Digest) -> Path:
    path = pool.transport.local_path(layout.data(digest))
    assert path is not None
    return path


def test_a_cache_that_is_closed_to_us_keeps_its_uses(
    lab: Any, cache: Cache, pool: Pool, install: Manifest
) -> None:
    lab.fetch(cache, lab.pool(scheme="link"), "install")
    grow_old(pool)
    cache.root.chmod(0)
    try:
        with permissions_count():
            assert list(users(pool)) == [install.digest]
    finally:
        cache.root.chmod(0o755)


def test_a_cache_that_is_gone_uses_nothing(
    lab: Any, cache: Cache, pool: Pool, install: Manifest
) -> None:
    lab.fetch(cache, lab.pool(scheme="link"), "install")
    shutil.rmtree(cache.root)
    assert users(pool) == {}


@pytest.mark.parametrize("collected_later", [False, True])
def test_what_a_cache_gives_up_is_free_at_once(
    lab: Any, cache: Cache, pool: Pool, install: Manifest, collected_later: bool
) -> None:
    assert install.digest is not None
    lab.fetch(cache, lab.pool(scheme="link"), "install")
    cache.pool.remove(install.id)
    if collected_later:
        gc_cache(cache)
    else:
        cache.drop({install.digest})
    assert records(pool) == []


def test_each_get_renews_a_use_that_was_lost(lab: Any, pool: Pool, install: Manifest) -> None:
    disk = statepool.StatePool(lab.root / "cache", [f"link://{lab.root}/pool"]).image("vm1/disk")
    disk.get("install")
    for path in records(pool):
        path.unlink()
    assert disk.get("install").how == "none"
    assert list(users(pool)) == [install.digest]


def test_a_chain_of_links_that_nobody_uses(lab: Any, pool: Pool, install: Manifest) -> None:
    customize = lab.put(pool, "customize", install)
    linked = statepool.StatePool(lab.root / "cache", [f"link://{lab.root}/pool"])
    linked.image("vm1/disk").get("customize", to=lab.root / "work.qcow2")
    linked.image("vm1/disk").get("install", to=lab.root / "work.qcow2", overwrite=True)
    cache = lab.cache()
    assert cache.chains.gc_roots() == {install.digest}
    with (
        open(lab_file(pool, customize.digest)) as file,
        subprocess.Popen(["sleep", "60"], stdin=file) as process,
    ):
        file.close()
        assert cache.chains.gc_roots() == {install.digest, customize.digest}
        process.kill()
    linked.image("vm1/disk").unset("customize")
    linked.gc()
    assert cache.chains.in_use().keys() == set(cache.chains._keys())
