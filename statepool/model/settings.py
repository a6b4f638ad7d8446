"""The settings, each with its default. ``statepool.config`` reads their values."""

from __future__ import annotations

import enum

from attrs import field, frozen, validators

from statepool.model.secrets import Secrets

DEEPEST = 4096
"""The highest value of ``max-depth``, in states of a chain."""


class Compress(enum.StrEnum):
    """Whether bytes are compressed on their way to and from another host."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class CarrierName(enum.StrEnum):
    """The carrier for SSH."""

    AUTO = "auto"
    OPENSSH = "openssh"
    PARAMIKO = "paramiko"


@frozen
class Settings:
    """
    :param fresh: for how long a source need not be asked again whether a machine's log has grown,
        in seconds
    :param offline: ask no source at all: use what the cache has
    :param min_free: bytes that a fetch leaves free in the cache's file system, evicting states that
        sources still have
    :param lock_timeout: how long to wait for another process that does the same work, in seconds
    :param max_depth: longest chain that is accepted, in states
    :param tool_timeout: how long one call of qemu-img may take, in seconds
    :param probe_timeout: how long to wait for a source that does not answer while other sources do,
        in seconds
    :param timeout: how long another host may be silent while we wait for it, in seconds
    :param connect_timeout: how long it may take to connect to another host, from looking up its
        name to being logged in, in seconds
    :param retries: how often an operation is retried after a transient error, such as a lost
        connection
    :param retry_pause: how long to wait before the first retry, in seconds; twice as long before
        each further retry
    :param compress: whether bytes are compressed on the way to and from another host; ``auto``: if
        it is measured to be faster
    :param carrier: the carrier for SSH; ``auto``: the program ``ssh`` if it is installed, otherwise
        paramiko
    :param ssh_config: the configuration file of ssh to read; None: ``~/.ssh/config`` and
        ``/etc/ssh/ssh_config``
    :param known_hosts: the file with the keys of hosts; None: those that ssh uses
    :param secrets: the function that returns passwords and passphrases; None: there are none
    """

    fresh: float = field(default=60.0, validator=validators.ge(0))
    offline: bool = False
    min_free: int = field(default=0, validator=validators.ge(0))
    lock_timeout: float = field(default=3600.0, validator=validators.ge(0))
    max_depth: int = field(
        default=256, validator=validators.and_(validators.ge(1), validators.le(DEEPEST))
    )
    tool_timeout: float = field(default=60.0, validator=validators.gt(0))
    probe_timeout: float = field(default=2.0, validator=validators.gt(0))
    timeout: float = field(default=30.0, validator=validators.gt(0))
    connect_timeout: float = field(default=20.0, validator=validators.gt(0))
    retries: int = field(default=3, validator=validators.and_(validators.ge(0), validators.le(100)))
    retry_pause: float = field(default=0.5, validator=validators.ge(0))
    compress: Compress = field(default=Compress.AUTO, converter=Compress)
    carrier: CarrierName = field(default=CarrierName.AUTO, converter=CarrierName)
    ssh_config: str | None = None
    known_hosts: str | None = None
    secrets: Secrets | None = field(default=None, eq=False, repr=False)
