"""
The entry point: finds the command, and maps errors to one line and an exit code.

A command is imported when it is run, not before: the help lists them all from the table below.
"""

from __future__ import annotations

import difflib
import importlib
import keyword
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from statepool.cli.output import emit
from statepool.cli.report import report, warnings_shown
from statepool.cli.session import Helpful, Session, global_options
from statepool.cli.signals import Ended
from statepool.errors import StatePoolError
from statepool.version import __version__

COMMANDS = {
    "init": "Make a pool.",
    "show": "List states, and where each is.",
    "tree": "Show chains as a tree.",
    "check": "Tell by the exit code whether a state is there.",
    "get": "Bring a state here; make a working image of it.",
    "set": "Store a state in the cache and in the sources.",
    "unset": "Remove a state.",
    "push": "Store a state that is popped later.",
    "pop": "Get a state, and remove it.",
    "run": "Boot a state, and look around in it.",
    "ensure": "Get a state, or have it built once.",
    "sync": "Copy chains from one pool to another.",
    "export": "Write a state, with all it stands on, into one file.",
    "import": "Bring a bundle here, or make a state of a disk image.",
    "sources": "Show in which order sources are asked, and why.",
    "verify": "Read states once more, and check every byte.",
    "hash": "Print the digest of a file.",
    "adopt": "Make unmanaged states managed.",
    "gc": "Remove leftovers, and bytes that nobody needs.",
    "log": "Show what happened.",
    "doctor": "Look for what this host or a pool lacks.",
    "archive": "Archive directories on levels, verify and restore them.",
    "cart": "Have a service put states and files into one tar, and get it.",
    "serve": "Serve carts and pools over HTTP.",
    "carts": "Look after the service of carts.",
    "collect": "Put files and directories into tars, to be staged.",
    "stage": "Bring what all peers have collected into the directory of the day.",
    "completion": "Print a script that completes words in a shell.",
}
"""Every command with the first line of its help."""


ALIASES = {"list": "show", "ls": "show", "rm": "unset"}
"""Other words for commands, which people type who know them from elsewhere."""


def module_of(command: str) -> str:
    """
    :returns: the name of the module that holds a command: its own, or with an underscore if that is
        a keyword of Python
    """
    return f"statepool.cli.{command}" + ("_" if keyword.iskeyword(command) else "")


def _show_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    emit(f"statepool {__version__}")
    context.exit()


class Root(Helpful, click.Group):
    """The command ``statepool`` itself."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """:returns: the names of all commands, in the order of the help"""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """:returns: the command, imported now"""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(module_of(cmd_name)).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """
        :raises click.UsageError: there is no such command
        """
        name = ALIASES.get(args[0], args[0])
        args = [name, *args[1:]]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            likely = difflib.get_close_matches(name, COMMANDS, n=1)
            raise click.UsageError(
                f"there is no command {name!r}"
                + (f"; did you mean {likely[0]}?" if likely else ""),
                ctx,
            )
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; without any, show the help as a usage error."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """
        :raises click.Abort: the user interrupted it; the cause says so
        """
        try:
            return super().invoke(ctx)
        except (EOFError, KeyboardInterrupt) as error:
            # click would first print an empty line on standard error, and then raise the same
            # exception.
            raise click.Abort from error

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """
        Run the command line.

        :returns: the exit code, unless ``standalone_mode``, which ends the process with it
        """
        words = list(sys.argv[1:] if args is None else args)
        session = extra.setdefault("obj", Session())
        # The name is fixed, so that completion and help name the command also after "python -m
        # statepool".
        run = super().main
        options = {
            "complete_var": complete_var,
            "windows_expand_args": windows_expand_args,
            **extra,
        }
        code = self._run(
            words, session, lambda: run(words, "statepool", standalone_mode=False, **options)
        )
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, words: list[str], session: Session, run: Callable[[], Any]) -> int:
        error: BaseException
        try:
            with warnings_shown():
                return int(run() or 0)
        except StatePoolError as caught:
            error = caught
            caught.hint = session.completed(caught.hint) if caught.hint is not None else None
        except (click.ClickException, KeyboardInterrupt) as caught:
            error = caught
        except click.exceptions.Abort as caught:
            error = caught.__cause__ or caught  # click wraps an interruption
        # the last handler of a bug, which it reports in one line
        except Exception as caught:  # noqa: BLE001
            error = caught
        finally:
            session.close()
        # If the options themselves are wrong, click may not have read --json. Words after "--"
        # belong to another program.
        ours = words[: words.index("--")] if "--" in words else words
        return report(
            error,
            as_json=session.json or "--json" in ours,
            verbose=session.verbose or "-v" in ours or "--verbose" in ours,
        )


cli = Root(
    "statepool",
    params=[
        *global_options(below_command=False),
        click.Option(
            ["--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_show_version,
            help="Show the version and exit.",
        ),
    ],
    help="""
    Keep named states of QCOW2 virtual machine images in pools, and bring them here.

    OBJECT is an image, such as vm1/disk; STATE is the name of a state. Exit codes: 0 done, 1 a
    fault of ours, 2 usage, 3 no such state, 4 refused, 5 not what it should be, 6 waited too long
    for another process, 7 a pool cannot be used, 8 no space, 130 interrupted.
    """,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """
    Run the command line, and end the process with its exit code, or by the signal that ended it.
    """
    try:
        cli.main()
    except Ended as ended:
        ended.follow()
