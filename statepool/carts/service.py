"""The common context of all parts of the service, and its creation from the settings."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from attrs import field, frozen

from statepool import Config, Progress, StatePool, from_config
from statepool.carts.archives import Archive, Context, open_archives
from statepool.carts.database import Database
from statepool.carts.migrations import require_current, synchronise, version
from statepool.carts.settings import ServeSettings
from statepool.carts.volume import Volume
from statepool.carts.waiting import wait_for

log = logging.getLogger("statepool.carts")


@frozen(eq=False)
class Service:
    """
    The service without its HTTP server.

    :param settings: its own settings
    :param volume: the directory of carts
    :param archives: the archives from which files come, by name
    :param database: the database with all facts about carts
    :param stopping: set when no new work may begin
    """

    settings: ServeSettings
    volume: Volume
    archives: Mapping[str, Archive]
    database: Database
    stopping: threading.Event = field(factory=threading.Event)


def open_service(
    settings: ServeSettings, config: Config, *, tell: Callable[[str], None] = log.warning
) -> Service:
    """
    Wait for the database, and create its tables if it has none.

    :param config: of the pools from which states come
    :param tell: called with messages for the user
    :raises StatePoolError: the service cannot start
    """

    def pool(progress: Progress) -> StatePool:
        return from_config(config, progress=progress)

    volume = Volume(settings.directory.absolute())
    volume.prepare()
    archives = open_archives(settings, Context(pool, settings.archive_timeout))
    stopping = threading.Event()
    database = Database(settings.database_url)
    wait_for(database.reach, settings, stopping.wait, tell)
    with volume.hold("schema", wait=True):
        if version(database) is None:
            synchronise(database)
    require_current(database)
    return Service(settings, volume, archives, database, stopping)
