"""
Settings from files, the environment and the command line, as one value.

Each of these layers overrides those before it, key by key (so ``sources`` of a project replace
those of a user, they are not added up):

1. the defaults;
2. ``statepool/statepool.toml`` in each directory of ``$XDG_CONFIG_DIRS``, for the whole host
   (``/etc/xdg`` where the variable is not set);
3. ``$XDG_CONFIG_HOME/statepool/statepool.toml``, for a user (``~/.config`` where the variable is
   not set);
4. ``./statepool.toml``, for a project; a caller that knows the project's directory, as pytest does,
   has it looked for there and above, if the working directory has none;
5. the environment;
6. overrides, such as flags of the command line.

A file named by ``--config`` or ``STATEPOOL_CONFIG`` takes the place of all these files, and must
exist. The keys of a file are::

    cache        = "cache"              # its directory; default: statepool in $XDG_DATA_HOME or
                                        # ~/.local/share
    sources      = [                    # where the cache is filled from, in this order
        "/srv/pool",
        { location = "ssh://lab@store/srv/pool", name = "store", authority = true },
    ]
    fresh        = 60                   # seconds for which a source need not be asked again
    offline      = false                # ask no source at all
    min-free     = "10G"                # bytes, or with K, M, G, T, P (powers of 1024)
    lock-timeout = 3600                 # seconds
    max-depth    = 256                  # states
    tool-timeout = 60                   # seconds
    probe-timeout = 2                   # seconds that a silent source may take while others answer

(a cache that an earlier version has made in ``~/.cache`` is used as long as there is none in the
new place), and of pools on other hosts::

    timeout         = 30                # seconds that a host may be silent while we wait for it
    connect-timeout = 20                # seconds
    retries         = 3                 # after a lost connection, for example
    retry-pause     = 0.5               # seconds; doubled each time
    compress        = "auto"            # or "on", "off"
    carrier         = "auto"            # or "openssh", "paramiko"; a source can have its own
    ssh-config      = "ssh_config"      # instead of ~/.ssh/config and /etc/ssh/ssh_config
    known-hosts     = "known_hosts"     # instead of the files that ssh uses

A path that is not absolute is relative to the file that names it; elsewhere to the working
directory. In the environment a key is ``STATEPOOL_`` and its name in capitals, with ``_`` for
``-``; an empty variable counts as one that is not set. ``STATEPOOL_SOURCES`` holds locations
separated by blanks or newlines (a colon would not do: locations have some); a blank within one is
written ``%20`` in a ``file://`` location.

``STATEPOOL_SSH_PASSWORD`` and ``STATEPOOL_SSH_PASSPHRASE`` are the password of accounts and the
passphrase of keys. They are read from the environment only, and never shown; programs that are
started from here, builders and machines among them, do not inherit them.
"""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from attrs import evolve, field, frozen

from statepool.config import places
from statepool.errors import ConfigError, UsageError
from statepool.model.location import Location
from statepool.model.names import is_name
from statepool.model.scope import Scope
from statepool.model.secrets import SECRET_VARIABLES, VARIABLES, GivenSecrets
from statepool.model.settings import CarrierName, Compress, Settings

PREFIX = "STATEPOOL_"
"""The prefix of our environment variables."""

SECTIONS = ("serve", "carts", "stage", "collect")
"""
The sections of a file that are for the service of carts, for its clients, and for the actions of a
backup.
"""

CARTS = PREFIX + "CARTS"
"""The variable that says where a service of carts is; the command line reads it."""

CACHE_NAME = "cache"
"""The name of the cache in listings; a source cannot have this name."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGTP]?)(?:iB)?\Z", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_Number = TypeVar("_Number", int, float)
_TRUTHS = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


@frozen
class SourceConfig:
    """
    A source, as configured.

    :param location: its location
    :param name: its name for the user; by default its location
    :param scope: its scope
    :param authority: whether it is right if sources have different content under one name
    :param carrier: the carrier of SSH for it; None: as in the settings
    """

    location: Location
    name: str
    scope: Scope = Scope.SHARED
    authority: bool = False
    carrier: CarrierName | None = None


Section = tuple[str, Mapping[str, object]]
"""A section of a file, with the file that it is from."""


@frozen
class Config:
    """
    All settings.

    :param cache: the directory of the cache, absolute
    :param sources: the sources that fill it, in the order of preference
    :param settings: the limits, timeouts and other options
    :param files: the files that were read, in the order in which they override each other
    :param advice: what the user should change, if anything
    :param serve: the sections ``[serve]`` of these files, each with the file that it is from: the
        service of carts reads them
    :param carts: likewise the sections ``[carts]``, for clients of such a service
    :param stage: likewise the sections ``[stage]``, for the stage action of a backup
    :param collect: likewise the sections ``[collect]``, for its collect action
    """

    cache: str
    sources: tuple[SourceConfig, ...] = ()
    settings: Settings = field(factory=Settings)
    files: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    serve: tuple[Section, ...] = ()
    carts: tuple[Section, ...] = ()
    stage: tuple[Section, ...] = ()
    collect: tuple[Section, ...] = ()

    SECRET_VARIABLES: ClassVar = SECRET_VARIABLES
    """The environment variables that programs started from here do not get."""

    def settings_for(self, source: SourceConfig) -> Settings:
        """:returns: the settings for one of the sources"""
        return (
            evolve(self.settings, carrier=source.carrier)
            if source.carrier is not None
            else self.settings
        )

    @classmethod
    def load(
        cls,
        overrides: Mapping[str, object] | None = None,
        *,
        config_file: str | os.PathLike[str] | None = None,
        project: str | os.PathLike[str] | None = None,
        spelled: Mapping[str, str] | None = None,
    ) -> Config:
        """
        :param overrides: as for :func:`load`
        :param config_file: read this file instead of the usual ones
        :param project: the directory of the project: its file is looked for there, and then above,
            if there is none in the working directory
        :param spelled: as for :func:`load`
        :returns: the settings of this host, user and project
        :raises ConfigError: something in them cannot be used; the message names the place and the
            key
        """
        return load(overrides, config_file=config_file, project=project, spelled=spelled)


class _Kind(enum.Enum):
    FILE = enum.auto()
    ENVIRONMENT = enum.auto()
    OVERRIDES = enum.auto()


@frozen
class _Layer:
    """
    The settings of one layer. ``name`` and ``spelled`` are for messages; paths are relative to
    ``base``.
    """

    kind: _Kind
    name: str
    base: str
    home: str | None
    values: Mapping[str, object]
    spelled: Mapping[str, str] = field(factory=dict)

    def spell(self, key: str) -> str:
        """:returns: the place of a key, and its spelling there"""
        if self.kind is _Kind.ENVIRONMENT:
            return f"{self.name}: {_variable(key)}"
        setting, dot, part = key.partition(".")
        return self.spelled.get(setting, f"{self.name}: {setting}") + dot + part

    def error(self, key: str, problem: str, hint: str) -> ConfigError:
        """:returns: an error that names the place and the key"""
        path = self.name if self.kind is _Kind.FILE else None
        return ConfigError(f"{self.spell(key)}: {problem}", hint=hint, path=path)


def load(
    overrides: Mapping[str, object] | None = None,
    *,
    config_file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    project: str | os.PathLike[str] | None = None,
    spelled: Mapping[str, str] | None = None,
) -> Config:
    """
    Read all layers.

    :param overrides: values of the last layer, by the names of the keys; None stands for one that
        was not given
    :param config_file: read this file instead of the usual ones
    :param environ: the environment; None: that of this process
    :param cwd: the working directory; None: that of this process
    :param project: as for :meth:`Config.load`
    :param spelled: for messages, by the names of the keys: where an override comes from and how it
        is written there
    :raises ConfigError: something in them cannot be used; the message names the place and the key
    """
    environ = os.environ if environ is None else environ
    base = _working_directory(cwd)
    home = places.home(environ)
    file = config_file if config_file is not None else environ.get(_variable("config")) or None
    layers = [_read(path, home) for path in places.files(file, environ, base, home, project)]
    found = [layer for layer in layers if layer is not None]
    files = tuple(layer.name for layer in found)
    found.append(_Layer(_Kind.ENVIRONMENT, "the environment", base, home, _variables(environ)))
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    found.append(_Layer(_Kind.OVERRIDES, "the overrides", base, home, given, spelled or {}))
    values: dict[str, Any] = {}
    sections: dict[str, list[Section]] = {name: [] for name in SECTIONS}
    for layer in found:
        if layer.kind is _Kind.FILE:
            for name in sections.keys() & layer.values.keys():
                sections[name].append((layer.name, _table(layer, name)))
            rest = {key: value for key, value in layer.values.items() if key not in sections}
            layer = evolve(layer, values=rest)
        _check_keys(layer)
        values.update(
            (key, _READERS[key](layer, key, value)) for key, value in layer.values.items()
        )
    cache, advice = (
        (values.pop("cache"), ()) if "cache" in values else places.default_cache(environ, home)
    )
    sources = values.pop("sources", ())
    settings = Settings(
        **{_field(key): value for key, value in values.items()}, secrets=_secrets(environ)
    )
    return Config(
        cache=cache,
        sources=sources,
        settings=settings,
        files=files,
        advice=advice,
        **{name: tuple(found) for name, found in sections.items()},
    )


def _table(layer: _Layer, key: str) -> Mapping[str, object]:
    value = layer.values[key]
    if not isinstance(value, Mapping):
        raise layer.error(key, "it is not a section", f"write [{key}], and its settings below")
    return value


def _secrets(environ: Mapping[str, str]) -> GivenSecrets | None:
    given = {kind: environ[name] for kind, name in VARIABLES.items() if environ.get(name)}
    return GivenSecrets(**given) if given else None


# -- where the layers are --------------------------------------------------------------------------


def _working_directory(cwd: str | os.PathLike[str] | None) -> str:
    try:
        return os.path.abspath(os.getcwd() if cwd is None else cwd)
    except FileNotFoundError as error:
        raise ConfigError(
            "the working directory does not exist any more", hint="change to one that does"
        ) from error


def _read(file: tuple[str, bool], home: str | None) -> _Layer | None:
    path, needed = file
    # a file named by the user may be a pipe of the shell
    if not needed and os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ConfigError(
            f"{path}: is not a regular file", hint="make it one, or take it away", path=path
        )
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if not needed:
            return None
        raise ConfigError(
            f"{path}: there is no such file",
            hint="check the name given as --config or in STATEPOOL_CONFIG",
            path=path,
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{path}: cannot be read: {reason}",
            hint="make it a readable file, or name another one",
            path=path,
        ) from error
    import tomllib  # slow to import, and often not needed

    try:
        # some editors begin a file with a byte order mark
        values = tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text", hint="TOML files are", path=path) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: is not valid TOML: {error}",
            hint="see https://toml.io for the syntax",
            path=path,
        ) from error
    return _Layer(_Kind.FILE, path, os.path.dirname(path), home, values)


def _variable(key: str) -> str:
    return PREFIX + key.upper().replace("-", "_")


def _variables(environ: Mapping[str, str]) -> dict[str, object]:
    """
    Read the variables with our prefix. Unknown ones are ignored, since other programs may use the
    prefix, unless they look like a mistyped name of ours.
    """
    known = {_variable(key): key for key in _READERS}
    for name in environ:
        if name.startswith(PREFIX) and name not in (
            *known,
            _variable("config"),
            *SECRET_VARIABLES,
            CARTS,
        ):
            likely = _close(
                name.removeprefix(PREFIX),
                [other.removeprefix(PREFIX) for other in (*known, *SECRET_VARIABLES, CARTS)],
            )
            if likely is not None:
                raise ConfigError(
                    f"the environment: {name} is not a setting",
                    hint=f"did you mean {PREFIX}{likely}?",
                )
    return {key: environ[name] for name, key in known.items() if environ.get(name)}


def _close(text: str, known: list[str]) -> str | None:
    from difflib import get_close_matches  # needed only for an error

    return next(iter(get_close_matches(text, known, n=1, cutoff=0.7)), None)


def _check_keys(layer: _Layer) -> None:
    for key in layer.values:
        if key not in _READERS:
            likely = _close(key, list(_READERS))
            hint = (
                f"did you mean {likely}?"
                if likely is not None
                else "settings are " + ", ".join(_READERS)
            )
            raise layer.error(_shorten(key), "there is no such setting", hint)


def _shorten(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- what the values are: each reader takes a layer, a key and what is there -----------------------


def _location(layer: _Layer, key: str, value: object) -> Location:
    """
    Make a relative path absolute, from the layer's base; everything else is as
    :meth:`Location.parse` reads it.
    """
    if not isinstance(value, str) or not value:
        raise layer.error(
            key, f"not a location: {_shorten(value)!r}", "write a path or a URL as a text"
        )
    text = value
    if text == "~" or text.startswith("~/"):
        if layer.home is None:
            raise layer.error(
                key, f"there is no home directory for {_shorten(text)!r}", "write an absolute path"
            )
        text = layer.home + text[1:]
    host, colon, _ = text.partition(":")
    if not (_SCHEME.match(text) or text.startswith(("/", "~")) or (colon and "/" not in host)):
        text = os.path.join(layer.base, text)
    try:
        return Location.parse(text)
    except UsageError as error:
        raise layer.error(key, error.message, error.hint or "write a path or a URL") from error


def _cache(layer: _Layer, key: str, value: object) -> str:
    location = _location(layer, key, os.fspath(value) if isinstance(value, os.PathLike) else value)
    if location.scheme != "file":
        raise layer.error(
            key,
            f"{location} is not a directory of this host",
            "the cache is a path; name other pools as sources",
        )
    return location.path


def _sources(layer: _Layer, key: str, value: object) -> tuple[SourceConfig, ...]:
    if layer.kind is not _Kind.FILE and isinstance(value, str):
        value = value.split()
    if not isinstance(value, list | tuple):
        raise layer.error(
            key,
            f"not a list: {_shorten(value)!r}",
            'write sources = ["/srv/pool"], or [[sources]] with location, name, scope',
        )
    sources = tuple(
        _source(layer, f"{key}[{index}]" if layer.kind is _Kind.FILE else key, item)
        for index, item in enumerate(value)
    )
    seen: dict[str, SourceConfig] = {}
    for source in sources:
        other = seen.setdefault(source.name, source)
        if other is not source:
            places = (
                f"{other.location}"
                if other.location == source.location
                else f"{other.location} and {source.location}"
            )
            raise layer.error(
                key,
                f"two sources are named {source.name!r}: {places}",
                "give each a name of its own, or leave one out",
            )
    return sources


def _source(layer: _Layer, key: str, value: object) -> SourceConfig:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        location = _location(layer, key, value)
        return SourceConfig(location, str(location))
    if not isinstance(value, Mapping):
        raise layer.error(
            key,
            f"not a location: {_shorten(value)!r}",
            "write a text, or a table with location, name and scope",
        )
    for part in value:
        if part not in ("location", "name", "scope", "authority", "carrier"):
            raise layer.error(
                f"{key}.{_shorten(part)}",
                "there is no such setting",
                "a source has location, name, scope, authority and carrier",
            )
    if "location" not in value:
        raise layer.error(key, "the source has no location", "add location = ...")
    location = _location(layer, f"{key}.location", value["location"])
    name = value.get("name", str(location))
    if "name" in value and not (isinstance(name, str) and is_name(name) and name != CACHE_NAME):
        hint = f"letters, digits and . _ + - make a name; {CACHE_NAME!r} is the cache"
        raise layer.error(f"{key}.name", f"not a name for a source: {_shorten(name)!r}", hint)
    scope = _scope(layer, f"{key}.scope", value.get("scope", Scope.SHARED))
    authority = value.get("authority", False)
    if not isinstance(authority, bool):
        raise layer.error(
            f"{key}.authority",
            f"neither true nor false: {_shorten(authority)!r}",
            "write true or false",
        )
    carrier = _carrier(layer, f"{key}.carrier", value["carrier"]) if "carrier" in value else None
    return SourceConfig(location, str(name), scope, authority, carrier)


def _scope(layer: _Layer, key: str, value: object) -> Scope:
    scopes = [scope for scope in Scope if scope is not Scope.OWN]
    if value not in scopes:
        hint = "scopes of sources are " + ", ".join(scopes)
        raise layer.error(
            key,
            f"not a scope of a source: {_shorten(value)!r}",
            hint + (" (own is the cache)" if value == Scope.OWN else ""),
        )
    return Scope(str(value))


def _seconds(layer: _Layer, key: str, value: object) -> float:
    number = value
    if layer.kind is not _Kind.FILE and isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise layer.error(
            key,
            f"not a number of seconds: {_shorten(value)!r}",
            f"write a number, such as {_default(key)}",
        )
    return _checked(layer, key, float(number))


def _count(layer: _Layer, key: str, value: object) -> int:
    number = (
        int(value)
        if layer.kind is not _Kind.FILE
        and isinstance(value, str)
        and re.fullmatch("[0-9]{1,18}", value)
        else value
    )
    if type(number) is not int:
        raise layer.error(
            key,
            f"not a whole number: {_shorten(value)!r}",
            f"write a number, such as {_default(key)}",
        )
    return _checked(layer, key, number)


def _size(layer: _Layer, key: str, value: object) -> int:
    if type(value) is int:
        return _checked(layer, key, value)
    match = _SIZE.match(value) if isinstance(value, str) and len(value) < 40 else None
    if match is None:
        raise layer.error(
            key,
            f"not a number of bytes: {_shorten(value)!r}",
            'write a number, or one with K, M, G, T or P, such as "10G"',
        )
    number, unit = match.groups()
    exact = int(number) if number.isdigit() else float(number)
    return _checked(layer, key, int(exact * _UNITS[unit.upper()]))


def _truth(layer: _Layer, key: str, value: object) -> bool:
    if layer.kind is not _Kind.FILE and isinstance(value, str):
        value = _TRUTHS.get(value.lower(), value)
    if not isinstance(value, bool):
        raise layer.error(
            key, f"neither true nor false: {_shorten(value)!r}", "write true or false"
        )
    return value


def _carrier(layer: _Layer, key: str, value: object) -> CarrierName:
    if value not in list(CarrierName):
        raise layer.error(
            key,
            f"nothing that carries SSH: {_shorten(value)!r}",
            "write one of " + ", ".join(CarrierName),
        )
    return CarrierName(str(value))


def _compress(layer: _Layer, key: str, value: object) -> Compress:
    if isinstance(value, bool):
        value = "on" if value else "off"  # as TOML may have booleans
    if value not in list(Compress):
        raise layer.error(
            key,
            f"not a way to compress: {_shorten(value)!r}",
            "write one of " + ", ".join(Compress),
        )
    return Compress(str(value))


def _path(layer: _Layer, key: str, value: object) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value or "\0" in value:
        raise layer.error(
            key, f"not a path: {_shorten(value)!r}", "write the path of a file as a text"
        )
    if value == "~" or value.startswith("~/"):
        if layer.home is None:
            raise layer.error(
                key, f"there is no home directory for {_shorten(value)!r}", "write an absolute path"
            )
        value = layer.home + value[1:]
    return os.path.join(layer.base, value)


def _field(key: str) -> str:
    return key.replace("-", "_")


def _default(key: str) -> str:
    return f"{getattr(Settings(), _field(key)):g}"


def _checked(layer: _Layer, key: str, value: _Number) -> _Number:
    """Check a value against the bounds of :class:`Settings`."""
    candidate: dict[str, Any] = {_field(key): value}
    try:
        Settings(**candidate)
    except ValueError as error:
        raise layer.error(
            key, f"{value:g} is out of bounds: {error}", f"the default is {_default(key)}"
        ) from error
    return value


_READERS: dict[str, Callable[[_Layer, str, object], object]] = {
    "cache": _cache,
    "sources": _sources,
    "fresh": _seconds,
    "offline": _truth,
    "min-free": _size,
    "lock-timeout": _seconds,
    "max-depth": _count,
    "tool-timeout": _seconds,
    "probe-timeout": _seconds,
    "timeout": _seconds,
    "connect-timeout": _seconds,
    "retries": _count,
    "retry-pause": _seconds,
    "compress": _compress,
    "carrier": _carrier,
    "ssh-config": _path,
    "known-hosts": _path,
}
