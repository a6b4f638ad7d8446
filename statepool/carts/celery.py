"""
Workers of Celery that fill carts: other processes, also on other hosts.

The database decides, and the broker only wakes workers. A message names a cart, and is valid while
the table of tasks has its id: each step of a cart writes a new id there, and deleting the cart
removes it. So a duplicate or late message does no harm. If a message was lost, the service sends it
again: it searches the database for carts that no worker fills.

``celery -A statepool.carts.celery worker`` starts a worker with the settings of wsgi.py.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attrs import evolve
from celery import Celery, signals
from kombu.exceptions import KombuError

from statepool import Config, StatePoolError, TransportError
from statepool.carts.database import Cart, CartTasks
from statepool.carts.runner import Runner
from statepool.carts.service import Service, log, open_service
from statepool.carts.settings import ServeSettings, from_layers, without_password
from statepool.carts.tasks import fill_cart, is_unfinished, sweep, unfinished_carts
from statepool.carts.waiting import wait_for

_QUEUE = "statepool-carts"
_TASK = "statepool.carts.fill"

_GRACE = 10
"""Seconds that tasks have to end when a worker stops."""

_AGAIN = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
"""A connection that the broker has closed meanwhile is made anew, once and at once."""


class Broker:
    """
    Where messages about carts go.

    :param settings: that name it
    """

    def __init__(self, settings: ServeSettings) -> None:
        assert settings.broker is not None
        self._shown = without_password(settings.broker)
        self._app = _configured(settings, None)  # a sender does not wait for results

    def send(self, cart_id: int, task: str, delay: float = 0) -> None:
        """
        Have a worker take the next step of a cart.

        :param task: the id that the table of tasks has for it
        :param delay: seconds until then
        :raises TransportError: the broker cannot be reached
        """
        with self._translated():
            self._app.send_task(
                _TASK, (cart_id,), task_id=task, countdown=delay, retry_policy=_AGAIN
            )

    def waiting(self) -> int:
        """
        :returns: messages that no worker has taken yet
        :raises TransportError: the broker cannot be reached
        """
        with self._translated(), self._app.connection_for_write() as connection:
            queue = self._app.amqp.queues[_QUEUE](connection.default_channel)
            return int(queue.queue_declare().message_count)

    def reach(self) -> None:
        """:raises TransportError: the broker cannot be reached"""
        self.waiting()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        kinds = self._app.connection_for_write()
        try:
            yield
        except (
            KombuError,
            ValueError,  # a URL that means nothing to the library of this broker
            *kinds.connection_errors,
            *kinds.channel_errors,
        ) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TransportError(
                f"the broker {self._shown} cannot be used: {reason}",
                hint="is it running, and is the password right?",
                transient=True,
            ) from error


class CeleryRunner(Runner):
    """
    Has carts filled by workers.

    :param service: whose carts
    :param tell: is given what there is to say to a person
    :raises TransportError: the broker never could be reached
    """

    def __init__(self, service: Service, tell: Callable[[str], None]) -> None:
        super().__init__(service, threads=2)
        self._broker = Broker(service.settings)
        wait_for(self._broker.reach, service.settings, service.stopping.wait, tell)

    def submit(self, cart_id: int) -> None:
        """Have a cart filled; if the broker is away, once it is back."""
        self._put(0, lambda: self._send(cart_id))

    def check(self) -> None:
        """:raises TransportError: the broker cannot be reached"""
        self._broker.reach()

    def _send(self, cart_id: int) -> None:
        with self._service.database.session(write=True):
            found = CartTasks.get_or_none(CartTasks.cart_id == cart_id)
            found = found or CartTasks.create(cart_id=cart_id, celery_task_id=uuid.uuid4().hex)
        try:
            self._broker.send(cart_id, found.celery_task_id)
        except TransportError as error:
            log.error("cart %d waits: %s", cart_id, error)  # the next sweep sends it

    def _sweep(self) -> float:
        carts = [one for one in unfinished_carts(self._service) if not self._is_held(one)]
        # Fewer messages than carts: some were lost, or the workers that had them. Otherwise there
        # is one for each, behind others, and no reason to make the queue longer.
        if carts and self._broker.waiting() < len(carts):
            for cart_id in carts:
                self._send(cart_id)
        sweep(self._service)
        return self._service.settings.sweep

    def _is_held(self, cart_id: int) -> bool:
        with self._service.volume.hold(cart_id, shared=True) as held:
            return not held


# -- workers ---------------------------------------------------------------------------------------


def work(service: Service, tell: Callable[[str], None]) -> None:
    """
    Be a worker until SIGTERM.

    What runs then has some seconds to end, and is taken up by other workers.

    :param tell: is given what there is to say to a person
    :raises TransportError: the broker never could be reached
    """
    settings = service.settings
    wait_for(Broker(settings).reach, settings, service.stopping.wait, tell)

    def keep(**_: object) -> None:
        """Keep the logging that is set up already."""

    def ready(**_: object) -> None:
        tell(f"filling carts of {settings.directory}")

    def stop(**_: object) -> None:
        service.stopping.set()
        late = threading.Timer(_GRACE, os._exit, (0,))
        late.daemon = True
        late.start()

    signals.setup_logging.connect(keep)
    signals.worker_ready.connect(ready)
    signals.worker_shutting_down.connect(stop)
    while not service.stopping.is_set():
        worker = _application(settings, lambda: service).Worker(
            hostname=f"carts-{os.getpid()}@",
            pool="threads",
            quiet=True,
            without_gossip=True,
            without_mingle=True,
        )
        worker.start()
        if not service.stopping.is_set():
            # kombu 5 raises an AttributeError if Redis goes away while a connection is closed.
            log.error("Celery's worker has ended by an error, and is started anew")
            service.stopping.wait(settings.connect_wait)


def _configured(settings: ServeSettings, results: str | None) -> Any:
    app = Celery("statepool.carts", broker=settings.broker, backend=results, set_as_current=False)
    app.conf.update(
        task_default_queue=_QUEUE,
        task_acks_late=True,  # the message of a worker that dies goes to another one
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=settings.workers,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # RabbitMQ ends those of tasks that take half an hour
        broker_transport_options={"confirm_publish": True, "socket_connect_timeout": 4, **_AGAIN},
    )
    return app


def _application(settings: ServeSettings, service: Callable[[], Service]) -> Any:
    """
    :param service: is called by the process that fills a cart, when it does
    :returns: what Celery makes a worker of
    """
    app, broker = _configured(settings, settings.result_backend), Broker(settings)

    def fill(task: Any, cart_id: int) -> None:
        try:
            _step(service(), broker, cart_id, task.request.id)
        except (StatePoolError, OSError) as error:
            log.error("cart %d: %s", cart_id, error)  # the next sweep sends it

    app.task(fill, name=_TASK, bind=True)
    return app


def _step(service: Service, broker: Broker, cart_id: int, task: str) -> None:
    """Take the next step of a cart, unless its message is not of use any more."""
    mine = CartTasks.celery_task_id == task
    with service.database.session():
        if not CartTasks.select().where(mine).exists():
            return
    again = fill_cart(service, cart_id)
    fresh = uuid.uuid4().hex
    with service.database.session(write=True):
        # It may also be that another one fills it, that we are to stop, or that it was asked for
        # once more at the last moment.
        if not Cart.select().where((Cart.id == cart_id) & is_unfinished()).exists():
            CartTasks.delete().where(mine).execute()
            return
        if not CartTasks.update(celery_task_id=fresh).where(mine).execute():
            return
    broker.send(cart_id, fresh, service.settings.poll if again is None else again)


# -- for celery's own command ----------------------------------------------------------------------

_lock = threading.Lock()
_made: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    """:returns: ``app``, as ``celery -A`` wants it"""
    if name != "app":
        raise AttributeError(name)
    if "app" not in _made:
        try:
            config = Config.load()
            settings = evolve(from_layers(config.serve), tasks="celery")
        except StatePoolError as error:
            raise SystemExit(f"statepool: {error}") from error
        _made["app"] = _application(settings, lambda: _open_once(settings, config))
    return _made["app"]


def _open_once(settings: ServeSettings, config: Config) -> Service:
    with _lock:
        if "service" not in _made:
            _made["service"] = open_service(settings, config)
        service = _made["service"]
        assert isinstance(service, Service)
        return service
