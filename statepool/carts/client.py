"""
Carts as their users have them: made at a service, waited for, got and deleted.

>>> from statepool.carts.client import Cart, CartService
>>> service = CartService("https://carts.example.org:8081")
>>> cart = Cart.new(service, [{"id": "vm1/disk/install", "path": "install.qcow2"}])
...                                                             # doctest: +SKIP
>>> cart.get("install.tar")                                     # doctest: +SKIP

It needs nothing of what the service is made of.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from attrs import frozen

from statepool import (
    FileInTheWay,
    Imported,
    IntegrityError,
    InUse,
    NoSpace,
    NotFound,
    Progress,
    RefusedError,
    StatePool,
    StatePoolError,
    TransportError,
    UsageError,
)
from statepool.carts.arriving import Arriving, Plan, checked
from statepool.carts.asking import CartService, path_of

__all__ = ["Cart", "CartService", "Got"]

_PAUSES = (0.1, 2.0)
"""Seconds between two questions how far a cart is: at first, and at most."""

_STATUS: Mapping[str, tuple[type, ...]] = {
    "uid": (str,),
    "status": (str,),
    "error": (str,),
    "bytes": (int,),
    "bytes_needed": (int,),
    "rate": (int, float, NoneType),
    "seconds_left": (int, float, NoneType),
    "files": (list,),
}
"""The types of what is said of a cart, as far as it is used here; see ``docs/serve.rst``."""

_FILE: Mapping[str, tuple[type, ...]] = {
    "path": (str,),
    "status": (str,),
    "error": (str,),
    "bytes": (int,),
    "size": (int, NoneType),
}
"""Likewise, of each of its files."""

_LARGEST = 1 << 63
"""All numbers are smaller."""

_PART = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Flags that open what was kept: no link is followed, and no open waits."""

_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EINVAL})
"""Errors of the kernel where a file cannot have a second name."""

SUFFIX = ".statepool"
"""The suffix of bundles whose names are not given."""


@frozen
class Got:
    """
    A cart was got.

    :param uid: of the cart
    :param path: the tar
    :param bytes: its length
    :param resumed: of these, bytes that an interrupted download had left, and were not moved again
    :param digest: of the cart, which was checked
    """

    uid: str
    path: Path
    bytes: int
    resumed: int
    digest: str


class _Silent:
    """Says nothing."""

    def begin(self, what: str, total: int) -> None:
        """Nothing is said."""

    def advance(self, count: int) -> None:
        """Nothing is said."""

    def end(self) -> None:
        """Nothing is said."""


class Cart:
    """
    A cart of a service.

    :param service: that has it
    :param uid: of the cart
    :param progress: told how far it is
    """

    def __init__(self, service: CartService, uid: str, *, progress: Progress | None = None) -> None:
        self.service = service
        self.uid = uid
        self._progress: Progress = progress or _Silent()

    def __repr__(self) -> str:
        return f"<Cart {self.url}>"

    @property
    def url(self) -> str:
        """Where it can be had."""
        return f"{self.service.url}{self._path}"

    @property
    def _path(self) -> str:
        return path_of(self.uid)

    @classmethod
    def new(
        cls,
        service: CartService,
        entries: Iterable[Mapping[str, object]],
        *,
        uid: str | None = None,
        bundle: bool | None = None,
        progress: Progress | None = None,
    ) -> Cart:
        """
        Make a cart, and do not wait for it. The same uid with the same list is the same cart; one
        in error is begun again.

        :param entries: as in the list that ``docs/serve.rst`` describes: each with ``id`` and, if
            it is not to be called so in the tar, ``path``
        :param uid: of the cart; by default one that cannot be guessed
        :param bundle: whether its tar is made in advance; as the service wants it if not given
        :raises UsageError: the list cannot be used
        :raises Conflict: there is a cart of this uid with another list
        :raises RefusedError: this is not permitted
        """
        cart = cls(service, uid or str(uuid.uuid4()), progress=progress)
        body: dict[str, object] = {"fileids": [_entry(entry) for entry in entries]}
        if bundle is not None:
            body["bundle"] = bundle
        service.json("POST", cart._path, body)
        return cart

    def status(self) -> dict[str, Any]:
        """
        :returns: how far it is, as ``GET /UID/status`` answers
        :raises NotFound: there is no such cart
        """
        answer = self.service.json("GET", f"{self._path}/status")
        if not _has_form(answer, _STATUS) or not all(
            _has_form(one, _FILE) for one in answer["files"]
        ):
            raise TransportError(
                f"{self.service.url} does not answer as a service of carts", hint="correct the URL"
            )
        known: dict[str, Any] = answer
        return known

    def delete(self) -> None:
        """
        Delete it.

        :raises NotFound: there is no such cart
        """
        asked = 0

        def ask() -> None:
            nonlocal asked
            asked += 1
            try:
                with self.service.opened("DELETE", self._path):
                    pass
            except NotFound:
                if asked == 1:  # else the answer to an earlier question was lost
                    raise

        self.service.patiently(ask)

    def wait(self) -> dict[str, Any]:
        """
        Wait until it is ready.

        :returns: as :meth:`status`
        :raises StatePoolError: it is in error; the message has the reason
        """
        pauses = itertools.chain((_PAUSES[0],) * 10, itertools.repeat(_PAUSES[1]))
        with contextlib.closing(_Filling(self._progress, self.uid)) as filling:
            while True:
                status = self.status()
                if status["status"] == "ready":
                    return status
                if status["status"] == "error":
                    raise StatePoolError(
                        f"the cart {self.uid} is in error: {status.get('error')}",
                        hint="make it again with the same uid and list, or delete it",
                    )
                filling.tell(status)
                time.sleep(next(pauses))

    # -- getting -----------------------------------------------------------------------------------

    def get(self, to: str | os.PathLike[str], *, overwrite: bool = False) -> Got:
        """
        Wait until it is ready, and get its tar: it gets its name when it is whole, checked and on
        stable storage. What was interrupted leaves a hidden file beside it, and is gone on with by
        the next one.

        :param overwrite: whether a file there gives way
        :raises FileInTheWay: a file is there
        :raises IntegrityError: what came is not what the service says
        :raises NoSpace: it does not fit
        """
        path = Path(os.path.abspath(to))
        _require_free(path, overwrite=overwrite)
        plan = Plan.of(self.uid, self.wait())
        with _translated(path), _part(path, plan) as (part, name):
            resumed = self._download(plan, part)
            os.fsync(part)
            _settle(name, path, overwrite=overwrite)
            _flush(path.parent)
        return Got(self.uid, path, plan.length, resumed, plan.etag)

    def _download(self, plan: Plan, part: int) -> int:
        """:returns: how many bytes were there before, and are right"""
        if os.fstat(part).st_size > plan.length:
            os.ftruncate(part, plan.length)
        while True:
            with Arriving(self.service, plan, self._progress, part) as arriving:
                _require_room(part, plan.length - arriving.resumed)
                try:
                    for _ in checked(plan, arriving.read):
                        pass
                except IntegrityError:
                    os.ftruncate(part, 0)
                    if not arriving.resumed:
                        raise
                    continue  # what was left here may have been wrong: once more, from nothing
                return arriving.resumed

    def import_into(
        self, pool: StatePool, *, to: str | None = None, replace: bool = False
    ) -> tuple[Imported, ...]:
        """
        Wait until it is ready, and bring every state that is in it in export form into a cache: no
        file is made in between, and each of them comes whole, or not at all.

        :param to: also store them in this pool: the name of a source, or where a pool is
        :param replace: whether other content under their names gives way there
        :returns: what is in the cache now
        :raises UsageError: it has nothing in export form
        :raises IntegrityError: what came is not what the service says, or not fit to be used
        """
        plan = Plan.of(self.uid, self.wait())
        if not any(plan.exports):
            raise UsageError(
                f"the cart {self.uid} has no state in export form",
                hint="make one with --export, or get it with -o FILE",
            )
        found = []
        # How far it is, the pool tells: of the bytes that it needs.
        with Arriving(self.service, plan, _Silent()) as arriving:
            pieces = checked(plan, arriving.read)
            for number, same in itertools.groupby(pieces, lambda piece: piece[0]):
                if plan.exports[number] is not None:
                    name = plan.table.members[number].name
                    bundle = io.BufferedReader(_Bundle(name, (data for _, data in same)))
                    found.append(pool.import_bundle(bundle, to=to, replace=replace))
        return tuple(found)


def _entry(entry: Mapping[str, object]) -> dict[str, object]:
    path = entry.get("path") or f"{entry.get('id')}{SUFFIX if entry.get('export') else ''}"
    return {**entry, "path": path}


def _has_form(answer: object, form: Mapping[str, tuple[type, ...]]) -> bool:
    """:returns: whether a service has answered an object with values of these types"""
    return isinstance(answer, dict) and all(
        isinstance(value := answer.get(key), kinds)
        and not (isinstance(value, int | float) and abs(value) >= _LARGEST)
        for key, kinds in form.items()
    )


class _Bundle(io.RawIOBase):
    """
    A bundle while it comes.

    :param name: what messages call it
    """

    def __init__(self, name: str, pieces: Iterator[bytes]) -> None:
        self.name = name
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """:returns: that it is"""
        return True

    def readinto(self, buffer: Any) -> int:
        """:returns: how many bytes were put there; none at the end"""
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        some = self._rest[: len(buffer)]
        buffer[: len(some)] = some
        self._rest = self._rest[len(some) :]
        return len(some)


class _Filling:
    """Tells how far a cart is that is being filled."""

    def __init__(self, progress: Progress, uid: str) -> None:
        self._progress = progress
        self._what = f"fill {uid}"
        self._total = -1
        self._done = 0

    def tell(self, status: Mapping[str, Any]) -> None:
        """It has come so far."""
        done, total = status["bytes"], status["bytes_needed"]
        if total != self._total:
            self.close()
            self._progress.begin(self._what, total)
            self._total = total
        self._progress.advance(max(done - self._done, 0))
        self._done = max(done, self._done)

    def close(self) -> None:
        """Nothing more is told."""
        if self._total >= 0:
            self._progress.end()
        self._total, self._done = -1, 0


# -- the file --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _part(path: Path, plan: Plan) -> Iterator[tuple[int, Path]]:
    """
    Yield the descriptor and the name of the file beside a place that has what came so far: the same
    one for the same bytes.

    :raises InUse: another process is getting it
    """
    mark = hashlib.sha256(plan.etag.encode()).hexdigest()[:16]
    name = path.with_name(f".{path.name[:128]}.{mark}.part")
    while (descriptor := _locked(name, path)) is None:
        pass
    try:
        yield descriptor, name
    finally:
        if not os.fstat(descriptor).st_size:  # nothing came
            name.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(name: Path, path: Path) -> int | None:
    """
    :returns: a descriptor of the file of this name, which no other process uses; None if there was
        one that cannot be used: it has been removed, or has another name now
    """
    try:
        descriptor, made = os.open(name, _PART | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        try:
            descriptor, made = os.open(name, _PART), False
        except FileNotFoundError:
            return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(descriptor)
        if not _has_name(found, name):  # the process that had it has finished it
            os.close(descriptor)
            return None
        if not made and not _is_own(found):
            name.unlink()
            os.close(descriptor)
            return None
    except BlockingIOError as error:
        os.close(descriptor)
        raise InUse(
            f"another process gets {path} now", path=str(path), hint="wait for it"
        ) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _has_name(found: os.stat_result, name: Path) -> bool:
    try:
        return os.path.samestat(found, name.lstat())
    except FileNotFoundError:
        return False


def _is_own(found: os.stat_result) -> bool:
    """
    :returns: whether a file can be written: another account could change its own one after the
        check, and one with several names is something else as well, as after a crash in
        :func:`_settle`
    """
    is_single = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
    return is_single and found.st_uid == os.geteuid()


def _require_free(path: Path, *, overwrite: bool) -> None:
    if path.is_dir() or (not overwrite and os.path.lexists(path)):
        hint = "choose another name" if path.is_dir() else "choose another name, or --overwrite"
        raise FileInTheWay(f"{path} exists", path=str(path), hint=hint)


def _require_room(part: int, needed: int) -> None:
    found = os.fstatvfs(part)
    if needed > (available := found.f_bavail * found.f_frsize):
        raise NoSpace(
            f"{needed} bytes do not fit where {available} are free",
            needed=needed,
            available=available,
            hint="make room, or choose another place",
        )


def _settle(name: Path, path: Path, *, overwrite: bool) -> None:
    """Give a file its name."""
    if not overwrite:
        try:
            os.link(name, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _require_free(path, overwrite=False)
        else:
            name.unlink()
            return
    name.replace(path)


def _flush(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except StatePoolError:
        raise
    except FileExistsError as error:
        raise FileInTheWay(f"{path} exists", path=str(path), hint="choose another name") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{path} does not fit", path=str(path), hint="make room") from error
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> StatePoolError:
    kinds = ((FileNotFoundError, NotFound), (PermissionError, RefusedError))
    kind = next((ours for theirs, ours in kinds if isinstance(error, theirs)), StatePoolError)
    told = f"{path} cannot be written: {error.strerror}"
    return kind(told, path=str(path), hint="choose another place")
