"""The client: made, waited for, got whole whatever happens on the way, and deleted."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.carts import LIMIT, ROOT, CartServer, FakeInterface, Wire, run_wire
from tests.support.sshd import free_port
from tests.unit.carts.conftest import FILES
from tests.unit.carts.test_cartd import BAR, FOO, content, entry

from statepool import (
    Conflict,
    DigestMismatch,
    FileInTheWay,
    IntegrityError,
    InUse,
    NotFound,
    RefusedError,
    StatePoolError,
    TransportError,
    UsageError,
)
from statepool.carts.arriving import Plan, checked
from statepool.carts.client import Cart, CartService, _part

Run = Callable[..., Any]

OF_THE_SERVICE = ("cheroot", "flask", "werkzeug", "peewee", "playhouse", "prometheus_client")


@pytest.fixture
def wire(server: CartServer, stack: ExitStack) -> Wire:
    return stack.enter_context(run_wire(server))


@pytest.fixture(params=[True, False], ids=["bundled", "streamed"])
def cart(server: CartServer, uid: str, request: pytest.FixtureRequest) -> Cart:
    """One with a file that has 200,000 bytes, and another one; it is ready."""
    service = CartService(server.url)
    made = Cart.new(service, [FOO, BAR], uid=uid, bundle=bool(request.param))
    made.wait()
    return made


def through(wire: Wire, cart: Cart, patience: float = LIMIT) -> Cart:
    return Cart(CartService(wire.url, patience=patience), cart.uid)


def parts(directory: Path) -> list[Path]:
    return list(directory.glob(".*.part"))


# -- at the shell ----------------------------------------------------------------------------------


def test_from_nothing_to_a_tar(server: CartServer, run_statepool: Run, tmp_path: Path) -> None:
    env = {"STATEPOOL_CARTS": server.url}
    made = run_statepool("cart", "new", "foo.txt", "data/bar.csv=x/y.csv", "--bundle", env=env)
    name = made.out.strip()
    assert uuid.UUID(name).version == 4
    got = run_statepool("cart", "get", name, "-o", "mine.tar", env=env)
    length = len(server.download(name))
    assert got.out.startswith(f"{name}: 210 KiB in {tmp_path}/mine.tar; every byte was checked")
    assert (tmp_path / "mine.tar").read_bytes() == server.download(name)
    assert content((tmp_path / "mine.tar").read_bytes()) == {
        f"{name}/foo.txt": FILES["foo.txt"],
        f"{name}/x/y.csv": FILES["data/bar.csv"],
    }
    assert parts(tmp_path) == []
    again = run_statepool("cart", "get", f"{server.url}/{name}", "--json")
    assert again.json == {
        "got": {
            "uid": name,
            "path": f"{tmp_path}/{name}.tar",
            "bytes": length,
            "resumed": 0,
            "digest": server.status(name)["digest"],
        }
    }
    assert run_statepool("cart", "delete", name, env=env).out == f"{name}: deleted\n"
    gone = run_statepool("cart", "status", name, env=env, code=3)
    assert f"No cart with uid {name} found" in gone.err


def test_how_far_a_cart_is(
    serve: Callable[..., CartServer], interface: FakeInterface, run_statepool: Run
) -> None:
    server = serve(settings=f'archives.far = {{ type = "interface", url = "{interface.url}" }}\n')
    interface.far.add("foo.txt")
    run_statepool("cart", "new", server.url, "foo.txt", "--archive", "far", "--uid", "mine")
    waiting = run_statepool("cart", "status", "mine", "--url", server.url)
    assert waiting.out.splitlines()[0].startswith(("mine: staging", "mine: waiting"))
    interface.far.clear()
    again = ("cart", "new", server.url, "foo.txt", "--archive", "far", "--uid", "mine", "--wait")
    made = run_statepool(*again, "--json").json["cart"]
    assert (made["status"], made["url"]) == ("ready", f"{server.url}/mine")
    ready = run_statepool("cart", "status", f"{server.url}/mine")
    assert ready.out.splitlines()[0] == "mine: ready, 6 B of 6 B"
    assert ready.out.splitlines()[2].split() == ["foo.txt", "staged", "6", "B", "6", "B"]
    found = run_statepool("cart", "status", f"{server.url}/mine", "--json").json["cart"]
    assert found == {**server.status("mine"), "url": f"{server.url}/mine"}


def test_a_cart_in_error(server: CartServer, uid: str, run_statepool: Run) -> None:
    run_statepool("cart", "new", server.url, "none", "--uid", uid)
    failed = run_statepool("cart", "get", f"{server.url}/{uid}", code=1)
    assert f"the cart {uid} is in error: Failed to pull file(none: there is no file" in failed.err
    shown = run_statepool("cart", "status", f"{server.url}/{uid}", code=1)
    assert "there is no file none" in shown.out


def test_a_file_is_in_the_way(cart: Cart, run_statepool: Run, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    refused = run_statepool("cart", "get", cart.url, "-o", "x", code=4)
    assert "x exists" in refused.err
    assert (tmp_path / "x").read_text() == "mine"
    run_statepool("cart", "get", cart.url, "-o", "x", "--overwrite")
    assert content((tmp_path / "x").read_bytes())
    with pytest.raises(FileInTheWay):
        cart.get(tmp_path)
    with pytest.raises(NotFound, match="cannot be written"):
        cart.get(tmp_path / "none/x")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["get", "x"], 2, "it is not said which service of carts is meant"),
        (["new", "http://127.0.0.1:9"], 2, "there is no ID"),
        (["get", "x", "--url", "127.0.0.1:8081"], 2, "is not the URL of a service"),
        (["get", "x", "--url", "http://a:b@127.0.0.1"], 2, "has a password in it"),
        (["get", "x", "--url", "http://127.0.0.1:99999"], 2, "is not the URL"),
        (["get", "http://127.0.0.1:9/x", "--patience", "0"], 7, "cannot ask http://127.0.0.1:9"),
        (["get", "https://127.0.0.1/x", "--ca-file", "none"], 2, "none cannot be used: No such"),
        (["get", "http://127.0.0.1/x", "--token-file", "none"], 2, "cannot be read from none"),
        (["get", "x", "--import", "-o", "y"], 2, "--import writes no file"),
        (["get", "x", "--to", "y"], 2, "need --import"),
    ],
)
def test_mistakes(run_statepool: Run, words: list[str], code: int, said: str) -> None:
    assert said in run_statepool("cart", *words, code=code).err


def test_what_is_refused_has_its_exit_code(
    server: CartServer, uid: str, run_statepool: Run
) -> None:
    new = ("cart", "new", server.url)
    assert "cannot be used" in run_statepool(*new, "../x", code=2).err
    assert "has no states" in run_statepool(*new, "foo.txt", "--export", code=2).err
    assert "no archive 'z'" in run_statepool(*new, "foo.txt", "--archive", "z", code=2).err
    run_statepool(*new, "foo.txt", "--uid", uid)
    assert "of another list" in run_statepool(*new, "baz.ini", "--uid", uid, code=4).err
    assert "No cart" in run_statepool("cart", "delete", f"{server.url}/none", code=3).err


def test_where_the_service_is_stands_in_the_configuration(
    server: CartServer, cart: Cart, run_statepool: Run, tmp_path: Path
) -> None:
    (tmp_path / "statepool.toml").write_text(f'[carts]\nurl = "{server.url}"\n')
    assert "ready" in run_statepool("cart", "status", cart.uid).out
    (tmp_path / "statepool.toml").write_text("[carts]\nuri = 7\n")
    assert "carts.uri: there is no such setting" in run_statepool("cart", "status", "x", code=2).err


def test_tokens_and_certificates(
    serve: Callable[..., CartServer], run_statepool: Run, tmp_path: Path
) -> None:
    make = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2"
    try:
        subprocess.run(
            [*make.split(), "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed (Debian: openssl)")
    server = serve("--certificate", "cert.pem", "--key", "key.pem", "--address", "0.0.0.0")
    url = server.url.replace("0.0.0.0", "127.0.0.1")
    token = run_statepool("carts", "token", "add", "anna", "--write").out.strip()
    new = ("cart", "new", url, "foo.txt", "--wait")
    untrusted = run_statepool(*new, env={"STATEPOOL_CART_TOKEN": token}, code=7)
    assert f"the certificate of {url} is not trusted" in untrusted.err
    new = (*new, "--ca-file", "cert.pem")
    assert "a token is needed" in run_statepool(*new, code=7).err
    wrong = run_statepool(*new, env={"STATEPOOL_CART_TOKEN": "wrong"}, code=7)
    assert "the token is not known" in wrong.err
    made = run_statepool(*new, env={"STATEPOOL_CART_TOKEN": token}).out.strip()
    (tmp_path / "token").write_text(f"{token}\n")
    run_statepool(*new, "--token-file", "token", env={"STATEPOOL_CART_TOKEN": "wrong"})
    text = (tmp_path / "statepool.toml").read_text()
    known = f'[carts]\nurl = "{url}"\ntoken-file = "token"\nca-file = "cert.pem"\n'
    (tmp_path / "statepool.toml").write_text(f"{text}\n{known}")
    run_statepool("cart", "get", made, "-o", "x.tar")
    assert content((tmp_path / "x.tar").read_bytes()) == {f"{made}/foo.txt": FILES["foo.txt"]}
    (tmp_path / "token").write_text("two words")
    assert "two words" not in run_statepool("cart", "get", made, code=2).err


def test_a_token_that_passes_unencrypted_is_told() -> None:
    assert CartService("http://192.0.2.7", token="x").tells_token
    assert not CartService("http://127.0.0.1:8081", token="x").tells_token
    assert not CartService("https://192.0.2.7", token="x").tells_token
    assert "x" not in repr(CartService("http://192.0.2.7", token="x"))


def test_without_what_the_service_is_made_of(server: CartServer, uid: str, tmp_path: Path) -> None:
    lacking = f"import sys\nsys.modules.update(dict.fromkeys({OF_THE_SERVICE}))\n"
    words = ["statepool", "cart", "new", server.url, "foo.txt", "--uid", uid, "--wait"]
    code = f"{lacking}sys.argv = {words}\nfrom statepool.__main__ import main\nmain()\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{uid}\n"


# -- on the way ------------------------------------------------------------------------------------


def test_a_download_that_breaks_goes_on(wire: Wire, cart: Cart, tmp_path: Path) -> None:
    wire.cuts = [5_000, 100_000, 400, 90_000]
    got = through(wire, cart).get(tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == cart_bytes(cart)
    assert got.resumed == 0
    asked = [head for head in wire.asked if head.startswith(f"GET /{cart.uid} ")]
    assert len(asked) == 5
    assert "Range" not in asked[0]
    assert all(
        f'If-Range: "{got.digest}"' in head and "Range: bytes=" in head for head in asked[3:]
    )
    assert parts(tmp_path) == []


def cart_bytes(cart: Cart) -> bytes:
    with cart.service.opened("GET", f"/{cart.uid}") as response:
        return b"".join(iter(lambda: response.read(1 << 20), b""))


def test_another_process_goes_on_with_it(
    wire: Wire, cart: Cart, run_statepool: Run, tmp_path: Path
) -> None:
    get = ("cart", "get", f"{wire.url}/{cart.uid}", "-o", "x.tar")
    wire.cuts = [50_000]
    broken = run_statepool(*get, "--patience", "0", code=7)
    assert "broke off in the middle" in broken.err
    assert not (tmp_path / "x.tar").exists()
    [part] = parts(tmp_path)
    kept = part.stat().st_size
    assert 40_000 < kept < 50_000
    wire.asked.clear()
    assert run_statepool(*get, "--json").json["got"]["resumed"] == kept
    assert f"Range: bytes={kept}-" in wire.asked[-1]
    assert (tmp_path / "x.tar").read_bytes() == cart_bytes(cart)
    assert parts(tmp_path) == []


def test_what_was_damaged_meanwhile_is_got_anew(wire: Wire, cart: Cart, tmp_path: Path) -> None:
    wire.cuts = [50_000]
    with pytest.raises(TransportError):
        through(wire, cart, patience=0).get(tmp_path / "x.tar")
    [part] = parts(tmp_path)
    damaged = bytearray(part.read_bytes())
    damaged[20_000] ^= 1
    part.write_bytes(damaged)
    assert through(wire, cart).get(tmp_path / "x.tar").resumed == 0
    assert (tmp_path / "x.tar").read_bytes() == cart_bytes(cart)


def test_two_at_once_are_in_each_others_way(cart: Cart, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    plan = Plan.of(cart.uid, cart.status())
    with _part(path, plan), pytest.raises(InUse, match="another process gets"):
        cart.get(path)
    cart.get(path)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (b"a,b\na,b", b"a,b\na;b", DigestMismatch),
        (b"\0ustar", b"\0ustaR", IntegrityError),
        (b"1/2/3/bar.csv", b"1/../3/bar.csv", IntegrityError),
        (b'"size":200000', b'"size":200001', IntegrityError),
        (b'"export":false', b'"exporT":false', IntegrityError),
        (b"ETag: ", b"Etag: x", Conflict),
    ],
)
def test_what_is_not_so_is_not_there(
    wire: Wire, cart: Cart, tmp_path: Path, old: bytes, new: bytes, error: type[Exception]
) -> None:
    wire.replaced[old] = new
    with pytest.raises(error):
        through(wire, cart).get(tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()
    wire.replaced.clear()
    assert through(wire, cart).get(tmp_path / "x.tar").bytes
    assert (tmp_path / "x.tar").read_bytes() == cart_bytes(cart)


def test_what_is_no_service_of_carts(wire: Wire, cart: Cart, run_statepool: Run) -> None:
    wire.replaced = {b"{": b"<", b'"': b"'"}
    said = run_statepool("cart", "status", f"{wire.url}/{cart.uid}", code=7).err
    assert "does not answer as a service of carts (correct the URL)" in said
    said = run_statepool("cart", "status", f"{wire.url}/none", code=7).err
    assert "answers 404 NOT FOUND" in said or "answers 404 Not Found" in said


def test_a_service_that_restarts_is_waited_for(
    serve: Callable[..., CartServer], interface: FakeInterface, tmp_path: Path
) -> None:
    settings = f'archives.far = {{ type = "interface", url = "{interface.url}" }}\n'
    server = serve("--port", str(free_port()), settings=settings)
    told: list[str] = []
    away = threading.Event()

    def tell(text: str) -> None:
        told.append(text)
        away.set()

    service = CartService(server.url, patience=LIMIT, tell=tell)
    interface.gate.clear()
    cart = Cart.new(service, [entry("data/bar.csv", "x", archive="far")])
    with ThreadPoolExecutor(1) as threads:
        got = threads.submit(cart.get, tmp_path / "x.tar")
        server.stop(signal.SIGKILL)
        assert away.wait(LIMIT)
        interface.gate.set()
        server.start()
        assert got.result(LIMIT).bytes == len(server.download(cart.uid))
    assert content((tmp_path / "x.tar").read_bytes()) == {f"{cart.uid}/x": FILES["data/bar.csv"]}
    assert f"trying for another {LIMIT} s" in told[0]


def test_a_cart_that_was_deleted_once_is_deleted(cart: Cart) -> None:
    cart.delete()
    with pytest.raises(NotFound):
        cart.delete()


def test_a_list_that_is_posted_again_is_the_same_cart(cart: Cart) -> None:
    before = cart.status()["created"]
    bundle = cart.status()["bundle"]
    Cart.new(cart.service, [BAR, FOO], uid=cart.uid, bundle=bundle)
    assert cart.status()["created"] == before
    with pytest.raises(Conflict):
        Cart.new(cart.service, [FOO], uid=cart.uid)


def test_a_cart_without_states_cannot_be_imported(cart: Cart, tmp_path: Path) -> None:
    import statepool

    with pytest.raises(UsageError, match="has no state in export form"):
        cart.import_into(statepool.StatePool(tmp_path / "cache"))


def test_a_cart_that_cartd_has_made_has_nothing_to_check_against() -> None:
    with pytest.raises(RefusedError, match="was made by Cartd"):
        Plan.of("x", {"digest": None})


@pytest.mark.parametrize(
    "status", [{}, {"digest": "x"}, {"digest": "x", "files": [{}]}, {"files": 7}]
)
def test_what_a_service_says_is_not_believed(status: dict[str, object]) -> None:
    with pytest.raises(StatePoolError, match="cannot be believed"):
        Plan.of("x", status)


# -- the file that keeps what came -----------------------------------------------------------------


def part_of(cart: Cart, path: Path) -> Path:
    """:returns: the name of the file that keeps what came of a cart"""
    with _part(path, Plan.of(cart.uid, cart.status())) as (_, name):
        return name


def test_a_file_that_has_another_name_is_not_written(cart: Cart, tmp_path: Path) -> None:
    """A crash between two steps leaves one; another account can plant one, too."""
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    part_of(cart, tmp_path / "x.tar").hardlink_to(mine)
    cart.get(tmp_path / "x.tar")
    assert mine.read_bytes() == b"mine"
    assert (tmp_path / "x.tar").read_bytes() == cart_bytes(cart)
    assert parts(tmp_path) == []


def test_a_file_of_another_account_is_not_written(cart: Cart, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another account")
    part = part_of(cart, tmp_path / "x.tar")
    part.write_bytes(cart_bytes(cart))
    os.chown(part, 65534, -1)
    assert cart.get(tmp_path / "x.tar").resumed == 0
    assert (tmp_path / "x.tar").stat().st_uid == 0


def test_what_is_no_file_is_not_waited_for(cart: Cart, tmp_path: Path) -> None:
    os.mkfifo(part_of(cart, tmp_path / "x.tar"))
    assert cart.get(tmp_path / "x.tar").resumed == 0


def test_what_another_process_has_finished_is_not_touched(
    cart: Cart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the file its last name after this one has opened it, and before it is locked."""
    path, part, data = tmp_path / "x.tar", part_of(cart, tmp_path / "x.tar"), cart_bytes(cart)
    part.write_bytes(data)
    real = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        if part.exists() and not path.exists():
            part.replace(path)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(FileInTheWay):
        cart.get(path)
    assert path.read_bytes() == data


def test_bytes_behind_the_end_are_not_kept(cart: Cart, tmp_path: Path) -> None:
    part = part_of(cart, tmp_path / "x.tar")
    part.write_bytes(cart_bytes(cart) + b"more")
    cart.get(tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == cart_bytes(cart)


def test_nothing_is_left_where_nothing_came(wire: Wire, cart: Cart, tmp_path: Path) -> None:
    wire.replaced[b"\0ustar"] = b"\0ustaR"
    with pytest.raises(IntegrityError):
        through(wire, cart).get(tmp_path / "x.tar")
    assert list(tmp_path.iterdir()) == []


def test_the_name_is_on_stable_storage(
    cart: Cart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert (tmp_path / "x.tar").exists() == (flushed[-1] == str(tmp_path))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    cart.get(tmp_path / "x.tar")
    assert len(flushed) == 2
    assert flushed[-1] == str(tmp_path)


# -- a service that is not what it should be -------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"bytes_needed":200006', b'"bytes_needed":"2000"'),
        (b'"bytes_needed":200006', b'"bytes_needed":1e9999'),
        (b'"rate":null', b'"rate":[77]'),
        (b'"rate":null', b'"rate": NaN'),
        (b'"seconds_left":null', b'"seconds_left":"no"'),
        (b'"status":"staged"', b'"status":12345678'),
        (b'"error":""', b'"error":77'),
    ],
)
def test_an_answer_of_other_types(wire: Wire, cart: Cart, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)  # so that the answer is JSON, and as long as it says
    wire.replaced[old] = new
    with pytest.raises(TransportError, match="does not answer as a service of carts"):
        through(wire, cart).status()


def test_a_member_with_another_digest_is_not_yielded_whole(cart: Cart) -> None:
    plan, data = Plan.of(cart.uid, cart.status()), cart_bytes(cart)
    changed = io.BytesIO(data.replace(b"a,b\na,b", b"a,b\na;b", 1))
    came = dict.fromkeys(range(len(plan.table.members)), 0)
    with pytest.raises(DigestMismatch):
        for number, piece in checked(plan, lambda size: changed.read(min(size, 1 << 16))):
            came[number] += len(piece)
    wrong = next(n for n, one in enumerate(plan.table.members) if one.name.endswith("bar.csv"))
    assert 0 < came[wrong] < plan.table.members[wrong].size


def test_hosts_that_are_not_this_one_by_their_names() -> None:
    for host in ("127.example.org", "127.0.0.1.example.org", "localhost.example.org"):
        assert CartService(f"http://{host}", token="x").tells_token, host
    for host in ("127.0.0.2", "[::1]", "localhost"):
        assert not CartService(f"http://{host}", token="x").tells_token, host
