"""Words that the shell completes by itself: files and directories."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def files(
    _ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """:returns: an item that tells the shell to complete files by itself"""
    return _by_shell(incomplete, "file")


def directories(
    _ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """:returns: an item that tells the shell to complete directories by itself"""
    return _by_shell(incomplete, "dir")


def _by_shell(incomplete: str, kind: str) -> list[CompletionItem]:
    # imported here, since only completion needs it
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type=kind)]
