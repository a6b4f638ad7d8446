"""
Operations on many objects, each with a mode that says what to do where a state exists, and where it
does not.

A mode has two letters, for *exists* and *does not exist*: ``a`` abort, ``r`` reuse, ``i`` ignore,
``f`` force. Test frameworks use this: a test names the states that it starts from and leaves
behind, and the modes define the details. Modes are checked first, and all objects are checked
before anything is changed: if one aborts, all stay as they are.

The modes and their defaults are those of avocado-i2n (``avocado_i2n/states/setup.py``, version
103).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from attrs import evolve, field, frozen

from statepool.backends.base import DEFAULTS, Options, StateBackend, Target, working_images
from statepool.errors import NotFound, RefusedError, StatePoolError, UsageError
from statepool.model.names import ROOT, check_state_name
from statepool.model.objects import Image, Machine, Object
from statepool.model.outcomes import GetResult, Removed, SetResult
from statepool.model.scope import Scope


class Letter(enum.StrEnum):
    """The letter of a mode for one case."""

    ABORT = "a"
    """Nothing is done, to any object."""
    REUSE = "r"
    """The existing state is used, or kept."""
    IGNORE = "i"
    """Nothing is done to this object."""
    FORCE = "f"
    """
    The operation is done: an existing state is replaced, and a missing one is made. Dependants of a
    state always prevent it.
    """


LETTERS: dict[str, tuple[str, str]] = {
    "check": ("rf", "rf"),
    "get": ("ari", "ai"),
    "set": ("arf", "af"),
    "unset": ("rf", "ai"),
    "push": ("arf", "af"),
    "pop": ("ari", "ai"),
}
"""
The permitted letters of each operation, where a state exists and where it does not. Those of a
check are for the object itself, its root state.
"""

MODES = {"check": "rf", "get": "ra", "set": "ff", "unset": "fi", "push": "af", "pop": "ra"}
"""The default modes."""


class Done(enum.StrEnum):
    """The outcome for one object."""

    DONE = "done"
    KEPT = "kept"
    """The state was there, and stayed as it was."""
    ABSENT = "absent"
    """The state is not there: the answer of a check."""
    IGNORED = "ignored"
    SKIPPED = "skipped"
    """The object was left out: nothing was asked of it, or its kind is skipped."""
    ABORTED = "aborted"
    """The mode forbids the situation that was found: nothing was done to any object."""
    UNTOUCHED = "untouched"
    """Nothing was done to the object, since another one aborted."""
    FAILED = "failed"


@frozen
class Item:
    """
    An object, and the request for it.

    :param object: an image, or a machine
    :param state: the name of the state; None: no request
    :param working: the working images, by the names of the machine's images; for operations that
        need or make them
    :param read_only: the names of images that cannot have states
    :param monitor: the socket of the running machine's QMP monitor, or None if it is off
    :raises UsageError: a working image is not named as a file
    """

    object: Object
    state: str | None
    working: Mapping[str, Path] = field(factory=dict, converter=working_images)
    read_only: frozenset[str] = frozenset()
    monitor: Path | None = None


@frozen
class ItemOutcome:
    """
    What was done to one object, and why.

    :param object: the object
    :param state: the name of the state, or None
    :param exists: whether it was there before; None if this was not checked
    :param done: what was done
    :param why: the reason, in words
    :param answers: the answers of the backend, if it was called
    :param exit_code: of the error, if it failed or was aborted; else 0
    :param hint: the advice after a failure, if there is any
    """

    object: str
    state: str | None
    exists: bool | None
    done: Done
    why: str
    answers: tuple[GetResult | SetResult | Removed, ...] = ()
    exit_code: int = 0
    hint: str | None = None


@frozen
class Outcome:
    """
    The outcome of an operation on many objects.

    :param operation: ``check``, ``get``, ``set``, ``unset``, ``push`` or ``pop``
    :param mode: the mode
    :param items: the outcome of each object, in the order given
    """

    operation: str
    mode: str
    items: tuple[ItemOutcome, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing failed or was aborted; for a check, whether every state is there."""
        return not any(
            item.done in (Done.FAILED, Done.ABORTED, Done.UNTOUCHED, Done.ABSENT)
            for item in self.items
        )

    @property
    def exit_code(self) -> int:
        """0, or the code of the first error; 3 if a checked state does not exist."""
        codes = [item.exit_code for item in self.items if item.exit_code]
        absent = [NotFound.exit_code for item in self.items if item.done is Done.ABSENT]
        return next(iter(codes + absent), 0)


@frozen
class _Planned:
    """An object that was checked."""

    item: Item
    target: Target
    exists: bool | None = None
    letter: Letter | None = None
    outcome: ItemOutcome | None = None


Do = Callable[[StateBackend, _Planned], tuple[GetResult | SetResult | Removed, ...]]


def check_mode(operation: str, mode: str | None) -> tuple[Letter, Letter]:
    """
    :param operation: one of :data:`MODES`
    :param mode: the two letters; the default if None
    :returns: what to do where a state exists, and where it does not
    :raises UsageError: there is no such mode
    """
    text = MODES[operation] if mode is None else mode
    exists, missing = LETTERS[operation]
    if len(text) != 2 or text[0] not in exists or text[1] not in missing:
        raise UsageError(
            f"{operation} has no mode {text!r}",
            hint=(
                f"two letters: {_or(exists)} where the state exists, then {_or(missing)} where it"
                " does not"
            ),
        )
    return Letter(text[0]), Letter(text[1])


def _or(letters: str) -> str:
    return " or ".join(f"{letter} ({Letter(letter).name.lower()})" for letter in letters)


class Policy:
    """
    The operations on many objects.

    :param backend: a function that returns the backend for the states of an object
    :param skip: kinds of objects that are left out: ``images``, ``machines``
    :raises UsageError: there is no such kind
    """

    def __init__(
        self, backend: Callable[[Object], StateBackend], *, skip: Collection[str] = ()
    ) -> None:
        for kind in skip:
            if kind not in ("images", "machines"):
                raise UsageError(f"{kind!r} cannot be skipped", hint="images or machines")
        self._backend = backend
        self._skip = frozenset(skip)

    # -- the operations ----------------------------------------------------------------------------

    def check(
        self, items: Iterable[Item], *, mode: str | None = None, options: Options = DEFAULTS
    ) -> Outcome:
        """
        Check whether states exist. The object itself comes first: a root state that is missing, or
        is to be made anew, is made from the working image, if the item names one.

        :param mode: for the root state: where it exists, reuse it (``r``) or make it anew (``f``);
            where it does not, make it (``f``) or report that the state does not exist (``r``)
        :raises UsageError: there is no such mode or name
        """
        letters = check_mode("check", mode)
        planned = [self._plan(item) for item in _checked(items)]
        return Outcome(
            "check",
            mode or MODES["check"],
            tuple(one.outcome or self._check(one, letters, options) for one in planned),
        )

    def get(
        self, items: Iterable[Item], *, mode: str | None = None, options: Options = DEFAULTS
    ) -> Outcome:
        """
        Bring states to this host, and make the working images that the items name.

        :raises UsageError: there is no such mode or name; nothing was checked
        """
        return self._run(
            "get", mode, items, options, lambda backend, one: (self._get(backend, one, options),)
        )

    def set(
        self, items: Iterable[Item], *, mode: str | None = None, options: Options = DEFAULTS
    ) -> Outcome:
        """
        Make states of working images. With force, an existing state is replaced, unless other
        states depend on it.

        :raises UsageError: there is no such mode or name; nothing was checked
        """
        return self._run(
            "set", mode, items, options, lambda backend, one: (self._set(backend, one, options),)
        )

    def unset(
        self, items: Iterable[Item], *, mode: str | None = None, options: Options = DEFAULTS
    ) -> Outcome:
        """
        Remove states, from the pools that the options' scope permits.

        :raises UsageError: there is no such mode or name; nothing was checked
        """
        return self._run(
            "unset",
            mode,
            items,
            options,
            lambda backend, one: (self._unset(backend, one, options),),
        )

    def push(
        self, items: Iterable[Item], *, mode: str | None = None, options: Options = DEFAULTS
    ) -> Outcome:
        """
        Set states, as :meth:`set` does, to pop them later: so they must not exist, unless the mode
        says otherwise. Root states are skipped.
        """
        return self._run(
            "push", mode, items, options, lambda backend, one: (self._set(backend, one, options),)
        )

    def pop(
        self, items: Iterable[Item], *, mode: str | None = None, options: Options = DEFAULTS
    ) -> Outcome:
        """
        Get states, and then remove them from the pools that the options' scope permits. Root states
        are skipped.
        """

        def do(backend: StateBackend, one: _Planned) -> tuple[GetResult | SetResult | Removed, ...]:
            # checked first, since dependants prevent the removal
            would = self._unset(backend, one, evolve(options, dry_run=True))
            got = self._get(backend, one, options)
            return got, would if options.dry_run else self._unset(backend, one, options)

        return self._run("pop", mode, items, options, do)

    # -- how they go -------------------------------------------------------------------------------

    def _run(
        self, operation: str, mode: str | None, items: Iterable[Item], options: Options, do: Do
    ) -> Outcome:
        letters = check_mode(operation, mode)
        planned = [
            self._decide(operation, self._plan(item, operation), letters, options)
            for item in _checked(items)
        ]
        aborted = any(
            one.outcome is not None and one.outcome.done is Done.ABORTED for one in planned
        )
        outcomes = [
            one.outcome or (_untouched(one) if aborted else self._do(one, do, options))
            for one in planned
        ]
        return Outcome(operation, mode or MODES[operation], tuple(outcomes))

    def _plan(self, item: Item, operation: str = "") -> _Planned:
        subject = item.object
        images = tuple(
            name
            for name in (subject.images if isinstance(subject, Machine) else (subject.name,))
            if name not in item.read_only
        )
        working = {name: path for name, path in item.working.items() if name not in item.read_only}
        target = Target(
            evolve(subject, images=images) if isinstance(subject, Machine) else subject,
            working,
            item.monitor,
        )
        planned = _Planned(item, target)
        if item.state is None:
            return _left_out(planned, "no state is asked for")
        if ("machines" if isinstance(subject, Machine) else "images") in self._skip:
            return _left_out(
                planned, f"{'machines' if isinstance(subject, Machine) else 'images'} are skipped"
            )
        if item.read_only and not images and (isinstance(subject, Image) or subject.images):
            return _left_out(
                planned,
                "it is read-only" if isinstance(subject, Image) else "all its images are read-only",
            )
        if item.state == ROOT and operation in ("push", "pop"):
            return _left_out(planned, "root states are neither pushed nor popped")
        return planned

    def _decide(
        self, operation: str, planned: _Planned, letters: tuple[Letter, Letter], options: Options
    ) -> _Planned:
        if planned.outcome is not None:
            return planned
        try:
            exists = self._exists(operation, planned, options)
        except StatePoolError as error:
            return evolve(planned, outcome=_failed(planned, error))
        planned = evolve(planned, exists=exists, letter=letters[0] if exists else letters[1])
        there = "the state is there" if exists else "the state is not there"
        if planned.letter is Letter.ABORT:
            code = (RefusedError if exists else NotFound).exit_code
            return evolve(
                planned,
                outcome=_outcome(
                    planned, Done.ABORTED, f"{there}, and the mode says abort", code=code
                ),
            )
        if planned.letter is Letter.IGNORE:
            return evolve(
                planned,
                outcome=_outcome(planned, Done.IGNORED, f"{there}, and the mode says ignore"),
            )
        if planned.letter is Letter.REUSE and operation in ("set", "push", "unset"):
            return evolve(
                planned, outcome=_outcome(planned, Done.KEPT, f"{there}, and the mode says reuse")
            )
        return planned

    def _exists(self, operation: str, planned: _Planned, options: Options) -> bool:
        backend, target, state = (
            self._backend(planned.target.object),
            evolve(planned.target, working={}),
            _state(planned),
        )
        try:
            if operation == "unset":
                self._unset(
                    backend,
                    evolve(planned, target=target),
                    evolve(options, dry_run=True, cascade=True),
                )
            elif options.scope != frozenset(Scope) or options.sources:
                self._get(backend, evolve(planned, target=target), evolve(options, dry_run=True))
            else:
                return backend.check(target, state)
        except NotFound:
            return False
        return True

    def _do(self, planned: _Planned, do: Do, options: Options) -> ItemOutcome:
        try:
            answers = do(self._backend(planned.target.object), planned)
        except StatePoolError as error:
            return _failed(planned, error)
        there = "the state was there" if planned.exists else "the state was not there"
        why = f"{there}, and the mode says {planned.letter.name.lower() if planned.letter else ''}"
        return _judged(
            _outcome(
                planned, Done.DONE, f"{'it would be: ' if options.dry_run else ''}{why}", answers
            )
        )

    def _check(
        self, planned: _Planned, letters: tuple[Letter, Letter], options: Options
    ) -> ItemOutcome:
        backend, target, state = (
            self._backend(planned.target.object),
            planned.target,
            _state(planned),
        )
        answers: tuple[SetResult, ...] = ()
        try:
            exists = backend.check(evolve(target, working={}), ROOT)
            letter = letters[0] if exists else letters[1]
            if letter is Letter.FORCE and target.working:
                answers = (backend.set(target, ROOT, evolve(options, replace=exists)),)
                exists = True
            elif letter is Letter.REUSE and not exists:
                return _outcome(
                    planned, Done.ABSENT, "the object itself is not there, and the mode says reuse"
                )
            there = exists if state == ROOT else backend.check(evolve(target, working={}), state)
        except StatePoolError as error:
            return _failed(planned, error, answers)
        made = "; the object itself was made of its working image" if answers else ""
        planned = evolve(planned, exists=there)
        if there:
            return _judged(_outcome(planned, Done.KEPT, f"the state is there{made}", answers))
        return _judged(_outcome(planned, Done.ABSENT, f"the state is not there{made}", answers))

    # -- what backends do --------------------------------------------------------------------------

    @staticmethod
    def _get(backend: StateBackend, one: _Planned, options: Options) -> GetResult:
        return backend.get(one.target, _state(one), options)

    @staticmethod
    def _set(backend: StateBackend, one: _Planned, options: Options) -> SetResult:
        force = one.exists is True and one.letter is Letter.FORCE
        how = evolve(
            options,
            replace=force or options.replace,
            squash=options.squash or (force and isinstance(one.target.object, Image)),
        )
        return backend.set(one.target, _state(one), how)

    @staticmethod
    def _unset(backend: StateBackend, one: _Planned, options: Options) -> Removed:
        return backend.unset(one.target, _state(one), options)


def items_of(
    machines: Sequence[Machine],
    state: str,
    *,
    kinds: Collection[str] = ("machines",),
    working: Mapping[str, Mapping[str, Path]] | None = None,
    read_only: Collection[str] = (),
) -> list[Item]:
    """
    Return the items for the objects of some machines.

    :param state: the state to request from each
    :param kinds: ``machines``: each machine, with its images as one; ``images``: each image by
        itself. With both, images come first
    :param working: the working images, by machine and image
    :param read_only: ``machine/image`` of those that cannot have states
    :raises UsageError: there is no such kind
    """
    found: list[Item] = []
    for kind in kinds:
        if kind not in ("images", "machines"):
            raise UsageError(f"there are no {kind!r}", hint="images or machines")
    for machine in machines:
        paths = (working or {}).get(machine.machine, {})
        fixed = frozenset(name for name in machine.images if f"{machine}/{name}" in read_only)
        if "images" in kinds:
            images = (Image(machine.machine, name) for name in machine.images)
            found += [
                Item(
                    image,
                    state,
                    {image.name: paths[image.name]} if image.name in paths else {},
                    fixed & {image.name},
                )
                for image in images
            ]
        if "machines" in kinds:
            found.append(Item(machine, state, paths, fixed))
    return found


def _checked(items: Iterable[Item]) -> list[Item]:
    """:returns: the items, after a check of all names"""
    found = list(items)
    for item in found:
        if item.state is not None:
            check_state_name(item.state)
    return found


def _state(planned: _Planned) -> str:
    assert planned.item.state is not None
    return planned.item.state


def _outcome(
    planned: _Planned,
    done: Done,
    why: str,
    answers: tuple[GetResult | SetResult | Removed, ...] = (),
    *,
    code: int = 0,
) -> ItemOutcome:
    return ItemOutcome(
        str(planned.item.object), planned.item.state, planned.exists, done, why, answers, code
    )


def _failed(
    planned: _Planned, error: StatePoolError, answers: tuple[SetResult, ...] = ()
) -> ItemOutcome:
    return evolve(
        _outcome(planned, Done.FAILED, error.message, answers, code=error.exit_code),
        hint=error.hint,
    )


def _left_out(planned: _Planned, why: str) -> _Planned:
    return evolve(planned, outcome=_outcome(planned, Done.SKIPPED, why))


def _untouched(planned: _Planned) -> ItemOutcome:
    return _outcome(planned, Done.UNTOUCHED, "another object was aborted")


def _judged(outcome: ItemOutcome) -> ItemOutcome:
    """:returns: the same, marked as failed if a pool could not do its part"""
    incomplete = [
        each for each in outcome.answers if isinstance(each, SetResult) and not each.complete
    ]
    told = [f"{at.pool}: {at.error}" for each in incomplete for at in each.pools if at.error]
    told += [
        f"{pool}: {text}"
        for each in outcome.answers
        if isinstance(each, Removed)
        for pool, text in each.errors.items()
    ]
    if not told:
        return outcome
    return evolve(outcome, done=Done.FAILED, why="; ".join(told), exit_code=7)
