"""
What the log of a source says of bytes that it does not own, or that it says falsely: derived from
our own copy, and believed of nobody.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from attrs import evolve

import statepool
from statepool.errors import Conflict, IntegrityError
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.pools import layout

if TYPE_CHECKING:
    from conftest import Make, Site

SIZE = 1 << 20
BLOCK = 64 << 10
FACTS = ("size", "virtual_size", "cluster_size", "extents", "origin")


def forge(pool: Path, change: Callable[[dict[str, Any]], None], machine: str = "vm1") -> None:
    """Change the manifests in the records of a pool."""
    for path in (pool / ".statepool/log" / machine).glob("0*.json"):
        record = json.loads(path.read_bytes())
        for step in record["changes"]:
            change(step["publish"])
        path.chmod(0o644)
        path.write_text(json.dumps(record))


def known(site: Site, name: str, state: str = "connect") -> Manifest:
    manifest = site.source(name).pool.find(StateId("vm1/disk", state))
    assert manifest is not None
    return manifest


def lie(manifest: dict[str, Any]) -> None:
    manifest.update(extents=[[0, 512]], virtual_size=7, cluster_size=3, origin="blake3:" + "7" * 64)


def facts(manifest: Manifest) -> list[Any]:
    return [getattr(manifest, name) for name in FACTS]


def test_a_cache_knows_what_its_own_bytes_show(site: Site) -> None:
    site.open("good", cache="honest").image("vm1/disk").get("connect")
    forge(site.root / "good", lie)
    site.open("good").image("vm1/disk").get("connect")
    for state in ("connect", "customize", "install"):
        assert facts(known(site, "cache", state)) == facts(known(site, "honest", state))
        assert known(site, "cache", state).origin is None


def test_a_cache_that_refers_to_a_pool_believes_it_no_more(site: Site) -> None:
    site.open("good", cache="honest").image("vm1/disk").get("connect")
    forge(site.root / "good", lie)
    statepool.StatePool(site.root / "cache", [f"link://{site.root}/good"]).image("vm1/disk").get(
        "connect"
    )
    assert facts(known(site, "cache")) == facts(evolve(known(site, "honest"), extents=()))


def test_a_machine_state_is_what_its_bytes_show(site: Site, make_image: Make) -> None:
    image = make_image(site.root / "m.qcow2", SIZE, writes=[(0, BLOCK, 3)])
    site.open("good", cache="honest").machine("vm1").set("on", source={"disk": image})
    machine = StateId("vm1", "on", Kind.MACHINE)
    forge(
        site.root / "good",
        lambda manifest: manifest.update(
            size=manifest["size"], virtual_size=7, cluster_size=3, origin="blake3:" + "7" * 64
        ),
    )
    site.open("good").machine("vm1").get("on")
    statepool.init(site.root / "mirror")
    statepool.sync(site.root / "good", site.root / "mirror")
    for name in ("cache", "mirror"):
        assert facts(known(site, name, "on")) == facts(known(site, "honest", "on"))
        found = site.source(name).pool.find(machine)
        assert found is not None
        assert facts(found) == [0, 0, 0, (), None]


def test_a_lie_is_not_passed_on_by_sync(site: Site) -> None:
    honest = {state: known(site, "good", state) for state in ("connect", "install")}
    forge(site.root / "good", lie)
    statepool.init(site.root / "mirror")
    assert {
        state.action for state in statepool.sync(site.root / "good", site.root / "mirror").states
    } == {"copied"}
    assert {state: facts(known(site, "mirror", state)) for state in honest} == {
        state: facts(one) for state, one in honest.items()
    }
    # The bytes are there already, for the sake of another name.
    shutil.copytree(site.root / "mirror", site.root / "another", symlinks=True)
    shutil.rmtree(site.root / "another/.statepool/log/vm1")
    statepool.sync(site.root / "good", site.root / "another")
    # the copy has no holes
    assert facts(known(site, "another")) == facts(evolve(honest["connect"], extents=()))


def test_a_lie_is_not_passed_on_by_the_set_of_a_child(site: Site, make_image: Make) -> None:
    honest = facts(known(site, "good"))
    forge(site.root / "good", lie)
    site.empty("store")
    disk = site.open("good", "store").image("vm1/disk")
    disk.get("connect", to=site.root / "work-1.qcow2")
    assert [str(at.result) for at in disk.set("child", source=site.root / "work-1.qcow2").pools][
        -1
    ] == "stored"
    assert facts(known(site, "store")) == honest


def test_a_wrong_length_does_not_cost_the_cache_its_bytes(site: Site) -> None:
    """
    The same bytes are offered under another name, and said to be longer than they are, while the
    cached ones have to be hashed once more.
    """
    site.open("good").image("vm1/disk").get("connect")
    site.pool("evil")

    def rename(manifest: dict[str, Any]) -> None:
        manifest.update(state="evil-" + manifest["state"], size=manifest["size"] + 1, extents=None)
        if manifest.get("parent"):
            manifest["parent"]["state"] = "evil-" + manifest["parent"]["state"]

    forge(site.root / "evil", rename)
    notes = list((site.root / "cache/.statepool").glob("**/trust/*.json"))
    assert len(notes) == 3
    for note in notes:
        note.unlink()
    digest = known(site, "cache", "install").digest
    assert digest is not None
    before = (site.root / "cache" / layout.data(digest)).stat().st_ino
    assert site.open("evil").image("vm1/disk").get("evil-install").bytes == 0
    assert (site.root / "cache" / layout.data(digest)).stat().st_ino == before
    assert known(site, "cache", "evil-install").size == known(site, "cache", "install").size
    assert site.open("good", fresh=0).image("vm1/disk").get("connect").bytes == 0


def evil_twin(site: Site, *, state: str = "install") -> str:
    """
    A mirror with other bytes under the same name, which says that they were rewritten from the good
    ones. :returns: their digest
    """
    site.empty("evil")
    site.change("evil", state, 9)
    good = str(known(site, "good", state).digest)
    forge(site.root / "evil", lambda manifest: manifest.update(origin=good))
    return str(known(site, "evil", state).digest)


@pytest.mark.parametrize("order", [("evil", "good"), ("good", "evil")])
def test_who_says_that_its_bytes_are_those_of_another_is_not_asked_for_them(
    site: Site, order: tuple[str, str]
) -> None:
    evil = evil_twin(site)
    good = str(known(site, "good", "install").digest)
    got = site.open(*order).image("vm1/disk").get("install", to=site.root / "work-1.qcow2")
    assert (got.digest, got.source) == (good, f"file://{site.root}/good")
    assert evil not in str(sorted((site.root / "cache/.statepool/data").iterdir()))


def test_what_is_asked_for_of_one_source_has_the_digest_that_this_one_has(site: Site) -> None:
    evil = evil_twin(site)
    disk = site.open("evil", "good").image("vm1/disk")
    assert disk.get("install", mirror="evil").digest == evil
    assert known(site, "cache", "install").origin is None
    got = disk.get("install", mirror="good", to=site.root / "work-1.qcow2")
    assert got.digest == str(known(site, "good", "install").digest) != evil


def test_a_child_of_other_bytes_is_not_stored_on_the_good_ones(site: Site) -> None:
    evil_twin(site)
    disk = site.open("evil", "good").image("vm1/disk")
    disk.get("install", mirror="evil", to=site.root / "work-1.qcow2")
    stored = disk.set("child", source=site.root / "work-1.qcow2")
    assert [str(at.result) for at in stored.pools if at.pool.endswith("/good")] == ["failed"]
    assert site.source("good").pool.find(StateId("vm1/disk", "child")) is None


def test_what_was_set_here_only_does_not_give_way_to_a_claim(site: Site, make_image: Make) -> None:
    disk = site.open("good").image("vm1/disk")
    disk.set(
        "own", source=make_image(site.root / "own.qcow2", SIZE, writes=[(0, BLOCK, 3)]), scope="own"
    )
    mine = str(known(site, "cache", "own").digest)
    site.empty("evil")
    site.change("evil", "own", 9)
    forge(site.root / "evil", lambda manifest: manifest.update(origin=mine))
    with pytest.raises(Conflict, match="is in no source"):
        site.open("evil", fresh=0).image("vm1/disk").get("own")
    assert str(known(site, "cache", "own").digest) == mine


def test_a_claim_is_a_line_of_its_own(site: Site) -> None:
    evil_twin(site)
    site.open("good").image("vm1/disk").get("install")
    shown = [
        listed.pools
        for listed in site.open("good", "evil").show("vm1/disk")
        if listed.manifest.state == "install"
    ]
    assert sorted(map(len, shown)) == [1, 2]


def test_a_neighbours_copy_that_was_rewritten_is_found_to_be_that(site: Site) -> None:
    """
    Adopted with an absolute backing name, which each cache makes plain: who has it from a neighbour
    first learns later what it is.
    """
    site.empty("adopted")
    place = site.root / "adopted/vm1/disk"
    place.mkdir(parents=True)
    for state in ("install", "customize"):
        shutil.copy(site.data("good", state), place / f"{state}.qcow2")
        (place / f"{state}.qcow2").chmod(0o644)
    site.qemu_img(
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        place / "install.qcow2",
        place / "customize.qcow2",
    )
    assert [adopted.problem for adopted in statepool.adopt(site.root / "adopted")] == [None, None]
    original = known(site, "adopted", "customize").digest
    site.open("adopted", cache="neighbour").image("vm1/disk").get("customize")
    assert known(site, "neighbour", "customize").origin == original
    disk = site.open("neighbour", fresh=0).image("vm1/disk")
    disk.get("customize")
    disk.get("customize", to=site.root / "work-1.qcow2")
    disk.set("child", source=site.root / "work-1.qcow2", scope="own")
    assert known(site, "cache", "customize").origin is None
    both = site.open("neighbour", "adopted", fresh=0).image("vm1/disk")
    assert both.get("customize").source == f"file://{site.root}/adopted"
    assert known(site, "cache", "customize").origin == original
    assert both.get("customize").bytes == 0
    assert both.check("child")


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["labels", "creator", "fingerprint"])
def test_texts_that_nobody_can_write_are_not_read(site: Site, field: str) -> None:
    site.pool("evil")
    forge(site.root / "evil", lambda manifest: manifest.update({field: {"x": "y" * (1 << 20)}}))
    with pytest.raises(IntegrityError, match="characters"):
        site.open("evil").image("vm1/disk").get("connect")
    assert (
        site.open("evil", "good").image("vm1/disk").get("connect").source
        == f"file://{site.root}/good"
    )


def test_long_labels_leave_room_for_checkpoints(
    site: Site, make_image: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("statepool.pools.refusals.ROOM_FOR_TEXTS", 20000)
    disk = site.open("good").image("vm1/disk")
    for number in range(3):
        image = make_image(site.root / f"w{number}.qcow2", SIZE, writes=[(0, BLOCK, number + 1)])
        if number < 2:
            disk.set(
                f"long-{number}",
                source=image,
                scope="own",
                labels={"a": "b" * 4096, "c": "d" * 4096},
            )
        else:
            with pytest.raises(statepool.errors.NoSpace, match="no room"):
                disk.set(
                    "long-2", source=image, scope="own", labels={"a": "b" * 4096, "c": "d" * 4096}
                )
            disk.set("short", source=image, scope="own", labels={"a": "b"})
