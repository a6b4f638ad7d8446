"""Several sources are asked at the same time, and none is waited for in vain."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statepool.errors import TransportError
from statepool.model.location import Location
from statepool.pools.pool import Pool
from statepool.sources.pool_source import PoolSource
from statepool.sources.probe import LEAST, PATIENCE, ask_all, patience
from statepool.transports.registry import open_transport


@pytest.fixture
def sources(tmp_path: Path) -> list[PoolSource]:
    return [
        PoolSource(Pool(open_transport(Location("file", str(tmp_path / name)))), name)
        for name in "abc"
    ]


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """Set when the test is over, so that no thread outlives it."""
    event = threading.Event()
    yield event
    event.set()


def soon(source: PoolSource) -> float:
    return 0.1


def answering(never: threading.Event, **answers: object) -> Callable[[PoolSource], object]:
    """
    A question that gets these answers; an exception is raised, and ``...`` stands for silence.
    """

    def question(source: PoolSource) -> object:
        answer = answers[source.name]
        if answer is ...:
            never.wait(60)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return question


def test_all_at_the_same_time(sources: list[PoolSource]) -> None:
    together = threading.Barrier(3)  # nobody passes until all are here

    def question(source: PoolSource) -> str:
        together.wait(30)
        return source.name

    asked = ask_all(sources, question, patient=lambda source: 60.0)
    assert [one.value for one in asked] == ["a", "b", "c"]
    assert [one.source.name for one in asked] == ["a", "b", "c"]
    assert all(one.error is None and one.seconds >= 0 for one in asked)


def test_one_source_is_asked_here(sources: list[PoolSource]) -> None:
    (asked,) = ask_all(sources[:1], lambda source: threading.current_thread(), patient=soon)
    assert asked.value is threading.current_thread()
    assert ask_all([], lambda source: 1, patient=soon) == []


def test_errors_are_answers(sources: list[PoolSource], never: threading.Event) -> None:
    error = TransportError("no")
    asked = ask_all(sources, answering(never, a=error, b=2, c=None), patient=lambda source: 60.0)
    assert [(one.value, one.error) for one in asked] == [(None, error), (2, None), (None, None)]


def test_who_is_silent_is_not_waited_for_if_another_answers(
    sources: list[PoolSource], never: threading.Event
) -> None:
    asked = ask_all(sources, answering(never, a=..., b=2, c=...), patient=soon)
    assert asked[1].value == 2
    for one in (asked[0], asked[2]):
        assert "did not answer within 0.1 s" in str(one.error)
        assert one.error is not None
        assert one.error.pool == str(one.source)


def test_who_is_late_is_waited_for_if_nobody_else_has_it(sources: list[PoolSource]) -> None:
    others = threading.Event()

    def question(source: PoolSource) -> int | None:
        if source.name == "a":
            others.wait(0.5)  # well beyond its time
            return 1
        return None

    asked = ask_all(
        sources, question, patient=lambda source: 60.0, good=lambda value: value is not None
    )
    assert [(one.value, one.error) for one in asked] == [(1, None), (None, None), (None, None)]


def test_a_fault_of_the_program_is_not_hidden(
    sources: list[PoolSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def question(source: PoolSource) -> int:
        return 1 // (source.name != "b")

    with pytest.raises(ZeroDivisionError):
        ask_all(sources, question, patient=soon)


@pytest.mark.parametrize(
    ("latency", "seconds"),
    [
        (None, 1.8),
        (0.0, LEAST),
        (0.001, LEAST),
        (LEAST * 1.5 / PATIENCE, LEAST * 1.5),
        (1.0, 1.8),
        (60.0, 1.8),
    ],
)
def test_for_how_long_a_source_is_waited_for(latency: float | None, seconds: float) -> None:
    assert patience(latency, 2.0) == pytest.approx(seconds)
    assert patience(latency, 0.1) == pytest.approx(0.09)
