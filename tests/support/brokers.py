"""Real brokers of Celery on free ports of loopback, with all that they write in one directory."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from attrs import define, field

from tests.support.carts import LIMIT, until
from tests.support.sshd import free_port

_RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""Debian's program in the path starts this one as the account of its system service."""


@define(eq=False)
class Broker:
    """
    A broker, which forgets all messages when it is stopped.

    :param name: ``redis`` or ``rabbitmq``
    """

    name: str
    directory: Path = field(init=False)
    url: str = field(init=False)
    _port: int = field(init=False)
    _processes: list[subprocess.Popen[bytes]] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self._port = free_port()
        scheme, path = {"redis": ("redis", "/0"), "rabbitmq": ("amqp", "//")}[self.name]
        self.url = f"{scheme}://127.0.0.1:{self._port}{path}"

    def start(self) -> None:
        """Start it, and wait until it can be used."""
        if self.name == "redis":
            where = ["--port", str(self._port), "--bind", "127.0.0.1"]
            self._run(["redis-server", *where, "--save", "", "--dir", str(self.directory)])
            until(lambda: "Ready to accept connections" in self._said())
        else:
            self._start_rabbitmq()
            until(lambda: "Server startup complete" in self._said())

    def _start_rabbitmq(self) -> None:
        place, names = self.directory, free_port()
        environment = {
            "HOME": str(place),  # for the cookie
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(names),
            "RABBITMQ_ALLOW_INPUT": "1",  # the program is Erlang then, not a shell that waits
            "RABBITMQ_CONFIG_FILE": str(place / "none"),
            "RABBITMQ_CONF_ENV_FILE": str(place / "none"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(place / "plugins"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_LOG_BASE": str(place),
            "RABBITMQ_MNESIA_BASE": str(place / "data"),
            "RABBITMQ_NODENAME": f"carts{os.getpid()}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_PID_FILE": str(place / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        # One of its own: Erlang would start one that outlives it, and listens everywhere.
        self._run(["epmd", "-address", "127.0.0.1", "-port", str(names)])
        until(lambda: _listens(names))
        self._run([str(_RABBITMQ), "-noinput"], environment)

    def _run(self, command: list[str], more: dict[str, str] | None = None) -> None:
        with (self.directory / "log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.directory,
                    env={**os.environ, **(more or {})},
                    start_new_session=True,
                )
            )

    def _said(self) -> str:
        said = (self.directory / "log").read_text(errors="replace")
        assert all(process.poll() is None for process in self._processes), said
        return said

    def stop(self) -> None:
        """Kill it."""
        for process in reversed(self._processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(LIMIT)
        self._processes.clear()
        (self.directory / "log").unlink(missing_ok=True)
        shutil.rmtree(self.directory / "data", ignore_errors=True)

    def remove(self) -> None:
        """Kill it, if it runs, and remove what it wrote."""
        self.stop()
        shutil.rmtree(self.directory)


def missing(name: str) -> str:
    """:returns: why there can be no such broker, if there is a reason"""
    program = "redis-server" if name == "redis" else str(_RABBITMQ)
    return f"{name} is not installed (Debian: {name}-server)" if not shutil.which(program) else ""


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
