"""``statepool cart``: what people without a pool do with a service of carts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from statepool.cli import output, paths
from statepool.cli.report import warn
from statepool.cli.session import Command, Helpful, Session

if TYPE_CHECKING:
    from statepool.api import StatePool
    from statepool.carts.client import Cart, CartService
    from statepool.model.progress import Progress

_Function = TypeVar("_Function", bound=Callable[..., Any])

_WEB = ("http://", "https://")


class _Group(Helpful, click.Group):
    """A command with commands below it."""


@click.command("cart", cls=_Group)
def command() -> None:
    """
    Have a service put states and files into one tar, and get it.

    The service is one that statepool serve has started, here or elsewhere. A token for it is read
    from the variable STATEPOOL_CART_TOKEN, or from a file. The section [carts] of statepool.toml
    can have url, token-file and ca-file. Each of these commands prints JSON with --json.
    """


_OPTIONS = (
    click.option(
        "--url",
        metavar="URL",
        envvar="STATEPOOL_CARTS",
        help="Where the service is; STATEPOOL_CARTS or the configuration says so if not given.",
    ),
    click.option(
        "--token-file",
        metavar="FILE",
        shell_complete=paths.files,
        help="A file with the token.",
    ),
    click.option(
        "--ca-file",
        metavar="FILE",
        shell_complete=paths.files,
        help="The certificates of the authorities that may vouch for the service; else the host's.",
    ),
    click.option(
        "--patience",
        metavar="SECONDS",
        type=click.FloatRange(min=0),
        default=60.0,
        help="How long to try while the service is away; 60 if not given.",
    ),
)


def _service_options(function: _Function) -> _Function:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _service(
    session: Session,
    url: str | None,
    token_file: str | None,
    ca_file: str | None,
    patience: float,
) -> CartService:
    from statepool.carts.client import CartService
    from statepool.model.secrets import CART_TOKEN

    service = CartService.configured(
        session.config.carts,
        url=url,
        token=os.environ.get(CART_TOKEN) or None,
        token_file=token_file,
        ca_file=ca_file,
        patience=patience,
        tell=warn if not session.quiet else lambda text: None,
    )
    if service.tells_token and not session.quiet:
        warn(f"the token passes unencrypted to {service.url}")
    return service


def _cart(
    session: Session,
    name: str,
    url: str | None,
    *,
    progress: Progress | None = None,
    **given: Any,
) -> Cart:
    """:returns: the cart of this uid, or the one that is at this URL"""
    from statepool.carts.client import Cart

    if name.startswith(_WEB):
        url, _, name = name.rstrip("/").rpartition("/")
    service = _service(session, url, **given)
    return Cart(service, name, progress=progress or session.progress())


@command.command("new", cls=Command)
@click.argument("ids", metavar="[URL] ID[=PATH]...", nargs=-1, required=True)
@_service_options
@click.option("--uid", metavar="UID", help="Of the cart; if not given, one that cannot be guessed.")
@click.option("--archive", metavar="NAME", help="From there; as the service wants if not given.")
@click.option("--chain", is_flag=True, help="Of states, all that backs them, too.")
@click.option("--export", is_flag=True, help="States in one file each, for statepool import.")
@click.option("--bundle", is_flag=True, help="Have the tar made in advance.")
@click.option("--wait", is_flag=True, help="Wait until it can be got.")
@click.pass_obj
def new(
    session: Session,
    /,
    ids: tuple[str, ...],
    uid: str | None,
    archive: str | None,
    chain: bool,
    export: bool,
    bundle: bool,
    wait: bool,
    **given: Any,
) -> None:
    """
    Make a cart, and print its uid.

    ID is that of a state, such as vm1/disk/install, or of a file in an archive; in the tar it is
    at PATH, or called as its ID (with --export, and .statepool behind it).
    """
    from statepool.carts.client import Cart

    if ids[0].startswith(_WEB):
        given["url"], *rest = ids
        ids = tuple(rest)
    if not ids:
        raise click.UsageError("there is no ID: what is to be in the cart?")
    entries = [
        {
            **_split(text),
            **({"archive": archive} if archive is not None else {}),
            **({"chain": True} if chain else {}),
            **({"export": True} if export else {}),
        }
        for text in ids
    ]
    service = _service(session, **given)
    cart = Cart.new(service, entries, uid=uid, bundle=bundle or None, progress=session.progress())
    if wait:
        cart.wait()
    if session.json:
        session.answer_json({"cart": {**cart.status(), "url": cart.url}})
    else:
        session.answer(output.safe(cart.uid))


def _split(text: str) -> dict[str, object]:
    # An id can contain an equals sign; a path need not.
    name, equals, path = text.rpartition("=")
    return {"id": name, "path": path} if equals else {"id": text}


@command.command("status", cls=Command)
@click.argument("uid")
@_service_options
@click.pass_obj
def status(session: Session, /, uid: str, **given: Any) -> int:
    """
    Show how far a cart is.

    The exit code is 1 if it is in error.
    """
    cart = _cart(session, uid, **given)
    found = cart.status()
    if session.json:
        session.answer_json({"cart": {**found, "url": cart.url}})
    else:
        session.say(_told(found))
        rows = [
            [
                output.safe(one["path"]),
                one["status"],
                output.size(one["bytes"]),
                output.size(one["size"]) if one["size"] is not None else "",
                output.safe(one["error"]),
            ]
            for one in found["files"]
        ]
        session.answer_table(["path", "status", "done", "of", "error"], rows, right=["done", "of"])
    return 1 if found["status"] == "error" else 0


def _told(found: dict[str, Any]) -> str:
    text = f"{found['uid']}: {found['status']}"
    if found["bytes_needed"]:
        text += f", {output.size(found['bytes'])} of {output.size(found['bytes_needed'])}"
    if found["rate"]:
        text += f", {output.size(found['rate'])}/s"
    if found["seconds_left"]:
        text += f", {found['seconds_left']:.0f} s left"
    return text + (f": {found['error']}" if found["error"] else "")


@command.command("get", cls=Command)
@click.argument("uid")
@click.option(
    "-o",
    "--output",
    "place",
    metavar="FILE",
    shell_complete=paths.files,
    help="Write this file; UID.tar if not given.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@click.option("--import", "imports", is_flag=True, help="Import its states; no file is written.")
@click.option("--to", "target", metavar="POOL", help="With --import: store them there, too.")
@click.option("--replace", is_flag=True, help="Replace states of POOL that have other content.")
@_service_options
@click.pass_obj
def get(
    session: Session,
    /,
    uid: str,
    place: str | None,
    overwrite: bool,
    imports: bool,
    target: str | None,
    replace: bool,
    **given: Any,
) -> int:
    """
    Wait until a cart is ready, and get it.

    FILE appears when it is whole, and every byte was checked. What an interrupted download leaves,
    a hidden file beside it, is gone on with by the next one. With --import, what is in it in export
    form comes into the cache, as by statepool import, with the same exit codes.
    """
    if imports and (place is not None or overwrite):
        raise click.UsageError("--import writes no file: leave -o and --overwrite out")
    if not imports and (target is not None or replace):
        raise click.UsageError("--to and --replace need --import")
    if replace and target is None:
        raise click.UsageError("--replace needs --to")
    if imports:
        pool = session.pool()
        cart = _cart(session, uid, progress=pool.progress, **given)
        return _import(session, cart, pool, target, replace)
    cart = _cart(session, uid, **given)
    got = cart.get(place if place is not None else f"{cart.uid}.tar", overwrite=overwrite)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"got": form(got)})
    else:
        resumed = f" ({output.size(got.resumed)} were here already)" if got.resumed else ""
        told = f"{output.size(got.bytes)} in {got.path}{resumed}; every byte was checked"
        session.say(f"{cart.uid}: {told}")
    return 0


def _import(
    session: Session, cart: Cart, pool: StatePool, target: str | None, replace: bool
) -> int:
    from statepool.cli import import_ as importing
    from statepool.cli.signals import orderly
    from statepool.errors import TransportError

    with orderly():
        imported = cart.import_into(pool, to=target, replace=replace)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"imported": [form(one) for one in imported]})
    else:
        for one in imported:
            importing.tell(session, one, dry_run=False)
    return 0 if all(one.complete for one in imported) else TransportError.exit_code


@command.command("delete", cls=Command)
@click.argument("uid")
@_service_options
@click.pass_obj
def delete(session: Session, /, uid: str, **given: Any) -> None:
    """Delete a cart."""
    cart = _cart(session, uid, **given)
    cart.delete()
    if session.json:
        session.answer_json({"deleted": [cart.uid]})
    else:
        session.say(f"{cart.uid}: deleted")
