"""Objects, which have states: an image of a machine, or a machine with all its images."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import field, frozen

from statepool.errors import InvalidName, UsageError
from statepool.model.names import check_name


@frozen(order=True)
class Image:
    """
    One disk of a machine, written ``machine/image``.

    :param machine: the id of the machine
    :param name: the name of the disk within the machine
    """

    machine: str
    name: str

    def __attrs_post_init__(self) -> None:
        check_name(self.machine, "a machine")
        check_name(self.name, "an image")

    def __str__(self) -> str:
        return f"{self.machine}/{self.name}"


def _names(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str | bytes):
        raise UsageError(
            f"the images of a machine are not one text, {names!r}",
            hint=f"write a list: [{names!r}]",
        )
    return tuple(names)


@frozen(order=True)
class Machine:
    """
    A machine with all its images, written as its id.

    :param machine: the id
    :param images: the names of its disks, where they are known
    """

    machine: str
    images: tuple[str, ...] = field(default=(), converter=_names, eq=False)

    def __attrs_post_init__(self) -> None:
        check_name(self.machine, "a machine")
        for name in self.images:
            check_name(name, "an image")

    def __str__(self) -> str:
        return self.machine


Object = Image | Machine


def parse_object(text: str) -> Object:
    """
    :param text: ``machine`` or ``machine/image``
    :raises InvalidName: the text is neither
    """
    machine, slash, image = text.partition("/")
    return Image(machine, image) if slash else Machine(machine)


def parse_image(text: str) -> Image:
    """
    :param text: ``machine/image``
    :raises InvalidName: the text is not of that form
    """
    parsed = parse_object(text)
    if isinstance(parsed, Machine):
        raise InvalidName(
            f"{text!r} names a machine, not one of its images",
            hint=f"write {text}/IMAGE, for example {text}/disk",
        )
    return parsed
