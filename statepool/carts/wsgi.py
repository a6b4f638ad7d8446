"""
The service for servers such as gunicorn: ``gunicorn statepool.carts.wsgi``.

The settings are those of ``statepool serve`` without options; ``STATEPOOL_CONFIG`` names their
file. Every client needs a token or has to come through a trusted proxy, since the listening address
is not known here. The service starts with the first request, in the process that serves it.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import Any

from statepool import Config
from statepool.carts.server import make_application, make_runner
from statepool.carts.service import log, open_service
from statepool.carts.settings import from_layers

_lock = threading.Lock()
_made: list[Callable[..., Any]] = []


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    """Answer a request as a WSGI application."""
    with _lock:
        if not _made:
            config = Config.load()
            service = open_service(from_layers(config.serve), config)
            runner = make_runner(service, log.warning)
            _made.append(make_application(service, runner, open_here=False))
            runner.start()
            atexit.register(runner.stop, 10.0)
    return _made[0](environ, start_response)
