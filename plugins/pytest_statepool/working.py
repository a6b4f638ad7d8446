"""A working image, or those of a machine, as a test sees them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pytest_statepool.wishes import Wish


@dataclass(frozen=True)
class Working:
    """
    A fresh working image of a state; for a machine, the working images of all its images. It can be
    used as a path.

    ``working["vm1/disk"]`` is the working image of that object among all of the test, and iterating
    yields the working images of single images.

    :param object: the object of the state
    :param state: the state that the test asked for
    :param name: the name under which that is stored: of the state itself, or with a key if it has a
        builder
    :param path: the image; of a machine, the directory with ``IMAGE.qcow2`` of each
    :param images: the image files, by the names of the machine's images
    :param others: all working images of this test, by their objects
    """

    object: str
    state: str
    name: str
    path: Path
    images: Mapping[str, Path]
    others: Mapping[str, Working] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_image(cls, wish: Wish, name: str, path: Path) -> Working:
        """:returns: the working image of an image"""
        working = cls(wish.object, wish.state, name, path, {wish.object.partition("/")[2]: path})
        return working.among([working])

    @classmethod
    def of_machine(cls, wish: Wish, directory: Path, images: Mapping[str, Path]) -> Working:
        """:returns: the working images of a machine"""
        working = cls(wish.object, wish.state, wish.state, directory, images)
        return working.among([working])

    @property
    def is_machine(self) -> bool:
        """Whether it belongs to a whole machine."""
        return "/" not in self.object

    @property
    def machine(self) -> str:
        """The machine, or the machine of the image."""
        return self.object.partition("/")[0]

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        """
        Return the path: it is used inside other words of a command line, as in
        ``f"file={vm_state},format=qcow2"``.
        """
        return str(self.path)

    def __getitem__(self, object: str) -> Working:
        try:
            return self.others[object]
        except KeyError:
            raise KeyError(
                f"this test has no working image of {object}; it has those of"
                f" {', '.join(self.others)}"
            ) from None

    def __iter__(self) -> Iterator[Working]:
        return (working for working in self.others.values() if not working.is_machine)

    def among(self, workings: list[Working]) -> Working:
        """:returns: this working image, with the others of its test"""
        others = {working.object: working for working in workings}
        for working in workings:
            if working.is_machine:
                parts = [
                    Working.of_image(
                        Wish(f"{working.object}/{name}", working.state), working.name, path
                    )
                    for name, path in working.images.items()
                ]
                others |= {part.object: part for part in parts}
        return replace(self, others=others)
