"""
Room for a cart, reserved before its first byte moves: the least recently used carts are removed.
"""

from __future__ import annotations

from peewee import Expression, fn

from statepool import NoSpace
from statepool.carts.database import Cart, File, ago, now
from statepool.carts.service import Service, log

_SLACK = 1 << 20
"""Bytes that a cart needs in addition to its files: directories, headers, the database."""

MESSAGE = "Not enough space to download file"
"""Cartd's message."""


def make_room(service: Service, cart: Cart) -> None:
    """
    Admit a cart with known files: from now on its bytes are reserved.

    Other carts are removed, the least recently used first, until it fits. Carts that were used
    within ``lru-buffer-time`` or are being downloaded are not removed; if it would not fit even
    then, no cart is removed.

    :raises NoSpace: it does not fit
    """
    volume = service.volume
    with volume.hold("room", wait=True):
        with service.database.session():
            needed = _missing(service, cart.id) + _SLACK + _promised(service, cart)
            victims = _victims(service, cart) if service.settings.lru_purge else []
        available = volume.free()
        if needed > available + sum(max(victim.size, 0) for victim in victims):
            raise _does_not_fit(needed, available)
        _remove(service, cart, victims, needed)
        if needed > (available := volume.free()):
            raise _does_not_fit(needed, available)
        with service.database.session(write=True):
            Cart.update(started_date=now()).where(Cart.id == cart.id).execute()


def free_room(service: Service, cart: Cart, needed: int) -> bool:
    """:returns: whether carts were removed to make room for another need of a cart"""
    if not service.settings.lru_purge:
        return False
    with service.volume.hold("room", wait=True):
        with service.database.session():
            victims = _victims(service, cart)
        return _remove(service, cart, victims, needed)


def _remove(service: Service, cart: Cart, victims: list[Cart], needed: int) -> bool:
    removed = False
    for victim in victims:
        if needed <= service.volume.free():
            break
        if remove_cart(service, victim):
            removed = True
            log.info("removed cart %s to make room for %s", victim.cart_uid, cart.cart_uid)
    return removed


def evictable(service: Service) -> int:
    """:returns: bytes of carts that would be removed if another one needed the room"""
    if not service.settings.lru_purge:
        return 0
    return int(
        Cart.select(fn.SUM(Cart.size)).where(_is_idle(service) & (Cart.size > 0)).scalar() or 0
    )


def remove_cart(service: Service, cart: Cart) -> bool:
    """:returns: whether a cart was removed: not if it is being filled or downloaded"""
    with service.volume.hold(cart.id) as held:
        if held:
            with service.database.session(write=True):
                mark_deleted(cart)
            service.volume.remove(cart)
    return held


def mark_deleted(cart: Cart) -> None:
    """
    Note that a cart is deleted, in the caller's transaction. Its files are removed when they are
    not in use.
    """
    Cart.update(status="deleted", deleted_date=now()).where(Cart.id == cart.id).execute()


def _does_not_fit(needed: int, available: int) -> NoSpace:
    return NoSpace(
        f"{MESSAGE}: {needed} bytes are needed, {available} are free",
        needed=needed,
        available=available,
        hint="delete carts that are not needed any more, or ask for less",
    )


def _missing(service: Service, cart_id: int) -> int:
    """:returns: bytes that a cart still needs; hard links to existing files need none"""
    cart = Cart.get_by_id(cart_id)
    shared = None if cart.bundle else service.volume.device
    files = File.select(File.size, File.done, File.device).where(
        (File.cart == cart_id) & (File.status != "staged")
    )
    return sum(file.size - file.done for file in files if shared is None or file.device != shared)


def _promised(service: Service, cart: Cart) -> int:
    """:returns: bytes that other admitted carts still need"""
    others = Cart.select().where(
        (Cart.id != cart.id)
        & (Cart.status << ("staging", "bundling"))
        & Cart.started_date.is_null(False)
    )
    return sum(_missing(service, other.id) for other in others)


def _victims(service: Service, cart: Cart) -> list[Cart]:
    others = Cart.select().where((Cart.id != cart.id) & _is_idle(service))
    return list(others.order_by(Cart.updated_date, Cart.id))


def _is_idle(service: Service) -> Expression:
    """:returns: a condition of carts that may be removed"""
    return (
        (Cart.status << ("ready", "error"))
        & Cart.deleted_date.is_null()
        & (Cart.updated_date < ago(service.settings.lru_buffer_time))
    )
