"""
The section ``[statepool]`` of avocado's settings, and the options of ``avocado run``: one table for
both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from avocado.core.plugin_interfaces import CLI, Init
from avocado.core.settings import settings

if TYPE_CHECKING:
    from statepool import Config

SECTION = "statepool"
FAIL_ON_MISSING = "statepool.fail_on_missing"

_OPTIONS: list[tuple[str, Any, Any, str | None, dict[str, Any], str]] = [
    ("cache", str, "", "--vm-state-cache", {"metavar": "DIR"}, "the cache of this host"),
    (
        "sources",
        list,
        [],
        "--vm-state-pool",
        {"metavar": "LOCATION", "nargs": "+"},
        "the pools that states come from",
    ),
    (
        "config",
        str,
        "",
        "--vm-state-config",
        {"metavar": "FILE"},
        "a file of statepool to read instead of the usual ones",
    ),
    (
        "offline",
        bool,
        False,
        "--vm-state-offline",
        {"action": "store_true"},
        "ask no pool: use what the cache has",
    ),
    (
        "fail_on_missing",
        bool,
        False,
        "--vm-state-fail-on-missing",
        {"action": "store_true"},
        "a test whose state cannot be had is an error, and the job fails; otherwise it is skipped",
    ),
]
"""Name, type, default, option, arguments of argparse, and help text."""

USED = [f"{SECTION}.{name}" for name in ("cache", "sources", "config", "offline")]
"""The settings that provisioning needs."""


class StatepoolInit(Init):
    """The plugin that registers the settings."""

    name = SECTION
    description = "Settings of the states of virtual machines"

    def initialize(self) -> None:
        """Register the settings."""
        for name, kind, default, _, _, text in _OPTIONS:
            settings.register_option(
                section=SECTION, key=name, key_type=kind, default=default, help_msg=text
            )


class StatepoolCLI(CLI):
    """The plugin that adds the options of ``avocado run``."""

    name = SECTION
    description = "Options of 'run' for the states of virtual machines"

    def configure(self, parser: Any) -> None:
        """Add the options."""
        run = parser.subcommands.choices.get("run", None)
        if run is None:
            return
        group = run.add_argument_group("states of virtual machines")
        for name, _, _, option, extra, _ in _OPTIONS:
            settings.add_argparser_to_option(
                namespace=f"{SECTION}.{name}", parser=group, long_arg=option, **extra
            )

    def run(self, config: Any) -> None:
        """Do nothing: the settings are read where they are needed."""


def config_of(known: Mapping[str, Any]) -> Config:
    """
    :param known: settings of avocado
    :returns: the configuration of the state pool: that of this user and project, overridden by
        avocado's settings
    :raises StatePoolError: a setting in it cannot be used
    """
    from statepool import Config

    given: dict[str, Any] = {
        "cache": known.get("statepool.cache") or None,
        "sources": list(known.get("statepool.sources") or ()) or None,
    }
    if known.get("statepool.offline"):
        given["offline"] = True
    file = known.get("statepool.config") or None
    spelled = {
        key: f"avocado's settings: statepool.{key}" for key in ("cache", "sources", "offline")
    }
    return Config.load(
        given, config_file=os.path.expanduser(file) if file else None, spelled=spelled
    )
