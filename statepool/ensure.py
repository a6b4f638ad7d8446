"""
Build states that no pool has: once, for all workers and hosts that ask.

A built state is kept under its name and its *key*: ``connect--<key>``. The key stands for all
inputs of the build. So another builder, or another parent, gives another state, and the old one
stays.

A state that is built *anew* gets a key of its own, and a label with the key that it replaces from
then on. Nothing is removed for it: other users may have set states on the old one, and run machines
from it.
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
A function that makes a state of a working image, whose path it gets. Its return value has no
meaning; an exception ends the attempt.
"""


@frozen
class Recipe:
    """
    The recipe of a state: how it is built.

    :param build: the builder
    :param parent: the state that it starts from, or None: the builder makes the image at the path
        that it gets
    :param key: the identification of the builder: a version, or the digest of a script. None: its
        source code
    :param parameters: other inputs of the state, as JSON values
    :param timeout: the timeout of the builder, in seconds; None: no limit. With a limit, it runs in
        a thread of its own.
    :param again: build the state anew, once for each such text, even if it exists; the text names,
        for example, a test run
    :param patience: the time in addition to ``lock-timeout`` to wait for another worker that builds
        the same, in seconds
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
    :returns: whether this is a valid timeout: a number, greater than 0, and not too large for the
        system
    """
    return isinstance(seconds, int | float) and 0 < seconds <= threading.TIMEOUT_MAX


def key_of(recipe: Recipe, parent: Iterable[Manifest]) -> str:
    """
    :param parent: the chain that the state starts from, tip first
    :returns: the key, which differs from those of other builders or parents
    :raises UsageError: the builder or its parameters cannot be identified
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
    """:returns: the key of a state that is built anew, to replace the one with this key"""
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
    A service that gets states, or has them built.

    :param backend: the backend that gets and sets them
    :param image: the image of the states
    """

    def __init__(self, backend: StateBackend, image: Image) -> None:
        self._backend = backend
        self._context: Context = backend.context
        self._image = image

    def ensure(self, state: str, recipe: Recipe) -> Ensured:
        """
        :param state: the name, without a key
        :returns: the state under its name with a key, which is in the cache now
        :raises NotFound: the parent is not available
        :raises BuildFailed: the builder failed; nothing was kept
        :raises LockTimeout: another worker has been building for longer than it may
        """
        chain = self._parent(recipe)
        key = key_of(recipe, chain)
        name = name_of(state, key if recipe.again is None else _key_anew(key, recipe.again))
        if (got := self._have(state, key, name, recipe)) is not None:
            return Ensured(state, got.state, built=False, got=got)
        with self._alone(name, recipe):
            # Another worker may have built it while this one waited.
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
        :returns: the state, brought to this host, if any pool has it: the newest one of this key,
            unless it has to be built anew
        """
        try:
            return self._get(name if recipe.again is not None else self._newest(state, key) or name)
        except NotFound:
            return None

    def _newest(self, state: str, key: str) -> str | None:
        """
        Find the newest state of a key. A state that was built anew goes before the one that it
        replaces. No source is asked if the cached one is known to be current.

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
        :returns: the names of the states that a state built anew replaces, after those of the
            states built on them
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
        :returns: the folds of the cache and of each source that answers; the get reports those that
            do not
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
        """
        :returns: the states that were built with a key, and those that were built anew to replace
            them
        """
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
        Let no other worker build this state meanwhile: no process of this host, and none that has
        the same farthest pool. Where that pool cannot be reached or has no locks, two hosts may
        build at once, and the one that publishes first wins.
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
                # The common pool cannot be reached; the set reports what it could not do there.
                pass
            yield

    def _meeting_place(self) -> list[PoolSource]:
        """:returns: the pool that all workers have in common: the first of the farthest ones"""
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
        :returns: the result of the set; None if another worker, which could not be excluded by a
            lock, published the state meanwhile
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
        Check the result of a builder, which can be a file that is not an image any more, or one
        with another backing file.
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
        Use the state of another host that published the same key first, if no lock could prevent
        both from building: the other state is the valid one.
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
            return False  # its error was reported when the state was stored
        return there is not None and there.digest != Digest.parse(stored.digest)


def _is_managed(pool: Pool) -> bool:
    try:
        return pool.is_managed
    except TransportError:
        return False  # the get or set reports the error


def _backing(path: Path) -> bytes | None:
    return check_file(path, backing=Backing.WORKING).backing_name


def _within(seconds: float, work: Callable[[], Any]) -> bool:
    """
    Run work in a thread, with a timeout.

    :returns: whether it ended in time. If not, its thread is left running: Python cannot end a
        thread.
    """
    ended: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - passed to the waiting caller
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=run, name="statepool-builder", daemon=True).start()
    if not wait([ended], seconds).done:
        return False
    ended.result()
    return True
