"""Errors, as one line of text or one line of JSON, always on standard error."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import click

from statepool.cli.output import safe
from statepool.errors import StatePoolError

INTERRUPTED = 130
"""Exit code after an interruption by the user, as in a shell (128 + SIGINT)."""


def report(error: BaseException, *, as_json: bool, verbose: bool) -> int:
    """
    Report an error.

    :param verbose: report also its causes; for a bug of this program, show the traceback
    :returns: the exit code
    """
    facts = _facts(error)
    code: int = facts["exit_code"]
    internal = facts["kind"] == "InternalError"
    if as_json:
        if verbose:
            facts["causes"] = [
                f"{type(cause).__name__}: {_message(cause)}" for cause in _causes(error)
            ]
            facts["traceback"] = "".join(traceback.format_exception(error)) if internal else None
        _say(json.dumps({"error": facts}))
        return code
    if verbose and internal:
        _say(
            "".join(
                safe(line) + "\n"
                for line in "".join(traceback.format_exception(error)).splitlines()
            ),
            end="",
        )
    if isinstance(error, KeyboardInterrupt) and sys.stderr is not None and sys.stderr.isatty():
        _say("")  # the terminal shows ^C on the current line
    hint = f" ({facts['hint']})" if facts["hint"] else ""
    _say(safe(f"statepool: {facts['message']}{hint}"))
    if verbose and not internal:
        for cause in _causes(error):
            _say(safe(f"  because of {type(cause).__name__}: {_message(cause)}"))
    return code


def warn(text: str) -> None:
    """Print one line on standard error."""
    _say(safe(f"statepool: {text}"))


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Print warnings of the library on standard error, for the duration of a ``with`` block."""
    handler, logger = _Shown(logging.WARNING), logging.getLogger("statepool")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Shown(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warn(f"warning: {record.getMessage()}")


def _say(text: str, *, end: str = "\n") -> None:
    # If standard error is closed, no message can be shown, and the exit code still reports the
    # error.
    with contextlib.suppress(OSError):
        click.echo(text.encode("utf-8", "backslashreplace").decode() + end, err=True, nl=False)


def _facts(error: BaseException) -> dict[str, Any]:
    if isinstance(error, StatePoolError):
        facts = {
            key: _plain(value)
            for key, value in vars(error).items()
            if value is not None and not key.startswith("_")
        }
        known = {
            "kind": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
        return known | {key: value for key, value in facts.items() if key not in known}
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = (
            f"see {context.command_path} --help" if context is not None else "see statepool --help"
        )
        message = " ".join(error.format_message().split()).rstrip(".")
        return {
            "kind": "UsageError",
            "message": message,
            "hint": hint,
            "exit_code": error.exit_code,
        }
    if isinstance(error, KeyboardInterrupt):
        return {
            "kind": "Interrupted",
            "message": "interrupted",
            "hint": None,
            "exit_code": INTERRUPTED,
        }
    return {
        "kind": "InternalError",
        "message": f"internal error: {type(error).__name__}: {_message(error)}",
        "hint": "this is a fault of statepool; run with -v for the traceback, and report it",
        "exit_code": 1,
    }


def _plain(value: object) -> object:
    if isinstance(value, str | int | float | bool):
        return value
    return [str(item) for item in value] if isinstance(value, tuple | list) else str(value)


def _message(error: BaseException) -> str:
    return error.message if isinstance(error, StatePoolError) else " ".join(str(error).split())


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors from which ``error`` was raised, nearest first."""
    seen = {id(error)}
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
