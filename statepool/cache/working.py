"""
Making the writable image that a machine runs on: an empty overlay over a cached chain.
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
    Look whether a working image can be made somewhere, and change nothing.

    :param cache: which has the chain that it will stand on
    :param sources: the pools that the cache can be filled from
    :returns: where, absolute
    :raises FileInTheWay: something is there, and may not be overwritten
    :raises AccessDenied: what is there belongs to an account to which this one cannot give a file
    :raises InUse: what is there is open in another process
    :raises NotFound: there is no such directory
    :raises RefusedError: it is inside the cache or a source
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
        # A file would take its name: /dev/null would be none any more.
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
    Refuse a directory for working images in which everybody takes what is there for a pool's own.

    A pool of another tool is left alone: where its files are, its machines may run.

    :param directory: which need not be there yet
    :param sources: the pools that the cache can be filled from
    :raises RefusedError: it is inside the cache, but not where working images go, or inside a
        source on this host that has a log
    """
    # As the file system has it: a symbolic link on the way leads to the same place.
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
    A working image that is written, and has not got its name yet.

    :param record: of its use of the chain
    :param temporary: what it is called meanwhile
    :param to: where it is to be, in the same directory, which may be one that other accounts can
        exchange
    :param made: the status of its file
    :param flush: whether a power cut must not take it
    :param is_first: whether nothing had stood on its chain before
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

        :param overwrite: whether what is there gives way, in one step
        :raises FileInTheWay: somebody put something there meanwhile
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
        Flush it, if it is to be flushed, when it has the access of the file whose place it takes.
        """
        if access is None and not self.flush:
            return
        with open_same(self.temporary, self.made) as descriptor:
            if access is not None:
                access.give(descriptor, Path(self.to))
            if self.flush:
                os.fsync(descriptor)

    def drop(self) -> None:
        """Forget it."""
        self.temporary.remove()
        self.cache.chains.forget(self.record, with_chain=self.is_first)


def make_working(
    cache: Cache, chain: Sequence[Manifest], to: Path, *, overwrite: bool = False
) -> Path:
    """
    :param chain: of the cache, tip first
    :param to: where, absolute, as :func:`check_place` gave it
    :param overwrite: whether what is there gives way, in one step
    :returns: the image
    :raises FileInTheWay: somebody put something there meanwhile
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
    Do all that takes room for a working image, so that it only has to be given its name.

    :param chain: tip first
    :param to: where, absolute
    :param standing_on: those of the chain whose bytes must be in the cache already
    :param flush: bring it to stable storage
    :param access: who may do what with the file whose place it takes; None if there is none
    :raises AccessDenied: this account cannot make a file that these may do that with
    :raises DigestMismatch: bytes are gone
    :raises NoSpace: it does not fit
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
        # In a directory that is closed to us there is no image, and not even that can be asked.
        with contextlib.suppress(PermissionError):
            temporary.remove()
        cache.chains.forget(record, with_chain=is_first)
        raise
    fresh = Fresh(cache, record, temporary, place, made, flush, is_first)
    try:
        if record.stat() is None:
            # Whoever made another image in this place took it for the record of what was there
            # before, since ours was not to be seen yet.
            cache.chains.use(chain, path, flush=flush, record=record)
            _require_bytes(cache, standing_on)
        fresh.finish(access)
    except BaseException:
        fresh.drop()
        raise
    return fresh


def _require_bytes(cache: Cache, chain: Sequence[Manifest]) -> None:
    """A collector may have moved bytes aside before it could see the record of our use."""
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
    Look before a file is thrown away that somebody has named.

    :returns: it, absolute; it may be gone, or empty after a power cut
    :raises UnsafeImage: it is there, and no image
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
