"""The paths of the files in a pool. ``docs/formats.rst`` describes them in words."""

from __future__ import annotations

import re

from statepool.model.digest import Digest
from statepool.model.manifest import Kind, StateId
from statepool.model.names import ROOT
from statepool.model.pieces import PIECE, PIECES

READ_ONLY = 0o444
"""Permissions of the bytes of a state: they never change."""

FORMAT = 1
"""Version of everything in this layout, as ``pool.json`` names it."""

IN_PLACE = 2
"""
Version in the ``pool.json`` of a pool whose files cannot be renamed: a program that does not know
it would not heed condemnations.
"""

OURS = ".statepool"
POOL_FILE = f"{OURS}/pool.json"
DATA = f"{OURS}/data"
LOG = f"{OURS}/log"
INCOMING = f"{OURS}/incoming"
TRASH = f"{OURS}/trash"
LOCKS = f"{OURS}/locks"
USES = f"{OURS}/uses"
WORKING = f"{OURS}/working"

DIRECTORIES = (DATA, LOG, INCOMING, TRASH, LOCKS, USES)

IMAGE_SUFFIX = ".qcow2"
RAM_SUFFIX = ".state"

_DIGITS = 20
_CHECKPOINT = "checkpoint-"
_PART = "-part-"
_LIST = ".pieces"
_LOG_ENTRY = re.compile(rf"({_CHECKPOINT})?([0-9]{{{_DIGITS}}})\.json\Z")


def data(digest: Digest) -> str:
    """:returns: the file that holds the bytes of this name"""
    return f"{DATA}/{digest.file_name}"


def list_of(path: str) -> str:
    """:returns: the file that lists the digests of the pieces of the bytes in the file ``path``"""
    return f"{path}{_LIST}"


def has_pieces(digest: Digest, size: int) -> bool:
    """
    :returns: whether a list of pieces is kept for bytes of this size: for a single piece it would
        add nothing
    """
    return digest.algorithm == PIECES and size > PIECE


def data_of(name: str) -> Digest | None:
    """
    :returns: the digest of the bytes that the file ``name`` in ``data/`` holds, or whose pieces it
        lists; None for another file
    """
    return Digest.from_file_name(name.removesuffix(_LIST))


def trash(nonce: str, digest: Digest) -> str:
    """
    :returns: the file to which a collector moves bytes while it checks again whether they are
        needed
    """
    return f"{TRASH}/{nonce}-{digest.file_name}"


def untrashed(path: str) -> str:
    """:returns: the file in ``data/`` from which the file ``path`` in the trash comes"""
    return f"{DATA}/{path.rpartition('/')[2].partition('-')[2]}"


def trashed(name: str) -> Digest | None:
    """
    :returns: the digest of the bytes that the file ``name`` in the trash holds, or whose pieces it
        lists; None for a name that is not ours
    """
    return data_of(name.partition("-")[2])


def log(machine: str) -> str:
    """:returns: the directory of a machine's log"""
    return f"{LOG}/{machine}"


def record(machine: str, number: int) -> str:
    """:returns: the file of one record"""
    return f"{LOG}/{machine}/{number:0{_DIGITS}}.json"


def checkpoint(machine: str, number: int) -> str:
    """:returns: the file of the checkpoint that stands for all records up to ``number``"""
    return f"{LOG}/{machine}/{_CHECKPOINT}{number:0{_DIGITS}}.json"


def log_entry(name: str) -> tuple[bool, int] | None:
    """
    :returns: whether ``name`` is a checkpoint, and its number; None for a name that is neither a
        record nor a checkpoint
    """
    found = _LOG_ENTRY.match(name)
    return (found[1] is not None, int(found[2])) if found is not None else None


def marker(nonce: str) -> str:
    """:returns: the file that names the digests which a writer is about to need"""
    return f"{INCOMING}/{nonce}.json"


def incoming(nonce: str, digest: Digest) -> str:
    """:returns: the file in which a writer gathers bytes before they get their name"""
    return f"{INCOMING}/{nonce}-{digest.file_name}"


def gathered(nonce: str) -> str:
    """:returns: the file in which a writer gathers bytes whose digest is not known yet"""
    return f"{INCOMING}/{nonce}-bytes"


def part(nonce: str, digest: Digest) -> str:
    """
    :returns: the file in which a writer gathers bytes so that another writer can resume after an
        interruption
    """
    return f"{INCOMING}/{nonce}{_PART}{digest.file_name}"


def part_of(name: str) -> Digest | None:
    """
    :returns: the digest of the bytes whose beginning the file ``name`` in ``incoming/`` holds; None
        for another file
    """
    _, found, rest = name.partition(_PART)
    return Digest.from_file_name(rest) if found else None


def nonce_of(name: str) -> str:
    """:returns: the nonce of the marker to which the file ``name`` in ``incoming/`` belongs"""
    return name.partition(".")[0].partition("-")[0]


def view(state: StateId) -> str:
    """:returns: the path at which people, qemu-img and avocado-i2n find a state under its name"""
    if state.kind is Kind.RAM:
        return f"{state.object}/{state.state}{RAM_SUFFIX}"
    if state.state == ROOT:
        return f"{state.object}{IMAGE_SUFFIX}"
    return f"{state.object}/{state.state}{IMAGE_SUFFIX}"


def view_target(state: StateId, digest: Digest) -> str:
    """:returns: the target of the symbolic link in the view"""
    return "../" * view(state).count("/") + data(digest)


def is_view_target(text: str) -> bool:
    """:returns: whether ``text`` is the target of a symbolic link of ours"""
    return text.startswith("../") and text.replace("../", "").startswith(f"{DATA}/")
