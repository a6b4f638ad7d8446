"""
Talks with a place: what is asked next depends on what was answered before.

What is one talk after the other for a single log would take as many round trips as there are logs.
So a talk is a generator of questions, and many of them are held side by side: what all of them ask
next is asked together.
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
How often something is tried again because of what a place says, which may contradict itself without
end: it has a file that it does not show, or shows one that it does not have. Where others really
are faster each time, it takes a few dozen attempts.
"""


class Ask(enum.Enum):
    """What can be asked."""

    SCAN = enum.auto()
    """What is in a directory."""
    STAT = enum.auto()
    """What is known of a file."""
    READ = enum.auto()
    """What is in a small file, or None if there is none."""


@frozen
class Question:
    """
    Something to find out, in no order.

    :param ask: what
    :param paths: of which files or directories
    """

    ask: Ask
    paths: Sequence[str]


Result = TypeVar("Result")

Talk = Generator[Question, list[Any], Result]
"""Asks questions, is given as many answers as each has paths, and comes to a result."""


def hold(transport: Transport, talk: Talk[Result]) -> Result:
    """:returns: what a talk comes to"""
    try:
        question = next(talk)
        while True:
            question = talk.send(_answers(transport, question.ask, question.paths))
    except StopIteration as end:
        result: Result = end.value
        return result


def hold_all(transport: Transport, talks: Sequence[Talk[Result]]) -> list[Result]:
    """
    :returns: what each of the talks comes to, in as many steps as the longest of them takes. What
        is wrong with a file is raised in the talk that asked for it, and the others go on.
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
            # Of one of them, or of all together: so each on its own, and one after the other.
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
