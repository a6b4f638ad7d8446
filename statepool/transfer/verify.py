"""Reading states once more, wherever they are, and saying what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

from statepool.errors import NoSpace, StatePoolError
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.outcomes import Checked
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.fold import Fold
from statepool.pools.pool import Pool
from statepool.qcow2.checks import Backing, check_image
from statepool.qcow2.header import reader
from statepool.transfer.cache import Cache, file_in
from statepool.transfer.offers import Looked, Source, require_proportion, unmanaged_chain
from statepool.transfer.ready import hash_open, open_whole, sign_again
from statepool.transports.failures import Subject, in_our_words


def wanted(pool: Pool, object: str | None) -> list[str]:
    """:returns: the machines of a pool that an object, or none, speaks of"""
    return pool.machines() if object is None else [object.partition("/")[0]]


def verify_all(cache: Cache, sources: Sequence[Source], object: str | None, state: str | None, progress: Progress = SILENT) -> list[Checked]:
    """
    As :func:`verify`, in the cache and in all sources; one that is no pool, or cannot be read, does not keep the others from being looked at.

    :raises StatePoolError: no source is a pool
    """
    there, missing = _split(sources)
    if cache.pool.is_managed:
        with suppress(NoSpace):
            cache.prepare()  # what turns out right is noted, where there is room
    with in_our_words("verify", Subject(f"the cache {cache.root}")):
        found = list(verify(cache.pool, object, state, cache=cache, progress=progress))
    for source in there:
        try:
            found += verify(source.pool, object, state, progress=progress)
        except StatePoolError as error:
            missing.append(Checked(str(source.pool), "", "", problem=str(error)))
    return found + missing


def _split(sources: Sequence[Source]) -> tuple[list[Source], list[Checked]]:
    """:returns: the sources that are pools, and what is wrong with the others"""
    there: list[Source] = []
    missing: list[Checked] = []
    for source in sources:
        try:
            source.pool.require()
            there.append(source)
        except StatePoolError as error:
            if len(missing) == len(sources) - 1:
                raise
            missing.append(Checked(str(source.pool), "", "", problem=str(error)))
    return there, missing


def verify(pool: Pool, object: str | None, state: str | None, *, cache: Cache | None = None, progress: Progress = SILENT) -> Iterator[Checked]:
    """
    :param object: only its states; all if None
    :param state: only this state
    :param cache: the cache, if it is the pool: what turns out right is trusted again
    :returns: what was read, and what is wrong with it
    """
    for machine in wanted(pool, object):
        try:
            fold = pool.fold(machine)
        except StatePoolError as error:
            yield Checked(str(pool), machine, "", problem=str(error))
            continue
        # What goes by no name is part of the cache too: children stand on it.
        for manifest in sorted(fold.manifests, key=lambda manifest: manifest.id):
            if _matches(manifest.id, object, state) and manifest.kind is not Kind.MACHINE:
                checked = _verify(pool, manifest, fold, cache, progress)
                if checked.problem is None or _is_there(pool, manifest):
                    yield checked
        looked = Looked(pool, pool.folds([machine]))
        for closed in looked.closed:
            yield Checked(str(pool), machine, "", problem=str(closed))
        for unmanaged in looked.unmanaged[machine]:
            if _matches(unmanaged.id, object, state):
                yield _verify_unmanaged(pool, unmanaged.id, looked)


def _is_there(pool: Pool, manifest: Manifest) -> bool:
    """Whether a state with which something is wrong is still one: reading takes long, and what was removed meanwhile may lack its bytes."""
    try:
        return manifest.digest in pool.fold(manifest.id.machine).digests
    except StatePoolError:
        return True  # what is wrong with the log is not said here


def _matches(found: StateId, object: str | None, state: str | None) -> bool:
    return object in (None, found.object, found.machine) and state in (None, found.state)


def _verify(pool: Pool, manifest: Manifest, fold: Fold, cache: Cache | None, progress: Progress) -> Checked:
    digest = manifest.digest
    assert digest is not None
    try:
        with _opened(pool, manifest, cache) as descriptor:
            problem = _problem(pool, manifest, cache, descriptor, progress)
            if problem is None and manifest.kind is Kind.IMAGE:
                parent = fold.parent_of(manifest)
                check_image(
                    reader(descriptor) if descriptor is not None else partial(pool.transport.read, layout.data(digest)),
                    manifest.size,
                    f"{manifest.id} in {pool}",
                    parent=parent.state if parent is not None else None,
                    backing=Backing.UNMANAGED,
                )
    except StatePoolError as error:
        problem = str(error)
    return Checked(str(pool), manifest.object, manifest.state, str(digest), manifest.size, problem)


def _opened(pool: Pool, manifest: Manifest, cache: Cache | None) -> AbstractContextManager[int | None]:
    """:returns: the file of a state, which is hashed and looked into by one descriptor; None if it is not there, or not on this host"""
    digest = manifest.digest
    if digest is None or not pool.has_bytes(digest):
        return nullcontext()
    file = cache.bytes(digest) if cache is not None else file_in(pool, digest)
    return open_whole(file, manifest, pool) if file is not None else nullcontext()


def _problem(pool: Pool, manifest: Manifest, cache: Cache | None, descriptor: int | None, progress: Progress) -> str | None:
    digest = manifest.digest
    assert digest is not None
    if not pool.has_bytes(digest):
        return f"its bytes {digest} are gone"
    if cache is not None:
        if descriptor is None:
            return "it is a link to a file that is gone; the next get mends it"
        actual = sign_again(cache, manifest, descriptor, progress)
    elif descriptor is not None:
        require_proportion(pool, manifest, layout.data(digest))
        actual = hash_open(descriptor, algorithm=digest.algorithm, title=f"verify {manifest.id}", progress=progress).digest
    else:
        require_proportion(pool, manifest, layout.data(digest))
        progress.begin(f"verify {manifest.id}", manifest.size)
        try:
            actual = pool.transport.digest(layout.data(digest), manifest.size, algorithm=digest.algorithm, progress=progress)
        finally:
            progress.end()
    return None if actual == digest else f"its bytes are {actual}, not {digest}"


def _verify_unmanaged(pool: Pool, state: StateId, looked: Looked) -> Checked:
    try:
        unmanaged_chain(pool, state, looked.folds[state.machine], looked)
    except StatePoolError as error:
        return Checked(str(pool), state.object, state.state, problem=str(error))
    return Checked(str(pool), state.object, state.state)
