"""
The settings of staging: the sections ``[stage]`` and ``[collect]`` of ``statepool.toml``.

``docs/staging.rst`` lists the keys. :mod:`~statepool.staging.cedar` makes the same values from a
configuration of CedarBackup.
"""

from __future__ import annotations

import enum
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from attrs import evolve, field, fields_dict, frozen

from statepool.errors import ConfigError, InvalidLocation
from statepool.model.location import Location

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
"""The days of the week, by the numbers of :func:`time.localtime`."""

WORK = ".staging"
"""The directory in a day's directory for notes and unfinished files."""

SUMMARY = "staged.json"
"""The name of the summary in a day's directory."""

LONGEST_NAME = 255
"""The most bytes of a file name in the file systems of Linux (``NAME_MAX``)."""

_E = TypeVar("_E", bound=enum.StrEnum)


class Ignore(enum.StrEnum):
    """
    When it is no failure that a peer is not ready. The values and their meanings are those of
    ``ignore_failures`` in CedarBackup.
    """

    NONE = "none"
    ALL = "all"
    DAILY = "daily"
    WEEKLY = "weekly"

    def applies(self, *, start: bool) -> bool:
        """
        :param start: whether the week begins today, or everything is asked for
        :returns: whether it is no failure today
        """
        return self is Ignore.ALL or self is (Ignore.WEEKLY if start else Ignore.DAILY)


class PeerKind(enum.StrEnum):
    """What a peer has: files in a directory, or states in a pool."""

    FILES = "files"
    STATES = "states"


class CollectMode(enum.StrEnum):
    """When something is collected, and whether only what has changed."""

    DAILY = "daily"
    WEEKLY = "weekly"
    INCREMENTAL = "incr"


class ArchiveMode(enum.StrEnum):
    """The kind of a tar; the values are the endings of its name."""

    TAR = "tar"
    GZIP = "tar.gz"
    BZIP2 = "tar.bz2"


@frozen
class Peer:
    """
    A peer of the backup.

    :param name: its name, which is also that of its directory
    :param location: its collect directory, or its pool
    :param kind: what it has there
    :param objects: patterns of the objects whose states are meant, as in ``vm1/*``
    :param ignore_failures: when it is no failure that it is not ready
    :param copy_command: the words of a command like ``scp`` that copies from it; empty: it is
        reached by a transport of this package
    """

    name: str
    location: Location
    kind: PeerKind = PeerKind.FILES
    objects: tuple[str, ...] = ("*",)
    ignore_failures: Ignore = Ignore.NONE
    copy_command: tuple[str, ...] = ()


@frozen
class Indicators:
    """The names of the files that tell how far a directory is; the defaults are CedarBackup's."""

    collect: str = "cback.collect"
    stage: str = "cback.stage"
    store: str = "cback.store"


@frozen
class StageSettings:
    """
    The settings of the stage action. Attributes are the keys of ``[stage]``, with ``_`` for ``-``.

    :param directory: the staging directory, absolute
    :param peers: the peers, in their order
    :param indicators: the names of the indicators
    :param jobs: peers that are staged at the same time
    :param starting_day: the number of the day on which the week begins, 0 for Monday
    :param user: the account that owns what is staged, and that reaches the peers on other hosts,
        if root runs the action; None: root
    :param group: likewise its group
    :param ssh_config: the configuration file of ssh for peers on other hosts; None: that of the
        other settings
    """

    directory: Path
    peers: tuple[Peer, ...]
    indicators: Indicators = field(factory=Indicators)
    jobs: int = 4
    starting_day: int = 0
    user: str | None = None
    group: str | None = None
    ssh_config: str | None = None

    def __attrs_post_init__(self) -> None:
        if not self.peers:
            raise ConfigError("there are no peers", hint="name one: [[stage.peers]]")
        names: set[str] = set()
        for peer in self.peers:
            _check_name(peer.name, self.indicators)
            if peer.name in names:
                raise ConfigError(
                    f"two peers have the name {peer.name}", hint="each needs its own directory"
                )
            names.add(peer.name)


@frozen
class Item:
    """
    A file or a directory to collect.

    :param path: it, absolute
    :param mode: when it is collected
    :param archive: the kind of its tar
    :param ignore_file: a directory with a file of this name is left out, if not empty
    :param exclude: paths that are left out with all below them, absolute
    :param patterns: regular expressions; a path that one of them matches as a whole is left out
    """

    path: str
    mode: CollectMode = CollectMode.DAILY
    archive: ArchiveMode = ArchiveMode.GZIP
    ignore_file: str = ""
    exclude: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()


@frozen
class CollectSettings:
    """
    The settings of the collect action.

    :param directory: the collect directory, absolute
    :param items: what is collected
    :param notes: the directory for the digests of what was collected incrementally, absolute
    :param indicators: the names of the indicators
    :param starting_day: the number of the day on which the week begins, 0 for Monday
    :param user: the account that owns the tars, if root runs the action; None: root
    :param group: likewise its group
    """

    directory: Path
    items: tuple[Item, ...]
    notes: Path
    indicators: Indicators = field(factory=Indicators)
    starting_day: int = 0
    user: str | None = None
    group: str | None = None

    def __attrs_post_init__(self) -> None:
        if not self.items:
            raise ConfigError("there is nothing to collect", hint="name it: [[collect.items]]")
        names: dict[str, str] = {}
        for item in self.items:
            name = tar_name(item)
            if name in names:
                raise ConfigError(
                    f"{names[name]} and {item.path} would both be collected as {name}",
                    hint="collect what is above both",
                )
            names[name] = item.path


def tar_name(item: Item) -> str:
    """
    :returns: the name of the tar of an item, as in CedarBackup: its path without the first ``/``,
        with ``-`` for each other one, ``_`` for white space and ``:``, and for a leading ``.``
    """
    name = re.sub(r"^\.", "_", item.path.removeprefix("/")) or "_"
    return re.sub(r"[:\s]", "_", re.sub(r"[/\\]", "-", name)) + f".{item.archive}"


def is_file_name(text: str) -> bool:
    """:returns: whether a text can be the name of a file, and is not a hidden one"""
    return (
        bool(text)
        and text.isprintable()
        and "/" not in text
        and not text.startswith((".", "-"))
        and len(os.fsencode(text)) <= LONGEST_NAME
    )


def _check_name(name: str, indicators: Indicators) -> None:
    taken = (indicators.collect, indicators.stage, indicators.store, SUMMARY)
    if not is_file_name(name) or name in taken:
        raise ConfigError(
            f"a peer cannot have the name {name!r}",
            hint="it names a directory: no /, no . or - at its beginning, not an indicator",
        )


# -- reading values --------------------------------------------------------------------------------


def read_choice(kind: type[_E], value: object) -> _E:
    """
    :returns: the member of an enumeration
    :raises ConfigError: there is none
    """
    try:
        return kind(str(value))
    except ValueError as error:
        known = ", ".join(kind)
        raise ConfigError(f"it cannot be {value!r}", hint=f"it can be {known}") from error


def read_day(value: object) -> int:
    """
    :returns: the number of a day of the week
    :raises ConfigError: it is none
    """
    if value not in DAYS:
        raise ConfigError(f"{value!r} is no day", hint="write " + ", ".join(DAYS))
    return DAYS.index(str(value))


def read_text(value: object) -> str:
    """
    :returns: a text of one line that is not empty
    :raises ConfigError: it is none
    """
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ConfigError(f"{value!r} is not a text", hint="write a text in quotes")
    return value


def read_absolute(value: object) -> str:
    """
    :returns: an absolute path without doubled slashes and without ``..``
    :raises ConfigError: it is none
    """
    text = read_text(value)
    if not text.startswith("/") or ".." in text.split("/"):
        raise ConfigError(f"{text!r} is not an absolute path", hint="begin with /, without ..")
    return re.sub("/+", "/", text).rstrip("/") or "/"


def read_command(value: object) -> tuple[str, ...]:
    """
    :returns: the words of a command, which no shell will see
    :raises ConfigError: a quote is not closed
    """
    try:
        return tuple(shlex.split(read_text(value)))
    except ValueError as error:
        raise ConfigError(f"{value!r} is no command: {error}", hint="close the quotes") from error


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{value!r} is not a list", hint="write a list of texts")
    return tuple(map(read_text, value))


def _paths(value: object) -> tuple[str, ...]:
    return tuple(map(read_absolute, _texts(value)))


def read_patterns(value: object) -> tuple[str, ...]:
    """
    :returns: regular expressions
    :raises ConfigError: one of them is none
    """
    found = _texts(value)
    for text in found:
        try:
            re.compile(text)
        except re.error as error:
            raise ConfigError(f"{text!r} is no regular expression: {error}") from error
    return found


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
        raise ConfigError(f"{value!r} is not a count", hint="write a whole number from 1 to 64")
    return value


def _path(value: object) -> Path:
    return Path(read_absolute(os.path.expanduser(read_text(value))))


def _location(value: object) -> Location:
    text = read_text(value)
    if not re.match(r"[/~:]|[\w.-]+:", text):
        # The working directory of a timer is not that of the user.
        raise ConfigError(f"{text!r} is not an absolute path", hint="begin with /, or with ssh://")
    try:
        return Location.parse(text)
    except InvalidLocation as error:
        raise ConfigError(error.message, hint=error.hint) from error


def _name(value: object) -> str:
    text = read_text(value)
    if not is_file_name(text):
        raise ConfigError(f"{text!r} is not a file name", hint="no /, and no . or - at its start")
    return text


def _table(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{value!r} is not a table", hint="write its keys in braces")
    return value


def _tables(value: object) -> list[Mapping[str, object]]:
    if not isinstance(value, list):
        raise ConfigError(f"{value!r} is not a list of tables", hint="write [[...]] for each")
    return [_table(one) for one in value]


Readers = Mapping[str, Callable[[Any], Any]]

_INDICATORS: Readers = dict.fromkeys(fields_dict(Indicators), _name)

_PEER: Readers = {
    "name": read_text,
    "location": _location,
    "kind": lambda value: read_choice(PeerKind, value),
    "objects": _texts,
    "ignore-failures": lambda value: read_choice(Ignore, value),
    "copy-command": read_command,
}

_STAGE: Readers = {
    "directory": _path,
    "peers": lambda value: tuple(_peer(one) for one in _tables(value)),
    "indicators": lambda value: Indicators(**_read(_table(value), _INDICATORS)),
    "jobs": _count,
    "starting-day": read_day,
    "user": read_text,
    "group": read_text,
    "ssh-config": lambda value: str(_path(value)),
}

_ITEM: Readers = {
    "path": read_absolute,
    "mode": lambda value: read_choice(CollectMode, value),
    "archive": lambda value: read_choice(ArchiveMode, value),
    "ignore-file": _name,
    "exclude": _paths,
    "patterns": read_patterns,
}

_COLLECT: Readers = {
    "directory": _path,
    "notes": _path,
    "items": lambda value: tuple(Item(**_read(one, _ITEM, "path")) for one in _tables(value)),
    "indicators": _STAGE["indicators"],
    "starting-day": read_day,
    "user": read_text,
    "group": read_text,
}


def _peer(table: Mapping[str, object]) -> Peer:
    peer = Peer(**_read(table, _PEER, "name", "location"))
    return checked_peer(peer)


def checked_peer(peer: Peer) -> Peer:
    """
    :returns: the peer
    :raises ConfigError: its settings contradict each other
    """
    if peer.kind is PeerKind.FILES and peer.location.scheme == "link":
        raise ConfigError(
            f"only a pool can have the location {peer.location}", hint="write its path"
        )
    if not peer.copy_command:
        return peer
    if peer.kind is PeerKind.STATES:
        raise ConfigError(
            f"the peer {peer.name} has states: no copy command can bring them",
            hint="leave out its copy command",
        )
    if peer.location.scheme != "ssh" or peer.location.port is not None:
        raise ConfigError(
            f"a copy command needs a host without a port: {peer.location}",
            hint="write the port into the command, as in: scp -B -P 2222",
        )
    return peer


def _read(table: Mapping[str, object], readers: Readers, *needed: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in readers:
            raise ConfigError(
                f"{key}: there is no such setting", hint="settings are " + ", ".join(readers)
            )
        try:
            values[key.replace("-", "_")] = readers[key](value)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error.message}", hint=error.hint) from error
    for key in needed:
        if key not in values:
            raise ConfigError(f"{key} is missing", hint=f"write {key} = ...")
    return values


# -- sections of files -----------------------------------------------------------------------------

Layer = tuple[str, Mapping[str, object]]
"""A section, with the file that contains it."""


def stage_settings(layers: Iterable[Layer]) -> StageSettings:
    """
    :param layers: sections ``[stage]``; each overrides those before it, key by key
    :raises ConfigError: a key is missing, does not exist, or has a value that cannot be used
    """
    return _made(StageSettings, "stage", layers, _STAGE, "directory", "peers")


def collect_settings(layers: Iterable[Layer]) -> CollectSettings:
    """
    :param layers: sections ``[collect]``, likewise
    :raises ConfigError: as for :func:`stage_settings`
    """
    return _made(CollectSettings, "collect", layers, _COLLECT, "directory", "items", "notes")


_S = TypeVar("_S", StageSettings, CollectSettings)


def _made(
    kind: type[_S], section: str, layers: Iterable[Layer], readers: Readers, *needed: str
) -> _S:
    where, values = "the configuration", dict[str, Any]()
    try:
        for place, table in layers:
            where = place
            values.update(_read(table, readers))
        for key in needed:
            if key not in values:
                raise ConfigError(f"{key} is missing", hint=f"write it below [{section}]")
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(
            f"{where}: [{section}]: {error.message}", hint=error.hint, path=where
        ) from error


def with_jobs(settings: StageSettings, jobs: int | None) -> StageSettings:
    """:returns: the settings, with another number of jobs if one is given"""
    return evolve(settings, jobs=_count(jobs)) if jobs is not None else settings
