"""
Make new, empty overlays: the working images.

An overlay is a header, one cluster of refcount table, one of refcount block, and an L1 table of
zeros, in this order. ``qemu-img create`` writes the same (the tests compare the bytes with the
installed one). Where the layout of qemu-img would differ, qemu-img makes the overlay.

The zeros between these pieces are left as holes, so that an overlay takes some 12 KiB on disk
instead of about 200.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from statepool.beneath import Beneath, beside
from statepool.errors import FileInTheWay, StatePoolError, UsageError
from statepool.qcow2.files import translated
from statepool.qcow2.header import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_FEATURE_NAMES,
    MAGIC,
    Patch,
    apply_patches,
    encode_backing_name,
)
from statepool.qcow2.tool import QemuImg

CLUSTER_SIZE = 65536
"""The usual size of a cluster, in bytes; the default of qemu-img."""

_SECTOR = 512
_MIN_CLUSTER_SIZE = 8192  # below this, qemu-img leaves out the feature names
_MAX_CLUSTER_SIZE = 2 << 20
_MAX_L1_BYTES = 32 << 20
_HEADER_LENGTH = 112
_REFCOUNT_ORDER = 4
_FEATURE = struct.Struct("BB46s")
_FEATURES = b"".join(
    _FEATURE.pack(kind, bit, name)
    for kind, bit, name in (
        (0, 0, b"dirty bit"),
        (0, 1, b"corrupt bit"),
        (0, 2, b"external data file"),
        (0, 3, b"compression type"),
        (0, 4, b"extended L2 entries"),
        (1, 0, b"lazy refcounts"),
        (2, 0, b"bitmaps"),
        (2, 1, b"raw external data"),
    )
)
"""The names of the feature bits, kind 0 being incompatible, 1 compatible, 2 autoclear."""

_EXTENSIONS = (
    struct.pack(">II8s", EXTENSION_BACKING_FORMAT, 5, b"qcow2")
    + struct.pack(">II", EXTENSION_FEATURE_NAMES, len(_FEATURES))
    + _FEATURES
    + bytes(8)
)  # fmt: skip


def _layout(virtual_size: int, name: bytes, cluster_size: int) -> tuple[int, int, int] | None:
    """
    :returns: the virtual size in whole sectors, the entries of the L1 table, the clusters in use;
        None if the overlay needs another layout
    """
    if (
        cluster_size & (cluster_size - 1)
        or not _MIN_CLUSTER_SIZE <= cluster_size <= _MAX_CLUSTER_SIZE
    ):
        return None
    rounded = -(-virtual_size // _SECTOR) * _SECTOR
    entries = -(-rounded // (cluster_size * cluster_size // 8))
    clusters = 3 + -(-entries * 8 // cluster_size)
    fits = (
        virtual_size >= 0
        and entries * 8 <= _MAX_L1_BYTES
        and clusters <= cluster_size // 2
        and _HEADER_LENGTH + len(_EXTENSIONS) + len(name) <= cluster_size
    )
    return (rounded, entries, clusters) if fits else None


def cluster_size_for(virtual_size: int) -> int:
    """
    :returns: the smallest cluster size, from qemu-img's default upwards, with which QEMU opens an
        image of so large a disk; the largest size if none is enough
    """
    sizes = (
        CLUSTER_SIZE << bits for bits in range((_MAX_CLUSTER_SIZE // CLUSTER_SIZE).bit_length())
    )
    return next(
        (size for size in sizes if virtual_size <= _MAX_L1_BYTES // 8 * (size // 8) * size),
        _MAX_CLUSTER_SIZE,
    )


def is_native(virtual_size: int, backing_name: str, *, cluster_size: int = CLUSTER_SIZE) -> bool:
    """
    :returns: whether such an overlay is written without qemu-img
    :raises UsageError: no image can have this backing name
    """
    return _layout(virtual_size, encode_backing_name(backing_name), cluster_size) is not None


def _pieces(virtual_size: int, backing_name: str, cluster_size: int) -> tuple[int, Iterator[Patch]]:
    """:returns: the length of the file, and its content apart from zeros"""
    name = encode_backing_name(backing_name)
    layout = _layout(virtual_size, name, cluster_size)
    if layout is None:
        raise UsageError(
            f"an overlay of {virtual_size} bytes with clusters of {cluster_size} is not written"
            " natively",
            hint="let qemu-img make it",
        )
    rounded, entries, clusters = layout
    l1_offset = 3 * cluster_size
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQIIQ",
        MAGIC,
        3,
        _HEADER_LENGTH + len(_EXTENSIONS),
        len(name),
        cluster_size.bit_length() - 1,
        rounded,
        0,
        entries,
        l1_offset if entries else 0,
        cluster_size,
        1,
        0,
        0,
        0,
        0,
        0,
        _REFCOUNT_ORDER,
        _HEADER_LENGTH,
        0,
    )
    pieces = (
        Patch(0, header + _EXTENSIONS + name),
        Patch(cluster_size, struct.pack(">Q", 2 * cluster_size)),
        Patch(2 * cluster_size, b"\0\1" * clusters),
    )
    return l1_offset + entries * 8, iter(pieces)


def overlay_bytes(
    virtual_size: int, backing_name: str, *, cluster_size: int = CLUSTER_SIZE
) -> bytes:
    """
    :param virtual_size: size of the disk that a guest sees, in bytes; rounded up to whole sectors
        of 512
    :param backing_name: the file that backs it, a qcow2 image
    :param cluster_size: in bytes
    :returns: an empty overlay
    :raises UsageError: such an overlay is not written natively (see :func:`is_native`), or no image
        can have this backing name
    """
    length, pieces = _pieces(virtual_size, backing_name, cluster_size)
    image = bytearray(length)
    for offset, data in pieces:
        image[offset : offset + len(data)] = data
    return bytes(image)


def create_overlay(
    path: Path | Beneath,
    virtual_size: int,
    backing_name: str,
    *,
    cluster_size: int | None = None,
    tool: QemuImg | None = None,
    known_as: Path | None = None,
    mode: int = 0o666,
) -> os.stat_result:
    """
    Make a new file with an empty overlay, as ``qemu-img create`` would. Its backing file is not
    opened. Nothing is flushed.

    :param path: the path of the file, which must not exist
    :param virtual_size: size of the disk that a guest sees, in bytes; rounded up to whole sectors
        of 512
    :param backing_name: the file that backs it, a qcow2 image
    :param cluster_size: in bytes; the smallest that the disk permits if not given
    :param tool: the qemu-img to use where it cannot be written natively
    :param known_as: its name in messages, if not its path: the name that it gets when it is
        finished
    :param mode: its permissions, limited by the umask
    :returns: the status of the file
    :raises FileInTheWay: the path exists, whatever it is
    :raises UsageError: no image can have this backing name
    :raises NoSpace: the overlay does not fit
    :raises AccessDenied: permissions do not allow writing there
    :raises MissingFile: there is no such directory
    :raises ToolError: qemu-img was needed and failed
    """
    cluster_size = cluster_size_for(virtual_size) if cluster_size is None else cluster_size
    native = is_native(virtual_size, backing_name, cluster_size=cluster_size)
    try:
        file = path if isinstance(path, Beneath) else beside(path)
        made = file.open(os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise FileInTheWay(
            f"{path} exists already",
            path=str(path),
            hint="choose another path, or ask for overwriting",
        ) from error
    except OSError as error:
        raise translated(error, known_as or path, "create") from error
    try:
        with made as descriptor:
            if native:
                length, pieces = _pieces(virtual_size, backing_name, cluster_size)
                apply_patches(descriptor, pieces)
                os.ftruncate(descriptor, length)
            else:
                # Another account may be able to replace the file by a link, which qemu-img would
                # follow.
                inode = f"/proc/{os.getpid()}/fd/{descriptor}"
                (tool or QemuImg()).create_overlay(
                    inode, backing_name, virtual_size, cluster_size=cluster_size
                )
            return os.fstat(descriptor)
    except BaseException as error:
        file.remove()
        if isinstance(error, OSError) and not isinstance(error, StatePoolError):
            raise translated(error, known_as or path, "write") from error
        raise


def matches_installed(
    tool: QemuImg, virtual_size: int = 1 << 30, backing_name: str = "parent.qcow2"
) -> bool:
    """
    Compare an overlay of ours with one of the installed qemu-img, to diagnose a host.

    :returns: whether both are the same, byte by byte
    :raises ToolError: qemu-img is missing or failed
    """
    import tempfile  # slow to import, and needed only here

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "overlay.qcow2")
        tool.create_overlay(path, backing_name, virtual_size)
        return path.read_bytes() == overlay_bytes(virtual_size, backing_name)
