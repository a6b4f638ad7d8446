"""Many tests at once on a pool of another host, with a cache that has nothing yet."""

from __future__ import annotations

import collections
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import statepool
from tests.support.sshd import Sshd

STATES = ("install", "customize", "connect")
SIZE = 8 << 20
WRITTEN = 2 << 20


def test_each_state_is_fetched_once(
    suite: Any, sshd: Sshd, make_image: Callable[..., Path], tmp_path: Path
) -> None:
    place = sshd.location(sshd.directory_for("for-pytest"))
    settings = sshd.settings(compress="off")
    statepool.init(place, settings=settings)
    working = make_image(tmp_path / "working.qcow2", SIZE)
    author = statepool.StatePool(tmp_path / "ssh-author", [place], settings=settings)
    for number, state in enumerate(STATES):
        subprocess.run(
            [
                "qemu-io",
                "-f",
                "qcow2",
                "-c",
                f"write -q -P {number + 1} {number * WRITTEN} {WRITTEN}",
                str(working),
            ],
            check=True,
        )
        assert author.image("vm1/disk").set(state, source=working).complete
    author.close()
    sizes = {
        listed.manifest.state: listed.manifest.size
        for listed in author.image("vm1/disk").show(scope="own")
    }
    (suite.root / "pytest.ini").write_text("[pytest]\n")
    toml = (
        f'cache = "cache"\nsources = ["{place}"]\nssh-config = "{sshd.ssh_config}"\nknown-hosts ='
        f' "{sshd.known_hosts}"\ncompress = "off"\n'
    )
    (suite.root / "statepool.toml").write_text(toml)
    # In the worst order: workers that take tests as they come would fetch in turns.
    suite.write(
        "".join(
            f'\n@pytest.mark.vm_state("vm1/disk", "{STATES[number % 3]}")\ndef'
            f" test_{number}(vm_state): vm_state.path.stat()\n"
            for number in range(40)
        )
    )
    outcome = suite.run("-n", "4")
    assert list(outcome.tests.values()) == ["passed"] * 40
    rows = json.loads((suite.root / "tally.json").read_text())
    assert sum(row["fetched"] + row["reused"] for row in rows.values()) == 40
    # Each state has come over the wire once, whichever worker it was for: with one of them twice,
    # it would be more than there is.
    assert (
        len(STATES) * WRITTEN
        <= sum(row["bytes"] for row in rows.values())
        <= sum(sizes.values())
        < (len(STATES) + 1) * WRITTEN
    )
    published = collections.Counter(
        change
        for logged in statepool.StatePool(suite.root / "cache").log("vm1/disk")
        for change in logged.changes
    )
    assert len(published) == len(STATES), published
    assert set(published.values()) == {1}
    assert suite.images() == []
