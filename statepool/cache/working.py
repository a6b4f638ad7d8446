"""
Working images: the creation of the writable image on which a machine runs, an empty overlay over a
cached chain.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from attrs import frozen

from statepool.beneath import Beneath, beside, settle
from statepool.cache.access import OURS_ALONE, Access
from statepool.cache.cache import WORKING, Cache
from statepool.cache.chains import key_of, temporary_name
from statepool.cache.check_cached import damaged
from statepool.errors import FileInTheWay, InUse, MissingFile, NotFound, RefusedError, about_file
from statepool.model.manifest import Manifest
from statepool.pools import layout
from statepool.pools.json_files import ACCOUNTS
from statepool.pools.pool import Pool
from statepool.qcow2.files import open_regular, open_same, refusal
from statepool.qcow2.header import MAGIC
from statepool.qcow2.opened import is_open
from statepool.qcow2.overlay import create_overlay
from statepool.qcow2.tool import QemuImg
from statepool.transports.failures import Subject, translated


def check_place(
    to: os.PathLike[str] | str, cache: Cache, sources: Iterable[Pool], *, overwrite: bool
) -> Path:
    """
    Check that a working image can be made at a path, and change nothing.

    :param cache: the cache with the chain that will back it
    :param sources: the pools from which the cache can be filled
    :returns: the absolute path
    :raises FileInTheWay: a file is there, and may not be overwritten
    :raises AccessDenied: the file there belongs to an account to which this account cannot give a
        file
    :raises InUse: the file there is open in another process
    :raises NotFound: there is no such directory
    :raises RefusedError: the path is inside the cache or a source
    """
    path = Path(os.path.abspath(os.fsdecode(to)))
    refuse_inside(path.parent, cache, sources)
    if not path.parent.is_dir():
        raise NotFound(
            f"there is no directory {path.parent}", path=str(path.parent), hint="make it first"
        )
    if not os.path.lexists(path):
        return path
    if path.is_dir():
        raise FileInTheWay(f"{path} is a directory", path=str(path), hint="name a file")
    if not path.is_symlink() and not path.is_file():
        # The image would take its name: /dev/null would become a regular file.
        raise FileInTheWay(
            f"{path} is a device, a socket or a FIFO",
            path=str(path),
            hint="name a file; a working image is always one",
        )
    if not overwrite:
        raise FileInTheWay(
            f"{path} exists",
            path=str(path),
            hint="choose another name, or allow it to be overwritten with --overwrite",
        )
    if path.is_file() and not path.is_symlink() and is_open(path):
        raise InUse(
            f"{path} is open in another process",
            path=str(path),
            hint="stop the machine that runs on it",
        )
    if (access := Access.at(path)) is not None:
        access.require_givable(path)
    return path


def refuse_inside(directory: os.PathLike[str] | str, cache: Cache, sources: Iterable[Pool]) -> None:
    """
    Refuse a directory for working images that is inside a pool: any file there is taken for a file
    of the pool.

    A pool of another tool is permitted: its machines may run where its files are.

    :param directory: the directory, which need not exist yet
    :param sources: the pools from which the cache can be filled
    :raises RefusedError: the directory is inside the cache, but not the place for working images,
        or inside a source on this host that has a log
    """
    # Compare resolved paths: a symbolic link on the way leads to the same place.
    real = Path(os.path.realpath(directory))
    if _is_inside(real, cache.root):
        if any(
            _is_inside(real, cache.root / place)
            for place in (layout.WORKING, f"{ACCOUNTS}/{os.geteuid()}/{WORKING}")
        ):
            return
        raise _inside(directory, f"the cache {cache.root}", str(cache.pool))
    for pool in sources:
        root = pool.transport.local_path("")
        if root is not None and _is_inside(real, root) and pool.is_managed:
            raise _inside(directory, f"the pool {pool}", str(pool))


def _is_inside(real: Path, root: Path) -> bool:
    return real.is_relative_to(os.path.realpath(root))


def _inside(directory: os.PathLike[str] | str, what: str, pool: str) -> RefusedError:
    place = os.path.abspath(directory)
    return RefusedError(
        f"no working image can be made in {place}: it is inside {what}",
        pool=pool,
        path=place,
        hint="choose a place outside of it",
    )


@frozen
class Fresh:
    """
    A working image that is written, but does not have its name yet.

    :param record: of its use of the chain
    :param temporary: its file meanwhile
    :param to: its final file, in the same directory; other accounts may be able to replace that
        directory
    :param made: the status of its file
    :param flush: whether it must survive a power cut
    :param is_first: whether its chain was not in use before
    """

    cache: Cache
    record: Beneath
    temporary: Beneath
    to: Beneath
    made: os.stat_result
    flush: bool
    is_first: bool

    def settle(self, *, overwrite: bool) -> None:
        """
        Give it its name.

        :param overwrite: whether an existing file is replaced, by an atomic rename
        :raises FileInTheWay: another process put a file there meanwhile
        """
        try:
            _settle(self.temporary, self.to, overwrite)
        except BaseException:
            self.drop()
            raise
        self.temporary.remove()
        if self.flush:
            with self.to.tree.open("", os.O_RDONLY | os.O_DIRECTORY) as directory:
                os.fsync(directory)
        if overwrite:
            self.cache.chains.release(Path(self.to), besides=self.record)

    def finish(self, access: Access | None) -> None:
        """
        Give the image the access rights of the file that it replaces, and flush it if required.
        """
        if access is None and not self.flush:
            return
        with open_same(self.temporary, self.made) as descriptor:
            if access is not None:
                access.give(descriptor, Path(self.to))
            if self.flush:
                os.fsync(descriptor)

    def drop(self) -> None:
        """Remove the image and its record."""
        self.temporary.remove()
        self.cache.chains.forget(self.record, with_chain=self.is_first)


def make_working(
    cache: Cache, chain: Sequence[Manifest], to: Path, *, overwrite: bool = False
) -> Path:
    """
    :param chain: of the cache, tip first
    :param to: its absolute path, as :func:`check_place` returned it
    :param overwrite: whether an existing file is replaced, by an atomic rename
    :returns: the image
    :raises FileInTheWay: another process put a file there meanwhile
    """
    access = Access.at(to) if overwrite else None
    prepare_working(cache, chain, to, standing_on=chain, access=access).settle(overwrite=overwrite)
    return to


def prepare_working(
    cache: Cache,
    chain: Sequence[Manifest],
    to: Path | Beneath,
    *,
    standing_on: Sequence[Manifest],
    flush: bool = False,
    access: Access | None = None,
) -> Fresh:
    """
    Do all work for a working image that takes room, so that it only has to be given its name.

    :param chain: tip first
    :param to: its absolute path
    :param standing_on: those states of the chain whose bytes must be in the cache already
    :param flush: bring the image to stable storage
    :param access: the access rights of the file that it replaces; None if there is none
    :raises AccessDenied: this account cannot make a file with these access rights
    :raises DigestMismatch: bytes are missing
    :raises NoSpace: the image does not fit
    """
    is_first = not cache.chains.has(key_of(chain))
    place, path = to if isinstance(to, Beneath) else beside(to), Path(to)
    record = cache.chains.use(chain, path, flush=flush)
    temporary = Beneath(place.tree, temporary_name(path, record).name)
    try:
        _require_bytes(cache, standing_on)
        backing = str(cache.chains.path(chain))
        mode = OURS_ALONE if access is not None else 0o666
        made = create_overlay(
            temporary,
            chain[0].virtual_size,
            backing,
            tool=QemuImg(cache.settings.tool_timeout),
            known_as=path,
            mode=mode,
        )
    except BaseException:
        # In a directory that is closed to this account there is no image, and the removal fails.
        with contextlib.suppress(PermissionError):
            temporary.remove()
        cache.chains.forget(record, with_chain=is_first)
        raise
    fresh = Fresh(cache, record, temporary, place, made, flush, is_first)
    try:
        if record.stat() is None:
            # Another process that made an image in this place took our record for that of the old
            # file, since our image was not visible yet.
            cache.chains.use(chain, path, flush=flush, record=record)
            _require_bytes(cache, standing_on)
        fresh.finish(access)
    except BaseException:
        fresh.drop()
        raise
    return fresh


def _require_bytes(cache: Cache, chain: Sequence[Manifest]) -> None:
    """
    Check that the bytes are there: a collector may have moved them aside before it could see the
    record of our use.
    """
    lacking = cache.pool.lacking(
        manifest.digest for manifest in chain if manifest.digest is not None
    )
    for manifest in chain:
        if manifest.digest in lacking:
            raise damaged(cache, manifest)


def _settle(temporary: Beneath, to: Beneath, overwrite: bool) -> None:
    try:
        if overwrite:
            to.tree.rename(temporary.path, to.path)
        else:
            settle(temporary, to)
    except FileExistsError as error:
        raise FileInTheWay(f"{to} exists", path=str(to), hint="choose another name") from error
    except OSError as error:
        raise about_file(translated(error, "make", Subject(str(to), path=str(to)))) from error


def require_image(working: os.PathLike[str] | str) -> Path:
    """
    Check that a file which a user wants to delete is an image.

    :returns: its absolute path; the file may be missing, or empty after a power cut
    :raises UnsafeImage: the file exists, and is no image
    """
    path = Path(os.path.abspath(os.fsdecode(working)))
    with contextlib.suppress(MissingFile):
        with open_regular(path) as descriptor:
            beginning = os.pread(descriptor, len(MAGIC), 0)
        if beginning and beginning != MAGIC:
            raise refusal("magic", str(path), "it is no working image", path=str(path))
    return path


def throw_away(cache: Cache, working: Path | Beneath) -> None:
    """Delete a working image and the record of it."""
    (working if isinstance(working, Beneath) else beside(working)).remove()
    cache.chains.release(Path(working))
