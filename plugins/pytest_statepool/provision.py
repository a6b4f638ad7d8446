"""
The working images of a run: made when a test asks for them, and removed after it. If a run was
killed, the next run removes them.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_statepool.builders import BUILDERS, Builder
from pytest_statepool.tally import Row, Tally
from pytest_statepool.wishes import Wish
from pytest_statepool.working import Working

if TYPE_CHECKING:
    from statepool import Ensured, GetResult, StatePool

_LOCK = "run.lock"
_STALE = 7 * 24 * 3600
"""
Seconds after which no process can still be making a directory: a killed process does not remove it.
"""

_KEPT = ".kept"
"""The file beside a working image which says that the image is kept."""


class Provisioner:
    """
    A maker of working images of states.

    They lie in a directory of this process in the cache, with a lock that the kernel releases when
    the process ends: so a later process can tell what a killed process has left.

    :param pool: the pool from which states come
    :param tally: counts what was done
    :param rebuild: the id of this run, if it should build states with builders again
    """

    def __init__(self, pool: StatePool, tally: Tally, rebuild: str | None = None) -> None:
        self.pool = pool
        self._tally = tally
        self._rebuild = rebuild
        self._resolved: dict[tuple[str, str], str] = {}
        self._made = 0
        self._free: list[Path] = []
        self._lock: int | None = None
        self._postponed = 0
        self._is_over = False

    # -- states ------------------------------------------------------------------------------------

    def provision(self, wish: Wish, label: str) -> Working:
        """
        :param label: becomes part of the working image's name
        :returns: a fresh working image; for a machine, those of all its images
        :raises StatePoolError: the state cannot be fetched or built
        """
        begun = time.perf_counter()
        row = Row()
        name = wish.state if wish.is_machine else self._resolve(wish.object, wish.state, row)
        self._made += 1
        # One directory for each: QEMU and a set of a running machine may put files beside an image.
        place = self._new_place(f"{label}-{self._made}")
        try:
            working = self._make(wish, name, place, row)
        except BaseException:
            place.rmdir()
            raise
        row.reused = int(not row.fetched and not row.built)
        row.seconds = time.perf_counter() - begun
        self._tally.note(str(wish), row)
        return working

    def _new_place(self, name: str) -> Path:
        place = self._directory / name
        if self._free:
            return self._free.pop().rename(place)
        place.mkdir()
        return place

    def _make(self, wish: Wish, name: str, place: Path, row: Row) -> Working:
        if wish.is_machine:
            got = self.pool.machine(wish.object).get(name, to=place)
            self._count(row, got)
            return Working.of_machine(
                wish, place, {image: Path(path) for image, path in got.images.items()}
            )
        path = place / f"{wish.object.partition('/')[2]}.qcow2"
        self._count(row, self.pool.image(wish.object).get(name, to=path))
        return Working.of_image(wish, name, path)

    @contextmanager
    def working(self, object: str, state: str) -> Iterator[Working]:
        """
        Make a working image for the duration of a ``with`` block: for fixtures of a class or a
        module, which several tests share.

        :param object: ``machine/image``, or a machine
        :param state: the name that tests ask for
        :raises StatePoolError: the state cannot be fetched or built
        """
        from statepool import parse_object

        wish = Wish(str(parse_object(object)), state)
        working = self.provision(wish, "shared")
        try:
            yield working
        finally:
            self.throw_away(working)

    def _count(self, row: Row, got: GetResult) -> None:
        row.fetched += int(got.source is not None)
        row.bytes += got.bytes

    def _resolve(self, object: str, state: str, row: Row) -> str:
        """
        :returns: the name under which a state is stored. If it has a builder and no pool has it, it
            is built first.
        """
        builder = BUILDERS.find(object, state)
        if builder is None:
            return state
        known = self._resolved.get((object, state))
        if known is None:
            ensured = self._ensure(builder)
            known = self._resolved[object, state] = ensured.name
            row.built += int(ensured.built)
            self._tally.superseded += [
                f"{object} {old}: {self._removal(object, old)}" for old in ensured.superseded
            ]
            self._count(row, ensured.got)
        return known

    def _removal(self, object: str, state: str) -> str:
        places = [
            "--cache",
            self.pool.cache.path,
            *(word for source in self.pool.sources for word in ("--source", str(source))),
        ]
        return shlex.join(["statepool", *places, "unset", object, state, "--everywhere"])

    def _ensure(self, builder: Builder) -> Ensured:
        from statepool import NotFound

        parent = (
            self._resolve(builder.object, builder.parent, Row())
            if builder.parent is not None
            else None
        )
        try:
            with _secrets_hidden():
                return self.pool.image(builder.object).ensure(
                    builder.state,
                    builder.function,
                    parent=parent,
                    key=builder.key,
                    parameters=builder.parameters,
                    timeout=builder.timeout,
                    again=self._rebuild,
                )
        except NotFound as error:
            if parent is None or error.state != builder.parent:
                raise
            raise NotFound(
                f"the builder at {builder.place} starts from {builder.object} {parent}, which no"
                " pool has and no builder makes",
                object=builder.object,
                state=parent,
                hint=(
                    f'declare @vm_state_builder("{builder.object}", "{parent}") in a conftest.py,'
                    " or set that state"
                ),
            ) from error

    # -- working images ----------------------------------------------------------------------------

    @cached_property
    def _base(self) -> Path:
        return self.pool.working_directory()

    @cached_property
    def _directory(self) -> Path:
        """
        Return the directory of this process, after removing directories of processes that have
        ended.
        """
        self._clear(self._base)
        name = f"pytest-{os.getpid()}-{time.time_ns()}"
        # It gets its final name after it is locked: before that it would look like the directory of
        # a process that has ended.
        new = self._base / f"new-{name}"
        new.mkdir()
        self._lock = os.open(new / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return new.rename(self._base / name)

    def _clear(self, base: Path) -> None:
        for path in base.glob("pytest-*"):
            _if_alone(path, lambda path=path: self._remove(path))  # type: ignore[misc]
        for path in base.glob("new-*"):
            # its maker has just renamed it, or another process has removed it
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE:
                    shutil.rmtree(path)

    def _remove(self, directory: Path) -> None:
        """Remove the directory of a run, except for what is to be kept."""
        if not _is_own(directory):
            return
        places = [path for path in directory.iterdir() if _is_own(path)]
        kept = [place for place in places if (place / _KEPT).exists()]
        for place in places:
            if place not in kept:
                self._remove_place(place)
        if not kept:
            shutil.rmtree(directory)

    def _remove_place(self, place: Path) -> None:
        for image in place.glob("*.qcow2"):
            self.pool.throw_away(image)
        # a process that is ending may still create files there
        shutil.rmtree(place, ignore_errors=True)

    def keep(self, working: Working) -> Path:
        """:returns: the working image, which is not removed from now on"""
        (_place(working) / _KEPT).touch()
        return working.path

    def throw_away(self, working: Working) -> None:
        """Delete a working image."""
        place = _place(working)
        for image in working.images.values():
            self.pool.throw_away(image)
        if place.is_dir() and not any(place.iterdir()):
            self._free.append(place)  # removing a directory costs more than all the rest
        else:
            self._remove_place(place)

    def postpone(self, settle: Callable[[bool], None]) -> Callable[[bool], None]:
        """
        :param settle: keeps or removes working images, according to its argument
        :returns: a function that does the same; until it is called the directory stays, even if the
            run has ended
        """
        self._postponed += 1

        def settle_now(keep: bool) -> None:
            try:
                if self._base.exists():  # otherwise the maker of the pool has removed it
                    settle(keep)
            finally:
                self._postponed -= 1
                if self._is_over:
                    self.close()

        return settle_now

    def close(self) -> None:
        """End the run: remove the directory."""
        self._is_over = True
        if self._lock is not None and not self._postponed:
            if self._directory.exists():
                self._remove(self._directory)
            os.close(self._lock)
            self._lock = None


@contextmanager
def _secrets_hidden() -> Iterator[None]:
    """Hide passwords from programs that a builder starts: the state pool has read them already."""
    from statepool import Config

    taken = {name: os.environ.pop(name) for name in Config.SECRET_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def _is_own(directory: Path) -> bool:
    """
    :returns: whether this account made a directory: in a cache that a group shares, its members can
        replace the directories above it, also by links
    """
    try:
        found = os.lstat(directory)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _place(working: Working) -> Path:
    return working.path if working.is_machine else working.path.parent


class Provisioners:
    """
    The provisioners of a run, one for each state pool: a directory with tests can have its own
    state pool.

    :param tally: counts what was done
    :param rebuild: as for :class:`Provisioner`
    """

    def __init__(self, tally: Tally, rebuild: str | None = None) -> None:
        self._tally = tally
        self._rebuild = rebuild
        self._known: list[tuple[StatePool, Provisioner]] = []

    def of(self, pool: StatePool) -> Provisioner:
        """:returns: the provisioner of a state pool"""
        for known, provisioner in self._known:
            if known is pool:
                return provisioner
        self._known.append((pool, Provisioner(pool, self._tally, self._rebuild)))
        return self._known[-1][1]

    def close(self) -> None:
        """Close all provisioners at the end of the run."""
        for _, provisioner in self._known:
            provisioner.close()


def _if_alone(directory: Path, do: Callable[[], None]) -> None:
    """Run an operation on the directory of a process, only if that process has ended."""
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # another process is making or removing it now
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        if directory.exists():  # otherwise another process has just done it
            do()
    finally:
        os.close(lock)
