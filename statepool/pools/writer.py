"""Who writes: enough to tell, on the same host, whether a writer can still be at work."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from attrs import frozen

from statepool.errors import BadRecord


@frozen
class Writer:
    """
    A process on a host.

    :param host: the host's name
    :param boot: the id of the running kernel, ``/proc/sys/kernel/random/boot_id``
    :param space: the inode of the process id namespace, since containers share a host and a boot
    :param pid: the process
    :param start: when it started, in clock ticks since boot (field 22 of ``/proc/PID/stat``, see proc(5)), since process ids are used again
    """

    host: str
    boot: str
    space: int
    pid: int
    start: int

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    @classmethod
    def current(cls) -> Writer:
        """:returns: this process"""
        return _current(os.getpid())

    @classmethod
    def gone(cls) -> Writer:
        """:returns: a writer of this host of whom nothing is known but that a power cut ended it"""
        return cls(Writer.current().host, "", 0, 0, 0)

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this host that this process could see."""
        here = Writer.current()
        return self.host == here.host and (self.boot != here.boot or self.space == here.space)

    @property
    def is_dead(self) -> bool:
        """Whether it surely is at work no more. False where that cannot be known."""
        here = Writer.current()
        if not self.is_here:
            return False
        return self.boot != here.boot or _started(self.pid) != self.start

    def to_json(self) -> dict[str, Any]:
        """:returns: the form in records and markers"""
        return {"host": self.host, "boot": self.boot, "space": self.space, "pid": self.pid, "start": self.start}

    @classmethod
    def from_json(cls, data: object) -> Writer:
        """
        :raises BadRecord: it is not a writer
        """
        if not isinstance(data, dict):
            raise BadRecord("a writer is not a JSON object")
        texts = [data.get(name) for name in ("host", "boot")]
        numbers = [data.get(name) for name in ("space", "pid", "start")]
        if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
            raise BadRecord("a writer lacks its host, boot, space, pid or start")
        return cls(*texts, *numbers)  # type: ignore[arg-type]  # just checked


@lru_cache(maxsize=1)
def _current(pid: int) -> Writer:
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return Writer(os.uname().nodename, boot, os.stat("/proc/self/ns/pid").st_ino, pid, _started(pid) or 0)


def _started(pid: int) -> int | None:
    """:returns: when a process started, or None if there is none or only its remains"""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
