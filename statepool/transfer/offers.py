"""
What a source has to offer: the chain of a state with the files that hold it, whether the source's log knows it or another tool put it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attrs import evolve, frozen

from statepool.errors import IntegrityError, InvalidName, MissingFile, NotFound, StatePoolError, UsageError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import ROOT, Kind, Manifest, Parent, StateId
from statepool.model.names import ROOT_STATES, check_state_name
from statepool.model.outcomes import Listed, Listing
from statepool.model.scope import Scope
from statepool.pools import layout
from statepool.pools.fold import Fold
from statepool.pools.pool import Pool
from statepool.pools.view import Unmanaged
from statepool.qcow2.chain import walk
from statepool.qcow2.checks import LARGE, Backing, check_image, check_parent_place, sibling_of
from statepool.qcow2.files import refusal
from statepool.qcow2.header import Header, Read
from statepool.transports.base import FileKind, Stat


@frozen
class Source:
    """
    A pool that the cache can be filled from.

    :param pool: the pool
    :param name: what the user calls it
    :param scope: how far it is
    :param authority: whether it is right where sources have different content under one name
    """

    pool: Pool
    name: str
    scope: Scope = Scope.SHARED
    authority: bool = False

    @property
    def location(self) -> Location:
        """Where it is."""
        return self.pool.location

    def __str__(self) -> str:
        return str(self.pool.location)


def require_distinct(cache: Pool, sources: Sequence[Source]) -> None:
    """:raises UsageError: a pool is named twice, or two sources have one name"""
    seen = {cache.transport.identity: "the cache"}
    for source in sources:
        identity = source.pool.transport.identity
        if identity in seen:
            raise UsageError(f"the source {source.name} is {seen[identity]} itself", hint="name each pool once")
        seen[identity] = f"the source {source.name}"
    named: dict[str, Source] = {}
    for source in sources:
        other = named.setdefault(source.name, source)
        if other is not source:
            raise UsageError(f"two sources are named {source.name!r}: {other} and {source}", hint="give each a name of its own")


@frozen
class Member:
    """
    One state of an offered chain.

    :param manifest: what is known of it; without a digest if another tool put it there
    :param path: the file in the source
    """

    manifest: Manifest
    path: str


@frozen
class Offer:
    """
    A chain that a source has.

    :param source: which
    :param members: tip first
    :param managed: whether the source's log knows it
    :param token: changes when what was offered changes
    """

    source: Source
    members: tuple[Member, ...]
    managed: bool
    token: str


def find_offer(source: Source, state: StateId) -> Offer | None:
    """
    :returns: what a source has of a state, or None if it does not have it
    :raises NotAPool: the source is none
    :raises UnsafeImage: it is a file of another tool, and not fit to be used
    """
    pool = source.pool
    fold = pool.fold(state.machine)
    manifest = fold.states.get(state)
    if manifest is not None:
        members = tuple(Member(link, layout.data(link.digest)) for link in fold.chain(manifest) if link.digest is not None)
        return Offer(source, members, managed=True, token=log_token(fold))
    pool.require()
    if state.kind is Kind.IMAGE and (chain := unmanaged_chain(pool, state, fold)):
        return Offer(source, chain, managed=False, token=_unmanaged_token(pool, chain))
    return None


def is_unchanged(source: Source, state: StateId, token: str) -> bool:
    """:returns: whether a source surely has of a state what it had when it gave this token; at the price of a small request"""
    if token.startswith("log:"):
        return log_token(source.pool.fold(state.machine)) == token
    offer = find_offer(source, state)
    return offer is not None and offer.token == token


def log_token(fold: Fold) -> str:
    """:returns: what changes with every record of a machine"""
    return f"log:{fold.number}:{fold.nonces.get(fold.number, '')}"


def _unmanaged_token(pool: Pool, chain: tuple[Member, ...]) -> str:
    stats = [pool.transport.stat(member.path) for member in chain]
    return "files:" + ",".join(f"{stat.size}-{stat.mtime_ns}-{stat.identity}" if stat is not None else "none" for stat in stats)


# -- files of other tools ----------------------------------------------------------------------------------------------------------------------------


def reader(pool: Pool, path: str) -> tuple[Read, int]:
    """
    :returns: what reads a file of a pool piece by piece, and its size in bytes
    :raises MissingFile: there is no such file
    :raises UnsafeImage: it is not a regular one
    """
    stat = pool.transport.stat(path)
    if stat is None:
        raise MissingFile(f"there is no file {path} in {pool.location}", pool=str(pool.location), path=path)
    if stat.kind is not FileKind.FILE:
        raise refusal("regular-file", f"{path} in {pool.location}", "it is not a regular file", path=path)
    return (lambda offset, size: pool.transport.read(path, offset, size)), stat.size


def require_proportion(pool: Pool, manifest: Manifest, path: str) -> None:
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
    What other tools put into a pool, looked at together: each file is asked about and read once, however many states stand on it, in a number of
    round trips that does not grow with their number.

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
        self._look([found for listed in self.unmanaged.values() for found in listed if found.id.kind is Kind.IMAGE])

    def _look(self, found: list[Unmanaged]) -> None:
        if not found:
            return
        self._stats = {layout.view(one.id): one.stat for one in found}
        objects = {one.id.object for one in found}
        # What the log knows can stand below.
        below = [manifest for fold in self.folds.values() for manifest in fold.states.values() if manifest.object in objects]
        paths = list({layout.data(manifest.digest) for manifest in below if manifest.digest is not None})
        self._stats |= zip(paths, self._pool.transport.stat_many(paths), strict=True)
        regular = [path for path, stat in self._stats.items() if stat is not None and stat.kind is FileKind.FILE]
        try:
            beginnings = self._pool.transport.read_many(regular, BEGINNING)
        except StatePoolError:
            return  # one that cannot be read must not hide the others: each is read when its turn comes, and found out by its name
        self._beginnings = {path: data for path, data in zip(regular, beginnings, strict=True) if data is not None}

    def headers(self, object: str) -> dict[str, Header]:
        """:returns: the headers of images of ``object`` that have passed all checks so far, by their states"""
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


def unmanaged_chain(pool: Pool, state: StateId, fold: Fold, looked: Looked | None = None) -> tuple[Member, ...]:
    """
    The chain of a state that another tool put into a pool, down to its root, or to the first state that the log knows.

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
        path = layout.data(known.digest) if known is not None and known.digest is not None else layout.view(below)
        return looked.reader(path) if looked is not None else reader(pool, path)

    def check_more(name: str, header: Header) -> None:
        if (child := StateId(state.object, name)) not in fold.states:  # of those that the log knows, it says what backs them
            _refuse_reserved_parent(pool, child, header, looked)
            _refuse_another_parent(pool, child, header)

    checked = looked.headers(state.object) if looked is not None else None
    links = walk(state.state, open_image, max_depth=pool.max_depth, what=state.object, checked=checked, check_more=check_more)
    members: list[Member] = []
    for link in links:
        below = StateId(state.object, link.state)
        known = fold.states.get(below)
        if known is not None:
            return (*members, *(Member(manifest, layout.data(manifest.digest)) for manifest in fold.chain(known) if manifest.digest is not None))
        members.append(Member(unmanaged_manifest(below, link.header), layout.view(below)))
    return tuple(members)


ROOT_NAME = f"{ROOT}{layout.IMAGE_SUFFIX}".encode()
"""How a child of ours names the root image, which is not beside it in a view, but above."""


def _refuse_reserved_parent(pool: Pool, child: StateId, header: Header, looked: Looked | None) -> None:
    """
    A file beside another one that is called as the root image is among us is not the root image, and cannot be a state either.

    :raises UnsafeImage: such a file backs the image
    """
    parent = sibling_of(header)
    if parent not in ROOT_STATES:
        return
    beside = f"{child.object}/{parent}{layout.IMAGE_SUFFIX}"
    if parent == ROOT and (looked.stat(beside) if looked is not None else pool.transport.stat(beside)) is None:
        return
    try:
        check_state_name(parent)
    except InvalidName as error:
        hint = "give that file another name, and say so: qemu-img rebase -u -f qcow2 -F qcow2 -b NAME.qcow2 FILE"
        raise refusal("missing-parent", f"{child} in {pool}", f"it is backed by {parent}.qcow2, and {error.message}", hint=hint) from error


def _refuse_another_parent(pool: Pool, child: StateId, header: Header) -> None:
    """Where the backing name of a file leads to another object of the pool, the state of that name of its own object is not its parent."""
    parent = sibling_of(header)
    if parent is None or (child.state != ROOT and header.backing_name == ROOT_NAME):
        return
    taken = layout.view(StateId(child.object, parent))
    what = f"{child} in {pool}"
    check_parent_place(header, what, root=pool.location.path, own=layout.view(child), parent=taken, links=pool.transport.capabilities.local)


def unmanaged_manifest(state: StateId, header: Header) -> Manifest:
    """:returns: what a header says of an image that nobody has hashed"""
    return Manifest(object=state.object, state=state.state, size=header.file_size, virtual_size=header.virtual_size, cluster_size=header.cluster_size)


# -- listings ----------------------------------------------------------------------------------------------------------------------------------------


def listing(pool: Pool, machine: str) -> Listing:
    """
    :returns: all states of a machine in one pool, with what is wrong with those that cannot be used, and a warning for what cannot be looked at
    :raises IntegrityError: its log cannot be used
    """
    return _listed(pool, Looked(pool, pool.folds([machine])), {})


def listings(pool: Pool) -> Listing:
    """
    As :func:`listing`, of all machines, in a number of round trips that does not grow with their number.

    :returns: the states, and a warning for each log that cannot be used
    """
    folds, damaged = pool.usable_folds(pool.machines())
    return _listed(pool, Looked(pool, folds), damaged)


def _listed(pool: Pool, looked: Looked, damaged: Mapping[str, IntegrityError]) -> Listing:
    where = (str(pool.location),)
    found: list[Listed] = []
    for machine, fold in looked.folds.items():
        found += [Listed(manifest, where) for manifest in fold.states.values()]
        found += [_listed_unmanaged(pool, unmanaged, fold, looked) for unmanaged in looked.unmanaged[machine]]
    left_out = [f"{machine} in {pool} is left out: {error}" for machine, error in damaged.items()]
    return Listing(found, [*left_out, *(f"files of other tools are left out: {error}" for error in looked.closed)])


def _listed_unmanaged(pool: Pool, unmanaged: Unmanaged, fold: Fold, looked: Looked) -> Listed:
    where = (str(pool.location),)
    state = unmanaged.id
    bare = Manifest(object=state.object, state=state.state, kind=state.kind, size=unmanaged.stat.size)
    if state.kind is not Kind.IMAGE:
        return Listed(bare, where, managed=False)

    def listed() -> Listed:
        if not (chain := unmanaged_chain(pool, state, fold, looked)):
            raise NotFound(f"{state} in {pool} was removed meanwhile", object=str(state), pool=str(pool), hint="look again")
        return Listed(with_parents(chain[:2])[0], where, managed=False)

    return _or_problem(listed, bare, where)


def _or_problem(make: Callable[[], Listed], bare: Manifest, where: tuple[str, ...]) -> Listed:
    try:
        return make()
    except StatePoolError as error:
        return Listed(bare, where, managed=False, problem=error.message)


UNKNOWN = Digest("blake3", "0" * 64)
"""Stands for the digest of a parent that nobody has hashed."""


def with_parents(chain: tuple[Member, ...]) -> tuple[Manifest, ...]:
    """:returns: the manifests of an offered chain, each naming its parent, tip first"""
    below = [*(member.manifest for member in chain[1:]), None]
    return tuple(
        evolve(member.manifest, parent=Parent(parent.state, parent.digest or UNKNOWN)) if parent is not None else member.manifest
        for member, parent in zip(chain, below, strict=True)
    )
