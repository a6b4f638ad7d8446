"""
The interface of archives: where the files of a cart come from.

An archive is registered in the entry point group ``statepool.archives`` and has three operations:
*stage* asks for a file, *status* tells whether it can be pulled and what it consists of, and
*pull* brings the bytes of one part. Errors are those of :mod:`statepool.errors`; one with
``transient`` set is worth another try.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
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

    :param id: what the archive calls it
    :param path: where it is to be in the tar
    :param chain: whether all that backs a state is wanted too
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

    :param path: where it is to be in the tar
    :param size: in bytes
    :param mtime: seconds since the epoch
    :param digest: of its bytes, as ``blake3:…``, where the archive vouches for it
    :param device: number of the file system where a second name of it would take no room
    """

    path: str
    size: int
    mtime: float
    digest: str | None = None
    device: int | None = None


@frozen
class Status:
    """
    What an archive says of a wanted entry.

    :param near: whether it can be pulled now
    :param parts: what it consists of; known as soon as it is near
    """

    near: bool
    parts: tuple[Part, ...] = ()


@frozen
class Context:
    """
    What archives work with.

    :param pool: makes the state pool of the service, which tells a progress of transfers
    :param timeout: seconds for which an archive may be silent
    """

    pool: Callable[[Progress], StatePool]
    timeout: float


class Archive(ABC):
    """A place that files and states come from."""

    exports: ClassVar = False
    """Whether it has states, which can be wanted as bundles."""

    @classmethod
    @abstractmethod
    def open(cls, options: Mapping[str, object], context: Context) -> Archive:
        """
        :param options: what the settings say of it, without its type
        :raises ConfigError: they cannot be used
        """

    @abstractmethod
    def check(self, wanted: Wanted) -> None:
        """
        Check the id of an entry, without looking for it.

        :raises UsageError: nothing in this archive can have it
        """

    @abstractmethod
    def stage(self, wanted: Wanted, advance: Callable[[int], None]) -> None:
        """
        Ask for a file; it need not be there when this returns.

        :param advance: told of bytes that come, if any do; it may raise, which ends the transfer
        :raises NotFound: the archive has no such file
        """

    @abstractmethod
    def status(self, wanted: Wanted) -> Status:
        """
        :returns: whether it can be pulled, and what it consists of
        :raises NotFound: the archive has no such file
        """

    @abstractmethod
    def pull(self, wanted: Wanted, part: Part, sink: Sink) -> None:
        """Bring all bytes of a part, as :meth:`status` described it."""


def open_archives(settings: ServeSettings, context: Context) -> dict[str, Archive]:
    """
    :returns: every archive that the settings name, and the pools
    :raises ConfigError: there is no such type, or its options cannot be used
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
    :raises UsageError: it is empty, absolute, climbs, is too long, or has characters that are none
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
