"""
The watch over the work for a cart: it checks whether the work is still wanted, and records its
progress.
"""

from __future__ import annotations

import time

from statepool.carts.database import Cart, File
from statepool.carts.service import Service

_EVERY = 1.0
"""Seconds between two checks."""


class Interrupted(Exception):
    """An exception: the service stops, or the cart is not wanted any more, so its work ends."""


class Revoked(Interrupted):
    """An exception: the cart was deleted."""


class Watch:
    """
    A watch that is told of transferred bytes.

    :param cart: the cart of the bytes
    :param file: the file of the bytes, if its progress is to be recorded
    """

    def __init__(self, service: Service, cart: Cart, file: File | None = None) -> None:
        self._service = service
        self._cart = cart
        self._file = file
        self._done = 0
        self._next = time.monotonic() + _EVERY

    def passed(self, count: int) -> None:
        """
        Note that more bytes have been transferred.

        :raises Interrupted: the work must end now
        """
        self._done += count
        if self._service.stopping.is_set():
            raise Interrupted
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY
        with self._service.database.session(write=self._file is not None):
            if self._file is not None:
                File.update(done=self._done).where(File.id == self._file.id).execute()
            is_there = Cart.deleted_date.is_null() & (Cart.id == self._cart.id)
            if not Cart.select().where(is_there).exists():
                raise Revoked

    def pause(self, seconds: float) -> None:
        """
        Wait.

        :raises Interrupted: the work must end now
        """
        self._service.stopping.wait(seconds)
        self._next = 0.0
        self.passed(0)
