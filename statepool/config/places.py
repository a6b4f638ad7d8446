"""The places of configuration files, and the default place of the cache."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from statepool.errors import ConfigError

FILE_NAME = "statepool.toml"

SYSTEM_DIRECTORIES = "/etc/xdg"
"""
The directory of the settings of the whole host, by the XDG Base Directory Specification 0.8, unless
``XDG_CONFIG_DIRS`` says otherwise.
"""

AnyPath = str | os.PathLike[str]


def home(environ: Mapping[str, str]) -> str | None:
    """
    :returns: the home directory, first from the variable, as in shells; None if it is not known
    """
    home = environ.get("HOME") or os.path.expanduser("~")
    return home if os.path.isabs(home) else None


def xdg(environ: Mapping[str, str], variable: str, home: str | None, default: str) -> str | None:
    """
    :returns: a directory of the XDG Base Directory Specification 0.8, which says that relative
        values are to be ignored
    """
    value = environ.get(variable, "")
    if os.path.isabs(value):
        return value
    return os.path.join(home, default) if home is not None else None


def default_cache(environ: Mapping[str, str], home: str | None) -> tuple[str, tuple[str, ...]]:
    """:returns: the cache, and advice for the user about it"""
    directory = xdg(environ, "XDG_DATA_HOME", home, ".local/share")
    if directory is None:
        raise ConfigError(
            "there is no home directory to keep the cache in",
            hint="name a cache with --cache or STATEPOOL_CACHE",
        )
    cache, before = (
        os.path.join(directory, "statepool"),
        xdg(environ, "XDG_CACHE_HOME", home, ".cache"),
    )
    old = os.path.join(before, "statepool") if before is not None else cache
    if os.path.exists(cache) or not os.path.isdir(os.path.join(old, ".statepool")):
        return cache, ()
    move = (
        f"mkdir -p {shlex.quote(directory)} && mv {shlex.quote(old)} {shlex.quote(cache)} && ln -s"
        f" {shlex.quote(cache)} {shlex.quote(old)}"
    )
    return old, (
        (
            f"the cache {old} is among what may be deleted at any time; to move it, while nothing"
            f" uses it: {move}"
        ),
    )


def _project_file(base: str, project: str | os.PathLike[str] | None) -> str:
    """
    Find the project's file. Above the project's directory, only files of its owner, of root and of
    this account count: every account can write to ``/tmp``.
    """
    here = os.path.join(base, FILE_NAME)
    if project is None or os.path.lexists(here) or not os.path.isdir(start := Path(base, project)):
        return here
    trusted = {0, os.geteuid(), start.stat().st_uid}
    paths = [directory / FILE_NAME for directory in (start, *start.parents)]
    return next(
        (
            str(path)
            for path in paths
            if path.exists() and (path.parent == start or path.stat().st_uid in trusted)
        ),
        here,
    )


def files(
    file: AnyPath | None,
    environ: Mapping[str, str],
    base: str,
    home: str | None,
    project: AnyPath | None,
) -> list[tuple[str, bool]]:
    """:returns: the files to read, each with whether it must exist"""
    if file is not None:
        return [(os.path.join(base, file), True)]
    system = [
        name
        for name in (environ.get("XDG_CONFIG_DIRS") or SYSTEM_DIRECTORIES).split(":")
        if os.path.isabs(name)
    ]
    # the first directory has the highest priority
    paths = [os.path.join(name, "statepool", FILE_NAME) for name in reversed(system)]
    directory = xdg(environ, "XDG_CONFIG_HOME", home, ".config")
    if directory is not None:
        paths.append(os.path.join(directory, "statepool", FILE_NAME))
    paths.append(_project_file(base, project))
    return [(path, False) for path in dict.fromkeys(paths)]
