"""
Fetch a state of an image or of a machine from a source into the cache: roots first, only what is
missing, and every byte is checked before it becomes visible.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import zip_longest
from pathlib import Path

from attrs import evolve, frozen

from statepool.beneath import Beneath, Descriptor
from statepool.cache.cache import Cache
from statepool.cache.check_cached import (
    Hashed,
    check_cached,
    clear_place,
    discard,
    hash_open,
    is_good,
    make_durable,
    open_bytes,
    open_whole,
)
from statepool.cache.linked import note_use
from statepool.cache.space import make_room, require_place
from statepool.copying.missing import (
    Delivery,
    Origin,
    PieceFetch,
    Run,
    is_torn,
    length_of,
    list_of,
    missing_runs,
)
from statepool.copying.resume import can_go_on, take_over
from statepool.copying.translated import is_on, stands_on, translated
from statepool.errors import (
    Conflict,
    IntegrityError,
    MissingFile,
    NoSpace,
    UnsafeImage,
)
from statepool.model.digest import DEFAULT_ALGORITHM, Digest
from statepool.model.manifest import MAX_EXTENTS, Kind, Manifest
from statepool.model.outcomes import Verified
from statepool.model.pieces import PIECE, Pieces
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.fold import member_ids, member_name
from statepool.pools.parts import chains_of
from statepool.pools.refusals import mismatched
from statepool.pools.staging import Staging
from statepool.qcow2.checks import Backing, check_image, needed_l1_size
from statepool.qcow2.clusters import check_clusters
from statepool.qcow2.header import Header, apply_patches, backing_patch
from statepool.qcow2.header import reader as read_from
from statepool.qcow2.tool import QemuImg
from statepool.sources.source import Member, RemoteChain
from statepool.sources.unmanaged import reader, require_proportion
from statepool.transports.base import Moved, Transfer
from statepool.transports.copying import data_extents, hash_file

LOOKED_AT_FIRST = 1 << 30
"""
Bytes of L2 tables that are read in a source at most before anything is fetched: the tables of a
disk of 8 TiB at the usual cluster size.
"""


SEVERAL = 64 << 20
"""
Bytes of data from which a file is fetched from several sources at once: fewer arrive within a
second or two from one.
"""


@frozen
class Fetched:
    """
    The result of a fetch: a state is in the cache.

    :param chain: its parts, as the cache knows them
    :param bytes: how many bytes were moved
    :param how: how they were moved
    :param verified: how the bytes were verified
    :param resumed: how many bytes an interrupted transfer had left here
    :param again: how many of the moved bytes had been moved before in vain
    :param warnings: what was wrong in the cache and has been repaired
    :param deliveries: what came from each source, if several were used at once
    """

    chain: tuple[Manifest, ...]
    bytes: int
    how: str
    verified: Verified
    resumed: int = 0
    again: int = 0
    warnings: tuple[str, ...] = ()
    deliveries: tuple[Delivery, ...] = ()


class Fetch:
    """
    A fetch of one offer into a cache.

    What backs the images of a machine is fetched as for a single image. The states of the images,
    the RAM, and the machine state that lists them become visible in one record: all or none.

    :param cache: the destination
    :param offer: what to fetch
    :param progress: told of the bytes
    :param others: offers of the same content by sources that are as good: large files are fetched
        from all of them at once
    :param once: for a source that is read only once, from beginning to end: reads the rest of it,
        and raises an error if the rest is not as expected. After that, all parts become visible in
        one record, and durable: no part could be fetched again, so none is evicted either.
    """

    def __init__(
        self,
        cache: Cache,
        offer: RemoteChain,
        progress: Progress = SILENT,
        *,
        others: Sequence[RemoteChain] = (),
        once: Callable[[], object] | None = None,
    ) -> None:
        self._cache = cache
        self._offer = offer
        self._others = others
        self._once = once
        self._source = offer.source
        self._chains = chains_of(offer.members, lambda member: member.manifest)
        tip = offer.members[0].manifest
        self._machine = tip if tip.kind is Kind.MACHINE else None
        self._together = (
            {member.manifest.id for member in offer.members}
            if once is not None
            else set(member_ids(tip))
        )
        self._held: list[Staging] = []
        self._progress = progress
        self._bytes = 0
        self._resumed = 0
        self._again = 0
        self._how: list[str] = []
        self._verified = Verified.TRUSTED
        self._warnings: list[str] = []
        self.deliveries: list[Delivery] = []

    def run(self) -> Fetched:
        """
        :returns: what is in the cache now, in the order of the offer
        :raises DigestMismatch: what arrived is not what the source's manifest promises
        :raises UnsafeImage: what arrived is not fit to be used
        :raises Conflict: the cache has a state of one of these names that no source has
        :raises NoSpace: the chain does not fit; nothing was moved
        """
        missing = self.missing()
        if not self._cache.pool.is_managed and self._source.transport.capabilities.local:
            self._look_first(missing)
        self._cache.prepare()
        # before anything is evicted for their sake
        for member in missing if self._once is None else ():
            require_proportion(self._source, member.manifest, member.path)
        make_room(
            self._cache,
            [member.manifest for member in missing],
            self._source.transport,
            keep=self._digests(),
        )
        before = self._named()
        self._progress.begin(self._title, sum(member.manifest.size for member in missing))
        try:
            parts = [manifest for chain in self._chains for manifest in self._bring_chain(chain)]
            if self._together:
                parts = self._publish_together(parts)
        finally:
            self._progress.end()
            for staging in self._held:  # the tips are visible, or never will be
                staging.end()
        if gone := before - {manifest.digest for manifest in parts if manifest.digest is not None}:
            self._cache.drop(gone)
        how, warnings = (
            "+".join(dict.fromkeys(self._how)) or "none",
            tuple(dict.fromkeys(self._warnings)),
        )
        return Fetched(
            tuple(parts),
            self._bytes,
            how,
            self._verified,
            self._resumed,
            self._again,
            warnings,
            tuple(self.deliveries),
        )

    def _publish_together(self, parts: list[Manifest]) -> list[Manifest]:
        """:returns: the parts, with the machine state if there is one"""
        together = [manifest for manifest in reversed(parts) if manifest.id in self._together]
        digests = {
            manifest.id: manifest.digest for manifest in together if manifest.digest is not None
        }
        if self._machine is not None:
            members = {member_name(member): digests[member] for member in member_ids(self._machine)}
            parts = [self._machine.derived(size=0, members=members), *parts]
            together.append(parts[0])
        staging = self._cache.pool.stage(digests.values())
        try:
            if self._once is not None:
                self._once()
                make_durable(
                    self._cache, [manifest for manifest in together if manifest.digest is not None]
                )
            self._cache.pool.publish(
                together, staging, supersede=True, durable=self._once is not None
            )
        finally:
            staging.end()
        return parts

    def _look_first(self, missing: Sequence[Member]) -> None:
        """
        Check the missing members in the source before a cache is made for them. What is certain to
        be refused is refused before anything is stored. All of it is checked again on arrival.
        """
        require_place(self._cache, [member.manifest for member in missing], self._source.transport)
        images = [chain for chain in self._chains if chain[0].manifest.kind is Kind.IMAGE]
        for member, below in (pair for chain in images for pair in zip_longest(chain, chain[1:])):
            promised, parent = member.manifest, below.manifest.state if below is not None else None
            read, size = reader(self._source, member.path)
            what = f"{promised.id} from {self._source}"
            try:
                header = check_image(read, size, what, parent=parent, backing=Backing.UNMANAGED)
                if (
                    not self._offer.managed
                    and needed_l1_size(header) * header.cluster_size <= LOOKED_AT_FIRST
                ):
                    check_clusters(read, header, what)
            except UnsafeImage as error:
                # the bytes are damaged, or were published like this
                if promised.digest is not None and error.check != "proportion":
                    actual = self._source.transport.digest(
                        member.path, Transfer(promised.size, promised.digest.algorithm)
                    )
                    self._check_digest(promised, actual)
                raise

    @property
    def _title(self) -> str:
        return f"get {self._offer.members[0].manifest.id}"

    def _digests(self) -> set[Digest]:
        return {
            member.manifest.digest
            for member in self._offer.members
            if member.manifest.digest is not None
        }

    def _named(self) -> set[Digest]:
        """:returns: the bytes to which the names of this chain lead now"""
        found = (self._cache.pool.find(member.manifest.id) for member in self._offer.members)
        return {
            manifest.digest
            for manifest in found
            if manifest is not None and manifest.digest is not None
        }

    def missing(self) -> list[Member]:
        """:returns: what would have to be moved, as far as can be told without reading it"""
        wanted = {member.path: member for chain in self._chains for member in chain}
        return [member for member in wanted.values() if self._cached(member.manifest) is None]

    def _cached(self, manifest: Manifest) -> Manifest | None:
        """
        :returns: the cache's manifest of the same bytes, or of the bytes to which they were
            rewritten
        """
        if manifest.digest is None:
            return None
        return self._cache.pool.fold(manifest.id.machine).find_content(manifest.id, manifest.digest)

    # -- one member --------------------------------------------------------------------------------

    def _bring_chain(self, members: Sequence[Member]) -> list[Manifest]:
        chain: list[Manifest] = []
        for member in reversed(members):
            chain.insert(0, self._bring(member, chain[0] if chain else None))
        return chain

    def _bring(self, member: Member, parent: Manifest | None) -> Manifest:
        with self._lock(member):
            cached = self._cached(member.manifest)
            if cached is not None and self._is_good(cached, member) and stands_on(cached, parent):
                self._publish(cached)
                return cached
            return self._fetch(member, parent)

    def _lock(self, member: Member) -> AbstractContextManager[None]:
        """
        Lock these bytes: one worker of this host moves them; the others wait and then find them
        here.
        """
        name = str(member.manifest.digest or f"{self._source}/{member.path}")
        return self._cache.pool.locks.hold(
            f"fetch-{Digest.of_text(name).hex[:32]}", self._cache.settings.lock_timeout
        )

    def _is_good(self, cached: Manifest, member: Member) -> bool:
        checked = check_cached(self._cache, [cached], self._progress)
        if checked.bad:
            same = cached.digest == member.manifest.digest
            keep = same and self._source.transport.capabilities.resumes
            self._warnings.append(discard(self._cache, cached, keep=keep))
            return False
        if checked.verified is Verified.REHASHED and self._verified is Verified.TRUSTED:
            self._verified = Verified.REHASHED
        return True

    def _publish(self, manifest: Manifest) -> None:
        """Make sure that the name leads to these bytes, which are in the cache."""
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
        """
        Make a state visible whose bytes are in the cache. If it is to become visible together with
        others, only protect its bytes until then.
        """
        if manifest.id in self._together:
            assert manifest.digest is not None
            self._held.append(self._cache.pool.stage([manifest.digest]))
            staging.settle([manifest.digest])
            return
        self._cache.pool.publish([manifest], staging, supersede=True, durable=False)

    def _refuse_to_lose(self, manifest: Manifest) -> None:
        old = self._cache.pool.find(manifest.id)
        if old is None or old.digest is None or self._cache.trust.source(old.digest) is not None:
            return
        if manifest.digest is not None and old.is_content(manifest.digest):
            return
        raise Conflict(
            f"{manifest.id} in the cache {self._cache.root} was set there and is in no source,"
            f" while {self._source} has another of this name",
            object=manifest.object,
            state=manifest.state,
            pool=str(self._source),
            hint=(
                "store it under another name, or give it up with: statepool unset"
                f" {manifest.object} {manifest.state}"
            ),
        )

    def _fetch(self, member: Member, parent: Manifest | None) -> Manifest:
        self._refuse_to_lose(member.manifest)
        if (known := self._reuse(member, parent)) is not None:
            return known
        if (
            self._source.transport.capabilities.refers
            and (linked := self._refer(member, parent)) is not None
        ):
            return linked
        # The bytes have no digest yet if another tool put them there. If they will be rewritten,
        # their digest will differ from the source's. So the name under which they are gathered
        # belongs only to this writer.
        gathering, pieces = self._cache.pool.stage(self._digests_of(member)), Pieces()
        try:
            path = self._place_of(member, gathering)
            manifest, moved, status = self._gather(member, parent, self._cache.file(path), pieces)
            assert manifest.digest is not None
            staging = (
                self._cache.pool.stage([manifest.digest])
                if manifest.digest != member.manifest.digest
                else gathering
            )
            staging.list_pieces(manifest.digest, manifest.size, pieces, flush=False)
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
        Use bytes that are in the cache because of another state, or that an unfinished transfer
        left.

        :returns: the cache's manifest of them now, or None if they are not here, or have to be
            rewritten
        """
        promised = member.manifest
        if promised.digest is None or not clear_place(self._cache, promised):
            return None
        with open_bytes(self._cache, promised) as descriptor:
            # by now it may be another file than the one that was looked at
            if not is_good(self._cache, promised, descriptor, self._progress):
                self._warnings.append(discard(self._cache, promised))
                return None
            header = self._check(descriptor, promised, parent)
            size = os.fstat(descriptor).st_size
            extents = data_extents(descriptor, size, limit=MAX_EXTENTS)
        if not is_on(header, parent):
            return None
        manifest = translated(
            promised, header, parent, promised.digest, promised.digest, size, extents
        )
        self._publish(manifest)
        if self._once is None:
            self._cache.trust.note_source(promised.digest, str(self._source))
        return manifest

    def _check(self, descriptor: int, promised: Manifest, parent: Manifest | None) -> Header | None:
        """:returns: the header of an image; RAM has none"""
        if promised.kind is not Kind.IMAGE:
            return None
        read, what = read_from(descriptor), f"{promised.id} from {self._source}"
        header = check_image(
            read,
            os.fstat(descriptor).st_size,
            what,
            parent=parent.state if parent else None,
            backing=Backing.UNMANAGED,
        )
        # The writer of a managed state has checked its compressed clusters. A file of another tool
        # is unchecked.
        check_clusters(read, header, what, descriptor=descriptor, starts=not self._offer.managed)
        return header

    def _digests_of(self, member: Member) -> list[Digest]:
        return [member.manifest.digest] if member.manifest.digest is not None else []

    def _arrived(self, manifest: Manifest, moved: Moved, status: os.stat_result | None) -> None:
        assert manifest.digest is not None
        self._cache.sign(
            manifest.digest,
            status,
            flushed=False,
            source=str(self._source) if self._once is None else None,
        )
        self._bytes += moved.sent
        self._again += moved.again
        self._how.append(moved.how)
        self._verified = Verified.ARRIVED if self._offer.managed else Verified.UNMANAGED

    def _gather(
        self, member: Member, parent: Manifest | None, path: Beneath, pieces: Pieces
    ) -> tuple[Manifest, Moved, os.stat_result]:
        """
        Move the bytes of a member into a file of our own, and check them there.

        :param pieces: gets the digests of its pieces
        :returns: the manifest for the cache, how the bytes were moved, and the status of the file
        """
        promised = member.manifest
        with self._copy(member, path, pieces) as (descriptor, moved):
            header = self._check(descriptor, promised, parent)
            digest = self._relocate(descriptor, path, header, parent, moved.digest, pieces)
            os.fchmod(descriptor, layout.READ_ONLY)
            status = os.fstat(descriptor)
            extents = data_extents(descriptor, status.st_size, limit=MAX_EXTENTS)
        return (
            translated(promised, header, parent, digest, moved.digest, status.st_size, extents),
            moved,
            status,
        )

    @contextmanager
    def _copy(self, member: Member, path: Beneath, pieces: Pieces) -> Iterator[tuple[int, Moved]]:
        """
        Move the bytes of a member here, or only the rest if an interrupted transfer left a part of
        them.

        :returns: the descriptor of our copy, which has the promised digest
        """
        promised = member.manifest
        require_proportion(self._source, promised, member.path)
        moved: Moved | None = None
        with path.open(os.O_RDWR | os.O_CREAT) as file:
            done, origins = os.fstat(file).st_size, self._origins(member)
            wanted = (
                list_of(origins, promised.digest, promised.size)
                if promised.digest is not None and (done or len(origins) > 1)
                else None
            )
            try:
                if wanted is not None:
                    missing = missing_runs(file, promised.size, wanted)
                    if len(origins) > 1 or is_torn(missing, promised.size):
                        moved = self._move_pieces(member, file, origins, wanted, missing, pieces)
                        self._resumed += (
                            promised.size - length_of(missing, promised.size) if done else 0
                        )
                        yield file, moved
                        return
                    done = min(missing[0][0] * PIECE if missing else done, promised.size)
                    os.ftruncate(file, done)
                    pieces.become(bytes(wanted))
                    pieces.cut(done // PIECE)
                moved = self._move(member, file, done, pieces)
                if done and moved.digest != promised.digest:
                    # The part that was left was wrong: another process wrote to it, or a power cut
                    # took some of it.
                    os.ftruncate(file, 0)
                    wasted, moved = moved, self._move(member, file, 0, pieces)
                    moved = evolve(
                        moved, sent=moved.sent + wasted.sent, again=moved.again + wasted.sent
                    )
                    done = 0
                self._check_digest(promised, moved.digest)
                self._resumed += done
                yield file, moved
            except BaseException as error:
                is_bad = isinstance(error, IntegrityError) and (wanted is None or moved is not None)
                if is_bad or isinstance(error, NoSpace) or not os.fstat(file).st_size:
                    path.remove()  # no transfer should resume from this
                raise

    def _move(self, member: Member, descriptor: int, done: int, pieces: Pieces) -> Moved:
        promised = member.manifest
        algorithm = promised.digest.algorithm if promised.digest is not None else DEFAULT_ALGORITHM
        transfer = Transfer(
            promised.size, algorithm, promised.extents, self._progress, done, pieces
        )
        return self._source.transport.fetch(member.path, descriptor, transfer)

    def _origins(self, member: Member) -> list[Origin]:
        """:returns: the sources from which the bytes of a member are to be fetched"""
        origins, promised = [Origin(self._source, member.path)], member.manifest
        digest = promised.digest
        if (
            self._others
            and promised.data_size >= SEVERAL
            and digest is not None
            and layout.has_pieces(digest, promised.size)
        ):
            for other in self._others:
                path = next(
                    (one.path for one in other.members if one.manifest.digest == digest),
                    None,
                )
                if path is not None:
                    origins.append(Origin(other.source, path))
        return origins

    def _move_pieces(
        self,
        member: Member,
        descriptor: int,
        origins: Sequence[Origin],
        wanted: Pieces,
        missing: Sequence[Run],
        pieces: Pieces,
    ) -> Moved:
        promised = member.manifest
        assert promised.digest is not None
        transfer = Transfer(
            promised.size, promised.digest.algorithm, promised.extents, self._progress, 0, pieces
        )
        fetch = PieceFetch(origins, descriptor, transfer, wanted, missing)
        try:
            return fetch.run()
        finally:
            if len(origins) > 1:
                self.deliveries += fetch.deliveries

    def _place_of(self, member: Member, gathering: Staging) -> str:
        """:returns: where to gather the bytes; a part of them may be there already"""
        digest, nonce = member.manifest.digest, gathering.marker.nonce
        if digest is None or not self._source.transport.capabilities.resumes:
            return layout.gathered(nonce)
        path = layout.part(nonce, digest)
        if take_over(self._cache.pool, digest, nonce) and not can_go_on(
            self._cache.file(path), member.manifest.size
        ):
            self._cache.pool.transport.remove(path)
        return path

    def _check_digest(self, promised: Manifest, actual: Digest) -> None:
        if promised.digest is not None and promised.digest != actual:
            raise mismatched(
                promised,
                actual,
                f"from {self._source}",
                pool=str(self._source),
                hint=(
                    f"look at the pool with: statepool --source {self._source} verify"
                    f" {promised.object} {promised.state}"
                ),
            )

    def _relocate(
        self,
        descriptor: int,
        path: Beneath,
        header: Header | None,
        parent: Manifest | None,
        digest: Digest,
        pieces: Pieces,
    ) -> Digest:
        """
        Make the backing name a plain sibling name.

        :returns: the digest of the resulting bytes
        """
        if header is None or parent is None or is_on(header, parent):
            return digest
        patches = backing_patch(read_from(descriptor), header, parent.file_name)
        if patches is None:
            QemuImg(self._cache.settings.tool_timeout).rebase_unsafe(Path(path), parent.file_name)
        else:
            apply_patches(descriptor, patches)
        return hash_file(
            descriptor, os.fstat(descriptor).st_size, algorithm=digest.algorithm, pieces=pieces
        )

    # -- link pools --------------------------------------------------------------------------------

    def _refer(self, member: Member, parent: Manifest | None) -> Manifest | None:
        """
        Link to a file of the source instead of copying it.

        :returns: the cache's manifest of it, or None if the file has to be rewritten, and so copied
        """
        promised = member.manifest
        target = self._source.transport.local_path(member.path)
        if target is None or target.is_symlink():
            return None
        with self._opened_there(member) as descriptor:
            header = self._check(descriptor, promised, parent)
            if not is_on(header, parent):
                return None
            hashed = self._hash_there(promised, descriptor)
            size = os.fstat(descriptor).st_size
        # The positions of its data are not noted: the file is not ours, and its owner can fill its
        # holes.
        manifest = translated(promised, header, parent, hashed.digest, hashed.digest, size)
        self._place_link(manifest, hashed, target)
        self._arrived(manifest, Moved(digest=hashed.digest, how="link", sent=0), hashed.status)
        return manifest

    def _opened_there(self, member: Member) -> Descriptor:
        file = self._source.transport.beneath(member.path)
        assert file is not None, "a pool that is referred to is on this host"
        return open_whole(file, member.manifest, self._source)

    def _hash_there(self, promised: Manifest, descriptor: int) -> Hashed:
        algorithm = promised.digest.algorithm if promised.digest is not None else DEFAULT_ALGORITHM
        hashed = hash_open(
            descriptor, algorithm=algorithm, title=self._title, progress=self._progress
        )
        self._check_digest(promised, hashed.digest)
        return hashed

    def _place_link(self, manifest: Manifest, hashed: Hashed, target: Path) -> None:
        digest = hashed.digest
        note_use(self._source.transport, digest, self._cache.root)
        staging = self._cache.pool.stage([digest])
        staging.list_pieces(digest, manifest.size, hashed.pieces, flush=False)
        try:
            self._cache.pool.transport.symlink(str(target), staging.path(digest))
            self._show(manifest, staging)
        finally:
            staging.end()
        # A collector that saw the use but not yet the link may have removed the use. A collector of
        # the bytes looks for uses after it has moved the bytes aside: so either it sees this use,
        # or we see that the bytes are missing.
        note_use(self._source.transport, digest, self._cache.root)
        if not target.exists() and not (self._offer.managed and self._source.has_bytes(digest)):
            raise MissingFile(
                f"the bytes of {manifest.id} in {self._source} were removed while they were linked",
                object=manifest.object,
                state=manifest.state,
                pool=str(self._source),
                path=str(target),
                hint="get it once more: another source may have it",
            )
