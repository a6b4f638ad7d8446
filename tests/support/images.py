"""
Image files for the tests of whoever writes a transport, a backend or a tool: good ones, and all the
kinds that must be refused.

They are made byte by byte: no tool is run, and no tool would make most of them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from attrs import evolve, frozen

from statepool.qcow2.header import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_DATA_FILE,
    EXTENSION_LUKS,
    MAGIC,
)

PARENT = b"parent.qcow2"
"""What backs the images that are backed; :func:`hostile_images` makes it."""

LONG_CHAIN = 300
"""States in the chain that is too deep."""

_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSION_3 = struct.Struct(">QQQII")


@frozen
class Forged:
    """
    A small qcow2 image whose every field can be a lie. As it is by default, it is a good one:
    empty, 1 MiB, clusters of 4 KiB.

    The fields are those of the header, in the order of the format; None stands for what is true.

    :param backing: the backing name, or None
    :param formats: what the backing format extensions say
    :param extensions: further header extensions, (type, data)
    :param ended: whether an extension of the type "end" follows
    :param compression: the byte behind the fixed fields
    :param length: where to cut the file, or how far to stretch it, in bytes
    """

    magic: bytes = MAGIC
    version: int = 3
    backing: bytes | None = None
    backing_offset: int | None = None
    backing_length: int | None = None
    cluster_bits: int = 12
    virtual_size: int = 1 << 20
    crypt_method: int = 0
    l1_size: int = 1
    l1_offset: int = 3 << 12
    refcount_offset: int = 1 << 12
    refcount_clusters: int = 1
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = 112
    compression: int = 0
    formats: tuple[bytes, ...] = (b"qcow2",)
    extensions: tuple[tuple[int, bytes], ...] = ()
    ended: bool = True
    length: int | None = None

    def build(self) -> bytes:
        """:returns: the file"""
        formats = self.formats if self.backing is not None else ()
        given = [(EXTENSION_BACKING_FORMAT, name) for name in formats] + list(self.extensions)
        extensions = b"".join(
            struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
            for kind, data in given
        )
        extensions += bytes(8) if self.ended else b""
        true_length = 112 if self.version == 3 else 72
        backing_offset = true_length + len(extensions) if self.backing is not None else 0
        fixed = _FIXED.pack(
            self.magic,
            self.version,
            backing_offset if self.backing_offset is None else self.backing_offset,
            len(self.backing or b"") if self.backing_length is None else self.backing_length,
            self.cluster_bits,
            self.virtual_size,
            self.crypt_method,
            self.l1_size,
            self.l1_offset,
            self.refcount_offset,
            self.refcount_clusters,
            self.snapshots,
            self.snapshots_offset,
        )
        if self.version == 3:
            fixed += _VERSION_3.pack(
                self.incompatible,
                self.compatible,
                self.autoclear,
                self.refcount_order,
                self.header_length,
            )
            fixed += bytes([self.compression]) + bytes(7)
        image = bytearray((3 << 12) + 8)
        first = fixed + extensions + (self.backing or b"")
        image[: len(first)] = first
        image[1 << 12 : (1 << 12) + 8] = struct.pack(">Q", 2 << 12)
        image[2 << 12 : (2 << 12) + 8] = b"\0\1" * 4
        length = len(image) if self.length is None else self.length
        return bytes(image[:length]).ljust(length, b"\0")


GOOD = Forged()
"""An image that passes every check."""

CHILD = Forged(backing=PARENT)
"""An image that passes every check, backed by :data:`PARENT`."""


def _child(**lies: Any) -> Callable[[], bytes]:
    return evolve(CHILD, **lies).build


def _root(**lies: Any) -> Callable[[], bytes]:
    return evolve(GOOD, **lies).build


def _bytes(data: bytes) -> Callable[[], bytes]:
    return lambda: data


HOSTILE: Mapping[str, tuple[Callable[[], bytes], str]] = MappingProxyType(
    {
        # no image at all
        "empty": (_bytes(b""), "empty"),
        "text": (_bytes(b"root:x:0:0:root:/root:/bin/bash\n" * 40), "magic"),
        "raw": (_bytes(bytes(1 << 20)), "magic"),
        "half-magic": (_bytes(MAGIC[:3]), "magic"),
        "other-format": (_bytes(b"KDMV" + bytes(4096)), "magic"),
        # cut short
        "cut-after-magic": (_root(length=4), "cut-short"),
        "cut-in-version-2": (_root(length=71), "cut-short"),
        "cut-in-version-3": (_root(length=100), "cut-short"),
        "cut-in-extensions": (_child(length=120), "cut-short"),
        "cut-in-backing-name": (_child(length=145), "cut-short"),
        "cut-after-header": (_child(length=512), "table-past-end"),
        "cut-in-refcount-table": (_child(length=6000), "table-past-end"),
        "cut-in-l1-table": (_child(length=(3 << 12) + 7), "table-past-end"),
        # what the header says of itself
        "version-0": (_root(version=0), "version"),
        "version-1": (_root(version=1), "version"),
        "version-4": (_root(version=4), "version"),
        "cluster-bits-0": (_root(cluster_bits=0), "cluster-bits"),
        "cluster-bits-8": (_root(cluster_bits=8), "cluster-bits"),
        "cluster-bits-22": (_root(cluster_bits=22), "cluster-bits"),
        "cluster-bits-huge": (_root(cluster_bits=0xFFFFFFFF), "cluster-bits"),
        "header-length-0": (_root(header_length=0), "header-length"),
        "header-length-103": (_root(header_length=103), "header-length"),
        "header-length-odd": (_root(header_length=109), "header-length"),
        "header-length-huge": (_root(header_length=0xFFFFFFF8), "header-length"),
        "extension-leaves-header": (_root(extensions=((0x12345678, bytes(4000)),)), "extensions"),
        "extension-reaches-into-name": (
            _child(extensions=((0x12345678, bytes(16)),), backing_offset=144),
            "extensions",
        ),
        "extensions-without-end": (_root(extensions=((0x12345678, b""),) * 400), "extensions"),
        # features
        "dirty": (_child(incompatible=1), "dirty"),
        "corrupt": (_child(incompatible=2), "corrupt"),
        "data-file": (_child(incompatible=4), "data-file"),
        "data-file-named": (
            _child(incompatible=4, extensions=((EXTENSION_DATA_FILE, b"/etc/shadow"),)),
            "data-file",
        ),
        "data-file-named-only": (
            _child(extensions=((EXTENSION_DATA_FILE, b"/etc/shadow"),)),
            "data-file",
        ),
        "feature-5": (_child(incompatible=1 << 5), "features"),
        "feature-63": (_child(incompatible=1 << 63), "features"),
        "compression-unknown": (_child(incompatible=8, compression=2), "compression"),
        "compression-unannounced": (_child(compression=1), "compression"),
        "compression-only-announced": (_child(incompatible=8), "compression"),
        "extended-l2-small": (_child(incompatible=16), "extended-l2"),
        "aes": (_child(crypt_method=1), "encryption"),
        "luks": (
            _child(
                crypt_method=2, extensions=((EXTENSION_LUKS, struct.pack(">QQ", 4 << 12, 4096)),)
            ),
            "encryption",
        ),
        "luks-without-header": (_child(crypt_method=2), "luks-header"),
        "encryption-unknown": (_child(crypt_method=3), "encryption"),
        # tables
        "l1-past-end": (_child(l1_offset=1 << 40), "table-past-end"),
        "l1-wraps": (_child(l1_offset=0xFFFFFFFFFFFFF000), "table-past-end"),
        "l1-unaligned": (_child(l1_offset=(3 << 12) + 512), "table-alignment"),
        "l1-in-header": (_child(l1_offset=0), "table-overlap"),
        "l1-is-refcount-table": (_child(l1_offset=1 << 12), "table-overlap"),
        "l1-too-small": (_child(virtual_size=1 << 40), "l1-size"),
        "l1-none": (_child(l1_size=0), "l1-size"),
        "l1-huge": (_child(l1_size=0xFFFFFFFF), "l1-size"),
        "virtual-size-huge": (_child(virtual_size=(1 << 64) - 1), "l1-size"),
        "refcount-table-past-end": (_child(refcount_offset=1 << 40), "table-past-end"),
        "refcount-table-unaligned": (_child(refcount_offset=(1 << 12) + 8), "table-alignment"),
        "refcount-table-in-header": (_child(refcount_offset=0), "table-overlap"),
        "refcount-table-none": (_child(refcount_clusters=0), "refcount-table"),
        "refcount-table-huge": (_child(refcount_clusters=0xFFFFFFFF), "refcount-table"),
        "refcount-order": (_child(refcount_order=7), "refcount-order"),
        "snapshots-past-end": (_child(snapshots=1, snapshots_offset=1 << 40), "table-past-end"),
        "snapshots-unaligned": (
            _child(snapshots=1, snapshots_offset=(3 << 12) + 8, length=1 << 16),
            "table-alignment",
        ),
        "snapshots-huge": (
            _child(snapshots=0xFFFFFFFF, snapshots_offset=4 << 12),
            "snapshot-table",
        ),
        "bitmaps-past-end": (
            _child(
                autoclear=1,
                extensions=((EXTENSION_BITMAPS, struct.pack(">IIQQ", 1, 0, 4096, 1 << 40)),),
            ),
            "table-past-end",
        ),
        "bitmaps-huge": (
            _child(
                autoclear=1,
                extensions=((EXTENSION_BITMAPS, struct.pack(">IIQQ", 1, 0, 1 << 40, 4 << 12)),),
            ),
            "bitmap-directory",
        ),
        "bitmaps-cut": (
            _child(autoclear=1, extensions=((EXTENSION_BITMAPS, bytes(8)),)),
            "extensions",
        ),
        # backing
        "backing-absolute": (_child(backing=b"/etc/hostname"), "backing-absolute"),
        "backing-absolute-image": (
            _child(backing=b"/srv/pool/vm1/disk/parent.qcow2"),
            "backing-absolute",
        ),
        "backing-parent-directory": (_child(backing=b"../secret/parent.qcow2"), "backing-outside"),
        "backing-directory": (_child(backing=b"sub/parent.qcow2"), "backing-outside"),
        "backing-dot": (_child(backing=b"./parent.qcow2"), "backing-outside"),
        "backing-dots": (_child(backing=b".."), "backing-outside"),
        "backing-json": (
            _child(
                backing=b'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/hostname"}}'
            ),
            "backing-json",
        ),
        "backing-nbd": (_child(backing=b"nbd:127.0.0.1:10809"), "backing-protocol"),
        "backing-nbd-url": (_child(backing=b"nbd://127.0.0.1/parent.qcow2"), "backing-protocol"),
        "backing-http": (_child(backing=b"http://127.0.0.1/parent.qcow2"), "backing-protocol"),
        "backing-ssh": (_child(backing=b"ssh://root@127.0.0.1/parent.qcow2"), "backing-protocol"),
        "backing-file-protocol": (_child(backing=b"file:parent.qcow2"), "backing-protocol"),
        "backing-fat": (_child(backing=b"fat:rw:/etc"), "backing-protocol"),
        "backing-no-state": (_child(backing=b"hostname"), "backing-sibling"),
        "backing-hidden": (_child(backing=b".parent.qcow2"), "backing-sibling"),
        "backing-dash": (_child(backing=b"-parent.qcow2"), "backing-sibling"),
        "backing-raw-name": (_child(backing=b"parent.raw"), "backing-sibling"),
        "backing-not-ascii": (_child(backing="pärent.qcow2".encode()), "backing-sibling"),
        "backing-not-utf-8": (_child(backing=b"p\xffrent.qcow2"), "backing-sibling"),
        "backing-nul": (_child(backing=b"parent.qcow2\0/etc/hostname"), "backing-characters"),
        "backing-newline": (
            _child(backing=b"parent.qcow2\nbacking file format: raw"),
            "backing-characters",
        ),
        "backing-too-long": (_child(backing=b"a" * 1024), "backing-name-length"),
        "backing-length-huge": (_child(backing_length=0xFFFFFFFF), "backing-name-length"),
        "backing-in-header": (_child(backing_offset=8), "backing-name-place"),
        "backing-in-data": (_child(backing_offset=3 << 12), "backing-name-place"),
        "backing-past-end": (_child(backing_offset=1 << 40), "backing-name-place"),
        "backing-at-end-of-cluster": (_child(backing_offset=4090), "backing-name-place"),
        "format-missing": (_child(formats=()), "backing-format-missing"),
        "format-missing-version-2": (_child(version=2, formats=()), "backing-format-missing"),
        "format-hidden-behind-end": (
            _child(formats=(), extensions=((0, b""), (EXTENSION_BACKING_FORMAT, b"qcow2"))),
            "backing-format-missing",
        ),
        "format-raw": (_child(formats=(b"raw",)), "backing-format-false"),
        "format-empty": (_child(formats=(b"",)), "backing-format-false"),
        "format-nul": (_child(formats=(b"qcow2\0raw",)), "backing-format-false"),
        "format-doubled": (_child(formats=(b"qcow2", b"qcow2")), "backing-format-doubled"),
        "format-contradicted": (_child(formats=(b"raw", b"qcow2")), "backing-format-doubled"),
    }
)
"""
Images that must be refused: their bytes, and the check that must refuse them where a plain sibling
name may back an image.
"""


@frozen
class HostileImage:
    """
    An image in a directory that must be refused.

    :param name: what is wrong with it
    :param path: where it is
    :param check: the safety check that must refuse it
    :param walk: whether only a walk of its chain shows it
    """

    name: str
    path: Path
    check: str
    walk: bool = False


def hostile_images(directory: Path) -> Iterator[HostileImage]:
    """
    Make every image that must be refused, each named as a state could be, and the good ones
    ``parent.qcow2`` and ``child.qcow2`` beside them.

    :param directory: which exists and is empty
    :returns: them all, once they are there
    """
    (directory / "parent.qcow2").write_bytes(GOOD.build())
    (directory / "child.qcow2").write_bytes(CHILD.build())
    made = [*_hostile_bytes(directory), *_hostile_files(directory), *_hostile_chains(directory)]
    yield from made


def _hostile_bytes(directory: Path) -> Iterator[HostileImage]:
    for name, (build, check) in HOSTILE.items():
        path = directory / f"{name}.qcow2"
        path.write_bytes(build())
        yield HostileImage(name, path, check)


def _hostile_files(directory: Path) -> Iterator[HostileImage]:
    makers: dict[str, Callable[[Path], object]] = {
        "fifo": os.mkfifo,
        "directory": os.mkdir,
        "link": lambda path: os.symlink("parent.qcow2", path),
        "link-outside": lambda path: os.symlink("/etc/hostname", path),
        "link-dead": lambda path: os.symlink("nothing.qcow2", path),
        "link-device": lambda path: os.symlink("/dev/zero", path),
    }
    for name, make in makers.items():
        path = directory / f"{name}.qcow2"
        make(path)
        yield HostileImage(name, path, "regular-file")


def _hostile_chains(directory: Path) -> Iterator[HostileImage]:
    backed = {
        "loop-self": ("loop-self", "loop"),
        "loop-a": ("loop-b", "loop"),
        "loop-b": ("loop-a", "loop"),
        "into-loop": ("loop-a", "loop"),
        "orphan": ("nothing", "missing-parent"),
        "child-of-raw": ("raw", "magic"),
        "child-of-dirty": ("dirty", "dirty"),
        "child-of-fifo": ("fifo", "regular-file"),
        "child-of-link": ("link-outside", "regular-file"),
        "chain-0": ("chain-1", "depth"),
    }
    for name, (parent, check) in backed.items():
        yield HostileImage(name, _chained(directory, name, parent), check, walk=True)
    for number in range(1, LONG_CHAIN):
        _chained(
            directory,
            f"chain-{number}",
            f"chain-{number + 1}" if number + 1 < LONG_CHAIN else "parent",
        )


def _chained(directory: Path, name: str, parent: str) -> Path:
    path = directory / f"{name}.qcow2"
    path.write_bytes(evolve(CHILD, backing=f"{parent}.qcow2".encode()).build())
    return path
