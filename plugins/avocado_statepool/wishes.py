"""The states that a test asks for: the dependencies of the kind ``vm-state`` in its docstring."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KIND = "vm-state"
"""
The kind of this plugin's dependencies: ``:avocado: dependency={"type": "vm-state", "uri":
"vm1/disk/customize"}``.
"""

_EXAMPLE = '{"type": "vm-state", "uri": "vm1/disk/customize"}'


class WrongDependency(ValueError):
    """An error: a dependency cannot be understood. The text says why, and what to write."""


@dataclass(frozen=True)
class Wish:
    """
    A state from which a test starts.

    :param object: ``machine/image``, or a machine
    :param state: its name
    :param to: the path for the working image; for a machine, the directory. Empty: in a directory
        of the job in the cache
    """

    object: str
    state: str
    to: str = ""

    def __str__(self) -> str:
        return f"{self.object} {self.state}"

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Wish:
        """
        :param given: a dependency, as it is written, without its type
        :raises WrongDependency: it cannot be understood
        """
        for key in given:
            if key not in ("uri", "to", "name", "args"):
                raise WrongDependency(
                    f'a dependency {KIND} has no {key!r}; write {_EXAMPLE}, and "to" for the place'
                    " of the working image"
                )
        uri, to = given.get("uri"), given.get("to", "")
        if not isinstance(uri, str) or not isinstance(to, str) or given.get("args"):
            raise WrongDependency(
                f"a dependency {KIND} takes texts for uri and to; write {_EXAMPLE}"
            )
        subject, slash, state = uri.rpartition("/")
        if not slash or subject.count("/") > 1:
            raise WrongDependency(
                f"{uri!r} is neither machine/image/state nor machine/state; write {_EXAMPLE}"
            )
        return cls(subject, state, to)


def split(dependencies: Iterable[Any] | None) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    :param dependencies: as avocado stores them: objects, or mappings in its long-term release 103
    :returns: dependencies of kind ``vm-state``, as mappings without their type; and all others
    """
    ours: list[dict[str, Any]] = []
    others: list[Any] = []
    for dependency in dependencies or ():
        if isinstance(dependency, Mapping):
            kind, given = (
                dependency.get("type"),
                {key: value for key, value in dependency.items() if key != "type"},
            )
        else:
            kind, given = (
                dependency.kind,
                {"uri": dependency.uri, "args": dependency.args, **dependency.kwargs},
            )
        if kind == KIND:
            ours.append({key: value for key, value in given.items() if key != "args" or value})
        else:
            others.append(dependency)
    return ours, others
