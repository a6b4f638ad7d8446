"""
Talks with a place: sequences of questions, in which the next question depends on the answers
before.

To hold the talks of many logs one after the other would take a number of round trips that grows
with the number of logs. So a talk is a generator of questions, and many talks are held in parallel:
the next questions of all talks are asked together.
"""

from __future__ import annotations

import enum
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from attrs import frozen

from statepool.errors import IntegrityError
from statepool.transports.base import Transport

MAX_SMALL_FILE = 64 << 20
"""Longest record or checkpoint that is read, in bytes."""

VAIN = 1 << 10
"""
How often an operation is retried because of the answers of a place. A place may contradict itself
without end: it has a file that it does not show, or shows a file that it does not have. If other
processes really are faster each time, it takes a few dozen attempts.
"""


class Ask(enum.Enum):
    """The kinds of questions."""

    SCAN = enum.auto()
    """The entries of a directory."""
    STAT = enum.auto()
    """The status of a file."""
    READ = enum.auto()
    """The content of a small file, or None if there is none."""


@frozen
class Question:
    """
    A question about several paths, which are asked in no particular order.

    :param ask: the kind of the question
    :param paths: the files or directories
    """

    ask: Ask
    paths: Sequence[str]


Result = TypeVar("Result")

Talk = Generator[Question, list[Any], Result]
"""
A generator that yields questions, receives a list of answers for each, one for each path, and
returns a result.
"""


def hold(transport: Transport, talk: Talk[Result]) -> Result:
    """:returns: the result of a talk"""
    try:
        question = next(talk)
        while True:
            question = talk.send(_answers(transport, question.ask, question.paths))
    except StopIteration as end:
        result: Result = end.value
        return result


def hold_all(transport: Transport, talks: Sequence[Talk[Result]]) -> list[Result]:
    """
    :returns: the results of the talks, in as many steps as the longest talk takes. An error of a
        file is raised in the talk that asked for it, and the other talks go on.
    """
    results: dict[int, Result] = {}
    answers: Iterable[tuple[int, list[Any] | IntegrityError | None]] = [
        (number, None) for number in range(len(talks))
    ]
    while len(results) < len(talks):
        waiting: dict[int, Question] = {}
        for number, answer in answers:
            talk = talks[number]
            try:
                if isinstance(answer, IntegrityError):
                    waiting[number] = talk.throw(answer)
                else:
                    waiting[number] = talk.send(answer)  # type: ignore[arg-type]  # None begins it
            except StopIteration as end:
                results[number] = end.value
        answers = _ask_together(transport, waiting)
    return [results[number] for number in range(len(talks))]


def _ask_together(
    transport: Transport, questions: dict[int, Question]
) -> Iterator[tuple[int, list[Any] | IntegrityError]]:
    for ask in Ask:
        asking = [
            (number, question.paths)
            for number, question in questions.items()
            if question.ask is ask
        ]
        if not asking:
            continue
        try:
            found = _answers(transport, ask, [path for _, paths in asking for path in paths])
        except IntegrityError:
            # The error belongs to one question, or to all together. So ask each question alone.
            for number, paths in asking:
                yield number, _answers_or_error(transport, ask, paths)
            continue
        begin = 0
        for number, paths in asking:
            yield number, found[begin : begin + len(paths)]
            begin += len(paths)


def _answers_or_error(
    transport: Transport, ask: Ask, paths: Sequence[str]
) -> list[Any] | IntegrityError:
    try:
        return _answers(transport, ask, paths)
    except IntegrityError as error:
        return error


def _answers(transport: Transport, ask: Ask, paths: Sequence[str]) -> list[Any]:
    match ask:
        case Ask.SCAN:
            return transport.scan_many(paths)
        case Ask.STAT:
            return transport.stat_many(paths)
        case Ask.READ:
            return transport.read_many(paths, MAX_SMALL_FILE)
