"""
Carts: filled and sent by the service and by Pacifica's Cartd, from one archive; and a file sent by
the service and by nginx.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench import IMAGE, MIB, STATES, Bench, room, run
from benchmarks.cartd import LIMIT, VERSION, Cartd, fill, run_cartd
from benchmarks.environments import Unavailable
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, Work, rounds, timed
from tests.support.carts import CartServer, run_server, until
from tests.support.sshd import free_port

LARGE, SMALL = 20, 1000
"""Files of the two carts."""

CLIENTS = 20
"""Downloads at the same time."""

SLOW = 200
"""Downloads at the same time by clients that take next to nothing."""

MEMORY = 150 * MIB
"""The most bytes of resident memory of the service."""

MANY = 20
"""Carts of one state."""

SHARED = 1.1
"""What these may take at most, relative to one cart."""

HALF = Limit(Unit.RATIO, 0.5)
FOUR_FIFTHS = Limit(Unit.RATIO, 0.8)
FIFTH = Limit(Unit.RATIO, 0.2)
NEARLY = Limit(Unit.RATIO, 1 / 0.9)
"""The promised times and rates, each as the largest ratio of our time to the peer's."""

_NGINX = """
daemon off; pid {place}/pid; error_log {place}/error.log; worker_processes 2;
events {{ worker_connections 1000; }}
http {{
    sendfile on; access_log off;
    client_body_temp_path {place}/t1; proxy_temp_path {place}/t2; fastcgi_temp_path {place}/t3;
    uwsgi_temp_path {place}/t4; scgi_temp_path {place}/t5;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def table(bench: Bench) -> Table:
    """:returns: the cost of carts"""
    title = "carts: from an archive interface, over HTTP"
    with bench.directory() as place:
        files = place / "archive"
        files.mkdir()
        large = _entries(files, "large", LARGE, bench.scale.root // LARGE)
        small = _entries(files, "small", SMALL if bench.scale.pairs > 1 else 10, 4096)
        (place / "cartd").mkdir()
        try:
            with run_cartd(place / "cartd", files) as cartd:
                return _measured(title, bench, place, cartd, large, small)
        except Unavailable as error:
            return Table(title, notes=[f"Not measured: {error}."])


def _entries(files: Path, name: str, count: int, size: int) -> bytes:
    """
    Make files of an archive.

    :returns: the list of a cart with all of them
    """
    entries = []
    for number in range(count):
        data = os.urandom(size)
        (files / f"{name}-{number}").write_bytes(data)
        entries.append(
            {
                "id": f"{name}-{number}",
                "path": f"{name}/{number}.bin",
                "hashtype": "sha1",
                "hashsum": hashlib.sha1(data, usedforsecurity=False).hexdigest(),
            }
        )
    return json.dumps({"fileids": entries, "bundle": True}).encode()


def _measured(
    title: str, bench: Bench, place: Path, cartd: Cartd, large: bytes, small: bytes
) -> Table:
    (place / "ours").mkdir()
    settings = (
        "[serve]\n"
        'archive = "theirs"\n'
        f'archives.theirs = {{ type = "interface", url = "{cartd.archive}/" }}\n'
        'workers = 1\nmax-body = "64 Mb"\n'
    )
    numbers = itertools.count()
    pairs = max(1, bench.scale.pairs // 2)
    with run_server(place / "ours", settings=settings) as server:

        def filled(url: str, body: bytes) -> Work:
            return lambda: timed(lambda: fill(url, f"cart-{next(numbers)}", body))

        figures = []
        for what, body, limit in (
            (f"a cart of {LARGE} files from POST to ready", large, HALF),
            (f"a cart of {SMALL} files of 4 KiB from POST to ready", small, FIFTH),
        ):
            ours, theirs = rounds([filled(server.url, body), filled(cartd.url, body)], pairs)
            figures.append(Figure(what, f"cartd {VERSION}", ours, theirs, limit))

        for url in (server.url, cartd.url):
            fill(url, "sent", large)
        ours, theirs = rounds([_sent(server.url), _sent(cartd.url)], bench.scale.pairs)
        figures.append(
            Figure(f"download of {LARGE} files", f"cartd {VERSION}", ours, theirs, FOUR_FIFTHS)
        )
        facts = [_same_tar(place, server.url, cartd.url), _memory(server), *_of_one(bench, place)]
        notes = ["All hash each file by SHA-1. One worker each; Cartd's database locks with two."]
        if shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None:
            notes.append("nginx is not installed: nothing was compared with it.")
        else:
            figures += _beside_nginx(bench, place, server)
    return Table(title, figures, facts, notes=notes)


def _sent(url: str, name: str = "sent") -> Work:
    command = ["curl", "-sS", "-f", "-o", os.devnull, f"{url}/{name}"]
    return lambda: timed(lambda: run(*command))


def _same_tar(place: Path, *urls: str) -> Fact:
    def content(url: str) -> dict[str, str]:
        run("curl", "-sS", "-f", "-o", str(place / "tar"), f"{url}/sent")
        with tarfile.open(place / "tar") as tar:
            found = {}
            for member in tar:
                data = tar.extractfile(member) if member.isfile() else None
                if data is not None:
                    found[member.name] = hashlib.file_digest(data, "sha256").hexdigest()
        (place / "tar").unlink()
        return found

    ours, theirs = (content(url) for url in urls)
    return Fact(
        "files of the tar, and those that differ from Cartd's",
        f"{len(ours)}, {len(ours.items() ^ theirs.items())}",
        f"{len(theirs)}, 0",
        ours == theirs,
    )


def _memory(server: CartServer) -> Fact:
    """Return the peak memory of the service while clients wait for bytes that they do not take."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(SLOW):
            client = stack.enter_context(socket.create_connection((host, int(port)), LIMIT))
            client.sendall(f"GET /sent HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            client.recv(1)
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
    return Fact(
        f"memory while {SLOW} clients download slowly, in MiB",
        f"{peak / MIB:.0f}",
        f"at most {MEMORY // MIB}",
        peak <= MEMORY,
    )


def _of_one(bench: Bench, place: Path) -> list[Fact]:
    """Return what many carts of one state read and take, relative to one of them."""
    bench.make_pool(place / "pool", depth=1)
    facts = []
    for what, export in (("one state", False), ("one export", True)):
        (read, taken), (read_by_many, taken_by_many) = (
            _filled_with(place, place / f"{what}-{count}", count, export=export)
            for count in (1, MANY)
        )
        ratios = [("disk of the service and its cache", taken_by_many / taken)]
        if not export:  # a shared export is hashed for each cart that gets it
            ratios.append(("bytes that the service reads and writes", read_by_many / read))
        for told, ratio in ratios:
            facts.append(
                Fact(
                    f"{told}: {MANY} carts of {what}, relative to one",
                    f"{ratio:.2f}",
                    f"at most {SHARED}",
                    ratio <= SHARED,
                )
            )
    return facts


def _filled_with(place: Path, directory: Path, count: int, *, export: bool) -> tuple[int, int]:
    """
    Fill carts with one state, all at once.

    :returns: bytes that the service has read and written, and those that it and its cache take
    """
    directory.mkdir()
    settings = f'cache = "cache"\nsources = ["{place}/pool"]\n[serve]\nmax-carts = {2 * count}\n'
    state = {"id": f"{IMAGE}/{STATES[0]}", "path": "state", "export": export}
    body = json.dumps({"fileids": [state], "bundle": False}).encode()
    with run_server(directory, settings=settings) as server:
        for number in range(count):
            server.post_raw(f"cart-{number}", body)
        for number in range(count):
            status = server.settled(f"cart-{number}")
            if status["status"] != "ready":
                raise RuntimeError(f"a cart cannot be filled: {status['error']}")
        counters = Path(f"/proc/{server.process.pid}/io").read_text().split()
        moved = int(counters[counters.index("rchar:") + 1])
        moved += int(counters[counters.index("wchar:") + 1])
    return moved, room(directory)


def _beside_nginx(bench: Bench, place: Path, server: CartServer) -> list[Figure]:
    (place / "nginx").mkdir()
    run("curl", "-sS", "-f", "-o", str(place / "nginx/sent"), f"{server.url}/sent")
    with _nginx(place / "nginx") as url:
        ours, theirs = rounds([_sent(server.url), _sent(url)], bench.scale.pairs)
        figures = [Figure("download by one client", "nginx, sendfile", ours, theirs, NEARLY)]
        ours, theirs = rounds(
            [_together(server.url), _together(url)], max(1, bench.scale.pairs // 3)
        )
        what = f"download by {CLIENTS} clients at once"
        return [*figures, Figure(what, "nginx, sendfile", ours, theirs, NEARLY)]


def _together(url: str) -> Work:
    command = ["curl", "-sS", "-f", "-o", os.devnull, f"{url}/sent"]

    def work() -> None:
        clients = [subprocess.Popen(command) for _ in range(CLIENTS)]
        codes = [client.wait() for client in clients]
        if any(codes):
            raise RuntimeError(f"a download from {url} failed")

    return lambda: timed(work)


@contextlib.contextmanager
def _nginx(place: Path) -> Iterator[str]:
    port = free_port()
    text = _NGINX.format(place=place, port=port, root=place)
    place.chmod(0o755)
    (place / "nginx.conf").write_text(f"user root;{text}" if os.geteuid() == 0 else text)
    command = ["nginx", "-c", str(place / "nginx.conf"), "-e", str(place / "error.log")]
    path = f"{os.environ['PATH']}:/usr/sbin"
    process = subprocess.Popen(command, env={**os.environ, "PATH": path})
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: _answers(f"{url}/sent"))
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    done = subprocess.run(["curl", "-s", "-f", "-I", "-o", os.devnull, url], check=False)
    return done.returncode == 0
