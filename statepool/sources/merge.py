"""One listing of what several pools have."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Sequence

from attrs import evolve

from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, StateId
from statepool.model.outcomes import Listed


def merged(listings: Iterable[Sequence[Listed]], cache: str | None = None) -> list[Listed]:
    """
    :param listings: of the cache, then of the sources
    :param cache: where the cache is: of a copy there is known what it was rewritten from, while
        other pools only claim to know it
    :returns: each state once, with all the pools that have it; two pools with different content
        under one name give two lines
    """
    of_one_name: dict[StateId, list[Listed]] = {}
    filled = [listing for listing in listings if listing]
    if len(filled) == 1:
        return sorted(filled[0], key=_id)
    for listing in filled:
        for listed in listing:
            of_one_name.setdefault(listed.manifest.id, []).append(listed)
    return [
        listed for state in sorted(of_one_name) for listed in _united(of_one_name[state], cache)
    ]


def _id(listed: Listed) -> StateId:
    return listed.manifest.id


def _united(all_listed: list[Listed], cache: str | None) -> list[Listed]:
    """:param all_listed: of one name"""
    if len(all_listed) == 1:
        return all_listed
    found: list[Listed] = []
    pools: list[tuple[str, ...]] = []
    places: dict[tuple[Digest | None, bool, str | None], int] = {}
    for listed in all_listed:
        # A copy that the cache rewrote is the same state as what it was rewritten from.
        names = _names(listed.manifest) if listed.pools == (cache,) else (listed.manifest.digest,)
        keys = [(digest, listed.managed, listed.problem) for digest in names]
        place = next((places[key] for key in keys if key in places), None)
        if place is None:
            place = len(found)
            found.append(listed)
            pools.append(())
        pools[place] += listed.pools
        for key in keys:
            places.setdefault(key, place)
    # Each value is made once more at most, however many pools there are.
    return [
        listed if listed.pools == places_of else evolve(listed, pools=places_of)
        for listed, places_of in zip(found, pools, strict=True)
    ]


def _names(manifest: Manifest) -> tuple[Digest | None, ...]:
    return (manifest.digest,) if manifest.origin is None else (manifest.digest, manifest.origin)


@contextlib.contextmanager
def making_many() -> Iterator[None]:
    """
    Thousands of values are made that all stay. Looking for garbage among them again and again would
    take a quarter of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            if not gc.get_freeze_count():
                # Together, these two only make everything old, so that the next look for young
                # garbage does not go through all of it.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
