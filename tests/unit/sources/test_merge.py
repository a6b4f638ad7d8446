"""One listing of what several pools have."""

from __future__ import annotations

from attrs import evolve

from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.model.outcomes import Listed
from statepool.sources.merge import merged

INSTALL = Manifest("vm1/disk", "install", digest=Digest.of(b"install"))


def test_the_same_content_is_one_line() -> None:
    (one,) = merged(
        [[Listed(INSTALL, ("cache",))], [Listed(INSTALL, ("a",))], [Listed(INSTALL, ("b",))]]
    )
    assert one.pools == ("cache", "a", "b")


def test_a_rewritten_copy_is_the_same_content() -> None:
    here = evolve(INSTALL, digest=Digest.of(b"rewritten"), origin=INSTALL.digest)
    (one,) = merged([[Listed(here, ("cache",))], [Listed(INSTALL, ("a",))]], "cache")
    assert (one.manifest, one.pools) == (here, ("cache", "a"))


def test_what_a_source_calls_an_origin_is_a_claim() -> None:
    lying = evolve(INSTALL, digest=Digest.of(b"other"), origin=INSTALL.digest)
    for listings in (
        [[Listed(INSTALL, ("cache",))], [Listed(lying, ("a",))]],
        [[Listed(lying, ("a",))], [Listed(INSTALL, ("b",))]],
    ):
        assert [one.manifest for one in merged(listings, "cache")] == [
            listing[0].manifest for listing in listings
        ]


def test_other_content_is_another_line() -> None:
    other = evolve(INSTALL, digest=Digest.of(b"other"))
    assert [
        one.pools for one in merged([[Listed(INSTALL, ("cache",))], [Listed(other, ("a",))]])
    ] == [("cache",), ("a",)]


def test_unmanaged_and_broken_ones_are_lines_of_their_own() -> None:
    bare = evolve(INSTALL, digest=None)
    found = merged(
        [
            [Listed(INSTALL, ("a",))],
            [Listed(bare, ("b",), managed=False)],
            [Listed(bare, ("c",), managed=False, problem="raw")],
        ]
    )
    assert [(one.pools, one.managed, one.problem) for one in found] == [
        (("a",), True, None),
        (("b",), False, None),
        (("c",), False, "raw"),
    ]


def test_in_one_order() -> None:
    manifests = [
        Manifest(image, state, digest=Digest.of(b""))
        for image, state in [("vm2/disk", "a"), ("vm1/disk", "b"), ("vm1/disk", "a")]
    ]
    found = merged([[Listed(manifest, ("a",)) for manifest in manifests]])
    assert [(one.manifest.object, one.manifest.state) for one in found] == [
        ("vm1/disk", "a"),
        ("vm1/disk", "b"),
        ("vm2/disk", "a"),
    ]
    assert merged([]) == []
