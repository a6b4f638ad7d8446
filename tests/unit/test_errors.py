"""The error tree: its picture, the exit codes, what survives pickling."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from statepool import errors
from statepool.errors import StatePoolError

EXIT_CODES = {
    "StatePoolError": 1,
    "UsageError": 2,
    "NotFound": 3,
    "RefusedError": 4,
    "IntegrityError": 5,
    "LockTimeout": 6,
    "TransportError": 7,
    "NoSpace": 8,
    "ToolError": 1,
    "BuildFailed": 1,
}
"""The table of the command line; the classes below these inherit theirs."""

FACTS = {
    "hint": "choose another",
    "object": "vm1/disk",
    "state": "install",
    "pool": "file:///srv/pool",
    "path": "data/x",
}

EXTRA: dict[str, dict[str, object]] = {
    "HasDependants": {"dependants": ("customize", "connect")},
    "DigestMismatch": {"expected": "blake3:00", "actual": "blake3:01"},
    "UnsafeImage": {"check": "backing-name"},
    "Incompatible": {"differences": ("machine type", "RAM")},
    "LockTimeout": {"seconds": 2.5},
    "NoSpace": {"needed": 10, "available": 9},
}


def classes() -> list[type[StatePoolError]]:
    return [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, StatePoolError)
    ]


def drawn() -> dict[str, tuple[str | None, int | None, str | None]]:
    """
    :returns: by class in the picture of the docstring: what it hangs on, its exit code, its
        standard base
    """
    tree: dict[str, tuple[str | None, int | None, str | None]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([ │├└─]*)([A-Z]\w+)(?: +(\d+))?  .*?(?:\((\w+Error)\))?$", line)
        if not match:
            continue
        depth, name = len(match[1]), match[2]
        above = [(column, parent) for column, parent in above if column < depth]
        tree[name] = (
            above[-1][1] if above else None,
            int(match[3]) if match[3] else None,
            match[4],
        )
        above.append((depth, name))
    return tree


def test_picture_shows_every_class_where_it_is() -> None:
    tree = drawn()
    assert set(tree) == {cls.__name__ for cls in classes()}
    for cls in classes():
        parent, _, standard = tree[cls.__name__]
        bases = [base.__name__ for base in cls.__bases__]
        assert bases == [name for name in (parent or "Exception", standard) if name is not None]


def test_picture_shows_the_exit_codes() -> None:
    assert {name: code for name, (_, code, _) in drawn().items() if code is not None} == EXIT_CODES


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_exit_code_is_that_of_the_table(cls: type[StatePoolError]) -> None:
    nearest = next(base.__name__ for base in cls.__mro__ if base.__name__ in EXIT_CODES)
    assert cls.exit_code == EXIT_CODES[nearest]


def test_all_classes_are_public() -> None:
    assert set(errors.__all__) == {cls.__name__ for cls in classes()}


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_facts_survive_pickling(cls: type[StatePoolError]) -> None:
    facts = {**FACTS, **EXTRA.get(cls.__name__, {})}
    error = cls("it went wrong", **facts)  # type: ignore[arg-type]
    error.add_note("while testing")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert again.args == ("it went wrong",)
    assert {name: getattr(again, name) for name in facts} == facts
    assert vars(again) == vars(error)
    assert str(again) == str(error)


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_words_are_message_and_hint(cls: type[StatePoolError]) -> None:
    assert str(cls("vm1/disk has no state 'x'")) == "vm1/disk has no state 'x'"
    assert (
        str(cls("vm1/disk has no state 'x'", hint="see show"))
        == "vm1/disk has no state 'x' (see show)"
    )


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_facts_are_there_when_nobody_gave_them(cls: type[StatePoolError]) -> None:
    error = cls("it went wrong")
    assert [getattr(error, name) for name in FACTS] == [None] * len(FACTS)
    for name, value in EXTRA.get(cls.__name__, {}).items():
        assert getattr(error, name) == type(value)()


def test_standard_handlers_catch_them() -> None:
    for cls, standard in [
        (errors.InvalidName, ValueError),
        (errors.NotFound, LookupError),
        (errors.LockTimeout, TimeoutError),
        (errors.MissingFile, FileNotFoundError),
        (errors.FileExists, FileExistsError),
        (errors.AccessDenied, PermissionError),
        (errors.NoSpace, OSError),
    ]:
        with pytest.raises(standard, match="went wrong"):
            raise cls("it went wrong")


def test_a_sequence_of_dependants_is_kept_as_it_was() -> None:
    names = ["customize"]
    error = errors.HasDependants("no", dependants=names)
    names.append("connect")
    assert error.dependants == ("customize",)
