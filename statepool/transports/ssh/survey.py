"""
What a host offers to a pool, for ``statepool doctor``: what is slow or missing, and the remedy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

from statepool.model.outcomes import Finding, Level
from statepool.transports.ssh.carrier import CIPHERS
from statepool.transports.ssh.carriers import choose
from statepool.transports.ssh.connection import Connection
from statepool.transports.ssh.packets import FSYNC, HARDLINK, LIMITS, POSIX_RENAME, STATVFS
from statepool.transports.ssh.server import Server
from statepool.transports.ssh.shell import Shell

SLOW = 0.05
"""Round-trip time in seconds from which on it is reported."""

_QUESTIONS = 5

_LACKING = (
    (
        FSYNC,
        Level.WARNING,
        (
            "it cannot flush files: what is stored there may be lost in a power cut, and outcomes"
            " say so"
        ),
        "OpenSSH can since 6.5",
    ),
    (
        HARDLINK,
        Level.WARNING,
        "it makes no hard links: a record can be seen there, for a moment, before it is whole",
        "OpenSSH does since 5.7",
    ),
    (
        POSIX_RENAME,
        Level.NOTE,
        "it does not replace a file in one step: the old one is removed first",
        "OpenSSH does since 4.8",
    ),
    (
        STATVFS,
        Level.NOTE,
        (
            "it does not tell how much space is free: a full disk is noticed when nothing fits any"
            " more"
        ),
        "OpenSSH does since 5.1",
    ),
    (
        LIMITS,
        Level.NOTE,
        (
            "it does not tell how much it takes at once: 32 KiB at a time go there and back, which"
            " is slow"
        ),
        "OpenSSH does since 8.5",
    ),
)
"""
Extensions of SFTP, the consequence of a missing one, and the version since which OpenSSH has it
(its release notes).
"""


def survey(
    where: str, connection: Connection, server: Server, shell: Shell, ask: Callable[[], object]
) -> Iterator[Finding]:
    """
    :param where: the location of the pool
    :param connection: to the host
    :param server: the known features of its SFTP server
    :param shell: of the account
    :param ask: sends one small request to it, and waits for the answer
    :returns: the findings
    """
    yield from _link(where, connection, ask)
    yield from _files(where, server)
    yield from _shell(where, shell)


def _link(where: str, connection: Connection, ask: Callable[[], object]) -> Iterator[Finding]:
    facts = connection.carrier.facts
    yield Finding(Level.OK, where, f"{facts.server}, with {facts.cipher}")
    name, why = choose(connection.settings)
    yield Finding(Level.OK, where, f"{name} carries SSH: {why}")
    if facts.cipher not in CIPHERS[:2]:
        cure = f"add {CIPHERS[0]} to Ciphers in its sshd_config(5)"
        yield Finding(Level.NOTE, where, f"{facts.cipher} is a slow cipher here", cure)
    seconds = _round_trip(ask)
    if seconds > SLOW:
        what = f"one question takes {seconds * 1000:.0f} ms there and back"
        yield Finding(
            Level.NOTE,
            where,
            what,
            "a pool that is nearer answers sooner: make it a source before this one",
        )


def _round_trip(ask: Callable[[], object]) -> float:
    """
    :returns: the median time of a few requests, in seconds: the first one may have had to connect
    """
    taken = []
    for _ in range(_QUESTIONS):
        begin = time.monotonic()
        ask()
        taken.append(time.monotonic() - begin)
    return statistics.median(taken)


def _files(where: str, server: Server) -> Iterator[Finding]:
    there = [name.partition(b"@")[0].decode() for name, *_ in _LACKING if server.has(name)]
    if there:
        yield Finding(Level.OK, where, f"SFTP has {', '.join(there)}")
    for name, level, what, cure in _LACKING:
        if not server.has(name):
            yield Finding(level, where, what, f"use a server with {name.decode()}; {cure}")


def _shell(where: str, shell: Shell) -> Iterator[Finding]:
    programs = shell.programs
    if not programs:
        what = (
            "the account has no shell: verify reads the bytes over the network, and locks of users"
            " of that host are not seen"
        )
        yield Finding(Level.NOTE, where, what, "none is needed; with one, both is done there")
        return
    hashing = {"b3sum"} & programs | {"blake3"} & shell.modules
    helpful = ", ".join(sorted(programs - {"sh"} | hashing))
    what = f"a shell with {helpful or 'none of the programs that could help'}"
    yield Finding(Level.OK, where, what)
    if "flock" not in programs:
        yield Finding(
            Level.NOTE,
            where,
            "no flock there: locks of users of that host are not seen",
            "install it there (Debian: util-linux)",
        )
    if not hashing:
        what = "nothing there makes BLAKE3 digests: verify reads the bytes over the network"
        yield Finding(Level.NOTE, where, what, "install b3sum there, or blake3 for its Python")
