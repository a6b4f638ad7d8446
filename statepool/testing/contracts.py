"""
Base classes of contract tests: a test that applies only to some subclasses is absent from the
others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Test = TypeVar("_Test", bound=Callable[..., Any])

_ONLY_IF = "_only_if"


def only_if(*able: str) -> Callable[[_Test], _Test]:
    """
    Mark a test of a contract as applicable only to some subclasses.

    :param able: the attributes of the test class that decide; all of them must be true
    """

    def mark(test: _Test) -> _Test:
        setattr(test, _ONLY_IF, able)
        return test

    return mark


class Contract:
    """The base of contract test classes. A subclass inherits only the tests that apply to it."""

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        seen = set(vars(cls))
        for base in cls.__mro__[1:]:
            for name, test in list(vars(base).items()):
                # overridden there; or removed there, and perhaps not applicable here
                if name in seen or test is None:
                    continue
                seen.add(name)
                able = getattr(test, _ONLY_IF, None)
                if able is not None:
                    setattr(
                        cls,
                        name,
                        test if all(getattr(cls, attribute) for attribute in able) else None,
                    )
