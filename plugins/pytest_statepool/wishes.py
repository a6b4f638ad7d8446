"""The states that a test asks for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

MARKER = "vm_state"
"""The name of the marker, as in ``@pytest.mark.vm_state("vm1/disk", "customize")``."""


@dataclass(frozen=True)
class Wish:
    """
    A state from which a test starts.

    :param object: ``machine/image``, or a machine with all its images
    :param state: its name in the test
    """

    object: str
    state: str

    @property
    def is_machine(self) -> bool:
        """Whether it is a state of a whole machine."""
        return "/" not in self.object

    @property
    def machine(self) -> str:
        """The machine, or the machine of the image."""
        return self.object.partition("/")[0]

    def __str__(self) -> str:
        return f"{self.object} {self.state}"


def wishes_of(item: pytest.Item) -> list[Wish]:
    """
    :returns: the states in the markers of a test, the outermost first
    :raises pytest.UsageError: one of them is wrong
    """
    wishes: dict[str, Wish] = {}
    for marker in reversed(list(item.iter_markers(MARKER))):
        wish = _wish(item, marker)
        # The nearest marker counts: a class can set a state for all its tests, and a test can
        # override it.
        wishes[wish.object] = wish
    for image in wishes.values():
        if not image.is_machine and image.machine in wishes:
            raise pytest.UsageError(
                f"{item.nodeid}: its markers name the machine {image.machine} and also"
                f" {image.object}; name the machine, or images of it"
            )
    return list(wishes.values())


def _wish(item: pytest.Item, marker: pytest.Mark) -> Wish:
    def wrong(reason: str) -> pytest.UsageError:
        return pytest.UsageError(
            f'{item.nodeid}: the marker {MARKER} {reason}; write @pytest.mark.{MARKER}("vm1/disk",'
            ' "customize")'
        )

    words = dict(zip(("object", "state"), marker.args, strict=False))
    is_clear = len(marker.args) <= 2 and not words.keys() & marker.kwargs.keys()
    words |= marker.kwargs
    if (
        not is_clear
        or words.keys() != {"object", "state"}
        or not all(isinstance(word, str) for word in words.values())
    ):
        said = ", ".join(
            [*map(repr, marker.args), *(f"{name}={word!r}" for name, word in marker.kwargs.items())]
        )
        raise wrong(f"takes an object and a state, not {said or 'nothing'}")
    from statepool import InvalidName, check_state_name, parse_object

    try:
        return Wish(str(parse_object(words["object"])), check_state_name(words["state"]))
    except InvalidName as error:
        raise wrong(f"cannot be used: {error}") from error
