"""
Make a working image of a disk image that a user has got elsewhere, so that it can become a state.
The file stays as it is: a qcow2 image is copied, or shares its blocks with the copy; qemu-img
converts other formats; compressed files are unpacked first.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from statepool.beneath import Beneath, Descriptor, rename_new
from statepool.cache.cache import Cache
from statepool.cache.trust import Signature
from statepool.capture.scratch import Scratch, scratch
from statepool.capture.unpacking import unpack
from statepool.errors import (
    DigestMismatch,
    InUse,
    NotFound,
    UnsafeImage,
    UsageError,
)
from statepool.model.progress import SILENT, Progress
from statepool.qcow2 import opened
from statepool.qcow2.checks import check_header
from statepool.qcow2.clusters import check_clusters
from statepool.qcow2.files import open_regular, refusal
from statepool.qcow2.formats import Format, Read, cure_of, recognise, recognise_end
from statepool.qcow2.header import MAGIC, read_header, reader
from statepool.qcow2.tool import QemuImg
from statepool.transports.failures import Subject, translating

_CHUNK = 1 << 20
"""Bytes that are read at a time."""

_RAW = [
    (510, b"\x55\xaa"),  # a boot sector: MBR, and the one that protects a GPT
    (512, b"EFI PART"),
    (512, b"LABELONE"),  # LVM, in one of the first four sectors; usually the second
    (0, b"XFSB"),
    (1080, b"\x53\xef"),  # ext2, ext3, ext4
    (65600, b"_BHRfS_M"),  # btrfs
]
"""Offsets and bytes by which a raw image shows that it is a disk (``man 5 magic``)."""


@contextmanager
def importable(
    cache: Cache,
    file: str | os.PathLike[str],
    checksums: Mapping[str, str | None],
    *,
    raw: bool = False,
    progress: Progress = SILENT,
) -> Iterator[Path]:
    """
    Yield a qcow2 image with what a guest sees in a file: the file itself if it is one, or an image
    of our own, which is removed afterwards. Of the former, only a copy may become a state.

    :param file: an image without a backing file, in any format that imports take
    :param checksums: those that it must have, by their algorithms in :mod:`hashlib`
    :param raw: take it as a raw image, although nothing in it shows that it is one
    :raises UsageError: a checksum is not of its kind
    :raises NotFound: there is no such file
    :raises InUse: a process can write to it, or has changed it meanwhile
    :raises DigestMismatch: it has another checksum
    :raises UnsafeImage: it is no such image
    """
    wanted = {name: _checksum(name, text) for name, text in checksums.items() if text is not None}
    path = os.path.realpath(file)
    if not os.path.exists(path):
        raise NotFound(f"there is no file {path}", path=path, hint="name the image to import")
    with opened.shared(path) as descriptor:
        before = Signature.of(os.fstat(descriptor))
        for name, expected in wanted.items():
            _require_checksum(descriptor, path, name, expected, progress)
        if not raw and reader(descriptor)(0, len(MAGIC)) == MAGIC:
            _check_alone(descriptor, path, path)
            _require_unchanged(descriptor, path, before)
            yield Path(path)
            return
        with scratch(cache) as place:
            image = _converted(cache, place, descriptor, path, raw, progress)
            _require_unchanged(descriptor, path, before)
            yield Path(image)


def _require_unchanged(descriptor: int, path: str, before: Signature) -> None:
    with translating("read", Subject(path, path=path)):
        named = os.stat(path)
    if not before == Signature.of(os.fstat(descriptor)) == Signature.of(named):
        raise InUse(
            f"{path} was changed while it was read",
            path=path,
            hint="import it when no process writes to it",
        )


def is_importable(path: str | os.PathLike[str]) -> bool:
    """:returns: whether a file shows that it has a format that an import takes"""
    with open_regular(os.path.realpath(path)) as descriptor:
        found, read = _format_of(descriptor), reader(descriptor)
        if found is not None:
            return found.importable
        return read(0, len(MAGIC)) == MAGIC or _shows_raw(read)


def _checksum(name: str, text: str) -> str:
    digits = hashlib.new(name).digest_size * 2
    if not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", text):
        raise UsageError(
            f"{text!r} is no {name.upper()} checksum: it has {len(text)} characters, and needs"
            f" {digits} hexadecimal digits",
            hint="take it from the list beside the download, such as SHA256SUMS or SHA512SUMS",
        )
    return text.lower()


def _require_checksum(
    descriptor: int, path: str, name: str, expected: str, progress: Progress
) -> None:
    made, offset = hashlib.new(name), 0
    progress.begin(f"{name} of {path}", os.fstat(descriptor).st_size)
    try:
        while data := _read(descriptor, path, offset):
            made.update(data)
            offset += len(data)
            progress.advance(len(data))
    finally:
        progress.end()
    if made.hexdigest() != expected:
        raise (
            DigestMismatch(
                f"{path} has the {name.upper()} checksum {made.hexdigest()}, not {expected}",
                expected=f"{name}:{expected}",
                actual=f"{name}:{made.hexdigest()}",
                path=path,
                hint="nothing was imported; download it once more",
            )
        )


def _read(descriptor: int, path: str, offset: int) -> bytes:
    with translating("read", Subject(path, path=path)):
        return os.pread(descriptor, _CHUNK, offset)


def _format_of(descriptor: int) -> Format | None:
    read = reader(descriptor)
    found = recognise(read(0, 512), read, os.fstat(descriptor).st_size)
    return found or recognise_end(descriptor)


def _converted(
    cache: Cache, place: Scratch, source: int, path: str, raw: bool, progress: Progress
) -> Beneath:
    """:returns: the qcow2 image made of an open file"""
    target, found = place.file("image.qcow2"), _format_of(source)
    if raw and found is not None and found.importable:
        raise UsageError(f"{path} is {found.name}, not raw", path=path, hint="leave out --raw")
    if found is None or found.packing is None:
        return _made(cache, target, source, path, path, found, raw, progress)
    unpacked = place.file("unpacked")
    with _new(unpacked) as inner:
        unpack(found.packing, source, inner, path, progress)
        what, inside = f"{path}, unpacked,", _format_of(inner)
        if inside is not None and inside.packing is not None:
            raise refusal("magic", what, f"it is {inside.name} once more", path=path)
        made = _made(cache, target, inner, path, what, inside, raw, progress, ours=unpacked)
    unpacked.remove()
    return made


def _made(
    cache: Cache,
    target: Beneath,
    source: int,
    path: str,
    what: str,
    found: Format | None,
    raw: bool,
    progress: Progress,
    *,
    ours: Beneath | None = None,
) -> Beneath:
    """
    :param path: the user's file
    :param what: the source in messages
    :param ours: the source, if it may become the target
    """
    if ours is not None and not raw and reader(source)(0, len(MAGIC)) == MAGIC:
        _check_alone(source, path, what)
        rename_new(ours, target)
        return target
    driver = "raw" if raw else _driver(found, source, path, what)
    if driver != "raw":
        _require_alone(cache, source, path, what, driver)
    with _new(target):
        pass  # it is made as all our files are; qemu-img overwrites it
    _convert(cache, source, target, driver, f"convert {path}", progress)
    return target


def _check_alone(source: int, path: str, what: str) -> None:
    """Check a qcow2 image, as a capture would, but with the user's name of it in messages."""
    read = reader(source)
    header = read_header(read, os.fstat(source).st_size, what)
    if header.backing_name is not None:
        raise _needs_other(what, os.fsdecode(header.backing_name), "qcow2", path)
    check_header(header, what)
    check_clusters(read, header, what, descriptor=source)


def _by_descriptor(source: int) -> str:
    """:returns: a path by which another program opens the very file that was checked"""
    return f"/proc/{os.getpid()}/fd/{source}"


def _driver(found: Format | None, source: int, path: str, what: str) -> str:
    """:returns: QEMU's driver for an image that is not qcow2"""
    read, size = reader(source), os.fstat(source).st_size
    if size == 0:
        raise refusal("empty", what, "it is empty", path=path)
    if found is not None and found.driver is not None:
        if found.driver == "vmdk" and read(0, 4) == b"KDMV" and not any(read(12, 8)):
            # without a capacity, QEMU takes the file for a list of other files
            raise _needs_other(what, "the files that it lists", "vmdk", path)
        return found.driver
    if found is not None:
        raise refusal("magic", what, f"it is {found.name}", hint=cure_of(found, what), path=path)
    if not _shows_raw(read):
        raise refusal(
            "magic",
            what,
            "nothing in it shows that it is a disk image",
            hint="if it is a raw image, say so: --raw",
            path=path,
        )
    return "raw"


def _shows_raw(read: Read) -> bool:
    return any(read(offset, len(magic)) == magic for offset, magic in _RAW)


def _require_alone(cache: Cache, source: int, path: str, what: str, driver: str) -> None:
    """Refuse an image that QEMU would read other files for."""
    told = QemuImg(cache.settings.tool_timeout).info(_by_descriptor(source), format=driver)
    if (backing := told.get("backing-filename")) is not None:
        raise _needs_other(what, str(backing), driver, path)


def _needs_other(what: str, other: str, driver: str, path: str) -> UnsafeImage:
    if driver == "qcow2":
        hint = "a working image becomes a state with statepool set; of another, make one image: "
    else:
        hint = "if you trust it, make one image of them, and import that: "
    whole = f"qemu-img convert -f {driver} -O qcow2 {shlex.quote(path)} NEW.qcow2"
    return refusal(
        "parent",
        what,
        f"it is only whole with {other}",
        hint=hint + whole,
        path=path,
    )


def _new(file: Beneath) -> Descriptor:
    with translating("make", Subject(str(file), path=str(file))):
        return file.open(os.O_RDWR | os.O_CREAT | os.O_EXCL)


def _convert(
    cache: Cache, source: int, target: Beneath, driver: str, title: str, progress: Progress
) -> None:
    told, size = 0, os.fstat(source).st_size

    def watch(part: float) -> None:
        nonlocal told
        done = int(part * size)
        progress.advance(max(0, done - told))
        told = max(told, done)

    progress.begin(title, size)
    try:
        QemuImg(cache.settings.tool_timeout).convert(
            _by_descriptor(source), Path(target), source_format=driver, watch=watch
        )
    finally:
        progress.end()
