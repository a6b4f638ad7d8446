"""
Asking of several sources at the same time, so that a dead source costs no more than one timeout,
and only once.
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
Shortest timeout for a source that has answered before, in seconds: a busy host is not a dead host.
"""

NEARLY = 0.9
"""
Part of the deadline that is used as the timeout, so that the total with all other work stays within
the deadline.
"""

PATIENCE = 10
"""The timeout of a source, as a multiple of the time that it took to answer before."""

T = TypeVar("T")


@frozen
class Asked(Generic[T]):
    """
    The result of a question to one source.

    :param source: the source
    :param value: its answer, or None
    :param error: why there is no answer
    :param seconds: how long it took
    """

    source: Source
    value: T | None = None
    error: StatePoolError | None = None
    seconds: float = 0.0


def patience(latency: float | None, deadline: float) -> float:
    """
    :param latency: how long a source took to answer before, in seconds; None if it was never asked
    :param deadline: the longest wait, in seconds
    :returns: how long to wait for the source after other sources have answered, in seconds
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
    Ask several sources at the same time. If a source does not answer in time, and another source
    gave a good answer, the caller does not wait for it. As long as there is no good answer, giving
    up gains nothing: the transports decide how long to try.

    :param question: asked of each source; an error of ours that it raises becomes part of the
        result
    :param patient: returns how long to wait for a source, in seconds
    :param good: returns whether an answer makes other answers dispensable
    :returns: the results, in the order of the sources
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
        # A daemon thread, so that the process does not wait for it at its end: it may hang in a
        # connection for long.
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
        # Without a result, the question raised an unexpected error, a bug. Asking again raises it
        # here, where it is seen.
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
