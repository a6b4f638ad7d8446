"""
One step of the lab, in a process of its own that can be killed: ``step.py STEP``, in the lab's
directory.
"""

import os
import sys
from collections.abc import Callable

import statepool
from tests.support.crash import mark

OBJECT = "vm1/disk"


def handle(cache: str) -> statepool.ImageHandle:
    return statepool.StatePool(cache=cache, sources=["pool"]).image(OBJECT)


STEPS: dict[str, Callable[[], object]] = {
    "get": lambda: handle("other").get("customize", to="other.qcow2"),
    "get-over": lambda: handle("cache").get("customize", to="spare.qcow2", overwrite=True),
    "set": lambda: handle("cache").set("connect", source="work.qcow2"),
    "set-copied": lambda: handle("cache").set("connect", source="linked.qcow2"),
    "set-replace": lambda: handle("cache").set("leaf", source="work.qcow2", replace=True),
    "unset": lambda: handle("cache").unset("install", cascade=True, scope="all"),
    "recover": lambda: handle("cache").get("install"),
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
