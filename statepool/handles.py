"""
Handles: the operations of a user on the states of an object, also of a machine with all its images
together.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from attrs import evolve

from statepool.backends.base import Context, Options, Target
from statepool.backends.machines import QCOW2MachineBackend
from statepool.backends.running import RunningStates
from statepool.backends.sourced import SourcedStateBackend
from statepool.cache.working import refuse_inside
from statepool.capture.scratch import lasting
from statepool.errors import UsageError, about_file
from statepool.model.carried import Exported
from statepool.model.objects import Machine
from statepool.model.outcomes import GetResult, Listing, Removed, SetResult, WaitFor
from statepool.model.scope import Scope, Scopes
from statepool.sources.pool_source import Place, pools_of
from statepool.transports.failures import Subject, translated

Working = Mapping[str, str | os.PathLike[str]]
"""Working images, by the names of a machine's images."""


class Handle(ABC):
    """An object with states in a state pool."""

    _backend: SourcedStateBackend

    @abstractmethod
    def _target(self) -> Target:
        """:returns: the object, without working images"""

    def show(self, *, scope: Scopes | None = None) -> Listing:
        """
        :returns: its states, each with the pools that have it; for a machine, also those of its
            images
        """
        return self._backend.show(self._target(), Options(scope=Scope.permitted(scope)))

    def check(self, state: str, *, scope: Scopes | None = None) -> bool:
        """:returns: whether the cache or a source in this scope has a state"""
        return self._backend.check(self._target(), state, Options(scope=Scope.permitted(scope)))

    def store(
        self, state: str, *, to: Place, replace: bool = False, dry_run: bool = False
    ) -> SetResult:
        """
        Store a cached state in a source or any other pool, with all that it depends on.

        :param to: the name of a source, or the location of a pool
        :param replace: whether to replace other content under the name
        :raises NotFound: the cache does not have it
        :raises UsageError: the pool is the cache itself
        """
        return self._backend.store(
            self._target(), state, to, Options(replace=replace, dry_run=dry_run)
        )

    def export(
        self,
        state: str,
        *,
        to: str | os.PathLike[str] | IO[bytes],
        flat: bool = False,
        compress: str | None = None,
        overwrite: bool = False,
        scope: Scopes | None = None,
    ) -> Exported:
        """
        Write a state into one file, with all that it depends on: a bundle, which
        :meth:`~statepool.StatePool.import_bundle` reads.

        :param to: the destination: a path, or a file that is open for writing
        :param flat: write one image without a backing file instead; only for an image
        :param compress: ``zstd`` or ``none``; for a flat image also ``zlib``. If not given, a
            bundle is compressed, and a flat image is not
        :param overwrite: whether to overwrite a file there
        :param scope: the pools from which it may come: any of ``own``, ``swarm``, ``cluster``,
            ``shared``; all if not given
        :raises NotFound: no pool has the state
        :raises FileInTheWay: a file is there
        :raises UsageError: it cannot be written in this form
        """
        from statepool.bundles.export import Form, export  # seldom needed, slow to import

        form = Form(flat=flat, compress=compress, overwrite=overwrite)
        return export(
            self._backend, self._target(), state, to, Options(scope=Scope.permitted(scope)), form
        )

    def unset(
        self, state: str, *, cascade: bool = False, scope: Scopes = Scope.OWN, dry_run: bool = False
    ) -> Removed:
        """
        Remove a state; for a machine, also those of its images.

        :param cascade: also remove its dependants
        :param scope: the pools to remove it from; the cache if not given, every pool with ``all``
        :raises NotFound: there is no such state
        :raises HasDependants: other states depend on it
        """
        return self._backend.unset(
            self._target(),
            state,
            Options(cascade=cascade, scope=Scope.parse(scope), dry_run=dry_run),
        )


class MachineHandle(RunningStates, Handle):
    """
    A machine with all its images, in a state pool: they are got, set and removed as one.

    :param machine: the machine; if it has the names of its images, a state must have these images
    """

    _backend: QCOW2MachineBackend

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
        """The cache, the sources and the other parts that its backends work with."""
        return self._backend.context

    def _target(self, working: Working | None = None) -> Target:
        return Target(self.machine, working or {})

    def images(self, state: str) -> tuple[str, ...]:
        """
        :returns: the names of the images that a state has
        :raises NotFound: no pool has it
        """
        return self._backend.images(self._target(), state)

    def get(
        self,
        state: str,
        *,
        to: str | os.PathLike[str] | Working | None = None,
        overwrite: bool = False,
        mirror: str | None = None,
        scope: Scopes | None = None,
        dry_run: bool = False,
    ) -> GetResult:
        """
        Bring a state of all images into the cache, and make working images if asked to: all, or
        none.

        :param to: a directory, for ``IMAGE.qcow2`` of each image, which is made if it is missing;
            or the place of each image
        :param overwrite: whether to overwrite files there
        :param mirror: get the state from this source, given by its name or location; if not given,
            from the best one that has it
        :param scope: the pools from which it may come: any of ``own``, ``swarm``, ``cluster``,
            ``shared``; all if not given
        :raises NotFound: neither the cache nor a source has the state
        :raises FileInTheWay: a file is there
        :raises RefusedError: a place is inside the cache or a source
        :raises UsageError: the places are not those of the images which the state has
        """
        named = frozenset({mirror}) if mirror is not None else frozenset()
        options = Options(
            overwrite=overwrite, scope=Scope.permitted(scope), sources=named, dry_run=dry_run
        )
        if to is None or isinstance(to, Mapping):
            return self._backend.get(self._target(to), state, options)
        refuse_inside(to, self.context.cache, pools_of(self.context.sources))
        images = self.machine.images or self._backend.images(self._target(), state, options)
        if dry_run and not os.path.lexists(to) and os.path.isdir(Path(to).parent):
            planned = self._backend.get(self._target(), state, options)
            places = {
                image: Path(os.path.abspath(path))
                for image, path in _in_directory(to, images).items()
            }
            return evolve(planned, working=Path(os.path.abspath(to)), images=places)
        with _directory(Path(to), make=not dry_run):
            return self._backend.get(self._target(_in_directory(to, images)), state, options)

    @contextlib.contextmanager
    def working(
        self, state: str, *, keep: str = "never", directory: str | os.PathLike[str] | None = None
    ) -> Iterator[dict[str, Path]]:
        """
        Yield a working image of each image, by its name, for the length of a ``with`` block.

        :param keep: ``never``, ``failed`` (if the block raises) or ``always``
        :param directory: their directory; one beside the cache's data if not given
        :raises NotFound: neither the cache nor a source has the state
        :raises UsageError: ``keep`` has another value
        """
        names = {
            image: f"{self.machine}-{image}-{state}"
            for image in self.machine.images or self.images(state)
        }
        with lasting(self.context.cache, names, keep=keep, directory=directory) as paths:
            self.get(state, to=paths)
            yield paths

    def set(
        self,
        state: str,
        *,
        source: str | os.PathLike[str] | Working,
        replace: bool = False,
        squash: bool = False,
        labels: Mapping[str, str] | None = None,
        scope: Scopes | None = None,
        wait_for: str = WaitFor.ALL,
        dry_run: bool = False,
    ) -> SetResult:
        """
        Make one state of the working images of all images, in the cache and in the sources. Fresh
        overlays take their places.

        :param source: the working image of each image; or the directory with ``IMAGE.qcow2`` of
            each, if the names of the images are known
        :param replace: whether to replace other content under the name
        :param squash: for images only: a machine refuses it
        :param scope: the sources to use: any of ``own``, ``swarm``, ``cluster``, ``shared``; all if
            not given
        :param wait_for: which pools must have the state for the answer to be complete: ``all``,
            ``any`` or ``own``
        :raises Conflict: the name exists with other content
        :raises UsageError: the working image of one of its images is not named
        """
        options = Options(
            replace=replace,
            squash=squash,
            labels=labels or {},
            scope=Scope.permitted(scope),
            wait_for=WaitFor.parse(wait_for),
            dry_run=dry_run,
        )
        return self._backend.set(self._target(self._named(source)), state, options)

    def _named(self, source: str | os.PathLike[str] | Working) -> Working:
        if isinstance(source, Mapping):
            return source
        if not self.machine.images:
            raise UsageError(
                f"nobody knows which images {self.machine} has",
                hint="name the working image of each, as in disk=FILE",
            )
        return _in_directory(source, self.machine.images)


def _in_directory(directory: str | os.PathLike[str], images: tuple[str, ...]) -> Working:
    return {image: Path(directory) / f"{image}.qcow2" for image in images}


@contextlib.contextmanager
def _directory(path: Path, *, make: bool) -> Iterator[None]:
    """
    Make a directory, if it is missing and ``make`` is set. If the block fails, remove it again.
    """
    made = make and not os.path.exists(path) and os.path.isdir(path.parent)
    if made:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise about_file(
                translated(error, "make the directory", Subject(str(path), path=str(path)))
            ) from error
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
