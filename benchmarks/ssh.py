"""
A pool on another host, over SSH on loopback: both ends use the same processors, for this library
and for the peers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

import statepool
from benchmarks.bench import IMAGE, Bench, run
from benchmarks.measure import Figure, Limit, Table, Unit, Work, rounds, timed
from statepool.model.settings import Settings
from tests.support.sshd import Sshd, run_sshd, sshd_program

MEMBERS = 8
"""Images of the chain; together they have the size of the single image."""

STATE = "s0"

AS_FAST = Limit(Unit.RATIO, 1 / 0.95)
TWICE = Limit(Unit.RATIO, 1 / 2)
MEMBERS_FASTER = Limit(Unit.RATIO, 1 / 1.1)
NOT_SLOWER = Limit(Unit.RATIO, 1.0)
FIVE_TIMES = Limit(Unit.RATIO, 1 / 5)
"""The promised rates, each as the largest ratio of our time to the peer's."""


@frozen
class Remote:
    """
    A server, and the directory in which it and this process work.

    :param bench: the directory
    :param server: the server on loopback
    """

    bench: Bench
    server: Sshd

    @property
    def settings(self) -> Settings:
        """The settings without compression, like scp."""
        return self.server.settings(compress="off", fresh=0.0)

    def forget(self) -> None:
        """Close the connection, so that the next run connects again, like scp."""
        from statepool.transports.ssh.connection import connection_to

        connection_to(self.server.location("/"), self.settings).close()

    def get(self, pool: Path, tip: str = STATE) -> Work:
        """:returns: a get into an empty cache, every byte checked"""

        def work() -> float:
            self.forget()
            with self.bench.directory() as place:
                sources = [str(self.server.location(pool))]
                return timed(
                    lambda: (
                        statepool.StatePool(
                            cache=place / "cache", sources=sources, settings=self.settings
                        )
                        .image(IMAGE)
                        .get(tip)
                    )
                )

        return work

    def scp(self, files: str) -> Work:
        """
        :returns: scp of the same files with its default settings; on one connection, since they are
            one pattern
        """

        def work() -> float:
            with self.bench.directory() as place:
                config = ("-F", str(self.server.ssh_config))
                return timed(lambda: run("scp", "-q", *config, f"store:{files}", str(place)))

        return work

    def client(self, path: str) -> Work:
        """:returns: a download by paramiko's own client with its default settings"""

        def work() -> float:
            import paramiko

            with self.bench.directory() as place:

                def get() -> None:
                    transport = paramiko.Transport(("127.0.0.1", self.server.port))
                    try:
                        transport.connect(
                            username=self.server.user,
                            pkey=paramiko.Ed25519Key.from_private_key_file(
                                str(self.server.identity)
                            ),
                        )
                        client = paramiko.SFTPClient.from_transport(transport)
                        assert client is not None
                        client.get(path, str(place / "copy"))
                    finally:
                        transport.close()

                return timed(get)

        return work

    def set(self, master: Path) -> Work:
        """
        :returns: a set of a flushed image in the remote pool; it is in the cache already, so that
            only the remote pool is measured
        """

        def work() -> float:
            with self.bench.directory() as place:
                pool = place / "pool"
                statepool.init(pool)
                shutil.copytree(master, place / "cache", symlinks=True, copy_function=os.link)
                self.forget()
                os.sync()
                sources = [str(self.server.location(pool))]
                state_pool = statepool.StatePool(
                    cache=place / "cache", sources=sources, settings=self.settings
                )
                with _working(state_pool, place) as working:
                    return timed(
                        lambda: _complete(state_pool.image(IMAGE).set(STATE, source=working))
                    )

        return work

    def scp_and_sync(self, path: str) -> Work:
        """:returns: scp in the other direction, and sync on the server"""

        def work() -> float:
            with self.bench.directory() as place:
                config = ("-F", str(self.server.ssh_config))

                def put() -> None:
                    run("scp", "-q", *config, path, f"store:{place}/copy")
                    run("ssh", *config, "store", f"sync {place}/copy")

                return timed(put)

        return work


@contextlib.contextmanager
def _working(pool: statepool.StatePool, place: Path) -> Iterator[Path]:
    """
    :returns: a working image to which nothing was written: setting its state again stores it in
        sources that lack it
    """
    pool.image(IMAGE).get(STATE, to=place / "working.qcow2")
    yield place / "working.qcow2"


def _complete(stored: statepool.SetResult) -> None:
    if not stored.complete:
        raise RuntimeError(f"the state was not stored: {stored.pools}")


def table(bench: Bench) -> Table:
    """:returns: the cost of a pool on another host"""
    if sshd_program() is None or shutil.which("scp") is None:
        return Table(
            "ssh: a pool on another host", notes=["Not measured: sshd or scp is not installed."]
        )
    with run_sshd() as server:
        figures = _figures(Remote(bench, server))
    notes = [
        (
            "All connect anew each time. `scp` and `SFTPClient.get` are as they come: they choose"
            " their ciphers, and check nothing but the link."
        ),
        f"Server and scp: {_version()}.",
    ]
    return Table("ssh: a pool on another host, over SFTP on loopback", figures, notes=notes)


def _figures(remote: Remote) -> list[Figure]:
    bench = remote.bench
    single = bench.make_pool(bench.place / "ssh-single", depth=1)
    path = _file(single)
    ours, scp, client = rounds(
        [remote.get(single), remote.scp(path), remote.client(path)], bench.scale.pairs
    )
    what = "cold get of one image"
    figures = [
        Figure(what, "scp", ours, scp, AS_FAST),
        Figure(what, "SFTPClient.get", ours, client, TWICE),
    ]

    names = [f"m{number}" for number in range(MEMBERS)]
    chain = _chain(bench, bench.place / "ssh-chain", names)
    ours, scp = rounds(
        [remote.get(chain, names[-1]), remote.scp(f"{chain / IMAGE}/*.qcow2")], bench.scale.pairs
    )
    figures.append(
        Figure(
            f"cold get of a chain of {MEMBERS}, together as long",
            "scp of the same files",
            ours,
            scp,
            MEMBERS_FASTER,
        )
    )

    master = bench.place / "ssh-master"
    statepool.StatePool(cache=master, sources=[single]).image(IMAGE).get(STATE)
    ours, scp = rounds([remote.set(master), remote.scp_and_sync(path)], bench.scale.pairs)
    figures.append(
        Figure("storing one image there, durable", "scp there, and sync", ours, scp, NOT_SLOWER)
    )

    sparse = _sparse(bench, bench.place / "ssh-sparse")
    ours, scp = rounds([remote.get(sparse), remote.scp(_file(sparse))], bench.scale.pairs)
    figures.append(
        Figure(
            "cold get of an image of that length, nine tenths holes", "scp", ours, scp, FIVE_TIMES
        )
    )
    return figures


def _file(pool: Path) -> str:
    return str(pool / IMAGE / f"{STATE}.qcow2")


def _chain(bench: Bench, pool: Path, names: list[str]) -> Path:
    directory = pool / IMAGE
    directory.mkdir(parents=True)
    part = bench.scale.root // len(names)
    for number, name in enumerate(names):
        backing = ("-b", f"{names[number - 1]}.qcow2", "-F", "qcow2") if number else ()
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            *backing,
            f"{name}.qcow2",
            str(bench.scale.virtual),
            cwd=directory,
        )
        bench.write(directory / f"{name}.qcow2", number * part, part)
    return bench.adopt(pool, len(names))


def _sparse(bench: Bench, pool: Path) -> Path:
    path = pool / IMAGE / f"{STATE}.qcow2"
    path.parent.mkdir(parents=True)
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=metadata",
        str(path),
        str(bench.scale.root),
    )
    for number in range(10):
        bench.write(path, number * (bench.scale.root // 10), bench.scale.root // 100)
    return bench.adopt(pool, 1)


def _version() -> str:
    return subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr.strip()
