"""
Making the writable image that a machine runs on: an empty overlay over a cached chain.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from statepool.errors import FileInTheWay, InUse, NotFound
from statepool.model.manifest import Manifest
from statepool.qcow2.opened import is_open
from statepool.qcow2.overlay import create_overlay
from statepool.qcow2.tool import QemuImg
from statepool.transfer.cache import Cache
from statepool.transfer.chains import temporary_name
from statepool.transfer.ready import damaged
from statepool.transports.failures import Subject, translated


def check_place(to: os.PathLike[str] | str, *, overwrite: bool) -> Path:
    """
    Look whether a working image can be made somewhere, and change nothing.

    :returns: where, absolute
    :raises FileInTheWay: something is there, and may not be overwritten
    :raises InUse: what is there is open in another process
    :raises NotFound: there is no such directory
    """
    path = Path(os.path.abspath(to))
    if not path.parent.is_dir():
        raise NotFound(f"there is no directory {path.parent}", path=str(path.parent), hint="make it first")
    if not os.path.lexists(path):
        return path
    if path.is_dir():
        raise FileInTheWay(f"{path} is a directory", path=str(path), hint="name a file")
    if not overwrite:
        raise FileInTheWay(f"{path} exists", path=str(path), hint="choose another name, or allow it to be overwritten with --overwrite")
    if path.is_file() and not path.is_symlink() and is_open(path):
        raise InUse(f"{path} is open in another process", path=str(path), hint="stop the machine that runs on it")
    return path


def make_working(cache: Cache, chain: Sequence[Manifest], to: Path, *, overwrite: bool = False, flush: bool = False) -> Path:
    """
    :param chain: of the cache, tip first
    :param to: where, absolute, as :func:`check_place` gave it
    :param overwrite: whether what is there gives way, in one step
    :param flush: bring it to stable storage before it takes the place of what is there
    :returns: the image
    :raises FileInTheWay: somebody put something there meanwhile
    """
    record = cache.chains.use(chain, to, flush=flush)
    temporary = temporary_name(to, record)
    try:
        # A collector may have moved bytes aside before it could see the record of our use.
        for manifest in chain:
            assert manifest.digest is not None
            if not cache.pool.has_bytes(manifest.digest):
                raise damaged(cache, manifest)
        tip = chain[0]
        backing = str(cache.chains.path(chain))
        create_overlay(temporary, tip.virtual_size, backing, tool=QemuImg(cache.settings.tool_timeout))
        if flush:
            _flush(temporary)
        _settle(temporary, to, overwrite)
        if flush:
            _flush(to.parent)
    except BaseException:
        record.unlink(missing_ok=True)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if overwrite:
        cache.chains.release(to, besides=record)
    return to


def _settle(temporary: Path, to: Path, overwrite: bool) -> None:
    try:
        if overwrite:
            os.replace(temporary, to)
        else:
            os.link(temporary, to)
    except FileExistsError as error:
        raise FileInTheWay(f"{to} exists", path=str(to), hint="choose another name") from error
    except OSError as error:
        raise translated(error, "make", Subject(str(to), path=str(to))) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def throw_away(cache: Cache, working: Path) -> None:
    """Delete a working image and the record of it."""
    with contextlib.suppress(FileNotFoundError):
        working.unlink()
    cache.chains.release(working)
