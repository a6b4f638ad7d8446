"""The knobs, each with its default. Where their values come from is the business of ``statepool.config``."""

from __future__ import annotations

from attrs import field, frozen, validators


@frozen
class Settings:
    """
    :param fresh: for how long a source need not be asked again whether a machine's log has grown, in seconds
    :param offline: ask no source at all: use what the cache has
    :param min_free: bytes that a fetch leaves free in the cache's file system, evicting states that sources still have
    :param lock_timeout: how long to wait for another process that does the same work, in seconds
    :param max_depth: longest chain that is accepted, in states
    :param tool_timeout: how long one call of qemu-img may take, in seconds
    """

    fresh: float = field(default=60.0, validator=validators.ge(0))
    offline: bool = False
    min_free: int = field(default=0, validator=validators.ge(0))
    lock_timeout: float = field(default=3600.0, validator=validators.ge(0))
    max_depth: int = field(default=256, validator=validators.and_(validators.ge(1), validators.le(4096)))
    tool_timeout: float = field(default=60.0, validator=validators.gt(0))
