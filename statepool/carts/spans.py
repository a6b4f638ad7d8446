"""Bytes to be sent that are in files: the kernel sends them where it can."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from attrs import frozen

from statepool import IntegrityError


@frozen
class Span:
    """
    A part of a file.

    :param descriptor: of the file, open as long as the iterator waits that has yielded the span
    :param start: its offset in bytes
    :param length: in bytes
    :param name: the file in messages
    """

    descriptor: int
    start: int
    length: int
    name: str

    def __len__(self) -> int:
        return self.length

    def read(self) -> bytes:
        """
        :returns: the bytes
        :raises IntegrityError: the file has become shorter
        """
        data = os.pread(self.descriptor, self.length, self.start)
        if len(data) != self.length:
            raise became_shorter(self.name)
        return data


def spans(descriptor: int, start: int, stop: int, step: int, name: str) -> Iterator[Span]:
    """
    Yield the parts of a file between two offsets.

    :param step: the most bytes of a part
    """
    for offset in range(start, stop, step):
        yield Span(descriptor, offset, min(step, stop - offset), name)


def became_shorter(name: str) -> IntegrityError:
    """:returns: the error of a file that ends too soon"""
    return IntegrityError(f"{name} became shorter", hint="delete the cart, and ask again")


class Body:
    """
    The body of an answer. A WSGI server iterates it for bytes; one that can send parts of files
    takes :attr:`parts`.

    :param parts: bytes, and parts of files
    :param close: is called at the end, and when the client is gone
    """

    def __init__(self, parts: Iterator[bytes | Span], close: Callable[[], None]) -> None:
        self.parts = parts
        self._close = close

    def __iter__(self) -> Iterator[bytes]:
        for part in self.parts:
            yield part if isinstance(part, bytes) else part.read()

    def close(self) -> None:
        """Release the files."""
        self._close()
