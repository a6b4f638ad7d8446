"""The command line on top of a state pool that answers what a test wants."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import statepool.api
from statepool.cli.main import cli
from statepool.config import Config
from statepool.model.outcomes import Listing
from statepool.model.progress import SILENT, Progress


class Fake:
    """
    Stands in for ``statepool.api``.

    :ivar answers: what each operation returns; an exception is raised, a function is called with
        the progress
    :ivar made: the configuration and the progress of every state pool that was made
    """

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.made: list[tuple[Config, Progress]] = []

    def answer(self, operation: str, progress: Any = None) -> Any:
        answer = self.answers[operation]
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer):
            answer = answer(progress)
        return Listing(answer) if operation == "show" and type(answer) is list else answer


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The operations of the real one, which must be called as the real ones can be."""
    fake = Fake()

    def operation(real: Any, name: str, progress: Progress) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            inspect.signature(getattr(real, name)).bind(None, *arguments, **options)
            return fake.answer(name, progress)

        return called

    class Handle:
        def __init__(self, progress: Progress) -> None:
            self._progress = progress

        def __getattr__(self, name: str) -> Callable[..., Any]:
            return operation(statepool.api.ImageHandle, name, self._progress)

    class StatePool:
        def __init__(self, config: Config, *, progress: Progress = SILENT) -> None:
            fake.made.append((config, progress))
            self._progress = progress

        def image(self, name: str) -> Handle:
            return Handle(self._progress)

        def __getattr__(self, name: str) -> Callable[..., Any]:
            return operation(statepool.api.StatePool, name, self._progress)

    monkeypatch.setattr(statepool.api, "from_config", StatePool)
    monkeypatch.setattr(statepool.api, "init", lambda *arguments, **options: fake.answer("init"))
    monkeypatch.setattr(statepool.api, "adopt", lambda *arguments, **options: fake.answer("adopt"))
    return fake


@pytest.fixture
def run(api: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """
    ``run("show", "vm1", code=0)``: the command line, with ``tmp_path`` as working directory and
    cache ``tmp_path/cache``.
    """
    monkeypatch.chdir(tmp_path)

    def invoke(*words: str, code: int = 0) -> Result:
        result = CliRunner(env={"STATEPOOL_CACHE": "cache"}).invoke(cli, list(words))
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
        return result

    return invoke
