"""Walk from a state down to its root, by headers alone."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

from attrs import frozen

from statepool.errors import MissingFile, NotFound
from statepool.qcow2.checks import Backing, check_image, sibling_of
from statepool.qcow2.files import refusal
from statepool.qcow2.header import Header, Read

DEFAULT_MAX_DEPTH = 256
"""The longest chain that is accepted, in states."""

OpenImage = Callable[[str], tuple[Read, int]]
"""
A function that returns the reader of a state's image, and its length in bytes. It raises
MissingFile or NotFound if there is no image.
"""

CheckMore = Callable[[str, Header], None]
"""
A function that checks the header of a state further, after all checks that need only the header. It
raises UnsafeImage.
"""


@frozen
class Link:
    """
    One state of a chain.

    :param state: its name
    :param header: the header of its image
    """

    state: str
    header: Header


def walk(
    tip: str,
    open_image: OpenImage,
    *,
    max_depth: int = DEFAULT_MAX_DEPTH,
    what: str = "",
    backing: Backing = Backing.UNMANAGED,
    checked: MutableMapping[str, Header] | None = None,
    check_more: CheckMore | None = None,
) -> tuple[Link, ...]:
    """
    Check every image of a chain, each before the next one is looked for.

    :param tip: the name of the state to begin with
    :param open_image: the function that opens the image of a state; its owner closes the images
        after the walk
    :param max_depth: the longest chain that is accepted, in states
    :param what: the object of the states, such as ``vm1/disk``, for messages
    :param backing: the permitted kind of backing names
    :param checked: headers that have passed, by their states: they are not read again, and headers
        that pass now are added
    :param check_more: a further check of each image before the next one is looked for
    :returns: the chain, tip first
    :raises UnsafeImage: an image does not pass a check, or the chain does not: ``loop``, ``depth``,
        ``missing-parent``
    :raises MissingFile: the tip itself is not there (or NotFound, as ``open_image`` says it)
    """
    known = checked if checked is not None else {}
    links: list[Link] = []
    seen: set[str] = set()
    state: str | None = tip
    while state is not None:
        name = f"{what} {state}".lstrip()
        if state in seen:
            raise refusal("loop", f"{what} {tip}".lstrip(), f"its chain comes back to {state!r}")
        if len(links) >= max_depth:
            raise refusal(
                "depth",
                f"{what} {tip}".lstrip(),
                f"its chain has more than {max_depth} states",
                hint="squash some of them",
            )
        header = known.get(state)
        if header is None:
            read, size = _open(state, links, open_image, name)
            header = check_image(read, size, name, backing=backing)
            if check_more is not None:
                check_more(state, header)
            known[state] = header
        links.append(Link(state, header))
        seen.add(state)
        state = sibling_of(header)
    return tuple(links)


def _open(state: str, links: list[Link], open_image: OpenImage, name: str) -> tuple[Read, int]:
    try:
        return open_image(state)
    except (MissingFile, NotFound) as error:
        if not links:
            raise
        raise refusal(
            "missing-parent", name, f"it is not there, but backs {links[-1].state!r}"
        ) from error
