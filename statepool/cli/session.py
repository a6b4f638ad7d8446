"""The common part of all commands: the global options, and the state pool that they select."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from statepool.cli import output, paths
from statepool.model.progress import SILENT, Progress

if TYPE_CHECKING:
    from statepool.api import ImageHandle, StatePool
    from statepool.config import Config
    from statepool.handles import MachineHandle
    from statepool.model.location import Location

_SPELLED = {"cache": "the command line: --cache", "sources": "the command line: --source"}
"""The names of the options in messages about the settings."""


_COMMANDS = re.compile(
    r"\bstatepool ((?:--[a-z]+ (?:'[^']*'|\S+) )*)"
    r"((?:adopt|check|doctor|ensure|export|gc|get|import|log|run|set|show|sources|sync|tree|unset|verify)\b)"
)
"""
A command of this program in a text, with its own options; only commands to which the global options
matter.
"""


class Session:
    """One run of the command line, with its global options."""

    def __init__(self) -> None:
        self.json = False
        self.quiet = False
        self.verbose = False
        self.config_file: str | None = None
        self.cache: str | None = None
        self.sources: list[str] = []
        self._config: Config | None = None
        self._progress: Progress = SILENT

    @property
    def config(self) -> Config:
        """
        All settings, read once.

        :raises ConfigError: they cannot be used
        """
        if self._config is None:
            from statepool.config import load

            given = {"cache": self.cache, "sources": self.sources or None}
            self._config = load(given, config_file=self.config_file, spelled=_SPELLED)
        return self._config

    def handle(self, object: str) -> ImageHandle | MachineHandle:
        """
        :param object: ``machine/image`` or ``machine``
        :returns: the handle of the object
        :raises InvalidName: it is no such name
        """
        from statepool.model.objects import Machine, parse_object

        return (
            self.pool().machine(object)
            if isinstance(parse_object(object), Machine)
            else self.pool().image(object)
        )

    def pool(self) -> StatePool:
        """
        :returns: the state pool that the settings describe
        :raises ConfigError: they cannot be used
        """
        from statepool.api import from_config
        from statepool.cli.report import warn

        if not self.quiet and not self.json:
            for text in self.config.advice:
                warn(text)
        return from_config(self.config, progress=self.progress())

    def located(self, text: str) -> Location:
        """
        :returns: the location of the configured source of this name, or else the text as a location
        """
        from statepool.model.location import Location

        return next(
            (source.location for source in self.config.sources if source.name == text), None
        ) or Location.parse(text)

    def progress(self) -> Progress:
        """
        :returns: the progress display of the command, which ends when the command prints something
        """
        from statepool.cli.progress import choose_progress

        self._progress = choose_progress(quiet=self.quiet)
        return self._progress

    def close(self) -> None:
        """Release the terminal, if something was drawn there."""
        close = getattr(self._progress, "close", None)
        if close is not None:
            close()

    # -- what commands say -------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print one line for the user; suppressed by ``-q``."""
        if not self.quiet:
            self.close()
            output.emit(output.safe(text))

    def answer(self, text: str) -> None:
        """Print the answer; its lines are already escaped."""
        self.close()
        output.emit(text)

    def answer_json(self, form: Mapping[str, Any]) -> None:
        """Print the answer as JSON: one object, as ``docs/json.rst`` describes it."""
        self.close()
        output.emit(json.dumps(form, indent=2))

    def answer_table(
        self, titles: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()
    ) -> None:
        """Print the answer as a table, without titles with ``-q``."""
        self.close()
        output.emit_table(titles, rows, right=right, heading=not self.quiet)

    def spelled(self, *words: str) -> str:
        """:returns: a command line of this program for the same pools, ready to be typed"""
        return self.completed(shlex.join(["statepool", *words]))

    def completed(self, text: str) -> str:
        """
        :param text: a hint of the library, which does not know the options of the command line
        :returns: the hint, in which each command of this program uses the same pools
        """
        given = [
            ("--config", self.config_file),
            ("--cache", self.cache),
            *(("--source", source) for source in self.sources),
        ]

        def complete(found: re.Match[str]) -> str:
            options = [
                shlex.join((name, value))
                for name, value in given
                if value is not None and f"{name} " not in found[1]
            ]
            return " ".join(["statepool", *options, found[1] + found[2]])

        return _COMMANDS.sub(complete, text)

    def place(self, location: str) -> str:
        """
        :returns: the user's name for the pool at this location: ``cache``, the name of a source, or
            a path
        """
        from statepool.config import CACHE_NAME
        from statepool.model.location import Location

        if location == str(Location("file", self.config.cache)):
            return CACHE_NAME
        for source in self.config.sources:
            if location == str(source.location) and source.name != location:
                return source.name
        return written(location)


def written(location: str) -> str:
    """
    :returns: the location as users write it: a pool of this host by its path, as the file system
        has it; a text that is no location stays as it is
    """
    from statepool.model.location import Location

    return Location.parse(location).path if location.startswith("file://") else location


def _keep(
    change: Callable[[Session, Any], None],
) -> Callable[[click.Context, click.Parameter, Any], None]:
    """
    Make the callback of an option that stores a value in the session; nothing is stored if the
    option is not given.
    """

    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        # empty, as from an unset shell variable: the default would not be what the user meant
        if value == "":
            raise click.BadParameter("it is empty", context, parameter)
        if value:
            session = context.ensure_object(Session)
            change(session, value)
            if session.quiet and session.verbose:
                raise click.UsageError("-q and -v exclude each other", context)

    return callback


def _set(name: str) -> Callable[[Session, Any], None]:
    return lambda session, value: setattr(session, name, value)


def global_options(*, below_command: bool) -> list[click.Parameter]:
    """
    Return the options that are accepted both before and after the command.

    :param below_command: for a command's own list, which shows only ``--json``
    """

    def option(
        *names: str,
        change: Callable[[Session, Any], None],
        hidden: bool = below_command,
        **rest: Any,
    ) -> click.Option:
        # not to be confused with a command's own option
        name = "global_" + names[-1].removeprefix("--")
        return click.Option(
            [*names, name], callback=_keep(change), expose_value=False, hidden=hidden, **rest
        )

    return [
        option(
            "--config",
            change=_set("config_file"),
            metavar="FILE",
            shell_complete=paths.files,
            help="Read this file instead of the usual ones.",
        ),
        option(
            "--cache",
            change=_set("cache"),
            metavar="DIR",
            shell_complete=paths.directories,
            help="The cache.",
        ),
        option(
            "--source",
            change=lambda session, value: session.sources.extend(value),
            metavar="LOCATION",
            shell_complete=paths.directories,
            multiple=True,
            help="A source; may be repeated. Those of the configuration are left out then.",
        ),
        option("--json", change=_set("json"), is_flag=True, hidden=False, help="Print JSON."),
        option(
            "-q",
            "--quiet",
            change=_set("quiet"),
            is_flag=True,
            help="Say less: no progress, no titles, nothing after success.",
        ),
        option(
            "-v",
            "--verbose",
            change=_set("verbose"),
            is_flag=True,
            help="Say more: what caused an error.",
        ),
    ]


class Helpful(click.Command):
    """
    A command that writes its help by the functions of this package. With click's own output, a
    failure would count as a bug, or as an error without a name.
    """

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """:returns: the option ``--help``"""
        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = _show_help
        return option

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """
        :raises click.UsageError: the words cannot be understood; the context of the error names the
            command
        """
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            # click leaves out the context if an option lacks its value; the message would then
            # refer to the wrong help.
            error.ctx = error.ctx or ctx
            raise


def _show_help(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        output.emit(context.get_help())
        context.exit()


class Command(Helpful):
    """A command that also accepts the global options."""

    def __init__(self, *arguments: Any, **rest: Any) -> None:
        rest.setdefault(
            "epilog",
            "Global options such as -q, -v and --cache may also be given here: see statepool"
            " --help.",
        )
        super().__init__(*arguments, **rest)
        self.params += global_options(below_command=True)


scope_option = click.option(
    "--scope",
    metavar="SCOPES",
    help=(
        "Only these pools: own (the cache), swarm, cluster, shared; several in one word with blanks"
        " between."
    ),
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Change nothing; say what would be done."
)
