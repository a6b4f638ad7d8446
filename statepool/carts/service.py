"""What the parts of the service work with, as one value; and how it is made from the settings."""

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
    The service, without what listens.

    :param settings: its own settings
    :param volume: where carts lie
    :param archives: where files come from, by name
    :param database: what is known of carts
    :param stopping: set once nothing new is to be begun
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
    Wait for the database, and make its tables if it has none.

    :param config: of the pools that states come from
    :param tell: is given what there is to say to a person
    :raises StatePoolError: the service cannot begin
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
