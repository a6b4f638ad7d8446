"""
A machine with all its images, as one thing to ask for its states.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import evolve

from statepool.backends.base import Context, Options, Target
from statepool.backends.machines import QCOW2MachineBackend
from statepool.backends.running import RunningStates
from statepool.errors import UsageError, about_file
from statepool.model.objects import Machine
from statepool.model.outcomes import Got, Listing, Removed, Stored, WaitFor
from statepool.model.scope import Scope
from statepool.transfer.working import refuse_inside
from statepool.transports.failures import Subject, translated

Working = Mapping[str, str | os.PathLike[str]]
"""Working images, by the names of a machine's images."""


class MachineHandle(RunningStates):
    """
    A machine with all its images, in a state pool: they are got, set and removed as one.

    :param machine: the machine; with the names of its images, those are what a state must have
    """

    def __init__(self, machine: Machine, backend: QCOW2MachineBackend) -> None:
        self.machine = machine
        self._backend = backend

    def __str__(self) -> str:
        return str(self.machine)

    def __repr__(self) -> str:
        images = f" with {', '.join(self.machine.images)}" if self.machine.images else ""
        return f"<MachineHandle {self}{images} in {self.context.cache.pool}>"

    @property
    def context(self) -> Context:
        """What its backends work with."""
        return self._backend.context

    def _target(self, working: Working | None = None) -> Target:
        return Target(self.machine, working or {})

    def show(self, *, scope: str | None = None) -> Listing:
        """:returns: its states and those of its images, each with where it is"""
        return self._backend.show(self._target(), Options(scope=Scope.permitted(scope)))

    def check(self, state: str, *, scope: str | None = None) -> bool:
        """:returns: whether a state of the whole machine can be had from the cache or a source in this scope"""
        return self._backend.check(self._target(), state, Options(scope=Scope.permitted(scope)))

    def images(self, state: str) -> tuple[str, ...]:
        """
        :returns: the names of the images that a state has
        :raises NotFound: nobody has it
        """
        return self._backend.images(self._target(), state)

    def get(
        self,
        state: str,
        *,
        to: str | os.PathLike[str] | Working | None = None,
        overwrite: bool = False,
        source: str | None = None,
        scope: str | None = None,
        dry_run: bool = False,
    ) -> Got:
        """
        Bring a state of all images into the cache, and make working images if they are asked for: all, or none.

        :param to: a directory, for ``IMAGE.qcow2`` of each image, which is made if it is missing; or the place of each image
        :param overwrite: whether files there give way
        :param source: have it as this source has it, given by its name or location; from the best one that has it if not given
        :param scope: from where it may come: any of ``own``, ``swarm``, ``cluster``, ``shared``; from anywhere if not given
        :raises NotFound: nobody has the state
        :raises FileInTheWay: a file is there
        :raises RefusedError: a place is inside the cache or a source
        :raises UsageError: the places are not those of the images which the state has
        """
        named = frozenset({source}) if source is not None else frozenset()
        options = Options(overwrite=overwrite, scope=Scope.permitted(scope), sources=named, dry_run=dry_run)
        if to is None or isinstance(to, Mapping):
            return self._backend.get(self._target(to), state, options)
        refuse_inside(to, self.context.cache, self.context.sources)
        images = self.machine.images or self._backend.images(self._target(), state, options)
        if dry_run and not os.path.lexists(to) and os.path.isdir(Path(to).parent):
            planned = self._backend.get(self._target(), state, options)
            places = {image: os.path.abspath(path) for image, path in _in_directory(to, images).items()}
            return evolve(planned, working=os.path.abspath(to), images=places)
        with _directory(Path(to), make=not dry_run):
            return self._backend.get(self._target(_in_directory(to, images)), state, options)

    def set(
        self,
        state: str,
        *,
        source: str | os.PathLike[str] | Working,
        replace: bool = False,
        squash: bool = False,
        labels: Mapping[str, str] | None = None,
        scope: str | None = None,
        wait_for: str = "all",
        dry_run: bool = False,
    ) -> Stored:
        """
        Make the working images of all images one state, in the cache and in the sources. Fresh overlays take their places.

        :param source: the working image of each image; or the directory with ``IMAGE.qcow2`` of each, if it is known which images there are
        :param replace: whether other content under the name gives way
        :param squash: for images only: a machine refuses it
        :param scope: which sources: any of ``own``, ``swarm``, ``cluster``, ``shared``; all if not given
        :param wait_for: which pools must have the state for the answer to be complete: ``all``, ``any`` or ``own``
        :raises Conflict: the name exists with other content
        :raises UsageError: the working image of one of its images is not named
        """
        if wait_for not in list(WaitFor):
            raise UsageError(f"wait_for cannot be {wait_for!r}", hint=", ".join(WaitFor))
        options = Options(
            replace=replace, squash=squash, labels=labels or {}, scope=Scope.permitted(scope), wait_for=WaitFor(wait_for), dry_run=dry_run
        )
        return self._backend.set(self._target(self._named(source)), state, options)

    def _named(self, source: str | os.PathLike[str] | Working) -> Working:
        if isinstance(source, Mapping):
            return source
        if not self.machine.images:
            raise UsageError(f"nobody knows which images {self.machine} has", hint="name the working image of each, as in disk=FILE")
        return _in_directory(source, self.machine.images)

    def unset(self, state: str, *, cascade: bool = False, scope: str | None = "own", dry_run: bool = False) -> Removed:
        """
        Remove a state, and with it those of its images.

        :param cascade: also what stands on them
        :param scope: from which pools; from the cache if not given, from all with None
        :raises NotFound: it is not there
        :raises HasDependants: something stands on a state of its images
        """
        return self._backend.unset(self._target(), state, Options(cascade=cascade, scope=Scope.permitted(scope), dry_run=dry_run))

    def check_root(self) -> bool:
        """:returns: whether the root image of each of its images can be had"""
        return self._backend.check_root(self._target())

    def get_root(self, *, to: str | os.PathLike[str] | Working | None = None, overwrite: bool = False, dry_run: bool = False) -> Got:
        """As :meth:`get`, of the root images."""
        options = Options(overwrite=overwrite, dry_run=dry_run)
        if to is None or isinstance(to, Mapping):
            return self._backend.get_root(self._target(to), options)
        refuse_inside(to, self.context.cache, self.context.sources)
        with _directory(Path(to), make=not dry_run):
            return self._backend.get_root(self._target(self._named(to)), options)

    def set_root(self, *, source: str | os.PathLike[str] | Working, replace: bool = False, scope: str | None = None, dry_run: bool = False) -> Stored:
        """As :meth:`set`, of the root images, which nothing may back. Each is set by itself, after all have been looked at."""
        options = Options(replace=replace, scope=Scope.permitted(scope), dry_run=dry_run)
        return self._backend.set_root(self._target(self._named(source)), options)

    def unset_root(self, *, scope: str | None = "own", dry_run: bool = False) -> Removed:
        """As :meth:`unset`, of the root images. Each is removed by itself, after all have been looked at."""
        return self._backend.unset_root(self._target(), Options(scope=Scope.permitted(scope), dry_run=dry_run))


def _in_directory(directory: str | os.PathLike[str], images: tuple[str, ...]) -> Working:
    return {image: Path(directory) / f"{image}.qcow2" for image in images}


@contextlib.contextmanager
def _directory(path: Path, *, make: bool) -> Iterator[None]:
    """A directory that is there, and not left behind if it was made for nothing."""
    made = make and not os.path.exists(path) and os.path.isdir(path.parent)
    if made:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise about_file(translated(error, "make the directory", Subject(str(path), path=str(path)))) from error
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
