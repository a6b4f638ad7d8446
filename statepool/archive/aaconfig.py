"""
AutoArchive's configuration files, as its version 2.1.1 reads them.

There are two kinds: the program's configuration, ``aa.conf``, and one specification for each
archive, ``NAME.aa``. Both have sections, keywords and values (aa.conf(5), aa_arch_spec(5)). The
differences between the two: in ``aa.conf`` the letters of keywords may be upper or lower case, and
values are taken as they are; in a specification a value can refer to another one of its section,
``%(KEYWORD)s``, or to one of another specification, ``@(NAME.KEYWORD)``.

What a keyword means there and here is in ``docs/archive-pools.rst``. A keyword of AutoArchive
without a meaning here is told (:class:`Unused`); one that AutoArchive does not know is an error.
"""

from __future__ import annotations

import configparser
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from attrs import frozen

from statepool.archive.definition import BackupDefinition, BackupType
from statepool.bundles.stream import about
from statepool.errors import ConfigError, InvalidName, UsageError
from statepool.transports.failures import Subject

SUFFIX = ".aa"
"""The ending of the name of a specification."""

SPECS = "archive_specs"
"""Where specifications are if ``archive-specs-dir`` is not given: beside the configuration."""

DEEPEST = 40
"""How many specifications may refer to each other in a row, as in AutoArchive."""

Value = str | int | bool
"""A value of a keyword."""


@frozen
class Unused:
    """
    A keyword of AutoArchive that has no meaning here.

    :param path: of the file
    :param section: in the file
    :param keyword: in the section
    :param reason: why, or what to do instead
    """

    path: Path
    section: str
    keyword: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: [{self.section}] {self.keyword} is not used: {self.reason}"


@frozen
class Config:
    """
    The program's configuration.

    :param values: of the section ``[Archive]``; a keyword without a value is not there
    :param specs: the directory of specifications
    :param unused: keywords without a meaning here
    """

    values: Mapping[str, Value]
    specs: Path
    unused: tuple[Unused, ...] = ()


@frozen
class Spec:
    """
    The specification of one archive, with what the configuration says where it says nothing.

    :param path: of the file
    :param definition: what is archived, and to where
    :param archiver: ``external`` or ``internal``
    :param strength: of the compression, if it is given
    :param overwrite_at_start: whether an old archive is removed before the new one is written
    :param incremental: whether levels are made
    :param restarting: whether levels begin again
    :param restart_after_level: the highest level, where levels begin again
    :param restart_after_age: days after which levels begin again
    :param full_restart_after_count: how often levels begin again before level 0 does
    :param full_restart_after_age: days after which level 0 is made
    :param max_restart_level_size: percentage of level 0 that a level may have on which levels begin
        again
    :param remove_obsolete: whether levels above the one that is made are removed
    :param keep: how many archives are kept that would be overwritten
    :param unused: keywords without a meaning here
    """

    path: Path
    definition: BackupDefinition
    archiver: str
    strength: int | None
    overwrite_at_start: bool
    incremental: bool
    restarting: bool
    restart_after_level: int
    restart_after_age: int | None
    full_restart_after_count: int | None
    full_restart_after_age: int | None
    max_restart_level_size: int | None
    remove_obsolete: bool
    keep: int
    unused: tuple[Unused, ...] = ()


# -- keywords --------------------------------------------------------------------------------------

ARCHIVERS = {
    "tar": ("external", BackupType.TAR),
    "targz": ("external", BackupType.TAR_GZ),
    "tarbz2": ("external", BackupType.TAR_BZ2),
    "tarxz": ("external", BackupType.TAR_XZ),
    "tarzst": ("external", BackupType.TAR_ZST),
    "tar_internal": ("internal", BackupType.TAR),
    "targz_internal": ("internal", BackupType.TAR_GZ),
    "tarbz2_internal": ("internal", BackupType.TAR_BZ2),
}
"""AutoArchive's names of archivers."""

DEFAULTS: Mapping[str, Value] = {
    "archiver": "targz",
    "dest-dir": ".",
    "restart-after-level": 10,
    "number-of-old-backups": 1,
}
"""What AutoArchive does where no file says anything (``aa --help``)."""


def _text(text: str) -> str:
    return text


def _path(text: str) -> str:
    return os.path.expanduser(text)


def _yes(text: str) -> bool:
    # AutoArchive takes all other words for yes; a misspelt no would be one.
    if text.strip().lower() in ("no", "false", "0"):
        return False
    if text.strip().lower() in ("yes", "true", "1"):
        return True
    raise ValueError("it is yes or no")


def _number(text: str) -> int:
    found = int(text) if text.strip().isascii() else -1
    if found < 0:
        raise ValueError("it is a number, and not below 0")
    return found


def _archiver(text: str) -> str:
    if text not in ARCHIVERS:
        raise ValueError("it is one of " + ", ".join(ARCHIVERS))
    return text


Reader = Callable[[str], Value]

ARCHIVING: Mapping[str, Reader] = {
    "archiver": _archiver,
    "compression-level": _number,
    "dest-dir": _path,
    "overwrite-at-start": _yes,
    "incremental": _yes,
    "restarting": _yes,
    "restart-after-level": _number,
    "restart-after-age": _number,
    "full-restart-after-count": _number,
    "full-restart-after-age": _number,
    "max-restart-level-size": _number,
    "remove-obsolete-backups": _yes,
    "keep-old-backups": _yes,
    "number-of-old-backups": _number,
}
"""The keywords of ``[Archive]`` in both kinds of files that have a meaning here."""

FORCED = ("archiver", "incremental", "restarting", "compression-level", "dest-dir")
"""Those that have a form with ``force-`` in a configuration, which overrides specifications."""

_COMMANDS = "commands are not run; put them into the timer or script that runs statepool"
_SCREEN = "use -v or -q of statepool"
_PLACE = "files are named with --aaconfig"

USELESS: Mapping[str, str] = {
    "command-before-all-backups": _COMMANDS,
    "command-after-all-backups": _COMMANDS,
    "command-before-backup": _COMMANDS,
    "command-after-backup": _COMMANDS,
    "force-command-before-backup": _COMMANDS,
    "force-command-after-backup": _COMMANDS,
    "verbose": _SCREEN,
    "quiet": _SCREEN,
    "user-config-file": _PLACE,
    "user-config-dir": _PLACE,
}
"""AutoArchive's keywords without a meaning here, and why."""

_GENERAL = ("verbose", "quiet", "archive-specs-dir", "user-config-file", "user-config-dir")
_IN_SPEC = ("command-before-backup", "command-after-backup")
_CONTENT = ("path", "include-files", "exclude-files")


# -- the program's configuration -------------------------------------------------------------------


def read_config(path: Path) -> Config:
    """
    Read a configuration of the program.

    :param path: of the file, absolute
    :raises ConfigError: it has a section or keyword that AutoArchive does not know, or a wrong
        value
    """
    parser = configparser.ConfigParser(interpolation=None)
    _parse(parser, path)
    _require_sections(parser, path, ("General", "Archive"))
    values: dict[str, Value] = {}
    unused: list[Unused] = []
    specs = path.parent / SPECS
    for section in parser.sections():
        for keyword, text in parser.items(section):
            plain = keyword.removeprefix("force-")
            is_forced = plain != keyword and plain in (*FORCED, "overwrite-at-start")
            if keyword in USELESS and (section == "General") == (keyword in _GENERAL):
                unused.append(Unused(path, section, keyword, USELESS[keyword]))
            elif section == "General" and keyword == "archive-specs-dir":
                specs = path.parent / _path(text) if text else specs
            elif section == "Archive" and (keyword in ARCHIVING or is_forced):
                if text:
                    values[keyword] = _read(path, section, keyword, ARCHIVING[plain], text)
            else:
                raise _unknown(path, section, keyword)
    return Config(values, specs, tuple(unused))


def read_specs(config: Config) -> list[Spec]:
    """
    :returns: the specifications in the directory of a configuration, by their names
    :raises ConfigError: one of them cannot be used, or there are two of one name
    """
    with about("list", Subject(str(config.specs), path=str(config.specs))):
        names = sorted(name for name in os.listdir(config.specs) if name.endswith(SUFFIX))
    found = [read_spec(config.specs / name, config) for name in names]
    seen: dict[str, Path] = {}
    for spec in found:
        first = seen.setdefault(spec.definition.backup_id, spec.path)
        if first != spec.path:
            raise ConfigError(
                f"{first} and {spec.path} specify archives of the same name",
                path=str(spec.path),
                hint="change the name of one of them",
            )
    return found


# -- specifications --------------------------------------------------------------------------------


def read_spec(path: Path, config: Config | None = None) -> Spec:
    """
    Read the specification of an archive.

    :param path: of the file, absolute
    :param config: says what the specification does not; by default what AutoArchive does then
    :raises ConfigError: it has a section or keyword that AutoArchive does not know, or lacks one,
        or has a wrong value
    """
    config = config or Config({}, path.parent)
    file = _SpecFile(path, config.specs)
    values = {**DEFAULTS, **config.values}
    unused = list(file.unused())
    for keyword, text in file.items("Archive"):
        if keyword in ARCHIVING:
            if text:
                values[keyword] = _read(path, "Archive", keyword, ARCHIVING[keyword], text)
            else:
                values.pop(keyword, None)  # no value: as if nothing had been said
                values |= {keyword: DEFAULTS[keyword]} if keyword in DEFAULTS else {}
    for keyword, value in config.values.items():
        if keyword.startswith("force-"):
            values[keyword.removeprefix("force-")] = value
    for keyword in _CONTENT:
        if file.get("Content", keyword) is None:
            raise ConfigError(
                f"{path} has no {keyword} in its section [Content]",
                path=str(path),
                hint="without paths, it is an empty line: exclude-files =",
            )
    return _made(path, file, values, tuple(unused))


def _made(
    path: Path, file: _SpecFile, values: Mapping[str, Value], unused: tuple[Unused, ...]
) -> Spec:
    archiver, kind = ARCHIVERS[str(values["archiver"])]
    root = os.path.abspath(_path(file.get("Content", "path") or ""))
    name = file.get("Content", "name") or path.name.removesuffix(SUFFIX)

    def number(keyword: str) -> int | None:
        found = values.get(keyword)
        return int(found) if found is not None else None

    try:
        definition = BackupDefinition(
            name,
            kind,
            Path(str(values["dest-dir"])),
            root,
            frozenset(_files(root, file.get("Content", "include-files") or "")),
            frozenset(_files(root, file.get("Content", "exclude-files") or "")),
        )
    except (InvalidName, UsageError) as error:
        raise ConfigError(f"{path}: {error.message}", path=str(path), hint=error.hint) from error
    keeps = bool(values.get("keep-old-backups", False))
    return Spec(
        path=path,
        definition=definition,
        archiver=archiver,
        strength=number("compression-level"),
        overwrite_at_start=bool(values.get("overwrite-at-start", False)),
        incremental=bool(values.get("incremental", False)),
        restarting=bool(values.get("restarting", False)),
        restart_after_level=int(values["restart-after-level"]),
        restart_after_age=number("restart-after-age"),
        full_restart_after_count=number("full-restart-after-count"),
        full_restart_after_age=number("full-restart-after-age"),
        max_restart_level_size=number("max-restart-level-size"),
        remove_obsolete=bool(values.get("remove-obsolete-backups", False)),
        keep=int(values["number-of-old-backups"]) if keeps else 0,
        unused=unused,
    )


_WORDS = re.compile(r'"([^"]+)"|(\S+)')


def _files(root: str, text: str) -> Iterator[str]:
    """
    Split a list of files: by spaces, unless they are in double quotes. As AutoArchive does, leave
    out the beginning of a path that leads above the root, and expand the wildcards of the shell.
    """
    for quoted, plain in _WORDS.findall(text):
        parts = os.path.normpath(quoted or plain).split("/")
        while parts and parts[0] in ("", ".."):
            parts.pop(0)
        path = "/".join(parts)
        if not path:
            continue
        found = sorted(glob.glob(path, root_dir=root)) if glob.has_magic(path) else []
        yield from found or [path]


class _SpecFile:
    """
    A specification as it is written.

    :param path: of the file
    :param specs: the directory with other specifications
    """

    def __init__(self, path: Path, specs: Path, depth: int = 0) -> None:
        self._path, self._specs, self._depth = path, specs, depth
        self._parser = configparser.ConfigParser(allow_no_value=True)
        # The letters of keywords in these files matter.
        self._parser.optionxform = str  # type: ignore[assignment, method-assign]
        _parse(self._parser, path)
        _require_sections(self._parser, path, ("External", "Archive", "Content"))
        for section in ("Archive", "Content"):
            for keyword, text in self._raw(section):
                if text is None:
                    raise ConfigError(
                        f"{path}: [{section}] {keyword} has no '='",
                        path=str(path),
                        hint=f"write it as: {keyword} = VALUE, or without a value: {keyword} =",
                    )
        known = {*ARCHIVING, *USELESS, *_GENERAL, *(f"force-{one}" for one in ARCHIVING)}
        for section in ("Archive", "Content"):
            for keyword, _ in self._raw(section):
                if keyword in known and (section, keyword) not in self._allowed():
                    raise _unknown(path, section, keyword)

    @staticmethod
    def _allowed() -> set[tuple[str, str]]:
        return {("Archive", keyword) for keyword in (*ARCHIVING, *_IN_SPEC)}

    def _raw(self, section: str) -> list[tuple[str, str | None]]:
        """:returns: the keywords of a section, and their texts as they are written"""
        if not self._parser.has_section(section):
            return []
        return [(key, text) for key, text in self._parser.items(section, raw=True)]

    def items(self, section: str) -> Iterator[tuple[str, str]]:
        """:returns: the keywords of a section, and their texts"""
        for keyword, _ in self._raw(section):
            yield keyword, self.get(section, keyword) or ""

    def get(self, section: str, keyword: str) -> str | None:
        """
        :returns: the text of a keyword, with what it refers to; None if it is not there
        :raises ConfigError: it refers to something that is not there
        """
        if not self._parser.has_option(section, keyword):
            return None
        try:
            text = self._parser.get(section, keyword)
        except configparser.InterpolationError as error:
            raise self._bad_reference(section, keyword, " ".join(str(error).split())) from error
        return _REFERENCE.sub(
            lambda found: self._external(section, keyword, found["name"], found["keyword"]), text
        )

    def unused(self) -> Iterator[Unused]:
        """:returns: the keywords without a meaning here"""
        for keyword, _ in self._raw("Archive"):
            if keyword in USELESS:
                yield Unused(self._path, "Archive", keyword, USELESS[keyword])
        texts = [text or "" for section in ("Archive", "Content") for _, text in self._raw(section)]
        known = {("Archive", keyword) for keyword in (*ARCHIVING, *USELESS)}
        known |= {("Content", keyword) for keyword in (*_CONTENT, "name")}
        for section in ("Archive", "Content"):
            for keyword, _ in self._raw(section):
                is_named = any(f"%({keyword})s" in text for text in texts)
                if (section, keyword) not in known and not is_named:
                    reason = "AutoArchive does not know it, and no value of this file refers to it"
                    yield Unused(self._path, section, keyword, reason)

    def _external(self, section: str, keyword: str, name: str, wanted: str) -> str:
        externals = dict(self._raw("External"))
        if name not in externals:
            told = f"@({name}.{wanted}) is of no file in the section [External]"
            raise self._bad_reference(section, keyword, told)
        if self._depth == DEEPEST:
            told = "more than so many files refer to each other, perhaps in a circle"
            raise self._bad_reference(section, keyword, told)
        place = externals[name]
        path = (
            self._specs / f"{name}{SUFFIX}" if place is None else self._path.parent / _path(place)
        )
        other = _SpecFile(Path(os.path.normpath(path)), self._specs, self._depth + 1)
        text = other.get(section, wanted)
        if text is None:
            told = f"there is no {wanted} in the section [{section}] of {other._path}"
            raise self._bad_reference(section, keyword, told)
        return text

    def _bad_reference(self, section: str, keyword: str, told: str) -> ConfigError:
        return ConfigError(
            f"{self._path}: [{section}] {keyword} refers to something that is not there: {told}",
            path=str(self._path),
            hint="correct the reference",
        )


_REFERENCE = re.compile(
    r"(?P<quote>[\"']?)@\((?P<name>[A-Za-z0-9_-]+)\.(?P<keyword>[A-Za-z0-9_-]+)\)(?P=quote)"
)


# -- reading ---------------------------------------------------------------------------------------


def _parse(parser: configparser.ConfigParser, path: Path) -> None:
    with about("read", Subject(str(path), path=str(path))), open(path, "rb") as file:
        content = file.read(_LONGEST + 1)
    try:
        if len(content) > _LONGEST:
            raise ConfigError(f"{path} is longer than {_LONGEST} bytes", path=str(path))
        parser.read_string(content.decode(), str(path))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not a configuration of AutoArchive: {' '.join(str(error).split())}",
            path=str(path),
            hint="it has sections, [Archive], and lines in them: KEYWORD = VALUE",
        ) from error
    if not parser.sections():
        raise ConfigError(
            f"{path} has no section", path=str(path), hint="begin it with [Archive] or [Content]"
        )


_LONGEST = 1 << 20
"""Bytes of a file that are read at most."""


def _require_sections(
    parser: configparser.ConfigParser, path: Path, known: tuple[str, ...]
) -> None:
    for section in parser.sections():
        if section not in known:
            raise ConfigError(
                f"{path} has the section [{section}], which AutoArchive does not know",
                path=str(path),
                hint="known are " + ", ".join(f"[{one}]" for one in known),
            )


def _read(path: Path, section: str, keyword: str, reader: Reader, text: str) -> Value:
    try:
        return reader(text)
    except ValueError as error:
        told = f"{path}: [{section}] {keyword} cannot be {text!r}"
        reason = str(error) if reader is not _number else "it is a number, and not below 0"
        raise ConfigError(told, path=str(path), hint=reason) from error


def _unknown(path: Path, section: str, keyword: str) -> ConfigError:
    return ConfigError(
        f"{path}: AutoArchive has no keyword {keyword} in the section [{section}] of such a file",
        path=str(path),
        hint="correct or remove it",
    )
