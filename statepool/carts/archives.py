"""
The interface of archives, the places from which the files of a cart come.

An archive is registered in the entry point group ``statepool.archives`` and has three operations:
*stage* requests a file, *status* tells whether it can be pulled and which parts it has, and *pull*
fetches the bytes of one part. Errors are those of :mod:`statepool.errors`; one with ``transient``
set may be retried.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import entry_points
from typing import ClassVar

from attrs import frozen

from statepool import ConfigError, Progress, StatePool, UsageError
from statepool.carts.settings import POOLS, ServeSettings
from statepool.carts.sinks import Sink

GROUP = "statepool.archives"


@frozen
class Wanted:
    """
    One entry of the list of a cart.

    :param id: its id in the archive
    :param path: its path in the tar
    :param chain: whether all states that back a state are wanted too
    :param export: whether a state is wanted as a bundle, which ``statepool import`` reads
    """

    id: str
    path: str
    chain: bool = False
    export: bool = False


@frozen
class Part:
    """
    One file that a wanted entry consists of.

    :param path: its path in the tar
    :param size: in bytes
    :param mtime: seconds since the epoch
    :param digest: of its bytes, as ``blake3:…``, if the archive guarantees it
    :param device: number of the file system on which a hard link to it would take no room
    """

    path: str
    size: int
    mtime: float
    digest: str | None = None
    device: int | None = None


@frozen
class Status:
    """
    The status of a wanted entry in an archive.

    :param near: whether it can be pulled now
    :param parts: its parts; known as soon as it is near
    """

    near: bool
    parts: tuple[Part, ...] = ()


@frozen
class Context:
    """
    The context of archives.

    :param pool: makes the state pool of the service, which reports transfers to a progress
    :param timeout: timeout in seconds for an answer of an archive
    """

    pool: Callable[[Progress], StatePool]
    timeout: float


class Archive(ABC):
    """A place from which files and states come."""

    exports: ClassVar = False
    """Whether it has states, which can be wanted as bundles."""

    @classmethod
    @abstractmethod
    def open(cls, options: Mapping[str, object], context: Context) -> Archive:
        """
        :param options: its settings, without its type
        :raises ConfigError: they cannot be used
        """

    @abstractmethod
    def check(self, wanted: Wanted) -> None:
        """
        Check the id of an entry, without looking for the file.

        :raises UsageError: no file of this archive can have this id
        """

    @abstractmethod
    def stage(self, wanted: Wanted, advance: Callable[[int], None]) -> None:
        """
        Request a file; it need not be available when this returns.

        :param advance: told of transferred bytes, if there are any; if it raises, the transfer ends
        :raises NotFound: the archive has no such file
        """

    @abstractmethod
    def status(self, wanted: Wanted) -> Status:
        """
        :returns: whether it can be pulled, and its parts
        :raises NotFound: the archive has no such file
        """

    def name_of(self, wanted: Wanted) -> str | None:
        """
        :returns: a name for the bytes of an entry that has one part: hexadecimal, and another one
            for other bytes. Carts then share one file with these bytes. None: there is no such name
        """
        return None

    def placing(self, wanted: Wanted, part: Part) -> AbstractContextManager[object]:
        """:returns: a context in which a part is pulled, and its file gets its place in the cart"""
        return nullcontext()

    @abstractmethod
    def pull(self, wanted: Wanted, part: Part, sink: Sink) -> None:
        """Fetch all bytes of a part, as :meth:`status` described it."""


def open_archives(settings: ServeSettings, context: Context) -> dict[str, Archive]:
    """
    :returns: every archive that the settings name, and the pools
    :raises ConfigError: a type does not exist, or its options cannot be used
    """
    known = {point.name: point for point in entry_points(group=GROUP)}
    configured = {POOLS: {"type": POOLS}, **settings.archives}
    archives: dict[str, Archive] = {}
    for name, options in configured.items():
        kind = str(options["type"])
        if kind not in known:
            hint = f"types are {', '.join(sorted(known))}"
            raise ConfigError(f"archives.{name}: there is no type {kind!r}", hint=hint)
        rest = {key: value for key, value in options.items() if key != "type"}
        try:
            archives[name] = known[kind].load().open(rest, context)
        except ConfigError as error:
            raise ConfigError(f"archives.{name}: {error.message}", hint=error.hint) from error
    return archives


def check_plain(text: str, what: str) -> str:
    """
    Check a path relative to an archive or in a tar.

    :param text: its parts with ``/`` between them
    :param what: what messages call it
    :raises UsageError: it is empty, absolute, leads out by ``..``, is too long, or has invalid
        characters
    """
    parts = text.split("/")
    problem = None
    if not text:
        problem = "it is empty"
    elif not text.isprintable():
        problem = "it has characters that cannot be printed"
    elif any(part in ("", ".", "..") for part in parts):
        problem = "it is absolute, or has a part that is empty, . or .."
    elif len(text.encode()) > 1024 or any(len(part.encode()) > 200 for part in parts):
        problem = "it has more than 1024 bytes, or a part of more than 200"
    if problem is not None:
        raise UsageError(
            f"{what} {text[:80]!r} cannot be used: {problem}",
            hint="write names with / between them, relative",
        )
    return text
