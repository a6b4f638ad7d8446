"""
Bringing a chain from a source into the cache: root first, only what is missing, every byte checked before it becomes visible.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import zip_longest
from pathlib import Path

from attrs import evolve, frozen

from statepool.beneath import Beneath, Descriptor
from statepool.errors import Conflict, DigestMismatch, IntegrityError, MissingFile, NoSpace, UnsafeImage
from statepool.model.digest import DEFAULT_ALGORITHM, Digest
from statepool.model.manifest import MAX_EXTENTS, Manifest, Parent
from statepool.model.outcomes import Verified
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.staging import Staging
from statepool.qcow2.checks import Backing, check_image, needed_l1_size
from statepool.qcow2.clusters import check_clusters
from statepool.qcow2.files import open_regular
from statepool.qcow2.header import Header, apply_patches, backing_patch
from statepool.qcow2.header import reader as read_from
from statepool.qcow2.tool import QemuImg
from statepool.transfer.cache import Cache
from statepool.transfer.linked import note_use
from statepool.transfer.offers import Member, Offer, reader, require_proportion
from statepool.transfer.ready import Hashed, clear_place, discard, examine, hash_open, is_good, open_bytes, open_whole
from statepool.transfer.resume import take_over
from statepool.transfer.space import make_room, require_place
from statepool.transports.base import Moved
from statepool.transports.copying import data_extents, hash_file
from statepool.transports.reading import Extent

READ_ONLY = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
"""Permissions of the bytes of a state: they never change."""


LOOKED_AT_FIRST = 1 << 30
"""Bytes of L2 tables that are read in a source at most, before anything is fetched: those of a disk of 8 TiB at the usual cluster size."""


@frozen
class Fetched:
    """
    A chain is in the cache.

    :param chain: as the cache knows it, tip first
    :param bytes: how many had to be moved
    :param how: how they were moved
    :param verified: what stands behind them
    :param resumed: how many an interrupted transfer had left here
    :param again: how many of those that were moved had been moved before, in vain
    :param warnings: what was wrong in the cache, and is not any more
    """

    chain: tuple[Manifest, ...]
    bytes: int
    how: str
    verified: Verified
    resumed: int = 0
    again: int = 0
    warnings: tuple[str, ...] = ()


class Fetch:
    """
    Brings one offered chain into a cache.

    :param cache: where to
    :param offer: what
    :param progress: told of the bytes
    """

    def __init__(self, cache: Cache, offer: Offer, progress: Progress = SILENT) -> None:
        self._cache = cache
        self._offer = offer
        self._source = offer.source.pool
        self._progress = progress
        self._bytes = 0
        self._resumed = 0
        self._again = 0
        self._how: list[str] = []
        self._verified = Verified.TRUSTED
        self._warnings: list[str] = []

    def run(self) -> Fetched:
        """
        :raises DigestMismatch: what arrived is not what the source's manifest promises
        :raises UnsafeImage: what arrived is not fit to be used
        :raises Conflict: the cache has a state of this name that nobody else has
        :raises NoSpace: it does not fit; nothing was moved
        """
        missing = self.missing()
        if not self._cache.pool.is_managed and self._source.transport.capabilities.local:
            self._look_first(missing)
        self._cache.prepare()
        for member in missing:  # before anything is evicted for their sake
            require_proportion(self._source, member.manifest, member.path)
        make_room(self._cache, [member.manifest for member in missing], self._source.transport, keep=self._digests())
        before = self._named()
        self._progress.begin(self._title, sum(member.manifest.size for member in missing))
        try:
            chain: list[Manifest] = []
            for member in reversed(self._offer.members):
                chain.append(self._bring(member, chain[-1] if chain else None))
        finally:
            self._progress.end()
        if gone := before - {manifest.digest for manifest in chain if manifest.digest is not None}:
            self._cache.drop(gone)
        how = "+".join(dict.fromkeys(self._how)) or "none"
        return Fetched(tuple(reversed(chain)), self._bytes, how, self._verified, self._resumed, self._again, tuple(self._warnings))

    def _look_first(self, missing: Sequence[Member]) -> None:
        """Before a cache is made for them: what is certain to be refused is refused while nothing is there. All of it is checked again on arrival."""
        require_place(self._cache, [member.manifest for member in missing], self._source.transport)
        for member, below in zip_longest(self._offer.members, self._offer.members[1:]):
            promised, parent = member.manifest, below.manifest.state if below is not None else None
            read, size = reader(self._source, member.path)
            what = f"{promised.id} from {self._source}"
            try:
                header = check_image(read, size, what, parent=parent, backing=Backing.UNMANAGED)
                if not self._offer.managed and needed_l1_size(header) * header.cluster_size <= LOOKED_AT_FIRST:
                    check_clusters(read, header, what)
            except UnsafeImage as error:
                if promised.digest is not None and error.check != "proportion":  # damaged, or published like this
                    actual = self._source.transport.digest(member.path, promised.size, algorithm=promised.digest.algorithm)
                    self._check_digest(promised, actual)
                raise

    @property
    def _title(self) -> str:
        return f"get {self._offer.members[0].manifest.id}"

    def _digests(self) -> set[Digest]:
        return {member.manifest.digest for member in self._offer.members if member.manifest.digest is not None}

    def _named(self) -> set[Digest]:
        """:returns: the bytes that the names of this chain lead to now"""
        found = (self._cache.pool.find(member.manifest.id) for member in self._offer.members)
        return {manifest.digest for manifest in found if manifest is not None and manifest.digest is not None}

    def missing(self) -> list[Member]:
        """:returns: what would have to be moved, as far as can be told without reading it"""
        return [member for member in self._offer.members if self._cached(member.manifest) is None]

    def _cached(self, manifest: Manifest) -> Manifest | None:
        """:returns: what the cache knows of the same bytes, or of those they were rewritten to"""
        if manifest.digest is None:
            return None
        return self._cache.pool.fold(manifest.id.machine).find_content(manifest.id, manifest.digest)

    # -- one member --------------------------------------------------------------------------------------------------------------------------------

    def _bring(self, member: Member, parent: Manifest | None) -> Manifest:
        with self._lock(member):
            cached = self._cached(member.manifest)
            if cached is not None and self._is_good(cached) and _stands_on(cached, parent):
                self._publish(cached)
                return cached
            return self._fetch(member, parent)

    def _lock(self, member: Member) -> AbstractContextManager[None]:
        """One worker of this host moves these bytes; the others wait, and then find them here."""
        name = str(member.manifest.digest or f"{self._source}/{member.path}")
        return self._cache.pool.locks.hold(f"fetch-{Digest.of(name.encode()).hex[:32]}", self._cache.settings.lock_timeout)

    def _is_good(self, cached: Manifest) -> bool:
        readiness = examine(self._cache, [cached], self._progress)
        if readiness.bad:
            self._warnings.append(discard(self._cache, cached))
            return False
        if readiness.verified is Verified.REHASHED and self._verified is Verified.TRUSTED:
            self._verified = Verified.REHASHED
        return True

    def _publish(self, manifest: Manifest) -> None:
        """Make sure that the name leads to these bytes, which are here."""
        fold = self._cache.pool.fold(manifest.id.machine)
        if fold.states.get(manifest.id) == manifest:
            return
        assert manifest.digest is not None
        self._refuse_to_lose(manifest)
        staging = self._cache.pool.stage([manifest.digest])
        try:
            self._show(manifest, staging)
        finally:
            staging.end()

    def _show(self, manifest: Manifest, staging: Staging) -> None:
        """Make a state visible whose bytes are here."""
        self._cache.pool.publish([manifest], staging, supersede=True, durable=False)

    def _refuse_to_lose(self, manifest: Manifest) -> None:
        old = self._cache.pool.find(manifest.id)
        if old is None or old.digest is None or self._cache.trust.source(old.digest) is not None:
            return
        if manifest.digest is not None and old.is_content(manifest.digest):
            return
        raise Conflict(
            f"{manifest.id} in the cache {self._cache.root} was set there and is in no source, while {self._source} has another of this name",
            object=manifest.object,
            state=manifest.state,
            pool=str(self._source),
            hint=f"store it under another name, or give it up with: statepool unset {manifest.object} {manifest.state}",
        )

    def _fetch(self, member: Member, parent: Manifest | None) -> Manifest:
        self._refuse_to_lose(member.manifest)
        if (known := self._reuse(member, parent)) is not None:
            return known
        if self._source.transport.capabilities.refers and (linked := self._refer(member, parent)) is not None:
            return linked
        # The bytes have no digest yet if another tool put them there, or another one than the source's if they will be rewritten: so the name that
        # they are gathered under is only that of the writer.
        gathering = self._cache.pool.stage(self._digests_of(member))
        try:
            path = self._place_of(member, gathering)
            manifest, moved, status = self._gather(member, parent, self._cache.file(path))
            assert manifest.digest is not None
            staging = self._cache.pool.stage([manifest.digest]) if manifest.digest != member.manifest.digest else gathering
            try:
                self._cache.pool.transport.rename(path, staging.path(manifest.digest))
                self._show(manifest, staging)
            finally:
                if staging is not gathering:
                    staging.end()
        finally:
            self._cache.pool.transport.remove(layout.gathered(gathering.marker.nonce))
            gathering.end()
        self._arrived(manifest, moved, status)
        return manifest

    def _reuse(self, member: Member, parent: Manifest | None) -> Manifest | None:
        """
        Use bytes that are here for the sake of another state, or were left by a transfer that did not end.

        :returns: what the cache knows of them now, or None if they are not here, or have to be rewritten
        """
        promised = member.manifest
        if promised.digest is None or not clear_place(self._cache, promised):
            return None
        with open_bytes(self._cache, promised) as descriptor:
            if not is_good(self._cache, promised, descriptor, self._progress):  # another file by now than was looked at
                return None
            header = self._check(descriptor, promised, parent)
            size = os.fstat(descriptor).st_size
            extents = data_extents(descriptor, size, limit=MAX_EXTENTS)
        if parent is not None and header.backing_name != parent.file_name.encode():
            return None
        manifest = _translated(promised, header, parent, promised.digest, promised.digest, size, extents)
        self._publish(manifest)
        self._cache.trust.note_source(promised.digest, str(self._source))
        return manifest

    def _check(self, descriptor: int, promised: Manifest, parent: Manifest | None) -> Header:
        read, what = read_from(descriptor), f"{promised.id} from {self._source}"
        header = check_image(read, os.fstat(descriptor).st_size, what, parent=parent.state if parent else None, backing=Backing.UNMANAGED)
        # Who set a managed state has looked at its compressed clusters; what other tools put there nobody has looked at.
        check_clusters(read, header, what, descriptor=descriptor, starts=not self._offer.managed)
        return header

    def _digests_of(self, member: Member) -> list[Digest]:
        return [member.manifest.digest] if member.manifest.digest is not None else []

    def _arrived(self, manifest: Manifest, moved: Moved, status: os.stat_result | None) -> None:
        assert manifest.digest is not None
        self._cache.sign(manifest.digest, status, flushed=False, source=str(self._source))
        self._bytes += moved.sent
        self._again += moved.again
        self._how.append(moved.how)
        self._verified = Verified.ARRIVED if self._offer.managed else Verified.UNMANAGED

    def _gather(self, member: Member, parent: Manifest | None, path: Beneath) -> tuple[Manifest, Moved, os.stat_result]:
        """Move the bytes of a member into a file of our own, and check them there. :returns: what the cache will know of it, and of the file"""
        promised = member.manifest
        with self._copy(member, path) as (descriptor, moved):
            header = self._check(descriptor, promised, parent)
            digest = self._relocate(descriptor, path, header, parent, moved.digest)
            os.fchmod(descriptor, READ_ONLY)
            status = os.fstat(descriptor)
            extents = data_extents(descriptor, status.st_size, limit=MAX_EXTENTS)
        return _translated(promised, header, parent, digest, moved.digest, status.st_size, extents), moved, status

    @contextmanager
    def _copy(self, member: Member, path: Beneath) -> Iterator[tuple[int, Moved]]:
        """
        Move the bytes of a member here, or what an interrupted transfer has left of them to be moved.

        :returns: the descriptor of our copy, which has the digest that was promised
        """
        promised = member.manifest
        require_proportion(self._source, promised, member.path)
        with path.open(os.O_RDWR | os.O_CREAT) as file:
            done = os.fstat(file).st_size
            try:
                moved = self._move(member, file, done)
                if done and moved.digest != promised.digest:
                    # What was there is not what it should have been: somebody wrote to it, or a power cut took a part of it.
                    os.ftruncate(file, 0)
                    wasted, moved = moved, self._move(member, file, 0)
                    moved = evolve(moved, sent=moved.sent + wasted.sent, again=moved.again + wasted.sent)
                    done = 0
                self._check_digest(promised, moved.digest)
                self._resumed += done
                yield file, moved
            except BaseException as error:
                if isinstance(error, IntegrityError | NoSpace) or not os.fstat(file).st_size:
                    path.remove()  # nobody should go on with this
                raise

    def _move(self, member: Member, descriptor: int, done: int) -> Moved:
        promised = member.manifest
        return self._source.transport.fetch(
            member.path,
            descriptor,
            promised.size,
            algorithm=promised.digest.algorithm if promised.digest is not None else DEFAULT_ALGORITHM,
            extents=promised.extents,
            progress=self._progress,
            done=done,
        )

    def _place_of(self, member: Member, gathering: Staging) -> str:
        """:returns: where to gather the bytes; there may be some of them already"""
        digest, nonce = member.manifest.digest, gathering.marker.nonce
        if digest is None or not self._source.transport.capabilities.resumes:
            return layout.gathered(nonce)
        path = layout.part(nonce, digest)
        if take_over(self._cache.pool, digest, nonce) and not _can_go_on(self._cache.file(path), member.manifest.size):
            self._cache.pool.transport.remove(path)
        return path

    def _check_digest(self, promised: Manifest, actual: Digest) -> None:
        if promised.digest is not None and promised.digest != actual:
            raise DigestMismatch(
                f"the bytes of {promised.id} from {self._source} are {actual}, not {promised.digest}",
                expected=str(promised.digest),
                actual=str(actual),
                object=promised.object,
                state=promised.state,
                pool=str(self._source),
                hint=f"look at the pool with: statepool --source {self._source.location} verify {promised.object} {promised.state}",
            )

    def _relocate(self, descriptor: int, path: Beneath, header: Header, parent: Manifest | None, digest: Digest) -> Digest:
        """Make the backing name a plain sibling name. :returns: the digest of the bytes then"""
        if parent is None or header.backing_name == parent.file_name.encode():
            return digest
        patches = backing_patch(read_from(descriptor), header, parent.file_name)
        if patches is None:
            QemuImg(self._cache.settings.tool_timeout).rebase_unsafe(Path(path), parent.file_name)
        else:
            apply_patches(descriptor, patches)
        return hash_file(descriptor, os.fstat(descriptor).st_size, algorithm=digest.algorithm)

    # -- link pools --------------------------------------------------------------------------------------------------------------------------------

    def _refer(self, member: Member, parent: Manifest | None) -> Manifest | None:
        """
        Refer to a file of the source instead of copying it.

        :returns: what the cache knows of it, or None if the file has to be rewritten, and so copied
        """
        promised = member.manifest
        target = self._source.transport.local_path(member.path)
        if target is None or target.is_symlink():
            return None
        with self._opened_there(member) as descriptor:
            header = self._check(descriptor, promised, parent)
            if parent is not None and header.backing_name != parent.file_name.encode():
                return None
            hashed = self._hash_there(promised, descriptor)
            size = os.fstat(descriptor).st_size
        # Where it has data is not noted: it is not ours, and its owner can fill its holes.
        manifest = _translated(promised, header, parent, hashed.digest, hashed.digest, size)
        self._place_link(manifest, hashed.digest, target)
        self._arrived(manifest, Moved(digest=hashed.digest, how="link", sent=0), hashed.status)
        return manifest

    def _opened_there(self, member: Member) -> Descriptor:
        file = self._source.transport.beneath(member.path)
        assert file is not None, "a pool that is referred to is on this host"
        return open_whole(file, member.manifest, self._source)

    def _hash_there(self, promised: Manifest, descriptor: int) -> Hashed:
        algorithm = promised.digest.algorithm if promised.digest is not None else DEFAULT_ALGORITHM
        hashed = hash_open(descriptor, algorithm=algorithm, title=self._title, progress=self._progress)
        self._check_digest(promised, hashed.digest)
        return hashed

    def _place_link(self, manifest: Manifest, digest: Digest, target: Path) -> None:
        note_use(self._source, digest, self._cache.root)
        staging = self._cache.pool.stage([digest])
        try:
            self._cache.pool.transport.symlink(str(target), staging.path(digest))
            self._show(manifest, staging)
        finally:
            staging.end()
        # Somebody who saw the use and no link yet can have taken it away. Whoever collects the bytes looks for uses after they are moved aside: so
        # either this one is seen, or we see that they are gone.
        note_use(self._source, digest, self._cache.root)
        if not target.exists() and not (self._offer.managed and self._source.has_bytes(digest)):
            raise MissingFile(
                f"the bytes of {manifest.id} in {self._source} were removed while they were linked",
                object=manifest.object,
                state=manifest.state,
                pool=str(self._source),
                path=str(target),
                hint="get it once more: another source may have it",
            )


def _can_go_on(path: Beneath, size: int) -> bool:
    """Whether a file is the beginning of what is wanted, as far as its length tells, and is this account's own."""
    with open_regular(path) as file:
        found = os.fstat(file)
        if found.st_uid != os.geteuid():
            return False
        os.fchmod(file, 0o600)
        return found.st_size <= size


def _stands_on(cached: Manifest, parent: Manifest | None) -> bool:
    """Whether a cached state names the parent that the cache has; the same bytes can have been rewritten over another copy of their parent."""
    if cached.parent is None or parent is None:
        return cached.parent is None and parent is None
    return cached.parent.state == parent.state and cached.parent.digest == parent.digest


def _translated(
    promised: Manifest, header: Header, parent: Manifest | None, digest: Digest, origin: Digest, size: int, extents: tuple[Extent, ...] = ()
) -> Manifest:
    """
    Return a source's manifest in the terms of the cache.

    :param origin: the digest of the bytes that were fetched, which were rewritten here if it is another one than ``digest``
    :param extents: of our own copy; none of a file that is only referred to
    """
    assert parent is None or parent.digest is not None
    return promised.derived(
        size=size,
        digest=digest,
        origin=origin if digest != origin else None,
        parent=Parent(parent.state, parent.digest) if parent is not None and parent.digest is not None else None,
        virtual_size=header.virtual_size,
        cluster_size=header.cluster_size,
        extents=extents,
    )
