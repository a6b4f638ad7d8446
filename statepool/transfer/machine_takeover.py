"""
The part of taking a whole machine over that a crash must not interrupt for good: one marker speaks of all its images.

Everything is published in one record. Before it, whoever comes after a crash goes forward if all bytes are those that were hashed, and back
otherwise; after it, only forward.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from statepool.beneath import Beneath, beside
from statepool.errors import AccessDenied, BadRecord, Conflict, IntegrityError, InUse, NotFound
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest
from statepool.pools import layout
from statepool.pools.staging import Marker, Staging
from statepool.qcow2 import opened
from statepool.qcow2.files import open_regular
from statepool.transfer.access import Access, close_to_others, open_to_readers
from statepool.transfer.cache import Cache
from statepool.transfer.frozen import is_below
from statepool.transfer.overlays import is_same, stamp
from statepool.transfer.ready import clear_place, examine, make_durable, require_good
from statepool.transfer.takeover import Takeover, keep_for_later, open_again, put_on_backing, restore
from statepool.transfer.working import Fresh, prepare_working
from statepool.transports.copying import hash_file

INTENT = "set-machine"
"""What the marker calls itself in its facts."""


@frozen
class Part:
    """
    One image, or the RAM, of a machine that is being taken over.

    :param source: its file, absolute; None if nothing is to be done with that
    :param manifest: what it is to become
    :param linked: whether its bytes are linked into the cache, and it gets the backing name of a state; or they are copied, and it is left alone
    :param backing: the backing name it had, empty for none
    :param mode: the permissions it had
    :param owner: whose it was; -1 if nobody says so
    :param stamp: of the file, if it is left alone: what was written to since is not replaced
    """

    source: Path | None
    manifest: Manifest
    linked: bool = False
    backing: str = ""
    mode: int = 0o600
    owner: int = -1
    stamp: str = ""

    @property
    def digest(self) -> Digest:
        """The name of its bytes."""
        assert self.manifest.digest is not None
        return self.manifest.digest

    @property
    def takeover(self) -> Takeover:
        """The same, as one would say it of a single image."""
        assert self.source is not None
        return Takeover(self.source, self.backing, self.mode, False, self.manifest, self.owner)

    def left(self, *names: Beneath) -> Part:
        """
        :param names: those of its bytes in the cache
        :returns: the same, without its file if that is not what the state was made of any more, or was written to since
        """
        return self if self.source is None or self.is_at(beside(self.source), *names) else evolve(self, source=None)

    def is_at(self, file: Beneath, *names: Beneath) -> bool:
        """:returns: whether a file is the one that the state is made of, and was not written to since"""
        return any(is_same(file, name) for name in names) if self.linked else stamp(file) == self.stamp

    def to_json(self) -> dict[str, Any]:
        """:returns: the form in a marker"""
        return {
            "source": str(self.source) if self.source is not None else None,
            "manifest": self.manifest.to_json(),
            "linked": self.linked,
            "backing": self.backing,
            "mode": self.mode,
            "owner": self.owner,
            "stamp": self.stamp,
        }

    @classmethod
    def from_json(cls, data: Any) -> Part:
        """:returns: what :meth:`to_json` gave"""
        return cls(
            source=Path(data["source"]) if data["source"] is not None else None,
            manifest=Manifest.from_json(data["manifest"]),
            linked=data["linked"] is True,
            backing=str(data["backing"]),
            mode=int(data["mode"]),
            owner=int(data.get("owner", -1)),
            stamp=str(data["stamp"]),
        )


@frozen
class MachineTakeover:
    """
    What is under way.

    :param machine: what the machine is to become
    :param parts: its images, and its RAM
    :param replace: whether other content under the state's name gives way
    """

    machine: Manifest
    parts: tuple[Part, ...]
    replace: bool = False

    @property
    def manifests(self) -> list[Manifest]:
        """All that is published, members first."""
        return [*(part.manifest for part in self.parts), self.machine]

    @property
    def digests(self) -> list[Digest]:
        """The names of all bytes."""
        return list(dict.fromkeys(part.digest for part in self.parts))

    def to_facts(self) -> dict[str, str]:
        """:returns: the form in a marker"""
        return {
            "intent": INTENT,
            "replace": "yes" if self.replace else "no",
            "machine": json.dumps(self.machine.to_json()),
            "parts": json.dumps([part.to_json() for part in self.parts]),
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, str]) -> MachineTakeover:
        """
        :raises BadRecord: the facts are not those of a takeover
        """
        try:
            return cls(
                machine=Manifest.from_json(json.loads(facts["machine"])),
                parts=tuple(map(Part.from_json, json.loads(facts["parts"]))),
                replace=facts["replace"] == "yes",
            )
        except (KeyError, ValueError, TypeError) as error:
            raise BadRecord(f"a marker of a set lacks or garbles {error}") from error

    def left(self, cache: Cache, staging: Staging) -> MachineTakeover:
        """:returns: the same, without the files that somebody has changed since"""
        parts = (part.left(cache.file(staging.path(part.digest)), cache.file(layout.data(part.digest))) for part in self.parts)
        return evolve(self, parts=tuple(parts))

    def is_published(self, cache: Cache) -> bool:
        """:returns: whether the cache has the machine state, with these members"""
        there = cache.pool.find(self.machine.id)
        return there is not None and dict(there.members) == dict(self.machine.members)


def write_fresh(cache: Cache, under_way: MachineTakeover) -> list[Fresh]:
    """
    Write the images that will take the places of those that become states, while there still is a way back.

    :raises NoSpace: there is no room for them; nothing is left
    """
    made: list[Fresh] = []
    try:
        for part in under_way.parts:
            if part.source is not None and part.manifest.kind is Kind.IMAGE:
                below = _below(cache, part.manifest)
                access = part.takeover.access if part.linked else Access.of(part.source)
                made.append(prepare_working(cache, (part.manifest, *below), part.source, standing_on=below, flush=True, access=access))
    except BaseException:
        drop(made)
        raise
    return made


def _below(cache: Cache, manifest: Manifest) -> tuple[Manifest, ...]:
    """:returns: what a state that is not published yet stands on, tip first"""
    if manifest.parent is None:
        return ()
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
    return fold.chain(parent)


def drop(made: Iterable[Fresh]) -> None:
    """Forget images that have not got their names."""
    for fresh in made:
        fresh.drop()


def finish(cache: Cache, staging: Staging, under_way: MachineTakeover, hashed: Mapping[Digest, os.stat_result], linked: Collection[int]) -> None:
    """
    Publish bytes that are gathered and flushed, and put fresh images in the places of those they came from. Ends the staging, unless it fails with
    images half changed: then whoever comes next ends it.

    :param hashed: the status of each file that is gathered, by its descriptor, after it was hashed and changed for the last time
    :param linked: descriptors of bytes that are those files themselves, closed to others
    :raises Conflict: a name exists with other content
    :raises NoSpace: there is no room for the record, or for the fresh images
    """
    # What has its name already can have been torn by a power cut, unless it is the very file that we gathered.
    reused = {
        part.digest
        for part in under_way.parts
        if not is_same(cache.file(layout.data(part.digest)), cache.file(staging.path(part.digest))) and clear_place(cache, part.manifest)
    }
    if not under_way.is_published(cache):  # what a crash has left half done is ended in any case
        for part in under_way.parts:
            if part.source is not None:
                require_good(cache, _below(cache, part.manifest), part.source)
    made = write_fresh(cache, under_way)
    try:
        cache.pool.publish(under_way.manifests, staging, replace=under_way.replace)
    except BaseException:
        # What comes after the record, such as the view, can fail too: by then all are states.
        if under_way.is_published(cache):
            _settle(cache, staging, under_way, made, linked)
        else:
            drop(made)
        raise
    _settle(cache, staging, under_way, made, linked)
    fold = cache.pool.fold(under_way.machine.object)
    for part in under_way.parts:
        if part.digest in hashed and part.digest not in reused:
            cache.sign(part.digest, hashed[part.digest], flushed=True, source=cache.trust.source(part.digest))
        else:
            examine(cache, [part.manifest])
        if fold.holding(part.manifest) == part.manifest:  # else another process has removed it meanwhile
            make_durable(cache, fold.chain(part.manifest))


def _settle(cache: Cache, staging: Staging, under_way: MachineTakeover, made: Iterable[Fresh], linked: Iterable[int]) -> None:
    for fresh in made:
        fresh.settle(overwrite=True)
    for part in under_way.parts:
        if part.source is not None and part.manifest.kind is Kind.RAM:
            file = beside(part.source)  # it is the state's now, if its directory is still the same
            if part.is_at(file, cache.file(staging.path(part.digest)), cache.file(layout.data(part.digest))):
                file.remove()
    for descriptor in linked:
        open_to_readers(descriptor)
    staging.end()


def give_back(cache: Cache, marker: Marker, under_way: MachineTakeover, descriptors: Mapping[Path, int]) -> None:
    """
    Make half taken images again what they were. Nothing happens if they are states by now: then the next command does what is left.

    :param descriptors: of the images that were linked, open for reading and writing, by their names; nobody else can open them
    """
    keep_for_later(marker)
    if under_way.is_published(cache):
        return
    for part in under_way.parts:
        if part.linked and part.source is not None and part.source in descriptors:
            restore(cache, marker, part.takeover, descriptors[part.source])
    cache.staging(marker).end()
    keep_for_later(marker, no_more=True)


# -- after a crash -----------------------------------------------------------------------------------------------------------------------------------


def recover_machine(cache: Cache, marker: Marker) -> None:
    """
    End what a crash interrupted.

    :param marker: of a writer that is gone
    """
    under_way = MachineTakeover.from_facts(marker.facts)
    staging = cache.staging(marker)
    if under_way.is_published(cache):
        _go_forward(cache, staging, under_way)
        return
    gathered = {part.digest: cache.file(layout.incoming(marker.nonce, part.digest)) for part in under_way.parts}
    here = {digest: file for digest, file in gathered.items() if file.stat() is not None}
    if not here:
        staging.end()  # it was not begun
        return
    try:
        _go_on(cache, marker, under_way, here)
    except (InUse, AccessDenied, PermissionError):
        return  # somebody has an image open although it is half a state, or it is not ours to change: the marker waits for who can end it


def _go_forward(cache: Cache, staging: Staging, under_way: MachineTakeover) -> None:
    """The record is there: do what is left."""
    left = under_way.left(cache, staging)
    if any(part.source is not None and not is_below(part.source) and opened.is_open(part.source) for part in left.parts):
        return  # a machine runs on half a state: it is left alone
    with ExitStack() as stack:
        files = [cache.file(staging.path(part.digest)) for part in under_way.parts if part.linked]
        linked = [stack.enter_context(open_regular(file)) for file in dict.fromkeys(files) if file.stat() is not None]
        finish(cache, staging, left, {}, linked)


def _go_on(cache: Cache, marker: Marker, under_way: MachineTakeover, here: dict[Digest, Beneath]) -> None:
    with ExitStack() as stack:
        descriptors: dict[Digest, int] = {}
        for digest, path in here.items():
            open_again(path)
            sources = [part.source for part in under_way.parts if part.digest == digest]
            mode = opened.unwritten if any(source is not None and is_below(source) for source in sources) else opened.exclusive
            descriptors[digest] = stack.enter_context(mode(path))
        good = [_make_good(cache, part, descriptors.get(part.digest)) for part in under_way.parts]
        if all(good):
            staging = cache.staging(marker)
            try:
                hashed = {digest: os.fstat(each) for digest, each in descriptors.items()}
                finish(cache, staging, under_way.left(cache, staging), hashed, descriptors.values())
                return
            except (Conflict, IntegrityError, NotFound):
                if under_way.is_published(cache):
                    raise
        linked = {part.source: descriptors[part.digest] for part in under_way.parts if part.source is not None and part.digest in descriptors}
        give_back(cache, marker, under_way, linked)


def _make_good(cache: Cache, part: Part, descriptor: int | None) -> bool:
    """Bring gathered bytes to what they should be. :returns: whether they are that now"""
    if descriptor is None:
        return part.source is None and cache.pool.has_bytes(part.digest)
    if part.linked and part.manifest.kind is Kind.IMAGE:
        takeover = part.takeover
        put_on_backing(descriptor, takeover.working, takeover.sibling, part.backing)
    size = os.fstat(descriptor).st_size
    good = size == part.manifest.size and hash_file(descriptor, size, algorithm=part.digest.algorithm) == part.digest
    closed = close_to_others(descriptor)
    os.fsync(descriptor)
    return good and closed


def members_of(manifests: Sequence[Manifest]) -> dict[str, Digest]:
    """:returns: what a machine state lists: the digests of its images by their objects, and that of its RAM"""
    return {("ram" if manifest.kind is Kind.RAM else manifest.object): manifest.digest for manifest in manifests if manifest.digest is not None}
