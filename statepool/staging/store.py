"""The store action: the states of a staged day come into a pool."""

from __future__ import annotations

import datetime as dt

from attrs import field, frozen

from statepool.copying.sync import Sync
from statepool.errors import Conflict, RefusedError, StatePoolError
from statepool.model.location import Location
from statepool.model.outcomes import SyncAction
from statepool.model.settings import Settings
from statepool.sources.pool_source import open_pool
from statepool.staging.day import Staging, to_store
from statepool.staging.settings import WORK, StageSettings
from statepool.staging.states import is_pool
from statepool.transports.base import FileKind


@frozen
class Stored:
    """
    The result of the action.

    :param day: the directory of the day
    :param states: for each peer with states: its name, how many it has, how many were copied
    :param errors: what could not be stored
    """

    day: str
    states: tuple[tuple[str, int, int], ...]
    errors: tuple[StatePoolError, ...] = field(default=())

    def form(self) -> dict[str, object]:
        """:returns: it for JSON"""
        return {
            "day": self.day,
            "peers": [
                {"peer": peer, "states": count, "new": new} for peer, count, new in self.states
            ],
            "errors": [error.message for error in self.errors],
        }


def store(
    settings: StageSettings,
    pool: Location,
    transfers: Settings,
    *,
    today: dt.date,
    full: bool = False,
) -> Stored:
    """
    Copy the states of today into a pool, or those of yesterday or tomorrow: see
    :func:`~statepool.staging.day.to_store`. The day counts as stored if all of it could be.

    :param full: store today, also if it has been stored
    :raises RefusedError: there is no such day
    :raises NotAPool: there is no pool
    """
    staging = Staging(settings)
    day = to_store(staging, today, only_today=full)
    target = open_pool(pool, transfers)
    target.require(write=True)
    errors: list[StatePoolError] = []
    states: list[tuple[str, int, int]] = []
    for entry in sorted(staging.files.scan(day.path), key=lambda entry: entry.name):
        if entry.kind is not FileKind.DIRECTORY or entry.name == WORK:
            continue
        if not is_pool(day, entry.name):
            errors.append(
                RefusedError(
                    f"{day}/{entry.name} has files, which cannot become states of a pool",
                    hint="keep files with statepool archive",
                    path=f"{day}/{entry.name}",
                )
            )
            continue
        origin = open_pool(f"{day}/{entry.name}", transfers)
        found = Sync(origin, target).run().states
        new = sum(one.action is SyncAction.COPIED for one in found)
        states.append((entry.name, len(found), new))
        errors += [
            Conflict(
                f"{one.object} {one.state} of {entry.name} could not be stored: {one.error}",
                object=one.object,
                state=one.state,
                pool=str(pool),
            )
            for one in found
            if one.action is SyncAction.FAILED
        ]
    if not errors:
        day.indicate(settings.indicators.store)
    return Stored(str(day), tuple(states), tuple(errors))
