"""Whether a file is as long as its own tables say: what has been cut off behind the tables, no header shows."""

from __future__ import annotations

import sys
from array import array

from statepool.qcow2.checks import EXTENDED_L2, needed_l1_size
from statepool.qcow2.files import refusal
from statepool.qcow2.header import Header, Read

_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_READS_AS_ZEROS = 1
_STEP = 1 << 20
_PIECE = 4096
_ZEROS = bytes(_PIECE)


def check_clusters(read: Read, header: Header, what: str) -> None:
    """
    Read what the virtual disk needs of the L1 table, and the L2 tables, which are about 1/8192 of the data at the usual cluster size, and no data.

    The last cluster of a file need not be whole, so a cluster is asked for only where it begins; internal snapshots are not looked at.

    :param read: what reads the image
    :param header: its header, checked before
    :param what: what to call it in messages
    :raises UnsafeImage: check ``clusters``: something lies behind the end of the file; check ``l2-tables``: a table is no cluster, or is named twice
    """
    size = header.file_size
    seen: set[int] = set()
    offset, end = header.l1_offset, header.l1_offset + min(header.l1_size, needed_l1_size(header)) * 8
    while offset < end:
        length = min(_STEP, end - offset)
        for entry in _entries(read(offset, length)):
            table = entry & _OFFSET_MASK
            if table:
                if table & (header.cluster_size - 1) or table in seen:
                    raise _misplaced(table, what, twice=table in seen)
                seen.add(table)
                if table + header.cluster_size > size:
                    raise _cut(table, size, what)
                _check_table(read(table, header.cluster_size), header, what)
        offset += length


def _check_table(data: bytes, header: Header, what: str) -> None:
    # Piece by piece, since most of a table can be zeros, which are compared a hundred times faster than they are taken apart.
    for offset in range(0, len(data), _PIECE):
        piece = data[offset : offset + _PIECE]
        if piece != _ZEROS[: len(piece)]:
            _check_piece(piece, header, what)


def _check_piece(data: bytes, header: Header, what: str) -> None:
    entries = _entries(data)
    if header.incompatible & EXTENDED_L2:
        entries = entries[::2]  # each entry is followed by the bitmap of its subclusters
    compressed_mask = (1 << (62 - (header.cluster_bits - 8))) - 1
    size = header.file_size
    for entry in entries:
        if not entry:
            continue
        if entry & _COMPRESSED:
            place = entry & compressed_mask
        elif entry & _READS_AS_ZEROS:
            continue
        else:
            place = entry & _OFFSET_MASK
        if place >= size:
            raise _cut(place, size, what)


def _entries(data: bytes) -> array[int]:
    entries = array("Q")
    entries.frombytes(data[: len(data) & ~7])
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def _misplaced(table: int, what: str, *, twice: bool) -> Exception:
    problem = f"it names its L2 table at byte {table} twice" if twice else f"it has an L2 table at byte {table}, inside a cluster"
    return refusal("l2-tables", what, problem, hint="see what is left of it: qemu-img check -f qcow2 -r all COPY")


def _cut(place: int, size: int, what: str) -> Exception:
    problem = f"it has data at byte {place}, but the file ends after {size}"
    return refusal("clusters", what, problem, hint="the file has been cut short; use an intact copy")
