"""
The journal of a get that makes all working images of a machine, or none.

Each image is written whole under a temporary name beside its place. Only then they are renamed into
their places, one after the other. A marker tells how to recover if a crash interrupts this: if one
image is in its place, the others are put into their places, too.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import Factory, field, frozen

from statepool.beneath import NO_LINKS, Beneath, Tree, beside, link, same_file, settle
from statepool.cache.access import Access
from statepool.cache.cache import Cache
from statepool.cache.working import Fresh, prepare_working
from statepool.errors import BadRecord, FileInTheWay, about_file
from statepool.model.manifest import Manifest
from statepool.pools.staging import Marker
from statepool.transports.failures import Subject, translated

INTENT = "get-machine"
"""The kind of the marker, in its facts."""

_PASSING_NAME = re.compile(r"\.statepool-[0-9a-f]{16}-[0-9]+\.tmp")

Chain = tuple[Manifest, ...]


@frozen
class Place:
    """
    The place of a working image.

    :param to: its path, absolute
    :param temporary: its path until it is in its place
    :param before: the :func:`stamp` of the file that was in the place before
    """

    to: Path
    temporary: Path
    before: str
    _tree: Tree = field(
        default=Factory(lambda place: Tree(place.to.parent), takes_self=True), eq=False
    )

    @property
    def file(self) -> Beneath:
        """The file in its place, in the directory that was there at the first look."""
        return Beneath(self._tree, self.to.name)

    @property
    def _passing(self) -> Beneath:
        return Beneath(self._tree, self.temporary.name)

    @property
    def _second(self) -> Beneath:
        return Beneath(self._tree, self.temporary.with_suffix(".put").name)

    @property
    def is_taken(self) -> bool:
        """Whether the new image is in its place."""
        return same_file(self.file, self._passing)

    def take(self, fresh: Fresh) -> None:
        """
        Give a written image its temporary name of this get. Until then it has the temporary name
        from its record, by which other processes see that it is being made.
        """
        if not _has_second(fresh.temporary, self._passing):
            self._tree.rename(fresh.temporary.path, self._passing.path)

    def put(self) -> None:
        """
        Put the image into its place, and keep its temporary name, if hard links are possible.

        :raises FileInTheWay: another process put a file there meanwhile
        """
        try:
            if not self.before:
                settle(self._passing, self.file)
                return
            self._tree.rename(
                (self._second if _has_second(self._passing, self._second) else self._passing).path,
                self.file.path,
            )
        except FileExistsError as error:
            raise FileInTheWay(
                f"{self.to} exists", path=str(self.to), hint="choose another name"
            ) from error
        except OSError as error:
            raise about_file(
                translated(error, "make", Subject(str(self.to), path=str(self.to)))
            ) from error

    @property
    def is_gone(self) -> bool:
        """
        Whether the new image has lost its temporary name. Without hard links, it loses that name
        when it is put into its place.
        """
        return self._passing.stat() is None

    @property
    def is_unchanged(self) -> bool:
        """Whether the file in its place is the one that was there before."""
        return stamp(self.file) == self.before

    def clear(self) -> None:
        """Remove the temporary names."""
        self._second.remove()
        self._passing.remove()


def make_together(cache: Cache, wanted: Mapping[Path, Chain], *, overwrite: bool) -> None:
    """
    Make several working images together.

    :param wanted: chains of the cache, tip first, by the absolute paths of the images to make,
        which have been checked
    :param overwrite: whether an existing file is replaced
    :raises FileInTheWay: there is a file, and it must not be replaced
    """
    nonce = cache.pool.nonce()
    names = [
        (to, to.with_name(f".statepool-{nonce}-{number}.tmp"))
        for number, to in enumerate(sorted(wanted))
    ]
    places = [
        Place(to, temporary, stamp(beside(to)) if overwrite else "") for to, temporary in names
    ]
    staging = cache.stage([], intent=INTENT, places=_to_text(places))
    made: dict[Path, Fresh] = {}
    ready = False
    try:
        for place in places:
            chain = wanted[place.to]
            fresh = prepare_working(
                cache,
                chain,
                place.file,
                standing_on=chain,
                access=Access.at(place.to) if overwrite else None,
            )
            made[place.to] = fresh
            place.take(fresh)
        ready = True
        for place in places:
            place.put()
    except BaseException:
        # The first image is taken back last: without it, the next command would assume that images
        # have been put into their places.
        for place in reversed(places):
            _take_back(place, made.get(place.to), taken=place.is_taken or (ready and place.is_gone))
        staging.end()
        raise
    for place in places:
        place.clear()
        made[place.to].temporary.remove()
        if place.before:
            cache.chains.release(place.to, besides=made[place.to].record)
    staging.end()


def _take_back(place: Place, fresh: Fresh | None, *, taken: bool) -> None:
    replaced = bool(place.before) and taken  # the old file was replaced, so the new image stays
    if taken and not replaced:
        place.file.remove()
    place.clear()
    if fresh is not None and replaced:
        fresh.temporary.remove()
    elif fresh is not None:
        fresh.drop()


def recover_together(cache: Cache, marker: Marker) -> None:
    """
    Recover after a crash: finish the get if one of the images is in its place, and undo it
    otherwise.

    :param marker: of a writer that has ended
    """
    places = _from_text(marker.facts)
    # The images are written, and then put into their places, in the same order. Without hard links,
    # an image in its place has no other name.
    gone = [place.is_gone for place in places]
    begun = any(place.is_taken for place in places) or (gone[:1] == [True] and not all(gone))
    for place in places:
        # A file that has changed since in the place belongs to another process.
        if begun and not place.is_gone and not place.is_taken and place.is_unchanged:
            with contextlib.suppress(FileInTheWay):
                place.put()
    for place in reversed(places):
        place.clear()
        if not begun and place.file.stat() is None:
            cache.chains.release(place.to)
    cache.staging(marker).end()


def _has_second(temporary: Beneath, second: Beneath) -> bool:
    """
    Give an image a second name.

    :returns: whether it has that name: some file systems have no hard links
    """
    try:
        link(temporary, second)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return False
    return True


def _to_text(places: Sequence[Place]) -> str:
    return json.dumps(
        [
            {"to": str(place.to), "temporary": str(place.temporary), "before": place.before}
            for place in places
        ]
    )


def _from_text(facts: Mapping[str, str]) -> list[Place]:
    try:
        places = [
            Place(Path(entry["to"]), Path(entry["temporary"]), str(entry["before"]))
            for entry in json.loads(facts["places"])
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise BadRecord(f"a marker of a get lacks or garbles {error}") from error
    for place in places:
        if (
            _PASSING_NAME.fullmatch(place.temporary.name) is None
            or place.temporary.parent != place.to.parent
        ):
            raise BadRecord(
                f"a marker of a get names {place.temporary}, which is no passing name of {place.to}"
            )
    return places


def stamp(file: Beneath) -> str:
    """
    :returns: a text that changes when a file is written to or replaced; empty if there is no file
    """
    found = file.stat()
    return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}" if found is not None else ""
