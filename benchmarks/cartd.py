"""
Pacifica's Cartd, the peer of the service of carts: with its archive interface, Celery and Redis, as
its documentation describes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import frozen

from benchmarks.environments import Unavailable, install
from tests.support.sshd import free_port

VERSION = "0.7.0"
REQUIREMENTS = (
    f"pacifica-cartd=={VERSION}",
    "pacifica-archiveinterface==0.4.2",
    "peewee<4",  # Cartd uses what the version 4 does not have
    "redis",
    "packaging",  # kombu imports it for Redis
    "setuptools<81",
)

LIMIT = 120
"""Seconds in which a program must listen, and in which a cart must be ready."""

_ARCHIVE = """
[/]
request.dispatch: cherrypy.dispatch.MethodDispatcher()
"""

_CARTD = f"""
{_ARCHIVE}
tools.response_headers.on: True
tools.response_headers.headers: [('Content-Type', 'application/json')]
"""


@frozen
class Cartd:
    """
    Cartd that runs.

    :param url: of Cartd
    :param archive: of the archive interface
    """

    url: str
    archive: str


@contextlib.contextmanager
def run_cartd(place: Path, files: Path) -> Iterator[Cartd]:
    """
    Run Cartd with one worker for as long as a ``with`` block lasts: two workers on SQLite lock each
    other out.

    :param place: an empty directory
    :param files: the files of the archive, each named by its id
    :raises Unavailable: a part is not installed, or does not start
    """
    python = install(f"cartd {VERSION}", REQUIREMENTS)
    redis = shutil.which("redis-server")
    if redis is None:
        raise Unavailable("redis-server is not installed")
    names = ("archive.ini", "cartd.ini")
    for name, text in zip(names, (_ARCHIVE, _CARTD), strict=True):
        (place / name).write_text(text)
    ports = {name: free_port() for name in ("redis", "archive", "cartd")}
    broker = f"redis://127.0.0.1:{ports['redis']}"
    archive, url = (f"http://127.0.0.1:{ports[name]}" for name in ("archive", "cartd"))
    (place / "volume").mkdir()
    environment = {
        **os.environ,
        "VOLUME_PATH": f"{place}/volume/",
        "PEEWEE_URL": f"sqlite:///{place}/carts.sqlite",
        "ARCHIVE_INTERFACE_URL": f"{archive}/",
        "BROKER_URL": f"{broker}/0",
        "BACKEND_URL": f"{broker}/1",
        "CARTD_CPCONFIG": f"{place}/cartd.ini",
    }
    environment.pop("PYTHONPATH", None)
    binaries = python.parent

    with contextlib.ExitStack() as stack:

        def start(*command: str | Path) -> None:
            stack.enter_context(_running(place, environment, [str(word) for word in command]))

        start(redis, "--port", str(ports["redis"]), "--bind", "127.0.0.1", "--save", "")
        _await_port(ports["redis"])
        start(
            *(binaries / "pacifica-archiveinterface", "-a", "127.0.0.1", "--prefix", files),
            *("-p", str(ports["archive"]), "--cherrypy-config", place / "archive.ini"),
        )
        sync = [str(binaries / "pacifica-cartd-cmd"), "dbsync"]
        subprocess.run(sync, env=environment, cwd=place, check=True, capture_output=True)
        start(
            *(binaries / "pacifica-cartd", "-a", "127.0.0.1", "-p", str(ports["cartd"])),
            *("--cpconfig", place / "cartd.ini"),
        )
        start(binaries / "celery", "-A", "pacifica.cartd.tasks", "worker", "-P", "solo")
        for name in ("archive", "cartd"):
            _await_port(ports[name])
        yield Cartd(url, archive)


@contextlib.contextmanager
def _running(place: Path, environment: Mapping[str, str], command: list[str]) -> Iterator[None]:
    with (place / "log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def fill(url: str, uid: str, body: bytes) -> None:
    """
    Make a cart, and wait until it is ready.

    :param url: of the service, Cartd's or ours: the interface is the same
    :param body: the list
    :raises RuntimeError: it cannot be filled
    """
    headers = {"Content-Type": "application/json"}
    post = urllib.request.Request(f"{url}/{uid}", body, headers, method="POST")
    with urllib.request.urlopen(post, timeout=LIMIT) as answer:
        answer.read()
    head = urllib.request.Request(f"{url}/{uid}", method="HEAD")
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(head, timeout=LIMIT) as answer:
                status = answer.headers["X-Pacifica-Status"]
        except urllib.error.HTTPError as error:
            status = error.headers["X-Pacifica-Message"]
            raise RuntimeError(f"the cart {uid} cannot be filled: {status}") from error
        if status == "ready":
            return
        time.sleep(0.05)  # more often, and SQLite is locked for Cartd's worker, which dies of it
    raise RuntimeError(f"the cart {uid} is not ready after {LIMIT} s")


def _await_port(port: int) -> None:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise Unavailable(f"nothing listens on port {port}")
