"""
The files of a peer come into its directory of the day.

A file arrives under a temporary name. It is compared with the digest that the peer makes of it, if
it can, and with its length and time there after the copy; it is flushed, and renamed. Each file
that has its name is noted, with the length and the time that it had at the peer: so the next run of
the day knows what need not be brought again, also if this run is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property

from attrs import define, evolve, field, frozen

from statepool.beneath import Descriptor
from statepool.errors import DigestMismatch, IntegrityError, MissingFile, NoSpace, RefusedError
from statepool.model.digest import DEFAULT_ALGORITHM, Digest
from statepool.model.progress import NoProgress
from statepool.staging.day import MODE, Day
from statepool.staging.settings import WORK
from statepool.transports.base import FileKind, Stat, Transfer, Transport
from statepool.transports.failures import translating

TOGETHER = 32
"""The most files that are checked and flushed together."""

TOGETHER_BYTES = 64 << 20
"""The bytes of files from which on they are checked and flushed, while others are copied."""

FRESH_NS = 3_000_000_000
"""
Nanoseconds. A file that was changed so shortly before it was copied can be changed once more within
the resolution of its time, which SFTP gives in seconds: so its content is compared in the next run.
"""

LARGEST_NOTES = 256 << 20
"""The most bytes of notes that are read."""


@frozen
class StagedFile:
    """
    A file of a peer in the day's directory.

    :param name: its name
    :param size: its length, in bytes
    :param digest: of its bytes
    """

    name: str
    size: int
    digest: str


@frozen
class Brought:
    """
    What has come from a peer.

    :param staged: all its files that are in the day's directory now
    :param new: how many of them this run has brought
    :param sent: bytes that were moved for that
    :param left_out: names that are no regular files, which are not copied
    """

    staged: tuple[StagedFile, ...] = ()
    new: int = 0
    sent: int = 0
    left_out: tuple[str, ...] = ()


@frozen
class _Note:
    """
    A note of a file that has been brought.

    :param size: its length
    :param mtime_ns: its time at the peer
    :param digest: of its bytes
    :param fresh: whether its time says little, since it was copied directly afterwards
    :param copy: length and time of our copy, which tell whether it has been changed
    """

    size: int
    mtime_ns: int
    digest: str
    fresh: bool
    copy: tuple[int, int]

    @classmethod
    def read(cls, line: bytes) -> tuple[str, _Note] | None:
        """:returns: a name and its note; None if the line is not whole"""
        try:
            name, size, mtime_ns, digest, fresh, copy = json.loads(line)
            note = cls(int(size), int(mtime_ns), str(digest), bool(fresh), (copy[0], copy[1]))
        except (ValueError, TypeError, IndexError, KeyError):
            return None
        return str(name), note

    def written(self, name: str) -> bytes:
        """:returns: the line for it"""
        fields = [name, self.size, self.mtime_ns, self.digest, self.fresh, self.copy]
        return json.dumps(fields).encode() + b"\n"


class Stop(NoProgress):
    """A progress of transfers that ends them all, when it is set: a user has interrupted them."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """End the transfers."""
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether they end."""
        return self._event.is_set()

    def advance(self, count: int) -> None:
        """
        :raises KeyboardInterrupt: in the thread of a transfer that is to end
        """
        if self._event.is_set():
            raise KeyboardInterrupt


@define
class Notes:
    """
    The notes of what has been brought from a peer today, one line for each file.

    :param day: the day
    :param peer: the name of the peer
    """

    day: Day
    peer: str
    _opened: Descriptor | None = None

    @property
    def path(self) -> str:
        """The file, relative to the staging directory."""
        return self.day.below(WORK, f"{self.peer}.jsonl")

    def read(self) -> dict[str, _Note]:
        """
        Open the file.

        :returns: the last note of each name; lines that a crash has torn do not count
        """
        staging = self.day.staging
        with translating("open", staging.subject(self.path)):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
            opened = self._opened = staging.tree.open(self.path, flags, MODE)
            if staging.owner is not None:
                staging.owner.give(opened.number)
            content = os.pread(opened.number, LARGEST_NOTES, 0)
            if content and not content.endswith(b"\n"):
                os.write(opened.number, b"\n")
        return dict(filter(None, map(_Note.read, content.splitlines())))

    def add(self, name: str, note: _Note) -> None:
        """Note a file that has its name."""
        assert self._opened is not None
        with translating("write", self.day.staging.subject(self.path)):
            os.write(self._opened.number, note.written(name))

    def close(self) -> None:
        """Close the file."""
        if self._opened is not None:
            self._opened.close()


@frozen
class _Arrived:
    """A file that has arrived under its temporary name."""

    name: str
    there: Stat
    part: str
    opened: Descriptor
    digest: Digest
    begun_ns: int


@define(eq=False, slots=False)
class FileStager:
    """
    Brings the files of a peer's directory.

    :param day: where to
    :param peer: the name of the peer
    :param transport: reads its directory
    :param stop: ends the transfers
    :param compare: whether times there mean nothing, so that files are compared by their digests
    """

    day: Day
    peer: str
    transport: Transport
    stop: Stop = field(factory=Stop)
    compare: bool = False
    _notes: Notes = field(init=False)
    _known: dict[str, _Note] = field(factory=dict, init=False)
    _again: list[str] = field(factory=list, init=False)
    _sent: int = field(default=0, init=False)
    _mismatched: set[str] = field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        self._notes = Notes(self.day, self.peer)

    def run(self, names: Iterable[str]) -> Brought:
        """
        :param names: the regular files there
        :raises IntegrityError: a file changes whenever it is copied, or does not arrive as it is
            there
        :raises MissingFile: a file has gone
        :raises NoSpace: they do not fit
        """
        self.day.staging.make(self.day.below(self.peer))
        self.day.staging.make(self.day.below(WORK, self.peer))
        try:
            self._known = self._notes.read()
            found = self._look(sorted(names))
            wanted = self._wanted(found)
            self._bring(wanted)
            if self._again:
                again = self._look(self._again)
                found.update(again)
                self._again = []
                self._bring(again)
            if self._again:
                name = self._again[0]
                raise IntegrityError(
                    f"{name} of {self.transport.location} changes while it is copied",
                    hint="stage it when it is complete: its indicator came too early",
                    path=name,
                )
        finally:
            self._notes.close()
        self._sweep()
        staged = (
            StagedFile(name, one.size, self._known[name].digest) for name, one in found.items()
        )
        return Brought(tuple(staged), new=len(wanted), sent=self._sent)

    @cached_property
    def _algorithm(self) -> str | None:
        """The algorithm of digests that the peer makes; asked for when a file is brought."""
        return self.transport.far_algorithm

    # -- what to bring -----------------------------------------------------------------------------

    def _look(self, names: list[str]) -> dict[str, Stat]:
        found = dict(zip(names, self.transport.stat_many(names), strict=True))
        whole = {name: one for name, one in found.items() if one is not None}
        for name, one in found.items():
            if one is None or one.kind is not FileKind.FILE:
                raise MissingFile(
                    f"{name} of {self.transport.location} was there, and is not any more",
                    hint="stage it when it is complete: its indicator came too early",
                    path=name,
                )
        return whole

    def _wanted(self, found: dict[str, Stat]) -> dict[str, Stat]:
        doubtful: dict[str, Stat] = {}
        wanted: dict[str, Stat] = {}
        for name, there in found.items():
            note = self._known.get(name)
            if note is None or note.size != there.size or not self._is_kept(name, note):
                wanted[name] = there
            elif not there.size:
                continue  # one empty file is like another
            elif self.compare:
                doubtful[name] = there
            elif note.mtime_ns != there.mtime_ns:
                wanted[name] = there
            elif note.fresh:
                doubtful[name] = there
        for name, digest in zip(doubtful, self._digests(doubtful), strict=True):
            note = self._known[name]
            if digest is None or str(digest) != note.digest:
                wanted[name] = doubtful[name]
            elif time.time_ns() - note.mtime_ns > FRESH_NS:
                self._known[name] = evolve(note, fresh=False)
                self._notes.add(name, self._known[name])
        return wanted

    def _is_kept(self, name: str, note: _Note) -> bool:
        """:returns: whether our copy is still what was brought"""
        ours = self.day.staging.files.stat(self.day.below(self.peer, name))
        return (
            ours is not None
            and ours.kind is FileKind.FILE
            and (ours.size, ours.mtime_ns) == note.copy
        )

    def _digests(self, files: dict[str, Stat]) -> list[Digest | None]:
        """:returns: digests of files there, none of which is moved"""
        if self.transport.capabilities.local:
            return [
                self.transport.digest(name, Transfer(one.size, DEFAULT_ALGORITHM))
                for name, one in files.items()
            ]
        if not files or self._algorithm is None:
            return [None] * len(files)
        return self.transport.far_digests({name: one.size for name, one in files.items()})

    # -- bringing ----------------------------------------------------------------------------------

    def _bring(self, wanted: dict[str, Stat]) -> None:
        """Copy files; those before them are checked and flushed meanwhile."""
        pending: list[Future[None]] = []
        batch: list[_Arrived] = []
        with ExitStack() as stack:
            settling = ThreadPoolExecutor(1, thread_name_prefix=f"statepool-stage-{self.peer}")
            stack.callback(settling.shutdown, wait=True, cancel_futures=True)
            for name, there in wanted.items():
                self.stop.advance(0)
                arrived = self._copy(name, there)
                if arrived is not None:
                    batch.append(arrived)
                total = sum(one.there.size for one in batch)
                if len(batch) >= TOGETHER or total >= TOGETHER_BYTES:
                    if len(pending) > 1:
                        pending.pop(0).result()
                    pending.append(settling.submit(self._settle, batch))
                    batch = []
            pending.append(settling.submit(self._settle, batch))
            for future in pending:
                future.result()

    def _part(self, name: str, there: Stat) -> str:
        """:returns: the temporary name of a file: another one if it is changed"""
        key = json.dumps([name, there.size, there.mtime_ns]).encode()
        return self.day.below(WORK, self.peer, f"{hashlib.sha256(key).hexdigest()[:32]}.part")

    def _copy(self, name: str, there: Stat) -> _Arrived | None:
        """:returns: the file under its temporary name; None if it changed meanwhile"""
        staging, part, begun = self.day.staging, self._part(name, there), time.time_ns()
        subject = staging.subject(part)
        with translating("make", subject):
            opened = staging.tree.open(part, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, MODE)
            done = self._done(opened.number, there)
            if not done:
                os.ftruncate(opened.number, 0)
        # To ask for an algorithm takes longer than to bring an indicator, which is empty.
        algorithm = (self._algorithm if there.size else None) or DEFAULT_ALGORITHM
        transfer = Transfer(there.size, algorithm, progress=self.stop, done=done)
        try:
            moved = self.transport.fetch(name, opened.number, transfer)
        except NoSpace:
            opened.close()  # the error refers to it, and its bytes would go on taking room
            staging.files.remove(part)
            raise
        except IntegrityError:
            # Of another length than it had, or shorter by the end.
            opened.close()
            staging.files.remove(part)
            now = self.transport.stat(name)
            if now is not None and (now.size, now.mtime_ns) == (there.size, there.mtime_ns):
                raise
            self._again.append(name)
            return None
        self._sent += moved.sent
        return _Arrived(name, there, part, opened, moved.digest, begun)

    def _done(self, descriptor: int, there: Stat) -> int:
        """
        :returns: how many bytes an earlier run has brought. They count only if the peer's digest
            will show whether they are right.
        """
        found = os.fstat(descriptor).st_size
        if not 0 < found <= there.size or not self.transport.capabilities.resumes:
            return 0
        return found if self._algorithm is not None else 0

    def _settle(self, batch: list[_Arrived]) -> None:
        """Check files that have arrived, and give them their names."""
        if not batch:
            return
        names = [one.name for one in batch]
        digests: dict[str, Digest | None] = {}
        if not self.transport.capabilities.local:
            files = {one.name: one.there for one in batch if one.there.size}
            digests = dict(zip(files, self._digests(files), strict=True))
        for one, now in zip(batch, self.transport.stat_many(names), strict=True):
            digest = digests.get(one.name)
            with one.opened as descriptor:
                changed = now is None or (now.size, now.mtime_ns) != (
                    one.there.size,
                    one.there.mtime_ns,
                )
                if changed or (digest is not None and digest != one.digest):
                    self.day.staging.files.remove(one.part)
                    self._once_more(one, digest, changed)
                else:
                    self._name(one, descriptor)
        self.day.staging.files.flush(self.day.below(self.peer))

    def _once_more(self, one: _Arrived, digest: Digest | None, changed: bool) -> None:
        if not changed and one.name in self._mismatched:
            raise DigestMismatch(
                f"{one.name} does not arrive as it is in {self.transport.location}",
                expected=str(digest),
                actual=str(one.digest),
                path=one.name,
                hint="look at the memory and the disks of both hosts",
            )
        self._mismatched.add(one.name)
        self._again.append(one.name)

    def _name(self, one: _Arrived, descriptor: int) -> None:
        staging, target = self.day.staging, self.day.below(self.peer, one.name)
        with translating("write", staging.subject(target), needed=one.there.size):
            if staging.owner is not None:
                staging.owner.give(descriptor)
            os.fsync(descriptor)
            ours = os.fstat(descriptor)
        found = staging.files.stat(target)
        if found is not None and found.kind is FileKind.DIRECTORY:
            raise RefusedError(
                f"{staging.subject(target).text} is a directory: no file can have its name",
                hint="find out what made it, and remove it",
            )
        staging.files.rename(one.part, target)
        note = _Note(
            one.there.size,
            one.there.mtime_ns,
            str(one.digest),
            one.there.mtime_ns > one.begun_ns - FRESH_NS,
            (ours.st_size, ours.st_mtime_ns),
        )
        self._known[one.name] = note
        self._notes.add(one.name, note)

    def _sweep(self) -> None:
        """Remove what earlier runs have left unfinished, now that all is there."""
        directory = self.day.below(WORK, self.peer)
        for entry in self.day.staging.files.scan(directory):
            if entry.kind is FileKind.FILE:
                self.day.staging.files.remove(f"{directory}/{entry.name}")
        self.day.staging.files.remove_directory(directory)


def regular(names: Iterator[tuple[str, FileKind]]) -> tuple[list[str], tuple[str, ...]]:
    """
    :param names: the entries of a directory of a peer
    :returns: the names of regular files, and those that are left out
    :raises IntegrityError: a name is none: the peer wants its file to be put elsewhere
    """
    files: list[str] = []
    others: list[str] = []
    for name, kind in names:
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise IntegrityError(
                f"the peer names a file {name!r}", hint="look at its SFTP server: it cannot be"
            )
        (files if kind is FileKind.FILE else others).append(name)
    return files, tuple(sorted(others))
