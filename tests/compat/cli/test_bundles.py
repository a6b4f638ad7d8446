"""
Export and import as a person at a shell has them: real processes, pipes, and what cuts them short.
"""

from __future__ import annotations

import json
import os
import pty
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool import StatePool
from statepool.pools import layout
from statepool.testing.trees import photograph
from tests.support.sshd import Sshd

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20
DISK = "vm1/disk"

EXPORT = ("--cache", "home", "export", DISK, "customize")

Run = Callable[..., Any]
Make = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]
Tool = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path, make_image: Make, write_to_image: Write) -> Path:
    """A cache with a chain of two."""
    disk = StatePool(tmp_path / "home").image(DISK)
    writes = [(0, 8 * MIB, 1), (48 * MIB, MIB, 3)]
    work = make_image(tmp_path / "work.qcow2", 64 * MIB, writes=writes)
    disk.set("install", source=work)
    write_to_image(work, [(MIB, MIB, 2)])
    disk.set("customize", source=work)
    return tmp_path


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "statepool", *map(str, words)]


def states(cache: Path) -> list[str]:
    return sorted(one.manifest.state for one in StatePool(cache).show())


def shell(directory: Path, line: str) -> subprocess.CompletedProcess[str]:
    line = line.replace("statepool --cache home", f"{sys.executable} -m statepool --cache home")
    line = line.replace("| statepool", f"| {sys.executable} -m statepool")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_walk(home: Path, run_statepool: Run, qemu_img: Tool) -> None:
    told = run_statepool(*EXPORT, "-o", "customize.statepool").out
    assert told.startswith(f"{DISK} customize: ")
    assert told.rstrip().endswith(f" in {home / 'customize.statepool'}")
    exists = run_statepool(*EXPORT, "-o", "customize.statepool", code=4)
    assert "--overwrite" in exists.err
    before = (home / "customize.statepool").read_bytes()
    run_statepool(*EXPORT, "-o", "customize.statepool", "--overwrite")
    assert (home / "customize.statepool").read_bytes() == before
    told = run_statepool("--cache", "away", "import", "customize.statepool", "--dry-run").out
    assert "would import" in told
    assert not (home / "away").exists()
    for told in ("every byte was checked", "all of it was in the cache"):
        assert told in run_statepool("--cache", "away", "import", "customize.statepool").out
    run_statepool("--cache", "home", "get", DISK, "customize", "--to", "one.qcow2")
    run_statepool("--cache", "away", "get", DISK, "customize", "--to", "two.qcow2")
    qemu_img("compare", home / "one.qcow2", home / "two.qcow2")
    assert [path.name for path in home.iterdir() if "customize" in path.name] == [
        "customize.statepool"
    ]


def test_json(home: Path, run_statepool: Run) -> None:
    exported = run_statepool(
        "--cache", "home", "--json", "export", DISK, "customize", "-o", "b"
    ).json["exported"]
    assert (exported["path"], exported["bytes"]) == (str(home / "b"), (home / "b").stat().st_size)
    imported = run_statepool("--cache", "away", "--json", "import", "b").json
    assert imported["imported"]["chain"] == ["customize", "install"]
    assert imported["dry_run"] is False
    run_statepool("--cache", "home", "--json", "export", DISK, "customize", code=2)
    refused = run_statepool("--json", "import", "work.qcow2", code=5)
    assert json.loads(refused.err)["error"]["path"] == str(home / "work.qcow2")


def test_a_pipe_between_two_caches(home: Path) -> None:
    line = f"statepool --cache home export {DISK} customize | statepool --cache away import - -q"
    done = shell(home, line)
    assert (done.returncode, done.stderr) == (0, "")
    assert states(home / "away") == ["customize", "install"]


def test_a_pipe_to_another_host(home: Path, sshd: Sshd) -> None:
    """One whose ``statepool`` is this one."""
    there = f"cd {home} && PYTHONPATH={ROOT} {sys.executable} -m statepool --cache away import -q -"
    far = shlex.join(["ssh", "-F", str(sshd.ssh_config), "store", there])
    done = shell(home, f"statepool --cache home export {DISK} customize | {far}")
    assert (done.returncode, done.stderr) == (0, "")
    assert states(home / "away") == ["customize", "install"]


@pytest.mark.parametrize(
    "options",
    ["compression_type=zstd", "cluster_size=16k,extended_l2=on", "cluster_size=2M", "compat=0.10"],
)
def test_kinds_of_images(
    tmp_path: Path, make_image: Make, run_statepool: Run, qemu_img: Tool, options: str
) -> None:
    image = make_image(tmp_path / "work.qcow2", 16 * MIB, writes=[(0, 3 * MIB, 1)], options=options)
    if "zstd" in options:
        qemu_img(
            "convert",
            "-c",
            "-f",
            "qcow2",
            "-O",
            "qcow2",
            "-o",
            options,
            image,
            tmp_path / "packed.qcow2",
        )
        image = tmp_path / "packed.qcow2"
    run_statepool("--cache", "home", "set", DISK, "install", "--from", image)
    for compress in ("zstd", "none"):
        run_statepool(
            "--cache", "home", "export", DISK, "install", "-o", compress, "--compress", compress
        )
        run_statepool("--cache", f"away-{compress}", "import", compress)
        run_statepool(
            "--cache", f"away-{compress}", "get", DISK, "install", "--to", f"{compress}.qcow2"
        )
        qemu_img("compare", image, tmp_path / f"{compress}.qcow2")


def test_flat(home: Path, run_statepool: Run, qemu_img: Tool) -> None:
    run_statepool("--cache", "home", "get", DISK, "customize", "--to", "one.qcow2")
    sizes = {}
    for compress in ("none", "zlib", "zstd"):
        run_statepool(
            "--cache",
            "home",
            "export",
            DISK,
            "customize",
            "--flat",
            "-o",
            f"{compress}.qcow2",
            "--compress",
            compress,
        )
        qemu_img("compare", home / "one.qcow2", home / f"{compress}.qcow2")
        told = json.loads(qemu_img("info", "--output=json", home / f"{compress}.qcow2"))
        assert "backing-filename" not in told
        sizes[compress] = (home / f"{compress}.qcow2").stat().st_size
    assert sizes["zlib"] < sizes["none"]
    assert sizes["zstd"] < sizes["none"]
    assert "needs a file" in run_statepool(*EXPORT, "--flat", code=2).err


def test_what_a_user_gets_wrong(home: Path, run_statepool: Run) -> None:
    before = photograph(home)
    for code, words, told in (
        (
            2,
            ["export", DISK, "customize", "--compress", "zlib", "-o", "x"],
            "cannot be compressed with 'zlib'",
        ),
        (2, ["export", DISK, "customize", "--overwrite"], "--overwrite needs -o FILE"),
        (3, ["export", DISK, "nothing", "-o", "x"], "nothing"),
        (3, ["export", DISK, "customize", "-o", "nowhere/x"], "there is no directory"),
        (4, ["export", DISK, "customize", "-o", "."], "is a directory"),
        (4, ["export", DISK, "customize", "-o", "home/x"], "inside the cache"),
        (2, ["import", "x", "--replace"], "--replace needs --to"),
        (3, ["import", "nothing"], "nothing"),
        (1, ["import", "."], "Is a directory"),
        (5, ["import", "work.qcow2"], "is not a bundle"),
        (5, ["import", "-"], "is not a bundle"),
    ):
        ran = run_statepool("--cache", "home", *words, code=code)
        assert told in ran.err
        assert ran.out == ""
    assert photograph(home) == before


def test_a_terminal_gets_no_bundle(home: Path) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        command(*EXPORT),
        cwd=home,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "not written to a terminal" in done.stderr
    done = subprocess.run(
        command("--cache", "home", "import", "-"),
        cwd=home,
        stdin=theirs,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "not read from a terminal" in done.stderr
    os.close(theirs)
    os.close(ours)


def test_a_reader_that_has_enough(home: Path, run_statepool: Run) -> None:
    line = f"statepool --cache home export {DISK} customize --compress none | head -c 100000 > part"
    done = shell(home, line + "; echo ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr) == ("141\n", "")
    told = run_statepool("--cache", "away", "import", "part", code=5).err
    assert "is cut short" in told
    assert states(home / "away") == []


def test_a_full_disk(home: Path) -> None:
    """A limit stands for it. Nothing is left where the bundle should have been."""
    before = photograph(home)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))

    words = command(*EXPORT, "--compress", "none", "-o", "bundle")
    done = subprocess.run(
        words, cwd=home, preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 8
    assert photograph(home) == before
    done = shell(home, f"statepool --cache home export {DISK} customize --compress none -o bundle")
    assert done.returncode == 0, done.stderr
    before = photograph(home / "away")
    done = subprocess.run(
        command("--cache", "away", "import", "bundle"),
        cwd=home,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 8
    assert states(home / "away") == []
    assert leftovers(home / "away") == []


def leftovers(cache: Path) -> list[str]:
    places = (layout.DATA, layout.INCOMING, layout.TRASH)
    return [str(path) for place in places for path in (cache / place).iterdir()]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_import_that_is_cut_short(home: Path, run_statepool: Run, how: signal.Signals) -> None:
    run_statepool(*EXPORT, "--compress", "none", "-o", "bundle")
    bundle = (home / "bundle").read_bytes()
    with subprocess.Popen(
        command("--cache", "away", "import", "-"),
        cwd=home,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        # A pipe holds one MiB at most: when all of this is in it, most of it has been read.
        process.stdin.write(bundle[: 6 * MIB])
        process.stdin.flush()
        process.send_signal(how)
        process.wait(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert states(home / "away") == []
    if how == signal.SIGKILL:
        assert leftovers(home / "away")
        run_statepool("--cache", "away", "gc")
    assert leftovers(home / "away") == []
    run_statepool("--cache", "away", "import", "bundle")
    assert states(home / "away") == ["customize", "install"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_export_that_is_cut_short(home: Path, run_statepool: Run, how: signal.Signals) -> None:
    """What came out of it so far is no bundle."""
    before = photograph(home / "home")
    with subprocess.Popen(
        command(*EXPORT, "--compress", "none"),
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        beginning = process.stdout.read(MIB)
        process.send_signal(how)
        rest = process.stdout.read()
        process.wait(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    (home / "part").write_bytes(beginning + rest)
    run_statepool("--cache", "away", "import", "part", code=5)
    assert states(home / "away") == []
    if how == signal.SIGKILL:
        run_statepool("--cache", "home", "gc")
    assert photograph(home / "home") == before


def test_from_a_source_and_into_another_pool(home: Path, run_statepool: Run) -> None:
    for name in ("pool", "far"):
        statepool.init(home / name)
    run_statepool("sync", "home", "pool")
    run_statepool(
        "--cache", "cache", "--source", "pool", "export", DISK, "customize", "-o", "bundle"
    )
    assert states(home / "cache") == ["customize", "install"]
    told = run_statepool("--cache", "away", "import", "bundle", "--to", "far").out
    assert f"stored in {home / 'far'}" in told
    assert states(home / "far") == ["customize", "install"]
    ran = run_statepool("--cache", "away", "import", "bundle", "--to", "nowhere", code=7)
    assert "is not in" in ran.err
