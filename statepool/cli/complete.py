"""
Words that a shell can complete: objects and states in the cache, and sources by name. Sources are
not contacted, since the user is waiting.
"""

from __future__ import annotations

import os

import click

from statepool.cli.session import Session
from statepool.errors import StatePoolError


def objects(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """:returns: the objects in the cache that begin with ``incomplete``"""
    return sorted({name for name, _ in _known(ctx) if name.startswith(incomplete)})


def states(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """:returns: the states in the cache of the preceding object that begin with ``incomplete``"""
    return sorted(
        {
            state
            for name, state in _known(ctx)
            if name == ctx.params.get("object") and state.startswith(incomplete)
        }
    )


def sources(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """
    :returns: the configured sources that begin with ``incomplete``: their names, or the locations
        of unnamed ones
    """
    try:
        return [
            source.name
            for source in ctx.ensure_object(Session).config.sources
            if source.name.startswith(incomplete)
        ]
    except StatePoolError:
        return []  # it cannot be shown here: the command itself will report it


def _known(ctx: click.Context) -> list[tuple[str, str]]:
    session = ctx.ensure_object(Session)
    try:
        if not os.path.isdir(session.config.cache):
            return []
        from attrs import evolve

        from statepool.api import from_config

        listed = from_config(evolve(session.config, sources=())).show()
    except StatePoolError:
        return []  # it cannot be shown here: the command itself will report it
    return [(item.manifest.object, item.manifest.state) for item in listed]
