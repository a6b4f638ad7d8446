"""
The tasks for a cart: plain functions of the service and a cart's number.

A runner of these functions (threads of the process, or workers of Celery) needs to know one thing:
if a function returns a number, it must be called again after so many seconds. Each step is recorded
in the database. So if a process crashes, the next call of :func:`fill_cart` for its cart resumes
from there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from itertools import groupby

import peewee
from attrs import define, field

from statepool import Conflict, NoSpace, StatePoolError, TransportError
from statepool.carts.archives import Archive, Part, Wanted
from statepool.carts.bundle import Target
from statepool.carts.database import UNKNOWN, Cart, DatabaseAway, File, now
from statepool.carts.room import MESSAGE, free_room, make_room
from statepool.carts.service import Service, log
from statepool.carts.watch import Interrupted, Revoked, Watch

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of the kernel where there is no room, or not for this account."""

ACTIVE = ("waiting", "staging", "bundling")
"""The states of carts that have unfinished work."""


def unfinished_carts(service: Service) -> list[int]:
    """:returns: the carts with unfinished work, oldest first"""
    with service.database.session():
        found = Cart.select(Cart.id).where(is_unfinished())
        return [cart.id for cart in found.order_by(Cart.id)]


def is_unfinished() -> peewee.Expression:
    """:returns: what is so of a cart for which something is to be done"""
    return (Cart.status << ACTIVE) & Cart.deleted_date.is_null()


def sweep(service: Service) -> None:
    """Remove the files of carts that were deleted while they were in use, and of unknown carts."""
    for number in service.volume.ids():
        with service.database.session():
            cart = Cart.get_or_none(Cart.id == number)
        if cart is not None and cart.deleted_date is not None:
            with service.volume.hold(number) as held:
                if held:
                    service.volume.remove(cart)


def fill_cart(service: Service, cart_id: int) -> float | None:
    """
    Stage the files of a cart, fetch them, and make it ready; or record why that fails.

    :returns: seconds after which to call this again; None: the work is done
    """
    try:
        lock = service.volume.take(cart_id, shared=False, wait=False)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        with service.database.session(write=True):
            Cart.update(status="error", error=MESSAGE).where(
                (Cart.id == cart_id) & is_unfinished()
            ).execute()
        return None
    if lock is None:
        return None  # another process is filling it
    try:
        return _fill_held(service, cart_id)
    finally:
        os.close(lock)


def _fill_held(service: Service, cart_id: int) -> float | None:
    with service.database.session():
        cart = Cart.get_or_none(Cart.id == cart_id)
    if cart is None or cart.status not in ACTIVE:
        return None
    try:
        return _Filling(service, cart).run()
    except Revoked:
        service.volume.remove(cart)
        return None
    except Interrupted:
        return None  # the service is stopping: the next start resumes
    except DatabaseAway:
        raise  # the caller tries later
    except BaseException as error:
        with service.database.session(write=True):
            fault = f"a fault of the service: {type(error).__name__}"
            Cart.update(status="error", error=fault).where(Cart.id == cart_id).execute()
        raise


@define
class _Filling:
    service: Service
    cart: Cart
    failures: list[str] = field(factory=list)
    lasting: bool = False
    """Whether one of the errors is permanent."""

    def run(self) -> float | None:
        """:returns: as :func:`fill_cart`"""
        self._note(status="staging")
        try:
            if not self._stage():
                self._settle()
                return self.service.settings.poll
            make_room(self.service, self.cart)
            with Target(self.service, self.cart).opened() as target:
                for file in target.missing():
                    self._try(file, partial(self._pull, target, file))
                self._settle()
                self._note(status="bundling" if self.cart.bundle else "staging")
                path, digest = target.finish()
                self.service.volume.publish(self.cart, path)
        except _Again:
            return self.service.settings.poll
        except DatabaseAway:
            raise
        except NoSpace as error:
            said = error.message.startswith(MESSAGE)
            self._cannot(error.message if said else f"{MESSAGE}: {error.message}")
            return None
        except StatePoolError as error:
            self._cannot(error.message)
            return None
        except OSError as error:
            self._cannot(MESSAGE if error.errno in _FULL else str(error))
            return None
        length = target.table.length
        self._note(status="ready", bundle_path=str(path), digest=digest, size=length, error="")
        log.info("cart %s is ready: %d bytes", self.cart.cart_uid, length)
        return None

    # -- staging -----------------------------------------------------------------------------------

    def _stage(self) -> bool:
        """:returns: whether all files can be pulled, and their parts are recorded"""
        with self.service.database.session():
            files = list(File.select().where((File.cart == self.cart.id) & (File.size == UNKNOWN)))
        parts: dict[int, tuple[Part, ...]] = {}
        for file in files:
            self._try(file, partial(self._ask, file, parts))
        if len(parts) < len(files):
            return False
        with self.service.database.session(write=True):
            for file in files:
                self._expand(file, parts[file.id])
            self._refuse_collisions()
        return True

    def _ask(self, file: File, parts: dict[int, tuple[Part, ...]]) -> None:
        archive, wanted = self.service.archives[file.archive], _wanted(file)
        if file.status != "staging":
            self._stage_one(archive, wanted)
            self._note_file(file, status="staging")
        status = archive.status(wanted)
        if status.near:
            parts[file.id] = status.parts

    def _stage_one(self, archive: Archive, wanted: Wanted) -> None:
        try:
            archive.stage(wanted, Watch(self.service, self.cart).passed)
        except NoSpace as error:  # the cache is full; it evicts no carts
            if not free_room(self.service, self.cart, error.needed):
                raise
            archive.stage(wanted, Watch(self.service, self.cart).passed)

    def _expand(self, file: File, parts: tuple[Part, ...]) -> None:
        """Use the row of an entry for its first part, and insert a row for each further part."""
        columns = dict(file.__data__)
        columns.pop("id")
        for number, part in enumerate(parts):
            columns |= {"bundle_path": part.path, "size": part.size, "mtime": part.mtime}
            columns |= {"device": part.device, "digest": part.digest or ""}
            if number == 0:
                File.update(columns).where(File.id == file.id).execute()
            else:
                File.insert(columns).execute()

    def _refuse_collisions(self) -> None:
        """
        Check the paths of all files. Two chains may have the same file at one path: it is fetched
        once.

        :raises Conflict: two files would have the same path, or a file the path of a directory
        """
        files = File.select().where(File.cart == self.cart.id).order_by(File.bundle_path, File.id)
        found: dict[str, File] = {}
        for path, same in groupby(files, lambda file: file.bundle_path):
            first, *others = same
            found[path] = first
            for other in others:
                if not first.digest or first.digest != other.digest:
                    raise _collision(path, first.file_name, other.file_name)
                other.delete_instance()
        for path, file in found.items():
            parts = path.split("/")
            for depth in range(1, len(parts)):
                if (above := found.get("/".join(parts[:depth]))) is not None:
                    raise _collision(above.bundle_path, above.file_name, file.file_name)

    # -- pulling -----------------------------------------------------------------------------------

    def _pull(self, target: Target, file: File) -> None:
        archive, wanted = self.service.archives[file.archive], _wanted(file)
        part = Part(file.bundle_path, file.size, file.mtime, file.digest or None, file.device)
        watch, name = Watch(self.service, self.cart, file), archive.name_of(wanted)
        with self.service.volume.sharing(name) as shared:
            with archive.placing(wanted, part), target.sink(file, watch.passed) as sink:
                if shared is None or not shared.give(sink):
                    archive.pull(wanted, part, sink)
                digest = sink.finish()
            if shared is not None and (place := target.place(file)) is not None:
                shared.keep(place, digest)
        self._note_file(file, status="staged", digest=digest, done=file.size, error="")

    def _try(self, file: File, do: Callable[[], None]) -> None:
        """
        Run an operation on a file, with as many retries as the settings say; record why it fails.
        """
        settings = self.service.settings
        for attempt in range(1, settings.tries + 1):
            try:
                do()
            except (NoSpace, DatabaseAway, Interrupted):
                raise
            except StatePoolError as error:
                message, transient = (
                    str(error),
                    isinstance(error, TransportError) and error.transient,
                )
            except OSError as error:
                if error.errno in _FULL:
                    raise
                message, transient = f"{file.bundle_path}: {error}", False
            else:
                return
            log.warning("cart %s: %s", self.cart.cart_uid, message)
            if not transient or attempt == settings.tries:
                self._note_file(file, status="error", error=message)
                self.failures.append(f"{file.bundle_path}: {message}")
                self.lasting = self.lasting or not transient
                return
            Watch(self.service, self.cart).pause(settings.pause)

    # -- noting ------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """
        Complete a round over all files, some of which may have failed.

        :raises _Again: no failure was permanent, and the cart was not restarted before
        :raises StatePoolError: otherwise
        """
        if not self.failures:
            return
        if not self.lasting and not self.cart.attempts:
            with self.service.database.session(write=True):
                begin_again(self.cart)
                Cart.update(attempts=1).where(Cart.id == self.cart.id).execute()
            raise _Again
        raise StatePoolError(f"Failed to pull file({'; '.join(self.failures)})")

    def _cannot(self, message: str) -> None:
        log.warning("cart %s is in error: %s", self.cart.cart_uid, message)
        self._note(status="error", error=message)

    def _note(self, **columns: object) -> None:
        with self.service.database.session(write=True):
            changed = (
                Cart.update(updated_date=now(), **columns)
                .where((Cart.id == self.cart.id) & Cart.deleted_date.is_null())
                .execute()
            )
        if not changed:
            raise Revoked

    def _note_file(self, file: File, **columns: object) -> None:
        with self.service.database.session(write=True):
            File.update(columns).where(File.id == file.id).execute()
        for name, value in columns.items():
            setattr(file, name, value)


class _Again(Exception):
    """An exception: the cart is to be queued once more."""


def begin_again(cart: Cart) -> None:
    """
    Reset the failed files of a cart so that they are retried, in the caller's transaction: what the
    archives reported about them may have been wrong.
    """
    failed = (File.cart == cart.id) & (File.status == "error")
    unknown = {"size": UNKNOWN, "digest": "", "done": 0}
    File.update(status="waiting", error="", **unknown).where(failed).execute()
    Cart.update(status="waiting", error="", attempts=0).where(Cart.id == cart.id).execute()


def _wanted(file: File) -> Wanted:
    return Wanted(file.file_name, file.wanted_path, file.chain, file.export)


def _collision(path: str, one: str, other: str) -> Conflict:
    return Conflict(
        f"{one} and {other} would both be at {path}", hint="give them other paths in the list"
    )
