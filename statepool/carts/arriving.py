"""
The tar of a cart as it arrives: gone on with where a connection broke, and checked byte by byte.

Which bytes must come follows from what the service says of the files of the cart
(:mod:`statepool.carts.tar`): headers and padding are compared and not interpreted, and the bytes of
each file are held against its digest. The digests together are held against that of the cart, which
its ETag is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

from attrs import frozen

from statepool import (
    Conflict,
    Digest,
    DigestMismatch,
    IntegrityError,
    Progress,
    RefusedError,
    StatePoolError,
    TransportError,
)
from statepool.carts.archives import check_plain
from statepool.carts.asking import CartService, Response, path_of
from statepool.carts.tar import Member, Table

STEP = 256 << 10
"""Bytes that are read at once, at most."""

_MISSHAPEN = (
    StatePoolError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""The errors of Python if JSON has other types or values than those that are expected."""


@frozen
class Plan:
    """
    What must come.

    :param uid: of the cart
    :param length: of its tar, in bytes
    :param etag: what the service calls these bytes
    :param table: of the tar
    :param digests: of the members, in their order
    :param exports: of the members, the ids of those that are bundles of a state
    """

    uid: str
    length: int
    etag: str
    table: Table
    digests: tuple[Digest, ...]
    exports: tuple[str | None, ...]

    @classmethod
    def of(cls, uid: str, status: Mapping[str, Any]) -> Plan:
        """
        :param status: of a cart that is ready, as the service has described it
        :raises IntegrityError: it contradicts itself
        :raises RefusedError: it has no digest
        """
        if status.get("digest", "") is None:
            raise RefusedError(
                f"the cart {uid} was made by Cartd, and has no digest to check it against",
                hint="delete it, and make it anew; or get it with curl",
            )
        try:
            files = {f"{uid}/{check_plain(one['path'], 'a path')}": one for one in status["files"]}
            table = Table(
                Member(name, max(int(one["size"]), 0), int(one["mtime"]))
                for name, one in files.items()
            )
            inside = [files[member.name] for member in table.members]
            digests = tuple(Digest.parse(one["digest"]) for one in inside)
            exports = tuple(one["id"] if one["export"] else None for one in inside)
            plan = cls(uid, status["size"], status["digest"], table, digests, exports)
            agrees = (table.digest(digests), table.length) == (plan.etag, plan.length)
        except _MISSHAPEN as error:
            raise _contradictory(uid, f"{type(error).__name__}: {error}") from error
        if not agrees or len(files) != len(status["files"]):
            raise _contradictory(uid, "its files are not those of its digest")
        return plan


class Arriving:
    """
    The bytes of a cart, in their order: at first those that an earlier attempt has kept.

    :param part: descriptor of a file that keeps them, open for reading and writing, and where there
        is none, nothing is kept
    :param progress: told of the bytes
    """

    def __init__(
        self, service: CartService, plan: Plan, progress: Progress, part: int | None = None
    ) -> None:
        self._service = service
        self._plan = plan
        self._part = part
        self._progress = progress
        self._patience = service.patience()
        self._response: Response | None = None
        self._position = 0
        self.resumed = min(os.fstat(part).st_size, plan.length) if part is not None else 0
        """Bytes that are not moved again."""

    def __enter__(self) -> Self:
        self._progress.begin(f"download {self._plan.uid}", self._plan.length)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        self._progress.end()

    def _close(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()

    def read(self, size: int) -> bytes:
        """
        :returns: the next bytes, at least one, and at most so many
        :raises StatePoolError: they cannot be had
        """
        if self._part is not None and self._position < self.resumed:
            count = min(size, self.resumed - self._position)
            data = os.pread(self._part, count, self._position)
        else:
            data = self._arrived(min(size, self._plan.length - self._position))
            if self._part is not None:
                _keep(self._part, data, self._position)
        if not data:
            raise IntegrityError(
                f"what was here of the cart {self._plan.uid} has become shorter",
                hint="get it once more",
            )
        self._position += len(data)
        self._progress.advance(len(data))
        return data

    def _arrived(self, size: int) -> bytes:
        while True:
            try:
                if self._response is None:
                    self._response = self._open()
                data = self._response.read(size)
                if not data:
                    told = f"{self._service.url} broke off in the middle of {self._plan.uid}"
                    raise TransportError(told, hint="ask for it once more", transient=True)
            except TransportError as error:
                self._close()
                self._patience.wait(error)
                continue
            self._patience.renew()
            return data

    def _open(self) -> Response:
        begin, plan = self._position, self._plan
        ranged = {"Range": f"bytes={begin}-"} if begin else {}
        if begin:
            ranged["If-Range"] = f'"{plan.etag}"'
        response = self._service.open("GET", path_of(plan.uid), headers=ranged)
        try:
            self._require(response)
        except BaseException:
            response.close()
            raise
        return response

    def _require(self, response: Response) -> None:
        """
        :raises Conflict: these are other bytes than those that were to come
        :raises TransportError: none come
        """
        begin, plan = self._position, self._plan
        if response.status == HTTPStatus.ACCEPTED:
            raise TransportError(f"the cart {plan.uid} is not ready any more", transient=True)
        length = response.headers.get("Content-Length")
        same = response.headers.get("ETag") == f'"{plan.etag}"'
        if begin:
            expected = f"bytes {begin}-{plan.length - 1}/{plan.length}"
            same = same and response.headers.get("Content-Range") == expected
            same = same and response.status == HTTPStatus.PARTIAL_CONTENT
        if not same or length != str(plan.length - begin):
            raise Conflict(
                f"the cart {plan.uid} is another one than a moment ago",
                hint="get it once more",
            )


def checked(plan: Plan, read: Callable[[int], bytes]) -> Iterator[tuple[int, bytes]]:
    """
    Read a tar to its end, and yield the bytes of its members, each with the number of its member.
    The last bytes of a member are yielded only if all of it has the right digest.

    :param read: returns at least one of the next bytes, and at most as many as it is asked for
    :raises DigestMismatch: the bytes of a member are not those of its digest
    :raises IntegrityError: something else is not what it must be
    """
    table, position = plan.table, 0
    for number, (start, header) in enumerate(table.headers()):
        member, digest = table.members[number], plan.digests[number]
        _expect_zeros(plan, read, start - position)
        _expect(plan, read, header)
        hasher, rest, data = digest.hasher(), member.size, b""
        while rest:
            data = read(min(STEP, rest))
            hasher.update(data)
            rest -= len(data)
            if rest:
                yield number, data
        if (actual := hasher.hexdigest()) != digest.hex:
            raise DigestMismatch(
                f"{member.name} is not what the service says: {digest.algorithm}:{actual}",
                expected=digest,
                actual=f"{digest.algorithm}:{actual}",
                hint="get it once more",
            )
        if data:
            yield number, data
        position = start + len(header) + member.size
    _expect_zeros(plan, read, table.length - position)


def _expect_zeros(plan: Plan, read: Callable[[int], bytes], count: int) -> None:
    while count:
        some = min(count, STEP)
        _expect(plan, read, bytes(some))
        count -= some


def _expect(plan: Plan, read: Callable[[int], bytes], expected: bytes) -> None:
    rest = expected
    while rest:
        data = read(len(rest))
        if not rest.startswith(data):
            raise IntegrityError(
                f"the tar of the cart {plan.uid} is not what the service says",
                hint="get it once more",
            )
        rest = rest[len(data) :]


def _keep(part: int, data: bytes, offset: int) -> None:
    if not data.strip(b"\0"):  # a hole stays one
        os.ftruncate(part, offset + len(data))
        return
    rest = memoryview(data)
    while rest:
        rest = rest[os.pwrite(part, rest, offset + len(data) - len(rest)) :]


def _contradictory(uid: str, how: str) -> IntegrityError:
    return IntegrityError(
        f"what the service says of the cart {uid} cannot be believed: {how}",
        hint="is the service of the same version as this program?",
    )
