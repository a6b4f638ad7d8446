"""Atomic creation of a user's file: it appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from statepool.beneath import Beneath, beside, settle
from statepool.errors import FileInTheWay, about_file
from statepool.pools.log import random_nonce
from statepool.transports.failures import Subject, translated


@contextlib.contextmanager
def made(path: Path, *, overwrite: bool) -> Iterator[tuple[int, Path]]:
    """
    Yield the descriptor and the path of a temporary file beside the target. At the end of a
    ``with`` block it is flushed, and renamed to the target; if the block raises, it is removed.

    :param path: of the target, absolute
    :param overwrite: whether an existing file is replaced, atomically
    :raises FileInTheWay: the file exists, or another process has created it meanwhile
    """
    place = beside(path)
    temporary = Beneath(place.tree, f".{path.name[:128]}.{random_nonce()}.tmp")
    with _told(path):
        opened = temporary.open(os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with opened as descriptor:
            yield descriptor, Path(temporary)
            with _told(path):
                os.fsync(descriptor)
                if overwrite:
                    place.tree.rename(temporary.path, place.path)
                else:
                    settle(temporary, place)
        with _told(path), place.tree.open("", os.O_RDONLY | os.O_DIRECTORY) as directory:
            os.fsync(directory)
    finally:
        temporary.remove()


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise FileInTheWay(f"{path} exists", path=str(path), hint="choose another name") from error
    except OSError as error:
        raise about_file(translated(error, "make", Subject(str(path), path=str(path)))) from error
