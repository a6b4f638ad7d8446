"""The interface of all backends, and the search for a backend by its name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

from attrs import field, frozen

from statepool.cache.cache import Cache
from statepool.errors import UsageError
from statepool.model.manifest import check_labels
from statepool.model.objects import Object
from statepool.model.outcomes import GetResult, Listed, Removed, SetResult, WaitFor
from statepool.model.progress import SILENT, Progress
from statepool.model.scope import Scope
from statepool.sources.source import Source
from statepool.sources.source_stats import SourceStats

ENTRY_POINTS = "statepool.backends"
"""The entry point group in which backends are registered."""


@frozen
class Context:
    """
    The environment of a backend: all that it needs to work.

    :param cache: the pool of this host
    :param sources: the pools that it can be filled from, best first
    :param progress: told of every transfer
    :param creator: the programs that make states here: their versions, by their names
    :param stats: the measured throughput and health of the sources
    """

    cache: Cache
    sources: tuple[Source, ...] = ()
    progress: Progress = SILENT
    creator: Mapping[str, str] = field(factory=dict)
    stats: SourceStats = field(eq=False, repr=False)

    @stats.default
    def _of_this_cache(self) -> SourceStats:
        return SourceStats(self.cache.notes)


def working_images(paths: Mapping[str, str | os.PathLike[str]]) -> dict[str, Path]:
    """
    :param paths: of working images, by the names of a machine's images
    :returns: the same as paths; they are checked first, since as a :class:`~pathlib.Path`,
        ``work/`` would be the file ``work``
    :raises UsageError: a path is that of a directory, or empty
    """
    for image, path in paths.items():
        if not os.fspath(path):
            raise UsageError(f"no working image is named for {image}", hint="name a file")
        if os.path.basename(path) in ("", os.curdir, os.pardir):
            raise UsageError(
                f"{os.fspath(path)} is a directory, not a working image",
                path=os.fspath(path),
                hint="name a file",
            )
    return {image: Path(path) for image, path in paths.items()}


@frozen
class Target:
    """
    The target of an operation.

    :param object: an image, or a machine
    :param working: the working images, by the names of the machine's images; for operations that
        need or make them
    :param monitor: the socket of the running machine's QMP monitor, or None if it is off
    :raises UsageError: a working image is not named as a file
    """

    object: Object
    working: Mapping[str, Path] = field(factory=dict, converter=working_images)
    monitor: Path | None = None


@frozen
class Options:
    """
    The options of an operation.

    :param overwrite: of get: overwrite a file in the place of the working image
    :param replace: of set: replace other content under the name, if no state depends on it
    :param cascade: of unset: remove the dependants of the state, too
    :param scope: which pools are used: ``own`` is the cache. A set goes through the cache even if
        it is not among them
    :param sources: of get: only these sources, by their names or locations; empty: all that the
        scope permits
    :param labels: of set: notes of the state's owner: at most 64 texts of at most 4096 characters
    :param squash: of set: if the working image is backed by the very state to set, the content of
        both becomes the new content of the state
    :param copying: of set: leave the working image as it is, and store a copy
    :param wait_for: of set: which pools must have the state for the result to be complete
    :param dry_run: report what would be done, and change nothing
    """

    overwrite: bool = False
    replace: bool = False
    cascade: bool = False
    scope: frozenset[Scope] = frozenset(Scope)
    sources: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(factory=dict, converter=check_labels)
    squash: bool = False
    copying: bool = False
    wait_for: WaitFor = WaitFor.ALL
    dry_run: bool = False


DEFAULTS = Options()
"""The default options: nothing is overwritten, replaced or cascaded, and every pool is used."""


class StateBackend(ABC):
    """
    The operations on the states of one kind of object. One state is special: ``root`` is the
    existence of the object itself.

    :param context: the cache, the sources and the other parts to work with
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def show(self, target: Target) -> list[Listed]:
        """:returns: the states of an object, wherever they are"""

    @abstractmethod
    def check(self, target: Target, state: str) -> bool:
        """:returns: whether the state is available in the cache or a source"""

    @abstractmethod
    def get(self, target: Target, state: str, options: Options = DEFAULTS) -> GetResult:
        """
        Bring a state to this host; if the target has a working image, also make that.

        :raises NotFound: the state is not available
        """

    @abstractmethod
    def set(self, target: Target, state: str, options: Options = DEFAULTS) -> SetResult:
        """
        Store the target's working image as a state.

        :raises Conflict: the name exists with other content
        """

    @abstractmethod
    def unset(self, target: Target, state: str, options: Options = DEFAULTS) -> Removed:
        """
        Remove a state.

        :raises NotFound: there is no such state
        :raises HasDependants: other states depend on it
        """


def load_backend(name: str) -> Callable[[Context], StateBackend]:
    """
    :param name: as registered in the entry point group ``statepool.backends``
    :returns: the factory of the backend
    :raises UsageError: nothing has this name, or it is not a backend
    """
    import importlib.metadata  # slower to import than the rest of this package, and seldom needed

    found = {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if name not in found:
        raise UsageError(
            f"there is no backend {name!r}", hint="installed are: " + ", ".join(sorted(found))
        )
    loaded = found[name].load()
    if not (isinstance(loaded, type) and issubclass(loaded, StateBackend)):
        raise UsageError(
            f"{found[name].value} is registered as the backend {name!r}, but is none",
            hint="derive it from statepool.StateBackend",
        )
    return loaded
