"""
Talks with a place: what is asked next depends on what was answered before.

What is one talk after the other for a single log would take as many round trips as there are logs. So a talk is a generator of questions, and many of
them are held side by side: what all of them ask next is asked together.
"""

from __future__ import annotations

import enum
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from attrs import frozen

from statepool.transports.base import Transport

MAX_SMALL_FILE = 64 << 20
"""Longest record or checkpoint that is read, in bytes."""


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
    """:returns: what each of the talks comes to, in as many steps as the longest of them takes"""
    results: dict[int, Result] = {}
    waiting: dict[int, Question] = {}
    answers: dict[int, list[Any] | None] = dict.fromkeys(range(len(talks)))
    while answers:
        for number, answer in answers.items():
            try:
                waiting[number] = talks[number].send(answer)  # type: ignore[arg-type]  # None begins it
            except StopIteration as end:
                results[number] = end.value
        answers = _ask_together(transport, waiting)
        waiting = {}
    return [results[number] for number in range(len(talks))]


def _ask_together(transport: Transport, questions: dict[int, Question]) -> dict[int, list[Any] | None]:
    answers: dict[int, list[Any] | None] = {}
    for ask in Ask:
        asking = [(number, question.paths) for number, question in questions.items() if question.ask is ask]
        if not asking:
            continue
        found = _answers(transport, ask, [path for _, paths in asking for path in paths])
        begin = 0
        for number, paths in asking:
            answers[number] = found[begin : begin + len(paths)]
            begin += len(paths)
    return answers


def _answers(transport: Transport, ask: Ask, paths: Sequence[str]) -> list[Any]:
    match ask:
        case Ask.SCAN:
            return transport.scan_many(paths)
        case Ask.STAT:
            return transport.stat_many(paths)
        case Ask.READ:
            return transport.read_many(paths, MAX_SMALL_FILE)
