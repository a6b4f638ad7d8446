"""One listing of what several pools have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import evolve

from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, StateId
from statepool.model.outcomes import Listed


def merged(listings: Iterable[Sequence[Listed]]) -> list[Listed]:
    """
    :param listings: of the cache, then of the sources
    :returns: each state once, with all the pools that have it; two pools with different content under one name give two lines
    """
    found: list[Listed] = []
    places: dict[tuple[StateId, Digest | None, bool, str | None], int] = {}
    for listed in (one for listing in listings for one in listing):
        # A copy that was rewritten for its place is the same state as what it was rewritten from.
        keys = [(listed.manifest.id, digest, listed.managed, listed.problem) for digest in _names(listed.manifest)]
        place = next((places[key] for key in keys if key in places), None)
        if place is None:
            place = len(found)
            found.append(listed)
        else:
            found[place] = evolve(found[place], pools=found[place].pools + listed.pools)
        for key in keys:
            places.setdefault(key, place)
    return sorted(found, key=lambda listed: (listed.manifest.object, listed.manifest.state, listed.manifest.kind))


def _names(manifest: Manifest) -> tuple[Digest | None, ...]:
    return (manifest.digest,) if manifest.origin is None else (manifest.digest, manifest.origin)
