"""What the page tells: pools and what they have, carts and how far they are, room on disks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import define, evolve, frozen
from peewee import Case, fn

from statepool import Listing, Location, SourceStatus, StatePoolError
from statepool.carts.auth import Identity
from statepool.carts.carts import progress, visible
from statepool.carts.database import UNKNOWN, Cart, File
from statepool.carts.pools import PoolsArchive
from statepool.carts.room import evictable
from statepool.carts.sending import Content
from statepool.carts.service import Service
from statepool.carts.settings import POOLS
from statepool.carts.spans import Span
from statepool.carts.tasks import ACTIVE
from statepool.carts.volume import room_at

CARTS, FILES = 20, 100
"""Carts, and files of one, on a page."""

MOVING = 20
"""Transfers that are told at most."""

_FRESH = 5.0
"""Seconds for which what pools have is not looked up again: that can take long."""


# -- pools -----------------------------------------------------------------------------------------


@frozen
class Place:
    """
    A pool that states come from.

    :param name: what people call it
    :param location: where it is
    :param states: how many states it has
    :param size: bytes of them that are not holes
    :param source: what is known of it, unless it is the cache
    """

    name: str
    location: str
    states: int
    size: int
    source: SourceStatus | None = None


@frozen
class Seen:
    """
    What the pools had when they were asked.

    :param listing: their states
    :param places: the pools, the cache first
    :param problem: why they could not be asked at all, or None
    """

    listing: Listing
    places: tuple[Place, ...]
    problem: str | None

    @property
    def names(self) -> Mapping[str, str]:
        """What pools are called, by their locations."""
        return {place.location: place.name for place in self.places}


class Pools:
    """The pools that the service takes states from."""

    def __init__(self, service: Service) -> None:
        archive = service.archives[POOLS]
        self._pool = archive.pool if isinstance(archive, PoolsArchive) else None
        self._lock = threading.Lock()
        self._seen: tuple[float, Seen] | None = None

    def look(self) -> Seen:
        """:returns: what they have, as of a few seconds ago at most"""
        with self._lock:  # other threads wait, and take the same answer
            if self._seen is None or self._seen[0] + _FRESH < time.monotonic():
                seen = self._look()
                self._seen = time.monotonic(), seen
            return self._seen[1]

    def _look(self) -> Seen:
        if self._pool is None:
            return Seen(Listing(), (), None)
        listing, problem = Listing(), None
        try:
            listing = self._pool.show()
        except StatePoolError as error:
            problem = str(error)
        cache = str(self._pool.cache)
        sources = {status.location: status for status in self._pool.sources_status()}
        places = []
        for location in (cache, *sources):
            here = [item.manifest for item in listing if location in item.pools]
            status = sources.get(location)
            named = status is not None and status.name != location
            places.append(
                Place(
                    status.name if status is not None and named else _name(location, cache),
                    location,
                    len(here),
                    sum({one.digest: one.data_size for one in here}.values()),
                    status,
                )
            )
        return Seen(listing, tuple(places), problem)

    def disk(self) -> Disk | None:
        """:returns: the room where the cache is, if there is one"""
        if self._pool is None or not Path(self._pool.cache.path).is_dir():
            return None
        cache, evicts = str(self._pool.cache), self._pool.settings.min_free > 0
        sizes = {False: 0, True: 0}
        for item in self.look().listing:
            if cache in item.pools:
                sizes[evicts and len(item.pools) > 1] += item.manifest.data_size
        return _disk("cache", Path(self._pool.cache.path), sizes[False], sizes[True])


def _name(location: str, cache: str) -> str:
    if location == cache:
        return "cache"
    return Location.parse(location).path if location.startswith("file://") else location


# -- room ------------------------------------------------------------------------------------------


@frozen
class Disk:
    """
    Room in a file system.

    :param what: what lies there
    :param path: where
    :param other: bytes in use by something else
    :param kept: bytes that stay
    :param evictable: bytes that give way when room is needed
    :param free: bytes that can be written
    """

    what: str
    path: str
    other: int
    kept: int
    evictable: int
    free: int

    @property
    def parts(self) -> list[tuple[str, int, float, float]]:
        """What it consists of: a name, bytes, and where in a bar that begins and how long it is."""
        sizes = {name: getattr(self, name) for name in ("other", "kept", "evictable", "free")}
        total, start, found = sum(sizes.values()) or 1, 0.0, []
        for name, size in sizes.items():
            width = 100 * size / total
            found.append((name, size, round(start, 2), round(width, 2)))
            start += width
        return found


def _disk(what: str, path: Path, kept: int, evictable: int) -> Disk:
    free, used = room_at(path)
    # Blocks that are shared or linked are in use once, and belong to several.
    evictable = min(evictable, used)
    kept = min(kept, used - evictable)
    return Disk(what, str(path), used - kept - evictable, kept, evictable, free)


def disk_of_carts(service: Service) -> Disk:
    """:returns: the room where carts are"""
    with service.database.session():
        goes = evictable(service)
        there = Cart.deleted_date.is_null() & (Cart.size > 0)
        every = int(Cart.select(fn.SUM(Cart.size)).where(there).scalar() or 0)
    return _disk("carts", service.volume.root, every - goes, goes)


# -- carts -----------------------------------------------------------------------------------------


def carts_of(service: Service, identity: Identity, start: int) -> tuple[list[dict[str, Any]], int]:
    """
    :param start: how many of the newest are left out
    :returns: carts that a user may see, newest first, and how many there are
    """
    mine = visible(identity)
    with service.database.session():
        count = Cart.select().where(mine).count()
        found = list(Cart.select().where(mine).order_by(Cart.id.desc()).limit(CARTS).offset(start))
    return tell(service, found), count


def tell(service: Service, carts: list[Cart]) -> list[dict[str, Any]]:
    """:returns: what there is to say of carts, without their files: their sums are made there"""
    with service.database.session():
        rows: Any = (
            File.select(
                File.cart,
                fn.COUNT(File.id),
                fn.SUM(Case(None, [(File.status == "staged", 1)], 0)),
                fn.SUM(Case(None, [(File.size == UNKNOWN, 1)], 0)),
                fn.SUM(File.done),
                fn.SUM(Case(None, [(File.size > 0, File.size)], 0)),
            )
            .where(File.cart << [cart.id for cart in carts])
            .group_by(File.cart)
            .tuples()
        )
        sums = {row[0]: [int(number) for number in row[1:]] for row in rows}
    told = []
    for cart in carts:
        files, staged, unknown, done, size = sums.get(cart.id, [0] * 5)
        told.append(
            {
                "uid": cart.cart_uid,
                "status": cart.status,
                "active": cart.status in ACTIVE,
                "error": cart.error,
                "owner": cart.owner,
                "created": cart.creation_date,
                "files": files,
                "staged": staged,
                "known": files > 0 and not unknown,
                "length": cart.size if cart.size >= 0 else size,
                **progress(cart, done, size),
            }
        )
    return told


def files_of(service: Service, cart: Cart, start: int) -> list[File]:
    """:returns: files of a cart, from one on"""
    with service.database.session():
        files = File.select().where(File.cart == cart.id).order_by(File.bundle_path, File.id)
        return list(files.limit(FILES).offset(start))


def transfers(service: Service, identity: Identity) -> tuple[list[File], int]:
    """:returns: files that come now, each with its cart, and how many others are waited for"""
    mine = visible(identity) & (Cart.status << ACTIVE)
    with service.database.session():
        coming = (
            File.select(File, Cart).join(Cart).where(mine & (File.status << ("waiting", "staging")))
        )
        moving = coming.where((File.done > 0) & (File.done < File.size))
        found = list(moving.order_by(File.id).limit(MOVING))
        return found, coming.count() - len(found)


@define(eq=False)
class Sent:
    """
    A download.

    :param cart: what is sent
    :param size: bytes of its tar
    :param done: where in the tar it is
    """

    cart: Cart
    size: int
    done: int = 0


class Downloads:
    """The downloads that this process has under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[Sent] = []

    def watch(
        self, cart: Cart, content: Content, close: Callable[[], None]
    ) -> tuple[Content, Callable[[], None]]:
        """
        :param close: to be called when the download has ended
        :returns: the same content, and what is to be called instead
        """
        sent = Sent(cart, content.length)

        def read(start: int, stop: int) -> Iterator[bytes | Span]:
            sent.done = start
            for data in content.read(start, stop):
                yield data
                sent.done += len(data)

        def end() -> None:
            with self._lock:
                self._running = [one for one in self._running if one is not sent]
            close()

        with self._lock:
            self._running.append(sent)
        return evolve(content, read=read), end

    def of(self, identity: Identity) -> list[Sent]:
        """:returns: those of carts that a user may see, as many as are told"""
        with self._lock:
            running = list(self._running)
        mine = [one for one in running if identity.everything or one.cart.owner == identity.name]
        return mine[:MOVING]
