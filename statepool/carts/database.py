"""
The database of the service: the tables of Cartd's schema 2.0, with additional columns.

Cartd's tables and columns keep their names and meanings, so that its databases can be migrated; see
:mod:`statepool.carts.migrations`. Times are UTC. Errors of the database are translated here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import peewee
from playhouse import db_url

from statepool import ConfigError, TransportError
from statepool.carts.settings import without_password

SQLITE = ("sqlite", "sqliteext", "sqlite+pool")
POSTGRESQL = ("postgresql", "postgres", "postgresql+pool", "postgres+pool", "psycopg3")

UNKNOWN = -1
"""The size of a file that no archive has described yet."""

_BUSY = 60_000
"""Milliseconds that SQLite waits for another writer."""


def now() -> datetime:
    """:returns: the time in UTC without a time zone, as in the tables"""
    return datetime.now(UTC).replace(tzinfo=None)


def ago(seconds: float) -> datetime:
    """:returns: the time ``seconds`` ago, as :func:`now`"""
    return now() - timedelta(seconds=seconds)


class CartSystem(peewee.Model):
    """The version of the schema, in two rows: ``major`` and ``minor``."""

    part = peewee.CharField(primary_key=True)
    value = peewee.IntegerField(default=-1)

    class Meta:
        """Cartd's name of the table."""

        table_name = "cartsystem"


class Cart(peewee.Model):
    """
    A cart.

    ``status`` is waiting, staging, bundling, ready, error or deleted; ``updated_date`` is when it
    was last used. Additional columns: ``owner`` created it; ``request`` is the digest of the
    requested list; ``attempts`` counts how often it was started; ``digest`` is that of the table of
    its tar, and ``size`` the length of the tar; ``started_date`` is when bytes began to move.
    """

    id = peewee.AutoField()
    cart_uid = peewee.CharField(default="1", index=True)
    bundle_path = peewee.CharField(default="", max_length=1024)
    bundle = peewee.BooleanField(default=False, null=True)
    creation_date = peewee.DateTimeField(default=now)
    updated_date = peewee.DateTimeField(default=now)
    deleted_date = peewee.DateTimeField(null=True)
    status = peewee.TextField(default="waiting")
    error = peewee.TextField(default="")
    owner = peewee.CharField(default="")
    request = peewee.CharField(default="")
    attempts = peewee.IntegerField(default=0)
    digest = peewee.CharField(default="")
    size = peewee.BigIntegerField(default=UNKNOWN)
    started_date = peewee.DateTimeField(null=True)

    class Meta:
        """Cartd's name of the table."""

        table_name = "cart"


class CartTasks(peewee.Model):
    """A task that was started for a cart, and has not ended."""

    cart_id = peewee.ForeignKeyField(Cart, index=True)
    celery_task_id = peewee.CharField(default="")

    class Meta:
        """Cartd's name of the table."""

        table_name = "carttasks"


class File(peewee.Model):
    """
    A file of a cart.

    ``file_name`` is its id in its archive, ``bundle_path`` where it is in the tar, ``status`` is
    waiting, staging, staged or error. Additional columns: ``archive``; ``wanted_path``, ``chain``
    and ``export`` as in the list, of which one entry can become several files; ``size``, ``mtime``
    and ``device`` as the archive says, the size being -1 before that; ``digest`` of the bytes;
    ``done``: bytes that arrived.
    """

    id = peewee.AutoField()
    cart = peewee.ForeignKeyField(Cart, field="id", backref="files")
    file_name = peewee.CharField(default="", max_length=1024)
    bundle_path = peewee.CharField(default="", max_length=2048)
    hash_type = peewee.CharField(null=True)
    hash_value = peewee.CharField(null=True)
    status = peewee.TextField(default="waiting")
    error = peewee.TextField(default="")
    archive = peewee.CharField(default="")
    wanted_path = peewee.CharField(default="", max_length=1024)
    chain = peewee.BooleanField(default=False)
    export = peewee.BooleanField(default=False)
    size = peewee.BigIntegerField(default=UNKNOWN)
    mtime = peewee.DoubleField(default=0.0)
    device = peewee.BigIntegerField(null=True)
    digest = peewee.CharField(default="")
    done = peewee.BigIntegerField(default=0)

    class Meta:
        """Cartd's name of the table."""

        table_name = "file"


class CartToken(peewee.Model):
    """A token of a client of the service; only its hash is kept."""

    name = peewee.CharField(primary_key=True)
    hash = peewee.CharField(unique=True)
    write = peewee.BooleanField(default=False)
    objects = peewee.CharField(default="*", max_length=1024)
    creation_date = peewee.DateTimeField(default=now)

    class Meta:
        """The name of the table."""

        table_name = "carttoken"


TABLES: list[type[peewee.Model]] = [CartSystem, Cart, CartTasks, File, CartToken]


class DatabaseAway(TransportError):
    """An error: the database cannot be reached or used; the write has to be retried later."""


class Database:
    """
    A database, used from several threads. The tables above are bound to the database that was
    created last.

    :param url: of SQLite or PostgreSQL
    :raises ConfigError: it cannot be used
    """

    def __init__(self, url: str) -> None:
        self.shown = without_password(url)
        self.engine = _engine(url, self.shown)
        self.engine.bind(TABLES)
        self._kept: dict[int, peewee.SqliteDatabase] = {}

    @contextmanager
    def session(self, *, write: bool = False) -> Iterator[None]:
        """
        Open a connection of this thread for the duration of a ``with`` block.

        :param write: whether the block is one transaction that will write
        :raises DatabaseAway: it cannot be reached or used
        """
        with self._translated():
            fresh = self.engine.connect(reuse_if_open=True)
            self._keep_one_open()
            try:
                if write:
                    with self._transaction():
                        yield
                else:
                    yield
            finally:
                if fresh:
                    self.engine.close()

    def _keep_one_open(self) -> None:
        """
        Keep a connection of this process to SQLite: when the last one is closed, SQLite writes its
        log back and flushes it, which takes longer than most sessions.
        """
        if not isinstance(self.engine, peewee.SqliteDatabase) or os.getpid() in self._kept:
            return
        kept = peewee.SqliteDatabase(
            self.engine.database, thread_safe=False, check_same_thread=False
        )
        kept.connect()
        kept.get_tables()  # only reading makes it one that counts
        # That of a parent process stays in the table: closing it here would let go of its locks.
        self._kept[os.getpid()] = kept

    def _transaction(self) -> peewee._atomic:
        # A writing transaction must not begin as a reader: if two readers want to become writers,
        # SQLite refuses one.
        if isinstance(self.engine, peewee.SqliteDatabase):
            return self.engine.atomic("IMMEDIATE")
        return self.engine.atomic()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (peewee.DatabaseError, peewee.InterfaceError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DatabaseAway(
                f"the database {self.shown} cannot be used: {reason}",
                hint="is it running, and is there room for it?",
                transient=isinstance(error, peewee.OperationalError | peewee.InterfaceError),
            ) from error

    def reach(self) -> None:
        """:raises DatabaseAway: it cannot be reached"""
        with self.session():
            pass


def _engine(url: str, shown: str) -> peewee.Database:
    scheme = urlsplit(url).scheme
    try:
        if scheme in SQLITE:
            place = urlsplit(url).path[1:]
            pragmas = {"journal_mode": "wal", "busy_timeout": _BUSY, "foreign_keys": 1}
            return peewee.SqliteDatabase(place, pragmas=pragmas)
        if scheme in POSTGRESQL:
            return db_url.connect(url)  # type: ignore[no-any-return]
    except (ValueError, RuntimeError, peewee.ImproperlyConfigured) as error:
        hint = "pip install statepool[postgresql]" if scheme in POSTGRESQL else "correct the URL"
        raise ConfigError(f"the database {shown} cannot be used: {error}", hint=hint) from error
    raise ConfigError(
        f"the database {shown} is of no kind that is known",
        hint="write sqlite:////absolute/path or postgresql://user@host/name",
    )
