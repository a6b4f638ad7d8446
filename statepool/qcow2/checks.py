"""
The named safety checks: what is refused before any program other than our own header reader opens
an image.

Each check is a function, and its docstring is the reason for it; :data:`CHECKS` has all of them
under the names that :attr:`statepool.errors.UnsafeImage.check` gives. ``qemu-img`` is not a
substitute: it accepts most of what is refused here, and some of this makes it open files, connect
to hosts, hang or crash.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import EllipsisType, MappingProxyType

from statepool.errors import UnsafeImage
from statepool.model.names import is_name
from statepool.qcow2 import files
from statepool.qcow2 import header as headers
from statepool.qcow2.files import open_regular, refusal, translated
from statepool.qcow2.formats import filled
from statepool.qcow2.header import (
    EXTENSION_DATA_FILE,
    EXTENSION_LUKS,
    Header,
    Read,
    has_protocol,
    read_header,
    reader,
)

SUFFIX = ".qcow2"
"""The suffix of a state's file."""

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
"""Incompatible feature bits."""

MAX_L1_BYTES = 32 << 20
"""The longest L1 table that QEMU opens (``QCOW_MAX_L1_SIZE``), in bytes."""

MAX_REFCOUNT_TABLE_BYTES = 8 << 20
"""The longest refcount table that QEMU opens (``QCOW_MAX_REFTABLE_SIZE``), in bytes."""

MAX_BITMAP_DIRECTORY_BYTES = 65535 << 10
"""The longest bitmap directory that QEMU opens (``QCOW2_MAX_BITMAP_DIRECTORY_SIZE``), in bytes."""

MAX_SNAPSHOTS = 65536
"""The largest number of internal snapshots that QEMU opens (``QCOW_MAX_SNAPSHOTS``)."""

_SNAPSHOT_BYTES = 40
_MIN_EXTENDED_L2_CLUSTER_BITS = 14


class Backing(enum.Enum):
    """The permitted kinds of backing names."""

    SIBLING = "sibling"
    """A plain sibling name, as in a pool: ``install.qcow2``."""
    UNMANAGED = "unmanaged"
    """A plain sibling name, or an absolute path that ends in one: the directory is ignored."""
    WORKING = "working"
    """Any absolute path; the caller checks where it leads."""
    NONE = "none"
    """No backing name."""


Check = Callable[[Header], str | None]
"""A check of a header. It returns the problem, as the end of a sentence, or None."""

_reasons: dict[str, str] = {}
_form: list[tuple[str, Check]] = []
_backing: list[tuple[str, frozenset[Backing], Check]] = []
_ANY = frozenset(Backing)
_NAMED = frozenset({Backing.SIBLING, Backing.UNMANAGED})

_ALONE = "make one image of its chain: qemu-img convert -f qcow2 -O qcow2 {file} {new}"

_HINTS = {
    "dirty": (
        "whatever uses it has not closed it; if nothing does, repair a copy: cp {file} {new} &&"
        " qemu-img check -f qcow2 -r all {new}"
    ),
    "corrupt": "see what is left of it: cp {file} {new} && qemu-img check -f qcow2 -r all {new}",
    "data-file": "make one file of it: qemu-img convert -f qcow2 -O qcow2 {file} {new}",
    "encryption": (
        "only images that are not encrypted are kept; decrypt it, with its passphrase in FILE:"
        " qemu-img convert --object secret,id=key,file=FILE --image-opts"
        " driver=qcow2,encrypt.key-secret=key,file.driver=file,file.filename={option} -O qcow2"
        " {new}"
    ),
    "backing-format-missing": (
        "if the backing file is a qcow2 image, say so: qemu-img rebase -u -f qcow2 -F qcow2 -b"
        " BACKING {file}"
    ),
    "backing-format-false": (
        "if it is one all the same, say so: qemu-img rebase -u -f qcow2 -F qcow2 -b BACKING"
        f" {{file}}; if not, {_ALONE}"
    ),
    "proportion": "make one of its size: qemu-img convert -f qcow2 -O qcow2 {file} {new}",
    "table-past-end": "the file has been cut short; use an intact copy",
    "backing-elsewhere": (
        "if the file beside it is meant, say so: qemu-img rebase -u -f qcow2 -F qcow2 -b"
        f" NAME.qcow2 {{file}}; if not, {_ALONE}"
    ),
    "backing-relative": _ALONE,
    "backing-json": _ALONE,
    "backing-protocol": _ALONE,
}


def _about_form(name: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        _reasons[name] = (function.__doc__ or "").strip()
        _form.append((name, function))
        return function

    return register


def _about_backing(name: str, kinds: frozenset[Backing] = _ANY) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        _reasons[name] = (function.__doc__ or "").strip()
        _backing.append((name, kinds, function))
        return function

    return register


# -- features --------------------------------------------------------------------------------------


@_about_form("dirty")
def _dirty(header: Header) -> str | None:
    """
    The refcounts of the image are not up to date: it is open for writing somewhere, or was not
    closed.
    """
    return "it is marked as dirty" if header.incompatible & DIRTY else None


@_about_form("corrupt")
def _corrupt(header: Header) -> str | None:
    """QEMU itself has found that the metadata of the image is damaged."""
    return "it is marked as corrupt" if header.incompatible & CORRUPT else None


@_about_form("data-file")
def _data_file(header: Header) -> str | None:
    """
    The data of the image is in another file. This can be any file that QEMU may open, and it would
    not be moved with the image.
    """
    named = any(extension.type == EXTENSION_DATA_FILE for extension in header.extensions)
    return "its data is in another file" if named or header.incompatible & DATA_FILE else None


@_about_form("features")
def _features(header: Header) -> str | None:
    """
    The image uses features that this version does not know, so the meaning of its bytes is unknown.
    """
    unknown = header.incompatible & ~(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2)
    return f"it needs unknown features (bits {unknown:#x})" if unknown else None


@_about_form("compression")
def _compression(header: Header) -> str | None:
    """
    The compression type and the feature bit that announces it must agree, and the type must be
    known.
    """
    if header.compression > 1:
        return f"its compression type {header.compression} is unknown"
    if bool(header.compression) != bool(header.incompatible & COMPRESSION):
        return "its compression type and the feature bit for it disagree"
    return None


@_about_form("extended-l2")
def _extended_l2(header: Header) -> str | None:
    """A subcluster cannot be smaller than a sector."""
    small = (
        header.incompatible & EXTENDED_L2 and header.cluster_bits < _MIN_EXTENDED_L2_CLUSTER_BITS
    )
    return (
        f"it has extended L2 entries with clusters of {header.cluster_size} bytes"
        if small
        else None
    )


@_about_form("luks-header")
def _luks_header(header: Header) -> str | None:
    """An image with LUKS encryption but no pointer to a LUKS header makes qemu-img crash."""
    lost = header.crypt_method == 2 and not any(
        extension.type == EXTENSION_LUKS for extension in header.extensions
    )
    return "it is said to be encrypted by LUKS, but has no LUKS header" if lost else None


@_about_form("encryption")
def _encryption(header: Header) -> str | None:
    """
    An encrypted image cannot be used without its secret, and a chain cannot mix encrypted images
    with others.
    """
    return "it is encrypted" if header.crypt_method else None


# -- tables ----------------------------------------------------------------------------------------


@_about_form("refcount-order")
def _refcount_order(header: Header) -> str | None:
    """A refcount has at most 64 bits."""
    return (
        f"it says that a refcount has 2^{header.refcount_order} bits"
        if header.refcount_order > 6
        else None
    )


@_about_form("refcount-table")
def _refcount_table(header: Header) -> str | None:
    """Every image has a refcount table, of at most 8 MiB."""
    size = header.refcount_table_clusters << header.cluster_bits
    return (
        f"it says that its refcount table has {size} bytes"
        if not 0 < size <= MAX_REFCOUNT_TABLE_BYTES
        else None
    )


def needed_l1_size(header: Header) -> int:
    """
    :returns: how many entries of the L1 table the virtual disk needs; entries after them have no
        meaning
    """
    entry_bits = 4 if header.incompatible & EXTENDED_L2 else 3
    covered_bits = header.cluster_bits + header.cluster_bits - entry_bits
    return (header.virtual_size + (1 << covered_bits) - 1) >> covered_bits


@_about_form("l1-size")
def _l1_size(header: Header) -> str | None:
    """The L1 table must cover the whole virtual disk, and be at most 32 MiB long."""
    needed = needed_l1_size(header)
    if header.l1_size < needed:
        return f"its L1 table has {header.l1_size} entries, but its virtual size needs {needed}"
    return (
        f"its L1 table has {header.l1_size} entries" if header.l1_size * 8 > MAX_L1_BYTES else None
    )


@_about_form("snapshot-table")
def _snapshot_table(header: Header) -> str | None:
    """QEMU opens at most 65,536 internal snapshots."""
    return (
        f"it says that it has {header.snapshots} internal snapshots"
        if header.snapshots > MAX_SNAPSHOTS
        else None
    )


@_about_form("bitmap-directory")
def _bitmap_directory(header: Header) -> str | None:
    """QEMU opens a bitmap directory of at most 64 MiB."""
    size = header.bitmap_directory.directory_size if header.bitmap_directory is not None else 0
    return (
        f"it says that its bitmap directory has {size} bytes"
        if size > MAX_BITMAP_DIRECTORY_BYTES
        else None
    )


def tables(header: Header) -> Iterator[tuple[str, int, int]]:
    """:returns: the tables that a header names, with their offsets and lengths in bytes"""
    if header.l1_size:
        yield "L1 table", header.l1_offset, header.l1_size * 8
    yield (
        "refcount table",
        header.refcount_table_offset,
        header.refcount_table_clusters << header.cluster_bits,
    )
    if header.snapshots:
        yield "snapshot table", header.snapshots_offset, header.snapshots * _SNAPSHOT_BYTES
    if header.bitmap_directory is not None:
        yield (
            "bitmap directory",
            header.bitmap_directory.directory_offset,
            header.bitmap_directory.directory_size,
        )


@_about_form("table-alignment")
def _table_alignment(header: Header) -> str | None:
    """A table begins at the beginning of a cluster."""
    for name, offset, _ in tables(header):
        if offset & (header.cluster_size - 1):
            return f"its {name} is said to be at byte {offset}, inside a cluster"
    return None


@_about_form("table-past-end")
def _table_past_end(header: Header) -> str | None:
    """
    A table outside of the file is read as zeros: all data would seem to be missing, without an
    error.
    """
    for name, offset, size in tables(header):
        if offset + size > header.file_size:
            return (
                f"its {name} reaches to byte {offset + size}, but the file ends after"
                f" {header.file_size}"
            )
    return None


@_about_form("table-overlap")
def _table_overlap(header: Header) -> str | None:
    """Tables that share bytes with the header or with each other are damaged by the first write."""
    end, before = header.cluster_size, "header"
    for offset, name, size in sorted((offset, name, size) for name, offset, size in tables(header)):
        if offset < end:
            return f"its {name} is said to be at byte {offset}, inside its {before}"
        end, before = offset + size, name
    return None


LARGE = 64 << 30
"""
File size in bytes below which the proportion is not checked: internal snapshots with RAM can leave
files of this size, whatever the size of the disk.
"""


@_about_form("proportion")
def _proportion(header: Header) -> str | None:
    """
    A file that is far longer than its disk can need consists mostly of a hole, which took no room
    where it was made, but takes hours to read.
    """
    longest = (LARGE + 4 * header.virtual_size) * (1 + header.snapshots)
    return (
        f"it has {header.file_size} bytes, for a disk of {header.virtual_size}"
        if header.file_size > longest
        else None
    )


# -- backing ---------------------------------------------------------------------------------------


@_about_backing("backing", frozenset({Backing.NONE}))
def _no_backing(header: Header) -> str | None:
    """Where no backing file is permitted, there must be none."""
    return f"it is backed by {_shown(header)}"


@_about_backing("backing-characters")
def _backing_characters(header: Header) -> str | None:
    """
    A NUL ends a name early for some readers; a newline forges lines in the output of other
    programs.
    """
    strange = any(byte < 32 or byte == 127 for byte in header.backing_name or b"")
    return f"its backing name has control characters: {_shown(header)}" if strange else None


@_about_backing("backing-json")
def _backing_json(header: Header) -> str | None:
    """A backing name that is a JSON text can make QEMU open anything in any way."""
    return (
        "its backing name is a JSON text"
        if (header.backing_name or b"").startswith(b"json:")
        else None
    )


@_about_backing("backing-protocol")
def _backing_protocol(header: Header) -> str | None:
    """A backing name with a protocol makes QEMU connect to a host, or use another driver."""
    return (
        f"its backing name has a protocol: {_shown(header)}"
        if has_protocol(header.backing_name or b"")
        else None
    )


@_about_backing("backing-absolute", frozenset({Backing.SIBLING}))
def _backing_absolute(header: Header) -> str | None:
    """
    An absolute backing name means a different file on every host, and can be any file on this one.
    """
    return (
        f"its backing name is absolute: {_shown(header)}"
        if (header.backing_name or b"").startswith(b"/")
        else None
    )


@_about_backing("backing-relative", frozenset({Backing.WORKING}))
def _backing_relative(header: Header) -> str | None:
    """A relative backing name of a working image means a different file when the image is moved."""
    return (
        None
        if (header.backing_name or b"").startswith(b"/")
        else f"its backing name is not absolute: {_shown(header)}"
    )


@_about_backing("backing-outside", _NAMED)
def _backing_outside(header: Header) -> str | None:
    """A backing name with directories leads out of the directory of the image's states."""
    name = header.backing_name or b""
    outside = b".." in name.split(b"/") or (b"/" in name and not name.startswith(b"/"))
    return f"its backing name goes through directories: {_shown(header)}" if outside else None


@_about_backing("backing-sibling", _NAMED)
def _backing_sibling(header: Header) -> str | None:
    """
    A state is backed by the file of another state in the same directory, with a valid state name.
    """
    return (
        f"its backing name is not that of a state: {_shown(header)}"
        if _state_name(header) is None
        else None
    )


@_about_backing("backing-format-missing")
def _backing_format_missing(header: Header) -> str | None:
    """
    Without a format, the backing file is probed, or read as raw: then a guest could write a header
    that leads to any file.
    """
    return (
        "it does not say what format its backing file has" if not header.backing_formats else None
    )


@_about_backing("backing-format-doubled")
def _backing_format_doubled(header: Header) -> str | None:
    """
    If two backing formats are given, one reader takes the first and another reader takes the last.
    """
    return (
        f"it says {header.backing_formats} times what format its backing file has"
        if header.backing_formats > 1
        else None
    )


@_about_backing("backing-format-false")
def _backing_format_false(header: Header) -> str | None:
    """
    States are qcow2 images: if one is read in another format, the guest sees its metadata instead
    of its disk.
    """
    said = header.backing_format or b""
    return (
        f"it says that its backing file has the format {said[:40]!r}, not qcow2"
        if said != b"qcow2"
        else None
    )


_PARENT_REASON = "A state is backed by the parent that is known for it, and by nothing else."
_ELSEWHERE_REASON = (
    "A backing name that leads to another place of the same pool means the file there, not the one"
    " of that name beside the image."
)

CHECKS: Mapping[str, str] = MappingProxyType(
    {
        **files.REASONS,
        **headers.REASONS,
        **_reasons,
        "parent": _PARENT_REASON,
        "backing-elsewhere": _ELSEWHERE_REASON,
        "l2-tables": (
            "Each L2 table is a cluster of its own: one in two places is damaged by a write, and"
            " one in a million takes hours to read."
        ),
        "l2-entries": (
            "What no entry of an L2 table can be, QEMU calls corrupt when a guest reads there."
        ),
        "clusters": (
            "Data that its tables place behind the end of the file is read as zeros: the file has"
            " been cut short."
        ),
        "cluster-alignment": "Data that begins inside a cluster is an error when a guest reads it.",
        "cluster-overlap": (
            "Data in the place of the header or of a table is not what a guest has written."
        ),
        "compressed": "A guest that reads what cannot be decompressed gets an error.",
        "loop": "A chain that comes back to itself never ends.",
        "depth": (
            "A chain deeper than what is permitted costs every reader a descriptor and a look for"
            " each of its states."
        ),
        "missing-parent": "A state without its parent is not whole.",
    }
)
"""Every safety check by its name, with its reason."""


# -- entry points ----------------------------------------------------------------------------------


def check_image(
    read: Read,
    file_size: int,
    what: str,
    *,
    parent: str | EllipsisType | None = ...,
    backing: Backing = Backing.SIBLING,
) -> Header:
    """
    Read the header of an image, and refuse it unless it passes every check.

    :param read: what reads the image
    :param file_size: its length, in bytes
    :param what: its name in messages
    :param parent: the state that must back it, None if none may; when not given, any that
        ``backing`` permits, or none at all
    :param backing: the permitted kind of its backing name
    :returns: its header
    :raises UnsafeImage: ``check`` is one of :data:`CHECKS`
    """
    header = read_header(read, file_size, what)
    check_header(header, what, parent=parent, backing=backing)
    return header


def check_header(
    header: Header,
    what: str,
    *,
    parent: str | EllipsisType | None = ...,
    backing: Backing = Backing.SIBLING,
) -> None:
    """
    Check a header that was read already, as :func:`check_image` does.

    :raises UnsafeImage: ``check`` is one of :data:`CHECKS`
    """
    for name, check in _form:
        _require(name, check(header), what)
    if header.backing_name is not None:
        for name, kinds, check in _backing:
            if backing in kinds:
                _require(name, check(header), what)
    if not isinstance(parent, EllipsisType):
        _require("parent", _wrong_parent(header, parent), what)


def check_file(
    path: Path | str,
    what: str | None = None,
    *,
    parent: str | EllipsisType | None = ...,
    backing: Backing = Backing.SIBLING,
) -> Header:
    """
    Check a local file, as :func:`check_image` does.

    :param path: the file, which must be a regular one; links are not followed
    :param what: its name in messages; by default its path
    :raises UnsafeImage: ``check`` is one of :data:`CHECKS`
    :raises MissingFile: there is no such file
    :raises AccessDenied: permissions do not allow reading it
    """
    with open_regular(path) as descriptor:
        try:
            return check_image(
                reader(descriptor),
                os.fstat(descriptor).st_size,
                what or str(path),
                parent=parent,
                backing=backing,
            )
        except UnsafeImage as error:
            error.path = str(path)
            raise
        except OSError as error:
            raise translated(error, path, "read") from error


def check_parent_place(
    header: Header, what: str, *, root: str, own: str, parent: str, links: bool
) -> None:
    """
    Refuse an image in a pool whose backing name leads into this pool, but not to the file that is
    taken for its parent.

    An absolute name that leads outside the pool is not judged here: the pool may have been made on
    another host, or in another place.

    :param root: the absolute path of the pool
    :param own: the path of the image in the pool
    :param parent: the path of the file that is taken for its parent
    :param links: whether the pool is in a file system of this host, where symbolic links to it are
        followed
    :raises UnsafeImage: check ``backing-elsewhere``
    """
    named = _normal(
        os.path.join(root, os.path.dirname(own), os.fsdecode(header.backing_name or b""))
    )
    taken = _normal(os.path.join(root, parent))
    if named == taken or (links and _real(named) == _real(taken)):
        return
    if _is_below(named, _normal(root)) or (
        links and _is_below(_real(named), os.path.realpath(root))
    ):
        _require(
            "backing-elsewhere",
            f"its backing name leads to another place of this pool: {_shown(header)}",
            what,
        )


def _is_below(path: str, root: str) -> bool:
    return path.startswith(f"{root.rstrip('/')}/")


def _normal(path: str) -> str:
    # normpath keeps two slashes at the beginning
    return "/" + os.path.normpath(path).lstrip("/")


def _real(path: str) -> str:
    # The last part is not resolved: in a view it is a link itself.
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def sibling_of(header: Header) -> str | None:
    """
    :returns: the name of the state that backs the image, whatever directory its backing name gives;
        None if nothing backs it
    :raises UnsafeImage: check ``backing-sibling``: its backing file is not the file of a state
    """
    if header.backing_name is None:
        return None
    name = _state_name(header)
    if name is None:
        raise refusal(
            "backing-sibling",
            "an image",
            f"its backing name is not that of a state: {_shown(header)}",
        )
    return name


def warnings(header: Header) -> tuple[str, ...]:
    """
    :returns: warnings about what is permitted, but may surprise a user who makes children of this
        image
    """
    found = []
    if header.snapshots:
        found.append(
            f"it has {header.snapshots} internal snapshot{'s' if header.snapshots > 1 else ''},"
            " which its children do not see"
        )
    if header.bitmap_directory is not None and header.bitmaps:
        count = header.bitmap_directory.count
        found.append(
            f"it has {count} persistent bitmap{'s' if count > 1 else ''}, which its children do"
            " not see"
        )
    return tuple(found)


def _require(name: str, problem: str | None, what: str) -> None:
    if problem is not None:
        raise refusal(
            name, what, problem, hint=filled(_HINTS[name], what) if name in _HINTS else None
        )


def _wrong_parent(header: Header, parent: str | None) -> str | None:
    if parent is None:
        return (
            None
            if header.backing_name is None
            else f"it is backed by {_shown(header)}, but should have no parent"
        )
    if header.backing_name is None:
        return f"nothing backs it, but its parent should be {parent!r}"
    return (
        None
        if _state_name(header) == parent
        else f"it is backed by {_shown(header)}, but its parent should be {parent!r}"
    )


def _state_name(header: Header) -> str | None:
    last = (header.backing_name or b"").rpartition(b"/")[2].decode("ascii", "replace")
    name = last.removesuffix(SUFFIX)
    return name if name != last and is_name(name) else None


def _shown(header: Header) -> str:
    name = header.backing_name or b""
    return repr(os.fsdecode(name[:100])) + ("..." if len(name) > 100 else "")
