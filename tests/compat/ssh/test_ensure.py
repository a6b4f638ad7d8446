"""
States that are built once for several hosts, which have nothing in common but a pool behind SSH.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import statepool
from tests.support.sshd import run_sshd, sshd_program

pytestmark = pytest.mark.skipif(
    sshd_program() is None, reason="sshd is not installed (Debian: openssh-server)"
)

WORKER = """
import subprocess, sys, time
import statepool

cache, source, config, known, log = sys.argv[1:]
settings = statepool.Settings(ssh_config=config, known_hosts=known)
disk = statepool.StatePool(cache, [source], settings=settings).image("vm1/disk")

def build(image):
    with open(log, "a") as file:
        file.write("built\\n")
    time.sleep(0.5)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 64k", image], check=True)

print("ready", flush=True)
sys.stdin.readline()
ensured = disk.ensure("connect", build, parent="install", key="1")
print(ensured.name, ensured.got.digest)
"""


@pytest.mark.parametrize("chrooted", [False, True], ids=["shell", "chrooted"])
def test_hosts_that_share_a_pool_build_once(
    tmp_path: Path, make_image: Callable[..., Path], chrooted: bool
) -> None:
    with run_sshd(chrooted=chrooted) as sshd:
        location = str(sshd.location(sshd.directory_for("pool")))
        statepool.init(location, settings=sshd.settings())
        author = statepool.StatePool(tmp_path / "author", [location], settings=sshd.settings())
        author.image("vm1/disk").set(
            "install", source=make_image(tmp_path / "base.qcow2", 4 << 20, writes=[(0, 65536, 1)])
        )
        author.close()
        workers = []
        for host in range(3):
            words = [
                str(tmp_path / f"host{host}"),
                location,
                str(sshd.ssh_config),
                str(sshd.known_hosts),
                str(tmp_path / "log"),
            ]
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-c", WORKER, *words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        answers = []
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        for worker in workers:
            answers.append(worker.communicate(timeout=120)[0])
            assert worker.returncode == 0
    assert (tmp_path / "log").read_text().split() == ["built"]
    assert len(set(answers)) == 1
