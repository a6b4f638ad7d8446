"""``statepool serve``, and the common part of both commands of the service."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import click

from statepool.cli import paths
from statepool.cli.report import warn
from statepool.cli.session import Command, Session
from statepool.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from statepool.carts.service import Service
    from statepool.carts.settings import ServeSettings

_NEEDED = ("cheroot", "flask", "peewee", "prometheus_client")
"""Packages of the extra ``serve``."""

_NEEDED_BY_CELERY = ("celery", "redis")
"""Packages of the extra ``celery``."""


def settings_of(session: Session, **given: Any) -> ServeSettings:
    """
    Read the settings of the service: a configuration of Cartd can be used unchanged.

    :param given: options, which override the files; None means not given
    :raises UsageError: a package that the service needs is not installed
    :raises ConfigError: a setting cannot be used
    """
    _require(_NEEDED, "serve")
    from statepool.carts import settings

    overrides = {name.replace("_", "-"): value for name, value in given.items() if value}
    layers: list[settings.Layer] = []
    if session.config_file is not None and settings.is_cartd_file(session.config_file):
        table, ignored = settings.read_cartd_file(session.config_file)
        if ignored:
            warn(f"{session.config_file}: without meaning here: {', '.join(ignored)}")
        layers.append((session.config_file, table))
        session.config_file = None  # the pools are configured in the usual files
    layers += session.config.serve
    try:
        made = settings.from_layers([*layers, ("", overrides)])
    except ConfigError as error:
        error.message = error.message.removeprefix(": ")
        raise
    if made.tasks == "celery":
        _require(_NEEDED_BY_CELERY, "serve,celery")
    return made


def _require(packages: tuple[str, ...], extras: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the service needs {', '.join(missing)}, which is not installed",
            hint=f"pip install statepool[{extras}]",
        )


def open_for(session: Session, settings: ServeSettings) -> Service:
    """:returns: the service of these settings, which tells a person what it does"""
    from statepool.carts.service import open_service

    level = logging.WARNING if session.quiet else logging.INFO
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("statepool.carts").setLevel(level)
    return open_service(settings, session.config, tell=warn)


@click.command("serve", cls=Command)
@click.option("--address", metavar="ADDRESS", help="Listen there; 127.0.0.1 if not given.")
@click.option("-p", "--port", metavar="PORT", help="Listen there; 8081 if not given, 0 for any.")
@click.option(
    "--directory",
    metavar="DIR",
    shell_complete=paths.directories,
    help="Where carts and their database are.",
)
@click.option(
    "--pool",
    "pools",
    metavar="NAME=DIR",
    multiple=True,
    help="Serve a pool at /pools/NAME/ as well.",
)
@click.option(
    "--tasks",
    type=click.Choice(["threads", "celery"]),
    help="What fills carts: threads of this process, or statepool carts worker elsewhere.",
)
@click.option("--trust-header", metavar="HEADER", help="Believe proxies who the user is.")
@click.option(
    "--trusted-proxy",
    "trusted_proxies",
    metavar="ADDRESS",
    multiple=True,
    help="Such a proxy.",
)
@click.option("--certificate", metavar="FILE", shell_complete=paths.files, help="For TLS.")
@click.option("--key", metavar="FILE", shell_complete=paths.files, help="Their private key.")
@click.pass_obj
def command(
    session: Session,
    /,
    pools: tuple[str, ...],
    trusted_proxies: tuple[str, ...],
    **given: Any,
) -> None:
    """
    Serve carts and pools over HTTP.

    People without a pool put files and states into a cart, and take it away as one tar:
    the interface is that of Pacifica's Cartd. Settings are in the section [serve] of
    statepool.toml; --config may also name a configuration of Cartd.
    """
    named = [text.partition("=") for text in pools]
    for name, equals, place in named:
        if not (name and equals and place):
            raise click.UsageError("--pool needs a name and a directory, as in store=/srv/pool")
    given["pools"] = {name: place for name, _, place in named}
    given["trusted_proxies"] = list(trusted_proxies)
    settings = settings_of(session, **given)
    from statepool.carts.server import serve

    serve(open_for(session, settings), warn)
