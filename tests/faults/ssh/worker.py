"""
One worker of a host: ``worker.py NAME CACHE LOCATION SSH_CONFIG KNOWN_HOSTS IMAGE JOURNAL``, until
it is killed.

It sets states of its own, gets those of everybody, and unsets some of its own. In the journal it
says what it has been promised: ``set STATE`` when a set was complete, and ``unset STATE`` before an
unset begins.
"""

import os
import random
import shutil
import sys
import time

import statepool
from statepool.model.settings import Settings

OBJECT = "vm1/disk"


def unique(image: str, path: str) -> None:
    """A copy with other bytes in its last cluster, which a disk of this size does not show."""
    shutil.copy(image, path)
    with open(path, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(os.urandom(64))


def work(
    name: str,
    cache: str,
    location: str,
    ssh_config: str,
    known_hosts: str,
    image: str,
    journal: int,
) -> None:
    settings = Settings(fresh=0.0, ssh_config=ssh_config, known_hosts=known_hosts, timeout=20.0)
    disk = statepool.StatePool(cache=cache, sources=[location], settings=settings).image(OBJECT)
    chance = random.Random(f"{name} {time.time_ns()}")
    working = f"{cache}-{name}.qcow2"
    mine: list[str] = []
    while True:
        what = chance.random()
        try:
            if what < 0.5:
                state = f"{name}-{time.time_ns()}"
                unique(image, working)
                if disk.set(state, source=working).complete:
                    os.write(journal, f"set {state}\n".encode())
                    mine.append(state)
            elif what < 0.8 or not mine:
                there = [listed.manifest.state for listed in disk.show()]
                if there:
                    disk.get(chance.choice(there))
            else:
                state = mine.pop(chance.randrange(len(mine)))
                os.write(journal, f"unset {state}\n".encode())
                disk.unset(state, scope="all")
        except (statepool.NotFound, statepool.Conflict):
            continue  # somebody unset it meanwhile


if __name__ == "__main__":
    descriptor = os.open(sys.argv[7], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    work(*sys.argv[1:7], descriptor)  # type: ignore[arg-type]
