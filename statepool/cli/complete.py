"""
Words that a shell can complete: objects and states in the cache, sources by name. Sources are not
asked, since a person is waiting.
"""

from __future__ import annotations

import os

import click

from statepool.cli.session import Session
from statepool.errors import StatePoolError


def objects(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """:returns: the objects in the cache that begin so"""
    return sorted({name for name, _ in _known(ctx) if name.startswith(incomplete)})


def states(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """:returns: the states, in the cache, of the object that stands before, that begin so"""
    return sorted(
        {
            state
            for name, state in _known(ctx)
            if name == ctx.params.get("object") and state.startswith(incomplete)
        }
    )


def sources(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """
    :returns: the configured sources that begin so: their names, or the locations of those without
    """
    try:
        return [
            source.name
            for source in ctx.ensure_object(Session).config.sources
            if source.name.startswith(incomplete)
        ]
    except StatePoolError:
        return []  # there is no place to say it: the command itself will


def _known(ctx: click.Context) -> list[tuple[str, str]]:
    session = ctx.ensure_object(Session)
    try:
        if not os.path.isdir(session.config.cache):
            return []
        from attrs import evolve

        from statepool.api import from_config

        listed = from_config(evolve(session.config, sources=())).show()
    except StatePoolError:
        return []  # there is no place to say it: the command itself will
    return [(item.manifest.object, item.manifest.state) for item in listed]
