"""
The backing relation among the states that are present in a fold. Each state is visited once, also
for a hostile log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from statepool.errors import BadRecord
from statepool.model.manifest import Key, Manifest

MOST_IN_CHAIN = 1 << 16
"""
Most states of a chain in a log: far more than any writer is permitted, and few enough for a reader
to visit.
"""


def depths_of_all(present: Mapping[Key, Manifest], where: str) -> dict[Key, int]:
    """
    :param present: the states by their keys, each with its parent
    :param where: the record or checkpoint, for messages
    :returns: the length of the chain of each state
    :raises BadRecord: a name occurs twice in a chain, or a chain is too long
    """
    depths: dict[Key, int] = {}
    above = _by_parent(present)
    names: set[str] = set()
    ways: list[tuple[str, list[Key]]] = [("", above.pop(None, []))]
    while ways:
        name, waiting = ways[-1]
        if not waiting:
            ways.pop()
            names.discard(name)
            continue
        key = waiting.pop()
        if key[1] in names:
            raise its_own_ancestor(key, where)
        depths[key] = _permitted(len(ways), key, where)
        if (children := above.pop(key, None)) is not None:
            names.add(key[1])
            ways.append((key[1], children))
    # not reachable from a root, so the chain below is a cycle
    for start in filter(None, above):
        key, seen = start, set[Key]()
        while key not in seen:
            seen.add(key)
            key = present[key].parent_key or key
        raise its_own_ancestor(key, where)
    return depths


def depths_of_new(
    published: Iterable[Manifest],
    present: Mapping[Key, Manifest],
    known: Mapping[Key, int],
    where: str,
) -> dict[Key, int]:
    """
    :param published: what one record publishes, in any order
    :param present: all states by their keys, these included
    :param known: the lengths of the chains of the other states
    :param where: the record, for messages
    :returns: the lengths of the chains of the published states
    :raises BadRecord: the states back each other in a cycle, or a chain is too long
    """
    depths: dict[Key, int] = {}
    waiting = {manifest.key for manifest in published}
    for manifest in published:
        path: list[Key] = []
        key = manifest.key
        while key is not None and key in waiting:
            waiting.discard(key)
            path.append(key)
            key = present[key].parent_key
        if key is not None and path and key in path:
            raise its_own_ancestor(key, where)
        depth = (depths[key] if key in depths else known[key]) if key is not None and path else 0
        for key in reversed(path):
            depth += 1
            depths[key] = _permitted(depth, key, where)
    return depths


def standing_on(keys: Iterable[Key], present: Mapping[Key, Manifest]) -> list[Manifest]:
    """:returns: the states that are backed by any of these, directly or not"""
    above = _by_parent(present)
    waiting, found = list(keys), []
    while waiting:
        children = above.pop(waiting.pop(), [])
        waiting += children
        found += [present[key] for key in children]
    return found


def its_own_ancestor(key: Key, where: str) -> BadRecord:
    """:returns: the error that a name occurs twice in a chain"""
    return BadRecord(
        f"{where} makes {key[0]} {key[1]} its own ancestor", object=key[0].partition("/")[0]
    )


def _permitted(depth: int, key: Key, where: str) -> int:
    if depth > MOST_IN_CHAIN:
        raise BadRecord(
            f"{where} makes a chain of more than {MOST_IN_CHAIN} states, up to {key[0]} {key[1]}",
            object=key[0].partition("/")[0],
        )
    return depth


def _by_parent(present: Mapping[Key, Manifest]) -> dict[Key | None, list[Key]]:
    above: dict[Key | None, list[Key]] = {}
    for key, manifest in present.items():
        if (below := manifest.parent_key) in above:
            above[below].append(key)
        else:
            above[below] = [key]
    return above
