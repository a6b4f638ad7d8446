"""
External overlays: the default backend for images that are off.

Each state is a file of its own, backed by the file of its parent. A working image is an empty
overlay on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from statepool.backends.answers import image_state
from statepool.backends.base import Options, Target
from statepool.backends.sourced import SourcedStateBackend
from statepool.cache.working import check_place, make_working
from statepool.capture.capture import CaptureResult, absolute
from statepool.capture.squash import Squash
from statepool.errors import UsageError
from statepool.model.manifest import Manifest, StateId
from statepool.sources.pool_source import pools_of


class QCOW2ExtBackend(SourcedStateBackend):
    """
    States of an image as files of their own in the cache and its sources.

    :param context: the cache, the sources and the other parts to work with
    """

    def own_state(self, target: Target, state: str) -> StateId:
        """:returns: the state of an image that a target and a name mean"""
        return image_state(target, state)

    def own_places(self, target: Target, options: Options) -> Mapping[str, Path]:
        """
        Check whether the working image can be made, and change nothing.

        :returns: its absolute path, by the name of the image
        :raises FileInTheWay: a file is there, and may not be overwritten
        :raises RefusedError: the path is inside the cache or a source
        """
        sources = pools_of(self.context.sources)
        return {
            image: check_place(path, self._cache, sources, overwrite=options.overwrite)
            for image, path in target.working.items()
        }

    def own_get(
        self,
        target: Target,
        chain: tuple[Manifest, ...],
        places: Mapping[str, Path],
        options: Options,
    ) -> Path | None:
        """Make the target's working image, if it has one."""
        made = [
            make_working(self._cache, chain, path, overwrite=options.overwrite)
            for path in places.values()
        ]
        return made[-1] if made else None

    def own_set(self, target: Target, wanted: StateId, options: Options) -> CaptureResult:
        """
        Make the target's working image a state of the cache, and a fresh overlay in its place.

        :raises UnsafeImage: the image that is to become the root state has a backing file
        """
        if len(target.working) != 1:
            raise UsageError(
                f"one working image of {wanted.object} must be named to set a state from",
                hint="--from FILE",
            )
        (working,) = target.working.values()
        capture = self._capture(wanted, {wanted: absolute(working)}, options)
        squash = Squash(capture)
        if options.squash and squash.is_due:
            return squash.run(dry_run=options.dry_run)
        return capture.run(dry_run=options.dry_run)
