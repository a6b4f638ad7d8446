"""
The same backup, staged by Debian's cedar-backup3 and by us: the same tree, indicators and results,
but for what docs/staging.rst lists as differences.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.staging.settings import DAYS
from tests.support.sshd import Sshd
from tests.support.staging import CBACK, Backup, PeerDirectory, outcomes_in, tree

pytestmark = pytest.mark.skipif(CBACK is None, reason="cback3 is not installed (cedar-backup3)")

MODES = ("", "none", "all", "daily", "weekly")
FILES = {"etc.tar.gz": b"etc" * 50_000, "home.tar": bytes(300_000), "empty": b""}

Make = Callable[..., Backup]
TODAY = DAYS[dt.datetime.now().astimezone().weekday()]
TOMORROW = DAYS[(DAYS.index(TODAY) + 1) % 7]


def good(place: Path) -> list[PeerDirectory]:
    return [
        PeerDirectory(name, place / name, remote).fill({**FILES, f"{name}.tar": name.encode()})
        for name, remote in (("one", False), ("two", False), ("r1", True), ("r2", True))
    ]


def broken(place: Path) -> list[PeerDirectory]:
    """Each kind of peer that is not ready, in each mode."""
    found = []
    for mode in MODES:
        for remote in (False, True):
            name = f"{'far' if remote else 'near'}-{mode or 'unset'}"
            peer = PeerDirectory(name, place / name, remote, mode)
            found.append(peer.fill(FILES, ready=False) if mode != "none" else peer)
        found.append(PeerDirectory("gone" if not mode else f"gone-{mode}", place / "x", True, mode))
    return found


@pytest.fixture
def make(tmp_path: Path, sshd: Sshd) -> Make:
    """Each has peers of its own, since an indicator is left with them."""

    def build(name: str, *kinds: Callable[[Path], list[PeerDirectory]]) -> Backup:
        peers = [peer for kind in kinds for peer in kind(tmp_path / name / "peers")]
        return Backup(tmp_path / name, peers, sshd)

    return build


def ours_of(backup: Backup) -> dict[str, str]:
    summary = json.loads((backup.day() / "staged.json").read_text())
    return {
        one["peer"]: "ignored" if one["ignored"] else str(one["outcome"])
        for one in summary["peers"]
    }


def marks(backup: Backup) -> list[str]:
    return sorted(peer.name for peer in backup.peers if (peer.directory / "cback.stage").is_file())


def test_what_is_well(make: Make) -> None:
    theirs, ours = make("theirs", good), make("ours", good)
    assert (theirs.theirs().code, ours.ours().code) == (0, 0)
    assert ours.tree() == theirs.tree()
    assert ours.tree()["cback.stage"] == b""
    assert ours.tree()["r1/etc.tar.gz"] == FILES["etc.tar.gz"]
    assert marks(ours) == marks(theirs) == ["one", "r1", "r2", "two"]


@pytest.mark.parametrize(
    ("start", "options"), [(TOMORROW, ()), (TODAY, ()), (TOMORROW, ("--full",))]
)
def test_what_is_not_ready_in_every_mode(make: Make, start: str, options: tuple[str, ...]) -> None:
    theirs, ours = make("theirs", good, broken), make("ours", good, broken)
    theirs.start = ours.start = start
    run = theirs.theirs(*options)
    done = ours.ours(*options)
    assert ours_of(ours) == outcomes_in(run.text), run.text
    assert set(ours_of(ours).values()) == {"staged", "ignored", "not-ready"}
    assert marks(ours) == marks(theirs) == ["one", "r1", "r2", "two"]
    # Theirs succeeds, and the day counts as staged, whatever happened.
    tree = theirs.tree()
    assert (run.code, tree.pop("cback.stage")) == (0, b"")
    assert done.code == 6
    assert ours.tree() == tree


def test_the_day_is_staged_if_all_that_fail_are_ignored(make: Make) -> None:
    def ignored(place: Path) -> list[PeerDirectory]:
        return [PeerDirectory("lazy", place / "lazy", True, "all")]

    theirs, ours = make("theirs", good, ignored), make("ours", good, ignored)
    assert (theirs.theirs().code, ours.ours().code) == (0, 0)
    assert ours.tree() == theirs.tree()
    assert "cback.stage" in ours.tree()


def test_peers_that_break(make: Make) -> None:
    """The outcomes are the same; theirs also leaves files of peers that failed."""

    def breaking(place: Path) -> list[PeerDirectory]:
        peers = [
            PeerDirectory("mark-near", place / "mark-near").fill(FILES),
            PeerDirectory("mark-far", place / "mark-far", True).fill(FILES),
            PeerDirectory("command", place / "command", True, copy_command="/bin/false"),
        ]
        peers[2].fill(FILES)
        for peer in peers[:2]:
            (peer.directory / "cback.stage").mkdir()
        return peers

    theirs, ours = make("theirs", good, breaking), make("ours", good, breaking)
    run, done = theirs.theirs(), ours.ours()
    found = ours_of(ours)
    assert found == outcomes_in(run.text)
    assert (found["mark-near"], found["mark-far"]) == ("failed", "failed")
    assert (found["command"], done.code) == ("not-ready", 6)
    well = {
        path: content
        for path, content in theirs.tree().items()
        if path.split("/")[0] in ("one", "two", "r1", "r2")
    }
    assert well.items() <= ours.tree().items()


def test_a_copy_command_of_a_peer(make: Make, sshd: Sshd) -> None:
    def own(place: Path) -> list[PeerDirectory]:
        command = f"/usr/bin/scp -B -q -P {sshd.port} -F {sshd.ssh_config}"
        return [
            PeerDirectory("127.0.0.1", place / "own", remote=True, copy_command=command).fill(FILES)
        ]

    theirs, ours = make("theirs", own), make("ours", own)
    assert outcomes_in(theirs.theirs().text) == {"127.0.0.1": "staged"}
    assert ours.ours().code == 0
    assert ours.tree() == theirs.tree()
    assert marks(ours) == ["127.0.0.1"]
    # Nothing has changed but the indicator that is there now.
    done = ours.ours("--json")
    assert json.loads(done.text)["staged"]["peers"][0]["new"] == 1
    (ours.peers[0].directory / "etc.tar.gz").write_bytes(b"other")
    ours.ours()
    assert ours.tree()["127.0.0.1/etc.tar.gz"] == b"other"


def test_a_collect_directory_that_is_a_link_or_has_only_the_indicator(
    make: Make,
) -> None:
    def odd(place: Path) -> list[PeerDirectory]:
        PeerDirectory("real", place / "real").fill(FILES)
        (place / "link").symlink_to("real")
        return [
            PeerDirectory("link", place / "link"),
            PeerDirectory("far-link", place / "link", remote=True),
            PeerDirectory("only", place / "only").fill({}),
            PeerDirectory("far-only", place / "far-only", remote=True).fill({}),
        ]

    theirs, ours = make("theirs", odd), make("ours", odd)
    run = theirs.theirs()
    assert ours.ours().code == 0
    assert ours_of(ours) == outcomes_in(run.text)
    # The link and the directory are staged one after the other, the indicator of the first one too.
    assert tree(ours.day() / "only") == tree(theirs.day() / "only") == {"cback.collect": b""}
    assert tree(ours.day() / "link") == tree(theirs.day() / "link")


def test_their_store_takes_our_day_and_their_collect_is_staged(tmp_path: Path) -> None:
    """What CedarBackup does before and after goes on working."""
    source = tmp_path / "etc"
    source.mkdir()
    (source / "passwd").write_text("root")
    peer = PeerDirectory("one", tmp_path / "collect")
    peer.directory.mkdir()
    backup = Backup(tmp_path, [peer])
    backup.extra = f"""<collect>
    <collect_dir>{peer.directory}</collect_dir><collect_mode>daily</collect_mode>
    <archive_mode>targz</archive_mode><ignore_file>.cbignore</ignore_file>
    <dir><abs_path>{source}</abs_path></dir></collect>"""
    assert backup.theirs(action="collect").code == 0
    theirs = sorted(path.name for path in peer.directory.iterdir())
    assert backup.ours().code == 0
    (name,) = [name for name in theirs if name != "cback.collect"]
    assert f"one/{name}" in backup.tree()
    # Their tool finds the day by our indicator: it would be the one that it stores next.
    found = "import sys; sys.path.insert(0, '/usr/lib/python3/dist-packages');"
    found += "from CedarBackup3.actions.util import findDailyDirs;"
    found += f"print(findDailyDirs({str(backup.staging)!r}, 'cback.store'))"
    python = shutil.which("python3", path="/usr/bin")
    assert python is not None
    done = subprocess.run([python, "-c", found], capture_output=True, text=True, check=True)
    assert str(backup.day()) in done.stdout


def test_our_collect_makes_the_same_tars(tmp_path: Path) -> None:
    source = tmp_path / "src dir"
    (source / "sub").mkdir(parents=True)
    (source / "sub/a").write_text("a")
    (source / "b.tmp").write_text("b")
    (source / "link").symlink_to("sub/a")
    (source / "skip").mkdir()
    (source / "skip/.cbignore").touch()
    (source / "skip/c").write_text("c")
    found = []
    for which in ("theirs", "ours"):
        place = tmp_path / which
        backup = Backup(place, [PeerDirectory("one", place / "collect").fill({}, ready=False)])
        backup.extra = f"""<collect>
    <collect_dir>{place}/collect</collect_dir><collect_mode>daily</collect_mode>
    <archive_mode>tarbz2</archive_mode><ignore_file>.cbignore</ignore_file>
    <file><abs_path>{source}/sub/a</abs_path><mode>incr</mode><archive_mode>tar</archive_mode>
    </file>
    <dir><abs_path>{source}</abs_path>
    <exclude><pattern>.*\\.tmp</pattern></exclude></dir></collect>"""
        assert getattr(backup, which)(action="collect").code == 0
        names = {}
        for path in (place / "collect").iterdir():
            names[path.name] = {}
            if path.suffix in (".tar", ".bz2"):
                with tarfile.open(path) as tar:
                    names[path.name] = {
                        one.name: (one.type, one.size, one.linkname)
                        for one in tar
                        if not one.isdir()
                    }
        found.append(names)
    assert found[1] == found[0]
    assert len(found[0]) == 3
