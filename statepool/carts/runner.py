"""Threads of this process that fill carts, including carts that another process left unfinished."""

from __future__ import annotations

import heapq
import threading
import time
import uuid
from collections.abc import Callable

from statepool import StatePoolError
from statepool.carts.database import Cart, CartTasks
from statepool.carts.service import Service, log
from statepool.carts.tasks import fill_cart, sweep, unfinished_carts

_LATER = 60.0
"""Seconds until a retry of what failed on this host."""


class Runner:
    """
    A runner of :func:`~statepool.carts.tasks.fill_cart` for carts, again after the delay that it
    returns.

    The threads do not keep the process alive: the next process resumes their work.

    :param service: the service with the carts
    :param threads: number of threads; by default the workers of the settings, and one more for the
        sweeps
    """

    def __init__(self, service: Service, threads: int | None = None) -> None:
        self._service = service
        self._queue: list[tuple[float, int, Callable[[], float | None]]] = []
        self._count = 0
        self._changed = threading.Condition()
        self._known: set[int] = set()
        self._threads = [
            threading.Thread(target=self._work, name=f"carts-{number}", daemon=True)
            for number in range(threads or service.settings.workers + 1)
        ]

    def start(self) -> None:
        """Start the threads, and take up unfinished carts."""
        self._put(0, self._sweep)
        for thread in self._threads:
            thread.start()

    def submit(self, cart_id: int) -> None:
        """Queue a cart to be filled, unless that is under way."""
        with self._changed:
            if cart_id in self._known:
                return
            self._known.add(cart_id)
        task = uuid.uuid4().hex
        try:
            with self._service.database.session(write=True):
                CartTasks.delete().where(CartTasks.cart_id == cart_id).execute()
                CartTasks.insert(cart_id=cart_id, celery_task_id=task).execute()
        except BaseException:
            self._forget(cart_id)  # else the next sweep would take it for queued
            raise
        self._put(0, lambda: self._fill(cart_id, task))

    def check(self) -> None:
        """:raises TransportError: carts cannot be filled now"""

    def stop(self, timeout: float) -> bool:
        """
        Stop: begin no new work.

        :param timeout: seconds to wait for running work
        :returns: whether all of it has ended
        """
        self._service.stopping.set()
        with self._changed:
            self._changed.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _put(self, delay: float, do: Callable[[], float | None]) -> None:
        with self._changed:
            self._count += 1
            heapq.heappush(self._queue, (time.monotonic() + delay, self._count, do))
            self._changed.notify()

    def _next(self) -> Callable[[], float | None] | None:
        with self._changed:
            while not self._service.stopping.is_set():
                due = self._queue[0][0] - time.monotonic() if self._queue else None
                if due is not None and due <= 0:
                    return heapq.heappop(self._queue)[2]
                self._changed.wait(due)
        return None

    def _work(self) -> None:
        while (do := self._next()) is not None:
            try:
                again = do()
            except StatePoolError as error:  # the database cannot be reached: try later
                log.error("%s", error)
                again = self._service.settings.connect_wait
            except OSError as error:
                log.error("%s", error)
                again = _LATER
            except BaseException:  # a bug: it is logged, and another thread continues
                threading.Thread(target=self._work, name="carts", daemon=True).start()
                raise
            if again is not None:
                self._put(again, do)

    def _fill(self, cart_id: int, task: str) -> float | None:
        again = fill_cart(self._service, cart_id)
        if again is not None:
            return again
        self._forget(cart_id)
        with self._service.database.session(write=True):
            CartTasks.delete().where(CartTasks.celery_task_id == task).execute()
            is_waiting = (Cart.id == cart_id) & (Cart.status == "waiting")
            waits = Cart.select().where(is_waiting).exists()
        if waits:  # it was submitted again at the last moment
            self.submit(cart_id)
        return None

    def _forget(self, cart_id: int) -> None:
        with self._changed:
            self._known.discard(cart_id)

    def _sweep(self) -> float:
        for cart_id in unfinished_carts(self._service):
            self.submit(cart_id)
        sweep(self._service)
        return self._service.settings.sweep
