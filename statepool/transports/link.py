"""
``link://``: a pool in a file system of this host, to whose files a cache refers instead of copying
them.
"""

from __future__ import annotations

from statepool.transports.base import Capabilities
from statepool.transports.local import LocalTransport


class LinkTransport(LocalTransport):
    """A local pool to which a cache refers instead of copying from it."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(symlinks=True, durable=True, local=True, refers=True)
