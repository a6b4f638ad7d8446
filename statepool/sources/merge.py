"""Merging of the listings of several pools."""

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
    :param cache: the location of the cache. The origin of a rewritten copy in the cache is known;
        the origins in other pools are not proven.
    :returns: each state once, with all pools that have it; two pools with different content under
        one name give two entries
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
    """:param all_listed: the entries of one name"""
    if len(all_listed) == 1:
        return all_listed
    found: list[Listed] = []
    pools: list[tuple[str, ...]] = []
    places: dict[tuple[Digest | None, bool, str | None], int] = {}
    for listed in all_listed:
        # A copy that the cache rewrote is the same state as its origin.
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
    # Each value is copied at most once, however many pools there are.
    return [
        listed if listed.pools == places_of else evolve(listed, pools=places_of)
        for listed, places_of in zip(found, pools, strict=True)
    ]


def _names(manifest: Manifest) -> tuple[Digest | None, ...]:
    return (manifest.digest,) if manifest.origin is None else (manifest.digest, manifest.origin)


@contextlib.contextmanager
def making_many() -> Iterator[None]:
    """
    Switch off Python's garbage collector for the block, in which thousands of values are made that
    all stay. The collector would take a quarter of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            if not gc.get_freeze_count():
                # These two calls only move all objects to the oldest generation, so that the next
                # collection of the young generation does not visit all of them.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
