"""Waits at the start for what the service cannot do without: its database, and its broker."""

from __future__ import annotations

from collections.abc import Callable

from statepool import TransportError
from statepool.carts.settings import ServeSettings


def wait_for(
    reach: Callable[[], None],
    settings: ServeSettings,
    wait: Callable[[float], object],
    tell: Callable[[str], None],
) -> None:
    """
    Wait until something can be reached, as long as the settings say.

    :param reach: reaches it, or raises TransportError
    :param wait: waits for so many seconds
    :param tell: is given what there is to say to a person
    :raises TransportError: it never could be reached
    """
    for attempt in range(1, settings.connect_attempts + 1):
        try:
            return reach()
        except TransportError as error:
            if attempt == settings.connect_attempts:
                raise
            tell(
                f"{error.message}; waiting {settings.connect_wait:g} s"
                f" (attempt {attempt} of {settings.connect_attempts})"
            )
            wait(settings.connect_wait)
    return None
