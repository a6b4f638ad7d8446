"""
Unmanaged states: files that other tools have put into the places of a pool's view. The headers of
the files tell their chains.
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
    :returns: a function that reads parts of a file of a pool, and the size of the file in bytes
    :raises MissingFile: there is no such file
    :raises UnsafeImage: it is not a regular file
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
    Refuse a large image that is far longer than its disk can need, before all of it is read.

    :raises UnsafeImage: the image is too long, or its header is not valid
    """
    if manifest.kind is Kind.IMAGE and manifest.size > LARGE:
        check_image(*reader(pool, path), f"{manifest.id} in {pool}", backing=Backing.UNMANAGED)


BEGINNING = 4096
"""
How much of each image is read together with other images, in bytes: nearly every header is shorter.
"""


class Looked:
    """
    The unmanaged states of a pool, read together. Each file is looked up and read once, however
    many states it backs, in a number of round trips that does not grow with the number of files.

    :param pool: the pool
    :param folds: its folds, by the ids of the machines whose states are looked at
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
        # Managed states can back unmanaged ones.
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
            # a file that cannot be read must not hide the others: each file is read in its turn,
            # and the error then names it
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
    Return the chain of a state that another tool put into a pool. From the first managed state in
    it on, the log gives the chain.

    :param looked: what was read of the pool a moment ago
    :returns: the chain, tip first; empty if there is no such file
    :raises UnsafeImage: one of its images is not safe to use, or is missing
    """
    path = layout.view(state)
    found = looked.stat(path) if looked is not None else pool.transport.stat(path)
    if found is None or (found.kind is not FileKind.FILE and pool.view.is_free(state)):
        return ()  # no file, or a link of ours whose state was removed

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
        # for managed states, the log tells what backs them
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
"""
The backing name by which our children name the root image. In a view, that image is not beside
them, but in the directory above.
"""


def _refuse_reserved_parent(
    pool: Pool, child: StateId, header: Header, looked: Looked | None
) -> None:
    """
    Refuse a child that is backed by a file beside it with a name reserved for root states. Such a
    file is not the root image, and cannot be a state either.

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
    Refuse a child whose backing name leads to another object of the pool: the state of the same
    name of its own object is then not its parent.
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
    """:returns: a manifest of an image that was not hashed, from its header"""
    return Manifest(
        object=state.object,
        state=state.state,
        size=header.file_size,
        virtual_size=header.virtual_size,
        cluster_size=header.cluster_size,
    )


def token_of(pool: Pool, chain: tuple[Member, ...]) -> str:
    """:returns: a token that changes with the files of a chain"""
    stats = [pool.transport.stat(member.path) for member in chain]
    return "files:" + ",".join(
        f"{stat.size}-{stat.mtime_ns}-{stat.identity}" if stat is not None else "none"
        for stat in stats
    )
