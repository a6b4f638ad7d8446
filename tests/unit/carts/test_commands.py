"""``statepool serve`` and ``carts`` at the shell; configurations of Cartd; served pools."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.carts import CartServer, FakeInterface, run_server
from tests.unit.carts.conftest import FILES, start
from tests.unit.carts.test_cartd import FOO, content, entry

import statepool

SETTINGS = '[serve]\ndirectory = "carts"\nconnect-attempts = 1\n'

CARTD_2_0 = """
create table cartsystem(part varchar(255) not null primary key, value integer not null);
insert into cartsystem values ('major', 2), ('minor', 0);
create table cart(id integer not null primary key, cart_uid varchar(255) not null,
    bundle_path varchar(255) not null, bundle integer, creation_date datetime not null,
    updated_date datetime not null, deleted_date datetime, status text not null,
    error text not null);
create table carttasks(id integer not null primary key, cart_id integer not null
    references cart(id), celery_task_id varchar(255) not null);
create table file(id integer not null primary key, cart_id integer not null references cart(id),
    file_name varchar(255) not null, bundle_path varchar(255) not null, hash_type varchar(255),
    hash_value varchar(255), status text not null, error text not null);
"""
"""As Cartd 0.7.0 makes its tables."""


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "statepool.toml"
    path.write_text(SETTINGS)
    return path


def test_the_database_is_made_checked_and_migrated(
    run_statepool: Callable[..., Any], settings: Path, tmp_path: Path
) -> None:
    missing = run_statepool("carts", "dbchk", code=4)
    assert "has no tables yet (statepool carts dbsync)" in missing.err
    assert run_statepool("carts", "dbsync").out == "the database has the version 3.0 now\n"
    assert run_statepool("carts", "dbsync").out == "the database has the version 3.0 already\n"
    assert run_statepool("carts", "dbchk", "--equal").out == "the database has the version 3.0\n"


def test_a_database_of_cartd_is_migrated(
    run_statepool: Callable[..., Any], settings: Path, tmp_path: Path
) -> None:
    (tmp_path / "carts").mkdir(mode=0o700)
    tar = tmp_path / "carts/7/old.tar"
    tar.parent.mkdir()
    tar.write_bytes(b"what Cartd has made")
    with sqlite3.connect(tmp_path / "carts/carts.sqlite") as database:
        database.executescript(CARTD_2_0)
        row = (7, "old", str(tar), 1, "2020-01-01 00:00:00", "2020-01-01 00:00:00", "ready", "")
        columns = "id, cart_uid, bundle_path, bundle, creation_date, updated_date, status, error"
        database.execute(f"insert into cart({columns}) values (?,?,?,?,?,?,?,?)", row)
    refused = run_statepool("serve", "--port", "0", code=4)
    assert "has the version 2.0, not 3.0 (make a copy of it, then: statepool" in refused.err
    assert run_statepool("carts", "dbsync").out.endswith("version 3.0 now, from 2.0\n")
    with run_server(tmp_path) as server:
        assert server.download("old") == b"what Cartd has made"
    assert run_statepool("carts", "purge", "--time-ago", "7 days ago").out == ""
    with sqlite3.connect(tmp_path / "carts/carts.sqlite") as database:
        database.execute("update cart set updated_date = '2020-01-01 00:00:00'")
    assert run_statepool("carts", "purge", "--dry-run").out == "old: would be deleted\n"
    assert run_statepool("carts", "purge").out == "old: deleted\n"
    assert not tar.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("update cartsystem set value = 9", "has the version 9.9, which is not known here"),
        ("drop table file; create table file(x)", "the table file of"),
    ],
)
def test_other_databases_are_left_as_they_are(
    run_statepool: Callable[..., Any], settings: Path, tmp_path: Path, change: str, message: str
) -> None:
    (tmp_path / "carts").mkdir(mode=0o700)
    path = tmp_path / "carts/carts.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript(CARTD_2_0 + change)
        before = list(database.iterdump())
    assert message in run_statepool("carts", "dbsync", code=None).err
    with sqlite3.connect(path) as database:
        assert list(database.iterdump()) == before


def test_carts_are_dumped_and_fixed(
    run_statepool: Callable[..., Any], serve: Callable[..., CartServer]
) -> None:
    server = serve()
    server.post("bad", entry("late", "x"))
    server.settled("bad")
    server.stop()
    dumped = run_statepool("carts", "dump", "--json").json["carts"]
    assert [(cart["uid"], cart["status"]) for cart in dumped] == [("bad", "error")]
    assert dumped[0]["files"][0]["status"] == "error"
    assert "bad" in run_statepool("carts", "dump").out
    unknown = run_statepool("carts", "fixit", "--cartid", "99", code=3)
    assert "no cart 99 is in error" in unknown.err
    assert run_statepool("carts", "fixit").out == "bad: begun again\n"
    (server.directory / "files/late").write_bytes(b"late")
    server.start()
    assert server.settled("bad")["status"] == "ready"
    assert run_statepool("carts", "purge", "--time-ago", "soon", code=2).err
    assert run_statepool("carts", "purge", "--time-ago", "0 seconds ago").out == "bad: deleted\n"


def test_tokens(run_statepool: Callable[..., Any], settings: Path, tmp_path: Path) -> None:
    token = run_statepool("carts", "token", "add", "anna", "--objects", "vm1/*").out.strip()
    assert len(token) > 40
    for path in (tmp_path / "carts").iterdir():
        assert path.is_dir() or token.encode() not in path.read_bytes()
    again = run_statepool("carts", "token", "add", "anna", code=4)
    assert "there is a token anna already" in again.err
    assert run_statepool("carts", "token", "add", "a b", code=2).err
    assert run_statepool("carts", "token", "add", "x", "--read", "--write", code=2).err
    listed = run_statepool("--json", "carts", "token", "list").json
    assert listed == {"tokens": [{"name": "anna", "write": False, "objects": "vm1/*"}]}
    assert run_statepool("carts", "token", "remove", "anna").out == "anna: removed\n"
    assert "there is no token anna" in run_statepool("carts", "token", "remove", "anna", code=3).err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bundel = true", "serve.bundel: there is no such setting"),
        ('transfer-size = "4 MiB"', "serve.transfer-size: '4 MiB' is not a size"),
        ("port = 70000", "serve.port: 70000 is not a TCP port"),
        ("workers = 0", "serve.workers: 0 is not a count"),
        ("timeout = -1", "serve.timeout: -1 is not a number of seconds"),
        ('bundle = "perhaps"', "serve.bundle: 'perhaps' is neither true nor false"),
        ('trust-header = "X-User"', "would be believed from anywhere"),
        ('certificate = "x.pem"', "TLS needs both a certificate and a key"),
        ('certificate = "x.pem"\nkey = "y.pem"', "TLS with "),
        ('archive = "none"', "there is no archive 'none'"),
        ('archives.x = { type = "none" }', "archives.x: there is no type 'none'"),
        (
            'archives.x = { type = "directory", path = "x" }',
            "x: a directory has one option",
        ),
        (
            'archives.x = { type = "interface", url = "ftp://x/" }',
            "x: an archive interface",
        ),
        ('tasks = "cron"', "serve.tasks: 'cron' cannot run tasks"),
        ('tasks = "celery"', "Celery needs a broker: Redis or RabbitMQ"),
        ('tasks = "celery"\nbroker = "sqs://x"', "Celery needs a broker: Redis or RabbitMQ"),
        ('tasks = "celery"\nbroker = "redis://x:y"', "Celery needs a broker: Redis or RabbitMQ"),
        (
            'tasks = "celery"\nbroker = "redis://x"\nresult-backend = "x"',
            "Celery's results can be in Redis or RabbitMQ only",
        ),
        (
            'tasks = "celery"\nbroker = "amqp://me:secret@127.0.0.1:9/"\nconnect-attempts = 1',
            "the broker amqp://me:…@127.0.0.1:9/ cannot be used",
        ),
        ('database = "mysql://x/y"', "is of no kind that is known"),
        ('pools = { store = "/nowhere" }', "there is no pool at /nowhere"),
        ('address = "192.0.2.1"', "cannot listen on 192.0.2.1 port"),
        ("max-body = true", "serve.max-body: True is not a size"),
    ],
)
def test_settings_that_cannot_be(
    run_statepool: Callable[..., Any], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "statepool.toml").write_text(f'[serve]\ndirectory = "carts"\n{text}\n')
    ran = run_statepool("serve", code=None)
    assert ran.code in (2, 7)
    assert message in ran.err


def test_a_section_that_is_none(run_statepool: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "statepool.toml").write_text("serve = 7\n")
    assert "serve: it is not a section" in run_statepool("show", code=2).err


def test_a_configuration_of_cartd_is_read_as_it_is(
    stack: ExitStack, tmp_path: Path, interface: FakeInterface
) -> None:
    """That of its documentation, but for the places."""
    (tmp_path / "cartd.ini").write_text(
        f"""[cartd]
; Local directory to stage data
volume_path = {tmp_path}/volume/
; Least recently used buffer time
lru_buffer_time = 0
; Bundle backend task enable/disable
bundle_task = True
color = green

[archiveinterface]
url = {interface.url}

[celery]
broker_url = pyamqp://
backend_url = rpc://

[database]
peewee_url = sqliteext:///{tmp_path}/db.sqlite3
connect_attempts = 10
connect_wait = 20
"""
    )
    server = CartServer(tmp_path, {}, ("--config", "cartd.ini")).start()
    stack.callback(server.stop)
    assert "without meaning here: [cartd] color\n" in server.said()
    server.post("one", FOO)
    status = server.settled("one")
    assert status["bundle"] is True
    assert content(server.download("one")) == {"one/1/2/3/foo.txt": FILES["foo.txt"]}
    assert (tmp_path / "volume/cartuids/one").resolve() == tmp_path / "volume/1/one.tar"


# -- served pools ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CartServer]:
    directory = tmp_path_factory.mktemp("shelf")
    statepool.init(directory / "pool")
    data = directory / "pool/.statepool/data/blake3-00"
    data.write_bytes(b"0123456789" * 1000)
    view = directory / "pool/vm1/disk/install.qcow2"
    view.parent.mkdir(parents=True)
    view.symlink_to("../../.statepool/data/blake3-00")
    (directory / "secret").write_text("classified")
    (view.parent / "out.qcow2").symlink_to("../../../secret")
    (view.parent / "sly.qcow2").symlink_to("../../.statepool/data/../../../secret")
    (directory / "pool/.statepool/incoming/x").write_text("work in progress")
    with ExitStack() as stack:
        yield start(stack, directory, "--pool", f"store={directory}/pool")


def test_pools_are_served_in_part(shelf: CartServer) -> None:
    whole = shelf.curl(path="/pools/store/vm1/disk/install.qcow2")
    assert whole.body == b"0123456789" * 1000
    assert whole.headers["etag"] == '"blake3-00"'
    data = "/pools/store/.statepool/data/blake3-00"
    assert shelf.curl("-r", "5-7", path=data).body == b"567"
    head = shelf.curl("-I", path=data)
    assert (head.status, head.headers["content-length"], head.body) == (200, "10000", b"")
    assert "format" in json.loads(shelf.curl(path="/pools/store/.statepool/pool.json").body)


def test_directories_of_pools_are_listed(shelf: CartServer) -> None:
    names = [one["name"] for one in shelf.curl(path="/pools/store/.statepool/").json["entries"]]
    assert names == ["data", "log", "pool.json"]
    assert {"name": "vm1", "kind": "directory"} in shelf.curl(path="/pools/store/").json["entries"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("store/none", 404),
        ("store/vm1/disk", 404),
        ("store/vm1/disk/out.qcow2", 404),
        ("store/vm1/disk/sly.qcow2", 404),
        ("store/.statepool/incoming/x", 404),
        ("store/.statepool/incoming/", 404),
        ("store/../secret", 400),
        ("store/%2e%2e/secret", 400),
        ("store/vm1/%2e%2e/%2e%2e/secret", 400),
        ("store//etc/passwd", 404),
        ("other/.statepool/pool.json", 404),
    ],
)
def test_nothing_else_is_served(shelf: CartServer, path: str, status: int) -> None:
    answer = shelf.curl(path=f"/pools/{path}")
    assert answer.status == status
    assert b"classified" not in answer.body


def test_pools_are_only_read(shelf: CartServer) -> None:
    for method in ("PUT", "POST", "DELETE", "PATCH"):
        answer = shelf.curl("-X", method, path="/pools/store/vm1/disk/install.qcow2")
        assert answer.status == 405


@pytest.mark.parametrize(
    ("name", "options", "extras"),
    [("flask", [], "serve"), ("redis", ["--tasks", "celery"], "serve,celery")],
)
def test_what_is_missing_is_named(
    tmp_path: Path, name: str, options: list[str], extras: str
) -> None:
    (tmp_path / "statepool.toml").write_text('[serve]\nbroker = "redis://127.0.0.1:9"\n')
    code = f"import sys; sys.modules[{name!r}] = None\n"
    code += f"sys.argv = ['statepool', 'serve', *{options}]\n"
    code += "from statepool.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    said = f"statepool: the service needs {name}, which is not installed"
    assert done.stderr == f"{said} (pip install statepool[{extras}])\n"
