"""
The settings of the service: the section ``[serve]`` of ``statepool.toml``, or a configuration of
Cartd.

``docs/serve.rst`` lists the keys.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attrs import evolve, field, fields_dict, frozen

from statepool import ConfigError

_UNITS = {"": 1, "B": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("b", 1024))
    for power, prefix in enumerate(("K", "M", "G", "T"), 1)
}
"""Units of sizes as in Cartd: ``KB`` is 1000 bytes, ``Kb`` is 1024."""

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*\Z")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}\Z")

_BROKERS = ("amqp", "amqps", "pyamqp", "redis", "rediss")
_RESULT_BACKENDS = ("redis", "rediss", "rpc")

POOLS = "pools"
"""The archive that always exists: states of the configured pools."""


def without_password(url: str) -> str:
    """:returns: a URL that can be shown"""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":…@")).geturl()


def parse_size(text: object) -> int:
    """
    Parse a size as in Cartd.

    :param text: bytes, or a number with ``B KB MB GB TB`` (decimal) or ``b Kb Mb Gb Tb`` (binary)
    :returns: bytes
    :raises ConfigError: it is neither
    """
    found = _SIZE.match(str(text))
    if isinstance(text, bool) or found is None or found[2] not in _UNITS:
        raise ConfigError(
            f"{text!r} is not a size",
            hint="write bytes, or a number with B KB MB GB TB, b Kb Mb Gb Tb",
        )
    return int(float(found[1]) * _UNITS[found[2]])


def parse_seconds(value: object) -> float:
    """
    :returns: a number of seconds that is not negative
    :raises ConfigError: it is no such number
    """
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = -1.0
    if isinstance(value, bool) or not 0 <= seconds < 1e9:
        raise ConfigError(f"{value!r} is not a number of seconds", hint="write a number such as 30")
    return seconds


def _count(value: object) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(str(value)) < 1:
        raise ConfigError(f"{value!r} is not a count", hint="write a whole number from 1 on")
    return int(str(value))


def _port(value: object) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(str(value)) > 65535:
        raise ConfigError(f"{value!r} is not a TCP port", hint="write a number up to 65535")
    return int(str(value))


def _truth(value: object) -> bool:
    truth = configparser.ConfigParser.BOOLEAN_STATES.get(str(value).lower())
    if truth is None:
        raise ConfigError(f"{value!r} is neither true nor false", hint="write true or false")
    return truth


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ConfigError(f"{value!r} is not a text", hint="write a text in quotes")
    return value


def _tasks(value: object) -> str:
    if value not in ("threads", "celery"):
        hint = 'write "threads" or "celery"'
        raise ConfigError(f"{value!r} cannot run tasks", hint=hint)
    return str(value)


def _is_url(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        return False


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{value!r} is not a list", hint="write a list of texts")
    return tuple(map(_text, value))


def _path(value: object) -> Path:
    return Path(os.path.abspath(os.path.expanduser(_text(value))))


def _maybe_path(value: object) -> Path | None:
    return _path(value) if value is not None else None


def _maybe_text(value: object) -> str | None:
    return _text(value) if value is not None else None


def _pools(value: object) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{value!r} is not a table", hint='write: pools = { store = "/srv/pool" }'
        )
    return {_name(name): _text(place) for name, place in value.items()}


def _archives(value: object) -> Mapping[str, Mapping[str, object]]:
    if not isinstance(value, Mapping) or not all(
        isinstance(options, Mapping) and isinstance(options.get("type"), str)
        for options in value.values()
    ):
        hint = 'write: archives.lab = { type = "directory", path = "/srv/lab" }'
        raise ConfigError("archives are tables with a type", hint=hint)
    return {_name(name): dict(options) for name, options in value.items()}


def _name(text: str) -> str:
    if not _NAME.match(text):
        hint = "use up to 32 small letters, digits, - and _"
        raise ConfigError(f"{text!r} cannot name a pool or an archive", hint=hint)
    return text


def _setting(default: Any, read: Callable[[Any], Any]) -> Any:
    return field(default=read(default), metadata={"read": read})


def _default_directory() -> Path:
    return Path(os.path.expanduser("~/.local/share/statepool-carts"))


@frozen
class ServeSettings:
    """
    Settings of the service. Attributes are the keys of ``[serve]``, with ``_`` for ``-``.

    :param directory: the directory of carts, and of the database unless ``database`` is set
    :param database: URL of the database; None: SQLite in the directory
    :param connect_attempts: how often to try to connect to the database at the start
    :param connect_wait: seconds between two tries
    :param archive: the archive of list entries that name none
    :param archives: other archives than pools, by name: ``type`` and the options of that type
    :param pools: pools that are served at ``/pools/NAME/``
    :param bundle: whether a tar is made in advance if the list of a cart does not say so
    :param lru_buffer_time: seconds after its last use for which a cart is not removed to make room
    :param lru_purge: whether any cart is removed to make room
    :param transfer_size: bytes that are moved at a time
    :param workers: carts that are filled at the same time
    :param tasks: what fills carts: threads of this process, or workers of Celery
    :param broker: URL of the broker of Celery
    :param result_backend: URL of the result backend of Celery, if there is one
    :param sweep: seconds between two searches for carts that no process fills
    :param tries: how often to try to get a file; all tries are made twice, since the cart is queued
        once more
    :param pause: seconds between two tries
    :param poll: seconds between two polls whether an archive has staged a file
    :param archive_timeout: timeout in seconds for an answer of an archive
    :param requests: requests that are answered at the same time
    :param timeout: timeout in seconds for a silent client
    :param header_timeout: seconds in which a client must have sent its request; as many for a list
    :param least_rate: bytes a second that a client must take of an answer, over a minute; 0: any
    :param max_body: the most bytes of the list of a cart
    :param max_files: the most files of one cart
    :param max_carts: the most carts of one owner
    :param trust_header: the header in which a proxy names the user
    :param trusted_proxies: addresses of proxies from which that header is trusted
    :param certificate: PEM file with the chain of certificates for TLS
    :param key: PEM file with its private key
    """

    address: str = _setting("127.0.0.1", _text)
    port: int = _setting(8081, _port)
    directory: Path = field(factory=_default_directory, metadata={"read": _path})
    database: str | None = _setting(None, _maybe_text)
    connect_attempts: int = _setting(10, _count)
    connect_wait: float = _setting(20, parse_seconds)
    archive: str = _setting(POOLS, _text)
    archives: Mapping[str, Mapping[str, object]] = field(factory=dict, metadata={"read": _archives})
    pools: Mapping[str, str] = field(factory=dict, metadata={"read": _pools})
    bundle: bool = _setting(False, _truth)
    lru_buffer_time: float = _setting(0, parse_seconds)
    lru_purge: bool = _setting(True, _truth)
    transfer_size: int = _setting("4 Mb", parse_size)
    workers: int = _setting(4, _count)
    tasks: str = _setting("threads", _tasks)
    broker: str | None = _setting(None, _maybe_text)
    result_backend: str | None = _setting(None, _maybe_text)
    sweep: float = _setting(60, parse_seconds)
    tries: int = _setting(5, _count)
    pause: float = _setting(1, parse_seconds)
    poll: float = _setting(5, parse_seconds)
    archive_timeout: float = _setting(60, parse_seconds)
    requests: int = _setting(256, _count)
    timeout: float = _setting(30, parse_seconds)
    header_timeout: float = _setting(30, parse_seconds)
    least_rate: int = _setting("1 Kb", parse_size)
    max_body: int = _setting("8 Mb", parse_size)
    max_files: int = _setting(10_000, _count)
    max_carts: int = _setting(1000, _count)
    trust_header: str | None = _setting(None, _maybe_text)
    trusted_proxies: tuple[str, ...] = _setting((), _texts)
    certificate: Path | None = _setting(None, _maybe_path)
    key: Path | None = _setting(None, _maybe_path)

    def __attrs_post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("TLS needs both a certificate and a key", hint="name both")
        if self.trust_header is not None and not self.trusted_proxies:
            raise ConfigError(
                f"the header {self.trust_header} would be believed from anywhere",
                hint="name the addresses of the proxies: trusted-proxies",
            )
        if self.archive != POOLS and self.archive not in self.archives:
            known = ", ".join([POOLS, *self.archives])
            raise ConfigError(f"there is no archive {self.archive!r}", hint=f"there are {known}")
        if self.tasks == "celery":
            self._check_celery()
        if self.transfer_size < 4096:
            raise ConfigError("transfer-size is less than 4096 bytes", hint="name a larger one")

    def _check_celery(self) -> None:
        if not _is_url(self.broker or "", _BROKERS):
            raise ConfigError(
                "Celery needs a broker: Redis or RabbitMQ",
                hint='write: broker = "redis://host:6379/0", or "amqp://user:password@host/"',
            )
        if not _is_url(self.result_backend or "rpc:", _RESULT_BACKENDS):
            raise ConfigError(
                "Celery's results can be in Redis or RabbitMQ only",
                hint='write: result-backend = "redis://host:6379/1", or "rpc://", or nothing',
            )

    @property
    def database_url(self) -> str:
        """The URL of the database."""
        return self.database or f"sqlite:///{self.directory / 'carts.sqlite'}"


_PATHS = ("directory", "certificate", "key")


Layer = tuple[str, Mapping[str, object]]
"""A section ``[serve]``, with the file that contains it."""


def from_layers(layers: Iterable[Layer]) -> ServeSettings:
    """
    :param layers: each overrides those before it, key by key
    :raises ConfigError: a key does not exist, or has a value that cannot be used
    """
    values: dict[str, Any] = {}
    where = "the defaults"
    for where, table in layers:
        values.update(_values(where, table))
    try:
        return evolve(ServeSettings(), **values)
    except ConfigError as error:
        raise ConfigError(f"{where}: [serve]: {error.message}", hint=error.hint) from error


def _values(where: str, table: Mapping[str, object]) -> dict[str, Any]:
    known, base = fields_dict(ServeSettings), os.path.dirname(where)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            hint = "settings are " + ", ".join(one.replace("_", "-") for one in known)
            raise ConfigError(f"{where}: serve.{key}: there is no such setting", hint=hint)
        if name in _PATHS and isinstance(value, str) and value:
            value = os.path.join(base, os.path.expanduser(value))
        try:
            values[name] = known[name].metadata["read"](value)
        except ConfigError as error:
            raise ConfigError(f"{where}: serve.{key}: {error.message}", hint=error.hint) from error
    return values


# -- a configuration of Cartd ----------------------------------------------------------------------

_CARTD: dict[tuple[str, str], str | None] = {
    ("cartd", "volume_path"): "directory",
    ("cartd", "transfer_size"): "transfer-size",
    ("cartd", "lru_buffer_time"): "lru-buffer-time",
    ("cartd", "lru_purge"): "lru-purge",
    ("cartd", "bundle_task"): "bundle",
    ("database", "peewee_url"): "database",
    ("database", "connect_attempts"): "connect-attempts",
    ("database", "connect_wait"): "connect-wait",
    ("celery", "broker_url"): "broker",
    ("celery", "backend_url"): "result-backend",
    ("archiveinterface", "url"): None,
}
"""The keys of Cartd's file, and the name of each here."""

_SECTION = re.compile(r"^\[(cartd|archiveinterface|celery|database)\]", re.MULTILINE)


def is_cartd_file(path: str | os.PathLike[str]) -> bool:
    """:returns: whether a file is a configuration of Cartd, by its sections"""
    try:
        return _SECTION.search(Path(path).read_text(encoding="utf-8")) is not None
    except (OSError, ValueError):
        return False  # the reader of TOML files reports the error


def read_cartd_file(path: str | os.PathLike[str]) -> tuple[dict[str, object], tuple[str, ...]]:
    """
    Read an unchanged configuration of Cartd.

    :returns: its content as a section ``[serve]``, and the keys that have no meaning here
    :raises ConfigError: it cannot be read
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, configparser.Error) as error:
        text = f"{path}: cannot be read: {error}".replace("\n", " ")
        raise ConfigError(text, hint="name a configuration of Cartd") from error
    table: dict[str, object] = {}
    ignored = []
    for section in parser.sections():
        for key, value in parser.items(section):
            if (section, key) not in _CARTD:
                ignored.append(f"[{section}] {key}")
            elif (name := _CARTD[section, key]) is not None:
                table[name] = value
            else:
                table["archives"] = {"interface": {"type": "interface", "url": value}}
                table["archive"] = "interface"
    return table, tuple(ignored)
