"""
The header of a qcow2 image: read with one or two small reads, from any function that reads bytes.

This module parses, and does not judge: it refuses only what it cannot parse.
:mod:`statepool.qcow2.checks` judges.

The layout and the numbers are those of QEMU's ``docs/interop/qcow2.txt``; what that page leaves
open (the longest backing name) is taken from QEMU's ``block/qcow2.c``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from attrs import frozen

from statepool.errors import UnsafeImage, UsageError
from statepool.qcow2.files import open_regular, refusal, translated
from statepool.qcow2.formats import cure_of, recognise

Read = Callable[[int, int], bytes]
"""
A function that reads (offset, size) of an image: at most ``size`` bytes, fewer only at the end of
the file.
"""

MAGIC = b"QFI\xfb"

HEADER_AREA = 65536
"""
The length of the part of a file that is searched for its header, its extensions and its backing
name, in bytes. The first cluster, where they must be, can be larger; QEMU puts them at its
beginning.
"""

MAX_BACKING_NAME = 1023
"""The longest backing name that QEMU accepts, in bytes."""

MAX_EXTENSIONS = 64
"""The largest number of header extensions that are read. QEMU knows five kinds."""

EXTENSION_END = 0x00000000
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_LUKS = 0x0537BE77
EXTENSION_DATA_FILE = 0x44415441

REASONS = {
    "empty": (
        "A file without a byte in it is no image; without an explicit format, qemu-img takes it for"
        " a raw one."
    ),
    "magic": (
        "A file without qcow2's first four bytes is an image of another format, a raw one, or no"
        " image at all."
    ),
    "cut-short": "A file that ends within its own header has lost what came behind it as well.",
    "version": "Only versions 2 and 3 of the format are known.",
    "cluster-bits": (
        "Clusters have between 512 bytes and 2 MiB; with another size, every offset means something"
        " else."
    ),
    "header-length": "A header is at least as long as its fields and at most as long as a cluster.",
    "extensions": "Header extensions that leave their place can hide the one that matters.",
    "backing-name-length": "QEMU takes backing names of at most 1023 bytes.",
    "backing-name-place": (
        "The backing name is in the first cluster, behind the header; elsewhere it would be guest"
        " data that is read as a name."
    ),
}
"""The checks of this module, each with its reason."""

_FIRST_READ = 4096
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_V3_LENGTH = _V2.size + _V3.size
_EXTENSION = struct.Struct(">II")
_BITMAPS = struct.Struct(">IIQQ")
_BACKING_SIZE_FIELD = 16
_L1_ENTRY = 8
_L1_STEP = 1 << 20


class Extension(NamedTuple):
    """A header extension: its type, and the place of its data in the file."""

    type: int
    offset: int
    length: int


class Patch(NamedTuple):
    """Bytes to write at an offset of a file."""

    offset: int
    data: bytes


@frozen
class Bitmaps:
    """
    The place of the directory of the persistent dirty bitmaps.

    :param count: the number of bitmaps
    :param directory_size: in bytes
    :param directory_offset: in the file, in bytes
    """

    count: int
    directory_size: int
    directory_offset: int


@frozen
class Header:
    """
    The fields of a qcow2 image's header, not judged. Offsets and lengths are in bytes of the file.

    :param version: 2 or 3
    :param virtual_size: size of the disk that a guest sees, in bytes
    :param cluster_bits: the cluster size as a power of two
    :param backing_name: the backing name, or None
    :param backing_format: the stated format of the backing file; the last one if there are several;
        None if it is not stated
    :param backing_formats: how many times a backing format is stated
    :param backing_offset: the offset of the backing name
    :param backing_length: its length
    :param header_length: the length of the fixed fields
    :param incompatible: feature bits that a reader must know
    :param compatible: feature bits that it need not know
    :param autoclear: feature bits that it clears if it does not know them
    :param crypt_method: 0: none, 1: AES, 2: LUKS
    :param compression: 0: zlib, 1: zstd
    :param l1_size: entries of the L1 table
    :param l1_offset: the offset of the L1 table
    :param refcount_table_offset: the offset of the refcount table
    :param refcount_table_clusters: its length, in clusters
    :param refcount_order: bits of a refcount as a power of two
    :param snapshots: the number of internal snapshots
    :param snapshots_offset: the offset of their table
    :param bitmap_directory: the directory of the persistent dirty bitmaps, or None
    :param extensions: all header extensions, in their order, without the one that ends them
    :param file_size: the length of the file, as the caller of the reader gave it
    """

    version: int
    virtual_size: int
    cluster_bits: int
    backing_name: bytes | None
    backing_format: bytes | None
    backing_formats: int
    backing_offset: int
    backing_length: int
    header_length: int
    incompatible: int
    compatible: int
    autoclear: int
    crypt_method: int
    compression: int
    l1_size: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int
    snapshots: int
    snapshots_offset: int
    bitmap_directory: Bitmaps | None
    extensions: tuple[Extension, ...]
    file_size: int

    @property
    def cluster_size(self) -> int:
        """The cluster size in bytes."""
        return 1 << self.cluster_bits

    @property
    def bitmaps(self) -> bool:
        """Whether there are persistent dirty bitmaps."""
        return self.bitmap_directory is not None and self.bitmap_directory.count > 0


# -- readers ---------------------------------------------------------------------------------------


def reader(descriptor: int) -> Read:
    """:returns: a function that reads an open local file"""

    def read(offset: int, size: int) -> bytes:
        return os.pread(descriptor, size, offset)

    return read


def read_header_file(path: Path | str, what: str | None = None, *, wait: bool = True) -> Header:
    """
    :param path: a local file
    :param what: its name in messages; by default its path
    :param wait: whether to wait for a process that holds a lease on the file; else it raises
        :class:`BlockingIOError`
    :returns: its header
    :raises UnsafeImage: it is not a regular file, or its header cannot be parsed
    :raises MissingFile: there is no such file
    :raises AccessDenied: permissions do not allow reading it
    """
    with open_regular(path, wait=wait) as descriptor:
        try:
            return read_header_fd(descriptor, what or str(path))
        except UnsafeImage as error:
            error.path = str(path)
            raise


def read_header_fd(descriptor: int, what: str) -> Header:
    """
    :param descriptor: a regular file open for reading
    :param what: its name in messages
    :returns: its header
    :raises UnsafeImage: the header cannot be parsed
    """
    try:
        return read_header(reader(descriptor), os.fstat(descriptor).st_size, what)
    except OSError as error:
        raise translated(error, what, "read") from error


def read_header(read: Read, file_size: int, what: str) -> Header:
    """
    Parse a header with at most two reads, both within the first :data:`HEADER_AREA` bytes. If the
    file is not a qcow2 image, a few bytes more are read, to recognise its format.

    :param read: what reads the image
    :param file_size: its length, in bytes
    :param what: its name in messages
    :raises UnsafeImage: it cannot be parsed; the check is one of :data:`REASONS`
    """
    data = read(0, _FIRST_READ)
    _check_magic(data, read, file_size, what)
    (
        _, version, backing_offset, backing_length, cluster_bits, virtual_size, crypt_method,
        l1_size, l1_offset, refcount_offset, refcount_clusters, snapshots, snapshots_offset,
    ) = _V2.unpack_from(data)  # fmt: skip
    if version not in (2, 3):
        cure = (
            cure_of(recognise(data, read, file_size), what)
            if version == 1
            else "the program that made it may write an older version"
        )
        raise refusal("version", what, f"it says that it is of version {version}", hint=cure)
    if not 9 <= cluster_bits <= 21:
        raise refusal("cluster-bits", what, f"it says that a cluster has 2^{cluster_bits} bytes")
    incompatible, compatible, autoclear, refcount_order, header_length = (
        _version_3(data, what) if version == 3 else (0, 0, 0, 4, _V2.size)
    )
    area = min(1 << cluster_bits, HEADER_AREA)
    if header_length > area or header_length % 8:
        raise refusal(
            "header-length", what, f"it says that its header is {header_length} bytes long"
        )
    backed = backing_offset > 0 and backing_length > 0
    if backed:
        _check_backing_place(backing_offset, backing_length, header_length, area, what)
    end = backing_offset if backed else area
    extensions = _extensions(data, header_length, end)
    if extensions is None or (backed and len(data) < backing_offset + backing_length):
        data += read(len(data), area - len(data)) if _FIRST_READ <= len(data) < area else b""
        extensions = _extensions(data, header_length, end)
    if extensions is None or (backed and len(data) < backing_offset + backing_length):
        raise refusal("cut-short", what, f"it ends within its header, after {len(data)} bytes")
    _check_extensions(extensions, end, what)
    formats = [
        data[offset : offset + length]
        for kind, offset, length in extensions
        if kind == EXTENSION_BACKING_FORMAT
    ]
    return Header(
        version=version,
        virtual_size=virtual_size,
        cluster_bits=cluster_bits,
        backing_name=data[backing_offset : backing_offset + backing_length] if backed else None,
        backing_format=formats[-1] if formats else None,
        backing_formats=len(formats),
        backing_offset=backing_offset,
        backing_length=backing_length,
        header_length=header_length,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        crypt_method=crypt_method,
        compression=data[_V3_LENGTH] if version == 3 and header_length > _V3_LENGTH else 0,
        l1_size=l1_size,
        l1_offset=l1_offset,
        refcount_table_offset=refcount_offset,
        refcount_table_clusters=refcount_clusters,
        refcount_order=refcount_order,
        snapshots=snapshots,
        snapshots_offset=snapshots_offset,
        bitmap_directory=_bitmaps(data, extensions, what),
        extensions=tuple(extensions),
        file_size=file_size,
    )


def _check_magic(data: bytes, read: Read, file_size: int, what: str) -> None:
    if not data:
        raise refusal("empty", what, "it is empty")
    if not data.startswith(MAGIC):
        found = recognise(data, read, file_size)
        problem = (
            f"it is {found.name}"
            if found is not None
            else "it does not begin as a qcow2 image does"
        )
        raise refusal("magic", what, problem, hint=cure_of(found, what))
    if len(data) < _V2.size:
        raise refusal("cut-short", what, f"it ends within its header, after {len(data)} bytes")


def _version_3(data: bytes, what: str) -> tuple[int, int, int, int, int]:
    if len(data) < _V3_LENGTH:
        raise refusal("cut-short", what, f"it ends within its header, after {len(data)} bytes")
    incompatible, compatible, autoclear, refcount_order, header_length = _V3.unpack_from(
        data, _V2.size
    )
    if header_length < _V3_LENGTH:
        raise refusal(
            "header-length", what, f"it says that its header is {header_length} bytes long"
        )
    return incompatible, compatible, autoclear, refcount_order, header_length


def _check_backing_place(
    offset: int, length: int, header_length: int, area: int, what: str
) -> None:
    if length > MAX_BACKING_NAME:
        raise refusal("backing-name-length", what, f"its backing name has {length} bytes")
    if offset < header_length or offset + length > area:
        raise refusal(
            "backing-name-place", what, f"its backing name is said to be at byte {offset}"
        )


def _extensions(data: bytes, offset: int, end: int) -> list[Extension] | None:
    """
    :returns: the extensions from ``offset`` on, or None if ``data`` ends before they do; an
        extension that passes ``end`` is the last one
    """
    found: list[Extension] = []
    while offset < end and len(found) <= MAX_EXTENSIONS:
        if offset + _EXTENSION.size > len(data):
            return None
        kind, length = _EXTENSION.unpack_from(data, offset)
        if kind == EXTENSION_END:
            break
        offset += _EXTENSION.size
        found.append(Extension(kind, offset, length))
        if offset + length > end:
            break
        if offset + length > len(data):
            return None
        offset += (length + 7) & ~7
    return found


def _check_extensions(extensions: list[Extension], end: int, what: str) -> None:
    if len(extensions) > MAX_EXTENSIONS:
        raise refusal("extensions", what, f"it has more than {MAX_EXTENSIONS} header extensions")
    if extensions and extensions[-1].offset + extensions[-1].length > end:
        raise refusal(
            "extensions", what, f"the header extension {extensions[-1].type:#010x} leaves its place"
        )


def _bitmaps(data: bytes, extensions: list[Extension], what: str) -> Bitmaps | None:
    for kind, offset, length in extensions:
        if kind == EXTENSION_BITMAPS:
            if length != _BITMAPS.size:
                raise refusal(
                    "extensions",
                    what,
                    f"its bitmaps extension has {length} bytes instead of {_BITMAPS.size}",
                )
            count, _, size, directory = _BITMAPS.unpack_from(data, offset)
            return Bitmaps(count, size, directory)
    return None


# -- what else can be told, or changed, close to the header ----------------------------------------


def is_empty_overlay(read: Read, header: Header) -> bool:
    """
    :param read: what reads the image
    :param header: its header, checked before: the whole L1 table is read
    :returns: whether nothing was written to it since its creation: its L1 table is empty, and it
        has no internal snapshots
    """
    if header.snapshots:
        return False
    offset, end = header.l1_offset, header.l1_offset + header.l1_size * _L1_ENTRY
    while offset < end:
        data = read(offset, min(_L1_STEP, end - offset))
        if not data or data.strip(b"\0"):
            return False
        offset += len(data)
    return True


def backing_patch(read: Read, header: Header, new_name: str) -> tuple[Patch, ...] | None:
    """
    Return the bytes to write to give an image another backing name. Nothing else changes: the
    format extension stays.

    The same image and name give the same patches. The first cluster has nothing behind the backing
    name, by the format's rules, so a longer name can grow there; qemu-img has to do it only if
    there is something nevertheless, or the name does not fit.

    :param read: what reads the image
    :param header: its header, checked before
    :param new_name: the name to give
    :returns: the patches, empty if it has that name; None if patches cannot do it, or if there is
        no backing name to change
    :raises UsageError: no image can have this backing name
    """
    name = encode_backing_name(new_name)
    if header.backing_name is None:
        return None
    if header.backing_name == name:
        return ()
    growth = len(name) - header.backing_length
    behind = header.backing_offset + header.backing_length
    if growth > 0 and (
        behind + growth > min(header.cluster_size, HEADER_AREA)
        or read(behind, growth) != bytes(growth)
    ):
        return None
    return (
        Patch(_BACKING_SIZE_FIELD, struct.pack(">I", len(name))),
        Patch(header.backing_offset, name.ljust(header.backing_length, b"\0")),
    )


def backing_again(header: Header, name: str, other: str) -> tuple[Patch, ...]:
    """
    Return the bytes to write to finish or undo an interrupted change of the backing name. After the
    interruption, the place of the name may hold a mixture of both names, and so may its length.

    :param header: the header of the image
    :param name: the name that it will have
    :param other: the other name, which it had or was to get by the patches of :func:`backing_patch`
    :returns: the patches; the result is the same image as after an uninterrupted change to this
        name
    """
    encoded = encode_backing_name(name)
    return (
        Patch(_BACKING_SIZE_FIELD, struct.pack(">I", len(encoded))),
        Patch(header.backing_offset, encoded.ljust(len(encode_backing_name(other)), b"\0")),
    )


def apply_patches(descriptor: int, patches: Iterable[Patch]) -> None:
    """
    Write patches to a file.

    :param descriptor: a file open for writing, which the caller flushes
    :param patches: the patches
    """
    for offset, data in patches:
        while data:
            written = os.pwrite(descriptor, data, offset)
            offset, data = offset + written, data[written:]


def encode_backing_name(name: str) -> bytes:
    """
    :param name: the path of a file
    :returns: its form in an image
    :raises UsageError: an image cannot have it as its backing name, or QEMU would not take it for a
        path
    """
    encoded = os.fsencode(name)
    if not encoded or len(encoded) > MAX_BACKING_NAME:
        raise UsageError(
            f"a backing name has between 1 and {MAX_BACKING_NAME} bytes, not {len(encoded)}",
            hint="use a shorter path",
        )
    if any(byte < 32 or byte == 127 for byte in encoded):
        raise UsageError(f"a backing name cannot have control characters: {name!r}")
    if has_protocol(encoded):
        raise UsageError(
            f"QEMU would read a protocol from the backing name {name!r}",
            hint="write it as an absolute path",
        )
    return encoded


def has_protocol(name: bytes) -> bool:
    """
    :returns: whether QEMU takes the part before the first colon for a protocol: there is a colon,
        and no slash before it
    """
    head, colon, _ = name.partition(b":")
    return bool(colon) and b"/" not in head
