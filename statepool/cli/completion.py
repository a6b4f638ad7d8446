"""``statepool completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from statepool.cli.session import Command, Session

_HELP = """
    Print a script that completes words in a shell.

    \b
    bash:  statepool completion bash > ~/.local/share/bash-completion/completions/statepool
    zsh:   statepool completion zsh > a file that your .zshrc sources
    fish:  statepool completion fish > ~/.config/fish/completions/statepool.fish
"""


@click.command("completion", cls=Command, help=_HELP)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script that click has for this shell."""
    session = context.ensure_object(Session)
    kind = get_completion_class(shell)
    assert kind is not None, "click has all three of them"
    script = kind(context.find_root().command, {}, "statepool", "_STATEPOOL_COMPLETE").source()
    if session.json:
        session.answer_json({"shell": shell, "script": script})
    else:
        session.answer(script)
