"""
States that are built when nobody has them: once, for all workers and hosts that ask.

A built state is kept under its name and its *key*: ``connect--<key>``, where the key stands for
what it was made from. So another builder, or another parent, is another state, and the old one is
still there.

So is one that is built *anew*: it gets a key of its own, and a label with the key in whose place it
is used from then on. Nothing is removed for it: others may have set states on what is there, and
run machines from it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

from attrs import field, frozen

from statepool.backends.base import Context, Options, StateBackend, Target
from statepool.capture.scratch import scratch
from statepool.copying.supply import Supply
from statepool.errors import (
    BuildFailed,
    Conflict,
    LockTimeout,
    NotFound,
    StatePoolError,
    TransportError,
    UsageError,
)
from statepool.model.digest import Digest
from statepool.model.keys import KEY_LENGTH, LABEL_ANEW, LABEL_KEY, LABEL_STATE, name_of
from statepool.model.manifest import Manifest, StateId
from statepool.model.objects import Image
from statepool.model.outcomes import Ensured, GetResult, SetResult
from statepool.model.scope import Scope
from statepool.pools.fold import Fold
from statepool.pools.pool import Pool
from statepool.qcow2.checks import Backing, check_file
from statepool.qcow2.tool import QemuImg
from statepool.sources.mirrors import Mirrors
from statepool.sources.pool_source import PoolSource
from statepool.sources.source import Source

Builder = Callable[[Path], object]
"""
Makes a state of a working image, whose path it gets. What it returns means nothing; what it raises
ends the attempt.
"""


@frozen
class Recipe:
    """
    How a state is made.

    :param build: does it
    :param parent: the state that it starts from, or None: the builder makes the image at the path
        that it gets
    :param key: what the builder is told apart by: a version, or the digest of a script. None: its
        source
    :param parameters: what else the state was made from, as JSON would have it
    :param timeout: how long the builder may take, in seconds; None: as long as it likes. With a
        limit it runs in a thread of its own.
    :param again: builds the state anew, once for each such text, whatever is there: that of a run,
        for example
    :param patience: how much longer than ``lock-timeout`` to wait for another worker who builds the
        same, in seconds
    """

    build: Builder
    parent: str | None = None
    key: str | None = None
    parameters: Mapping[str, object] = field(factory=dict)
    timeout: float | None = None
    patience: float = 0.0
    again: str | None = None

    def __attrs_post_init__(self) -> None:
        if self.timeout is not None and not can_wait(self.timeout):
            raise UsageError(
                f"a builder cannot have {self.timeout!r} as its time",
                hint="give it more than 0 seconds, or None: as long as it likes",
            )


def can_wait(seconds: object) -> bool:
    """
    :returns: whether this is a time that one can wait for: a number, not 0 or less, and none that
        the system cannot count to
    """
    return isinstance(seconds, int | float) and 0 < seconds <= threading.TIMEOUT_MAX


def key_of(recipe: Recipe, parent: Iterable[Manifest]) -> str:
    """
    :param parent: the chain that the state starts from, tip first
    :returns: what tells this state from those of other builders or parents
    :raises UsageError: nothing is known of the builder
    """
    parts = {
        "format": 1,
        "parent": [
            [manifest.state, str(manifest.origin or manifest.digest)] for manifest in parent
        ],
        "builder": recipe.key if recipe.key is not None else _source(recipe.build),
        "parameters": recipe.parameters,
    }
    try:
        text = json.dumps(parts, sort_keys=True)
    except TypeError as error:
        raise UsageError(
            f"the parameters of a builder cannot be told apart: {error}",
            hint="give strings, numbers, lists and mappings of them",
        ) from error
    return Digest.of_text(text).hex[:KEY_LENGTH]


def _key_anew(key: str, again: str) -> str:
    """:returns: the key of a state that is built anew in the place of the one with this key"""
    return Digest.of_text(f"{key} {again}").hex[:KEY_LENGTH]


def _source(build: Builder) -> str:
    """:returns: the text of a function, with the values that were bound to it"""
    bound = ""
    while isinstance(build, partial):
        bound += repr((build.args, sorted(build.keywords.items())))
        build = build.func
    try:
        return textwrap.dedent(inspect.getsource(build)) + bound
    except (OSError, TypeError) as error:
        raise UsageError(
            f"the source of the builder {build!r} is not there to be looked at",
            hint="give it a key: ensure(..., key=...)",
        ) from error


class Ensurer:
    """
    Gets states, or has them built.

    :param backend: gets and sets them
    :param image: whose states
    """

    def __init__(self, backend: StateBackend, image: Image) -> None:
        self._backend = backend
        self._context: Context = backend.context
        self._image = image

    def ensure(self, state: str, recipe: Recipe) -> Ensured:
        """
        :param state: the name, without a key
        :returns: the state under its name with a key, which is in the cache now
        :raises NotFound: the parent cannot be had
        :raises BuildFailed: the builder failed; nothing was kept
        :raises LockTimeout: another worker has been building for longer than it may
        """
        chain = self._parent(recipe)
        key = key_of(recipe, chain)
        name = name_of(state, key if recipe.again is None else _key_anew(key, recipe.again))
        if (got := self._have(state, key, name, recipe)) is not None:
            return Ensured(state, got.state, built=False, got=got)
        with self._alone(name, recipe):
            # Somebody may have built it while we waited.
            if (got := self._have(state, key, name, recipe)) is not None:
                return Ensured(state, got.state, built=False, got=got)
            labels = {LABEL_STATE: state, LABEL_KEY: name.rpartition("--")[2]}
            stored = self._build(
                name, recipe, labels if recipe.again is None else {**labels, LABEL_ANEW: key}
            )
        got = self._agreed(name, stored) if stored is not None else self._get(name)
        superseded = self._superseded(state, key, name) if recipe.again is not None else ()
        return Ensured(state, name, built=True, got=got, stored=stored, superseded=superseded)

    def _parent(self, recipe: Recipe) -> tuple[Manifest, ...]:
        if recipe.parent is None:
            return ()
        try:
            self._get(recipe.parent)
        except NotFound as error:
            raise self._no_parent(recipe.parent) from error
        return self._chain(recipe.parent)

    def _no_parent(self, parent: str) -> NotFound:
        keyed = [
            listed.manifest.state
            for listed in self._backend.show(Target(self._image))
            if listed.manifest.state.startswith(f"{parent}--")
        ]
        return NotFound(
            f"there is no state {parent} of {self._image} to start from",
            object=str(self._image),
            state=parent,
            hint=(
                "name one with its key: " + ", ".join(keyed)
                if keyed
                else f"statepool show {self._image} lists what there is"
            ),
        )

    def _chain(self, state: str) -> tuple[Manifest, ...]:
        return self._context.cache.pool.chain(StateId(str(self._image), state))

    def _get(self, state: str, working: Path | None = None) -> GetResult:
        target = Target(self._image, {self._image.name: working} if working is not None else {})
        return self._backend.get(target, state)

    def _have(self, state: str, key: str, name: str, recipe: Recipe) -> GetResult | None:
        """
        :returns: the state, brought here, if anybody has it: the newest one of this key, unless it
            has to be built anew
        """
        try:
            return self._get(name if recipe.again is not None else self._newest(state, key) or name)
        except NotFound:
            return None

    def _newest(self, state: str, key: str) -> str | None:
        """
        What was built anew comes before what it is used in the place of. No source is asked if that
        of the cache is known to be current.

        :returns: the name of the state, or None if no pool that answers has one
        """

        def rank(manifest: Manifest) -> tuple[bool, float, str]:
            return LABEL_ANEW in manifest.labels, manifest.created, manifest.state

        here = max(
            self._versions(self._fold(self._context.cache.pool), state, key), key=rank, default=None
        )
        if here is not None and self._supply.is_settled(here.id, here):
            return here.state
        newest = max(
            (one for fold in self._folds() for one in self._versions(fold, state, key)),
            key=rank,
            default=None,
        )
        return newest.state if newest is not None else None

    def _superseded(self, state: str, key: str, name: str) -> tuple[str, ...]:
        """
        :returns: the names of what a state that was built anew is used in the place of, after those
            of what was built on it
        """
        above: list[str] = []
        old: list[str] = []
        for fold in self._folds():
            ids = [
                manifest.id
                for manifest in self._versions(fold, state, key)
                if manifest.state != name
            ]
            old += (one.state for one in ids)
            above += (
                one.state
                for one in fold.dependants(ids)
                if one.object == str(self._image) and LABEL_KEY in fold.states[one].labels
            )
        return tuple(dict.fromkeys((*above, *old)))

    def _folds(self) -> list[Fold]:
        """
        :returns: what the cache has and each source that answers; of those that do not, the get
            says so
        """
        asked = self._supply.mirrors.ask_rested(self._fold_of, bool)
        return [
            self._fold(self._context.cache.pool),
            *(answer.value for answer in asked if answer.value is not None),
        ]

    def _fold_of(self, source: Source) -> Fold | None:
        return self._fold(source.pool) if isinstance(source, PoolSource) else None

    def _fold(self, pool: Pool) -> Fold:
        return pool.fold(self._image.machine)

    def _versions(self, fold: Fold, state: str, key: str) -> list[Manifest]:
        """:returns: what was built with a key, and what was built anew in its place"""
        return [
            manifest
            for manifest in fold.states.values()
            if manifest.object == str(self._image)
            and manifest.labels.get(LABEL_STATE) == state
            and key in (manifest.labels.get(LABEL_KEY), manifest.labels.get(LABEL_ANEW))
        ]

    @property
    def _supply(self) -> Supply:
        cache, sources = self._context.cache, tuple(self._context.sources)
        return Supply(
            cache,
            Mirrors(() if cache.settings.offline else sources, self._context.stats, cache.settings),
        )

    # -- one at a time -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self, name: str, recipe: Recipe) -> Iterator[None]:
        """
        Nobody else builds this state meanwhile: no process of this host, and none that has the same
        farthest pool. Where that pool cannot be reached or has no locks, two hosts may build at
        once, and the one that published first wins.
        """
        lock = f"ensure-{Digest.of_text(f'{self._image} {name}').hex[:32]}"
        patience = (
            self._context.cache.settings.lock_timeout + (recipe.timeout or 0) + recipe.patience
        )
        self._context.cache.prepare()
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._context.cache.pool.locks.hold(lock, patience))
                for source in self._meeting_place():
                    held.enter_context(source.pool.locks.hold(lock, patience))
            except LockTimeout as error:
                raise LockTimeout(
                    f"another worker has been building {name} of {self._image} for more than"
                    f" {patience:g} s",
                    seconds=patience,
                    object=str(self._image),
                    state=name,
                    hint="look what it does, or raise lock-timeout",
                ) from error
            except TransportError:
                # the pool where all could meet is out of reach; what it lacks the set will say
                pass
            yield

    def _meeting_place(self) -> list[PoolSource]:
        """:returns: the pool that all who ask have in common: the first of the farthest ones"""
        if self._context.cache.settings.offline:
            return []
        order = list(Scope)
        managed = [
            source
            for source in self._context.sources
            if isinstance(source, PoolSource) and _is_managed(source.pool)
        ]
        farthest = max((order.index(source.scope) for source in managed), default=0)
        return [source for source in managed if order.index(source.scope) == farthest][:1]

    # -- building ----------------------------------------------------------------------------------

    def _build(self, name: str, recipe: Recipe, labels: Mapping[str, str]) -> SetResult | None:
        """
        :returns: what became of it; None if somebody else, with whom we could not meet in a lock,
            published the state meanwhile
        """
        with scratch(self._context.cache) as place:
            path = place.path / f"{self._image.name}.qcow2"
            if recipe.parent is not None:
                self._get(recipe.parent, path)
            backing = _backing(path) if recipe.parent is not None else None
            self._run(name, recipe, path)
            self._examine(name, path, backing)
            try:
                return self._backend.set(
                    Target(self._image, {self._image.name: path}), name, Options(labels=labels)
                )
            except Conflict:
                return None

    def _run(self, name: str, recipe: Recipe, path: Path) -> None:
        try:
            if recipe.timeout is None:
                recipe.build(path)
                return
            ended = _within(recipe.timeout, partial(recipe.build, path))
        except StatePoolError as error:
            raise self._failed(name, error.message) from error
        except Exception as error:
            raise self._failed(name, f"{type(error).__name__}: {error}") from error
        if not ended:
            raise self._failed(name, f"it did not end within {recipe.timeout:g} s")

    def _failed(self, name: str, reason: str) -> BuildFailed:
        return BuildFailed(
            f"the builder of {name} of {self._image} failed: {reason}",
            object=str(self._image),
            state=name,
            hint="nothing was kept; the next who asks tries again",
        )

    def _examine(self, name: str, path: Path, backing: bytes | None) -> None:
        """
        A builder can leave a file that is no image any more, or one that stands on something else.
        """
        if not path.exists():
            raise self._failed(name, f"it left no image at {path}")
        try:
            header = check_file(path, backing=Backing.WORKING)
            found = (
                QemuImg(self._context.cache.settings.tool_timeout).check(path)
                if header.backing_name == backing
                else {}
            )
        except StatePoolError as error:
            raise self._failed(name, f"the image that it left cannot be used: {error}") from error
        if header.backing_name != backing:
            raise self._failed(name, "the image that it left stands on another one than its parent")
        if found.get("corruptions") or found.get("check-errors"):
            raise self._failed(
                name,
                "the image that it left is corrupt: qemu-img check finds"
                f" {found.get('corruptions', 0)} errors in it",
            )

    def _agreed(self, name: str, stored: SetResult) -> GetResult:
        """
        Where another host published the same key first, since nothing could keep both from
        building: theirs is the state.
        """
        if not stored.complete and any(
            self._is_other(source, name, stored) for source in self._context.sources
        ):
            self._backend.unset(Target(self._image), name, Options(scope=frozenset({Scope.OWN})))
        return self._get(name)

    def _is_other(self, source: Source, name: str, stored: SetResult) -> bool:
        try:
            there = source.to_change().find(StateId(str(self._image), name))
        except StatePoolError:
            return False  # it said so when it was stored to
        return there is not None and there.digest != Digest.parse(stored.digest)


def _is_managed(pool: Pool) -> bool:
    try:
        return pool.is_managed
    except TransportError:
        return False  # whoever gets or sets says so


def _backing(path: Path) -> bytes | None:
    return check_file(path, backing=Backing.WORKING).backing_name


def _within(seconds: float, work: Callable[[], Any]) -> bool:
    """
    :returns: whether it ended in time. If not, it is left behind in its thread: Python cannot end
        one.
    """
    ended: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - given to who waits
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=run, name="statepool-builder", daemon=True).start()
    if not wait([ended], seconds).done:
        return False
    ended.result()
    return True
