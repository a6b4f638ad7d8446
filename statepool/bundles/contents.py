"""
The contents of a bundle: one record, and all that follows from it.

The record names the states with their digests, lengths and holes. Every other byte of the archive
that is not data is a function of it: headers, maps of holes, padding, symbolic links. A writer
writes these bytes, and a reader compares them. So a reader interprets nothing that an attacker
could have put into a tar header: from all headers it reads only one number, the length of the
record.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from attrs import evolve, frozen

from statepool.bundles.stream import HINT
from statepool.errors import BadRecord, IntegrityError, UnsupportedFormat
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest
from statepool.pools import layout
from statepool.pools.fold import Change, Fold, Publish
from statepool.pools.parts import chains_of, parts_in
from statepool.pools.records import Record, encode
from statepool.transports.failures import Subject, require_few_holes

BLOCK = 512
"""The block size to which headers and contents are padded (``man 5 tar``)."""

MOST_RECORD = 8 << 20
"""The most bytes of the record: it is held in memory, where it takes many times as much."""

_WRITER = "statepool export"
_NO_NONCE = "0" * 16


def padding(size: int) -> bytes:
    """:returns: the zeros that pad a member of ``size`` bytes"""
    return bytes(-size % BLOCK)


def header(
    name: str,
    *,
    size: int = 0,
    mode: int = 0o444,
    kind: bytes = tarfile.REGTYPE,
    target: str = "",
    facts: Mapping[str, str] | None = None,
) -> bytes:
    """:returns: the header of a member, the same on every host and at any time"""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.type, info.linkname = size, mode, kind, target
    info.pax_headers = dict(facts or {})
    if not facts:
        # A name or size that does not fit into the older format gets an extra header before this
        # one.
        with contextlib.suppress(ValueError):
            return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    return info.tobuf(tarfile.PAX_FORMAT, "ascii", "strict")


def directory(name: str) -> bytes:
    """:returns: the member that makes a directory"""
    return header(name, mode=0o755, kind=tarfile.DIRTYPE)


def member(name: str, content: bytes) -> bytes:
    """:returns: the member that is a small file"""
    return header(name, size=len(content), mode=0o644) + content + padding(len(content))


def link(name: str, target: str) -> bytes:
    """:returns: the member that is a symbolic link"""
    return header(name, mode=0o777, kind=tarfile.SYMTYPE, target=target)


MEMBER_DIRECTORY = directory(layout.OURS)
"""The first member: the directory that has everything but the view."""

POOL = encode({"format": layout.FORMAT, "creator": _WRITER})
"""The content of ``pool.json``."""

PRELUDE = b"".join(
    [
        *map(directory, (layout.OURS, *layout.DIRECTORIES)),
        member(layout.POOL_FILE, POOL),
    ]
)
"""The beginning of every bundle: the directories of a pool, and the file that marks it as one."""

END = bytes(2 * BLOCK)
"""The end of every archive."""

_SIZE = slice(124, 136)
_OCTAL = re.compile(rb"[0-7]{11}\0")


def record_size(header: bytes) -> int | None:
    """
    :param header: one block
    :returns: the length of the record according to this header; None if it is no header
    """
    size = header[_SIZE]
    return int(size[:-1], 8) if _OCTAL.fullmatch(size) else None


def data_header(manifest: Manifest) -> bytes:
    """
    :param manifest: of a state with bytes
    :returns: what precedes its bytes: a header, and for a file with holes the map of GNU tar (PAX,
        version 1.0)
    """
    assert manifest.digest is not None
    name = layout.data(manifest.digest)
    if not manifest.extents:
        return header(name, size=manifest.size)
    extents = list(manifest.extents)
    if sum(extents[-1]) < manifest.size:
        extents.append((manifest.size, 0))  # so that an unpacked file has its full length
    numbers = (len(extents), *(number for extent in extents for number in extent))
    places = "".join(f"{number}\n" for number in numbers).encode()
    places += padding(len(places))
    facts = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(manifest.size),
    }
    size = len(places) + manifest.data_size
    return header(f"GNUSparseFile.0/{manifest.digest.file_name}", size=size, facts=facts) + places


@frozen(slots=False)
class Contents:
    """
    The contents of a bundle.

    :param manifests: of the states, each after the states that back it and that it lists; the last
        one is the exported state
    :param record: the content of the one record of its log
    """

    manifests: tuple[Manifest, ...]
    record: bytes

    @classmethod
    def of(cls, parts: Sequence[Manifest]) -> Contents:
        """
        :param parts: of a state, see :mod:`~statepool.pools.parts`, with extents that depend only
            on the bytes
        :returns: the contents of its bundle
        :raises IntegrityError: its texts are so many and so long that a reader would refuse them
        """
        manifests = tuple(map(_bare, _in_order(parts)))
        record = _written(manifests, _NO_NONCE)
        nonce = _checksum(record)
        record = _written(manifests, nonce)
        if len(record) > MOST_RECORD:
            told = f"what is known of {manifests[-1].id} and its chain takes {len(record)} bytes"
            raise IntegrityError(
                f"{told}, more than the {MOST_RECORD} that a bundle can have",
                object=manifests[-1].object,
                state=manifests[-1].state,
                hint="set it anew with shorter labels, or copy it with: statepool sync FROM TO",
            )
        return cls(manifests, record)

    @classmethod
    def read(cls, record: bytes, where: str) -> Contents:
        """
        :param where: the bundle, for messages
        :raises BadRecord: it is not the record of a bundle, or damaged
        :raises IntegrityError: it has more holes than a reader accepts
        :raises UnsupportedFormat: it is of a newer format
        """
        try:
            found = Record.from_bytes(record, 1, "its record")
            blank = record.replace(found.nonce.encode(), _NO_NONCE.encode(), 1)
            if _checksum(blank) != found.nonce:
                raise BadRecord("its record is damaged")
            manifests = _published(found.changes)
            fold = Fold(manifests[-1].id.machine)
            fold.apply(1, found.nonce, found.changes)
            if _in_order(parts_in(fold, manifests[-1])) != manifests:
                raise BadRecord("its record has other states than one with its chain, in order")
            _check_places(manifests)
        except BadRecord as error:
            told = f"the bundle {where} cannot be believed: {error.message}"
            raise BadRecord(told, path=where, hint=HINT) from error
        except UnsupportedFormat as error:
            told = f"the bundle {where}: {error.message}"
            raise UnsupportedFormat(told, path=where, hint=error.hint) from error
        contents = cls(manifests, record)
        holes = sum(manifest.size - manifest.data_size for manifest in contents.files)
        require_few_holes(holes, Subject(where, path=where))
        return contents

    @property
    def tip(self) -> Manifest:
        """The state that was exported."""
        return self.manifests[-1]

    @cached_property
    def files(self) -> tuple[Manifest, ...]:
        """The states whose bytes are in the bundle, in the order of the bytes: each digest once."""
        found: dict[Digest, Manifest] = {}
        for manifest in self.manifests:
            if manifest.digest is not None:
                found.setdefault(manifest.digest, manifest)
        return tuple(found.values())

    @property
    def record_path(self) -> str:
        """The path of the record."""
        return layout.record(self.tip.id.machine, 1)

    @cached_property
    def record_file(self) -> bytes:
        """The member that holds the record."""
        return member(self.record_path, self.record)

    @property
    def beginning(self) -> bytes:
        """The bytes before the data."""
        return PRELUDE + self.record_file

    @property
    def size(self) -> int:
        """Bytes of the whole bundle, not compressed."""
        files = sum(
            len(data_header(one)) + one.data_size + len(padding(one.data_size))
            for one in self.files
        )
        return len(self.beginning) + files + len(self.closing)

    @cached_property
    def closing(self) -> bytes:
        """The bytes after the data: the view, and the end."""
        links = (
            link(layout.view(manifest.id), layout.view_target(manifest.id, manifest.digest))
            for manifest in self.manifests
            if manifest.digest is not None
        )
        return b"".join([*links, END])


def _in_order(parts: Sequence[Manifest]) -> tuple[Manifest, ...]:
    """:returns: the parts of a state in the order of a fetch"""
    chains = chains_of(parts, lambda manifest: manifest)
    machine = (part for part in parts if part.kind is Kind.MACHINE)
    return (*(link for chain in chains for link in reversed(chain)), *machine)


def _bare(manifest: Manifest) -> Manifest:
    """:returns: the part of a manifest that is the same in every cache that has the state"""
    return evolve(
        manifest,
        origin=None,
        extents=manifest.extents if manifest.extents != ((0, manifest.size),) else (),
        creator=_sorted(manifest.creator),
        labels=_sorted(manifest.labels),
        fingerprint=_sorted(manifest.fingerprint),
        members={name: manifest.members[name] for name in sorted(manifest.members)},
    )


def _sorted(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: texts[name] for name in sorted(texts)}


def _written(manifests: Iterable[Manifest], nonce: str) -> bytes:
    changes = tuple(map(Publish, manifests))
    time = max(change.manifest.created for change in changes)
    return Record(1, nonce, time, _WRITER, changes).to_bytes()


def _checksum(record: bytes) -> str:
    """
    Return the nonce of a record: a checksum. With it the record is the same wherever it is written,
    and a damaged record is detected.

    :param record: without its nonce
    """
    return hashlib.blake2b(record, digest_size=8).hexdigest()


def _published(changes: Iterable[Change]) -> tuple[Manifest, ...]:
    for change in changes:
        if not isinstance(change, Publish) or change.supersedes is not None:
            raise BadRecord(f"it does not only publish, but has {change}")
    found = tuple(change.manifest for change in changes if isinstance(change, Publish))
    if found[-1].kind is Kind.RAM:
        raise BadRecord(f"it has {found[-1].id} without its machine")
    return found


def _check_places(manifests: Iterable[Manifest]) -> None:
    """
    Check the data extents of files: tar has only whole blocks, and equal files must have equal
    holes.

    :raises BadRecord: an extent is not allowed
    """
    seen: dict[Digest | None, Manifest] = {}
    for manifest in manifests:
        first = seen.setdefault(manifest.digest, manifest)
        if (first.size, first.extents) != (manifest.size, manifest.extents):
            raise BadRecord(f"{first.id} and {manifest.id} are the same bytes of other lengths")
        for offset, length in manifest.extents:
            if offset % BLOCK or (length % BLOCK and offset + length != manifest.size):
                raise BadRecord(f"{manifest.id} has data that is no blocks of tar, at {offset}")
