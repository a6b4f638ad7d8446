"""
The contents of one archive of a pool: an index, files of logs, and all that follows from them.

Such an archive is a tar that is, unpacked, a pool (level 0), or adds to one what came after the
level below. As in a bundle, every byte that is not data is a function of what was read before:
the index names the files of the logs with their digests, and these name the states with their
digests, lengths and holes. A reader compares the bytes that arrive with the bytes that must arrive,
and interprets no header of the tar. ``docs/archive-pools.rst`` describes the format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from attrs import asdict, evolve, field, frozen

from statepool.bundles.contents import (
    END,
    MEMBER_DIRECTORY,
    data_header,
    directory,
    link,
    member,
)
from statepool.errors import BadRecord, InvalidName
from statepool.model.decoding import Form
from statepool.model.digest import Digest
from statepool.model.manifest import Extents, Manifest, StateId
from statepool.model.names import check_name
from statepool.pools import layout
from statepool.pools.fold import Fold, Publish
from statepool.pools.log import MAX_RECORD
from statepool.pools.records import Checkpoint, Record, apply, decode, encode
from statepool.transports.base import MOST_TOGETHER
from statepool.transports.failures import Subject, require_few_holes

PROVIDER = "pool"
"""The name of the archiver of pools."""

FORMAT = 1
"""The version of the format of the index."""

MOST_INDEX = MAX_RECORD
"""The most bytes of an index: it is held in memory."""

MOST_LOGS = MOST_TOGETHER
"""The most bytes of all files of logs in one archive: they are held in memory together."""

HINT = "take another copy of this archive, or an older one"
"""What to do about an archive that cannot be used."""

_NO_CHECKSUM = "0" * 64
_BLOCK = 512
_NUMBER = 20


def index_path(level: int) -> str:
    """:returns: the path of the index of a level, where it is unpacked"""
    return f"{layout.OURS}/archive-{level}.json"


@frozen
class Origin:
    """
    What ``pool.json`` says, by which a pool is recognised wherever it is reached.

    :param created: when it was made, in seconds since the epoch
    :param creator: what made it
    """

    created: float
    creator: str

    @classmethod
    def read(cls, content: bytes, where: str) -> Origin:
        """
        :param content: of ``pool.json``
        :raises BadRecord: it is damaged
        """
        data = decode(content, where, known=layout.IN_PLACE)
        created, creator = data.get("created"), data.get("creator")
        return cls(
            float(created) if isinstance(created, int | float) else 0.0,
            creator if isinstance(creator, str) else "",
        )

    @property
    def content(self) -> bytes:
        """The content of ``pool.json`` in an archive, and of the restored pool."""
        return encode({"format": layout.FORMAT, **asdict(self)})


@frozen
class Position:
    """
    Up to where a log was read.

    :param number: of the last record
    :param nonce: of this record
    """

    number: int
    nonce: str


@frozen
class LogFile:
    """
    A file of a log that is in the archive.

    :param name: relative to the directory of logs
    :param size: in bytes
    :param digest: of its content
    """

    name: str
    size: int
    digest: Digest

    @property
    def machine(self) -> str:
        """The machine of the log."""
        return self.name.partition("/")[0]

    @property
    def path(self) -> str:
        """Its path in the pool."""
        return f"{layout.LOG}/{self.name}"


@frozen
class Selection:
    """
    Which objects are archived. A pattern is one of the shell, and is compared with ``OBJECT`` and
    with ``OBJECT:STATE``; a ``*`` also matches ``/``.

    :param objects: patterns of what is archived; all if there are none
    :param exclude: patterns of what is left out, unless what is archived stands on it
    """

    objects: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@frozen
class Index:
    """
    The first file of an archive.

    :param format: its version
    :param checksum: of the index, computed while this field is all zeros: by it the next level says
        what it stands on
    :param level: how many levels this one stands on
    :param base: the checksum of the level below; None for level 0
    :param pool: by which the pool is recognised
    :param location: from where it was read, for people
    :param time: when it was read, in seconds since the epoch
    :param selection: which objects are archived
    :param machines: up to where each log was read
    :param logs: the files of logs in this archive
    :param data: the bytes in this archive, in their order
    """

    format: int
    checksum: str
    level: int
    base: str | None
    pool: Origin
    location: str
    time: float
    selection: Selection
    machines: dict[str, Position]
    logs: tuple[LogFile, ...]
    data: tuple[Digest, ...]

    def sealed(self) -> tuple[Index, bytes]:
        """:returns: the same with its checksum, and the content of its file"""
        blank = encode(asdict(evolve(self, checksum=_NO_CHECKSUM)))
        checksum = Digest.of_text(blank).hex
        return evolve(self, checksum=checksum), _with_checksum(blank, _NO_CHECKSUM, checksum)

    @classmethod
    def read(cls, content: bytes, where: str) -> Index:
        """
        :param where: the archive, for messages
        :raises BadRecord: it is damaged, or breaks a rule
        :raises UnsupportedFormat: it is of a newer format
        """
        what = f"the index of {where}"
        data = decode(content, what, HINT, known=FORMAT)
        try:
            found: Index = _INDEX.convert(data, what)
            found._check(what)
        except InvalidName as error:
            raise BadRecord(f"{what}: {error.message}", path=where, hint=HINT) from error
        except BadRecord as error:
            raise BadRecord(error.message, path=where, hint=HINT) from error
        blank = _with_checksum(content, found.checksum, _NO_CHECKSUM)
        if Digest.of_text(blank).hex != found.checksum:
            raise BadRecord(f"{what} is damaged", path=where, hint=HINT)
        return found

    def _check(self, what: str) -> None:
        if self.level < 0 or (self.base is None) != (self.level == 0):
            raise BadRecord(f"{what} has the level {self.level}, and a wrong base")
        for machine, position in self.machines.items():
            check_name(machine, "a machine")
            if not 0 < position.number < 10**_NUMBER:
                raise BadRecord(f"{what} has the record {position.number} of {machine}")
        if len(set(self.data)) != len(self.data) or len({log.name for log in self.logs}) != len(
            self.logs
        ):
            raise BadRecord(f"{what} lists something twice")
        if any(log.machine not in self.machines for log in self.logs):
            raise BadRecord(f"{what} has a log of a machine that it does not list")
        if any(not 0 < log.size <= MAX_RECORD for log in self.logs):
            raise BadRecord(f"{what} has a log that is too long")
        if sum(log.size for log in self.logs) > MOST_LOGS:
            raise BadRecord(f"{what} has logs of more than {MOST_LOGS >> 20} MiB")


_INDEX = Form(Index)


def _with_checksum(content: bytes, old: str, new: str) -> bytes:
    return content.replace(b'"%s"' % old.encode(), b'"%s"' % new.encode(), 1)


@frozen(slots=False)
class LogPart:
    """
    What an archive has of one log.

    :param checkpoint: the states at the position of the archive; None if only records are there
    :param records: those that came after the level below; with a checkpoint, only the last one
    """

    checkpoint: Checkpoint | None
    records: tuple[Record, ...]

    @cached_property
    def fold(self) -> Fold | None:
        """The states of the checkpoint; other code copies it before it changes it."""
        return self.checkpoint.fold() if self.checkpoint is not None else None

    @property
    def manifests(self) -> Iterator[Manifest]:
        """The states that are named in it, in their order."""
        if self.checkpoint is not None:
            yield from self.checkpoint.superseded
            yield from self.checkpoint.states
            return
        for record in self.records:
            for change in record.changes:
                if isinstance(change, Publish):
                    yield change.manifest

    @property
    def named(self) -> dict[StateId, Manifest]:
        """The states that have a name because of it."""
        if self.checkpoint is not None:
            return {manifest.id: manifest for manifest in self.checkpoint.states}
        found: dict[StateId, Manifest] = {}
        for record in self.records:
            for change in record.changes:
                if isinstance(change, Publish):
                    found[change.id] = change.manifest
                else:
                    found.pop(change.id, None)
        return found


def fold_of(machine: str, parts: Iterable[LogPart], where: str) -> Fold:
    """
    :param parts: of the log, of the levels from 0 on
    :param where: for messages
    :returns: the states after the last one
    :raises BadRecord: they do not continue each other, or break a rule
    """
    fold = Fold(machine)
    for part in parts:
        if part.fold is not None:
            fold = part.fold.copy()
            continue
        for record in part.records:
            apply(fold, record, f"record {record.number} of {machine} in {where}")
    return fold


@frozen(slots=False)
class Contents:
    """
    The contents of one archive of a pool.

    :param index: its index
    :param head: the content of the file of the index
    :param logs: the contents of the files of logs, by their names, in the order of the index
    :param parts: the same, by machine
    """

    index: Index
    head: bytes
    logs: Mapping[str, bytes]
    parts: Mapping[str, LogPart] = field(repr=False)

    @classmethod
    def of(
        cls, index: Index, logs: Mapping[str, bytes], *, needed: set[Digest], where: str
    ) -> Contents:
        """
        :param index: without logs, data and checksum
        :param logs: the contents of the files of logs, by their names
        :param needed: the bytes that must be in this archive
        :param where: for messages
        :raises BadRecord: the logs do not say how long these bytes are: they were there before, and
            the levels below lack them
        """
        files = tuple(
            LogFile(name, len(content), Digest.of_text(content)) for name, content in logs.items()
        )
        parts = _parts(index.machines, logs, where)
        told = (manifest.digest for part in parts.values() for manifest in part.manifests)
        data = tuple(dict.fromkeys(one for one in told if one is not None and one in needed))
        if lacking := needed - set(data):
            raise BadRecord(
                f"the levels below {where} lack the bytes {min(lacking)}",
                hint="begin again with level 0",
            )
        sealed, head = evolve(index, logs=files, data=data).sealed()
        if len(head) > MOST_INDEX or sum(log.size for log in files) > MOST_LOGS:
            raise BadRecord(
                f"the logs of {len(index.machines)} machines, and {len(data)} states, are more than"
                " one archive can have",
                hint="archive some objects at a time, with patterns",
            )
        return cls(sealed, head, dict(logs), parts)

    @classmethod
    def read(cls, index: Index, head: bytes, logs: Mapping[str, bytes], where: str) -> Contents:
        """
        :param logs: the contents of the files of logs; their digests have been checked
        :param where: the archive, for messages
        :raises BadRecord: they break a rule
        :raises IntegrityError: there are more holes than a reader accepts
        """
        try:
            contents = cls(index, head, logs, _parts(index.machines, logs, where))
            assert len(contents.files) == len(index.data)
        except BadRecord as error:
            told = f"the archive {where} cannot be believed: {error.message}"
            raise BadRecord(told, path=where, hint=HINT) from error
        for manifest in contents.files:
            subject = Subject(f"{manifest.id} in {where}", path=where)
            require_few_holes(manifest.size - manifest.data_size, subject)
        return contents

    @cached_property
    def files(self) -> tuple[Manifest, ...]:
        """The states whose bytes are in the archive, in the order of the bytes."""
        wanted = set(self.index.data)
        found: dict[Digest, Manifest] = {}
        for part in self.parts.values():
            for manifest in part.manifests:
                if manifest.digest in wanted and manifest.digest is not None:
                    first = found.setdefault(manifest.digest, manifest)
                    if first.size != manifest.size:
                        raise BadRecord(
                            f"{first.id} and {manifest.id} are the same bytes of other lengths"
                        )
        if len(found) < len(wanted):
            raise BadRecord("it has bytes that no state needs")
        return tuple(placed(found[digest]) for digest in self.index.data)

    @property
    def before_logs(self) -> Iterator[tuple[str, bytes]]:
        """The members before the files of logs, with their names."""
        yield layout.OURS, MEMBER_DIRECTORY
        path = index_path(self.index.level)
        yield path, member(path, self.head)
        yield from ((name, directory(name)) for name in layout.DIRECTORIES)
        yield layout.POOL_FILE, member(layout.POOL_FILE, self.index.pool.content)

    @property
    def log_members(self) -> Iterator[tuple[str, bytes]]:
        """The members that are files of logs, with their names."""
        for log in self.index.logs:
            yield log.path, member(log.path, self.logs[log.name])

    @property
    def after_data(self) -> Iterator[tuple[str, bytes]]:
        """The members after the data: the view; and the end."""
        for part in self.parts.values():
            for state, manifest in sorted(part.named.items()):
                if manifest.digest is not None:
                    path = layout.view(state)
                    yield path, link(path, layout.view_target(state, manifest.digest))
        yield "the end", END


def placed(manifest: Manifest) -> Manifest:
    """:returns: the same, with extents of whole blocks of tar"""
    return evolve(manifest, extents=in_blocks(manifest.extents, manifest.size))


def in_blocks(extents: Extents, size: int) -> Extents:
    """
    :param extents: of a file, in order
    :param size: of the file, in bytes
    :returns: extents that have these in them, and consist of whole blocks of tar, but for the end
        of the file; empty if they are all of it
    """
    found: list[tuple[int, int]] = []
    for offset, length in extents:
        start = offset // _BLOCK * _BLOCK
        end = min(-(-(offset + length) // _BLOCK) * _BLOCK, size)
        if found and start <= sum(found[-1]):
            start = found.pop()[0]
        found.append((start, end - start))
    return tuple(found) if found != [(0, size)] else ()


def header_of(manifest: Manifest) -> bytes:
    """:returns: what precedes the bytes of a state in the tar"""
    return data_header(manifest)


def _parts(
    machines: Mapping[str, Position], logs: Mapping[str, bytes], where: str
) -> dict[str, LogPart]:
    """
    :returns: the logs by machine
    :raises BadRecord: the files of a log are neither a checkpoint with its record, nor consecutive
        records up to the position
    """
    by_machine: dict[str, list[tuple[bool, int, bytes]]] = {}
    for name, content in logs.items():
        machine, _, file = name.partition("/")
        entry = layout.log_entry(file)
        if entry is None or machine not in machines:
            raise BadRecord(f"{name!r} is no file of a log")
        by_machine.setdefault(machine, []).append((*entry, content))
    return {
        machine: _part(machine, machines[machine], entries, where)
        for machine, entries in by_machine.items()
    }


def _part(
    machine: str, position: Position, entries: Sequence[tuple[bool, int, bytes]], where: str
) -> LogPart:
    checkpoints = [one for one in entries if one[0]]
    numbers = [number for is_checkpoint, number, _ in entries if not is_checkpoint]
    wanted = list(range(position.number - len(numbers) + 1, position.number + 1))
    if numbers != wanted or not numbers or numbers[0] < 1 or len(checkpoints) > 1:
        raise BadRecord(f"the log of {machine} in it has gaps")
    records = tuple(
        Record.from_bytes(content, number, f"record {number} of {machine} in {where}")
        for is_checkpoint, number, content in entries
        if not is_checkpoint
    )
    if records[-1].nonce != position.nonce:
        raise BadRecord(f"the log of {machine} in it ends with another record than it says")
    if not checkpoints:
        return LogPart(None, records)
    _, number, content = checkpoints[0]
    if number != position.number or len(records) > 1:
        raise BadRecord(f"the log of {machine} in it has a checkpoint that is not its last record")
    told = f"checkpoint {number} of {machine} in {where}"
    part = LogPart(Checkpoint.from_bytes(content, machine, number, told), records)
    if part.fold is None or part.fold.nonces.get(number) != position.nonce:
        raise BadRecord(f"the checkpoint of {machine} in it has another last record")
    return part


def index_of(
    *,
    level: int,
    base: str | None,
    pool: Origin,
    location: str,
    time: float,
    selection: Selection,
    machines: dict[str, Position],
) -> Index:
    """:returns: an index without logs, data and checksum"""
    facts: dict[str, Any] = {"level": level, "base": base, "pool": pool, "location": location}
    facts |= {"time": time, "selection": selection, "machines": machines}
    return Index(FORMAT, _NO_CHECKSUM, logs=(), data=(), **facts)
