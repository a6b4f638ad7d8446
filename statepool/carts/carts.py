"""Users' work on carts: creating, looking at, downloading and deleting them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC
from pathlib import Path
from typing import Any

from peewee import Expression

from statepool import (
    Conflict,
    LocalTransport,
    Location,
    NotFound,
    RefusedError,
    StatePoolError,
)
from statepool.carts.auth import Identity
from statepool.carts.bundle import files_of, open_file, table_of
from statepool.carts.database import Cart, CartTasks, File, now
from statepool.carts.lists import Request
from statepool.carts.room import mark_deleted
from statepool.carts.sending import Content
from statepool.carts.service import Service
from statepool.carts.spans import Span, spans
from statepool.carts.tasks import begin_again

_ROWS = 500
"""Files that one SQL statement inserts: databases limit the number of values of a statement."""


def find_cart(service: Service, uid: str, identity: Identity) -> Cart:
    """
    :returns: the newest cart of this uid that is not deleted
    :raises NotFound: there is no such cart that this user may read
    """
    with service.database.session():
        return _find(uid, identity) or _raise_missing(uid)


def _find(uid: str, identity: Identity) -> Cart | None:
    mine = (Cart.cart_uid == uid) & visible(identity)
    newest = Cart.select().where(mine).order_by(Cart.creation_date.desc(), Cart.id.desc())
    return next(iter(newest.limit(1)), None)


def _raise_missing(uid: str) -> Cart:
    raise NotFound(f"No cart with uid {uid} found", hint="POST its list first")


def make_cart(service: Service, uid: str, request: Request, identity: Identity) -> int:
    """
    Create a cart, or find the one that was created from the same list; a failed cart is restarted.

    :returns: its number
    :raises Conflict: the uid has a cart with another list
    :raises RefusedError: the user has too many carts
    """
    with (
        service.volume.hold("making", wait=True),
        service.database.session(write=True),
    ):
        cart = _find(uid, identity)
        if cart is None:
            return _make(service, uid, request, identity)
        if cart.request != request.digest:
            raise Conflict(
                f"there is a cart {uid} of another list",
                hint="delete it first, or choose another uid",
            )
        if cart.status == "error":
            begin_again(cart)
        return int(cart.id)


def _make(service: Service, uid: str, request: Request, identity: Identity) -> int:
    most = service.settings.max_carts
    mine = (Cart.owner == identity.name) & Cart.deleted_date.is_null()
    if Cart.select().where(mine).count() >= most:
        raise RefusedError(f"there are {most} carts of yours", hint="delete some of them first")
    cart = Cart.create(
        cart_uid=uid, bundle=request.bundle, owner=identity.name, request=request.digest
    )
    rows = [
        {
            "cart": cart.id,
            "archive": entry.archive,
            "file_name": entry.wanted.id,
            "bundle_path": entry.wanted.path,
            "wanted_path": entry.wanted.path,
            "chain": entry.wanted.chain,
            "export": entry.wanted.export,
            "hash_type": entry.hash_type,
            "hash_value": entry.hash_sum,
        }
        for entry in request.entries
    ]
    for start in range(0, len(rows), _ROWS):
        File.insert_many(rows[start : start + _ROWS]).execute()
    return int(cart.id)


def retry_cart(service: Service, uid: str, identity: Identity) -> int:
    """
    Begin a cart in error again, and leave any other as it is.

    :returns: its number
    :raises NotFound: there is none
    """
    with service.database.session(write=True):
        cart = _find(uid, identity) or _raise_missing(uid)
        if cart.status == "error":
            begin_again(cart)
    return int(cart.id)


def delete_cart(service: Service, uid: str, identity: Identity) -> None:
    """
    Delete every cart of this uid. Their tasks end, and running downloads complete.

    :raises NotFound: there is none
    """
    with service.database.session(write=True):
        gone = []
        while (cart := _find(uid, identity)) is not None:
            mark_deleted(cart)
            CartTasks.delete().where(CartTasks.cart_id == cart.id).execute()
            gone.append(cart)
    if not gone:
        _raise_missing(uid)
    for cart in gone:
        with service.volume.hold(cart.id) as held:
            if held:  # otherwise the process that holds it removes it, or a later sweep
                service.volume.remove(cart)


# -- looking ---------------------------------------------------------------------------------------


def list_carts(service: Service, identity: Identity) -> list[dict[str, Any]]:
    """:returns: the carts that a user may read, newest first"""
    with service.database.session():
        # No models, no rows of peewee, which convert each value, and no times that are parsed only
        # to be written again: of ten thousand carts they would take most of the time.
        told = (getattr(Cart, name) for name in _TOLD)
        times = (getattr(Cart, name).cast("text") for name in _TIMES)
        found = Cart.select(*told, *times).where(visible(identity)).order_by(Cart.id.desc())
        engine: Any = service.database.engine
        rows = engine.execute(found).fetchall()
    return [_summary(*row) for row in rows]


def visible(identity: Identity) -> Expression:
    """:returns: a condition of the carts that a user may see"""
    there = Cart.deleted_date.is_null()
    return there if identity.everything else there & (Cart.owner == identity.name)


def describe_cart(service: Service, cart: Cart) -> dict[str, Any]:
    """:returns: all facts about a cart: its progress, and which files failed, and why"""
    with service.database.session():
        files = list(File.select().where(File.cart == cart.id).order_by(File.bundle_path, File.id))
    size = sum(max(file.size, 0) for file in files)
    done = sum(file.done for file in files)
    return {
        **_summary(
            *(getattr(cart, name) for name in _TOLD),
            *(str(getattr(cart, name)) for name in _TIMES),
        ),
        **progress(cart, done, size),
        "files": [_file(file) for file in files],
    }


def progress(cart: Cart, done: int, size: int) -> dict[str, Any]:
    """
    :param done: bytes of its files that came
    :param size: bytes of all that are known
    :returns: how far a cart is, and when it will be ready
    """
    began = cart.started_date if cart.status in ("staging", "bundling") else None
    seconds = (now() - began).total_seconds() if began is not None else 0.0
    rate = done / seconds if seconds > 0 else None
    return {
        "bytes": done,
        "bytes_needed": size,
        "rate": rate,
        "seconds_left": (size - done) / rate if rate else None,
    }


_TOLD = ("cart_uid", "status", "error", "bundle", "owner", "size", "digest")
_TIMES = ("creation_date", "updated_date")
"""The columns that :func:`_summary` takes, in their order."""


def _summary(
    uid: str,
    status: str,
    error: str,
    bundle: bool | None,
    owner: str,
    size: int,
    digest: str,
    created: str,
    used: str,
) -> dict[str, Any]:
    return {
        "uid": uid,
        "status": status,
        "error": error,
        "bundle": bool(bundle),
        "owner": owner,
        "size": size if size >= 0 else None,
        "digest": digest or None,
        "created": _time(created),
        "used": _time(used),
    }


def _file(file: File) -> dict[str, Any]:
    return {
        "id": file.file_name,
        "archive": file.archive,
        "path": file.bundle_path,
        "status": file.status,
        "error": file.error,
        "bytes": file.done,
        "size": file.size if file.size >= 0 else None,
        "mtime": file.mtime,
        "digest": file.digest or None,
        "export": bool(file.export),
    }


def _time(text: str) -> str:
    """
    :param text: a time in UTC, as databases and Python write it: ``2026-11-30 19:00:00.123456``
    :returns: the same in ISO 8601, with its zone, in whole seconds
    """
    return f"{text[:10]}T{text[11:19]}+00:00"


# -- downloading -----------------------------------------------------------------------------------


class Download:
    """
    A download of a cart, which is not removed until this is closed.

    :param cart: a ready cart
    :raises NotFound: the cart was removed meanwhile
    """

    def __init__(self, service: Service, cart: Cart) -> None:
        self._service = service
        self._lock = service.volume.take(cart.id, shared=True, wait=True)
        try:
            with service.database.session(write=True):
                there = (Cart.id == cart.id) & (Cart.status == "ready")
                if not Cart.update(updated_date=now()).where(there).execute():
                    _raise_missing(cart.cart_uid)
            self.content = self._made(cart) if cart.bundle else self._table(cart)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the cart; further calls do nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _made(self, cart: Cart) -> Content:
        path, step = Path(cart.bundle_path), self._service.settings.transfer_size
        try:
            found = path.lstat()
        except OSError as error:
            raise _lost(cart, path) from error

        def read(start: int, stop: int) -> Iterator[bytes | Span]:
            with open_file(path) as descriptor:
                yield from spans(descriptor, start, stop, step, str(path))

        if not stat.S_ISREG(found.st_mode) or (cart.size >= 0 and found.st_size != cart.size):
            raise _lost(cart, path)
        # the second form is for a cart of Cartd
        etag = cart.digest or f"{found.st_size}-{found.st_mtime_ns}"
        return Content(found.st_size, etag, _modified(cart), read)

    def _table(self, cart: Cart) -> Content:
        with self._service.database.session():
            files = files_of(cart)
        table, tree = table_of(files), self._service.volume.tree(cart)
        if not cart.digest or table.length != cart.size:
            raise _lost(cart, tree)

        place = LocalTransport(Location("file", str(tree)))

        def open_member(number: int) -> AbstractContextManager[int]:
            path = files[table.members[number].name].bundle_path
            return place.beneath(path).open(os.O_RDONLY | os.O_NONBLOCK)

        def read(start: int, stop: int) -> Iterator[bytes | Span]:
            return table.read(start, stop, open_member, self._service.settings.transfer_size)

        return Content(table.length, cart.digest, _modified(cart), read)


def _modified(cart: Cart) -> float:
    return cart.creation_date.replace(tzinfo=UTC).timestamp()


def _lost(cart: Cart, path: Path) -> StatePoolError:
    return NotFound(
        f"{path} of the cart {cart.cart_uid} is not there, or not what it was",
        hint="delete the cart, and post its list once more",
    )
