"""
The journey of the README on real file systems: what docs/filesystems.rst says of each, held against
it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statepool.cli.main import cli
from tests.support.sshd import SFTP_SERVER

ROOT = Path(__file__).resolve().parents[2]
ROLES = ("pool", "cache", "working images")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount file systems"),
    pytest.mark.timeout(1200),
]


def run(*words: str | Path) -> None:
    """
    Run a program, or skip the test with what it says: it is not installed, or this host cannot
    mount.
    """
    program = str(words[0])
    if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        pytest.skip(f"{program} is not installed (tools/setup test installs it)")
    done = subprocess.run(list(words), capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        pytest.skip(f"{program} fails here: {(done.stderr or done.stdout).strip()}")


def on_disk(make: list[str], mount: list[str]) -> Callable[[Path, Path], None]:
    def prepare(scratch: Path, place: Path) -> None:
        image = scratch / "disk.img"
        with open(image, "wb") as file:
            file.truncate(320 << 20)
        run(*make, image)
        run(*mount, image, place)

    return prepare


def exfat(scratch: Path, place: Path) -> None:
    image = scratch / "disk.img"
    with open(image, "wb") as file:
        file.truncate(320 << 20)
    run("mkfs.exfat", image)
    found = subprocess.run(
        ["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip(f"there are no loop devices here: {found.stderr.strip()}")
    device = found.stdout.strip()
    try:
        run("mount.exfat-fuse", device, place)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)  # when nobody uses it any more


def tmpfs(scratch: Path, place: Path) -> None:
    run("mount", "-t", "tmpfs", "-o", "size=320m", "tmpfs", place)


def overlayfs(scratch: Path, place: Path) -> None:
    for name in ("lower", "upper", "work"):
        (scratch / name).mkdir()
    run(
        "mount",
        "-t",
        "overlay",
        "-o",
        f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work",
        "overlay",
        place,
    )


def bindfs(scratch: Path, place: Path) -> None:
    (scratch / "source").mkdir()
    run("bindfs", scratch / "source", place)


def sshfs(scratch: Path, place: Path) -> None:
    if not os.access(SFTP_SERVER, os.X_OK):
        pytest.skip(f"there is no {SFTP_SERVER} (Debian: openssh-sftp-server)")
    (scratch / "source").mkdir()
    server = scratch / "ssh"
    server.write_text(f"#!/bin/sh\nexec {SFTP_SERVER}\n")
    server.chmod(0o755)
    run("sshfs", "-o", f"ssh_command={server}", f"host:{scratch}/source", place)


FILE_SYSTEMS: dict[str, Callable[[Path, Path], None]] = {
    "ext4": on_disk(["mkfs.ext4", "-q"], ["mount", "-o", "loop"]),
    "xfs": on_disk(["mkfs.xfs", "-q"], ["mount", "-o", "loop"]),
    "btrfs": on_disk(["mkfs.btrfs", "-q"], ["mount", "-o", "loop"]),
    "tmpfs": tmpfs,
    "overlayfs": overlayfs,
    "exFAT": exfat,
    "NTFS": on_disk(["mkntfs", "-F", "-Q"], ["ntfs-3g"]),
    "sshfs": sshfs,
    "bindfs": bindfs,
}


@pytest.fixture(scope="module", params=list(FILE_SYSTEMS))
def mounted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """:returns: the name of a file system, and where one is mounted"""
    scratch, place = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("mounted")
    name: str = request.param
    try:
        FILE_SYSTEMS[name](scratch, place)
        yield name, place
    finally:
        if os.path.ismount(place):
            subprocess.run(["umount", "-l", str(place)], check=True)


def table() -> dict[str, list[str]]:
    """:returns: what the page says of each file system, a cell for each role"""
    lines = (ROOT / "docs/filesystems.rst").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {row[0]: row[1 : len(ROLES) + 1] for row in rows if row[0] in FILE_SYSTEMS}


def test_the_table_has_them_all() -> None:
    assert set(table()) == set(FILE_SYSTEMS)
    assert {cell for row in table().values() for cell in row} == {"yes", "refused"}


@pytest.mark.parametrize("role", ROLES)
def test_the_journey(
    mounted: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    name, place = mounted
    place = place / role.split(maxsplit=1)[0]
    place.mkdir()
    roots = {each: place if each == role else tmp_path / each.split()[0] for each in ROLES}
    for root in roots.values():
        root.mkdir(exist_ok=True)
    answer = journey(
        capsys, roots["pool"] / "pool", roots["cache"] / "cache", roots["working images"], tmp_path
    )
    assert ("yes" if answer is None else "refused") == table()[name][ROLES.index(role)], answer
    assert answer is None or re.search(
        r"the file system (has|may have) no (hard links|symbolic links)", answer
    ), answer


def journey(
    capsys: pytest.CaptureFixture[str], pool: Path, cache: Path, working: Path, scratch: Path
) -> str | None:
    """
    :returns: what was said where the first command was refused; None if all did what they should
    """

    def shell(*words: str | Path, at: Path = cache) -> int:
        return int(
            cli.main(
                ["-q", "--cache", str(at), "--source", str(pool), *map(str, words)],
                standalone_mode=False,
            )
        )

    def qemu(*words: str | Path) -> None:
        subprocess.run(list(words), check=True, capture_output=True, timeout=60)

    work, test = working / "work.qcow2", working / "test.qcow2"
    if cli.main(["-q", "init", str(pool)], standalone_mode=False):
        return capsys.readouterr().err
    qemu("qemu-img", "create", "-q", "-f", "qcow2", work, "16M")
    work.chmod(0o660)
    before = work.stat()
    if shell("set", "vm1/disk", "install", "--from", work):
        return capsys.readouterr().err
    after = work.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (
        before.st_uid,
        before.st_gid,
        before.st_mode,
    )
    qemu("qemu-io", "-f", "qcow2", "-c", "write -q -P 3 0 1M", work)
    assert shell("set", "vm1/disk", "customize", "--from", work) == 0
    for options in ([], ["--overwrite"]):
        assert shell("get", "vm1/disk", "customize", "--to", test, *options) == 0
        qemu("qemu-io", "-r", "-f", "qcow2", "-c", "read -q -P 3 0 1M", test)
    assert shell("get", "vm1/disk", "install", "--to", test) != 0  # it is in the way
    assert (
        shell(
            "get",
            "vm1/disk",
            "customize",
            "--to",
            working / "elsewhere.qcow2",
            at=scratch / "other",
        )
        == 0
    )

    machine = working / "machine"
    machine.mkdir()
    for image in ("a", "b"):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", machine / f"{image}.qcow2", "16M")
    assert shell("set", "vm2", "install", "--from", machine) == 0
    assert shell("get", "vm2", "install", "--to", machine, "--overwrite") == 0
    assert shell("get", "vm2", "install", "--to", working / "again") in (0, 3)
    assert sorted(path.name for path in machine.iterdir()) == ["a.qcow2", "b.qcow2"]

    for path in [*working.glob("*.qcow2"), *machine.iterdir()]:
        path.unlink()
    assert shell("unset", "vm1/disk", "customize", "--everywhere") == 0
    assert shell("unset", "vm2", "install", "--everywhere") == 0
    assert shell("gc", "--everywhere") == 0
    assert shell("verify", "vm1/disk", "install") == 0
    assert shell("get", "vm1/disk", "customize", "--to", test) == 3
    assert [path.name for path in working.iterdir() if path.name.startswith(".")] == []
    assert list((cache / ".statepool/incoming").iterdir()) == []
    return None


def test_a_cache_in_a_lower_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """
    One that came with a container's image loses states as any other, and forgets what it stood on.
    """
    lower, place = tmp_path / "lower", tmp_path / "mounted"
    place.mkdir()
    for name in ("lower", "upper", "layer"):
        (tmp_path / name).mkdir()

    def shell(root: Path, *words: str | Path) -> int:
        return int(
            cli.main(
                [
                    "-q",
                    "--cache",
                    str(root / "cache"),
                    "--source",
                    str(root / "pool"),
                    *map(str, words),
                ],
                standalone_mode=False,
            )
        )

    work = lower / "work.qcow2"
    assert cli.main(["-q", "init", str(lower / "pool")], standalone_mode=False) == 0
    run("qemu-img", "create", "-q", "-f", "qcow2", work, "16M")
    assert shell(lower, "set", "vm1/disk", "base", "--from", work) == 0
    assert shell(lower, "set", "vm1/disk", "top", "--from", work) == 0
    work.unlink()
    for uses in (lower / "cache/.statepool/chains").glob("*/.uses/*.json"):
        uses.unlink()
    run(
        "mount",
        "-t",
        "overlay",
        "-o",
        f"lowerdir={lower},upperdir={tmp_path}/upper,workdir={tmp_path}/layer",
        "overlay",
        place,
    )
    try:
        assert shell(place, "unset", "vm1/disk", "base", "--cascade") == 0
        assert shell(place, "gc") == 0
        assert list((place / "cache/.statepool/chains").iterdir()) == []
        assert list((place / "cache/.statepool/data").iterdir()) == []
        assert shell(place, "get", "vm1/disk", "top", "--to", place / "test.qcow2") == 0
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert capsys.readouterr().err == ""
