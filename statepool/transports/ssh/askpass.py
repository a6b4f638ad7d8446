"""
Answers to what ``ssh`` asks while it logs in. It starts a script (``SSH_ASKPASS``), which asks this
process through two FIFOs in a private directory.

So a secret is never in the arguments or the environment of a process, nor in a file.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from attrs import define, field

from statepool.model.secrets import SecretKind, Secrets

_SCRIPT = """#!/bin/sh
cd {directory} || exit
printf '%s\\0' "$1" >asked || exit
head -n 1 answer
test ! -e none
"""
"""The script prints the answer; it fails if there is none."""

_PASSPHRASE = re.compile(r"Enter passphrase for (?:key )?'(.*)'", re.DOTALL)
_PASSWORD = re.compile(r"\(?([^\s()]+@[^\s()']+)(?:'s password:|\) )", re.IGNORECASE)


@define(eq=False)
class Askpass:
    """
    The answers to a starting ``ssh``. Made by :func:`answering`.

    :param secrets: asked for passwords and passphrases
    :param account: of the host: passed to :data:`~statepool.model.secrets.Secrets` in place of the
        name that ``ssh`` has for it
    """

    directory: Path
    secrets: Secrets
    account: tuple[str, str]
    _questions: int
    _answers: int
    asked: list[tuple[SecretKind, str, bool]] = field(factory=list)
    """Each secret that was asked for, and whether there was an answer."""

    @property
    def environ(self) -> dict[str, str]:
        """The environment of the program that asks."""
        return {"SSH_ASKPASS": str(self.directory / "askpass"), "SSH_ASKPASS_REQUIRE": "force"}

    def serve(self, seconds: float) -> None:
        """Answer the questions that arrive within some seconds."""
        poll = select.poll()
        poll.register(self._questions, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return
        prompt = os.read(self._questions, 64 << 10).partition(b"\0")[0].decode("utf-8", "replace")
        self._answer(self._secret(prompt))

    def _secret(self, prompt: str) -> str | None:
        if (found := _PASSPHRASE.search(prompt)) is not None:
            kind, subject = SecretKind.PASSPHRASE, found[1]
        elif (found := _PASSWORD.search(prompt)) is not None:
            kind, subject = (
                SecretKind.PASSWORD,
                self.account[1] if found[1] == self.account[0] else found[1],
            )
        else:
            return None  # it asks for something that is no secret, such as a touch
        secret = self.secrets(kind, subject) or None
        self.asked.append((kind, subject, secret is not None))
        return secret

    def _answer(self, secret: str | None) -> None:
        none = self.directory / "none"
        none.unlink(missing_ok=True)
        if secret is None:
            none.touch()
        with contextlib.suppress(BlockingIOError):
            os.read(self._answers, 64 << 10)  # discard what a killed script has not read
        os.write(self._answers, ((secret or "") + "\n").encode(errors="surrogateescape"))


@contextlib.contextmanager
def answering(secrets: Secrets, account: tuple[str, str]) -> Iterator[Askpass]:
    """:returns: an object that answers for the duration of a ``with`` block"""
    directory = Path(tempfile.mkdtemp(prefix="statepool-ask-"))
    try:
        for name in ("asked", "answer"):
            os.mkfifo(directory / name, 0o600)
        script = directory / "askpass"
        script.write_text(_SCRIPT.format(directory=shlex.quote(str(directory))))
        script.chmod(0o700)
        # Both ends of both FIFOs are open here: so the end of a question does not end the FIFO, and
        # an answer waits there until the script reads it.
        questions, answers = (
            os.open(directory / name, os.O_RDWR | os.O_NONBLOCK) for name in ("asked", "answer")
        )
        try:
            yield Askpass(directory, secrets, account, questions, answers)
        finally:
            os.close(questions)
            os.close(answers)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
