"""
Small files of a cache that say what is known. Each is written whole under a passing name; and where a group shares the cache, whoever belongs to it
can write the next one, whatever the umask of the one before.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress

from statepool.pools.log import random_nonce


def write_note(path: str | os.PathLike[str], data: Mapping[str, object], *, flush: bool = False) -> None:
    """
    :param path: where, in a directory that is there; what is there gives way
    :param data: what to write, as JSON
    :param flush: whether it must be on stable storage before it gets its name
    """
    directory = os.path.dirname(path)
    temporary = f"{directory}/{random_nonce()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(data, file)
            if os.stat(directory).st_mode & stat.S_IWGRP:
                os.fchmod(file.fileno(), 0o664)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make a directory, and those above it, if it is missing; each with the mode of the one above where that is the group's to write in."""
    above = os.path.dirname(path)
    try:
        os.mkdir(path)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directory(above)
        make_directory(path)
        return
    mode = stat.S_IMODE(os.stat(above).st_mode)
    if mode & stat.S_IWGRP:
        os.chmod(path, mode | stat.S_IRWXU)
