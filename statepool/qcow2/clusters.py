"""
Check that the clusters to which an image's tables lead are there: in the file, in places of their
own, and not damaged at their beginning.

A header does not show that a file was truncated after its tables, or where a table leads. QEMU
finds out only when a guest reads there, and then the guest gets an error.
"""

from __future__ import annotations

import errno
import os
import sys
import zlib
from array import array
from collections.abc import Iterator

from attrs import define, field

from statepool.qcow2.checks import COMPRESSION, EXTENDED_L2, needed_l1_size, tables
from statepool.qcow2.files import refusal
from statepool.qcow2.formats import filled
from statepool.qcow2.header import Header, Read

_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_READS_AS_ZEROS = 1
_STEP = 1 << 20
_PIECE = 4096
_ZEROS = bytes(_PIECE)
_SECTOR = 512

MOST_STARTS = 32768
"""
The number of compressed clusters whose beginning is checked, at most: 2 GiB at the usual cluster
size, which takes about a second.
"""

_START = 512
"""Bytes of a compressed cluster that are checked."""

_ENOUGH = 4096
"""Bytes to which they are decompressed, at most."""

_ALLOCATED = 0xFFFFFFFF
"""
The bits of a subcluster bitmap for allocated subclusters; the other bits are for those that read as
zeros.
"""

_WINDOW_BITS = -12
"""The window of the deflate streams in an image: raw, 4 KiB (``qcow2_zlib_compress`` in QEMU)."""

_ZSTD = b"\x28\xb5\x2f\xfd"
"""The first bytes of a zstd frame (RFC 8878)."""


def check_clusters(
    read: Read, header: Header, what: str, *, descriptor: int | None = None, starts: bool = True
) -> None:
    """
    Check the clusters of an image. The check reads the part of the L1 table that the virtual disk
    needs, and the L2 tables, which are about 1/8192 of the data at the usual cluster size. Of the
    data it reads only the beginning of compressed clusters. Time and memory are in proportion to
    the data in the file, whatever its tables say: each table is read once, holes of a file on this
    host are not read, and there are at most four million tables.

    The last cluster of a file need not be whole, so only the beginning of a cluster has to be in
    the file. Internal snapshots are not checked.

    :param read: what reads the image
    :param header: its header, checked before
    :param what: its name in messages
    :param descriptor: of the file, if it is on this host
    :param starts: whether to check the beginning of compressed clusters
    :raises UnsafeImage: check ``clusters``: a cluster lies behind the end of the file; check
        ``l2-tables``: a table is not a cluster, or is named twice; check ``cluster-overlap``: a
        cluster lies in the place of a table; check ``cluster-alignment``: data begins inside a
        cluster; check ``l2-entries``: an entry is impossible; check ``compressed``: compressed data
        is not valid
    """
    _Look(read, header, what, descriptor, MOST_STARTS if starts else 0).run()


@define
class _Look:
    read: Read
    header: Header
    what: str
    descriptor: int | None
    starts: int
    metadata: set[int] = field(factory=set)
    """The numbers of the clusters that hold tables."""

    def run(self) -> None:
        header = self.header
        self.metadata.add(0)
        for _, offset, size in tables(header):
            self.metadata.update(
                range(offset >> header.cluster_bits, (offset + size - 1 >> header.cluster_bits) + 1)
            )
        blocks = self._table(
            header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits
        )
        self.metadata.update((entry & _OFFSET_MASK) >> header.cluster_bits for entry in blocks)
        found = array("Q")
        for entry in self._table(header.l1_offset, min(header.l1_size, needed_l1_size(header)) * 8):
            table = entry & _OFFSET_MASK
            if table:
                self._note_table(table)
                found.append(table)
        # Only after all tables are known, so that data in the place of any of them is found.
        for table in found:
            if not self._is_hole(table, header.cluster_size):
                self._check_table(self.read(table, header.cluster_size))

    def _table(self, offset: int, size: int) -> Iterator[int]:
        """:returns: the entries of a table, without those that are zero"""
        end = offset + size
        while offset < end:
            length = min(_STEP, end - offset)
            if not self._is_hole(offset, length):
                yield from filter(None, _entries(self.read(offset, length)))
            offset += length

    def _note_table(self, table: int) -> None:
        header, number = self.header, table >> self.header.cluster_bits
        if table & (header.cluster_size - 1):
            raise self._bad("l2-tables", f"it has an L2 table at byte {table}, inside a cluster")
        if table + header.cluster_size > header.file_size:
            raise self._cut(table)
        if number in self.metadata:
            raise self._bad(
                "l2-tables",
                f"it has an L2 table at byte {table}, where another table is: that place is named"
                " twice",
            )
        self.metadata.add(number)

    def _is_hole(self, offset: int, length: int) -> bool:
        """
        :returns: whether a part of the file is certainly a hole, so that a read there gives only
            zeros
        """
        if self.descriptor is None:
            return False
        try:
            return os.lseek(self.descriptor, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            # ENXIO: only a hole from there to the end. Other errors: the file system does not tell.
            return error.errno == errno.ENXIO

    def _check_table(self, data: bytes) -> None:
        # Piece by piece, since most of a table can be zeros: comparing them is a hundred times
        # faster than unpacking them.
        for offset in range(0, len(data), _PIECE):
            piece = data[offset : offset + _PIECE]
            if piece != _ZEROS[: len(piece)]:
                self._check_piece(piece)

    def _check_piece(self, data: bytes) -> None:
        entries, header, metadata = _entries(data), self.header, self.metadata
        extended = bool(header.incompatible & EXTENDED_L2)
        if extended:
            self._check_bitmaps(entries[::2], entries[1::2])
            entries = entries[::2]
        size, bits, inside = header.file_size, header.cluster_bits, header.cluster_size - 1
        for entry in entries:
            if not entry:
                continue
            if entry & _COMPRESSED:
                self._check_compressed(entry)
                continue
            place = entry & _OFFSET_MASK
            if place & inside:
                raise self._bad(
                    "cluster-alignment", f"it has data at byte {place}, inside a cluster"
                )
            if entry & _READS_AS_ZEROS and not extended:
                if header.version < 3:
                    raise self._bad(
                        "l2-entries",
                        "it has a cluster that reads as zeros, which there is not in its version of"
                        " the format",
                    )
                continue
            if not place:
                continue
            if place >= size:
                raise self._cut(place)
            if place >> bits in metadata:
                raise self._overlapping(place)

    def _check_bitmaps(self, entries: array[int], bitmaps: array[int]) -> None:
        """
        Check entries with subclusters: each entry is followed by the bitmap of its subclusters,
        those that are allocated and those that read as zeros.
        """
        for entry, bitmap in zip(entries, bitmaps, strict=False):
            allocated = bitmap & _ALLOCATED
            if bitmap >> 32 & allocated or (
                allocated and not entry & _OFFSET_MASK and not entry & _COMPRESSED
            ):
                raise self._bad(
                    "l2-entries", f"the bitmap {bitmap:#x} of a cluster's parts contradicts itself"
                )

    def _check_compressed(self, entry: int) -> None:
        header = self.header
        shift = 62 - (header.cluster_bits - 8)
        place = entry & ((1 << shift) - 1)
        sectors = (entry & (_COMPRESSED - 1)) >> shift
        end = (place // _SECTOR + sectors + 1) * _SECTOR
        if place >= header.file_size or end > -(-header.file_size // _SECTOR) * _SECTOR:
            raise self._cut(place)
        if (
            place >> header.cluster_bits in self.metadata
            or end - 1 >> header.cluster_bits in self.metadata
        ):
            raise self._overlapping(place)
        if self.starts:
            self.starts -= 1
            if not _can_begin(
                self.read(place, min(_START, end - place)),
                zstd=bool(header.incompatible & COMPRESSION),
            ):
                raise self._bad("compressed", f"what it has at byte {place} is not compressed data")

    def _overlapping(self, place: int) -> Exception:
        return self._bad("cluster-overlap", f"it has data at byte {place}, where a table is")

    def _bad(self, check: str, problem: str) -> Exception:
        return refusal(
            check,
            self.what,
            problem,
            hint=filled(
                "see what is left of it: cp {file} {new} && qemu-img check -f qcow2 -r all {new}",
                self.what,
            ),
        )

    def _cut(self, place: int) -> Exception:
        problem = f"it has data at byte {place}, but the file ends after {self.header.file_size}"
        return refusal(
            "clusters", self.what, problem, hint="the file has been cut short; use an intact copy"
        )


def _can_begin(data: bytes, *, zstd: bool) -> bool:
    """:returns: whether compressed data can begin like this"""
    if zstd:
        return data.startswith(_ZSTD)
    try:
        zlib.decompressobj(_WINDOW_BITS).decompress(data, _ENOUGH)
    except zlib.error:
        return False
    return True


def _entries(data: bytes) -> array[int]:
    entries = array("Q")
    entries.frombytes(data[: len(data) & ~7])
    if sys.byteorder == "little":
        entries.byteswap()
    return entries
