"""
What other tools have put into a pool: files in the places of its view, whose chains their own
headers tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from statepool.errors import InvalidName, MissingFile, StatePoolError
from statepool.model.location import Location
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.names import ROOT, ROOT_STATES, check_state_name
from statepool.pools import layout
from statepool.pools.fold import Fold
from statepool.pools.pool import Pool
from statepool.pools.view import Unmanaged
from statepool.qcow2.chain import walk
from statepool.qcow2.checks import LARGE, Backing, check_image, check_parent_place, sibling_of
from statepool.qcow2.files import refusal
from statepool.qcow2.header import Header, Read
from statepool.sources.source import Member
from statepool.transports.base import FileKind, Stat, Transport


class Place(Protocol):
    """A pool, or a source."""

    @property
    def transport(self) -> Transport: ...

    @property
    def location(self) -> Location: ...


def reader(pool: Place, path: str) -> tuple[Read, int]:
    """
    :returns: what reads a file of a pool piece by piece, and its size in bytes
    :raises MissingFile: there is no such file
    :raises UnsafeImage: it is not a regular one
    """
    stat = pool.transport.stat(path)
    if stat is None:
        raise MissingFile(
            f"there is no file {path} in {pool.location}", pool=str(pool.location), path=path
        )
    if stat.kind is not FileKind.FILE:
        raise refusal(
            "regular-file", f"{path} in {pool.location}", "it is not a regular file", path=path
        )
    return (lambda offset, size: pool.transport.read(path, offset, size)), stat.size


def require_proportion(pool: Place, manifest: Manifest, path: str) -> None:
    """
    Before all of a large image is read: what is far longer than its disk can need is refused.

    :raises UnsafeImage: it is, or has no header that says otherwise
    """
    if manifest.kind is Kind.IMAGE and manifest.size > LARGE:
        check_image(*reader(pool, path), f"{manifest.id} in {pool}", backing=Backing.UNMANAGED)


BEGINNING = 4096
"""How much of each image is read together with others, in bytes: nearly every header is shorter."""


class Looked:
    """
    What other tools put into a pool, looked at together: each file is asked about and read once,
    however many states stand on it, in a number of round trips that does not grow with their
    number.

    :param pool: the pool
    :param folds: what its logs say, by the ids of the machines whose states are looked at
    """

    def __init__(self, pool: Pool, folds: Mapping[str, Fold]) -> None:
        self._pool = pool
        self.folds = folds
        self.unmanaged, self.closed = pool.view.all_unmanaged(self.folds)
        self._stats: dict[str, Stat | None] = {}
        self._beginnings: dict[str, bytes] = {}
        self._headers: dict[str, dict[str, Header]] = {}
        self._look(
            [
                found
                for listed in self.unmanaged.values()
                for found in listed
                if found.id.kind is Kind.IMAGE
            ]
        )

    def _look(self, found: list[Unmanaged]) -> None:
        if not found:
            return
        self._stats = {layout.view(one.id): one.stat for one in found}
        objects = {one.id.object for one in found}
        # What the log knows can stand below.
        below = [
            manifest
            for fold in self.folds.values()
            for manifest in fold.states.values()
            if manifest.object in objects
        ]
        paths = list(
            {layout.data(manifest.digest) for manifest in below if manifest.digest is not None}
        )
        self._stats |= zip(paths, self._pool.transport.stat_many(paths), strict=True)
        regular = [
            path
            for path, stat in self._stats.items()
            if stat is not None and stat.kind is FileKind.FILE
        ]
        try:
            beginnings = self._pool.transport.read_many(regular, BEGINNING)
        except StatePoolError:
            # one that cannot be read must not hide the others: each is read when its turn comes,
            # and found out by its name
            return
        self._beginnings = {
            path: data for path, data in zip(regular, beginnings, strict=True) if data is not None
        }

    def headers(self, object: str) -> dict[str, Header]:
        """
        :returns: the headers of images of ``object`` that have passed all checks so far, by their
            states
        """
        return self._headers.setdefault(object, {})

    def stat(self, path: str) -> Stat | None:
        """:returns: as :meth:`~statepool.transports.base.Transport.stat`"""
        return self._stats[path] if path in self._stats else self._pool.transport.stat(path)

    def reader(self, path: str) -> tuple[Read, int]:
        """:returns: as :func:`reader`"""
        beginning = self._beginnings.get(path)
        stat = self._stats.get(path)
        if beginning is None or stat is None:
            return reader(self._pool, path)

        def read(offset: int, size: int) -> bytes:
            if offset + size <= len(beginning) or len(beginning) < BEGINNING:
                return beginning[offset : offset + size]
            return self._pool.transport.read(path, offset, size)

        return read, stat.size


def unmanaged_chain(
    pool: Pool, state: StateId, fold: Fold, looked: Looked | None = None
) -> tuple[Member, ...]:
    """
    The chain of a state that another tool put into a pool, down to its root, or to the first state
    that the log knows.

    :param looked: what was seen of the pool a moment ago
    :returns: tip first; nothing if there is no such file
    :raises UnsafeImage: one of its images is not fit to be used, or is missing
    """
    path = layout.view(state)
    found = looked.stat(path) if looked is not None else pool.transport.stat(path)
    if found is None or (found.kind is not FileKind.FILE and pool.view.is_free(state)):
        return ()  # nothing, or a link of ours that has outlived its state

    def open_image(name: str) -> tuple[Read, int]:
        below = StateId(state.object, name)
        known = fold.states.get(below)
        path = (
            layout.data(known.digest)
            if known is not None and known.digest is not None
            else layout.view(below)
        )
        return looked.reader(path) if looked is not None else reader(pool, path)

    def check_more(name: str, header: Header) -> None:
        # of those that the log knows, it says what backs them
        if (child := StateId(state.object, name)) not in fold.states:
            _refuse_reserved_parent(pool, child, header, looked)
            _refuse_another_parent(pool, child, header)

    checked = looked.headers(state.object) if looked is not None else None
    links = walk(
        state.state,
        open_image,
        max_depth=pool.max_depth,
        what=state.object,
        checked=checked,
        check_more=check_more,
    )
    members: list[Member] = []
    for link in links:
        below = StateId(state.object, link.state)
        known = fold.states.get(below)
        if known is not None:
            return (
                *members,
                *(
                    Member(manifest, layout.data(manifest.digest))
                    for manifest in fold.chain(known)
                    if manifest.digest is not None
                ),
            )
        members.append(Member(unmanaged_manifest(below, link.header), layout.view(below)))
    return tuple(members)


ROOT_NAME = f"{ROOT}{layout.IMAGE_SUFFIX}".encode()
"""How a child of ours names the root image, which is not beside it in a view, but above."""


def _refuse_reserved_parent(
    pool: Pool, child: StateId, header: Header, looked: Looked | None
) -> None:
    """
    A file beside another one that is called as the root image is among us is not the root image,
    and cannot be a state either.

    :raises UnsafeImage: such a file backs the image
    """
    parent = sibling_of(header)
    if parent not in ROOT_STATES:
        return
    beside = f"{child.object}/{parent}{layout.IMAGE_SUFFIX}"
    if (
        parent == ROOT
        and (looked.stat(beside) if looked is not None else pool.transport.stat(beside)) is None
    ):
        return
    try:
        check_state_name(parent, root=False)
    except InvalidName as error:
        hint = (
            "give that file another name, and say so: qemu-img rebase -u -f qcow2 -F qcow2 -b"
            " NAME.qcow2 FILE"
        )
        raise refusal(
            "missing-parent",
            f"{child} in {pool}",
            f"it is backed by {parent}.qcow2, and {error.message}",
            hint=hint,
        ) from error


def _refuse_another_parent(pool: Pool, child: StateId, header: Header) -> None:
    """
    Where the backing name of a file leads to another object of the pool, the state of that name of
    its own object is not its parent.
    """
    parent = sibling_of(header)
    if parent is None or (child.state != ROOT and header.backing_name == ROOT_NAME):
        return
    taken = layout.view(StateId(child.object, parent))
    what = f"{child} in {pool}"
    check_parent_place(
        header,
        what,
        root=pool.location.path,
        own=layout.view(child),
        parent=taken,
        links=pool.transport.capabilities.local,
    )


def unmanaged_manifest(state: StateId, header: Header) -> Manifest:
    """:returns: what a header says of an image that nobody has hashed"""
    return Manifest(
        object=state.object,
        state=state.state,
        size=header.file_size,
        virtual_size=header.virtual_size,
        cluster_size=header.cluster_size,
    )


def token_of(pool: Pool, chain: tuple[Member, ...]) -> str:
    """:returns: what changes with the files of a chain"""
    stats = [pool.transport.stat(member.path) for member in chain]
    return "files:" + ",".join(
        f"{stat.size}-{stat.mtime_ns}-{stat.identity}" if stat is not None else "none"
        for stat in stats
    )
