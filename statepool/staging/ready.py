"""Peers that are not ready to be staged."""

from __future__ import annotations

from statepool.errors import NotFound, TransportError
from statepool.staging.settings import Peer


class NotReady(NotFound):
    """A peer has not been collected, as far as its indicator tells, or cannot be looked at."""


def unreachable(peer: Peer, error: TransportError) -> NotReady:
    """
    :param error: what happened when it was looked at
    :returns: the error for the peer, with the exit code of its cause
    """
    found = NotReady(
        f"the peer {peer.name} cannot be looked at: {error.message}",
        hint=error.hint,
        pool=str(peer.location),
    )
    found.exit_code = error.exit_code
    return found
