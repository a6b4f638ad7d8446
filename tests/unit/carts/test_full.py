"""The disk is full: the cart or the client says so, and nothing is visible that is not whole."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.carts import CartServer, FakeInterface, until
from tests.unit.carts.conftest import mounted, needs_root
from tests.unit.carts.test_cartd import BAR, FOO, content, entry
from tests.unit.carts.test_restart import far

from statepool import NoSpace
from statepool.carts.client import Cart, CartService

MESSAGE = "Not enough space to download file"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with two mebibytes of room, and for 200 files."""
    needs_root()
    options = ("-t", "tmpfs", "-o", "size=2m,nr_inodes=200", "none")
    with mounted(tmp_path / "small", *options) as place:
        place.chmod(0o700)
        yield place


def fill_blocks(place: Path) -> Path:
    """:returns: a file that takes all room there is"""
    with (place / "ballast").open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return place / "ballast"


def fill_inodes(place: Path) -> list[Path]:
    """:returns: as many files as there can be"""
    made = []
    with suppress(OSError):
        for number in itertools.count():
            (place / f"ballast-{number}").touch()
            made.append(place / f"ballast-{number}")
    return made


def settings(small: Path, tmp_path: Path, interface: FakeInterface) -> str:
    """:returns: those of a service whose database has room"""
    own = f'directory = "{small}"\ndatabase = "sqlite:///{tmp_path}/db.sqlite"\n'
    return own + far(interface)


@pytest.mark.parametrize("bundle", [True, False], ids=["bundled", "streamed"])
def test_while_files_come(
    serve: Callable[..., CartServer],
    interface: FakeInterface,
    small: Path,
    tmp_path: Path,
    bundle: bool,
) -> None:
    server = serve(settings=settings(small, tmp_path, interface))
    interface.gate.clear()
    files = [entry("data/bar.csv", "x", archive="far"), entry("foo.txt", "y", archive="far")]
    server.post("one", *files, bundle=bundle)
    until(lambda: "GET data/bar.csv" in interface.asked)
    ballast = fill_blocks(small)
    interface.gate.set()
    assert MESSAGE in server.settled("one")["error"]
    head = server.curl("-I", "-X", "HEAD", path="/one")
    assert (head.status, head.headers["x-pacifica-status"]) == (500, "error")
    assert server.curl(path="/one").status == 500
    assert list((small / "cartuids").iterdir()) == []
    ballast.unlink()
    server.post("one", *files, bundle=bundle)
    until(lambda: server.status("one")["status"] == "ready")
    expected = {"one/x": interface.files["data/bar.csv"], "one/y": interface.files["foo.txt"]}
    assert content(server.download("one")) == expected


def test_no_room_for_another_file(
    serve: Callable[..., CartServer], interface: FakeInterface, small: Path, tmp_path: Path
) -> None:
    server = serve(settings=settings(small, tmp_path, interface))
    server.post("before", FOO)
    assert server.settled("before")["status"] == "ready"
    ballast = fill_inodes(small)
    server.post("one", FOO)
    assert MESSAGE in server.settled("one")["error"]
    assert content(server.download("before"))
    assert server.curl(path="/one").status == 500
    for path in ballast:
        path.unlink()
    server.post("one", FOO)
    until(lambda: server.status("one")["status"] == "ready")
    assert content(server.download("one")) == {"one/1/2/3/foo.txt": b"hello\n"}


@pytest.mark.parametrize("bundle", [True, False], ids=["bundled", "streamed"])
def test_no_room_for_the_link_to_a_cart(
    serve: Callable[..., CartServer],
    interface: FakeInterface,
    small: Path,
    tmp_path: Path,
    bundle: bool,
) -> None:
    server = serve(settings=settings(small, tmp_path, interface))
    interface.gate.clear()
    server.post("one", entry("data/bar.csv", "x", archive="far"), bundle=bundle)
    until(lambda: "GET data/bar.csv" in interface.asked)
    ballast = fill_inodes(small)
    interface.gate.set()
    assert server.settled("one")["error"] == MESSAGE
    assert server.curl(path="/one").status == 500
    for path in ballast:
        path.unlink()
    server.post("one", entry("data/bar.csv", "x", archive="far"), bundle=bundle)
    until(lambda: server.status("one")["status"] == "ready")
    assert content(server.download("one")) == {"one/x": interface.files["data/bar.csv"]}


def test_no_room_for_the_database(
    serve: Callable[..., CartServer], small: Path, tmp_path: Path
) -> None:
    """The lists of carts no longer fit: no part of one is there, and what was there stays so."""
    own = f'directory = "{small}"\nconnect-wait = 0.2\n'
    server = serve(settings=own)
    server.post("before", FOO)
    assert server.settled("before")["status"] == "ready"
    ballast = fill_blocks(small)
    many = [entry(f"{'x' * 150}/{number}", f"{'y' * 150}/{number}") for number in range(2000)]
    refused = server.post("many", *many)
    assert refused.status == 503
    assert "is there room for it?" in refused.json["message"]
    html = ("-H", "Accept: text/html")
    assert server.curl(*html, path="/").status == 200
    assert server.curl(path="/many").status == 404
    assert server.curl(path="/before/status").json["status"] == "ready"
    ballast.unlink()
    assert server.post("one", FOO).status == 201
    assert server.settled("one")["status"] == "ready"


def test_no_room_for_a_state_in_the_cache(
    serve: Callable[..., CartServer], pool: Path, small: Path
) -> None:
    pools = f'cache = "{small}/cache"\nsources = ["{pool}"]\n[serve]\n'
    server = serve(settings=pools)
    state = entry("vm1/disk/customize", "x.qcow2", archive="pools", chain=True)
    for uid, more in (("plain", {}), ("bundle", {"export": True, "chain": False})):
        server.post(uid, {**state, **more})
        status = server.settled(uid)
        assert status["status"] == "error"
        assert MESSAGE in status["error"] or "fit" in status["error"], status
        assert server.curl(path=f"/{uid}").status == 500


class _Fills:
    """A progress that fills the disk once some bytes have come."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.ballast: Path | None = None

    def begin(self, what: str, total: int) -> None:
        """Nothing happens before bytes come."""

    def advance(self, count: int) -> None:
        if self.ballast is None:
            self.ballast = fill_blocks(self.place)

    def end(self) -> None:
        """Nothing happens afterwards."""


@pytest.mark.parametrize("bundle", [True, False], ids=["bundled", "streamed"])
def test_while_a_cart_is_got(
    server: CartServer, uid: str, small: Path, bundle: bool, run_statepool: Callable[..., object]
) -> None:
    cart = Cart.new(CartService(server.url), [FOO, BAR], uid=uid, bundle=bundle)
    cart.wait()
    target, fills = small / "x.tar", _Fills(small)
    with pytest.raises(NoSpace, match="does not fit"):
        Cart(cart.service, uid, progress=fills).get(target)
    assert not target.exists()
    first = cart.service.url
    ran = run_statepool("cart", "get", f"{first}/{uid}", "-o", str(target), code=NoSpace.exit_code)
    assert "fit" in ran.err  # type: ignore[attr-defined]
    assert fills.ballast is not None
    fills.ballast.unlink()
    got = cart.get(target)
    assert got.resumed > 0
    assert target.read_bytes() == server.download(uid)
    assert sorted(os.listdir(small)) == ["x.tar"]
