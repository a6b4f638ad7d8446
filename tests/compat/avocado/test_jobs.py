"""
Jobs of the real avocado, of its newest release and of its long-term one, with tests that ask for
states.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import statepool

SUITE = '''
class Suite(Test):
    def test_first(self):
        """
        :avocado: dependency={"type": "vm-state", "uri": "vm1/disk/customize"}
        """
        io(working("vm1/disk"), "read -P 2 64k 64k", "read -P 0 128k 64k", "write -P 9 128k 64k")

    def test_second(self):
        """
        :avocado: dependency={"type": "vm-state", "uri": "vm1/disk/customize"}
        """
        io(working(), "read -P 2 64k 64k", "read -P 0 128k 64k", "write -P 9 128k 64k")

    def test_several(self):
        """
        :avocado: dependency={"type": "vm-state", "uri": "vm1/disk/install", "name": "one name"}
        :avocado: dependency={"type": "vm-state", "uri": "vm2/ready", "name": "one name"}
        """
        io(working("vm1/disk"), "read -P 0 64k 64k")
        io(working("vm2/disk", self), "read -P 3 0 64k")
        io(self.logdir + "/vm-state/vm2/data.qcow2", "read -P 3 0 64k")

    def test_plain(self):
        self.assertRaises(LookupError, working)
'''


@pytest.mark.slow
@pytest.mark.parametrize(("version", "cold", "warm"), [("113", "1", "3"), ("103", "3", "1")])
def test_a_suite_cold_and_warm_serial_and_parallel(
    suite: Any, version: str, cold: str, warm: str
) -> None:
    suite.write(SUITE)
    first = suite.run(version, "--max-parallel-tasks", cold)
    assert set(first.statuses.values()) == {"PASS"}, first.out
    # Whoever comes first, the bytes of each state are brought once.
    everything = {
        one.manifest.digest: one.manifest.data_size
        for one in statepool.StatePool("elsewhere", ["pool"]).show()
    }
    assert sum(given["bytes"] for given in first.given) == sum(everything.values())
    assert suite.images() == []
    again = suite.run(version, "--max-parallel-tasks", warm)
    assert set(again.statuses.values()) == {"PASS"}
    assert [given for given in again.given if given["fetched"] or given["bytes"]] == []
    assert "VM STATES  : 4 from the cache" in again.out
    assert suite.images() == []


MISSING = '''
class Suite(Test):
    def test_unknown(self):
        """
        :avocado: dependency={"type": "vm-state", "uri": "vm1/disk/nothing"}
        """

    def test_wrong(self):
        """
        :avocado: dependency={"type": "vm-state", "uri": "customize"}
        """
'''


@pytest.mark.slow
def test_a_state_that_cannot_be_had_skips_the_test_or_fails_the_job(suite: Any) -> None:
    suite.write(MISSING)
    skipped = suite.run("113")
    assert skipped.statuses == {"test_unknown": "SKIP", "test_wrong": "SKIP"}
    told = (
        "test_suite.py:Suite.test_unknown cannot have its state: there is no state nothing of"
        " vm1/disk"
    )
    assert told in skipped.out
    assert (
        "test_suite.py:Suite.test_wrong cannot have its state: 'customize' is neither"
        " machine/image/state nor machine/state; write" in skipped.out
    )
    failed = suite.run("103", "--vm-state-fail-on-missing", code=1)
    assert failed.statuses == {"test_unknown": "ERROR", "test_wrong": "ERROR"}
    assert told in failed.out
    assert "ERROR 2" in failed.out
    assert (failed.results / "results.xml").read_text().count("<error") == 2
    nowhere = suite.run("113", "--vm-state-fail-on-missing", pool="nowhere", code=1)
    assert "test_suite.py:Suite.test_unknown cannot have its state" in nowhere.out
    # avocado cuts what it prints after 255 characters
    assert "statepool init" in (nowhere.results / "results.json").read_text()
    assert suite.images() == []


@pytest.mark.slow
def test_the_command_and_the_cache(suite: Any) -> None:
    config = suite.root / "avocado.conf"
    config.write_text(f'[statepool]\ncache = {suite.root}/cache\nsources = ["{suite.root}/pool"]\n')
    got = suite.avocado("113", "--config", str(config), "statepool", "get", "vm1/disk", "customize")
    assert got.returncode == 0, got.stdout + got.stderr
    assert "every byte was checked" in got.stdout
    missing = suite.avocado(
        "113", "--config", str(config), "statepool", "check", "vm1/disk", "nothing"
    )
    assert missing.returncode == 3
    pool = statepool.StatePool("cache")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "mine.qcow2", "1M"], check=True)
    pool.image("vm3/disk").set("only-here", source="mine.qcow2")
    listed = suite.avocado("103", "--config", str(config), "cache", "list", "statepool").stdout
    assert [line.split()[:2] for line in listed.splitlines() if line.strip().startswith("vm")] == [
        ["vm1/disk", "customize"],
        ["vm1/disk", "install"],
        ["vm3/disk", "only-here"],
    ]
    cleared = suite.avocado("113", "--config", str(config), "cache", "clear", "statepool")
    assert "vm3/disk only-here stays" in cleared.stdout + cleared.stderr
    assert [(one.manifest.object, one.manifest.state) for one in pool.show()] == [
        ("vm3/disk", "only-here")
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
from avocado_statepool.jobs import JobImages, open_pool
from avocado_statepool.wishes import Wish

job, kill = sys.argv[1:]
images = JobImages(open_pool({"statepool.cache": "cache", "statepool.sources": ["pool"]}), job)
images.begin()
logdir = Path("results", job, "test-results", "1-test")
for _ in range(2):  # a test of the same name, once more
    wishes = [Wish("vm1/disk", "install"), Wish("vm1/disk", "customize", "here.qcow2")]
    record = images.provision(wishes, logdir, "test")
paths = [path for given in record.given for path in given.images.values()]
print(sum(Path(path).is_file() for path in paths), flush=True)
if kill == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
for _ in range(2):
    images.release(logdir)
images.end()
images.end()
"""


def test_a_killed_job_leaves_nothing_after_the_next_one(suite: Any, run_python: Any) -> None:
    assert run_python("113", KILLED, "first", "kill") == "2"
    assert len(suite.images()) == 2
    assert Path("here.qcow2").is_file()
    assert run_python("113", KILLED, "second", "go on") == "2"
    assert suite.images() == []
    assert not Path("here.qcow2").exists()
    assert list(Path("cache/.statepool/working").iterdir()) == []


EXCHANGED = """
import os, shutil, sys
from pathlib import Path
from avocado_statepool.jobs import JobImages
import statepool
images = JobImages(statepool.StatePool("cache", ["pool"]), "job")
images.begin()
shutil.copy("child.qcow2", "precious.qcow2")
elsewhere = images.root / "test/elsewhere"
images.root.rename("real")
elsewhere.mkdir(parents=True)
(elsewhere / "0.qcow2").symlink_to(os.path.abspath("precious.qcow2"))
os.chown(elsewhere / "0.qcow2", 64321, 64321, follow_symlinks=False)
images.end()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another account")
def test_links_that_another_account_has_put_there(suite: Any, run_python: Any) -> None:
    """A group that shares a cache can exchange the directories above those of a job."""
    run_python("113", EXCHANGED)
    assert Path("precious.qcow2").exists()


LIGHT = """
import sys
sys.argv = ["avocado", "plugins"]
from avocado.core.main import main
try:
    main()
except SystemExit:
    pass
print(sorted({"statepool", "attrs", "avocado_statepool.results"} & set(sys.modules)))
"""


def test_a_plugin_that_nobody_uses_costs_nothing(run_python: Any) -> None:
    assert run_python("113", LIGHT).splitlines()[-1] == "['avocado_statepool.results']"
