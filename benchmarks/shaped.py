"""
Fetching an image over a link of 1 Gbit/s, compressed by zstd at both ends, and over two such links.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import frozen

from benchmarks.bench import IMAGE, MIB, STATES, Bench, chain_files, run
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, Work, against, timed
from tests.support.sshd import Sshd, run_sshd, sshd_program

RATE = "1gbit"

PROGRAMS = ("ip", "tc", "scp", "zstd")

FASTER = 1.5
"""The target throughput as a multiple of that of scp."""

TWO_MIRRORS = 0.6
"""The longest time from two mirrors, in relation to that from one."""

_GET = """
import json, sys, time
import statepool
from statepool.model.settings import Settings
cache, pools, image, state, config, known, compress = sys.argv[1:]
sources = json.loads(pools)
begin = time.perf_counter()
settings = Settings(ssh_config=config, known_hosts=known, compress=compress)
got = statepool.StatePool(cache=cache, sources=sources, settings=settings).image(image).get(state)
print(json.dumps([time.perf_counter() - begin, got.bytes]))
"""


@frozen
class Link:
    """
    A link with limited throughput.

    :param near: the name of the network namespace at its other end
    :param address: of this host in that namespace
    :param other: another address of this host, to which a link of its own leads
    """

    near: str
    address: str
    other: str

    def run(self, *command: str) -> list[str]:
        """:returns: the command line that runs a command in that namespace"""
        return ["ip", "netns", "exec", self.near, *command]


@contextlib.contextmanager
def shaped_link(rate: str = RATE) -> Iterator[Link]:
    """
    :param rate: in the notation of tc(8)
    :raises subprocess.CalledProcessError: this account, or this kernel, does not permit it
    """
    number = os.getpid()
    near = f"statepool-{number}"
    shape = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "20ms")
    quietly("ip", "netns", "add", near)
    addresses = []
    try:
        for which in range(2):
            here, there = f"sp{number}a{which}"[-15:], f"sp{number}b{which}"[-15:]
            # 198.18.0.0/15 is for benchmarks (RFC 2544).
            ours, theirs = (f"198.18.{number % 256}.{4 * which + end}" for end in (1, 2))
            quietly("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", near)
            quietly("ip", "addr", "add", f"{ours}/30", "dev", here)
            quietly("ip", "link", "set", here, "up")
            quietly("ip", "-n", near, "addr", "add", f"{theirs}/30", "dev", there)
            quietly("ip", "-n", near, "link", "set", there, "up")
            quietly("tc", "qdisc", "add", "dev", here, *shape)
            quietly("tc", "-n", near, "qdisc", "add", "dev", there, *shape)
            addresses.append(ours)
        yield Link(near, *addresses)
    finally:
        quietly("ip", "netns", "del", near)


def quietly(*command: str) -> None:
    """Run a program; its output is part of the error."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def table(bench: Bench) -> Table:
    """:returns: the gain by compression"""
    title = f"ssh: an image, half of which compresses well, over a link of {RATE}"
    missing = [program for program in PROGRAMS if shutil.which(program) is None] + (
        [] if sshd_program() else ["sshd"]
    )
    if missing:
        return Table(title, notes=[f"Not measured: install {', '.join(missing)}."])
    try:
        with shaped_link() as link, run_sshd(options={"ListenAddress": "0.0.0.0"}) as sshd:
            return _measured(title, bench, link, sshd)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode().strip()
        return Table(title, notes=[f"Not measured: no link could be made here ({error}: {said})."])


def _measured(title: str, bench: Bench, link: Link, sshd: Sshd) -> Table:
    pool = half_compressible(bench, sshd.directory / "pool")
    (image,) = chain_files(pool, 1)
    size = os.stat(image).st_size
    moved: dict[str, list[int]] = {}
    limit = Limit(Unit.RATIO, round(1 / FASTER, 3))
    figures = [
        _figure(bench, link, sshd, pool, image, how, moved, limit if how == "auto" else None)
        for how in ("auto", "on", "off")
    ]
    mirror = sshd.directory / "mirror"
    shutil.copytree(pool, mirror)
    figures.append(
        against(
            f"cold get from two mirrors, each with its own link of {RATE}, compress=off",
            get(bench, link, sshd, [pool, mirror], "off", []),
            "from one of them",
            get(bench, link, sshd, [pool], "off", []),
            bench.scale.pairs,
            Limit(Unit.RATIO, TWO_MIRRORS),
        )
    )
    part = max(moved["on"]) / size
    fact = Fact(
        "share of the image that was sent, with compress=on",
        f"{part:.2f}",
        "less than 0.6",
        part < 0.6,
    )
    return Table(title, figures, [fact])


def _figure(
    bench: Bench,
    link: Link,
    sshd: Sshd,
    pool: Path,
    image: str,
    how: str,
    moved: dict[str, list[int]],
    limit: Limit | None,
) -> Figure:
    ours = get(bench, link, sshd, [pool], how, moved.setdefault(how, []))
    return against(
        f"cold get, compress={how}",
        ours,
        "scp",
        scp(bench, link, sshd, image),
        bench.scale.pairs if limit else min(3, bench.scale.pairs),
        limit,
    )


def half_compressible(bench: Bench, pool: Path) -> Path:
    """:returns: a pool with one image in which every other cluster is text"""
    path = pool / IMAGE / f"{STATES[0]}.qcow2"
    path.parent.mkdir(parents=True)
    cluster = 64 << 10
    lines = b"".join(
        b"%08d kernel: [%6d.%06d] usb 1-%d: new device found\n"
        % (n, n // 9, n * 7919 % 10**6, n % 7)
        for n in range(20_000)
    )
    clusters = min(bench.scale.root, 32 * MIB) // cluster
    pattern = bench.place / "half"
    pattern.write_bytes(
        b"".join(
            (
                lines[n * 997 % 10**6 :][:cluster].ljust(cluster, b".")
                if n % 2
                else os.urandom(cluster)
            )
            for n in range(clusters)
        )
    )
    length = clusters * cluster
    commands = [
        f"write -q -s {pattern} {offset} {length}" for offset in range(0, bench.scale.root, length)
    ]
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(bench.scale.virtual))
    run(
        "qemu-io",
        "-f",
        "qcow2",
        *(word for command in commands for word in ("-c", command)),
        str(path),
    )
    return bench.adopt(pool, 1)


def get(
    bench: Bench, link: Link, sshd: Sshd, pools: Sequence[Path], how: str, moved: list[int]
) -> Work:
    """
    :returns: a get into an empty cache over the link, in a separate process: connecting is included
    """

    def work() -> float:
        with bench.directory() as place:
            sources = [
                f"ssh://{sshd.user}@{address}:{sshd.port}{pool}"
                for address, pool in zip((link.address, link.other), pools, strict=False)
            ]
            arguments = (
                str(place / "cache"),
                json.dumps(sources),
                IMAGE,
                STATES[0],
                str(sshd.ssh_config),
                str(sshd.known_hosts),
                how,
            )
            command = link.run(sys.executable, "-c", _GET, *arguments)
            done = subprocess.run(
                command, env=bench.environment, stdout=subprocess.PIPE, text=True, check=True
            )
            seconds, count = json.loads(done.stdout)
            moved.append(count)
            return float(seconds)

    return work


def scp(bench: Bench, link: Link, sshd: Sshd, image: str) -> Work:
    """:returns: a copy of the same file by scp"""

    def work() -> float:
        with bench.directory() as place:
            source = f"scp://{sshd.user}@{link.address}:{sshd.port}/{image}"
            return timed(
                lambda: run(
                    *link.run("scp", "-q", "-B", "-F", str(sshd.ssh_config), source, str(place))
                )
            )

    return work
