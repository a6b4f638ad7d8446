"""
The data extents of a file, determined from its bytes alone: the same on every file system.

The file system tells where holes are. Of the rest, only the beginning of each block is read, unless
that is zeros.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from statepool.model.manifest import MAX_EXTENTS
from statepool.transports.copying import merged
from statepool.transports.failures import Subject, translating
from statepool.transports.reading import Extent, data_in

BLOCK = 64 << 10
"""The unit of holes, in bytes: the cluster size of most images. A smaller hole counts as data."""

_PROBE = 512


def data_of(descriptor: int, size: int, subject: Subject) -> tuple[Extent, ...]:
    """
    :param descriptor: of a file
    :param size: its length, in bytes
    :returns: the extents outside of which it has only zeros; empty if it has no hole
    :raises TransportError: the file cannot be read
    """
    found = merged(_joined(_blocks(descriptor, size, subject)), limit=MAX_EXTENTS)
    return found if found != ((0, size),) else ()


def _blocks(descriptor: int, size: int, subject: Subject) -> Iterator[Extent]:
    done = 0
    for offset, length in data_in(descriptor, size, subject):
        for start in range(max(done, offset // BLOCK * BLOCK), offset + length, BLOCK):
            done = start + BLOCK
            count = min(BLOCK, size - start)
            with translating("read", subject):
                beginning = _is_zeros(descriptor, start, min(_PROBE, count))
                is_hole = beginning and _is_zeros(descriptor, start, count)
            if not is_hole:
                yield start, count


def _is_zeros(descriptor: int, start: int, count: int) -> bool:
    return os.pread(descriptor, count, start) == bytes(count)


def _joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    begun: Extent | None = None
    for start, length in extents:
        if begun is not None and sum(begun) == start:
            begun = begun[0], begun[1] + length
            continue
        if begun is not None:
            yield begun
        begun = start, length
    if begun is not None:
        yield begun
