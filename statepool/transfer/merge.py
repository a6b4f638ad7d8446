"""One listing of what several pools have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import evolve

from statepool.model.digest import Digest
from statepool.model.manifest import StateId
from statepool.model.outcomes import Listed


def merged(listings: Iterable[Sequence[Listed]]) -> list[Listed]:
    """
    :param listings: of the cache, then of the sources
    :returns: each state once, with all the pools that have it; two pools with different content under one name give two lines
    """
    found: dict[tuple[StateId, Digest | None, bool, str | None], Listed] = {}
    for listed in (one for listing in listings for one in listing):
        key = (listed.manifest.id, listed.manifest.origin or listed.manifest.digest, listed.managed, listed.problem)
        known = found.get(key)
        found[key] = evolve(known, pools=known.pools + listed.pools) if known is not None else listed
    return sorted(found.values(), key=lambda listed: (listed.manifest.object, listed.manifest.state, listed.manifest.kind))
