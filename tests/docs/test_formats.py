"""
The examples in the description of the formats are what the code reads, and what it would write.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from statepool.beneath import Tree
from statepool.cache import chains
from statepool.cache.linked import users
from statepool.cache.lookup_cache import LookupCache
from statepool.cache.trust import FileStatus, Trust
from statepool.capture.capture_journal import Journal
from statepool.errors import BadRecord
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import MAX_EXTENTS, MAX_LABELS, Kind, Manifest, Parent, StateId
from statepool.model.names import MAX_LENGTH, RESERVED_SUFFIXES, ROOT_STATES
from statepool.model.pieces import PIECE
from statepool.model.settings import DEEPEST
from statepool.pools import claims, collect, layout, log
from statepool.pools.fold import KEEP_NONCES, Fold
from statepool.pools.json_files import Notes
from statepool.pools.lineage import MOST_IN_CHAIN
from statepool.pools.log import MachineLog
from statepool.pools.pool import Pool
from statepool.pools.records import Record
from statepool.pools.staging import Marker
from statepool.pools.writer import Writer
from statepool.qcow2.checks import LARGE
from statepool.sources.pool_source import PoolSource
from statepool.sources.source_stats import SourceStats
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.transports.base import MOST_TOGETHER
from statepool.transports.failures import MOST_HOLES
from statepool.transports.registry import open_transport

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/formats.rst").read_text(encoding="utf-8")
NOW = 1795182440.0


def examples(reader: Any, kind: str) -> list[tuple[str, Any]]:
    """:returns: what stands behind ``.. example: KIND``, and the JSON below it"""
    found = []
    lines = PAGE.splitlines()
    for block in reader.blocks(PAGE):
        titles = [line for line in lines[: block.line] if line.startswith(".. example: ")]
        if (
            block.language == "json"
            and titles
            and re.match(rf"\.\. example: {kind}( [0-9]+)?\Z", titles[-1])
        ):
            found.append((titles[-1].rpartition(" ")[2], json.loads(block.text)))
    assert found, f"the page has no example of {kind}"
    return found


def put(path: str, data: Any) -> MemoryTransport:
    transport = MemoryTransport(MemoryStore())
    for directory in layout.DIRECTORIES:
        transport.make_directory(directory)
    transport.make_directory(path.rpartition("/")[0])
    transport.create(path, json.dumps(data).encode())
    return transport


def test_every_example_is_tested(reader: Any) -> None:
    assert (
        PAGE.count("\n.. example: ")
        == sum(block.language == "json" for block in reader.blocks(PAGE))
        == 13
    )


def test_pool(reader: Any) -> None:
    ((_, data),) = examples(reader, "pool")
    assert Pool(put(layout.POOL_FILE, data)).is_managed


def test_manifests(reader: Any) -> None:
    kinds = [
        Manifest.from_json(data).kind
        for _, data in examples(reader, "manifest")
        if Manifest.from_json(data).to_json() == data
    ]
    assert kinds == [Kind.IMAGE, Kind.MACHINE]


def test_record(reader: Any) -> None:
    ((number, data),) = examples(reader, "record")
    record = Record.from_bytes(json.dumps(data).encode(), int(number), "example")
    assert json.loads(record.to_bytes()) == data


def test_checkpoint(reader: Any) -> None:
    ((number, data),) = examples(reader, "checkpoint")
    fold = MachineLog(put(layout.checkpoint("vm1", int(number)), data), "vm1").fold()
    assert fold.number == 3
    assert [manifest.to_json() for manifest in fold.states.values()] == data["states"]
    assert {str(number): nonce for number, nonce in fold.nonces.items()} == data["nonces"]


def test_marker(reader: Any) -> None:
    ((_, data),) = examples(reader, "marker")
    marker = Marker.from_bytes("4a9d183d65413568", json.dumps(data).encode(), "example")
    assert json.loads(marker.to_bytes()) == data


def test_marker_of_a_set(reader: Any) -> None:
    ((_, data),) = examples(reader, "marker of a set")
    marker = Marker.from_bytes("4a9d183d65413568", json.dumps(data).encode(), "example")
    journal = Journal.from_facts(marker.facts)
    assert journal.to_facts() == data["facts"]
    assert {part.manifest.digest for part in journal.parts} == marker.digests


def test_use_of_a_pool(reader: Any) -> None:
    ((_, data),) = examples(reader, "use of a pool")
    digest = Digest.parse(data["digest"])
    short = Digest.of_text(f"{data['machine']}:{data['cache']}").hex[:16]
    transport = put(f"{layout.USES}/{digest.file_name}.{short}.json", data)
    assert users(Pool(transport)) == {digest: ["/var/lib/states on worker1"]}


def test_use_of_a_chain(reader: Any, tmp_path: Path) -> None:
    ((_, data),) = examples(reader, "use of a chain")
    manifest = Manifest("vm1/disk", "install", digest=Digest("blake3", "1" * 64))
    key = chains.key_of([manifest])
    assert key == Digest.of_text(f"install {manifest.digest}\n"), (
        "the key is another than the page says"
    )
    directory = tmp_path / chains.CHAINS / key.file_name / ".uses"
    directory.mkdir(parents=True)
    (directory / "4a9d183d65413568.json").write_text(json.dumps({**data, "missing_since": NOW}))
    found = chains.Chains(Tree(tmp_path), lambda digest: None)
    assert found.users(key, now=NOW + 7 * 24 * 3600 - 1) == ["/var/tests/work.qcow2"]
    assert found.users(key, now=NOW + 7 * 24 * 3600) == []


def test_trust(reader: Any, tmp_path: Path) -> None:
    ((_, data),) = examples(reader, "trust")
    digest = Digest("blake3", "1" * 64)
    note = tmp_path / f".statepool/trust/{digest.file_name}.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps(data))
    trust = Trust(Notes(Tree(tmp_path), ("trust",)))
    assert trust.source(digest) == data["source"]
    assert trust.file_status(digest, (ROOT / "README.rst").stat()) is FileStatus.DOUBTFUL
    # What is written has the fields of the example, and is believed again.
    file = tmp_path / "file"
    file.write_bytes(b"bytes")
    with open(file, "rb") as opened:
        trust.record(digest, opened.fileno(), os.fstat(opened.fileno()), flushed=True, source=None)
    assert set(json.loads(note.read_text())) == set(data)
    assert trust.file_status(digest, file.stat()) is FileStatus.TRUSTED


def test_freshness(reader: Any, tmp_path: Path) -> None:
    ((_, data),) = examples(reader, "freshness")
    path = tmp_path / ".statepool/fresh/vm1/disk/customize.image.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data))
    (answer,) = (
        LookupCache(Notes(Tree(tmp_path), ("fresh",)), 60, lambda: NOW)
        .answers(StateId("vm1/disk", "customize"))
        .values()
    )
    assert {"token": answer.token, "at": answer.at, "digest": str(answer.digest)} == data[
        "answers"
    ]["file:///srv/pool"]


def test_claim(reader: Any) -> None:
    ((_, data),) = examples(reader, "claim")
    store = MemoryTransport(MemoryStore())
    Pool(store).create()
    with claims.Claims(store).hold("store-a", 0):
        made = json.loads(store.read(f"{layout.LOCKS}/store-a.1"))
    assert set(made) == set(data)
    assert Writer.from_json(data["writer"])
    assert (claims.STALE, claims.BEAT, claims.REMEMBERED, claims.KEPT) == (20, 2, 64, 2)
    assert says("in the last 20 seconds")
    assert says("every two seconds")
    assert says("more than 64 files")
    shown = re.findall(r"POOL/\.statepool/locks/(store-\S+) ", PAGE)
    assert len(shown) == 3
    assert all(claims.is_claim(name) for name in shown)


def test_known(reader: Any, tmp_path: Path) -> None:
    ((_, data),) = examples(reader, "known")
    source = PoolSource(Pool(open_transport(Location.parse(data["source"]))), "pool")
    note = tmp_path / f".statepool/known/{Digest.of_text(data['source']).hex[:32]}.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps(data))
    knowledge = SourceStats(Notes(Tree(tmp_path), ("known",)))
    known = knowledge.of(source)
    assert attrs.asdict(known) == {
        name: value for name, value in data.items() if name not in ("format", "source")
    }
    # What is written has the fields of the example.
    knowledge.answered(source, 60.0)
    knowledge.save()
    (path,) = note.parent.iterdir()
    assert set(json.loads(path.read_text())) == set(data)


# -- what the text says, the code does -------------------------------------------------------------


def says(text: str) -> bool:
    return text in " ".join(PAGE.split())


def test_the_numbers_are_those_of_the_code() -> None:
    assert layout.FORMAT == 1
    assert says("This is format **1**")
    assert says(f"at most {MAX_LENGTH} characters")
    assert all(f"``{name}``" in PAGE for name in (*ROOT_STATES, *RESERVED_SUFFIXES))
    assert says(f"at most {MAX_EXTENTS:,}, in order")
    assert says(f"at most {MAX_LABELS} texts")
    assert says(f"at most {log.MAX_RECORD >> 20} MiB")
    assert says(f"more than {LARGE >> 30} GiB and four times")
    assert says(f"more than {MOST_HOLES >> 40} TiB of holes")
    assert says(f"not more than {MOST_TOGETHER >> 20} MiB")
    assert says(f"not more than {log.MOST_RECORDS:,} records")
    assert says(f"not have more than {MOST_IN_CHAIN:,} states, nor more than {DEEPEST:,}")
    assert says(f"the last {KEEP_NONCES} of them")
    assert says(f"the last {KEEP_NONCES} nonces")
    assert says(f"checkpoint is {log.CHECKPOINT_EVERY} records back")
    assert says(f"newest checkpoint minus {log.KEEP_RECORDS}")
    assert log.KEEP_CHECKPOINTS == 2
    assert says("all checkpoints but the newest two")
    assert collect.ABANDONED == chains.GRACE == 7 * 24 * 3600
    assert says("after 7 days")
    assert says("for 7 days after")
    assert collect.PASSING == 3600
    assert says("after an hour")


@pytest.mark.parametrize("directory", layout.DIRECTORIES)
def test_every_directory_is_in_the_picture(directory: str) -> None:
    assert f"POOL/{directory}/" in PAGE


@pytest.mark.parametrize(
    ("state", "place", "target"),
    [
        (StateId("MACHINE/IMAGE", "STATE"), "MACHINE/IMAGE/STATE.qcow2", "../../.statepool/data/"),
        (StateId("MACHINE/IMAGE", "root"), "MACHINE/IMAGE.qcow2", "../.statepool/data/"),
        (StateId("MACHINE", "STATE", Kind.RAM), "MACHINE/STATE.state", "../.statepool/data/"),
    ],
)
def test_the_view_is_where_the_table_says(state: StateId, place: str, target: str) -> None:
    digest = Digest("blake3", "1" * 64)
    assert (layout.view(state), layout.view_target(state, digest)) == (
        place,
        target + digest.file_name,
    )
    assert re.search(rf"``{re.escape(place)}`` +``{re.escape(target)}DIGEST``", PAGE)


def test_names_of_files() -> None:
    digest = Digest("blake3p", "977d" + "0" * 60)
    assert layout.record("vm1", 1) == ".statepool/log/vm1/00000000000000000001.json"
    assert f"POOL/{layout.record('vm1', 1)}" in PAGE
    assert f"POOL/{layout.checkpoint('vm1', 32)}" in PAGE
    assert f"POOL/{layout.marker('4a9d183d65413568')}" in PAGE
    assert f"POOL/{layout.gathered('4a9d183d65413568')}" in PAGE
    paths = [
        layout.data(digest),
        layout.incoming("4a9d183d65413568", digest),
        layout.part("4a9d183d65413568", digest),
        layout.trash("05b1066973e496ba", digest),
    ]
    for path in (*paths, layout.list_of(layout.data(digest))):
        assert f"POOL/{path}".replace("0" * 60, "…") in PAGE.replace("977d9b0f…", "977d…")


def test_what_makes_a_digest(reader: Any, tmp_path: Path) -> None:
    # or test_pages.py would have to run it
    (block,) = (block for block in reader.blocks(PAGE) if block.language in reader.LANGUAGES)
    namespace: dict[str, Any] = {}
    exec(block.text, namespace)  # noqa: S102 - what the page shows
    for content in (b"", b"pool", bytes(PIECE), b"x" * (2 * PIECE + 1)):
        path = tmp_path / "file"
        path.write_bytes(content)
        assert namespace["digest_of"](path) == Digest.of(content)


def test_every_check_that_is_named_exists() -> None:
    from statepool.qcow2.checks import CHECKS

    paragraph = PAGE.partition("errors give: among them")[2].partition(".\n")[0]
    named = re.findall("``([a-z-]+)``", paragraph)
    assert len(named) > 15
    assert set(named) <= set(CHECKS)


# -- the rules of the fold, as they are numbered there ---------------------------------------------

A, B, C, D = (Digest("blake3", digit * 64) for digit in "abcd")
INSTALL = Manifest("vm1/disk", "install", digest=A)
CHILD = Manifest("vm1/disk", "customize", digest=B, parent=Parent("install", A))
MACHINE = Manifest("vm1", "install", kind=Kind.MACHINE, members={"vm1/disk": A})


def publish(manifest: Manifest, supersedes: Digest | None = None) -> dict[str, Any]:
    return {
        "publish": manifest.to_json(),
        **({"supersedes": str(supersedes)} if supersedes else {}),
    }


def remove(manifest: Manifest) -> dict[str, Any]:
    data = {"object": manifest.object, "state": manifest.state, "kind": str(manifest.kind)}
    return {"remove": {**data, **({"digest": str(manifest.digest)} if manifest.digest else {})}}


def folded(*records: list[dict[str, Any]]) -> Fold:
    """:returns: the fold of a log whose files are written here, by the description alone"""
    transport = MemoryTransport(MemoryStore())
    transport.make_directory(".statepool/log/vm1")
    for number, changes in enumerate(records, 1):
        data = {
            "format": 1,
            "nonce": f"{number:016x}",
            "time": NOW,
            "by": "another:1",
            "changes": changes,
            "later": "ignored",
        }
        transport.create(f".statepool/log/vm1/{number:020}.json", json.dumps(data).encode())
    return MachineLog(transport, "vm1").fold()


def test_what_the_rules_permit() -> None:
    fold = folded(
        [publish(INSTALL), publish(CHILD)],
        [publish(MACHINE)],
        [remove(MACHINE)],
        [publish(Manifest("vm1/disk", "install", digest=C), supersedes=A)],
    )
    assert [str(state) for state in fold.states] == ["vm1/disk install", "vm1/disk customize"]
    assert fold.superseded == [INSTALL]
    assert fold.digests == {A, B, C}
    gone = fold.after(5, "x", list(_changes([remove(CHILD)])))
    assert gone.digests == {C}


def _changes(changes: list[dict[str, Any]]) -> tuple[Any, ...]:
    data = {"format": 1, "nonce": "x", "time": 0, "by": "x", "changes": changes}
    return Record.from_bytes(json.dumps(data).encode(), 9, "here").changes


OTHER = Manifest("vm1/disk", "install", digest=D)
BREAKS: dict[str, list[list[dict[str, Any]]]] = {
    "of another machine": [[publish(Manifest("vm2/disk", "install", digest=A))]],
    "name taken": [[publish(INSTALL)], [publish(OTHER)]],
    "supersedes another digest": [[publish(INSTALL)], [publish(OTHER, supersedes=C)]],
    "supersedes nothing": [[publish(INSTALL, supersedes=C)]],
    "same bytes, another parent": [
        [
            publish(INSTALL),
            publish(CHILD),
            publish(Manifest("vm1/disk", "more", digest=C, parent=Parent("customize", B))),
        ],
        [publish(Manifest("vm1/disk", "customize", digest=B), supersedes=B)],
    ],
    "removes what is not there": [[remove(INSTALL)]],
    "removes another digest": [[publish(INSTALL)], [remove(OTHER)]],
    "parent is missing": [[publish(CHILD)]],
    "parent has another digest": [[publish(OTHER)], [publish(CHILD)]],
    "name twice in a chain": [
        [
            publish(INSTALL),
            publish(
                Manifest("vm1/disk", "install", digest=B, parent=Parent("install", A)), supersedes=A
            ),
        ]
    ],
    "member is missing": [[publish(MACHINE)]],
    "others stand on it": [[publish(INSTALL), publish(CHILD)], [remove(INSTALL)]],
    "member is lost": [[publish(INSTALL), publish(MACHINE)], [remove(INSTALL)]],
    "no change": [[]],
    "unknown change": [[{"rename": {}}]],
    "two changes in one": [[{**publish(INSTALL), **remove(INSTALL)}]],
    "unknown kind": [[{"publish": {**INSTALL.to_json(), "kind": "tape"}}]],
    "unknown algorithm": [[{"publish": {**INSTALL.to_json(), "digest": "md5:" + "0" * 32}}]],
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_the_rules_forbid(name: str) -> None:
    with pytest.raises(BadRecord):
        folded(*BREAKS[name])


def test_a_log_by_the_description_is_a_pool(
    tmp_path: Path, make_image: Callable[..., Path]
) -> None:
    """A pool made by hand, from the description alone, is read by us."""
    image = make_image(tmp_path / "image", writes=[(0, 65536, 1)])
    digest = Digest.of(image.read_bytes())
    ours = tmp_path / "pool/.statepool"
    for name in ("data", "log/vm1", "incoming", "trash", "locks", "uses"):
        (ours / name).mkdir(parents=True)
    (ours / "pool.json").write_text('{"format": 1}')
    image.rename(ours / "data" / digest.file_name)
    manifest = {
        "object": "vm1/disk",
        "state": "install",
        "size": (ours / "data" / digest.file_name).stat().st_size,
        "digest": str(digest),
    }
    record = {
        "format": 1,
        "nonce": "0" * 16,
        "time": 0,
        "by": "",
        "changes": [{"publish": manifest}],
    }
    (ours / "log/vm1/00000000000000000001.json").write_text(json.dumps(record))

    import statepool

    pool = statepool.StatePool(
        cache=tmp_path / "cache", sources=[Location("file", str(tmp_path / "pool"))]
    )
    got = pool.image("vm1/disk").get("install", to=tmp_path / "work.qcow2")
    assert (got.digest, got.verified) == (str(digest), statepool.Verified.ARRIVED)
