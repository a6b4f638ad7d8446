"""
The face that every backend has, and how one is found by its name.
"""

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
    What a backend works with, so that its author never asks where things come from.

    :param cache: the pool of this host
    :param sources: the pools that it can be filled from, best first
    :param progress: told of every transfer
    :param creator: what makes states here: versions of programs, by their names
    :param stats: how fast and how well the sources are
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
    :returns: the same; as a :class:`~pathlib.Path`, ``work/`` would be the file ``work``
    :raises UsageError: one is that of a directory, or empty
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
    What an operation is about.

    :param object: an image, or a machine
    :param working: the working images, by the names of the machine's images; where an operation
        needs or makes them
    :param monitor: the socket of the running machine's QMP monitor, or None if it is off
    :raises UsageError: a working image is not named as a file
    """

    object: Object
    working: Mapping[str, Path] = field(factory=dict, converter=working_images)
    monitor: Path | None = None


@frozen
class Options:
    """
    How an operation is done.

    :param overwrite: of get: a file in the place of the working image gives way
    :param replace: of set: other content under the name gives way, if nothing stands on it
    :param cascade: of unset: what stands on the state goes too
    :param scope: which pools count: ``own`` is the cache. A set goes through the cache whether it
        is among them or not
    :param sources: of get: only these sources, by their names or locations; empty: all that the
        scope permits
    :param labels: of set: what the owner of the state wants to remember: at most 64 texts of at
        most 4096 characters
    :param squash: of set: a working image that stands on the very state which is to be set becomes,
        together with it, its new content
    :param wait_for: of set: which pools must have the state for the outcome to be complete
    :param dry_run: say what would be done, and change nothing
    """

    overwrite: bool = False
    replace: bool = False
    cascade: bool = False
    scope: frozenset[Scope] = frozenset(Scope)
    sources: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(factory=dict, converter=check_labels)
    squash: bool = False
    wait_for: WaitFor = WaitFor.ALL
    dry_run: bool = False


DEFAULTS = Options()
"""Nothing is overwritten, replaced or cascaded, and every pool counts."""


class StateBackend(ABC):
    """
    What can be done with the states of one kind of object. One state is special: ``root`` is that
    the object itself exists.

    :param context: what it works with
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def show(self, target: Target) -> list[Listed]:
        """:returns: the states of an object, wherever they are"""

    @abstractmethod
    def check(self, target: Target, state: str) -> bool:
        """:returns: whether a state can be had"""

    @abstractmethod
    def get(self, target: Target, state: str, options: Options = DEFAULTS) -> GetResult:
        """
        Bring a state here; with a working image in the target, also make that.

        :raises NotFound: it cannot be had
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

        :raises NotFound: it is not there
        :raises HasDependants: something stands on it
        """


def load_backend(name: str) -> Callable[[Context], StateBackend]:
    """
    :param name: as registered in the entry point group ``statepool.backends``
    :returns: what makes the backend
    :raises UsageError: there is none of this name, or it is no backend
    """
    import importlib.metadata  # takes longer than the rest of this package, and few ask

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
