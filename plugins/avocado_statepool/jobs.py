"""
The working images of a job: made when a test asks for them, and removed after it. If a job was
killed, the next job removes them.

They lie in a directory of the job in the cache, which has a directory for each test. The job holds
a lock, which the kernel releases when its process ends: so the next job can tell what a killed job
has left. Removing what does not exist does nothing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avocado_statepool.options import config_of
from avocado_statepool.record import Given, Record, unlink_images
from avocado_statepool.wishes import Wish

if TYPE_CHECKING:
    from statepool import StatePool

_LOCK = ".lock"
"""
The suffix of the file beside a job's directory that the job has locked. The file exists, and is
locked, before the directory is made.
"""

_PREFIX = "avocado-"


def open_pool(known: Mapping[str, Any]) -> StatePool:
    """
    :param known: settings of avocado
    :returns: the cache and its sources
    :raises StatePoolError: the configuration cannot be used
    """
    from statepool import from_config

    return from_config(config_of(known))


class JobImages:
    """
    The working images of a job.

    :param pool: the pool from which states come
    :param job: the name of the job, which is the name of the directory of its results
    """

    def __init__(self, pool: StatePool, job: str) -> None:
        self._pool = pool
        self._base = Path(pool.working_directory())
        self.root = self._base / f"{_PREFIX}{job}"
        self._lock: int | None = None

    # -- of the job --------------------------------------------------------------------------------

    def begin(self) -> None:
        """
        Remove what ended jobs have left, and hold the directory of this job until :meth:`end`.
        """
        for path in self._base.glob(f"{_PREFIX}*"):
            if path.is_dir():
                self._clear(path)
        self._lock = os.open(_lock_of(self.root), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.root.mkdir(exist_ok=True)

    def end(self) -> None:
        """End the job: remove all that is left of it."""
        self._remove(self.root)
        if self._lock is not None:
            _lock_of(self.root).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _clear(self, directory: Path) -> None:
        lock = os.open(_lock_of(directory), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        else:
            self._remove(directory)
            _lock_of(directory).unlink(missing_ok=True)
        finally:
            os.close(lock)

    def _remove(self, directory: Path) -> None:
        for image in (
            path for path in directory.rglob("*.qcow2") if _is_own(path) and _is_own(path.parent)
        ):
            self._pool.throw_away(os.readlink(image) if image.is_symlink() else image)
        shutil.rmtree(directory, ignore_errors=True)

    # -- of a test ---------------------------------------------------------------------------------

    def provision(self, wishes: Sequence[Wish], logdir: Path, test: str) -> Record:
        """
        Make the working images that a test asks for. Earlier ones of the same test are removed
        first.

        :param logdir: of the test; the test's directory in the job's directory has the same name
        :param test: its name, for messages
        :returns: the record of what the test was given, which is also in its log directory
        :raises StatePoolError: a state cannot be fetched; the test then gets none
        """
        self.release(logdir)
        record = Record(test)
        directory = self.root / logdir.name
        directory.mkdir(parents=True)
        try:
            for number, wish in enumerate(wishes):
                record.given.append(self._make(wish, directory / str(number), directory))
        except BaseException:
            self.release(logdir)
            raise
        record.write(logdir)
        return record

    def _make(self, wish: Wish, place: Path, directory: Path) -> Given:
        from statepool import Machine, parse_object

        begun = time.perf_counter()
        subject = parse_object(wish.object)
        if isinstance(subject, Machine):
            to = Path(os.path.abspath(os.path.expanduser(wish.to))) if wish.to else place
            got = self._pool.machine(subject).get(wish.state, to=to)
            images = {f"{subject}/{name}": str(path) for name, path in got.images.items()}
        else:
            if not wish.to:
                place.mkdir()
            to = (
                Path(os.path.abspath(os.path.expanduser(wish.to)))
                if wish.to
                else place / f"{subject.machine}-{subject.name}.qcow2"
            )
            got = self._pool.image(subject).get(wish.state, to=to)
            images = {str(subject): str(to)}
        if wish.to:
            self._remember(directory, images.values())
        return Given(
            wish.object,
            wish.state,
            images,
            got.source is not None,
            got.bytes,
            time.perf_counter() - begun,
            got.source,
        )

    @staticmethod
    def _remember(directory: Path, paths: Any) -> None:
        """Record images that lie elsewhere, so that they are removed with the others."""
        elsewhere = directory / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        for path in paths:
            (elsewhere / f"{len(list(elsewhere.iterdir()))}.qcow2").symlink_to(path)

    def release(self, logdir: Path) -> None:
        """Remove the working images of a test. Do nothing if it has none."""
        self._remove(self.root / logdir.name)
        unlink_images(logdir)


def _is_own(path: Path) -> bool:
    """
    :returns: whether this account made a file: in a cache that a group shares, its members can
        replace the directories above it
    """
    try:
        return os.lstat(path).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _lock_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}{_LOCK}")


def job_of(logdir: Path) -> str:
    """
    :returns: the name of the job that a test's log directory, ``JOB/test-results/TEST``, is in
    """
    return logdir.parent.parent.name
