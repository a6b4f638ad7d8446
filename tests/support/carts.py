"""The service of carts as a process of its own, real curl, and archives that misbehave."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

ROOT = Path(__file__).resolve().parents[2]

LIMIT = 120
"""Seconds that anything may take here; one that takes longer hangs."""


@frozen
class Answer:
    """What curl was answered: the headers with small letters in their names."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@define(eq=False)
class CartServer:
    """``statepool serve`` with a directory of its own. Made by :func:`run_server`."""

    directory: Path
    environment: Mapping[str, str]
    arguments: tuple[str, ...]
    url: str = ""
    log: Path = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> CartServer:
        """Start it, and wait until it listens; or until it has ended."""
        self.launch()
        return self.listen()

    def launch(self, *command: str) -> None:
        """
        Start it, and do not wait.

        :param command: another program that serves carts
        """
        self.log = self.directory / f"log.{len(list(self.directory.glob('log.*')))}"
        serve = (sys.executable, "-m", "statepool", "serve", "--port", "0", *self.arguments)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command or serve,
                cwd=self.directory,
                env=self._environment,
                stderr=log,
            )

    def listen(self) -> CartServer:
        """Wait until it listens."""
        self.url = until(self._listening)
        return self

    @property
    def _environment(self) -> dict[str, str]:
        """The environment without settings of the user."""
        known = dict(os.environ)
        for name in [name for name in known if name.startswith("STATEPOOL_")]:
            del known[name]
        home = str(self.directory)
        paths = os.pathsep.join([str(ROOT), str(ROOT / "plugins")])
        known |= {"HOME": home, "XDG_CONFIG_DIRS": f"{home}/none", "PYTHONPATH": paths}
        return {**known, "XDG_CONFIG_HOME": f"{home}/none", **self.environment}

    def _listening(self) -> str:
        said = self.said()
        assert self.process.poll() is None, f"the server ended:\n{said}"
        found = re.search(r"(?:serving carts|Listening) at:? (\S+?)/?(?: |$)", said, re.MULTILINE)
        return found[1] if found else ""

    def said(self) -> str:
        """:returns: its log"""
        return self.log.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """:returns: the exit code, after this signal"""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(LIMIT)

    def curl(self, *arguments: str | Path, path: str = "") -> Answer:
        """Ask by the real curl. :returns: the last answer"""
        program = shutil.which("curl")
        assert program is not None
        command = [program, "-sS", "-i", "--path-as-is", "--max-time", str(LIMIT)]
        command += [*map(str, arguments), f"{self.url}{path}"]
        done = subprocess.run(command, cwd=self.directory, capture_output=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr.decode()}"
        return parse_answer(done.stdout)

    def post(self, uid: str, *entries: Mapping[str, object], **more: object) -> Answer:
        """Make a cart."""
        return self.post_raw(uid, json.dumps({"fileids": list(entries), **more}).encode())

    def post_raw(self, uid: str, body: bytes, *arguments: str) -> Answer:
        """The same, with any body."""
        file = self.directory / "body.json"
        file.write_bytes(body)
        return self.curl("-X", "POST", "--upload-file", file, *arguments, path=f"/{uid}")

    def status(self, uid: str) -> dict[str, Any]:
        """:returns: how far a cart is"""
        status: dict[str, Any] = self.curl(path=f"/{uid}/status").json
        return status

    def settled(self, uid: str) -> dict[str, Any]:
        """:returns: what there is to say of a cart once nothing more happens to it"""

        def look() -> dict[str, Any] | None:
            status = self.status(uid)
            return status if status["status"] in ("ready", "error") else None

        settled: dict[str, Any] = until(look)
        return settled

    def download(self, uid: str, *arguments: str) -> bytes:
        """:returns: the tar of a cart that is ready"""
        answer = self.curl(*arguments, path=f"/{uid}")
        assert answer.status == 200, answer
        return answer.body


def parse_answer(raw: bytes) -> Answer:
    """:returns: the last of the answers that curl printed with their headers"""
    while True:
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split()[1])
        if status >= 200:
            break
    pairs = (line.partition(":") for line in lines)
    return Answer(status, {name.lower(): value.strip() for name, _, value in pairs}, raw)


def until(look: Any) -> Any:
    """:returns: what ``look`` returned, once it is something"""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError(f"nothing came within {LIMIT} seconds")


@contextlib.contextmanager
def run_server(
    directory: Path,
    *arguments: str,
    settings: str = "",
    environment: Mapping[str, str] = {},
) -> Iterator[CartServer]:
    """
    Run the service for as long as a ``with`` block lasts.

    :param settings: of ``[serve]``, beyond where it is; what stands before them is of the pools
    """
    pools, _, own = settings.rpartition("[serve]")
    known = {"directory": '"carts"', "pause": "0", "poll": "0.05"}
    lines = [f"{key} = {value}" for key, value in known.items() if f"{key} =" not in own]
    text = "\n".join([pools, "[serve]", *lines, own])
    (directory / "statepool.toml").write_text(text)
    server = CartServer(directory, environment, arguments).start()
    try:
        yield server
    finally:
        server.stop()


@define(eq=False)
class FakeInterface:
    """
    Pacifica's archive interface, as far as carts use it, with faults on demand.

    :param files: the bytes of each file by its id
    """

    files: dict[str, bytes]
    url: str = ""
    asked: list[str] = field(factory=list)
    far: set[str] = field(factory=set)
    """Files that are still on tape."""
    sizes: dict[str, str] = field(factory=dict)
    """What is said of sizes, where it is not true."""
    broken: set[str] = field(factory=set)
    """Files that are there, and cannot be sent."""
    failures: dict[str, int] = field(factory=dict)
    """How many more times a file is answered by 500."""
    gate: threading.Event = field(factory=threading.Event)
    """Held back are all bytes but the first ones until this is set."""

    def __attrs_post_init__(self) -> None:
        self.gate.set()


@contextlib.contextmanager
def run_interface(files: Mapping[str, bytes]) -> Iterator[FakeInterface]:
    """Run an archive interface on a free port of loopback for as long as a ``with`` block lasts."""
    fake = FakeInterface(dict(files))

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            name = self.path.lstrip("/")
            fake.asked.append(f"{self.command} {name}")
            if self.command == "GET" and name in fake.broken:
                self.send_error(503)
                return
            if fake.failures.get(name, 0):
                fake.failures[name] -= 1
                self.send_error(500)
                return
            if name not in fake.files:
                self.send_error(404)
                return
            data = fake.files[name]
            self.send_response(200 if self.command == "GET" else 204)
            size = fake.sizes.get(name, str(len(data)))
            self.send_header("X-Content-Length", size)
            self.send_header("Last-Modified", "1500000000.25")
            self.send_header("X-Pacifica-Ctime", "1500000000.5")
            level = 0 if name in fake.far else len(data)
            self.send_header("X-Pacifica-Bytes-Per-Level", f"({level}, {len(data)})")
            self.send_header("X-Pacifica-File-Storage-Media", "tape" if level == 0 else "disk")
            if self.command == "GET":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                half = len(data) // 2
                with contextlib.suppress(OSError):  # the service has gone
                    self.wfile.write(data[:half])
                    self.wfile.flush()
                    fake.gate.wait(LIMIT)
                    self.wfile.write(data[half:])

        do_GET = do_HEAD = do_POST = _answer  # noqa: N815 - so it wants them called

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        fake.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


@define(eq=False)
class Wire:
    """
    What lies between a client and a service: each connection is one question and its answer.

    :param target: the port of the service
    """

    target: int
    url: str = ""
    asked: list[str] = field(factory=list)
    """The head of each question."""
    cuts: list[int] = field(factory=list)
    """Of answers with a tar, after how many bytes they are cut off: one each."""
    replaced: dict[bytes, bytes] = field(factory=dict)
    """What is changed in all answers."""


@contextlib.contextmanager
def run_wire(server: CartServer) -> Iterator[Wire]:
    """Lie between clients and a service for as long as a ``with`` block lasts."""
    wire = Wire(int(server.url.rpartition(":")[2]))

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            lines = [self.rfile.readline()]
            while lines[-1].strip():
                lines.append(self.rfile.readline())
            head = b"".join(lines)
            wire.asked.append(head.decode())
            length = [line for line in lines if line.lower().startswith(b"content-length:")]
            body = self.rfile.read(int(length[0].split()[1])) if length else b""
            with socket.create_connection(("127.0.0.1", wire.target), LIMIT) as there:
                there.sendall(head + body)
                answer = b"".join(iter(lambda: there.recv(1 << 16), b""))
            for old, new in wire.replaced.items():
                answer = answer.replace(old, new)
            if b"octet-stream" in answer[:4096] and wire.cuts:
                answer = answer[: wire.cuts.pop(0)]
            with contextlib.suppress(OSError):  # the client has gone
                self.wfile.write(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as proxy:
        proxy.daemon_threads = True
        wire.url = f"http://127.0.0.1:{proxy.server_address[1]}"
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield wire
        finally:
            proxy.shutdown()
            thread.join()
