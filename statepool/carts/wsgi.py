"""
The service for servers such as gunicorn: ``gunicorn statepool.carts.wsgi``.

The settings are those of ``statepool serve`` without options; ``STATEPOOL_CONFIG`` names their
file. Every client needs a token or has to come through a trusted proxy, since the listening address
is not known here. The service starts with the first request, in the process that serves it.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from statepool import Config
from statepool.carts.rates import Rates
from statepool.carts.server import make_application, make_runner
from statepool.carts.service import Service, log, open_service
from statepool.carts.settings import from_layers

_SOCKET = "gunicorn.socket"
"""The connection of a request, as gunicorn passes it on (``gunicorn/http/wsgi.py``)."""

Application = Callable[[dict[str, Any], Callable[..., Any]], Any]

_lock = threading.Lock()
_made: list[Application] = []


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    """Answer a request as a WSGI application."""
    with _lock:
        if not _made:
            # Does nothing if the server has set up logging itself. Else warnings would be lost.
            logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
            config = Config.load()
            service = open_service(from_layers(config.serve), config)
            runner = make_runner(service, log.warning)
            made = make_application(service, runner, open_here=False)
            _made.append(_with_rates(made, service, passes_on=_SOCKET in environ))
            runner.start()
            atexit.register(runner.stop, 10.0)
    return _made[0](environ, start_response)


def _with_rates(made: Application, service: Service, *, passes_on: bool) -> Application:
    """:returns: the same application, which lets go of slow clients if the server permits it"""
    least = service.settings.least_rate
    if not least:
        return made
    if not passes_on:
        log.warning(
            "least-rate has no effect: this server does not pass on its connections, as gunicorn"
            " does; let a proxy in front of it set limits for slow clients"
        )
        return made
    rates = Rates(least, log.warning)

    def look() -> None:
        while not service.stopping.wait(1.0):
            rates.look(time.monotonic())

    threading.Thread(target=look, name="rates", daemon=True).start()
    return watched(made, rates)


def watched(made: Application, rates: Rates) -> Application:
    """:returns: the same application, whose answers are watched until the server closes them"""

    def answered(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        with ExitStack() as stack:
            client = f"{environ.get('REMOTE_ADDR')}"
            stack.enter_context(rates.watching(environ[_SOCKET], client))
            answer = made(environ, start_response)
            if hasattr(answer, "close"):
                stack.callback(answer.close)
            return _Watched(answer, stack.pop_all())

    return answered


class _Watched:
    def __init__(self, answer: Iterable[bytes], stack: ExitStack) -> None:
        self._answer, self._stack = answer, stack

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._answer)

    def close(self) -> None:
        """Close the answer; it is not watched any more."""
        self._stack.close()
