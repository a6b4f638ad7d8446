"""
The identity of a writer: enough to tell, on the same host, whether the writer can still be running.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from attrs import frozen

from statepool.errors import BadRecord, ToolError
from statepool.model.digest import Digest


@frozen
class Writer:
    """
    A process on a host.

    :param host: the host's name, for people: two hosts can have the same name, and one host can
        have two names
    :param boot: the id of the running kernel, ``/proc/sys/kernel/random/boot_id``
    :param space: the inode of the process id namespace, since containers share a host and a boot
    :param pid: the id of the process
    :param start: when it started, in clock ticks since boot (field 22 of ``/proc/PID/stat``, see
        proc(5)), since process ids are reused
    :param machine: identifies the host across boots, see :func:`machine_of`; empty if an older
        version wrote it
    """

    host: str
    boot: str
    space: int
    pid: int
    start: int
    machine: str = ""

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    @classmethod
    def current(cls) -> Writer:
        """:returns: this process"""
        return _current(os.getpid())

    @classmethod
    def gone(cls) -> Writer:
        """:returns: a writer of this host of which only one thing is known: a power cut ended it"""
        here = cls.current()
        return cls(here.host, "", 0, 0, 0, here.machine)

    @property
    def is_of_this_boot(self) -> bool:
        """Whether it is, or was, a process of the running kernel."""
        return self.boot == Writer.current().boot

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this host that this process could see."""
        here = Writer.current()
        if self.is_of_this_boot:
            return self.space == here.space
        return self.machine == here.machine if self.machine else self.host == here.host

    @property
    def is_dead(self) -> bool:
        """Whether it has certainly ended. False if that cannot be known."""
        return self.is_here and self._has_ended

    @property
    def has_ended_here(self) -> bool:
        """
        Whether it has certainly ended, as :attr:`is_dead`, for a place to which only processes of
        this host write: there, no writer of another boot is running.
        """
        return (
            self._has_ended
            if self.is_here or not self.is_of_this_boot
            else not _is_space(self.space)
        )

    @property
    def _has_ended(self) -> bool:
        if not self.is_of_this_boot:
            return True
        started = _started(self.pid)
        return started != self.start if started is not None else not _is_hidden(self.pid)

    def to_json(self) -> dict[str, Any]:
        """:returns: the form in records and markers"""
        machine = {"machine": self.machine} if self.machine else {}
        return {
            "host": self.host,
            **machine,
            "boot": self.boot,
            "space": self.space,
            "pid": self.pid,
            "start": self.start,
        }

    @classmethod
    def from_json(cls, data: object) -> Writer:
        """:raises BadRecord: the data is not a writer"""
        if not isinstance(data, dict):
            raise BadRecord("a writer is not a JSON object")
        texts = [data.get(name) for name in ("host", "boot")]
        numbers = [data.get(name) for name in ("space", "pid", "start")]
        machine = data.get("machine", "")
        if not all(isinstance(text, str) for text in (*texts, machine)) or not all(
            type(number) is int for number in numbers
        ):
            raise BadRecord("a writer lacks its host, boot, space, pid or start")
        return cls(*texts, *numbers, machine)  # type: ignore[arg-type, call-arg]  # just checked


@lru_cache(maxsize=1)
# cached by process id: a child process is another writer
def _current(pid: int) -> Writer:  # noqa: ARG001
    boot = _read("/proc/sys/kernel/random/boot_id")
    host = os.uname().nodename
    try:
        # If /proc belongs to another namespace, the process has another number there than in its
        # own namespace.
        number = int(os.readlink("/proc/self"))
        space = os.stat("/proc/self/ns/pid").st_ino
    except FileNotFoundError as error:
        raise ToolError(
            "/proc is not mounted, by which it is known which writers are at work",
            hint="mount -t proc proc /proc",
        ) from error
    return Writer(host, boot, space, number, _started(number) or 0, machine_of(host))


def machine_of(host: str) -> str:
    """
    Return an id of a host that does not depend on its name: it is derived from the id of its
    installation (machine-id(5), which must not be published as it is) and the addresses of its
    network devices, since clones share the id of the installation. A container sees no such device,
    and a cloned image has the id of all its clones: then the name of the host is a part of the id.

    :param host: the host's name
    :returns: 32 hexadecimal digits
    """
    installed = next(filter(None, map(_read, ("/etc/machine-id", "/var/lib/dbus/machine-id"))), "")
    addresses = sorted(_addresses())
    parts = (
        ["statepool", installed, *addresses]
        if installed and addresses
        else ["statepool", installed, host]
    )
    return Digest.of_text("\n".join(parts)).hex[:32]


def _addresses() -> Iterator[str]:
    """
    :returns: the addresses of the network devices that have a device behind them; those that
        software makes, as for containers, have none
    """
    devices = "/sys/class/net"
    try:
        names = os.listdir(devices)
    except FileNotFoundError:
        return
    for name in names:
        if os.path.exists(f"{devices}/{name}/device") and (
            address := _read(f"{devices}/{name}/address")
        ):
            yield address


def _read(path: str) -> str:
    """
    :returns: the text of a small system file; empty if it is missing or closed to this account
    """
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except (FileNotFoundError, PermissionError):
        return ""


def _started(pid: int) -> int | None:
    """:returns: when a process started; None if there is no such process, or only a zombie"""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _is_hidden(pid: int) -> bool:
    """
    :returns: whether a process may exist although ``/proc`` does not show it: a process of another
        account, if ``/proc`` is mounted with ``hidepid``
    """
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not os.path.exists(f"/proc/{pid}")
    except (ProcessLookupError, OverflowError):
        pass
    return False


_FIRST_SPACE = 0xEFFFFFFC
"""
The inode of the process id namespace of the kernel's first process (PROC_PID_INIT_INO in
``linux/proc_ns.h``), from which all other processes are visible.
"""


def _is_space(space: int) -> bool:
    """
    :returns: whether a process id namespace may still have processes; it is known to be empty only
        if all processes can be examined
    """
    if Writer.current().space != _FIRST_SPACE or not os.path.exists("/proc/1"):
        return True
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if pid == "1":
            continue  # it is in the first namespace, and may be closed to other accounts
        try:
            if os.stat(f"/proc/{pid}/ns/pid").st_ino == space:
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile, or is a zombie
        except PermissionError:
            return True
    return False
