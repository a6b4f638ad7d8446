"""
States that are built by functions beside the tests.

::

    @vm_state_builder("vm1/disk", "connect", parent="customize")
    def connect(image):
        run_machine(image, "systemctl enable network")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Function = Callable[[Path], Any]


@dataclass(frozen=True)
class Builder:
    """
    A function that builds a state.

    :param object: the object of the state: ``machine/image``
    :param state: the name that tests ask for
    :param function: gets the path of a working image of the parent, and changes it
    :param parent: the state from which it starts: a state with a builder, or a state in a pool
    :param key: the identity of the builder; its source if not given
    :param parameters: further inputs of the state
    :param timeout: how long it may take, in seconds
    """

    object: str
    state: str
    function: Function
    parent: str | None = None
    key: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float | None = None

    @property
    def place(self) -> str:
        """The location of the function: file and line."""
        code = inspect.unwrap(self.function)
        try:
            return f"{inspect.getsourcefile(code)}:{inspect.getsourcelines(code)[1]}"
        except (OSError, TypeError):
            return repr(self.function)

    def __str__(self) -> str:
        return f"{self.object} {self.state}"


class Builders:
    """All declared builders, by the states that they build."""

    def __init__(self) -> None:
        self._declared: dict[tuple[str, str], list[Builder]] = {}

    def add(self, builder: Builder) -> None:
        """Add a builder. The same function, imported again, is the same builder."""
        known = self._declared.setdefault((builder.object, builder.state), [])
        if all(other.place != builder.place for other in known):
            known.append(builder)

    def find(self, object: str, state: str) -> Builder | None:
        """:returns: the builder of a state; None if there is none"""
        found = self._declared.get((object, state))
        return found[0] if found else None

    def check(self, object: str, state: str) -> None:
        """
        Check whether a state can be built, as far as this is known without building.

        :raises pytest.UsageError: two builders build it or a state that backs it, the builders form
            a cycle, or one is for a whole machine
        """
        seen: list[str] = []
        for builder in self._chain(object, state):
            if "/" not in builder.object:
                raise pytest.UsageError(
                    f"{builder.place}: {builder.object} is a machine, and builders build images;"
                    " name one, as in vm1/disk"
                )
            others = self._declared[builder.object, builder.state]
            if len(others) > 1:
                places = " and ".join(other.place for other in others)
                raise pytest.UsageError(
                    f"two builders build {builder}: {places}; remove one of them"
                )
            if str(builder) in seen:
                raise pytest.UsageError(
                    f"the builders of {object} go in a circle:"
                    f" {' -> '.join([*seen, str(builder)])}; one needs another parent"
                )
            seen.append(str(builder))

    def _chain(self, object: str, state: str | None) -> Iterator[Builder]:
        while state is not None and (builder := self.find(object, state)) is not None:
            yield builder
            state = builder.parent

    def clear(self) -> None:
        """Forget the builders when a run has ended."""
        self._declared.clear()


BUILDERS = Builders()
"""The builders of this process: they are declared when the modules of tests are imported."""


def where_it_failed(error: BaseException) -> str:
    """
    :param error: the exception of a builder
    :returns: the lines of the traceback without those of this package, as pytest shows them; empty
        if there are no others
    """
    import concurrent.futures

    import statepool

    # A builder with a timeout runs in a thread, and its exceptions pass through this module of
    # Python.
    ours = [
        Path(file).parent for file in (statepool.__file__, __file__, concurrent.futures.__file__)
    ]
    info = pytest.ExceptionInfo.from_exception(error)
    theirs = info.traceback.filter(
        lambda entry: not any(Path(entry.path).is_relative_to(place) for place in ours)
    )
    return (
        str(info.getrepr(style="short", tbfilter=lambda _: theirs, chain=False)) if theirs else ""
    )


def vm_state_builder(
    object: str,
    state: str,
    *,
    parent: str | None = None,
    key: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    timeout: float | None = None,
) -> Callable[[Function], Function]:
    """
    Declare that a function builds a state, when no pool has it: once for all workers and hosts.

    :param object: ``machine/image``
    :param state: the name that tests ask for
    :param parent: the state from which it starts. Without a parent, the function makes the image at
        the path that it gets.
    :param key: the identity of the builder, such as a version. If not given, its source: then a
        changed function builds the state again.
    :param parameters: further inputs of the state: strings, numbers, and lists and mappings of them
    :param timeout: how long it may take, in seconds
    """

    def declare(function: Function) -> Function:
        BUILDERS.add(Builder(object, state, function, parent, key, parameters or {}, timeout))
        return function

    return declare
