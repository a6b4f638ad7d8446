"""States of pools in carts: fetched once into the cache, and shared with it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import blake3
import pytest
from tests.support.carts import CartServer, FakeInterface, run_wire, until
from tests.unit.carts.conftest import RAM, mounted, needs_root, qemu, start
from tests.unit.carts.test_cartd import content, entry

import statepool
from statepool.carts.client import Cart, CartService
from statepool.model.manifest import Kind

POOLS = 'cache = "cache"\nsources = ["{pool}"]\n[serve]\n'


def customize(**more: object) -> dict[str, object]:
    return entry("vm1/disk/customize", "vms/tip.qcow2", archive="pools", **more)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, pool: Path) -> Iterator[CartServer]:
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("server")
        yield start(stack, directory, settings=POOLS.format(pool=pool))


@pytest.fixture(params=[True, False], ids=["bundled", "streamed"])
def bundle(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_a_state_is_a_file(server: CartServer, uid: str, pool: Path, bundle: bool) -> None:
    server.post(uid, customize(), bundle=bundle)
    assert server.settled(uid)["status"] == "ready"
    there = (pool / "vm1/disk/customize.qcow2").read_bytes()
    assert content(server.download(uid)) == {f"{uid}/vms/tip.qcow2": there}


def test_a_chain_is_one_that_qemu_can_open(
    server: CartServer, uid: str, tmp_path: Path, pool: Path, bundle: bool
) -> None:
    server.post(uid, customize(chain=True), bundle=bundle)
    server.settled(uid)
    with tarfile.open(fileobj=io.BytesIO(server.download(uid))) as tar:
        tar.extractall(tmp_path, filter="data")
    there = tmp_path / uid / "vms"
    assert {path.name for path in there.iterdir()} == {"tip.qcow2", "install.qcow2"}
    qemu("qemu-img", "compare", there / "tip.qcow2", pool / "vm1/disk/customize.qcow2")


def test_a_machine_comes_with_its_ram(server: CartServer, uid: str, bundle: bool) -> None:
    on = entry("vm1/on", "vm", archive="pools", chain=True)
    server.post(uid, on, bundle=bundle)
    server.settled(uid)
    found = content(server.download(uid))
    disks = {f"{uid}/vm/disk/{name}.qcow2" for name in ("on", "customize", "install")}
    assert set(found) == {f"{uid}/vm/on.state", *disks}
    assert found[f"{uid}/vm/on.state"] == RAM


def test_twenty_carts_hold_a_state_once(server: CartServer, uid: str) -> None:
    for number in range(20):
        server.post(f"{uid}-{number}", customize())
    for number in range(20):
        assert server.settled(f"{uid}-{number}")["status"] == "ready"
    files = list(server.directory.glob(f"carts/[0-9]*/{uid}-*/vms/tip.qcow2"))
    assert len(files) == 20
    assert len({(path.stat().st_dev, path.stat().st_ino) for path in files}) == 1
    cached = (server.directory / "cache/.statepool/data").iterdir()
    assert any(path.stat().st_ino == files[0].stat().st_ino for path in cached)


def test_a_cart_keeps_its_states_when_the_cache_loses_them(server: CartServer, uid: str) -> None:
    server.post(uid, customize())
    server.settled(uid)
    before = server.download(uid)
    cache = statepool.StatePool(server.directory / "cache")
    cache.image("vm1/disk").unset("customize", cascade=True)
    assert server.download(uid) == before
    server.post(f"{uid}-2", customize())
    assert server.settled(f"{uid}-2")["status"] == "ready"


def test_a_sum_of_a_state_is_compared(server: CartServer, uid: str, pool: Path) -> None:
    digest = blake3.blake3((pool / "vm1/disk/customize.qcow2").read_bytes()).hexdigest()
    for number, (value, status) in enumerate(((digest, "ready"), ("0" * 64, "error"))):
        server.post(f"{uid}-{number}", customize(hashtype="blake3", hashsum=value))
        assert server.settled(f"{uid}-{number}")["status"] == status
    server.post(f"{uid}-md5", customize(hashtype="md5", hashsum="0" * 32))
    assert "the md5 is " in server.settled(f"{uid}-md5")["error"]


def test_two_chains_with_the_same_parent_have_it_once(server: CartServer, uid: str) -> None:
    install = entry("vm1/disk/install", "vms/install.qcow2", archive="pools")
    server.post(uid, customize(chain=True), install)
    assert server.settled(uid)["status"] == "ready"
    names = [file["path"] for file in server.status(uid)["files"]]
    assert sorted(names) == ["vms/install.qcow2", "vms/tip.qcow2"]
    server.post(f"{uid}-2", customize(chain=True), entry("foo.txt", "vms/install.qcow2"))
    error = server.settled(f"{uid}-2")["error"]
    assert "foo.txt and vm1/disk/customize would both be at vms/install.qcow2" in error


def test_states_that_nobody_has(server: CartServer, uid: str) -> None:
    server.post(uid, entry("vm1/disk/none", "x", archive="pools"))
    assert "there is no state none of vm1/disk in" in server.settled(uid)["error"]


def test_twenty_carts_read_a_state_once(
    serve: Callable[..., CartServer], uid: str, tmp_path: Path
) -> None:
    """Another link to a file changes its status; still its bytes are not hashed once more."""
    image = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "32M")
    qemu("qemu-io", "-c", "write -P 7 0 16M", image)
    statepool.init(tmp_path / "large")
    own = statepool.StatePool(tmp_path / "own", [tmp_path / "large"]).image("vm1/disk")
    own.set("large", source=image)
    server = serve(settings=POOLS.format(pool=tmp_path / "large"))

    def read() -> int:
        words = Path(f"/proc/{server.process.pid}/io").read_text().split()
        return int(words[words.index("rchar:") + 1])

    for number in range(20):
        server.post(f"{uid}-{number}", entry("vm1/disk/large", "x", archive="pools"))
        assert server.settled(f"{uid}-{number}")["status"] == "ready"
        if not number:
            before = read()
    assert read() - before < 16 << 20


# -- in export form --------------------------------------------------------------------------------


def export(name: str, path: str) -> dict[str, object]:
    return entry(name, path, archive="pools", export=True)


def test_a_state_in_export_form_is_a_bundle(
    server: CartServer, uid: str, tmp_path: Path, pool: Path, bundle: bool
) -> None:
    """Also the one that statepool export writes; twice the same bytes."""
    for name in (uid, f"{uid}-2"):
        server.post(name, export("vm1/disk/customize", "tip.statepool"), bundle=bundle)
        assert server.settled(name)["status"] == "ready"
    first = content(server.download(uid))[f"{uid}/tip.statepool"]
    second = content(server.download(f"{uid}-2"))[f"{uid}-2/tip.statepool"]
    disk = statepool.StatePool(tmp_path / "mine", [pool]).image("vm1/disk")
    disk.export("customize", to=tmp_path / "tip.statepool", compress="none")
    assert first == second == (tmp_path / "tip.statepool").read_bytes()
    other = statepool.StatePool(tmp_path / "other")
    imported = other.import_bundle(tmp_path / "tip.statepool")
    assert imported.chain == ("customize", "install")


def shared(server: CartServer) -> list[Path]:
    return list((server.directory / "carts/shared").iterdir())


def test_twenty_carts_hold_an_export_once(
    serve: Callable[..., CartServer], uid: str, pool: Path
) -> None:
    server = serve(settings=POOLS.format(pool=pool))
    uids = [f"{uid}-{number}" for number in range(20)]
    for name in uids:
        server.post(name, export("vm1/disk/customize", f"{name}.statepool"), bundle=False)
    for name in uids:
        assert server.settled(name)["status"] == "ready"
    files = list(server.directory.glob(f"carts/[0-9]*/{uid}-*/{uid}-*.statepool"))
    assert len(files) == 20
    assert len({path.stat().st_ino for path in files}) == 1
    assert len(shared(server)) == 1
    assert len({blake3.blake3(path.read_bytes()).hexdigest() for path in files}) == 1
    for name in uids:
        assert server.curl("-X", "DELETE", path=f"/{name}").status == 200
    assert shared(server) == []
    locks = [path.name for path in (server.directory / "carts/locks").iterdir()]
    assert [name for name in locks if name.startswith("shared.")] == []


@pytest.mark.parametrize("how", ["changed", "shorter"])
def test_an_export_that_was_damaged_is_not_given_to_others(
    serve: Callable[..., CartServer], uid: str, pool: Path, how: str
) -> None:
    server = serve(settings=POOLS.format(pool=pool))
    server.post(f"{uid}-1", export("vm1/disk/install", "x"), bundle=False)
    assert server.settled(f"{uid}-1")["status"] == "ready"
    [path] = shared(server)
    [whole] = content(server.download(f"{uid}-1")).values()
    with path.open("r+b") as file:
        if how == "shorter":
            file.truncate(4096)
        else:
            file.seek(-2000, os.SEEK_END)
            file.write(b"damaged")
    server.post(f"{uid}-2", export("vm1/disk/install", "x"), bundle=False)
    status = server.settled(f"{uid}-2")
    if how == "changed":
        assert "was damaged" in status["error"]
        server.post(f"{uid}-2", export("vm1/disk/install", "x"), bundle=False)
        until(lambda: server.status(f"{uid}-2")["status"] == "ready")
    assert content(server.download(f"{uid}-2")) == {f"{uid}-2/x": whole}


def test_a_cart_in_export_form_is_imported(
    server: CartServer, uid: str, run_statepool: Callable[..., Any], tmp_path: Path, pool: Path
) -> None:
    """A machine with its RAM, and an image, in one cart, without a file in between."""
    new = ("cart", "new", server.url, "--uid", uid, "--archive", "pools", "--export")
    run_statepool(*new, "vm1/on", "vm1/disk/install=i")
    get = ("--cache", "mine", "cart", "get", f"{server.url}/{uid}", "--import")
    said = run_statepool(*get).out.splitlines()
    assert {line.partition(":")[0] for line in said} == {"vm1 on", "vm1/disk install"}
    assert all(line.endswith("; every byte was checked") for line in said)
    paths = {one["path"] for one in server.status(uid)["files"]}
    assert paths == {"vm1/on.statepool", "i"}
    run_statepool("init", "other")
    again = run_statepool(*get, "--to", "other", "--json").json["imported"]
    assert [one["bytes"] for one in again] == [0, 0]
    assert {one["stored"]["result"] for one in again} == {"stored"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other"]
    on = statepool.StatePool(tmp_path / "mine")
    [ram] = [part for part in on.parts("vm1", "on") if part.kind is Kind.RAM]
    with on.open_bytes(ram) as descriptor:
        assert os.pread(descriptor, len(RAM) + 1, 0) == RAM
    run_statepool("--cache", "mine", "get", "vm1/disk", "customize", "--to", "work.qcow2")
    qemu("qemu-img", "compare", tmp_path / "work.qcow2", pool / "vm1/disk/customize.qcow2")


@pytest.mark.parametrize("cut", [True, False])
def test_nothing_is_imported_of_what_is_not_whole(
    server: CartServer, uid: str, stack: ExitStack, tmp_path: Path, cut: bool
) -> None:
    server.post(uid, export("vm1/disk/customize", "x"))
    server.settled(uid)
    wire = stack.enter_context(run_wire(server))
    cart = Cart(CartService(wire.url, patience=0), uid)
    pool = statepool.StatePool(tmp_path / "mine")
    if cut:
        wire.cuts = [1 << 20]
    else:
        wire.replaced = {b"\2" * 4096: b"\2" * 4095 + b"\3"}
    with pytest.raises(statepool.TransportError if cut else statepool.IntegrityError):
        cart.import_into(pool)
    assert list(pool.show()) == []
    wire.replaced.clear()
    wire.cuts = [1 << 20, 1 << 19]
    patient = Cart(CartService(wire.url), uid)
    assert [one.state for one in patient.import_into(pool)] == ["customize"]


def test_a_state_in_export_form_that_the_cache_loses(
    serve: Callable[..., CartServer], interface: FakeInterface, pool: Path
) -> None:
    """It is fetched once more when its turn comes."""
    far = f'archives.far = {{ type = "interface", url = "{interface.url}" }}\n'
    server = serve(settings=POOLS.format(pool=pool) + far)
    interface.gate.clear()
    server.post("one", entry("foo.txt", "a", archive="far"), export("vm1/disk/install", "b"))
    until(lambda: "GET foo.txt" in interface.asked)
    cache = statepool.StatePool(server.directory / "cache")
    cache.image("vm1/disk").unset("install", cascade=True)
    interface.gate.set()
    assert server.settled("one")["status"] == "ready"


@pytest.mark.parametrize("name", ["vm1/root", "vm1/disk/none"])
def test_what_cannot_be_exported(server: CartServer, uid: str, name: str) -> None:
    server.post(uid, export(name, "x"))
    assert server.settled(uid)["status"] == "error"


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_blocks_are_shared_where_the_file_system_can(
    tmp_path: Path, stack: ExitStack, pool: Path, kind: str
) -> None:
    """Also those of a tar that was made in advance: the data of its members is aligned."""
    needs_root()
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"mkfs.{kind} is not installed (Debian: xfsprogs, btrfs-progs)")
    with (tmp_path / "image").open("wb") as file:
        file.truncate(400 << 20)
    qemu(f"mkfs.{kind}", "-q", tmp_path / "image")
    place = stack.enter_context(mounted(tmp_path / "there", "-o", "loop", tmp_path / "image"))
    server = start(stack, place, settings=POOLS.format(pool=pool))
    for uid, bundle in (("one", True), ("two", False)):
        server.post(uid, customize(), bundle=bundle)
        assert server.settled(uid)["status"] == "ready"
    assert server.download("one")[10_240:] == server.download("two")[10_240:]
    for path in (place / "carts/1/one.tar", place / "carts/2/two/vms/tip.qcow2"):
        said = subprocess.run(["filefrag", "-v", path], capture_output=True, text=True, check=True)
        assert "shared" in said.stdout, said.stdout
