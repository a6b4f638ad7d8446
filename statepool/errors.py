"""
Every error that statepool raises, and the exit code each one has at the shell.

::

    StatePoolError                 1   a fault of ours, or one without a better name
     ├── UsageError                2   the question is not a valid one       (ValueError)
     │    ├── InvalidName              a name that cannot be used
     │    ├── InvalidLocation          an address that cannot be used
     │    └── ConfigError              a setting that cannot be used
     ├── NotFound                  3   no such state, object or file         (LookupError)
     ├── RefusedError              4   refused by policy, or a conflict
     │    ├── Conflict                 the name exists with other content
     │    ├── HasDependants            other states stand on it
     │    ├── InUse                    a process, a working image or a cache uses it
     │    ├── Incompatible             this QEMU cannot load a machine's RAM
     │    ├── FileInTheWay             a file exists and may not be overwritten (FileExistsError)
     │    └── ReadOnlyPool             this pool takes no changes
     ├── IntegrityError            5   what is there is not what it should be
     │    ├── DigestMismatch           bytes that are not those promised
     │    ├── UnsafeImage              an image that a safety check refuses
     │    ├── BadRecord                a record or checkpoint that cannot be believed
     │    └── UnsupportedFormat        a pool or record of a format we do not know
     ├── LockTimeout               6   another holder did not let go in time (TimeoutError)
     ├── TransportError            7   a pool cannot be reached or used      (OSError)
     │    ├── NotAPool                 nothing of ours is at this location
     │    ├── MissingFile              a file of a pool is not there         (FileNotFoundError)
     │    ├── FileExists               an exclusive create lost its race     (FileExistsError)
     │    └── AccessDenied             the far side does not permit it       (PermissionError)
     ├── NoSpace                   8   it does not fit                       (OSError)
     ├── ToolError                 1   qemu-img is missing, failed or took too long
     │    └── MachineError             QEMU is missing, refused, ended or did not answer
     └── BuildFailed               1   what should have built a state failed

An interruption by the user ends with exit code 130. An error of the transports that is about a file
which the user has named, such as a working image, and not about a pool, has exit code 3 if it is
missing, 4 if its permissions do not allow it, and 1 otherwise: see :func:`about_file`.

Messages say what happened, and to which object in which pool; ``hint`` says what to do about it.
The other attributes carry the facts, so that a caller never has to parse a message. All errors
survive pickling; an error of a library below is kept as ``__cause__``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

__all__ = [
    "AccessDenied",
    "BadRecord",
    "BuildFailed",
    "ConfigError",
    "Conflict",
    "DigestMismatch",
    "FileExists",
    "FileInTheWay",
    "HasDependants",
    "InUse",
    "Incompatible",
    "IntegrityError",
    "InvalidLocation",
    "InvalidName",
    "LockTimeout",
    "MachineError",
    "MissingFile",
    "NoSpace",
    "NotAPool",
    "NotFound",
    "ReadOnlyPool",
    "RefusedError",
    "StatePoolError",
    "ToolError",
    "TransportError",
    "UnsafeImage",
    "UnsupportedFormat",
    "UsageError",
]

_Error = TypeVar("_Error", bound="StatePoolError")


def about_file(error: _Error) -> _Error:
    """
    Give an error the exit code for a file that the user has named, and not for a pool.

    :returns: the error itself
    """
    if isinstance(error, TransportError):
        kinds = ((MissingFile, NotFound), (AccessDenied, RefusedError))
        error.exit_code = next(
            (meaning.exit_code for kind, meaning in kinds if isinstance(error, kind)),
            StatePoolError.exit_code,
        )
    return error


def _rebuild(cls: type[StatePoolError], message: str, facts: dict[str, Any]) -> StatePoolError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(facts)
    return error


class StatePoolError(Exception):
    """
    The base class of all errors.

    :param message: what happened, to which object in which pool
    :param hint: what the reader can do about it
    :param object: the object concerned, such as ``vm1/disk``
    :param state: the state concerned
    :param pool: the location of the pool concerned
    :param path: the path of the file concerned
    """

    exit_code: int = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        object: str | None = None,
        state: str | None = None,
        pool: str | None = None,
        path: str | None = None,
    ) -> None:
        # Named explicitly: several classes below also derive from OSError, whose own constructor
        # would give the arguments another meaning.
        Exception.__init__(self, message)
        self.message = message
        self.hint = hint
        self.object = object
        self.state = state
        self.pool = pool
        self.path = path

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, dict(self.__dict__))


class UsageError(StatePoolError, ValueError):
    """The request itself is not valid: nothing was read or changed."""

    exit_code = 2


class InvalidName(UsageError):
    """A name of a machine, an image or a state that cannot be used."""


class InvalidLocation(UsageError):
    """An address of a pool that cannot be parsed."""


class ConfigError(UsageError):
    """A setting that does not exist, or has a value that cannot be used."""


class NotFound(StatePoolError, LookupError):
    """There is no such state, object or file."""

    exit_code = 3


class RefusedError(StatePoolError):
    """A rule forbids the operation in the present situation."""

    exit_code = 4


class Conflict(RefusedError):
    """The name exists already, with other content or another parent."""


class HasDependants(RefusedError):
    """
    Other states depend on this one.

    :param dependants: the states that depend on it
    """

    def __init__(
        self, message: str, *, dependants: Sequence[str] = (), **facts: str | None
    ) -> None:
        super().__init__(message, **facts)
        self.dependants = tuple(dependants)


class InUse(RefusedError):
    """
    The state or file is in use: a process has it open, a working image is backed by it, or a cache
    refers to it.
    """


class Incompatible(RefusedError):
    """
    A machine's RAM cannot be loaded by this QEMU, as it was started.

    :param differences: the differences, in words
    """

    def __init__(
        self, message: str, *, differences: Sequence[str] = (), **facts: str | None
    ) -> None:
        super().__init__(message, **facts)
        self.differences = tuple(differences)


class FileInTheWay(RefusedError, FileExistsError):
    """A file exists where one should be written, and overwriting was not asked for."""


class ReadOnlyPool(RefusedError):
    """This pool cannot be changed."""


class IntegrityError(StatePoolError):
    """The content is not what it should be; none of it was used."""

    exit_code = 5


class DigestMismatch(IntegrityError):
    """
    Bytes that arrived, or are stored, do not match the manifest.

    :param expected: the digest in the manifest
    :param actual: the digest of the bytes
    """

    def __init__(
        self, message: str, *, expected: str = "", actual: str = "", **facts: str | None
    ) -> None:
        super().__init__(message, **facts)
        self.expected = expected
        self.actual = actual


class UnsafeImage(IntegrityError):
    """
    An image file that one of the safety checks refuses.

    :param check: the name of the check, as listed in ``statepool.qcow2.checks``
    """

    def __init__(self, message: str, *, check: str = "", **facts: str | None) -> None:
        super().__init__(message, **facts)
        self.check = check


class BadRecord(IntegrityError):
    """
    A record, a checkpoint, a marker or a manifest that is not valid, or a gap between records.
    """


class UnsupportedFormat(IntegrityError):
    """A pool or a record of a format that this version does not know."""


class LockTimeout(StatePoolError, TimeoutError):
    """
    Another process held a lock for longer than the timeout.

    :param seconds: how long this process waited
    """

    exit_code = 6

    def __init__(self, message: str, *, seconds: float = 0.0, **facts: str | None) -> None:
        super().__init__(message, **facts)
        self.seconds = seconds


class TransportError(StatePoolError, OSError):
    """
    A pool cannot be reached, or the connection to it failed.

    :param transient: whether a retry may succeed: after a lost connection, or if a server did not
        answer in time
    """

    exit_code = 7

    def __init__(self, message: str, *, transient: bool = False, **facts: str | None) -> None:
        super().__init__(message, **facts)
        self.transient = transient


class NotAPool(TransportError):
    """Nothing at this location is a pool; a file system that is not mounted looks the same."""


class MissingFile(TransportError, FileNotFoundError):
    """A file of a pool is not there."""


class FileExists(TransportError, FileExistsError):
    """An exclusive create, link or make found an existing file: another writer was first."""


class AccessDenied(TransportError, PermissionError):
    """The permissions of a file, a directory or an account do not allow the operation."""


class NoSpace(StatePoolError, OSError):
    """
    There is not enough space.

    :param needed: bytes that would have been written
    :param available: bytes that may be used
    """

    exit_code = 8

    def __init__(
        self, message: str, *, needed: int = 0, available: int = 0, **facts: str | None
    ) -> None:
        super().__init__(message, **facts)
        self.needed = needed
        self.available = available


class ToolError(StatePoolError):
    """qemu-img is missing, failed, or did not answer before its timeout."""


class MachineError(ToolError):
    """QEMU is missing, refused a command, has ended, or did not answer before its timeout."""


class BuildFailed(StatePoolError):
    """
    The builder of a state raised an error, took too long, or left something that is not a state.
    Nothing of it was kept.
    """
