"""
A cache that a group shares, and a pool that belongs to another account: what they leave there is
never obeyed, and no path in it leads out.

The attacker is another account of this host; the victim is the account of the tests, which must be
root to be able to play both.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import statepool
from pytest_statepool.provision import Provisioner
from pytest_statepool.tally import Tally
from statepool.pools import layout
from statepool.transports.base import Entry
from statepool.transports.local import LocalTransport

ATTACKER = 64_321
"""The number of an account that no host has."""

DEAD = {"host": os.uname().nodename, "boot": "long-ago", "space": 0, "pid": 1, "start": 1}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another account")


def as_attacker(code: str, *arguments: Path | str) -> None:
    """
    Run Python code as another account, which belongs to the group of the cache (0): in a child,
    since it may not reach this interpreter.
    """
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(ATTACKER, ATTACKER, ATTACKER)
            os.umask(0o002)
            sys.argv = ["-c", *map(str, arguments)]
            # it is ours
            exec(compile(code, "the attacker", "exec"), {"__name__": "__main__"})  # noqa: S102
        except BaseException:  # noqa: BLE001  # a child of a test must end here, whatever it raises
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


PLANT = "import sys, os; open(sys.argv[1], 'w').write(sys.argv[2])"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every account can reach, as those of pytest are not."""
    path = (
        Path("/tmp" if os.access("/tmp", os.W_OK) else "/var/tmp")
        / f"statepool-test-{os.getpid()}-{time.monotonic_ns()}"
    )
    path.mkdir()
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def shared(place: Path) -> statepool.StatePool:
    """A cache that a group shares, with one state that only it has, and one from a source."""
    cache = place / "cache"
    cache.mkdir()
    cache.chmod(0o2775)
    statepool.init(place / "pool")
    for name, value in (("work", 1), ("other", 2)):
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", place / f"{name}.qcow2", "1M"],
            check=True,
            timeout=60,
        )
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", f"write -q -P {value} 0 64k", place / f"{name}.qcow2"],
            check=True,
            timeout=60,
        )
    before = os.umask(0o002)
    try:
        pool = statepool.StatePool(cache, [place / "pool"])
        pool.image("vm1/disk").set("install", source=place / "work.qcow2")
    finally:
        os.umask(before)
    return pool


@pytest.fixture
def precious(place: Path) -> Callable[[], None]:
    """
    Files of the victim, out of the attacker's reach. :returns: what shows that they are as they
    were
    """
    directory = place / "rootonly"
    directory.mkdir(mode=0o700)
    names = ("precious", "work.qcow2", "config.json", "0123456789abcdef.json", "x.tmp", "a.lock")
    for name in names:
        (directory / name).write_text('{"format": 1, "precious": true}')
        os.utime(directory / name, (1e9, 1e9))

    def check() -> None:
        assert {path.name: path.read_text() for path in directory.iterdir()} == dict.fromkeys(
            names, '{"format": 1, "precious": true}'
        )

    return check


def everything(pool: statepool.StatePool, place: Path) -> None:
    """
    What a victim does, one after the other, whatever each comes to: refusing is as good as doing.
    """
    disk = pool.image("vm1/disk")
    for step in (
        lambda: disk.check("install"),
        lambda: disk.get("install", to=place / "test.qcow2", overwrite=True),
        lambda: disk.set("again", source=place / "other.qcow2"),
        disk.show,
        pool.verify,
        lambda: pool.gc(everywhere=True),
        lambda: disk.unset("again", scope="own swarm cluster shared"),
        lambda: disk.unset("install"),
        lambda: disk.get("install"),
        pool.gc,
        pool.doctor,
    ):
        try:
            step()
        except (statepool.StatePoolError, OSError):
            continue


# -- markers ---------------------------------------------------------------------------------------


def get_machine(place: Path) -> dict[str, str]:
    home = place / "attacker"
    places = [
        {"to": str(home / "a"), "temporary": str(home / "b.tmp"), "before": ""},
        {"to": str(place / "victim/evil.sh"), "temporary": str(home / "evil.tmp"), "before": ""},
        {
            "to": str(place / "nothing"),
            "temporary": str(place / "rootonly/precious"),
            "before": "x",
        },
    ]
    return {"intent": "get-machine", "places": json.dumps(places)}


def manifest(place: Path, **more: object) -> dict[str, object]:
    (found,) = (path for path in (place / "cache/.statepool/data").iterdir())
    digest = found.name.replace("-", ":", 1)
    return {
        "object": "vm1/disk",
        "state": "evil",
        "size": found.stat().st_size,
        "digest": digest,
        "virtual_size": 1 << 20,
        "cluster_size": 65536,
        **more,
    }


def set_image(place: Path) -> dict[str, str]:
    facts = {
        "intent": "set",
        "working": str(place / "rootonly/work.qcow2"),
        "backing": "/etc/passwd",
        "mode": "511",
        "replace": "yes",
    }
    return {**facts, "manifest": json.dumps(manifest(place))}


def set_machine(place: Path) -> dict[str, str]:
    ram = {**manifest(place), "object": "vm1", "kind": "ram", "fingerprint": {}}
    status = (place / "rootonly/precious").lstat()
    stamp = f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
    part = {
        "source": str(place / "rootonly/precious"),
        "manifest": ram,
        "linked": False,
        "backing": "",
        "mode": 511,
        "stamp": stamp,
    }
    machine = {
        "object": "vm1",
        "state": "evil",
        "kind": "machine",
        "size": 0,
        "members": {"ram": ram["digest"]},
    }
    return {
        "intent": "set-machine",
        "replace": "yes",
        "machine": json.dumps(machine),
        "parts": json.dumps([part]),
    }


def planted_marker(place: Path, facts: Callable[[Path], dict[str, str]]) -> dict[str, object]:
    """
    :returns: a marker whose facts name the files of the attacker and of the victim, which it makes
    """
    for name in ("attacker", "victim"):
        (place / name).mkdir()
    os.chown(place / "attacker", ATTACKER, 0)
    as_attacker(
        "import os, sys; os.chdir(sys.argv[1]); open('evil.tmp', 'w'); open('a', 'w').close();"
        " os.link('a', 'b.tmp')",
        place / "attacker",
    )
    return {
        "format": 1,
        "digests": [manifest(place)["digest"]],
        "writer": DEAD,
        "facts": facts(place),
    }


@pytest.mark.parametrize("facts", [get_machine, set_image, set_machine])
def test_a_marker_of_another_account(
    place: Path,
    shared: statepool.StatePool,
    precious: Callable[[], None],
    facts: Callable[[Path], dict[str, str]],
) -> None:
    marker = planted_marker(place, facts)
    path = place / "cache" / layout.marker("deadbeefdeadbeef")
    as_attacker(PLANT, path, json.dumps(marker))
    gathered = (
        place
        / "cache"
        / layout.incoming(
            "deadbeefdeadbeef", statepool.Digest.parse(str(manifest(place)["digest"]))
        )
    )
    as_attacker(PLANT, gathered, "bytes that are not those")
    found = [finding for finding in shared.doctor() if "unfinished" in finding.what]
    assert [finding.level.value for finding in found] == ["warning"]
    everything(shared, place)
    precious()
    assert list((place / "victim").iterdir()) == []
    assert not (place / "nothing").exists()
    assert path.exists(), "it is its writer's to end"


@pytest.mark.parametrize("facts", [get_machine, set_image, set_machine])
def test_a_file_of_the_victim_that_becomes_a_marker(
    place: Path,
    shared: statepool.StatePool,
    precious: Callable[[], None],
    facts: Callable[[Path], dict[str, str]],
) -> None:
    """What a group may write to, and rename, need not say what its owner wrote."""
    marker = planted_marker(place, facts)
    shared.image("vm1/disk").set("again", source=place / "other.qcow2")
    record = max((place / "cache/.statepool/log/vm1").iterdir())
    assert record.stat().st_uid == 0
    path = place / "cache" / layout.marker("deadbeefdeadbeef")
    as_attacker(PLANT + "; os.rename(sys.argv[1], sys.argv[3])", record, json.dumps(marker), path)
    everything(shared, place)
    precious()
    assert list((place / "victim").iterdir()) == []
    assert not (place / "nothing").exists()


UNDER_WAY = """
import os, sys
from pathlib import Path
import statepool
from statepool.cache import get_journal
place = Path(sys.argv[1])
get_journal.Place.put = lambda _: os._exit(0)
pool = statepool.StatePool(place / "cache", [place / "pool"])
cache = pool._cache
chain = cache.pool.chain(statepool.StateId("vm1/disk", "install"))
get_journal.make_together(cache, {place / "run/disk.qcow2": chain}, overwrite=False)
"""


def test_an_own_marker_is_obeyed(place: Path, shared: statepool.StatePool) -> None:
    """Also in a cache that others can write to, and whatever they have made of it."""
    (place / "run").mkdir()
    subprocess.run([sys.executable, "-c", UNDER_WAY, place], check=True, timeout=60)
    (path,) = (place / "cache" / layout.INCOMING).glob("*.json")
    assert len(list((place / "run").iterdir())) == 2
    as_attacker(
        PLANT,
        path,
        json.dumps({"format": 1, "digests": [], "writer": DEAD, "facts": get_machine(place)}),
    )
    shared.image("vm1/disk").get("install")
    assert list((place / "run").iterdir()) == []
    assert not path.exists()
    assert not list((place / "cache/.statepool/accounts/0/markers").iterdir())


# -- notes -----------------------------------------------------------------------------------------


def test_a_note_that_other_bytes_were_hashed(place: Path, shared: statepool.StatePool) -> None:
    """
    The attacker puts other bytes in the place of a state, and a note that they have been looked at,
    wherever a note could be.
    """
    disk = shared.image("vm1/disk")
    disk.get("install")
    (data,) = (place / "cache/.statepool/data").iterdir()
    good = data.read_bytes()
    evil = """
import json, os, sys
data, cache, boot = sys.argv[1:]
content = open(data, "rb").read()
os.unlink(data)
open(data, "wb").write(content[:-4] + b"evil")
found = os.stat(data)
os.utime(data, (1e9, 1e9))
found = os.stat(data)
signature = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
note = {"format": 1, "signature": signature, "boot": boot, "flushed": True, "source": "file:///nowhere"}
name = os.path.basename(data) + ".json"
for place in ("trust", "accounts/0/trust", "accounts/%d/trust" % os.getuid()):
    try:
        os.makedirs(f"{cache}/.statepool/{place}", exist_ok=True)
        json.dump(note, open(f"{cache}/.statepool/{place}/{name}", "w"))
    except PermissionError:
        pass
"""
    as_attacker(
        evil, data, place / "cache", Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    )
    assert data.read_bytes() != good
    disk.get("install", to=place / "test.qcow2")
    (data,) = (place / "cache/.statepool/data").iterdir()
    assert data.read_bytes() == good


def test_a_directory_in_the_place_of_an_accounts_own(
    place: Path, shared: statepool.StatePool
) -> None:
    """What another account has put there is not used, and doctor tells; everything else works."""
    shutil.rmtree(place / "cache/.statepool/accounts")
    as_attacker(
        "import os, sys; os.makedirs(sys.argv[1]); os.chmod(sys.argv[1], 0o777)",
        place / "cache/.statepool/accounts/0",
    )
    shared = statepool.StatePool(place / "cache", [place / "pool"])
    assert shared.image("vm1/disk").get("install", to=place / "test.qcow2").bytes == 0
    with pytest.raises(statepool.AccessDenied, match="belongs to another account"):
        shared.working_directory()
    assert [finding.level.value for finding in shared.doctor() if "accounts/0" in finding.what] == [
        "warning"
    ]
    assert os.listdir(place / "cache/.statepool/accounts/0") == []


def test_working_images_of_other_accounts(
    place: Path, shared: statepool.StatePool, precious: Callable[[], None]
) -> None:
    """
    A directory of a process that is gone, with what leads elsewhere: of pytest, of avocado, and of
    our own.
    """
    own = shared.working_directory()
    evil = """
import json, os, sys
working, victim, dead = sys.argv[1:]
os.makedirs(working, exist_ok=True)
os.chdir(working)
for name in ("passing-0123", "pytest-1-1/x", "avocado-job/test/elsewhere"):
    os.makedirs(name)
json.dump(json.loads(dead), open("passing-0123/writer.json", "w"))
open("pytest-1-1/run.lock", "w").close()
open("avocado-job.lock", "w").close()
for place in ("passing-0123", "pytest-1-1/x", "avocado-job/test/elsewhere"):
    os.symlink(victim, place + "/more")
    os.symlink(victim + "/work.qcow2", place + "/0.qcow2")
"""
    as_attacker(evil, place / "cache/.statepool/working", place / "rootonly", json.dumps(DEAD))
    assert own.stat().st_uid == 0
    with shared.image("vm1/disk").working("install") as path:
        assert path.is_relative_to(own)
    shared.gc(everywhere=True)
    everything(shared, place)
    precious()
    assert (place / "cache/.statepool/working/passing-0123/writer.json").exists()


def test_the_directory_of_a_run_is_exchanged(place: Path, shared: statepool.StatePool) -> None:
    """
    For one in which links lead to other images of this account, while tests use those of the run.
    """
    victim = place / "rootonly"
    victim.mkdir(mode=0o700)
    shutil.copy(place / "other.qcow2", victim / "0.qcow2")
    base = shared.working_directory()
    run = Provisioner(shared, Tally())
    (run._directory / "x").mkdir()
    evil = """
import os, sys
accounts, directory, victim = sys.argv[1:]
os.rename(accounts, accounts + "-before")
os.makedirs(directory)
os.symlink(victim, directory + "/x")
"""
    as_attacker(evil, base.parent.parent, run._directory, victim)
    run.close()
    assert (victim / "0.qcow2").exists()


def test_a_record_of_a_use_names_what_is_not_its_writers(
    place: Path, shared: statepool.StatePool, precious: Callable[[], None]
) -> None:
    shared.image("vm1/disk").get("install", to=place / "test.qcow2")
    (uses,) = place.glob("cache/.statepool/chains/*/.uses")
    (place / "rootonly/.statepool-feedfeedfeedfeed.tmp").write_bytes(b"in the making")
    record = {
        "format": 1,
        "working": str(place / "rootonly/precious"),
        "missing_since": None,
        "writer": DEAD,
    }
    as_attacker(PLANT, uses / "feedfeedfeedfeed.json", json.dumps(record))
    for _ in range(2):  # noted by this account once, it is still nothing that this account has said
        statepool.StatePool(place / "cache", [place / "pool"]).gc()
    assert (place / "rootonly/.statepool-feedfeedfeedfeed.tmp").read_bytes() == b"in the making"
    (place / "rootonly/.statepool-feedfeedfeedfeed.tmp").unlink()
    precious()


# -- links in the place of directories -------------------------------------------------------------

OF_POOLS = ["data", "log", "log/vm1", "incoming", "trash", "locks", "uses"]
OF_CACHES = ["chains", "accounts", "trust", "fresh", "known", "working"]


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("cache", "accounts/0"),
        *((where, name) for where in ("cache", "pool") for name in OF_POOLS + OF_CACHES),
    ],
)
def test_a_link_in_the_place_of_a_directory(
    place: Path, shared: statepool.StatePool, precious: Callable[[], None], where: str, name: str
) -> None:
    path = place / where / layout.OURS / name
    if path.is_dir():
        path.rename(path.with_name(f"{path.name}-before"))
    path.symlink_to(place / "rootonly")
    everything(statepool.StatePool(place / "cache", [place / "pool"]), place)
    precious()


@pytest.mark.parametrize("where", ["cache", "pool"])
def test_a_link_in_the_place_of_all_that_is_ours(
    place: Path, shared: statepool.StatePool, precious: Callable[[], None], where: str
) -> None:
    (place / where / layout.OURS).rename(place / where / "before")
    (place / where / layout.OURS).symlink_to(place / "rootonly")
    everything(statepool.StatePool(place / "cache", [place / "pool"]), place)
    precious()


@pytest.mark.parametrize("name", ["vm1", "vm1/disk"])
@pytest.mark.parametrize("where", ["cache", "pool"])
def test_a_link_in_the_view(
    place: Path, shared: statepool.StatePool, precious: Callable[[], None], where: str, name: str
) -> None:
    (place / where / name).rename(place / where / f"{name}-before")
    (place / where / name).symlink_to(place / "rootonly")
    everything(statepool.StatePool(place / "cache", [place / "pool"]), place)
    precious()


def test_records_of_uses_behind_a_link(
    place: Path, shared: statepool.StatePool, precious: Callable[[], None]
) -> None:
    """In a pool of another account, as if it were a cache."""
    chain = place / "pool/.statepool/chains" / f"blake3-{0:064d}"
    chain.mkdir(parents=True)
    (chain / ".uses").symlink_to(place / "rootonly")
    everything(shared, place)
    shared.image("vm1/disk").set("more", source=place / "other.qcow2", replace=True)
    precious()


def noted(cache: Path) -> dict[Path, int]:
    files = (path for path in cache.rglob("*") if path.is_file() and path.parent.name != "locks")
    return {path: path.lstat().st_mtime_ns for path in files}


def test_nothing_is_noted_in_the_cache_of_a_neighbour(
    place: Path, shared: statepool.StatePool
) -> None:
    neighbour = statepool.StatePool(place / "neighbour", [place / "pool"])
    neighbour.image("vm1/disk").get("install", to=place / "gone.qcow2")
    (place / "gone.qcow2").unlink()
    before = noted(place / "neighbour")
    third = statepool.StatePool(place / "third", [place / "neighbour"])
    third.image("vm1/disk").get("install")
    third.gc(everywhere=True)
    assert noted(place / "neighbour") == before


@pytest.mark.parametrize("name", [layout.INCOMING, layout.TRASH, layout.DATA, f"{layout.LOG}/vm1"])
def test_a_directory_that_is_swapped_after_it_was_listed(
    place: Path,
    shared: statepool.StatePool,
    precious: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The owner of a pool exchanges a directory while a collector is at work in it."""
    for path in (place / "rootonly").iterdir():
        if (place / "pool" / name).is_dir():
            (place / "pool" / name / path.name).touch()
            os.utime(place / "pool" / name / path.name, (1, 1))
    real = LocalTransport.scan

    def scan(transport: LocalTransport, directory: str) -> list[Entry]:
        found = real(transport, directory)
        path = place / "pool" / name
        if (
            directory == name
            and transport.location.path == str(place / "pool")
            and not path.is_symlink()
        ):
            path.rename(path.with_name("real"))
            path.symlink_to(place / "rootonly")
        return found

    monkeypatch.setattr(LocalTransport, "scan", scan)
    everything(statepool.StatePool(place / "cache", [place / "pool"]), place)
    precious()


def test_a_chain_link_that_leads_elsewhere(place: Path, shared: statepool.StatePool) -> None:
    """A guest must not be given another file as its disk."""
    disk = shared.image("vm1/disk")
    disk.get("install", to=place / "test.qcow2")
    (chain,) = place.glob("cache/.statepool/chains/blake3-*")
    as_attacker(
        "import os, sys; os.unlink(sys.argv[1]); os.symlink('/etc/hostname', sys.argv[1])",
        chain / "install.qcow2",
    )
    with pytest.raises(statepool.UnsafeImage, match="chain-link"):
        disk.get("install", to=place / "other-test.qcow2")


def test_data_that_is_a_link_elsewhere(place: Path, shared: statepool.StatePool) -> None:
    """
    Only a link pool's files are behind links, and only those that this account knows to come from
    there.
    """
    (data,) = (place / "cache/.statepool/data").iterdir()
    good = data.read_bytes()
    (place / "same").write_bytes(good)
    as_attacker(
        "import os, sys; os.unlink(sys.argv[1]); os.symlink(sys.argv[2], sys.argv[1])",
        data,
        place / "same",
    )
    shared.image("vm1/disk").get("install", to=place / "test.qcow2")
    assert not data.is_symlink()
    assert data.read_bytes() == good


def test_no_path_in_a_pool_or_cache_is_opened_by_its_name(
    place: Path, shared: statepool.StatePool
) -> None:
    """
    The interpreter tells of every path that is given to the system; those beneath a directory are
    relative.
    """
    journey = """
import os, sys
place = sys.argv[1]
roots = tuple(f"{place}/{name}/" for name in ("cache", "pool", "second"))
working = f"{place}/cache/.statepool/accounts/0/working/"
found = []
def hook(event, arguments):
    if event in ("os.putenv", "os.unsetenv", "os.fork"):
        return
    if event == "open" or event.startswith(("os.", "shutil.")):
        # What a link holds is no path that is used.
        for argument in arguments[event == "os.symlink":]:
            path = os.fspath(argument) if isinstance(argument, (str, bytes, os.PathLike)) else ""
            path = os.fsdecode(path)
            if path.startswith(roots) and not path.startswith(working):
                found.append(f"{event}{arguments}")
import statepool
pool = statepool.StatePool(f"{place}/cache", [f"{place}/pool", f"{place}/second"])
statepool.init(f"{place}/second")
sys.addaudithook(hook)
disk = pool.image("vm1/disk")
disk.get("install", to=f"{place}/a.qcow2")
disk.set("again", source=f"{place}/other.qcow2", labels={"a": "b"})
disk.get("again", to=f"{place}/a.qcow2", overwrite=True)
pool.machine("vm1", images=["disk"]).show()
pool.verify(); pool.doctor(); pool.show(); pool.gc(everywhere=True)
with disk.working("again"): pass
disk.unset("again", scope="own swarm cluster shared")
disk.unset("install")
disk.get("install")
third = statepool.StatePool(f"{place}/third", [f"link://{place}/pool"])
third.image("vm1/disk").get("install", to=f"{place}/b.qcow2")
print("\\n".join(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", journey, place],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_what_tells_of_paths_tells(place: Path) -> None:
    """Shows that the test above can fail."""
    code = """
import os, sys
found = []
sys.addaudithook(lambda event, arguments: found.append(event))
open(sys.argv[1], "w").close()
os.rename(sys.argv[1], sys.argv[1] + "-2")
os.listdir(os.path.dirname(sys.argv[1]))
assert {"open", "os.rename", "os.listdir"} <= set(found), found
"""
    subprocess.run([sys.executable, "-c", code, place / "file"], check=True, timeout=60)
