"""
The registry of archivers.

An archiver is registered in the entry point group ``statepool.archivers``, under its name. Those of
this package are known without reading the metadata of installed packages.
"""

from __future__ import annotations

import importlib

from statepool.archive.archiver import Archiver
from statepool.errors import UsageError

GROUP = "statepool.archivers"
"""The entry point group of archivers."""

BUILT_IN = {
    "external": "statepool.archive.external:ExternalArchiver",
    "internal": "statepool.archive.internal:InternalArchiver",
    "pool": "statepool.archive.pool_archiver:PoolArchiver",
}
"""The archivers of this package, each loaded when it is first used."""


def archiver_class(name: str) -> type[Archiver]:
    """
    :returns: the class of archivers that is registered under a name
    :raises UsageError: there is none, or it cannot be used
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
    else:
        found = _installed(name)
    if not (isinstance(found, type) and issubclass(found, Archiver)):
        raise UsageError(
            f"what is registered as the archiver {name!r} is not one: {found!r}",
            hint=f"an entry point of the group {GROUP} must name a class derived from Archiver",
        )
    return found


def _installed(name: str) -> object:
    from importlib import metadata  # slow, and rarely needed

    for entry in metadata.entry_points(group=GROUP, name=name):
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"the archiver {name!r}, {entry.value}, cannot be loaded: {error}",
                hint="install it again",
            ) from error
    known = sorted({*BUILT_IN, *(entry.name for entry in metadata.entry_points(group=GROUP))})
    raise UsageError(f"there is no archiver {name!r}", hint="known are " + ", ".join(known))
