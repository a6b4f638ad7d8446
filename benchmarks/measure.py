"""Pairs of times, figures computed from them, and tables of figures."""

from __future__ import annotations

import enum
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

from attrs import frozen

Work = Callable[[], float]
"""A function that does some work once, cleans up, and returns the seconds of the measured part."""


class Unit(enum.Enum):
    """The unit of a limit."""

    RATIO = "ratio"
    """Our time divided by the peer's."""
    SURPLUS = "surplus"
    """Our time minus the peer's, in seconds."""
    TIME = "time"
    """Our time, in seconds."""


@frozen
class Limit:
    """
    A limit that a figure should not exceed.

    :param unit: what is compared
    :param most: the limit
    """

    unit: Unit
    most: float

    def __str__(self) -> str:
        if self.unit is Unit.RATIO:
            return f"≤ {self.most:g} times"
        return f"≤ {'peer + ' if self.unit is Unit.SURPLUS else ''}{seconds(self.most)}"


@frozen
class Figure:
    """
    The same work, done by us and by a peer alternately.

    :param what: the work
    :param peer: the peer that did the same work
    :param ours: our seconds, one for each pair
    :param peers: the peer's seconds
    :param limit: the promised limit, if any
    """

    what: str
    peer: str
    ours: Sequence[float]
    peers: Sequence[float]
    limit: Limit | None = None

    def __attrs_post_init__(self) -> None:
        if not self.ours or len(self.ours) != len(self.peers):
            raise ValueError(
                f"{self.what}: a figure needs as many times of ours ({len(self.ours)}) as of the"
                f" peer's ({len(self.peers)})"
            )

    @property
    def ratios(self) -> list[float]:
        """The ratio of each pair."""
        return [ours / peer for ours, peer in zip(self.ours, self.peers, strict=True)]

    @property
    def ratio(self) -> float:
        """The figure: the median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def reached(self) -> float:
        """The measured value in the unit of the limit."""
        unit = self.limit.unit if self.limit is not None else Unit.RATIO
        if unit is Unit.SURPLUS:
            return statistics.median(
                ours - peer for ours, peer in zip(self.ours, self.peers, strict=True)
            )
        return self.ratio if unit is Unit.RATIO else statistics.median(self.ours)

    @property
    def is_met(self) -> bool:
        """Whether the limit is met; without a limit it is."""
        return self.limit is None or self.reached <= self.limit.most

    def row(self) -> list[str]:
        """:returns: the row of the figure in a table"""
        ratios = self.ratios
        return [
            self.what,
            seconds(statistics.median(self.ours)),
            self.peer,
            seconds(statistics.median(self.peers)),
            f"{self.ratio:.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            str(self.limit) if self.limit is not None else "",
            _verdict(self),
        ]


def _verdict(figure: Figure) -> str:
    if figure.limit is None:
        return ""
    reached = (
        f" ({seconds(figure.reached)} more)"
        if figure.limit.unit is Unit.SURPLUS and figure.reached > 0
        else ""
    )
    return ("met" if figure.is_met else "NOT MET") + reached


@frozen
class Fact:
    """
    A counted fact, which is not a time.

    :param what: what was counted
    :param value: in words
    :param expected: the expected value, in words
    :param is_met: whether the value is as expected
    """

    what: str
    value: str
    expected: str
    is_met: bool


FIGURES = ("what", "ours", "peer", "peer's", "ratio", "spread", "limit", "")
FACTS = ("counted", "found", "expected", "")


@frozen
class Table:
    """
    A table with its heading.

    :param title: the heading
    :param figures: timed figures
    :param facts: counted facts
    :param grid: any other table: its heading row, then its other rows
    :param notes: notes for the reader
    """

    title: str
    figures: Sequence[Figure] = ()
    facts: Sequence[Fact] = ()
    grid: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()

    @property
    def is_met(self) -> bool:
        """Whether all figures and facts in it meet their limits."""
        return all(figure.is_met for figure in self.figures) and all(
            fact.is_met for fact in self.facts
        )

    def __str__(self) -> str:
        blocks = [f"## {self.title}"]
        if self.figures:
            blocks.append(aligned([FIGURES, *(figure.row() for figure in self.figures)]))
        if self.facts:
            blocks.append(
                aligned(
                    [
                        FACTS,
                        *(
                            [
                                fact.what,
                                fact.value,
                                fact.expected,
                                "met" if fact.is_met else "NOT MET",
                            ]
                            for fact in self.facts
                        ),
                    ]
                )
            )
        if self.grid:
            blocks.append(aligned(self.grid))
        blocks += self.notes
        return "\n\n".join(blocks)


def aligned(lines: Iterable[Sequence[str]]) -> str:
    """
    :param lines: of equal length, the first one being the heading
    :returns: a table that is readable as plain text, and as Markdown
    """
    head, *rest = ([cell.replace("|", "/") for cell in line] for line in lines)
    widths = [max(len(line[column]) for line in (head, *rest)) for column in range(len(head))]
    drawn = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in (head, *rest)
    ]
    return "\n".join(
        f"| {line} |"
        for line in (drawn[0], " | ".join("-" * width for width in widths), *drawn[1:])
    )


def seconds(value: float) -> str:
    """:returns: a time in the unit that suits it"""
    size = abs(value)
    if size >= 1:
        return f"{value:.2f} s"
    if size >= 0.001:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} µs"


def timed(work: Callable[[], object]) -> float:
    """:returns: the duration of the work, in seconds"""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def rounds(works: Sequence[Work], count: int) -> list[tuple[float, ...]]:
    """
    Run several works in turn.

    :param works: each is done once in every round; the order is reversed from round to round
    :param count: how many rounds
    :returns: the times of each work
    """
    times: list[list[float]] = [[] for _ in works]
    for number in range(count):
        order = range(len(works)) if number % 2 == 0 else reversed(range(len(works)))
        for index in order:
            os.sync()
            times[index].append(works[index]())
    return [tuple(one) for one in times]


def against(
    what: str, ours: Work, peer: str, theirs: Work, count: int, limit: Limit | None = None
) -> Figure:
    """:returns: the figure of ``count`` alternating pairs"""
    mine, other = rounds([ours, theirs], count)
    return Figure(what, peer, mine, other, limit)
