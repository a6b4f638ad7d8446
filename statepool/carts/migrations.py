"""
The version of the schema, and the migration of databases to it, including those of Cartd.

All steps are one transaction. At its end, the existing columns are compared with the expected ones:
a database is migrated completely, or not changed.
"""

from __future__ import annotations

from collections.abc import Callable

import peewee
from playhouse.migrate import SchemaMigrator, migrate

from statepool import RefusedError, UnsupportedFormat
from statepool.carts.database import TABLES, Cart, CartSystem, CartTasks, CartToken, Database, File

Version = tuple[int, int]

_SYNC = "statepool carts dbsync"


def _to_1_0(engine: peewee.Database) -> None:
    _add(engine, Cart, "bundle")


def _to_2_0(engine: peewee.Database) -> None:
    engine.create_tables([CartTasks], safe=True)


def _to_3_0(engine: peewee.Database) -> None:
    _add(engine, Cart, "owner", "request", "attempts", "digest", "size", "started_date")
    _add(engine, File, "archive", "wanted_path", "chain", "export")
    _add(engine, File, "size", "mtime", "device", "digest", "done")
    engine.create_tables([CartToken], safe=True)
    if not isinstance(engine, peewee.SqliteDatabase):  # SQLite ignores lengths
        _widen(engine, Cart, "bundle_path")
        _widen(engine, File, "file_name", "bundle_path")


STEPS: list[tuple[Version, Callable[[peewee.Database], None]]] = [
    ((0, 1), lambda engine: None),
    ((1, 0), _to_1_0),
    ((2, 0), _to_2_0),
    ((3, 0), _to_3_0),
]
"""
Every version with the step that leads to it from the version before. The first three are Cartd's.
"""

CURRENT: Version = STEPS[-1][0]


def version(database: Database) -> Version | None:
    """:returns: the version of a database; None if it has no tables of the service"""
    with database.session():
        if not database.engine.table_exists(CartSystem._meta.table_name):
            return None
        rows = {row.part: row.value for row in CartSystem.select()}
    return rows.get("major", -1), rows.get("minor", -1)


def require_current(database: Database) -> None:
    """
    :raises RefusedError: the tables are of an older version, or do not exist
    :raises UnsupportedFormat: they are of a newer version, or of an unknown one
    """
    found = version(database)
    if found == CURRENT:
        return
    if found is None:
        raise RefusedError(f"the database {database.shown} has no tables yet", hint=_SYNC)
    if found not in [known for known, _ in STEPS]:
        raise _unknown(database, found)
    raise RefusedError(
        f"the database {database.shown} has the version {dotted(found)}, not {dotted(CURRENT)}",
        hint=f"make a copy of it, then: {_SYNC}",
    )


def synchronise(database: Database) -> tuple[Version | None, Version]:
    """
    Create the tables, or migrate those of an older version.

    :returns: the version before, and the version now
    :raises UnsupportedFormat: they are of a newer or an unknown version, or the result is not as
        expected: then nothing was changed
    """
    before = version(database)
    known = [number for number, _ in STEPS]
    if before is not None and before not in known:
        raise _unknown(database, before)
    engine = database.engine
    with database.session(write=True):
        if before is None:
            engine.create_tables(TABLES)
        else:
            for _, step in STEPS[known.index(before) + 1 :]:
                step(engine)
        for part, value in zip(("major", "minor"), CURRENT, strict=True):
            CartSystem.insert(part=part, value=value).on_conflict(
                conflict_target=[CartSystem.part], update={CartSystem.value: value}
            ).execute()
        _check(database)
    return before, CURRENT


def _check(database: Database) -> None:
    for table in TABLES:
        name = table._meta.table_name
        there = {column.name for column in database.engine.get_columns(name)}
        if lacking := {field.column_name for field in table._meta.sorted_fields} - there:
            raise UnsupportedFormat(
                f"the table {name} of {database.shown} lacks {', '.join(sorted(lacking))}",
                hint="is it a database of carts? Nothing was changed",
            )


def _add(engine: peewee.Database, table: type[peewee.Model], *names: str) -> None:
    migrator, name = SchemaMigrator.from_database(engine), table._meta.table_name
    there = {column.name for column in engine.get_columns(name)}
    for field in (table._meta.fields[one] for one in names):
        if field.column_name not in there:
            migrate(migrator.add_column(name, field.column_name, field))


def _widen(engine: peewee.Database, table: type[peewee.Model], *names: str) -> None:
    migrator = SchemaMigrator.from_database(engine)
    for name in names:
        field = table._meta.fields[name]
        migrate(migrator.alter_column_type(table._meta.table_name, name, field))


def _unknown(database: Database, found: Version) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"the database {database.shown} has the version {dotted(found)}, which is not known here",
        hint="use the version of statepool that made it, or a newer one",
    )


def dotted(number: Version) -> str:
    """:returns: a version with a dot, such as ``2.0``"""
    return ".".join(map(str, number))
