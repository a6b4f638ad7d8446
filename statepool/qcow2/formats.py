"""
Recognise files that are not qcow2 images by their magic bytes. This is for messages, and for the
imports that a user asks for; no other file is opened in the format that it seems to have.

The magic bytes of images are those that QEMU's own drivers look for (``block/*.c``); those of
archives are in ``man 5 magic``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from attrs import evolve, frozen

from statepool.errors import UnsafeImage
from statepool.qcow2.files import open_regular, refusal

Read = Callable[[int, int], bytes]

_FOOTER = 512
"""Bytes at the end of a file in which VHD and DMG images have their magic bytes."""


@frozen
class Format:
    """
    A format that a user can take for a disk image.

    :param name: its name, with the article
    :param cure: the command that makes a qcow2 image of it, see :func:`filled`
    :param driver: of QEMU, if an import converts such an image
    :param packing: the compression, if an import reads through it
    """

    name: str
    cure: str
    driver: str | None = None
    packing: str | None = None

    @property
    def importable(self) -> bool:
        """Whether an import takes such a file."""
        return self.driver is not None or self.packing is not None


IMPORTED = frozenset({"vmdk", "vdi", "vpc", "vhdx", "qed"})
"""The drivers of QEMU whose images an import converts."""


def _disk(name: str, driver: str) -> Format:
    return Format(
        name,
        f"convert it: qemu-img convert -f {driver} -O qcow2 {{file}} {{new}}",
        driver=driver if driver in IMPORTED else None,
    )


def _packed(name: str, command: str, packing: str | None = None) -> Format:
    return Format(
        name,
        f"unpack it, and set the image that is in it: {command} {{file}}",
        packing=packing,
    )


_VHD = _disk("a VHD image", "vpc")
_LUKS = Format(
    "an encrypted LUKS volume",
    "decrypt it, with its passphrase in FILE: qemu-img convert --object secret,id=key,file=FILE"
    " --image-opts driver=luks,key-secret=key,file.driver=file,file.filename={option} -O qcow2"
    " {new}",
)
_ISO = Format(
    "an ISO 9660 image, as of a CD or DVD",
    "if a system is to be installed from it, make a disk (qemu-img create -f qcow2 {new} 20G), boot"
    " a machine that has both, and set the disk",
)

_MAGIC: list[tuple[int, bytes, Format]] = [
    (0, b"KDMV", _disk("a VMDK image", "vmdk")),
    (0, b"COWD", _disk("a VMDK image", "vmdk")),
    (
        0,
        b"# Disk DescriptorFile",
        evolve(_disk("the description of a VMDK image", "vmdk"), driver=None),
    ),
    (64, b"\x7f\x10\xda\xbe", _disk("a VDI image", "vdi")),
    (0, b"conectix", _VHD),
    (0, b"vhdxfile", _disk("a VHDX image", "vhdx")),
    (0, b"QED\0", _disk("a QED image", "qed")),
    (0, b"QFI\xfb\0\0\0\1", _disk("an image of version 1 of the format", "qcow")),
    (0, b"WithoutFreeSpace", _disk("a Parallels image", "parallels")),
    (0, b"WithouFreSpacExt", _disk("a Parallels image", "parallels")),
    (0, b"Bochs Virtual HD Image", _disk("a Bochs image", "bochs")),
    (0, b"LUKS\xba\xbe", _LUKS),
    (0, b"\x1f\x8b", _packed("compressed by gzip", "gunzip -k", "gzip")),
    (0, b"\xfd7zXZ\0", _packed("compressed by xz", "unxz -k", "xz")),
    (0, b"\x28\xb5\x2f\xfd", _packed("compressed by zstd", "unzstd", "zstd")),
    (0, b"BZh", _packed("compressed by bzip2", "bunzip2 -k", "bzip2")),
    (0, b"\x04\x22\x4d\x18", _packed("compressed by lz4", "lz4 -dm")),
    (0, b"PK\3\4", _packed("a zip archive", "unzip")),
    (0, b"7z\xbc\xaf\x27\x1c", _packed("a 7z archive", "7z x")),
    (257, b"ustar", _packed("a tar archive, as OVA files are", "tar -xf")),
    (32769, b"CD001", _ISO),
]
"""Offset, magic bytes, and the format that has them."""

_FOOTERS = [(b"conectix", _VHD), (b"koly", _disk("a DMG image", "dmg"))]


def recognise(head: bytes, read: Read, size: int) -> Format | None:
    """
    :param head: the first bytes of a file, as many as a header has
    :param read: what reads the file
    :param size: its length, in bytes
    :returns: its format, or None if it has no magic bytes: a raw image, or no image at all
    """
    for offset, magic, found in _MAGIC:
        if head.startswith(magic, offset) or (
            len(head) <= offset < size and read(offset, len(magic)) == magic
        ):
            return found
    return None


@contextlib.contextmanager
def recognising(path: Path) -> Iterator[None]:
    """
    Name the format of a local file in errors of the block, also if only the end of the file shows
    it: this is as far from the header as can be.

    :raises UnsafeImage: the file turned out not to be a qcow2 image; the error now says more, if
        more is known
    """
    try:
        yield
    except UnsafeImage as error:
        found = _recognise_end(path) if error.check == "magic" else None
        if found is None:
            raise
        raise refusal(
            "magic",
            str(path),
            f"it is {found.name}",
            hint=cure_of(found, str(path)),
            path=str(path),
        ) from error


def _recognise_end(path: Path) -> Format | None:
    with open_regular(path) as descriptor:
        return recognise_end(descriptor)


def recognise_end(descriptor: int) -> Format | None:
    """:returns: the format that only the end of an open file shows, if it shows one"""
    tail = os.pread(descriptor, _FOOTER, max(0, os.fstat(descriptor).st_size - _FOOTER))
    return next((found for magic, found in _FOOTERS if tail.startswith(magic)), None)


def cure_of(found: Format | None, what: str) -> str:
    """
    :param found: the format of a file, if known
    :param what: its name in messages: its path, if it has one on this host
    :returns: the advice, for a hint
    """
    return filled(
        (
            "if it is a raw image, convert it: qemu-img convert -f raw -O qcow2 {file} {new}"
            if found is None
            else found.cure
        ),
        what,
    )


def filled(cure: str, what: str) -> str:
    """
    :param cure: a command, with ``{file}`` for the name of an image, ``{option}`` for the name
        within a comma-separated option of QEMU, and ``{new}`` for the name of the new image
    :param what: the name of the image in messages: its path, if it has one on this host
    :returns: the command, ready to be typed
    """
    if not what.startswith("/"):
        return cure.format(file="IN", option="IN", new="OUT")
    return cure.format(
        file=shlex.quote(what), option=shlex.quote(what.replace(",", ",,")), new="NEW.qcow2"
    )
