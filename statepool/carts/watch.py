"""Looks whether what is done for a cart still has to be, and notes how far it is."""

from __future__ import annotations

import time

from statepool.carts.database import Cart, File
from statepool.carts.service import Service

_EVERY = 1.0
"""Seconds between two looks."""


class Interrupted(Exception):
    """The service stops, or the cart is not wanted any more: what runs for it ends."""


class Revoked(Interrupted):
    """The cart was deleted."""


class Watch:
    """
    Is told of bytes that pass.

    :param cart: that they are for
    :param file: whose they are, if how far it is should be noted
    """

    def __init__(self, service: Service, cart: Cart, file: File | None = None) -> None:
        self._service = service
        self._cart = cart
        self._file = file
        self._done = 0
        self._next = time.monotonic() + _EVERY

    def passed(self, count: int) -> None:
        """
        More bytes have passed.

        :raises Interrupted: they were the last ones
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

        :raises Interrupted: there is no reason to wait any more
        """
        self._service.stopping.wait(seconds)
        self._next = 0.0
        self.passed(0)
