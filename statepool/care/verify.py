"""Verify states wherever they are: read them again, and report damage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

from attrs import evolve

from statepool.cache.cache import Cache, file_in
from statepool.cache.check_cached import hash_open, open_whole, sign_again
from statepool.errors import NoSpace, StatePoolError
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.outcomes import Checked
from statepool.model.pieces import PIECE, PIECES, Extent, Pieces, count
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.fold import Fold
from statepool.pools.pieces import is_list_wrong, read_list
from statepool.pools.pool import Pool
from statepool.qcow2.checks import Backing, check_image
from statepool.qcow2.header import reader
from statepool.sources.unmanaged import Looked, require_proportion, unmanaged_chain
from statepool.transports.base import Transfer
from statepool.transports.failures import Subject, translate_os_errors

MOST_TOLD = 5
"""How many damaged places a message names; the result has all of them."""


def verify_all(
    cache: Cache,
    sources: Sequence[Pool],
    object: str | None,
    state: str | None,
    progress: Progress = SILENT,
) -> list[Checked]:
    """
    Run :func:`verify` on the cache and on all sources. A source that is not a pool, or cannot be
    read, does not prevent the check of the others.

    :raises StatePoolError: no source is a pool
    """
    there, missing = _split(sources)
    if cache.pool.is_managed:
        with suppress(NoSpace):
            cache.prepare()  # correct bytes are noted, where there is room
    with translate_os_errors("verify", Subject(f"the cache {cache.root}")):
        found = list(verify(cache.pool, object, state, cache=cache, progress=progress))
    for pool in there:
        try:
            found += verify(pool, object, state, beside=cache.pool, progress=progress)
        except StatePoolError as error:
            missing.append(Checked(str(pool), "", "", problem=str(error)))
    return found + missing


def _split(sources: Sequence[Pool]) -> tuple[list[Pool], list[Checked]]:
    """:returns: the sources that are pools, and the errors of the others"""
    there: list[Pool] = []
    missing: list[Checked] = []
    for pool in sources:
        try:
            pool.require()
            there.append(pool)
        except StatePoolError as error:
            if len(missing) == len(sources) - 1:
                raise
            missing.append(Checked(str(pool), "", "", problem=str(error)))
    return there, missing


def verify(
    pool: Pool,
    object: str | None,
    state: str | None,
    *,
    cache: Cache | None = None,
    beside: Pool | None = None,
    progress: Progress = SILENT,
) -> Iterator[Checked]:
    """
    :param object: only its states; all if None
    :param state: only this state
    :param cache: the cache, if it is the pool: bytes that prove correct are trusted again
    :param beside: another pool, which may have the lists of pieces that this one lacks
    :returns: what was read, and what is wrong with it
    """
    for machine in pool.machines_of(object):
        try:
            fold = pool.fold(machine)
        except StatePoolError as error:
            yield Checked(str(pool), machine, "", problem=str(error))
            continue
        # States without a name are part of the cache, too: children depend on them.
        for manifest in sorted(fold.manifests, key=lambda manifest: manifest.id):
            if _matches(manifest.id, object, state) and manifest.kind is not Kind.MACHINE:
                checked = _verify(pool, manifest, fold, cache, beside, progress)
                if checked.problem is None or _is_there(pool, manifest):
                    yield checked
        looked = Looked(pool, pool.folds([machine]))
        for closed in looked.closed:
            yield Checked(str(pool), machine, "", problem=str(closed))
        for unmanaged in looked.unmanaged[machine]:
            if _matches(unmanaged.id, object, state):
                yield _verify_unmanaged(pool, unmanaged.id, looked)


def _is_there(pool: Pool, manifest: Manifest) -> bool:
    """
    Tell whether a state with an error still exists: reading takes long, and a state that was
    removed meanwhile may lack its bytes.
    """
    try:
        return manifest.digest in pool.fold(manifest.id.machine).digests
    except StatePoolError:
        return True  # errors of the log are not reported here


def _matches(found: StateId, object: str | None, state: str | None) -> bool:
    return object in (None, found.object, found.machine) and state in (None, found.state)


def _verify(
    pool: Pool,
    manifest: Manifest,
    fold: Fold,
    cache: Cache | None,
    beside: Pool | None,
    progress: Progress,
) -> Checked:
    digest = manifest.digest
    assert digest is not None
    checked = Checked(str(pool), manifest.object, manifest.state, str(digest), manifest.size)
    try:
        is_wrong = layout.has_pieces(digest, manifest.size) and is_list_wrong(
            pool.transport, digest, manifest.size
        )
        with _opened(pool, manifest, cache) as descriptor:
            checked = _held_against(checked, pool, manifest, cache, beside, descriptor, progress)
            if checked.problem is None and manifest.kind is Kind.IMAGE:
                parent = fold.parent_of(manifest)
                check_image(
                    reader(descriptor)
                    if descriptor is not None
                    else partial(pool.transport.read, layout.data(digest)),
                    manifest.size,
                    f"{manifest.id} in {pool}",
                    parent=parent.state if parent is not None else None,
                    backing=Backing.UNMANAGED,
                )
        return (
            evolve(checked, note=_said_of_list(pool, digest, manifest.size))
            if is_wrong
            else checked
        )
    except StatePoolError as error:
        return evolve(checked, problem=str(error))


def _said_of_list(pool: Pool, digest: Digest, size: int) -> str:
    """
    :returns: the message about a list of pieces that was wrong when its bytes were about to be read
    """
    path = layout.list_of(layout.data(digest))
    if is_list_wrong(pool.transport, digest, size):
        return f"{path} is not the list of its pieces, and is ignored: remove it"
    return f"{path} was not the list of its pieces, and has been made anew"


def _opened(
    pool: Pool, manifest: Manifest, cache: Cache | None
) -> AbstractContextManager[int | None]:
    """
    :returns: the file of a state, whose one descriptor is both hashed and checked; None if it is
        not there, or not on this host
    """
    digest = manifest.digest
    if digest is None or not pool.has_bytes(digest):
        return nullcontext()
    file = cache.bytes(digest) if cache is not None else file_in(pool, digest)
    return open_whole(file, manifest, pool) if file is not None else nullcontext()


def _held_against(
    checked: Checked,
    pool: Pool,
    manifest: Manifest,
    cache: Cache | None,
    beside: Pool | None,
    descriptor: int | None,
    progress: Progress,
) -> Checked:
    """:returns: the same, with what is wrong with the bytes"""
    digest = manifest.digest
    assert digest is not None
    if not pool.has_bytes(digest):
        return evolve(checked, problem=f"its bytes {digest} are gone")
    if cache is not None and descriptor is None:
        return evolve(checked, problem="it is a link to a file that is gone; the next get mends it")
    actual, pieces = _hashed(pool, manifest, digest, cache, descriptor, progress)
    if actual == digest:
        return checked
    problem, damaged = (
        f"its bytes are {actual}, not {digest}",
        _damaged(pool, beside, digest, manifest.size, pieces),
    )
    return evolve(checked, problem=problem + _told(damaged, manifest.size), damaged=damaged)


def _hashed(
    pool: Pool,
    manifest: Manifest,
    digest: Digest,
    cache: Cache | None,
    descriptor: int | None,
    progress: Progress,
) -> tuple[Digest, Pieces]:
    if cache is not None and descriptor is not None:
        hashed = sign_again(cache, manifest, descriptor, progress)
        return hashed.digest, hashed.pieces
    require_proportion(pool, manifest, layout.data(digest))
    title = f"verify {manifest.id}"
    if descriptor is not None:
        hashed = hash_open(descriptor, algorithm=digest.algorithm, title=title, progress=progress)
        return hashed.digest, hashed.pieces
    transfer = Transfer(manifest.size, digest.algorithm, progress=progress)
    progress.begin(title, manifest.size)
    try:
        return pool.transport.digest(layout.data(digest), transfer), transfer.pieces
    finally:
        progress.end()


def _damaged(
    pool: Pool, beside: Pool | None, digest: Digest, size: int, found: Pieces
) -> tuple[Extent, ...]:
    """
    :param found: digests of the pieces as they are
    :returns: the damaged extents; empty if there is no list to compare with
    """
    if digest.algorithm != PIECES or len(found) != count(size):
        return ()
    if not layout.has_pieces(digest, size):
        return ((0, size),)
    lists = (
        read_list(place.transport, digest, size) for place in (pool, beside) if place is not None
    )
    wanted = next((one for one in lists if one is not None), None)
    return wanted.differing(found, size) if wanted is not None else ()


def _told(damaged: Sequence[Extent], size: int) -> str:
    if size <= PIECE or not damaged:
        return ""
    told = ", ".join(f"{offset} to {offset + length - 1}" for offset, length in damaged[:MOST_TOLD])
    more = f" and {len(damaged) - MOST_TOLD} more places" if len(damaged) > MOST_TOLD else ""
    return f"; damaged are the bytes {told}{more}"


def _verify_unmanaged(pool: Pool, state: StateId, looked: Looked) -> Checked:
    try:
        unmanaged_chain(pool, state, looked.folds[state.machine], looked)
    except StatePoolError as error:
        return Checked(str(pool), state.object, state.state, problem=str(error))
    return Checked(str(pool), state.object, state.state)
