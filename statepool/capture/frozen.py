"""
The names of an image while a running machine switches from the image to an overlay of it.

QEMU opens a file by its name again when it makes it read-only, so that name must not lead to
another file at that moment. So the overlay begins under a temporary name, which QEMU keeps using,
and only then gets the name that the image has for all other programs. In order:

1. ``.NAME.NONCE.below`` is a second name of the image; ``.NAME.NONCE.live`` is an empty overlay
   over it.
2. QEMU switches to the overlay.
3. ``NAME`` becomes a second name of the overlay.

At every moment a machine can run from ``NAME``. Between steps 2 and 3 it would lack what was
written since: after a crash there, the next command does step 3.

Other accounts may be able to create files with such names beside the image. The files count only if
they have the same owner as the image. qemu-img, which opens everything by name, is run only where
no other account can exchange them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from attrs import Factory, field, frozen

from statepool.beneath import Beneath, Tree, beside, link, same_file
from statepool.cache.access import OURS_ALONE, Access
from statepool.errors import AccessDenied
from statepool.pools.log import random_nonce
from statepool.qcow2.checks import Backing, check_image
from statepool.qcow2.files import open_regular, open_same
from statepool.qcow2.header import (
    Header,
    apply_patches,
    backing_patch,
    is_empty_overlay,
    read_header_fd,
    read_header_file,
    reader,
)
from statepool.qcow2.opened import exclusive, is_open
from statepool.qcow2.overlay import create_overlay
from statepool.qcow2.tool import QemuImg
from statepool.transports.failures import LINKS, Subject, translated

_BELOW = ".below"
_LIVE = ".live"
_PASSING = ".name"
_BELOW_NAME = re.compile(rf"\.(?P<name>.+)\.(?P<nonce>[0-9a-f]{{16}}){re.escape(_BELOW)}")


@frozen
class Names:
    """
    The names of one image.

    :param working: its public name
    :param nonce: makes the temporary names unique
    """

    working: Path
    nonce: str
    _tree: Tree = field(
        default=Factory(lambda names: Tree(names.working.parent), takes_self=True), eq=False
    )

    @classmethod
    def new(cls, working: Path) -> Names:
        """:returns: names that are not in use yet"""
        return cls(working, random_nonce())

    @property
    def below(self) -> Beneath:
        """The image that is frozen."""
        return self._named(_BELOW)

    @property
    def live(self) -> Beneath:
        """The overlay to which the machine switches."""
        return self._named(_LIVE)

    def _named(self, suffix: str) -> Beneath:
        return Beneath(self._tree, f".{self.working.name}.{self.nonce}{suffix}")

    @property
    def _image(self) -> Beneath:
        return Beneath(self._tree, self.working.name)

    def prepare(self, virtual_size: int) -> None:
        """
        Do step 1.

        :param virtual_size: of the disk, in bytes
        """
        try:
            link(self._image, self.below)
        except OSError as error:
            raise translated(
                error,
                "give a second name to",
                Subject(str(self.working), path=str(self.working)),
                lacks=LINKS,
            ) from error
        try:
            made = create_overlay(self.live, virtual_size, str(self.below), mode=OURS_ALONE)
            with open_same(self.live, made) as live, open_regular(self.below) as below:
                Access.of(below).give(live, self.working)
        except BaseException:
            self.clear()
            raise

    def switch(self) -> None:
        """Do step 3."""
        before = [
            names.live
            for names in _all_names(self.working, tree=self._tree)
            if names.nonce != self.nonce
        ]
        self._name(self.live)
        for file in before:  # QEMU knew the frozen image by it, and keeps that open now
            file.remove()

    def take_back(self) -> None:
        """
        Let the machine go back to the frozen image: make the public name lead to it, since QEMU
        will open that name.
        """
        self._name(self.below)

    def _name(self, file: Beneath) -> None:
        passing = self._named(_PASSING)
        link(file, passing)
        self._tree.rename(passing.path, self.working.name)

    def clear(self) -> None:
        """Remove the temporary names."""
        for suffix in (_PASSING, _LIVE, _BELOW):
            self._named(suffix).remove()

    @property
    def are_ours(self) -> bool:
        """
        Whether the files with the temporary names have the same owner as the image: in many
        directories any account can create files.
        """
        image = self._image.stat()
        found = [status for file in (self.live, self.below) if (status := file.stat()) is not None]
        return image is not None and all(
            stat.S_ISREG(status.st_mode) and status.st_uid == image.st_uid for status in found
        )

    @property
    def are_out_of_reach(self) -> bool:
        """Whether no other account, except root, can exchange these files."""
        above, image = self._tree.stat(""), self._image.stat()
        is_ours = image is not None and image.st_uid == os.geteuid()
        others = above.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return above.st_uid in (0, os.geteuid()) and (
            not others or bool(is_ours and above.st_mode & stat.S_ISVTX)
        )


def _all_names(working: Path, suffix: str = _LIVE, tree: Tree | None = None) -> Iterator[Names]:
    wanted = re.compile(rf"\.{re.escape(working.name)}\.([0-9a-f]{{16}}){re.escape(suffix)}")
    tree = tree or Tree(working.parent)
    with tree.open("", os.O_RDONLY | os.O_DIRECTORY) as directory:
        listed = sorted(os.listdir(directory))
    for name in listed:
        found = wanted.fullmatch(name)
        if found is not None and (names := Names(working, found[1], tree)).are_ours:
            yield names


def names_below(working: Path) -> Names | None:
    """
    :returns: the names of an image that a crash has left backed by its frozen image; None if it is
        not backed by one
    """
    header = read_header_file(working)
    found = _BELOW_NAME.fullmatch(os.path.basename(os.fsdecode(header.backing_name or b"")))
    names = (
        Names(working, found["nonce"])
        if found is not None and found["name"] == working.name
        else None
    )
    return names if names is not None and names.are_ours else None


def is_below(path: Path) -> bool:
    """
    :returns: whether an image was frozen: a running machine may read it, but no process writes to
        it
    """
    return _BELOW_NAME.fullmatch(path.name) is not None


def settle_names(working: Path, stands: Callable[[str], bool]) -> None:
    """
    Recover after a crash: finish the interrupted steps, and remove the temporary names of an image
    that no machine uses any more.

    :param working: absolute
    :param stands: whether a backing name, absolute, leads into a cache
    :raises AccessDenied: another account could exchange the files meanwhile
    :raises UnsafeImage: the image, or its frozen image, is not safe to open
    """
    if not os.path.lexists(working):
        return
    _settle_names(working)
    if not is_open(working):
        _mend(working, stands)
    _clear_needless(working)


def _clear_needless(working: Path) -> None:
    """
    Remove temporary names on which nothing depends any more: second names of the image itself, and
    empty overlays.
    """
    standing = names_below(working)
    image = beside(working)
    alive = {names.nonce for names in _all_names(working)}
    for names in _all_names(working, _BELOW):
        needed = names == standing or names.nonce in alive
        if not needed and (same_file(image, names.below) or not _was_written(names.below)):
            names.below.remove()


def _mend(working: Path, stands: Callable[[str], bool]) -> None:
    """
    Rebase an image from its frozen image to the backing file of that, with all that the frozen
    image holds. If the frozen image is empty by now, since it became a state, only the backing name
    changes.
    """
    names = names_below(working)
    if names is None or names.below.stat() is None:
        return
    below, empty = _examined(names.below)
    name = os.fsdecode(below.backing_name or b"")
    if name and not stands(os.path.join(working.parent, name)):
        return  # no machine of ours ran on it
    # A root of a chain has no backing file: its content is written into the image, which then has
    # none either.
    if not (empty and name):
        if not names.are_out_of_reach:
            raise AccessDenied(
                f"{working} stands on {names.below}, which was frozen to become a state when that"
                " was cut off; it cannot be put right where another account could exchange the two"
                " meanwhile",
                path=str(working),
                hint=(
                    "do it as the account that the image and its directory belong to, or move both"
                    " files to a directory of your own"
                ),
            )
        _examined(beside(working))
        QemuImg().rebase(working, name)
    else:
        with exclusive(working) as descriptor:
            patches = backing_patch(
                reader(descriptor), read_header_fd(descriptor, str(working)), name
            )
            apply_patches(descriptor, patches or ())
            os.fsync(descriptor)
    names.clear()


def _settle_names(working: Path) -> None:
    image = beside(working)
    for names in _all_names(working):
        if same_file(image, names.live):
            if not is_open(working):
                names.live.remove()
        elif same_file(image, names.below):
            used = is_open(names.live)
            if used or _was_written(names.live):
                names.switch()
            else:
                names.live.remove()
                names.below.remove()


def _was_written(file: Beneath) -> bool:
    return not _examined(file)[1]


def _examined(file: Beneath) -> tuple[Header, bool]:
    """
    :returns: the header of an image, and whether nothing was written to it
    :raises UnsafeImage: it is not safe to open
    """
    with open_regular(file) as descriptor:
        header = check_image(
            reader(descriptor), os.fstat(descriptor).st_size, str(file), backing=Backing.WORKING
        )
        return header, is_empty_overlay(reader(descriptor), header)
