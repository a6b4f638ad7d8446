"""Operators' work on carts: restarting them, listing them, and deleting old ones."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from statepool import NotFound
from statepool.carts.carts import describe_cart
from statepool.carts.database import Cart, ago
from statepool.carts.room import remove_cart
from statepool.carts.service import Service
from statepool.carts.tasks import begin_again


def fix_carts(service: Service, cart_ids: Collection[int]) -> list[str]:
    """
    Restart carts in error.

    :param cart_ids: only these; all if there are none
    :returns: their uids
    :raises NotFound: one of them is not in error: nothing was changed
    """
    with service.database.session(write=True):
        failed = Cart.select().where((Cart.status == "error") & Cart.deleted_date.is_null())
        found = {int(cart.id): cart for cart in failed.order_by(Cart.id)}
        if unknown := sorted(set(cart_ids) - set(found)):
            raise NotFound(f"no cart {unknown[0]} is in error", hint="statepool carts dump")
        chosen = [found[number] for number in cart_ids or found]
        for cart in chosen:
            begin_again(cart)
    return [str(cart.cart_uid) for cart in chosen]


def dump_carts(service: Service) -> list[dict[str, Any]]:
    """:returns: every cart that is not deleted, with its files"""
    with service.database.session():
        carts = list(Cart.select().where(Cart.deleted_date.is_null()).order_by(Cart.id))
    return [{"id": cart.id, **describe_cart(service, cart)} for cart in carts]


def purge_carts(service: Service, seconds: float, *, dry_run: bool = False) -> list[str]:
    """
    Delete carts that were not used for ``seconds``, and are not in use now.

    :param dry_run: only return which carts would be deleted
    :returns: their uids
    """
    old = Cart.deleted_date.is_null() & (Cart.updated_date < ago(seconds))
    with service.database.session():
        carts = list(Cart.select().where(old).order_by(Cart.id))
    return [str(cart.cart_uid) for cart in carts if dry_run or remove_cart(service, cart)]
