"""Looking whether everything is as it should be, and taking away what nobody needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from statepool.cache.cache import Cache
from statepool.cache.trust import FileStatus
from statepool.care.doctor import survey_host, survey_pool
from statepool.care.gc import gc_cache, gc_pool
from statepool.care.verify import verify
from statepool.model.digest import Digest
from statepool.model.manifest import StateId
from statepool.model.outcomes import Finding, Level
from statepool.pools import layout
from statepool.pools.json_files import Notes
from statepool.qcow2.tool import QemuImg
from statepool.testing.trees import photograph


def problems(found: Any) -> dict[str, str | None]:
    return {checked.state: checked.problem for checked in found}


def spoil(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().swapcase())


# -- verify ----------------------------------------------------------------------------------------


def test_whole_states(lab: Any) -> None:
    pool = lab.pool()
    chain = lab.chain(pool, "install", "customize")
    found = list(verify(pool, None, None))
    assert problems(found) == {"customize": None, "install": None}
    assert {checked.digest for checked in found} == {str(manifest.digest) for manifest in chain}
    assert problems(verify(pool, "vm1/disk", "install")) == {"install": None}
    assert problems(verify(pool, "vm1", None)) == {"customize": None, "install": None}
    assert problems(verify(pool, "vm2", None)) == {}


def test_what_is_wrong_in_a_pool(lab: Any) -> None:
    pool = lab.pool()
    third, second, first = lab.chain(pool, "first", "second", "third")
    spoil(lab.root / "pool" / layout.data(first.digest))
    (lab.root / "pool" / layout.data(second.digest)).unlink()
    os.truncate(lab.root / "pool" / layout.data(third.digest), 5000)
    lab.unmanaged("pool", "orphan", "nothing")
    found = problems(verify(pool, None, None))
    assert f"not {first.digest}" in (found["first"] or "")
    assert "are gone" in (found["second"] or "")
    assert "5000" in (found["third"] or "")
    assert "missing-parent" in (found["orphan"] or "")


def test_what_turns_out_right_in_the_cache_is_trusted_again(lab: Any, cache: Cache) -> None:
    (install,) = lab.chain(cache.pool, "install")
    assert (
        cache.trust.file_status(install.digest, cache.status(install.digest)) is FileStatus.DOUBTFUL
    )
    assert problems(verify(cache.pool, None, None, cache=cache)) == {"install": None}
    assert (
        cache.trust.file_status(install.digest, cache.status(install.digest)) is FileStatus.TRUSTED
    )


def test_what_is_wrong_in_the_cache(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    (linked,) = lab.chain(pool, "linked")
    lab.fetch(cache, lab.pool(scheme="link"), "linked")
    (lab.root / "pool" / layout.data(linked.digest)).unlink()
    (spoilt,) = lab.chain(cache.pool, "spoilt")
    spoil(cache.data(spoilt.digest))
    found = problems(verify(cache.pool, None, None, cache=cache))
    assert "gone" in (found["linked"] or "")
    assert f"not {spoilt.digest}" in (found["spoilt"] or "")
    assert (
        cache.trust.file_status(spoilt.digest, cache.status(spoilt.digest)) is FileStatus.DOUBTFUL
    )


def test_a_damaged_log_is_one_line(lab: Any) -> None:
    lab.chain(lab.pool(), "install")
    (lab.root / "pool" / layout.record("vm1", 1)).write_bytes(b"{")
    (found,) = verify(lab.pool(), None, None)
    assert "not JSON" in (found.problem or "")


def test_what_goes_by_no_name_is_read_too(lab: Any, cache: Cache) -> None:
    pool, other = lab.pool(), lab.pool("other")
    lab.chain(pool, "install", "customize")
    lab.fetch(cache, pool, "customize")
    lab.put(other, "install", tag="new")
    lab.fetch(cache, other, "install")
    assert sorted(checked.state for checked in verify(cache.pool, None, None, cache=cache)) == [
        "customize",
        "install",
        "install",
    ]


# -- survey ----------------------------------------------------------------------------------------


def worst(found: list[Finding]) -> dict[str, str | None]:
    return {
        finding.what: finding.cure
        for finding in found
        if finding.level in (Level.WARNING, Level.ERROR)
    }


def test_a_healthy_host(lab: Any, cache: Cache) -> None:
    lab.chain(cache.pool, "install")
    found = survey_host(cache, QemuImg())
    assert worst(found) == {}
    assert any(finding.what.startswith("qemu-img ") for finding in found)
    assert any("bytes are free" in finding.what for finding in found)


def test_without_qemu_img(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert worst(survey_host(cache, QemuImg())) == {
        "qemu-img is not installed": "install qemu-utils"
    }


def test_a_cache_that_is_not_there_yet(lab: Any) -> None:
    cache = Cache.open(lab.pool("nothing", create=False), lab.cache().settings)
    assert worst(survey_host(cache, QemuImg())) == {}
    assert not (lab.root / "nothing").exists()


def test_what_is_no_pool(lab: Any) -> None:
    (lab.root / "pool").mkdir()
    ((what, cure),) = worst(survey_pool(lab.pool(create=False))).items()
    assert "is not a pool" in what
    assert "statepool init" in (cure or "")


def test_bytes_that_are_gone(lab: Any) -> None:
    pool = lab.pool()
    (install,) = lab.chain(pool, "install")
    (lab.root / "pool" / layout.data(install.digest)).unlink()
    assert list(worst(survey_pool(pool))) == ["the bytes of vm1/disk install are gone"]


def test_files_of_another_tool(lab: Any) -> None:
    lab.unmanaged("pool", "install")
    before = photograph(lab.root)
    notes = {
        finding.cure
        for finding in survey_pool(lab.pool(create=False))
        if finding.level is Level.NOTE
    }
    assert notes == {f"to write to it: statepool init {lab.location('pool')}"}
    assert photograph(lab.root) == before
    lab.pool()
    notes = {finding.cure for finding in survey_pool(lab.pool()) if finding.level is Level.NOTE}
    assert notes == {f"statepool adopt {lab.location('pool')}"}


def test_a_pool_that_a_group_shares(lab: Any) -> None:
    (lab.root / "pool").mkdir()
    (lab.root / "pool").chmod(0o2775)
    pool = lab.pool()
    lab.chain(pool, "install")
    assert worst(survey_pool(pool)) == {}
    (lab.root / "pool").chmod(0o775)
    assert list(worst(survey_pool(pool)).values()) == [f"chmod g+s {lab.root / 'pool'}"]
    (lab.root / "pool").chmod(0o2775)
    (lab.root / "pool/.statepool/data").chmod(0o755)
    (lab.root / "pool/.statepool/log/vm1").chmod(0o755)
    assert set(worst(survey_pool(pool)).values()) == {
        f"find {lab.root / 'pool/.statepool' / name} -type d -exec chmod g+ws {{}} +"
        for name in ("data", "log/vm1")
    }


# -- tidying up ------------------------------------------------------------------------------------


def test_nothing_to_tidy(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    lab.chain(pool, "install", "customize")
    lab.fetch(cache, pool, "customize")
    before = photograph(lab.root)
    assert gc_cache(cache) == []
    assert gc_pool(pool) == []
    assert photograph(lab.root) == before
    assert gc_pool(lab.pool("nothing", create=False)) == []
    assert not (lab.root / "nothing").exists()


def test_leftovers_of_all_kinds(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    chain = lab.chain(pool, "install", "customize")
    lab.fetch(cache, pool, "customize")
    cache.chains.prepare(chain)
    stray = Digest.of(b"stray")
    for name in (layout.data(stray), layout.trash("0123456789abcdef", stray)):
        (cache.root / name).write_bytes(b"stray")
    cache.pool.remove(StateId("vm1/disk", "customize"))
    before = photograph(lab.root)
    would = gc_cache(cache, dry_run=True)
    assert photograph(lab.root) == before
    gone = gc_cache(cache)
    assert {collected.what for collected in gone} >= {
        "a chain that no working image stands on",
        "bytes that no state needs",
        "bytes that were being removed",
        "a note on bytes that are gone",
    }
    assert {collected.path for collected in would} <= {collected.path for collected in gone}
    assert lab.data(cache.pool) == {chain[1].digest}
    assert lab.leftovers(cache.pool) == []
    assert gc_cache(cache) == []


def test_what_a_working_image_stands_on_is_not_tidied(lab: Any, cache: Cache) -> None:
    chain = lab.chain(cache.pool, "install")
    cache.chains.use(chain, lab.root / "work.qcow2")
    cache.pool.remove(StateId("vm1/disk", "install"))
    gc_cache(cache)
    assert lab.data(cache.pool) == {chain[0].digest}


def test_what_caches_refer_to_is_not_tidied(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    (install,) = lab.chain(pool, "install")
    lab.fetch(cache, lab.pool(scheme="link"), "install")
    pool.remove(StateId("vm1/disk", "install"))
    assert not [
        collected for collected in gc_pool(pool) if collected.path == layout.data(install.digest)
    ]
    assert lab.data(pool) == {install.digest}
    cache.pool.remove(StateId("vm1/disk", "install"))
    gc_cache(cache)
    assert [collected.path for collected in gc_pool(pool)] == [layout.data(install.digest)]


def test_a_note_that_another_process_removes_meanwhile(
    lab: Any, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (install,) = lab.chain(lab.pool(), "install")
    lab.fetch(cache, lab.pool(), "install")
    cache.pool.remove(install.id)
    cache.data(install.digest).unlink()
    real = Notes.status

    def look(notes: Notes, path: str) -> os.stat_result | None:
        cache.trust.forget(install.digest)
        return real(notes, path)

    monkeypatch.setattr(Notes, "status", look)
    assert gc_cache(cache) == []
