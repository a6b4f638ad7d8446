"""``avocado cache list`` and ``avocado cache clear``: the states in the cache of this host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avocado.core.output import LOG_UI
from avocado.core.plugin_interfaces import Cache
from avocado.core.settings import settings

from avocado_statepool.jobs import open_pool

if TYPE_CHECKING:
    from statepool import Listed, StatePool


class StatepoolCache(Cache):
    """The plugin of ``avocado cache`` for the cache of this host."""

    name = "statepool"
    description = "States of virtual machines in the cache of this host"

    def list(self) -> str:
        """:returns: a line for each state"""
        from statepool import StatePoolError

        try:
            pool = open_pool(settings.as_dict())
            return "\n".join(_line(one) for one in pool.show(scope="own")) + "\n"
        except StatePoolError as error:
            return f"statepool: {error}\n"

    def clear(self) -> None:
        """
        Remove the states that a source has too: they can be fetched again. States that only this
        cache has stay, and are listed. States that back a working image stay until it is removed.
        """
        from statepool import StatePoolError

        try:
            pool = open_pool(settings.as_dict())
            for one in _clear(pool):
                LOG_UI.info("%s stays: no source has it, or something stands on it", _name(one))
        except StatePoolError as error:
            LOG_UI.error("statepool: %s", error)


def _clear(pool: StatePool) -> list[Listed]:
    """:returns: the states that stay"""
    from statepool import HasDependants, NotFound

    own = list(pool.show(scope="own"))
    elsewhere = (
        {
            (one.manifest.id, str(one.manifest.digest))
            for one in pool.show(scope="swarm cluster shared")
        }
        if pool.sources
        else set()
    )
    left = [
        one
        for one in own
        if one.managed and (one.manifest.id, str(one.manifest.digest)) in elsewhere
    ]
    stays = [one for one in own if one not in left]
    while left:
        again: list[Any] = []
        for one in left:
            try:
                _unset(pool, one)
            except HasDependants:
                again.append(one)
            except NotFound:
                continue  # it was removed with its machine's state
        if len(again) == len(left):
            return stays + again
        left = again
    return stays


def _unset(pool: StatePool, one: Listed) -> None:
    from statepool import Machine, parse_object

    subject = parse_object(one.manifest.object)
    if isinstance(subject, Machine):
        pool.machine(subject).unset(one.manifest.state)
    else:
        pool.image(subject).unset(one.manifest.state)


def _name(one: Listed) -> str:
    return f"{one.manifest.object} {one.manifest.state}"


def _line(one: Listed) -> str:
    size = f"{one.manifest.size / (1 << 20):.1f} MiB" if one.manifest.size else ""
    return f"{_name(one)}  {size}".rstrip()
