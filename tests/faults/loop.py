"""
Processes that change the lab until they are killed: for each line ``SEED SECONDS`` one is begun,
killed after so many seconds, and ``done`` is said.

They are forked, so that no time goes by before they begin to work.
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import statepool

# so that nothing is imported late: a fork begins with all of it
from statepool.testing import faults  # noqa: F401

CONTENTS = ("work", "linked")
STATES = ("first", "second", "third")
OBJECT = "vm1/disk"


def renew(content: str) -> None:
    """
    Another working image in place of the one there is, in one step: as somebody does who knows what
    he does.
    """
    shutil.copy(f"{content}.qcow2", "renewed.qcow2")
    os.replace("renewed.qcow2", "trial.qcow2")


def one(chance: random.Random) -> None:
    near = statepool.StatePool(cache="cache", sources=["pool"]).image(OBJECT)
    far = statepool.StatePool(cache="other", sources=["pool"]).image(OBJECT)
    state, what = chance.choice(STATES), chance.randrange(8)
    if what < 3:
        renew(chance.choice(CONTENTS))
        near.set(state, source="trial.qcow2", replace=True)
    elif what < 5:
        far.get(state, to="far.qcow2", overwrite=True)
    elif what < 6:
        near.get(state, to="near.qcow2", overwrite=True)
    elif what < 7:
        near.unset(state, cascade=True, scope="all")
    else:
        far.unset(state, cascade=True)


def work(seed: int) -> None:
    chance = random.Random(seed)
    while True:
        try:
            one(chance)
        except (statepool.NotFound, statepool.Conflict):
            # it was not set yet, or is gone again; or one was killed between the cache and the
            # pool, and they do not agree now
            continue


def main() -> None:
    for line in sys.stdin:
        seed, seconds = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                work(int(seed))
            except BaseException:  # noqa: BLE001  whatever it is, the test must hear of it
                Path("failed.txt").write_text(traceback.format_exc())
            os._exit(1)
        time.sleep(float(seconds))  # the moment at which it is killed
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        sys.stdout.write("done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
