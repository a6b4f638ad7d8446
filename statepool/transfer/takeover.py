"""
The part of taking a working image over that a crash must not interrupt for good: while the image has two names and the backing name of a state.

Its marker says what was under way. Whoever comes after a crash goes on with it: forward if the bytes are those that were hashed, and back otherwise.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from statepool.beneath import Beneath, beside
from statepool.errors import AccessDenied, BadRecord, Conflict, InUse, StatePoolError
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.model.outcomes import Collected
from statepool.pools import layout
from statepool.pools.staging import Marker, Staging, is_let_go, read_markers
from statepool.qcow2 import opened
from statepool.qcow2.files import open_regular
from statepool.qcow2.header import apply_patches, backing_again, read_header_fd
from statepool.transfer.access import OURS_ALONE, Access, close_to_others, give_back_to, open_to_readers, restored
from statepool.transfer.cache import Cache
from statepool.transfer.frozen import is_below
from statepool.transfer.ready import clear_place, make_durable, require_good
from statepool.transfer.working import Fresh, prepare_working
from statepool.transports.copying import copy, hash_file

INTENT = "set"
"""What the marker calls itself in its facts."""

_unended: set[str] = set()
"""The markers of takeovers of this process that failed, and could not be ended: the next command tries again, as it does after a crash."""


@frozen
class Takeover:
    """
    What is under way.

    :param working: the image, absolute
    :param backing: the backing name it had, empty for none
    :param mode: the permissions it had
    :param replace: whether other content under the state's name gives way
    :param manifest: what it is to become
    :param owner: whose it was; -1 if nobody says so
    """

    working: Path
    backing: str
    mode: int
    replace: bool
    manifest: Manifest
    owner: int = -1

    @property
    def sibling(self) -> str:
        """The backing name it is to get, empty for none."""
        return self.manifest.parent.state + ".qcow2" if self.manifest.parent is not None else ""

    def to_facts(self) -> dict[str, str]:
        """:returns: the form in a marker"""
        return {
            "intent": INTENT,
            "working": str(self.working),
            "backing": self.backing,
            "mode": str(self.mode),
            "owner": str(self.owner),
            "replace": "yes" if self.replace else "no",
            "manifest": json.dumps(self.manifest.to_json()),
        }

    @property
    def access(self) -> Access:
        """Who may do what with the image, before it was closed: what the marker does not say, the file still does."""
        return restored(Access.of(self.working), self.owner, self.mode)

    @classmethod
    def from_facts(cls, facts: dict[str, str]) -> Takeover:
        """
        :raises BadRecord: the facts are not those of a takeover
        """
        try:
            return cls(
                working=Path(facts["working"]),
                backing=facts["backing"],
                mode=int(facts["mode"]),
                replace=facts["replace"] == "yes",
                manifest=Manifest.from_json(json.loads(facts["manifest"])),
                owner=int(facts.get("owner", "-1")),
            )
        except (KeyError, ValueError) as error:
            raise BadRecord(f"a marker of a set lacks or garbles {error}") from error


def finish(
    cache: Cache,
    staging: Staging,
    manifest: Manifest,
    working: Path | None,
    hashed: os.stat_result,
    *,
    replace: bool,
    access: Access | None = None,
    linked: int | None = None,
) -> None:
    """
    Publish bytes that are gathered and flushed, and put a fresh overlay in the place of the image they came from. Ends the staging, unless it fails
    with the image half changed: then whoever comes next ends it.

    All that takes room comes before the publication. After it the fresh overlay only has to be renamed, so that a full disk cannot leave the name
    of the working image to what is a state by then.

    :param working: the image, or None if there is none any more
    :param hashed: the status of the file that is gathered, by its descriptor, after it was hashed and changed for the last time
    :param access: who may do what with the image
    :param linked: a descriptor of the bytes, if they are the image itself, closed to others
    :raises Conflict: the name exists with other content
    :raises NoSpace: there is no room for the state's record, or for the overlay
    """
    pool = cache.pool
    digest = manifest.digest
    assert digest is not None
    # After a crash its name may lead to the very file we gathered: hashed already, and leased to ourselves, so that nobody can open it.
    reused = not _is_same(cache.file(layout.data(digest)), cache.file(staging.path(digest))) and clear_place(cache, manifest)
    chain = _chain_of(cache, manifest)
    if working is not None and not _is_published(cache, manifest):  # what a crash has left half done is ended in any case
        require_good(cache, chain[1:], working)
    fresh = prepare_working(cache, chain, working, standing_on=chain[1:], flush=True, access=access) if working is not None else None
    try:
        pool.publish([manifest], staging, replace=replace)
    except BaseException:
        # What comes after the record, such as the view, can fail too: by then it is a state.
        if not _is_published(cache, manifest):
            if fresh is not None:
                fresh.drop()
            raise
        _settle(fresh, staging, linked)
        raise
    _settle(fresh, staging, linked)
    if not reused:
        cache.sign(digest, hashed, flushed=True, source=None)
    make_durable(cache, chain)


def _settle(fresh: Fresh | None, staging: Staging, linked: int | None) -> None:
    if fresh is not None:
        fresh.settle(overwrite=True)
    if linked is not None:
        open_to_readers(linked)
    staging.end()


def _chain_of(cache: Cache, manifest: Manifest) -> tuple[Manifest, ...]:
    """:returns: the chain of a state that is not published yet, tip first"""
    if manifest.parent is None:
        return (manifest,)
    fold = cache.pool.fold(manifest.id.machine)
    parent = fold.find(manifest.object, manifest.parent)
    if parent is None:
        raise Conflict(
            f"{manifest.parent.state}, which {manifest.id} stands on, is no state of {manifest.object} in the cache any more",
            object=manifest.object,
            state=manifest.state,
            pool=str(cache.pool),
            hint=f"get {manifest.parent.state} again, and make the state from that",
        )
    return (manifest, *fold.chain(parent))


# -- after a crash -----------------------------------------------------------------------------------------------------------------------------------


def recover(cache: Cache) -> list[Collected]:
    """
    End what crashed processes of this host left half done: takeovers, unfinished transfers, working images half written.

    :returns: what was removed
    """
    if not cache.pool.is_managed:
        return []
    # First, while the records of use are there that say how half written working images are called: ending a takeover replaces them.
    cache.chains.recover()
    cache.clear_markers()
    dead = [marker for marker in read_markers(cache.pool.transport) if _has_ended(cache, marker) or marker.nonce in _unended]
    if not dead:
        return []
    with cache.pool.locks.hold("recover", cache.settings.lock_timeout):
        for marker in dead:
            _end(cache, marker.nonce)
    return cache.collector.clear_incoming()


def _has_ended(cache: Cache, marker: Marker) -> bool:
    """Whether the writer of a marker is no more. Others than processes of this host send bytes to a cache, but only these change working images."""
    if not marker.facts:
        return marker.writer.is_dead
    return marker.writer.has_ended_here or (marker.locked and not marker.writer.is_here and is_let_go(cache.pool.transport, marker, cache.pool.now()))


def _end(cache: Cache, nonce: str) -> None:
    """What a marker names is changed only if this account has written it: in a cache that a group shares, anybody can leave one."""
    from statepool.transfer import machine_takeover, overlays  # only here: after a crash, and they stand on this

    endings = {INTENT: _recover, machine_takeover.INTENT: machine_takeover.recover_machine, overlays.INTENT: overlays.recover_together}
    marker = cache.marker(nonce)
    ending = endings.get(marker.facts.get("intent", "")) if marker is not None else None
    if marker is not None and ending is not None and (_has_ended(cache, marker) or nonce in _unended):
        ending(cache, marker)


def _recover(cache: Cache, marker: Marker) -> None:
    under_way = Takeover.from_facts(marker.facts)
    gathered = cache.file(layout.incoming(marker.nonce, _digest(under_way.manifest)))
    if gathered.stat() is None:
        cache.staging(marker).end()  # it was not begun, or was over but for this
        return
    try:
        _go_on(cache, marker, under_way, gathered)
    except (InUse, AccessDenied, PermissionError):
        return  # somebody has it open although it is half a state, or it is not ours to change: the marker waits for who can end it


def _go_on(cache: Cache, marker: Marker, under_way: Takeover, gathered: Beneath) -> None:
    open_again(gathered)
    with (opened.unwritten if is_below(under_way.working) else opened.exclusive)(gathered) as descriptor:
        put_on_backing(descriptor, Path(gathered), under_way.sibling, under_way.backing)
        size = os.fstat(descriptor).st_size
        good = size == under_way.manifest.size and hash_file(descriptor, size) == under_way.manifest.digest
        closed = close_to_others(descriptor)
        os.fsync(descriptor)
        if good and closed:
            working = under_way.working if _is_same(under_way.working, gathered) else None
            try:
                access = under_way.access if working is not None else None
                staging, hashed = cache.staging(marker), os.fstat(descriptor)
                finish(cache, staging, under_way.manifest, working, hashed, replace=under_way.replace, access=access, linked=descriptor)
                return
            except StatePoolError:
                if _is_published(cache, under_way.manifest):
                    raise
        give_back(cache, marker, descriptor)


def give_back(cache: Cache, marker: Marker, descriptor: int) -> None:
    """
    Make a half taken image again what it was, and forget that it was to become a state. Nothing happens if it is a state by now: then only its
    overlay is missing, and the next command makes that.

    :param descriptor: of the image, open for reading and writing; nobody else has it open, nor can open it
    """
    under_way = Takeover.from_facts(marker.facts)
    keep_for_later(marker)
    if _is_published(cache, under_way.manifest):
        return
    restore(cache, marker, under_way, descriptor)
    cache.staging(marker).end()
    keep_for_later(marker, no_more=True)


def keep_for_later(marker: Marker, *, no_more: bool = False) -> None:
    """From now on the next command ends what a marker speaks of, as it does after a crash; or, at last, it need not."""
    if no_more:
        _unended.discard(marker.nonce)
    else:
        _unended.add(marker.nonce)


def restore(cache: Cache, marker: Marker, under_way: Takeover, descriptor: int) -> None:
    """
    Make an image again what it was.

    :param descriptor: of the image, open for reading and writing; nobody else can open it
    """
    gathered = cache.file(layout.incoming(marker.nonce, _digest(under_way.manifest)))
    if _is_same(under_way.working, gathered):
        if _is_named(cache, under_way, gathered) and not _unnamed(cache, marker, under_way, gathered):
            # These bytes have their name already, and somebody else needs them under it: they must stay as they are.
            _separate(cache, under_way, descriptor)
        else:
            _restore(under_way, descriptor, under_way.working)


def _is_named(cache: Cache, under_way: Takeover, gathered: Beneath) -> bool:
    return _is_same(cache.file(layout.data(_digest(under_way.manifest))), gathered)


def _unnamed(cache: Cache, marker: Marker, under_way: Takeover, gathered: Beneath) -> bool:
    """Take the name of the bytes away, if only we needed it. :returns: whether they do not have it any more"""
    cache.collector.collect([_digest(under_way.manifest)], besides=marker)
    return not _is_named(cache, under_way, gathered)


def _restore(under_way: Takeover, descriptor: int, path: Path) -> None:
    # First what a machine needs to run from it, and by the descriptor, whatever its mode is by now.
    put_on_backing(descriptor, path, under_way.backing, under_way.sibling)
    give_back_to(descriptor, under_way.owner, under_way.mode)
    os.fsync(descriptor)


def open_again(gathered: Beneath) -> None:
    """Let a file that was made read-only be opened for writing, as far as its mode is ours: who may write to it all the same needs no more."""
    with suppress(PermissionError), open_regular(gathered) as descriptor:
        os.fchmod(descriptor, 0o600)


def _separate(cache: Cache, under_way: Takeover, descriptor: int) -> None:
    working = beside(under_way.working)
    temporary = Beneath(working.tree, f".statepool-{cache.pool.nonce()}.tmp")
    try:
        with temporary.open(os.O_RDWR | os.O_CREAT | os.O_EXCL, OURS_ALONE) as target:
            copy(descriptor, target, under_way.manifest.size)
            put_on_backing(target, Path(temporary), under_way.backing, under_way.sibling)
            restored(Access.of(descriptor), under_way.owner, under_way.mode).give(target, under_way.working)
            os.fsync(target)
        working.tree.rename(temporary.path, working.path)
        open_to_readers(descriptor)
    finally:
        temporary.remove()


def put_on_backing(descriptor: int, path: Path, name: str, other: str) -> None:
    """Give an image one of the two backing names it can have, whatever mixture of them it has. Not by qemu-img, which could not open it now."""
    if name and other:
        apply_patches(descriptor, backing_again(read_header_fd(descriptor, str(path)), name, other))


def _is_same(one: Path | Beneath, other: Beneath) -> bool:
    first, second = (one if isinstance(one, Beneath) else beside(one)).stat(), other.stat()
    return first is not None and second is not None and os.path.samestat(first, second)


def _digest(manifest: Manifest) -> Digest:
    assert manifest.digest is not None
    return manifest.digest


def _is_published(cache: Cache, manifest: Manifest) -> bool:
    there = cache.pool.find(manifest.id)
    return there is not None and there.digest == manifest.digest and there.parent == manifest.parent
