"""Archives that are away, slow, or wrong; and what a file of one goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from tests.support.carts import CartServer, FakeInterface, run_interface, until
from tests.unit.carts.conftest import FILES, start
from tests.unit.carts.test_cartd import content, entry


@pytest.fixture(scope="module")
def far() -> Iterator[FakeInterface]:
    with run_interface(FILES) as fake:
        yield fake


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, far: FakeInterface) -> Iterator[CartServer]:
    settings = f"""tries = 3
        archives.far = {{ type = "interface", url = "{far.url}" }}
        archives.away = {{ type = "interface", url = "http://127.0.0.1:9/" }}
        archives.gone = {{ type = "directory", path = "/no/such/directory" }}
    """
    with ExitStack() as stack:
        yield start(stack, tmp_path_factory.mktemp("server"), settings=settings)


def wanted(name: str, **more: object) -> dict[str, object]:
    return entry(name, f"x/{name}", archive="far", **more)


@pytest.mark.parametrize("bundle", [True, False])
def test_files_come_checked_and_as_old_as_they_are(
    server: CartServer, uid: str, bundle: bool
) -> None:
    server.post(uid, *(wanted(name) for name in FILES), bundle=bundle)
    assert server.settled(uid)["status"] == "ready"
    assert content(server.download(uid)) == {f"{uid}/x/{name}": FILES[name] for name in FILES}


def test_failures_are_tried_again_and_the_cart_once_more(
    server: CartServer, uid: str, far: FakeInterface
) -> None:
    far.failures["foo.txt"] = 3 + 2
    server.post(uid, wanted("foo.txt"))
    assert server.settled(uid)["status"] == "ready"
    assert far.failures["foo.txt"] == 0


def test_what_fails_for_good_is_told(server: CartServer, uid: str, far: FakeInterface) -> None:
    far.failures["baz.ini"] = 10**6
    try:
        server.post(uid, wanted("baz.ini"), wanted("none"), wanted("empty"))
        error = server.settled(uid)["error"]
    finally:
        far.failures.clear()
    assert f"x/baz.ini: the archive {far.url} answered 500 for baz.ini" in error
    assert f"x/none: the archive {far.url} has no file none" in error
    assert "x/empty" not in error


@pytest.mark.parametrize(
    ("archive", "message"), [("away", "cannot POST"), ("gone", "is not there")]
)
def test_archives_that_are_away(server: CartServer, uid: str, archive: str, message: str) -> None:
    server.post(uid, entry("foo.txt", "x", archive=archive))
    status = server.settled(uid)
    assert status["status"] == "error"
    assert message in status["error"]
    assert message in status["files"][0]["error"]


@pytest.mark.parametrize("bundle", [True, False])
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("5", "has more than 5 bytes, not 5 as its archive said"),
        ("7", "has 6 bytes, not 7 as its archive said"),
        ("-1", "does not say how long"),
        ("9" * 30, "does not say how long"),
        ("x", "does not say how long"),
        (str(1 << 62), "Not enough space to download file"),
    ],
)
def test_archives_that_are_wrong_about_sizes(
    server: CartServer, uid: str, far: FakeInterface, said: str, message: str, bundle: bool
) -> None:
    far.sizes["foo.txt"] = said
    try:
        server.post(uid, wanted("foo.txt"), bundle=bundle)
        status = server.settled(uid)
    finally:
        far.sizes.clear()
    assert status["status"] == "error"
    assert message in status["error"]


def test_silent_archives_are_given_up(
    serve: Callable[..., CartServer], interface: FakeInterface
) -> None:
    far = f'archives.far = {{ type = "interface", url = "{interface.url}" }}\n'
    server = serve(settings=f"{far}archive-timeout = 0.2\ntries = 1\n")
    interface.gate.clear()
    server.post("one", wanted("data/bar.csv"))
    assert "timed out" in server.settled("one")["error"]
    interface.gate.set()
    server.post("one", wanted("data/bar.csv"))
    until(lambda: server.status("one")["status"] == "ready")
