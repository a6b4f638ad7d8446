"""``avocado statepool …``: the command ``statepool``, with the pools of avocado's settings."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from typing import Any

from avocado.core.plugin_interfaces import CLICmd

_OPTIONS = (("statepool.config", "--config"), ("statepool.cache", "--cache"))


class StatepoolCommand(CLICmd):
    """The command of avocado that passes all arguments to ``statepool``."""

    name = "statepool"
    description = "Show, get, set and remove states of virtual machines"

    def configure(self, parser: Any) -> None:
        """Accept all arguments unchanged."""
        command = super().configure(parser)
        command.add_argument(
            "statepool_arguments",
            nargs=argparse.REMAINDER,
            metavar="...",
            help="as for the command statepool, such as: show vm1",
        )

    def run(self, config: Any) -> int:
        """:returns: the exit code of the command"""
        arguments = [
            word
            for key, option in _OPTIONS
            if config.get(key)
            for word in (option, str(config[key]))
        ]
        for source in config.get("statepool.sources") or ():
            arguments += ["--source", str(source)]
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name="statepool")
        arguments += config.get("statepool_arguments") or ["--help"]
        sys.argv = ["statepool", *arguments]
        try:
            return int(entry.load()() or 0)
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
