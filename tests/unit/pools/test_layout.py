from __future__ import annotations

import pytest

from statepool.model.digest import Digest
from statepool.model.manifest import Kind, StateId
from statepool.pools import layout

DIGEST = Digest.of(b"x")


def test_names_of_records_and_checkpoints_are_read_back() -> None:
    assert layout.log_entry(layout.record("vm1", 18).rpartition("/")[2]) == (False, 18)
    assert layout.log_entry(layout.checkpoint("vm1", 16).rpartition("/")[2]) == (True, 16)


def test_records_sort_by_number() -> None:
    assert sorted([layout.record("vm1", 10), layout.record("vm1", 9)]) == [
        layout.record("vm1", 9),
        layout.record("vm1", 10),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "18.json",
        "00000000000000000018",
        "00000000000000000018.json.tmp",
        "0000000000000000001x.json",
        "-0000000000000000018.json",
        "checkpoint-.json",
        "checkpoint-checkpoint-00000000000000000018.json",
        "\N{ARABIC-INDIC DIGIT ZERO}" * 20 + ".json",
    ],
)
def test_other_names_in_a_log_are_not_ours(name: str) -> None:
    assert layout.log_entry(name) is None


def test_names_in_the_trash_are_read_back() -> None:
    assert layout.trashed(layout.trash("nonce", DIGEST).rpartition("/")[2]) == DIGEST
    assert layout.trashed("nonce-else") is None
    assert layout.trashed("else") is None


@pytest.mark.parametrize(
    ("state", "path"),
    [
        (StateId("vm1/disk", "install"), "vm1/disk/install.qcow2"),
        (StateId("vm1/disk", "root"), "vm1/disk.qcow2"),
        (StateId("vm1", "on", Kind.RAM), "vm1/on.state"),
    ],
)
def test_a_link_in_the_view_leads_to_the_bytes(state: StateId, path: str) -> None:
    assert layout.view(state) == path
    target = layout.view_target(state, DIGEST)
    assert layout.is_view_target(target)
    depth = path.count("/")
    assert target == "../" * depth + layout.data(DIGEST)


@pytest.mark.parametrize(
    "target",
    [
        "install.qcow2",
        "/pool/.statepool/data/x",
        "../other/.statepool/data/x",
        ".statepool/data/x",
        "../.statepool/log/x",
    ],
)
def test_other_links_are_not_ours(target: str) -> None:
    assert not layout.is_view_target(target)
