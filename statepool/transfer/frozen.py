"""
The names of an image while a running machine goes from it to an overlay of it.

QEMU opens a file by its name again when it makes it read-only, so that name must not lead to another file at that moment: the overlay begins under a
passing name, which QEMU goes on to know it by, and only then gets the name that the image has for everybody else. In order:

1. ``.NAME.NONCE.below`` is a second name of the image; ``.NAME.NONCE.live`` is an empty overlay over that.
2. QEMU goes on in the overlay.
3. ``NAME`` becomes a second name of the overlay.

At every moment ``NAME`` can be run from. Between 2 and 3 it would lack what was written since: whoever comes after a crash there does step 3.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from statepool.beneath import Descriptor
from statepool.pools.log import random_nonce
from statepool.qcow2.files import open_regular
from statepool.qcow2.header import apply_patches, backing_patch, is_empty_overlay, read_header_fd, read_header_file, reader
from statepool.qcow2.opened import exclusive, is_open
from statepool.qcow2.overlay import create_overlay
from statepool.qcow2.tool import QemuImg
from statepool.transfer.access import OURS_ALONE, Access
from statepool.transports.failures import LINKS, Subject, translated

_BELOW = ".below"
_LIVE = ".live"
_BELOW_NAME = re.compile(rf"\.(?P<name>.+)\.(?P<nonce>[0-9a-f]{{16}}){re.escape(_BELOW)}")


@frozen
class Names:
    """
    The names of one image.

    :param working: the one that everybody knows
    :param nonce: tells passing names apart
    """

    working: Path
    nonce: str

    @classmethod
    def new(cls, working: Path) -> Names:
        """:returns: names that nobody has used yet"""
        return cls(working, random_nonce())

    @property
    def below(self) -> Path:
        """The image that becomes frozen."""
        return self.working.with_name(f".{self.working.name}.{self.nonce}{_BELOW}")

    @property
    def live(self) -> Path:
        """The overlay that the machine goes on in."""
        return self.working.with_name(f".{self.working.name}.{self.nonce}{_LIVE}")

    def prepare(self, virtual_size: int) -> None:
        """Step 1. :param virtual_size: of the disk, in bytes"""
        try:
            os.link(self.working, self.below, follow_symlinks=False)
        except OSError as error:
            raise translated(error, "give a second name to", Subject(str(self.working), path=str(self.working)), lacks=LINKS) from error
        try:
            create_overlay(self.live, virtual_size, str(self.below), mode=OURS_ALONE)
            with open_regular(self.live) as descriptor:
                Access.of(self.working).give(descriptor, self.working)
        except BaseException:
            self.clear()
            raise

    def switch(self) -> None:
        """Step 3."""
        before = [names.live for names in _all_names(self.working) if names.nonce != self.nonce]
        self._name(self.live)
        for path in before:  # QEMU knew the image below by it, and has opened that for good now
            path.unlink(missing_ok=True)

    def take_back(self) -> None:
        """The machine goes back to the image below: that is what the name is to mean, under which QEMU will open it."""
        self._name(self.below)

    def _name(self, path: Path) -> None:
        passing = path.with_suffix(".name")
        os.link(path, passing)
        os.replace(passing, self.working)

    def clear(self) -> None:
        """Remove the passing names."""
        self.live.with_suffix(".name").unlink(missing_ok=True)
        self.live.unlink(missing_ok=True)
        self.below.unlink(missing_ok=True)


def _all_names(working: Path, suffix: str = _LIVE) -> Iterator[Names]:
    wanted = re.compile(rf"\.{re.escape(working.name)}\.([0-9a-f]{{16}}){re.escape(suffix)}")
    for name in sorted(os.listdir(working.parent)):
        found = wanted.fullmatch(name)
        if found is not None:
            yield Names(working, found[1])


def names_below(working: Path) -> Names | None:
    """:returns: the names of an image that a crash has left standing on one that was frozen, or None if it does not stand on such a one"""
    header = read_header_file(working)
    found = _BELOW_NAME.fullmatch(os.path.basename(os.fsdecode(header.backing_name or b"")))
    return Names(working, found["nonce"]) if found is not None and found["name"] == working.name else None


def is_below(path: Path) -> bool:
    """:returns: whether an image is one that was frozen: a running machine may read it, but nobody writes to it"""
    return _BELOW_NAME.fullmatch(path.name) is not None


def settle_names(working: Path) -> None:
    """
    End what a crash interrupted, and forget the passing names of an image that no machine runs on any more.

    :param working: absolute
    """
    if not os.path.lexists(working):
        return
    _settle_names(working)
    if not is_open(working):
        _mend(working)
    _clear_needless(working)


def _clear_needless(working: Path) -> None:
    """Remove what nothing stands on any more: second names of the image itself, and empty overlays."""
    standing = names_below(working)
    alive = {names.nonce for names in _all_names(working)}
    for names in _all_names(working, _BELOW):
        needed = names == standing or names.nonce in alive
        if not needed and (_is_one(working, names.below) or not _was_written(names.below)):
            names.below.unlink(missing_ok=True)


def _mend(working: Path) -> None:
    """Let an image stand again on what the frozen one below it stands on: with all that is in that, unless it is empty by now, being a state."""
    names = names_below(working)
    if names is None or not names.below.exists():
        return
    with Descriptor(os.open, names.below, os.O_RDONLY | os.O_CLOEXEC) as descriptor:
        below = read_header_fd(descriptor, str(names.below))
        empty = is_empty_overlay(reader(descriptor), below)
    name = os.fsdecode(below.backing_name or b"")
    if not (empty and name):  # a root of a chain has no name below it: what it holds is written into the image, which then stands alone
        QemuImg().rebase(working, name)
    else:
        with exclusive(working) as descriptor:
            patches = backing_patch(reader(descriptor), read_header_fd(descriptor, str(working)), name)
            apply_patches(descriptor, patches or ())
            os.fsync(descriptor)
    names.clear()


def _settle_names(working: Path) -> None:
    for names in _all_names(working):
        if _is_one(working, names.live):
            if not is_open(working):
                names.live.unlink(missing_ok=True)
        elif _is_one(working, names.below):
            used = is_open(names.live)
            if used or _was_written(names.live):
                names.switch()
            else:
                names.live.unlink(missing_ok=True)
                names.below.unlink(missing_ok=True)


def _was_written(path: Path) -> bool:
    with Descriptor(os.open, path, os.O_RDONLY | os.O_CLOEXEC) as descriptor:
        return not is_empty_overlay(reader(descriptor), read_header_fd(descriptor, str(path)))


def _is_one(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except FileNotFoundError:
        return False
