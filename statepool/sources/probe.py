"""
Asking several sources the same question at the same time, so that one that is dead costs no more
than a deadline, and only once.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from attrs import frozen

from statepool.errors import StatePoolError, TransportError
from statepool.sources.source import Source

LEAST = 1.0
"""
How long a source that has answered before is given at least, in seconds: a busy host is not a dead
one.
"""

NEARLY = 0.9
"""
Part of the deadline that is waited, so that with all that is done besides it costs no more than
that.
"""

PATIENCE = 10
"""How many times as long as it took before a source may take to answer."""

T = TypeVar("T")


@frozen
class Asked(Generic[T]):
    """
    What came of asking one source.

    :param source: which
    :param value: its answer, or None
    :param error: why there is none
    :param seconds: how long it took
    """

    source: Source
    value: T | None = None
    error: StatePoolError | None = None
    seconds: float = 0.0


def patience(latency: float | None, deadline: float) -> float:
    """
    :param latency: how long a source took to answer before, in seconds; None if it was never asked
    :param deadline: the longest that is waited, in seconds
    :returns: how long it is waited for while others have answered
    """
    longest = NEARLY * deadline
    return longest if latency is None else min(longest, max(LEAST, PATIENCE * latency))


def ask_all(
    sources: Sequence[Source],
    question: Callable[[Source], T],
    *,
    patient: Callable[[Source], float],
    good: Callable[[T], bool] = lambda value: True,
) -> list[Asked[T]]:
    """
    Ask sources at the same time. One that does not answer in time is not waited for, if another one
    gave a good answer; while nobody has, there is nothing to be gained by giving up, and the
    transports decide how long to try.

    :param question: asked of each; what it raises of ours is part of the answer
    :param patient: for how long each is waited for, in seconds
    :param good: whether an answer is one that makes others dispensable
    :returns: what came of it, in the order of the sources
    """
    if len(sources) < 2:
        return [_ask(source, question) for source in sources]
    answers: queue.SimpleQueue[tuple[Source, Asked[T] | None]] = queue.SimpleQueue()

    def work(source: Source) -> None:
        asked = None
        try:
            asked = _ask(source, question)
        finally:
            answers.put((source, asked))

    begun = time.monotonic()
    for source in sources:
        # Not waited for at the end of the process: it may hang in a connection for long.
        threading.Thread(
            target=work, args=(source,), name=f"statepool-ask-{source.name}", daemon=True
        ).start()
    found: dict[str, Asked[T]] = {}
    waiting = {str(source): source for source in sources}
    while waiting:
        enough = any(
            asked.error is None and asked.value is not None and good(asked.value)
            for asked in found.values()
        )
        longest = max(patient(source) for source in waiting.values()) if enough else math.inf
        try:
            source, asked = answers.get(
                timeout=None
                if longest == math.inf
                else max(0.0, longest - (time.monotonic() - begun))
            )
        except queue.Empty:
            break
        # What is no error of ours is one of the program: it comes out of asking again, here, where
        # it is seen.
        found[str(source)] = asked if asked is not None else _ask(source, question)
        del waiting[str(source)]
    for source in waiting.values():
        found[str(source)] = Asked(
            source, error=_silent(source, patient(source)), seconds=patient(source)
        )
    return [found[str(source)] for source in sources]


def _ask(source: Source, question: Callable[[Source], T]) -> Asked[T]:
    begun = time.monotonic()
    try:
        value = question(source)
    except StatePoolError as error:
        return Asked(source, error=error, seconds=time.monotonic() - begun)
    return Asked(source, value, seconds=time.monotonic() - begun)


def _silent(source: Source, seconds: float) -> TransportError:
    return TransportError(
        f"{source} did not answer within {seconds:.2g} s",
        pool=str(source),
        hint="look whether it is there; if it is slow by nature, raise probe-timeout",
    )
