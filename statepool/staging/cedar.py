"""
A configuration of CedarBackup, read as it is.

The elements are those of its manual, chapter "Configuration", and of Debian's ``cedar-backup3``.
XML is parsed by expat, without a DTD's entities: a configuration has none, and they can be used to
make a parser read other files or take any amount of memory.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from xml.parsers import expat

from attrs import evolve, frozen

from statepool.errors import ConfigError, InvalidLocation
from statepool.model.location import Location
from statepool.staging.settings import (
    ArchiveMode,
    CollectMode,
    CollectSettings,
    Ignore,
    Item,
    Peer,
    StageSettings,
    checked_peer,
    read_absolute,
    read_choice,
    read_day,
    read_patterns,
    read_text,
)

LARGEST = 4 << 20
"""The most bytes of a configuration that is read."""

_ARCHIVES = {"tar": ArchiveMode.TAR, "targz": ArchiveMode.GZIP, "tarbz2": ArchiveMode.BZIP2}
"""The kinds of tars, as the configuration names them."""

_UNKNOWN_HERE = ("link_depth", "dereference", "recursion_level")
"""Settings of a directory to collect that only CedarBackup's own action has."""

_PLAIN_SCP = frozenset("BqC")
"""Options of ``scp`` that change nothing which a transport of this package does not do."""

_T = TypeVar("_T")


@frozen
class CedarConfig:
    """
    A configuration.

    :param path: its file
    :param root: its outermost element
    """

    path: str
    root: ET.Element

    def stage(self) -> StageSettings:
        """
        :returns: the settings of the stage action. Peers of the stage section replace those of
            the peers section.
        :raises ConfigError: something is missing, or cannot be used
        """
        section, options = self._section("stage"), self._options()
        peers = _children(section, "peer") or [
            peer for one in _children(self.root, "peers") for peer in _children(one, "peer")
        ]
        command = _Command.of(options.text("rcp_command"))
        users = options.text("backup_user"), options.text("backup_group")
        return self._made(
            lambda: StageSettings(
                directory=Path(section.value("staging_dir", read_absolute)),
                peers=tuple(
                    sorted(
                        (self._peer(_Section(self.path, one), users[0], command) for one in peers),
                        key=lambda peer: not peer.location.is_local,
                    )
                ),
                starting_day=options.value("starting_day", read_day),
                user=users[0],
                group=users[1],
                ssh_config=command.ssh_config,
            )
        )

    def collect(self) -> CollectSettings:
        """
        :returns: the settings of the collect action
        :raises ConfigError: something is missing, or cannot be used
        """
        section, options = self._section("collect"), self._options()
        defaults = Item(
            path="/",
            mode=section.value("collect_mode", _mode, CollectMode.DAILY),
            archive=section.value("archive_mode", _archive, ArchiveMode.GZIP),
            ignore_file=section.value("ignore_file", read_text, ""),
            exclude=section.listed("exclude", "abs_path"),
            patterns=read_patterns(section.listed("exclude", "pattern")),
        )
        files = [_Section(self.path, one) for one in _children(section, "file")]
        directories = [_Section(self.path, one) for one in _children(section, "dir")]
        return self._made(
            lambda: CollectSettings(
                directory=Path(section.value("collect_dir", read_absolute)),
                items=tuple(_item(one, defaults) for one in [*files, *directories]),
                notes=Path(options.value("working_dir", read_absolute)),
                starting_day=options.value("starting_day", read_day),
                user=options.text("backup_user"),
                group=options.text("backup_group"),
            )
        )

    def _section(self, name: str) -> _Section:
        found = self.root.find(name)
        if found is None:
            hint = f"see the manual of CedarBackup for the section {name}"
            raise ConfigError(f"{self.path}: there is no section {name}", hint=hint, path=self.path)
        return _Section(self.path, found)

    def _options(self) -> _Section:
        return self._section("options")

    def _peer(self, section: _Section, user: str | None, default: _Command) -> Peer:
        name, path = section.value("name", read_text), section.value("collect_dir", read_absolute)
        ignore = section.value(
            "ignore_failures", lambda text: read_choice(Ignore, text), Ignore.NONE
        )
        kind = section.value("type", read_text)
        if kind == "local":
            return Peer(name, Location("file", path), ignore_failures=ignore)
        if kind != "remote":
            raise section.error("type", f"it cannot be {kind!r}", "write local or remote")
        own = section.text("rcp_command")
        command = _Command(_words(own)) if own is not None else default
        try:
            location = Location(
                "ssh",
                path,
                host=name,
                user=section.text("backup_user") or user,
                port=command.port if not command.words else None,
            )
        except InvalidLocation as error:
            raise section.error("name", error.message, "name a host") from error
        return checked_peer(
            Peer(name, location, ignore_failures=ignore, copy_command=command.words)
        )

    def _made(self, make: Callable[[], _T]) -> _T:
        try:
            return make()
        except ConfigError as error:
            if error.path is not None:
                raise
            text = f"{self.path}: {error.message}"
            raise ConfigError(text, hint=error.hint, path=self.path) from error


@frozen
class _Section:
    path: str
    element: ET.Element

    def __iter__(self) -> Iterator[ET.Element]:
        return iter(self.element)

    def text(self, name: str) -> str | None:
        """:returns: the text of an element, if there is one that is not empty"""
        found = self.element.find(name)
        return (found.text or "").strip() or None if found is not None else None

    def value(self, name: str, read: Callable[[str], _T], default: _T | None = None) -> _T:
        """:returns: what is read from the text of an element, or the default if there is one"""
        text = self.text(name)
        if text is None:
            if default is None:
                raise self.error(name, "it is missing", f"write <{name}>...</{name}>")
            return default
        try:
            return read(text)
        except ConfigError as error:
            raise self.error(name, error.message, error.hint) from error

    def listed(self, name: str, inner: str) -> tuple[str, ...]:
        """:returns: the texts of all ``inner`` elements in an element"""
        found = self.element.find(name)
        texts = [] if found is None else [(one.text or "").strip() for one in found.iter(inner)]
        return tuple(text for text in texts if text)

    def error(self, name: str, problem: str, hint: str | None) -> ConfigError:
        """:returns: the error for an element"""
        place = f"{self.path}: {self.element.tag}/{name}"
        return ConfigError(f"{place}: {problem}", hint=hint, path=self.path)


@frozen
class _Command:
    """
    A command that copies from peers.

    :param words: its words; none if a transport of this package does the same
    :param port: the port that it names
    :param ssh_config: the configuration of ssh that it names
    """

    words: tuple[str, ...] = ()
    port: int | None = None
    ssh_config: str | None = None

    @classmethod
    def of(cls, text: str | None) -> _Command:
        """:returns: the command of the options, which a transport replaces if it can"""
        words = _words(text) if text is not None else ()
        if not words or os.path.basename(words[0]) != "scp":
            return cls(words)
        rest, port, file = list(words[1:]), None, None
        while rest:
            word = rest.pop(0)
            if word == "-P" and rest and rest[0].isdecimal():
                port = int(rest.pop(0))
            elif word == "-F" and rest and rest[0].startswith("/"):
                file = rest.pop(0)
            elif not (word.startswith("-") and word[1:] and set(word[1:]) <= _PLAIN_SCP):
                return cls(words)
        return cls((), port, file)


def _words(text: str) -> tuple[str, ...]:
    """:returns: the words of a command: quoted text is one word, and there are no escapes"""
    return tuple(word.replace('"', "") for word in re.findall(r'[^ "]+|"[^"]+"', text))


def _mode(text: str) -> CollectMode:
    return read_choice(CollectMode, text)


def _archive(text: str) -> ArchiveMode:
    if text not in _ARCHIVES:
        raise ConfigError(f"it cannot be {text!r}", hint="it can be " + ", ".join(_ARCHIVES))
    return _ARCHIVES[text]


def _item(section: _Section, defaults: Item) -> Item:
    for name in _UNKNOWN_HERE:
        if (section.text(name) or "0").upper() not in ("0", "N"):
            raise section.error(name, "only cback3 collect can do that", "leave it out")
    path = section.value("abs_path", read_absolute)
    mode = section.value("collect_mode", _mode, defaults.mode)
    relative = [f"{path}/{one}" for one in section.listed("exclude", "rel_path")]
    return evolve(
        defaults,
        path=path,
        mode=section.value("mode", _mode, mode),
        archive=section.value("archive_mode", _archive, defaults.archive),
        ignore_file=section.value("ignore_file", read_text, defaults.ignore_file),
        exclude=(*defaults.exclude, *section.listed("exclude", "abs_path"), *relative),
        patterns=(*defaults.patterns, *read_patterns(section.listed("exclude", "pattern"))),
    )


def _children(parent: ET.Element | _Section, name: str) -> list[ET.Element]:
    return [one for one in parent if one.tag == name]


def read_cedar(path: str | os.PathLike[str]) -> CedarConfig:
    """
    :param path: the file, such as ``/etc/cback3.conf``
    :raises ConfigError: it cannot be read, or is no such configuration
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        text = f"{name} cannot be read: {error.strerror}"
        hint = "name the configuration of CedarBackup"
        raise ConfigError(text, hint=hint, path=name) from error
    if len(data) > LARGEST:
        text = f"{name} has more than {LARGEST >> 20} MiB"
        raise ConfigError(text, hint="name the configuration of CedarBackup", path=name)
    root = _parse(data, name)
    if root.tag != "cb_config":
        text = f"{name} is no configuration of CedarBackup: its root is {root.tag}, not cb_config"
        raise ConfigError(text, hint="name the configuration of CedarBackup", path=name)
    return CedarConfig(name, root)


def _parse(data: bytes, name: str) -> ET.Element:
    builder, parser = ET.TreeBuilder(), expat.ParserCreate()

    def refuse(*_: object) -> None:
        text = f"{name} declares or uses an entity, which is not read"
        raise ConfigError(text, hint="write the text in its place", path=name)

    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    parser.SkippedEntityHandler = refuse
    parser.ExternalEntityRefHandler = refuse  # type: ignore[assignment]
    try:
        parser.Parse(data, True)
        return builder.close()
    except expat.ExpatError as error:
        text = f"{name} is no XML: {error}"
        raise ConfigError(text, hint="look at that line", path=name) from error
