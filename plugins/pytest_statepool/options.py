"""Every option, on the command line and in the ini file: one table for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

GROUP = "states of virtual machines"


def add(parser: pytest.Parser) -> None:
    """Register the options with pytest."""
    group = parser.getgroup("vm_state", GROUP)
    for name, kind, ini, extra, text in _OPTIONS:
        group.addoption(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=None,
            help=f"{text} (ini: {name})",
            **extra,
        )
        parser.addini(name, text, type=ini, default=kind)


_OPTIONS: list[tuple[str, Any, Any, dict[str, Any], str]] = [
    (
        "vm_state_pool",
        [],
        "linelist",
        {"action": "append", "metavar": "LOCATION"},
        "a pool that states come from; may be repeated",
    ),
    ("vm_state_cache", "", "string", {"metavar": "DIR"}, "the cache of this host"),
    (
        "vm_state_offline",
        False,
        "bool",
        {"action": "store_true"},
        "ask no pool: use what the cache has",
    ),
    (
        "vm_state_rebuild",
        False,
        "bool",
        {"action": "store_true"},
        "build the states that have a builder anew, once in this run",
    ),
    (
        "vm_state_keep",
        "never",
        "string",
        {"choices": ["never", "failed", "always"]},
        "keep working images: never, failed (those of tests that fail) or always",
    ),
    (
        "vm_state_missing",
        "fail",
        "string",
        {"choices": ["fail", "skip"]},
        (
            "what becomes of a test whose state nobody has, or whose pools cannot be reached: fail"
            " or skip"
        ),
    ),
]
"""Name, default, type in the ini file, arguments of argparse, and help text."""

NAMES = tuple(name for name, *_ in _OPTIONS)
"""The names of all options, as in the ini file."""

_ALLOWED = {
    name: tuple(extra["choices"]) for name, _, _, extra, _ in _OPTIONS if "choices" in extra
}


def check(config: pytest.Config) -> None:
    """
    Check the ini file before any test runs.

    :raises pytest.UsageError: it has an invalid value
    """
    for name in NAMES:
        try:
            found = config.getini(name)
        except (ValueError, TypeError, pytest.UsageError) as error:  # versions of pytest differ
            # For a boolean, pytest's message names neither the option nor the file; for all other
            # types, it names both.
            told = (
                str(error)
                if name in str(error)
                else f"{_ini(config, name)}: {error}; it is true or false"
            )
            raise pytest.UsageError(told) from error
        if name in _ALLOWED and found not in _ALLOWED[name]:
            raise pytest.UsageError(
                f"{_ini(config, name)} cannot be {found!r}; it is one of"
                f" {', '.join(_ALLOWED[name])}"
            )


def spelled(config: pytest.Config, name: str) -> str:
    """:returns: the place from which an option has its value, and its spelling there"""
    return (
        _ini(config, name)
        if config.getoption(name) is None
        else f"the command line: --{name.replace('_', '-')}"
    )


def _ini(config: pytest.Config, name: str) -> str:
    is_above = any(
        text.partition("=")[0].strip() == name for text in config.getoption("override_ini") or ()
    )
    return f"{'--override-ini' if is_above else config.inipath}: {name}"


def value(config: pytest.Config, name: str) -> Any:
    """:returns: the value from the command line, or else from the ini file, or else the default"""
    given = config.getoption(name)
    return given if given is not None else config.getini(name)


def locations(config: pytest.Config) -> list[str]:
    """:returns: the pools; a path in the ini file is relative to it"""
    if config.getoption("vm_state_pool") is not None:
        return [str(place) for place in config.getoption("vm_state_pool")]
    return [_from_ini(config, place) for place in config.getini("vm_state_pool")]


def cache(config: pytest.Config) -> str | None:
    """:returns: the cache, or None if neither the command line nor the ini file names one"""
    if config.getoption("vm_state_cache") is not None:
        return str(config.getoption("vm_state_cache"))
    found = config.getini("vm_state_cache")
    return _from_ini(config, found) if found else None


def _from_ini(config: pytest.Config, place: str) -> str:
    # A text with a colon before its first slash is another kind of location, such as
    # ssh://host/path or host:/path.
    if ":" in place.partition("/")[0] or config.inipath is None:
        return place
    return str(config.inipath.parent / Path(place).expanduser())
