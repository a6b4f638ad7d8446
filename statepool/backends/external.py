"""
External overlays: the default backend for images that are off.

Each state is a file of its own, backed by the one below it; a working image is an empty overlay on
top.
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

    :param context: what it works with
    """

    def own_state(self, target: Target, state: str) -> StateId:
        """As the backend's face says; the target is an image."""
        return image_state(target, state)

    def own_places(self, target: Target, options: Options) -> Mapping[str, Path]:
        """
        As the backend's face says.

        :raises FileInTheWay: something is there, and may not be overwritten
        :raises RefusedError: it is inside the cache or a source
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

        :raises UnsafeImage: something backs what is to be the root state
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
