"""
The part of a capture that has to be finished or undone after a crash: while working images have two
names, and the backing names of states.

The marker of the capture is the journal: it describes the capture of one image, or of all parts of
a machine. Everything is published in one record. Before that record, the next command after a crash
goes forward if all bytes are those that were hashed, and back otherwise. After the record it only
goes forward.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from statepool.beneath import Beneath, beside, same_file
from statepool.cache import get_journal
from statepool.cache.access import (
    OURS_ALONE,
    Access,
    close_to_others,
    give_back_to,
    open_to_readers,
    restored,
)
from statepool.cache.cache import Cache
from statepool.cache.check_cached import check_cached, clear_place, make_durable, require_good
from statepool.cache.working import Fresh, prepare_working
from statepool.capture.frozen import is_below
from statepool.errors import (
    AccessDenied,
    BadRecord,
    Conflict,
    InUse,
    MissingFile,
    NoSpace,
    StatePoolError,
)
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest
from statepool.model.outcomes import Collected
from statepool.pools import layout
from statepool.pools.staging import Marker, Staging, is_let_go, read_markers
from statepool.qcow2 import opened
from statepool.qcow2.files import open_regular
from statepool.qcow2.header import apply_patches, backing_again, read_header_fd
from statepool.transports.base import Transfer
from statepool.transports.copying import copy, hash_file
from statepool.transports.failures import Subject, translate_os_errors

INTENT = "capture"
"""The name of the journal in the facts of the marker."""

OLD_INTENTS = ("set", "set-machine")
"""The names of older versions for the journal of one image, and for that of a machine."""

_UNKNOWN = Access(-1, -1, OURS_ALONE)

_unended: set[str] = set()
"""
The markers of this process's captures that failed and could not be ended: the next command retries,
as after a crash.
"""


@frozen
class Part:
    """
    One image, or the RAM of a machine.

    :param source: its file, absolute; None if the file is left alone
    :param manifest: the manifest of the state that it will become
    :param linked: True if its bytes are linked into the cache, and it gets the backing name of a
        state; False if they are copied, and the file is left alone
    :param backing: its original backing name, empty for none
    :param access: the access rights of the file. A journal has only its owner (-1 if unknown) and
        its mode
    :param stamp: of the file, if it is left alone: a file that was written to since is not replaced
    """

    source: Path | None
    manifest: Manifest
    linked: bool = False
    backing: str = ""
    access: Access = _UNKNOWN
    stamp: str = ""

    @property
    def digest(self) -> Digest:
        """The name (digest) of its bytes."""
        assert self.manifest.digest is not None
        return self.manifest.digest

    @property
    def sibling(self) -> str:
        """The backing name that it will get, empty for none."""
        return self.manifest.parent.state + ".qcow2" if self.manifest.parent is not None else ""

    def is_at(self, file: Beneath, *names: Beneath) -> bool:
        """
        :param names: the names of its bytes in the cache
        :returns: whether this is the file of which the state is made, and nothing was written to it
            since
        """
        return (
            any(same_file(file, name) for name in names)
            if self.linked
            else get_journal.stamp(file) == self.stamp
        )

    def opened(self, file: int) -> Part:
        """
        :param file: a descriptor of its file, which this account has closed to other accounts if it
            is linked
        :returns: the same part, with all access rights of the file that can be read
        """
        access = Access.of(file)
        return evolve(
            self,
            access=restored(access, self.access.uid, self.access.mode) if self.linked else access,
        )

    def to_json(self) -> dict[str, Any]:
        """:returns: the form in a marker"""
        return {
            "source": str(self.source) if self.source is not None else None,
            "manifest": self.manifest.to_json(),
            "linked": self.linked,
            "backing": self.backing,
            "mode": self.access.mode,
            "owner": self.access.uid,
            "stamp": self.stamp,
        }

    @classmethod
    def from_json(cls, data: Any) -> Part:
        """:returns: the part of a result of :meth:`to_json`"""
        return cls(
            source=Path(data["source"]) if data["source"] is not None else None,
            manifest=Manifest.from_json(data["manifest"]),
            linked=data["linked"] is True,
            backing=str(data["backing"]),
            access=evolve(_UNKNOWN, uid=int(data.get("owner", -1)), mode=int(data["mode"])),
            stamp=str(data["stamp"]),
        )


@frozen
class Journal:
    """
    The description of an unfinished capture.

    :param parts: one image; or the images of a machine, and its RAM
    :param machine: the manifest of the machine state, or None
    :param replace: whether to replace other content under the names
    """

    parts: tuple[Part, ...]
    machine: Manifest | None = None
    replace: bool = False

    @property
    def manifests(self) -> list[Manifest]:
        """All manifests to publish, members first."""
        return [
            *(part.manifest for part in self.parts),
            *([self.machine] if self.machine is not None else []),
        ]

    @property
    def digests(self) -> list[Digest]:
        """The names of all bytes."""
        return list(dict.fromkeys(part.digest for part in self.parts))

    def to_facts(self) -> dict[str, str]:
        """:returns: the form in a marker"""
        machine = (
            {"machine": json.dumps(self.machine.to_json())} if self.machine is not None else {}
        )
        parts = json.dumps([part.to_json() for part in self.parts])
        return {
            "intent": INTENT,
            "replace": "yes" if self.replace else "no",
            **machine,
            "parts": parts,
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, str]) -> Journal:
        """
        :param facts: of a marker, perhaps of an older version
        :raises BadRecord: they do not describe a capture
        """
        try:
            if "parts" in facts:
                parts = json.loads(facts["parts"])
            else:
                parts = [
                    {
                        **facts,
                        "source": facts["working"],
                        "manifest": json.loads(facts["manifest"]),
                        "linked": True,
                        "stamp": "",
                    }
                ]
            machine = (
                Manifest.from_json(json.loads(facts["machine"])) if "machine" in facts else None
            )
            return cls(tuple(map(Part.from_json, parts)), machine, facts["replace"] == "yes")
        except (KeyError, ValueError, TypeError) as error:
            raise BadRecord(f"a marker of a set lacks or garbles {error}") from error

    def left(self, cache: Cache, staging: Staging) -> Journal:
        """
        :returns: the same journal, without the files that were replaced or written to since the
            states were made of them
        """

        def is_left(part: Part) -> bool:
            names = cache.file(staging.path(part.digest)), cache.file(layout.data(part.digest))
            return part.source is None or part.is_at(beside(part.source), *names)

        return evolve(
            self,
            parts=tuple(
                part if is_left(part) else evolve(part, source=None) for part in self.parts
            ),
        )

    def is_published(self, cache: Cache) -> bool:
        """:returns: whether the cache has all the states"""
        states = cache.pool.fold(self.parts[0].manifest.id.machine).states
        return all(_is_same(states.get(manifest.id), manifest) for manifest in self.manifests)


def _is_same(there: Manifest | None, manifest: Manifest) -> bool:
    return there is not None and (there.digest, there.parent, dict(there.members)) == (
        manifest.digest,
        manifest.parent,
        dict(manifest.members),
    )


def finish(
    cache: Cache,
    staging: Staging,
    journal: Journal,
    hashed: Mapping[Digest, os.stat_result],
    linked: Iterable[int],
) -> None:
    """
    Publish bytes that are gathered and flushed, and put fresh overlays in the places of the images
    that they came from. This ends the staging, unless it fails with images half changed: then the
    next command ends it.

    All steps that take room come before the publication. After it the fresh overlays only have to
    be renamed. So with a full disk, the name of a working image never remains at a file that has
    become a state.

    :param hashed: the status of each gathered file, read from its descriptor after the last hashing
        and change
    :param linked: descriptors of linked files, which are closed to other accounts
    :raises Conflict: a name exists with other content
    :raises NoSpace: there is no room for the record, or for the overlays
    """
    # Bytes that already had their name can have been torn by a power cut. This does not apply to
    # the very file that was gathered: after a crash it has been hashed again, and this process has
    # a lease on it, so that no other process can open it.
    reused = {
        part.digest
        for part in journal.parts
        if not same_file(
            cache.file(layout.data(part.digest)), cache.file(staging.path(part.digest))
        )
        and clear_place(cache, part.manifest)
    }
    if not journal.is_published(cache):  # a half-finished capture is ended in any case
        for part in journal.parts:
            if part.source is not None:
                require_good(cache, _below(cache, part.manifest), part.source)
    made = _prepare(cache, journal)
    try:
        cache.pool.publish(journal.manifests, staging, replace=journal.replace)
    except BaseException:
        # A step after the record, such as the view, can fail too: by then all are states.
        if journal.is_published(cache):
            _settle(cache, staging, journal, made, linked)
        else:
            _drop(made)
        raise
    _settle(cache, staging, journal, made, linked)
    fold = cache.pool.fold(journal.parts[0].manifest.id.machine)
    for part in journal.parts:
        if part.digest in reused:
            check_cached(cache, [part.manifest])
        elif part.digest in hashed:
            cache.sign(part.digest, hashed[part.digest], flushed=True, source=None)
        # otherwise another process has removed it meanwhile
        if fold.holding(part.manifest) == part.manifest:
            chain = fold.chain(part.manifest)
            # Damaged bytes stay leased to this process until it returns: the next get checks them.
            make_durable(
                cache, chain if part.digest in reused or part.digest in hashed else chain[1:]
            )


def _prepare(cache: Cache, journal: Journal) -> list[Fresh]:
    """Write the overlays while the capture can still be undone."""
    made: list[Fresh] = []
    try:
        for part in journal.parts:
            if part.source is not None and part.manifest.kind is Kind.IMAGE:
                below = _below(cache, part.manifest)
                made.append(
                    prepare_working(
                        cache,
                        (part.manifest, *below),
                        part.source,
                        standing_on=below,
                        flush=True,
                        access=part.access,
                    )
                )
    except BaseException:
        _drop(made)
        raise
    return made


def _below(cache: Cache, manifest: Manifest) -> tuple[Manifest, ...]:
    """:returns: the chain that backs a state that is not published yet, tip first"""
    if manifest.parent is None:
        return ()
    fold = cache.pool.fold(manifest.id.machine)
    parent = fold.find(manifest.object, manifest.parent)
    if parent is None:
        raise Conflict(
            f"{manifest.parent.state}, which {manifest.id} stands on, is no state of"
            f" {manifest.object} in the cache any more",
            object=manifest.object,
            state=manifest.state,
            pool=str(cache.pool),
            hint=f"get {manifest.parent.state} again, and make the state from that",
        )
    return fold.chain(parent)


def _drop(made: Iterable[Fresh]) -> None:
    for fresh in made:
        fresh.drop()


def _settle(
    cache: Cache, staging: Staging, journal: Journal, made: list[Fresh], linked: Iterable[int]
) -> None:
    while made:
        fresh = made.pop(0)
        try:
            fresh.settle(overwrite=True)
        except BaseException:
            _drop(made)
            raise
    for part in journal.parts:
        if part.source is not None and part.manifest.kind is Kind.RAM:
            file = beside(part.source)  # this file is now the state, if its directory is unchanged
            if part.is_at(
                file, cache.file(staging.path(part.digest)), cache.file(layout.data(part.digest))
            ):
                file.remove()
    for descriptor in linked:
        open_to_readers(descriptor)
    staging.end()


# -- giving back -----------------------------------------------------------------------------------


def give_back(cache: Cache, marker: Marker, journal: Journal, linked: Mapping[Digest, int]) -> None:
    """
    Undo a capture: restore half captured images, and remove the journal. If they are states by now,
    nothing happens: then only their overlays are missing, and the next command makes them.

    :param linked: descriptors of the gathered bytes, open for reading and writing; no other process
        has them open, or can open them
    """
    keep_for_later(marker)
    if journal.is_published(cache):
        return
    for part in journal.parts:
        if part.linked and part.source is not None and part.digest in linked:
            _restore(cache, marker, part, part.source, linked[part.digest])
    cache.staging(marker).end()
    keep_for_later(marker, no_more=True)


def keep_for_later(marker: Marker, *, no_more: bool = False) -> None:
    """
    Let the next command end the capture of a marker, as it does after a crash; with ``no_more``,
    withdraw this.
    """
    if no_more:
        _unended.discard(marker.nonce)
    else:
        _unended.add(marker.nonce)


def _restore(cache: Cache, marker: Marker, part: Part, source: Path, descriptor: int) -> None:
    gathered = cache.file(layout.incoming(marker.nonce, part.digest))
    if not same_file(beside(source), gathered):
        return
    if _is_named(cache, part, gathered) and not _unnamed(cache, marker, part, source, gathered):
        # These bytes already have their name, and another state needs them: they must stay
        # unchanged.
        _separate(cache, part, source, descriptor)
        return
    # First restore what a machine needs to run from the image. Use the descriptor, since the mode
    # may deny opening by now.
    put_on_backing(descriptor, source, part.backing, part.sibling)
    give_back_to(descriptor, part.access.uid, part.access.mode)
    os.fsync(descriptor)


def _is_named(cache: Cache, part: Part, gathered: Beneath) -> bool:
    return same_file(cache.file(layout.data(part.digest)), gathered)


def _unnamed(cache: Cache, marker: Marker, part: Part, source: Path, gathered: Beneath) -> bool:
    """
    Remove the name of the bytes, if only this capture needed it.

    :returns: whether the name was removed
    """
    cache.chains.abandon(source, part.digest)
    cache.collector.collect([part.digest], besides=marker)
    return not _is_named(cache, part, gathered)


def _separate(cache: Cache, part: Part, source: Path, descriptor: int) -> None:
    working = beside(source)
    temporary = Beneath(working.tree, f".statepool-{cache.pool.nonce()}.tmp")
    try:
        with temporary.open(os.O_RDWR | os.O_CREAT | os.O_EXCL, OURS_ALONE) as target:
            # root may have written to it since the capture began
            copy(descriptor, target, Transfer(os.fstat(descriptor).st_size))
            put_on_backing(target, Path(temporary), part.backing, part.sibling)
            part.opened(descriptor).access.give(target, source)
            os.fsync(target)
        working.tree.rename(temporary.path, working.path)
        open_to_readers(descriptor)
    finally:
        temporary.remove()


def put_on_backing(descriptor: int, path: Path, name: str, other: str) -> None:
    """
    Give an image one of the two backing names that it can have, whatever mixture of them it has.
    qemu-img could not open such a mixture.
    """
    if name and other:
        apply_patches(descriptor, backing_again(read_header_fd(descriptor, str(path)), name, other))


# -- after a crash ---------------------------------------------------------------------------------


def recover(cache: Cache) -> list[Collected]:
    """
    Recover after a crash: end captures, unfinished transfers and half written working images that
    killed processes of this host left.

    :returns: what was removed
    """
    if not cache.pool.is_managed:
        return []
    # Do this first, while the records of use exist that name half written working images: ending a
    # capture replaces the records.
    cache.chains.recover()
    cache.clear_markers()
    dead = [
        marker
        for marker in read_markers(cache.pool.transport)
        if _has_ended(cache, marker) or marker.nonce in _unended
    ]
    if not dead:
        return []
    with cache.pool.locks.hold("recover", cache.settings.lock_timeout):
        for marker in dead:
            _end(cache, marker.nonce)
    return cache.collector.clear_incoming()


def _has_ended(cache: Cache, marker: Marker) -> bool:
    """
    Tell whether the writer of a marker has ended. Processes of other hosts also send bytes to a
    cache, but only those of this host change working images.
    """
    if not marker.facts:
        return marker.writer.is_dead
    return marker.writer.has_ended_here or (
        marker.locked
        and not marker.writer.is_here
        and is_let_go(cache.pool.transport, marker, cache.pool.now())
    )


def _end(cache: Cache, nonce: str) -> None:
    """
    End the capture of a marker, if this account has written the marker: in a cache that a group
    shares, any member can leave one.
    """
    marker = cache.marker(nonce)
    if marker is None or not (_has_ended(cache, marker) or nonce in _unended):
        return
    intent = marker.facts.get("intent")
    if intent in (INTENT, *OLD_INTENTS):
        _recover(cache, marker)
    elif intent == get_journal.INTENT:
        get_journal.recover_together(cache, marker)


def _recover(cache: Cache, marker: Marker) -> None:
    journal = Journal.from_facts(marker.facts)
    gathered = {
        digest: cache.file(layout.incoming(marker.nonce, digest)) for digest in journal.digests
    }
    here = {digest: file for digest, file in gathered.items() if file.stat() is not None}
    if not here:
        cache.staging(marker).end()  # the capture had not begun, or only this was left
        return
    try:
        with translate_os_errors("end a set", Subject(f"in the cache {cache.root}")):
            _go_on(cache, marker, journal, here)
    except (InUse, AccessDenied, NoSpace, MissingFile):
        # An image is open although it is half a state; or it does not belong to this account; or
        # there is no room for the overlay of what is already a state: the marker waits for a
        # command that can end it. Or another thread, whose capture has failed, is just ending it.
        return


def _go_on(cache: Cache, marker: Marker, journal: Journal, here: Mapping[Digest, Beneath]) -> None:
    staging, published = cache.staging(marker), journal.is_published(cache)
    left = journal.left(cache, staging)
    if published and any(
        part.source is not None and not is_below(part.source) and opened.is_open(part.source)
        for part in left.parts
    ):
        return  # a machine runs on half a state: it is left alone
    with ExitStack() as stack:
        descriptors: dict[Digest, int] = {}
        for digest, file in here.items():
            _open_again(file)
            sources = [
                part.source
                for part in journal.parts
                if part.digest == digest and part.source is not None
            ]
            descriptors[digest] = stack.enter_context(_alone(file, sources))

        def opened_again(part: Part) -> Part:
            if part.source is None:
                return part
            file = descriptors.get(part.digest) if part.linked else None
            return part.opened(
                stack.enter_context(_alone(part.source, [part.source])) if file is None else file
            )

        left = evolve(left, parts=tuple(map(opened_again, left.parts)))
        closed = [close_to_others(each) for each in descriptors.values()]
        if published or (
            all(closed)
            and all(_make_good(cache, part, descriptors.get(part.digest)) for part in journal.parts)
        ):
            hashed = {
                digest: os.fstat(each)
                for digest, each in descriptors.items()
                if not published or _is_whole(digest, each)
            }
            try:
                finish(cache, staging, left, hashed, descriptors.values())
                return
            except (StatePoolError, OSError):
                if journal.is_published(cache):
                    raise
        give_back(cache, marker, journal, descriptors)


def _alone(file: Path | Beneath, sources: Iterable[Path]) -> AbstractContextManager[int]:
    """
    :returns: a context that keeps other processes from opening a file; or only from writing to it,
        if a running machine may read it
    """
    return (opened.unwritten if any(map(is_below, sources)) else opened.exclusive)(file)


def _open_again(gathered: Beneath) -> None:
    """
    Make a read-only file writable again, if this account may change its mode. An account that may
    write regardless of the mode does not need it.
    """
    with suppress(PermissionError), open_regular(gathered) as descriptor:
        os.fchmod(descriptor, 0o600)


def _make_good(cache: Cache, part: Part, descriptor: int | None) -> bool:
    """
    Restore the gathered bytes to what the digest says.

    :returns: whether they are correct now
    """
    if descriptor is None:
        return part.source is None and cache.pool.has_bytes(part.digest)
    if part.linked:
        put_on_backing(descriptor, Path(layout.data(part.digest)), part.sibling, part.backing)
    return os.fstat(descriptor).st_size == part.manifest.size and _is_whole(part.digest, descriptor)


def _is_whole(digest: Digest, descriptor: int) -> bool:
    """:returns: whether a file has the content of its digest, on stable storage"""
    os.fsync(descriptor)
    return hash_file(descriptor, os.fstat(descriptor).st_size, algorithm=digest.algorithm) == digest
