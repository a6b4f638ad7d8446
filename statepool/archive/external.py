"""The archiver that runs GNU tar: levels, holes, and everything else that GNU tar can store."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Any, ClassVar, Self

from statepool.archive.archiver import Archiver
from statepool.archive.definition import (
    BackupDefinition,
    BackupType,
    Event,
    EventKind,
    SubOperation,
)
from statepool.archive.tree import excluded_events, included, size_of_tree
from statepool.archive.writing import Job
from statepool.errors import NoSpace, StatePoolError, ToolError

PROGRAM = "tar"
"""The program: GNU tar."""

_READ = 1 << 20
"""Bytes that are read from the program at a time; also the capacity of the pipe."""

_MOST_MESSAGES = 20
"""Messages of the program that an error quotes at most."""

_WARNING = 1
"""The exit code of GNU tar if files changed while they were read (its manual, "Exit status")."""


class ExternalArchiver(Archiver):
    """An archiver that runs GNU tar. Its archives have the format of POSIX.1-2001 ("pax")."""

    name: ClassVar[str] = "external"
    supported_backup_types: ClassVar[frozenset[BackupType]] = frozenset(BackupType)
    incremental: ClassVar[bool] = True

    def estimate(self, definition: BackupDefinition) -> int:
        """:returns: the bytes of all files"""
        return size_of_tree(definition)

    def produce(self, job: Job) -> dict[str, Any]:
        """
        Run GNU tar, and pass on what it writes.

        :raises ToolError: it is missing, or failed
        """
        definition = job.definition
        names = included(definition)
        for event in excluded_events(definition):
            job.event(event)
        with Tar(self._arguments(job), names) as tar:
            tar.pass_on(job)
        for event in tar.events():
            job.event(event)
        tar.require_success(f"archive {definition.root}")
        return {}

    @staticmethod
    def _arguments(job: Job) -> list[str]:
        definition = job.definition
        arguments = [
            "--create",
            "--file=-",
            "--format=posix",
            # the names of the program's process and the times of reading would make each archive
            # of the same tree another one
            "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
            "--sparse",
            "--ignore-failed-read",
            "--quoting-style=escape",
            f"--directory={definition.root}",
            "--anchored",
            "--no-wildcards",
        ]
        if job.snapshot is not None:
            arguments.append(f"--listed-incremental={job.snapshot}")
        beginning = "" if definition.include_files - {"."} else "./"
        arguments += [
            f"--exclude={beginning}{path}" for path in sorted(definition.exclude_files - {"."})
        ]
        return arguments


class Tar:
    """
    GNU tar, which is ended at the end of a ``with`` block.

    :param arguments: its options
    :param names: the names of files, one by one; they are passed by a pipe, and may be any
    :param data: whether it is given data on its standard input, in place of names
    """

    def __init__(
        self, arguments: Sequence[str], names: Sequence[str] = (), *, data: bool = False
    ) -> None:
        path = shutil.which(PROGRAM)
        if path is None:
            raise ToolError(f"{PROGRAM} is missing", hint="install GNU tar")
        self._names, self._data = names, data
        self._arguments = [path, *arguments]
        if not data:
            self._arguments += ["--null", "--verbatim-files-from", "--files-from=-"]
        self.messages: list[str] = []

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL if self._data else subprocess.PIPE,
            stderr=subprocess.PIPE,
            # other variables change what it does (TAR_OPTIONS), or its messages
            env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            pipesize=_READ,
        )
        self._reader = threading.Thread(target=self._read_messages, daemon=True)
        self._reader.start()
        if not self._data:
            self._writer = threading.Thread(target=self._write_names, daemon=True)
            self._writer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None and (self._data or stream is self.process.stdout):
                self._close(stream)
        self.process.wait()
        self._reader.join()
        if not self._data:
            self._writer.join()

    @staticmethod
    def _close(stream: IO[bytes]) -> None:
        try:
            stream.close()
        except BrokenPipeError:
            pass  # its exit code and its messages tell why it ended

    def _write_names(self) -> None:
        stream = self.process.stdin
        assert stream is not None
        try:
            for name in self._names:
                stream.write(os.fsencode(name) + b"\0")
        except BrokenPipeError:
            pass  # likewise
        self._close(stream)

    def _read_messages(self) -> None:
        stream = self.process.stderr
        assert stream is not None
        with stream:
            for line in stream:
                self.messages.append(line.decode("utf-8", "surrogateescape").rstrip("\n"))

    def pass_on(self, job: Job) -> None:
        """Pass on the archive that it writes."""
        stream = self.process.stdout
        assert stream is not None
        buffer = memoryview(bytearray(_READ))
        while count := stream.raw.readinto(buffer):  # type: ignore[attr-defined]
            job.write(buffer[:count])

    def write(self, data: bytes | memoryview) -> None:
        """Give it data. If it has ended, its exit code and its messages tell why."""
        stream = self.process.stdin
        assert stream is not None
        try:
            stream.write(data)
        except BrokenPipeError as error:
            raise Ended from error

    def events(self) -> Iterator[Event]:
        """:returns: the events that its messages tell"""
        for message in self.messages:
            found = event_of(message)
            if found is not None:
                yield found

    def require_success(self, doing: str) -> None:
        """
        :param doing: what it should do, for messages
        :raises NoSpace: the disk is full
        :raises ToolError: it failed
        """
        code = self.process.returncode
        if code in (0, _WARNING):
            return
        fatal = [text for text in self.messages if _is_fatal(text)] or self.messages
        said = "; ".join(fatal[:_MOST_MESSAGES])
        kind: type[StatePoolError] = ToolError
        if any("No space left on device" in text for text in fatal):
            kind = NoSpace
        raise kind(f"cannot {doing}: {PROGRAM} ended with {code}: {said}")


class Ended(Exception):
    """A program has ended before it read all that it should."""


_CANNOT = r"(?P<path>.*?): (?:Warning: )?Cannot (?P<doing>\w+): "

_MESSAGES: tuple[tuple[str, EventKind, SubOperation], ...] = (
    (r"(?P<path>.*): file changed as we read it", EventKind.FILE_CHANGED, SubOperation.READ),
    (r"(?P<path>.*): File shrank by .*", EventKind.FILE_CHANGED, SubOperation.READ),
    (r"(?P<path>.*): File removed before we read it", EventKind.FILE_VANISHED, SubOperation.OPEN),
    (
        _CANNOT + r"No such file or directory",
        EventKind.FILE_VANISHED,
        SubOperation.STAT,
    ),
    (
        _CANNOT + r"(?:Permission denied|Operation not permitted)",
        EventKind.PERMISSION_DENIED,
        SubOperation.OPEN,
    ),
    (r"(?P<path>.*): socket ignored", EventKind.SOCKET_IGNORED, SubOperation.UNKNOWN),
    (r"(?P<path>.*): door ignored", EventKind.UNKNOWN_TYPE_IGNORED, SubOperation.UNKNOWN),
    (
        r"(?P<path>.*): Unknown file type; file ignored",
        EventKind.UNKNOWN_TYPE_IGNORED,
        SubOperation.UNKNOWN,
    ),
    (
        r"(?P<path>.*): Directory has been renamed.*",
        EventKind.DIRECTORY_RENAMED,
        SubOperation.STAT,
    ),
    (
        r"(?P<path>.*?): (?:Warning: )?(?:Cannot|Read error at) .*",
        EventKind.UNKNOWN_OS_ERROR,
        SubOperation.UNKNOWN_FILE_OPERATION,
    ),
    (r"Some files differ.*", EventKind.SOME_FILES_CHANGED, SubOperation.FINISH),
)
"""The messages of GNU tar 1.34 and 1.35 in the C locale (its sources, ``src/create.c``)."""

_COMPILED = [(re.compile(text, re.DOTALL), kind, doing) for text, kind, doing in _MESSAGES]

_OPERATIONS = {"stat": SubOperation.STAT, "open": SubOperation.OPEN, "read": SubOperation.READ}

_HARMLESS = re.compile(r".*: (?:Directory is new|Removing leading .*)|Removing leading .*")
"""Messages of which nothing need be told."""

_PREFIX = re.compile(r"(?:\S*/)?tar: ")


def event_of(message: str) -> Event | None:
    """
    :param message: a line that GNU tar writes to standard error
    :returns: the event that it tells; None if there is nothing to tell
    """
    text = message[found.end() :] if (found := _PREFIX.match(message)) else message
    if _HARMLESS.fullmatch(text) or text.startswith("Exiting with failure status"):
        return None
    for pattern, kind, operation in _COMPILED:
        if (match := pattern.fullmatch(text)) is not None:
            named = match.groupdict()
            operation = _OPERATIONS.get(named.get("doing") or "", operation)
            return Event(kind, operation, _unquoted(named.get("path") or ""), text)
    return Event(EventKind.UNKNOWN_ERROR, SubOperation.UNKNOWN, text=text)


def _is_fatal(message: str) -> bool:
    found = event_of(message)
    return found is not None and found.kind in (
        EventKind.UNKNOWN_ERROR,
        EventKind.UNKNOWN_OS_ERROR,
    )


_ESCAPE = re.compile(rb"\\([abfnrtv\\ ]|[0-7]{3})")
_ESCAPED = dict(zip(b"abfnrtv\\ ", b"\a\b\f\n\r\t\v\\ ", strict=True))


def _unquoted(text: str) -> str:
    """:returns: the name that GNU tar has quoted in the style ``escape``"""

    def plain(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes([int(code, 8) & 0xFF if len(code) == 3 else _ESCAPED[code[0]]])

    content = _ESCAPE.sub(plain, text.encode("utf-8", "surrogateescape"))
    return os.fsdecode(content).removeprefix("./")
