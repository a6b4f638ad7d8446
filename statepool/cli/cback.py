"""The option ``--cback``, and CedarBackup's exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from attrs import define

from statepool.cli import paths
from statepool.cli.report import report
from statepool.cli.session import Session
from statepool.errors import ConfigError, StatePoolError

CONFIG, INTERRUPTED, FAILED = 4, 5, 6
"""
CedarBackup's exit codes: its configuration is wrong, the user interrupted it, an action failed.
"""

cback_option = click.option(
    "--cback",
    metavar="FILE",
    shell_complete=paths.files,
    help="Read this configuration of CedarBackup, and end with its exit codes.",
)


@define
class Codes:
    """
    The exit code of a command.

    :param cedar: whether it is one of CedarBackup
    """

    cedar: bool
    code: int = 0

    def failed(self, code: int) -> None:
        """Note the exit code of this package; 0 if nothing failed."""
        self.code = FAILED if self.cedar and code else code


@contextmanager
def in_cedars_way(session: Session, cback: str | None) -> Iterator[Codes]:
    """
    Report an error of the ``with`` block with an exit code of CedarBackup, if its configuration was
    named.
    """
    codes = Codes(cback is not None)
    try:
        yield codes
    except (StatePoolError, KeyboardInterrupt) as error:
        if not codes.cedar:
            raise
        report(error, as_json=session.json, verbose=session.verbose)
        codes.code = FAILED
        if isinstance(error, ConfigError):
            codes.code = CONFIG
        elif isinstance(error, KeyboardInterrupt):
            codes.code = INTERRUPTED
