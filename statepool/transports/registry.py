"""
The registry of transports by URL scheme.

A transport is registered in the entry point group ``statepool.transports``, under its URL scheme.
The transports of this package are known without reading the metadata of installed packages: reading
it takes longer than everything else here, and a source tree has none.
"""

from __future__ import annotations

import importlib

from statepool.errors import InvalidLocation
from statepool.model.location import Location
from statepool.model.settings import Settings
from statepool.transports.base import Transport

GROUP = "statepool.transports"
"""The entry point group of transports."""

BUILT_IN = {
    "file": "statepool.transports.local:LocalTransport",
    "link": "statepool.transports.link:LinkTransport",
    "ssh": "statepool.transports.ssh:SSHTransport",
}
"""The transports of this package, each loaded when it is first used."""

EXTRAS = {"oci": "install statepool[oci]", "s3": "install statepool[s3]"}
"""Known schemes without a built-in transport, and how the user can get one."""


def open_transport(location: Location, settings: Settings | None = None) -> Transport:
    """
    :param location: the address of a pool
    :param settings: the settings; the defaults if not given
    :returns: the transport for it. Nothing has been connected or looked at yet.
    :raises InvalidLocation: no transport for this scheme is installed
    """
    return transport_class(location.scheme).open(location, settings or Settings())


def transport_class(scheme: str) -> type[Transport]:
    """
    :param scheme: of a URL, in lower case
    :returns: the class of transports that is registered for it
    :raises InvalidLocation: there is none
    """
    if scheme in BUILT_IN:
        module, _, name = BUILT_IN[scheme].partition(":")
        found = getattr(importlib.import_module(module), name)
    else:
        found = _installed(scheme)
    if not (isinstance(found, type) and issubclass(found, Transport)):
        raise InvalidLocation(
            f"what is registered for {scheme}:// is not a transport: {found!r}",
            hint=(
                f"an entry point of the group {GROUP} must name a class derived from"
                " statepool.Transport"
            ),
        )
    return found


def _installed(scheme: str) -> object:
    from importlib import metadata  # imported only here: see above

    for entry in metadata.entry_points(group=GROUP, name=scheme):
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            raise InvalidLocation(
                f"the transport for {scheme}://, {entry.value}, cannot be loaded: {error}",
                hint="install it again",
            ) from error
    if scheme in EXTRAS:
        raise InvalidLocation(
            f"this installation has no transport for {scheme}://", hint=EXTRAS[scheme]
        )
    known = sorted({*BUILT_IN, *(entry.name for entry in metadata.entry_points(group=GROUP))})
    raise InvalidLocation(
        f"{scheme}:// is not known", hint="known are " + ", ".join(f"{name}://" for name in known)
    )
