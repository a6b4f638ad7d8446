"""
One step of a machine with two disks, in a process of its own that can be killed: ``machine_step.py
STEP``, in the lab's directory.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import statepool
from statepool.cache.cache import Cache
from statepool.capture.capture import Capture, files_of
from statepool.model.manifest import Kind, StateId
from tests.support.crash import mark

IMAGES = ("disk", "data")

LOGGED_IN = StateId("vm1", "loggedin", Kind.MACHINE)


def machine(cache: str) -> statepool.MachineHandle:
    return statepool.StatePool(cache=cache, sources=["pool"]).machine("vm1", IMAGES)


def set_with_ram() -> object:
    """What a backend of running machines does, once the machine is stopped."""
    from statepool.capture.capture_journal import recover
    from statepool.pools.pool import Pool
    from statepool.transports.registry import open_transport

    cache = Cache.open(
        Pool(open_transport(statepool.Location.parse("cache"))), statepool.Settings()
    )
    recover(cache)
    working = {name: Path("vm", f"{name}.qcow2").absolute() for name in IMAGES}
    ram = Path("ram.bin").absolute()
    return Capture(
        cache,
        LOGGED_IN,
        files_of(LOGGED_IN, working, ram if ram.exists() else None),
        fingerprint={"machine": "q35"},
    ).run()


STEPS: dict[str, Callable[[], object]] = {
    "get": lambda: machine("other").get("install", to="run"),
    "get-over": lambda: machine("cache").get("install", to="spare", overwrite=True),
    "set": lambda: machine("cache").set("customize", source="vm"),
    "set-copied": lambda: machine("cache").set("customize", source="linked"),
    "set-ram": set_with_ram,
    "unset": lambda: machine("cache").unset("leaf", scope="all"),
}


def main(step: str) -> int:
    run = STEPS[step]
    mark()
    try:
        run()
    except statepool.StatePoolError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    finally:
        mark()
    return 0


if __name__ == "__main__":
    # Not by an exception, so that nothing of Python's own runs that a trace would show.
    os._exit(main(sys.argv[1]))
