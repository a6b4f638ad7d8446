"""
One step of an archiver, in a process of its own that can be killed: ``archive_step.py STEP``, in a
directory that :class:`tests.support.pool_archives.Store` has made.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import statepool
from statepool.archive.definition import BackupDefinition
from statepool.archive.pool_archiver import PoolArchiver
from statepool.archive.pool_reader import restore_pool
from statepool.archive.prune import prune
from statepool.archive.retention import Rules
from tests.support.crash import mark

HERE = Path.cwd()
KEEP = 2
"""Generations that are kept."""


def archive(level: int, *, keep: int = KEEP) -> None:
    definition = BackupDefinition("pool", "tar", HERE, str(HERE / "pool"))
    PoolArchiver(HERE / "work").backup_files_incrementally(definition, level=level, keep=keep)


def restore() -> None:
    restore_pool([HERE / "pool.tar", HERE / "pool.1.tar"], HERE / "back")


STEPS: dict[str, Callable[[], object]] = {
    "level": lambda: archive(2),
    "keep": lambda: archive(0),
    "overwrite": lambda: archive(0, keep=0),
    "prune": lambda: prune(HERE, "pool", HERE / "work", Rules(kept=0)),
    "restore": restore,
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
