"""Check of a cached chain: its files must exist, and be trusted, or they are hashed again."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from attrs import field, frozen

from statepool.beneath import Beneath, Descriptor
from statepool.cache.cache import Cache
from statepool.cache.trust import FileStatus, Signature
from statepool.errors import AccessDenied, DigestMismatch, IntegrityError, MissingFile, NoSpace
from statepool.model.digest import DEFAULT_ALGORITHM, Digest
from statepool.model.manifest import Manifest
from statepool.model.outcomes import Verified
from statepool.model.pieces import Pieces
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.log import random_nonce
from statepool.pools.pieces import mend_list
from statepool.qcow2.files import open_regular
from statepool.transports.base import Transfer
from statepool.transports.copying import copy, hash_file
from statepool.transports.failures import Subject

_NO_NOTE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT})
"""Errors of the kernel if a note cannot be written; the next command hashes the bytes again."""


@frozen
class CacheCheck:
    """
    The result of the check of a cached chain.

    :param verified: how the good bytes were verified
    :param bad: members whose bytes are missing or damaged
    """

    verified: Verified
    bad: tuple[Manifest, ...] = ()


def check_cached(
    cache: Cache, chain: Sequence[Manifest], progress: Progress = SILENT
) -> CacheCheck:
    """
    Check the files of a chain, and hash those that are not trusted.

    :param chain: of the cache, tip first
    """
    verified = Verified.TRUSTED
    bad = []
    for manifest in chain:
        assert manifest.digest is not None
        status = cache.trust.file_status(manifest.digest, cache.status(manifest.digest))
        if (
            status is FileStatus.MISSING
            and not cache.is_link(manifest.digest)
            and cache.pool.has_bytes(manifest.digest)
        ):
            status = FileStatus.DOUBTFUL
        if status is FileStatus.DOUBTFUL:
            verified = Verified.REHASHED
            if not rehash(cache, manifest, progress):
                status = FileStatus.MISSING
        if status is FileStatus.MISSING:
            bad.append(manifest)
    return CacheCheck(verified, tuple(bad))


@frozen
class Hashed:
    """
    The result of hashing an open file.

    :param digest: of its bytes
    :param status: the status by which the file is recognised, unchanged while it was hashed; None
        if the file was changed meanwhile
    :param pieces: the digests of its pieces, if the algorithm has pieces
    """

    digest: Digest
    status: os.stat_result | None
    pieces: Pieces = field(factory=Pieces, eq=False)


def hash_open(
    descriptor: int, *, algorithm: str = DEFAULT_ALGORITHM, title: str, progress: Progress = SILENT
) -> Hashed:
    """
    Hash a file that other processes may change.

    :param descriptor: of the file
    :param title: of the progress
    """
    before, pieces = os.fstat(descriptor), Pieces()
    progress.begin(title, before.st_size)
    try:
        digest = hash_file(
            descriptor, before.st_size, algorithm=algorithm, progress=progress, pieces=pieces
        )
    finally:
        progress.end()
    after = os.fstat(descriptor)
    return Hashed(digest, after if Signature.of(before) == Signature.of(after) else None, pieces)


def open_bytes(cache: Cache, manifest: Manifest) -> Descriptor:
    """
    :returns: the file of a cached state, open for reading. Its length is not checked, since its
        digest proves it.
    :raises IntegrityError: it is no regular file
    :raises MissingFile: it does not exist
    """
    assert manifest.digest is not None
    # Another process may just be checking whether a process has the file open: this waits for it.
    return open_regular(cache.bytes(manifest.digest) or cache.file(layout.data(manifest.digest)))


@contextlib.contextmanager
def naming(cache: Cache, manifest: Manifest, descriptor: int) -> Iterator[None]:
    """
    Keep the trust in the file of some bytes while it gets or loses other names in a ``with`` block,
    which changes its status.

    :param descriptor: of the file
    """
    assert manifest.digest is not None
    before = os.fstat(descriptor)
    trusted = cache.trust.file_status(manifest.digest, before) is FileStatus.TRUSTED
    yield
    if not trusted:
        return
    try:
        cache.sign(
            manifest.digest,
            before,
            flushed=cache.trust.is_flushed(manifest.digest),
            source=cache.trust.source(manifest.digest),
        )
    except OSError as error:
        if error.errno not in _NO_NOTE:
            raise


def open_whole(file: Beneath, manifest: Manifest, where: object) -> Descriptor:
    """
    :param where: the pool, for messages
    :returns: a file, open for reading. Its name can lead to another file at any moment: all checks
        apply to this descriptor.
    :raises IntegrityError: it is no regular file, or does not have the expected length
    :raises MissingFile: it does not exist
    """
    # Another process may just be checking whether a process has the file open: this waits for it.
    descriptor = open_regular(file)
    size = os.fstat(descriptor.number).st_size
    if size != manifest.size:
        raise IntegrityError(
            f"the bytes of {manifest.id} in {where} are {size} long, not {manifest.size}",
            object=manifest.object,
            state=manifest.state,
            path=str(file),
        )
    return descriptor


def sign_again(
    cache: Cache, manifest: Manifest, descriptor: int, progress: Progress = SILENT
) -> Hashed:
    """
    Hash a cached file again, and trust it again if its digest is right and it was not changed
    meanwhile. If the digest is right, also make the list of its pieces anew if it is missing or
    wrong.

    :param descriptor: of the file
    """
    assert manifest.digest is not None
    hashed = hash_open(
        descriptor,
        algorithm=manifest.digest.algorithm,
        title=f"check {manifest.id}",
        progress=progress,
    )
    if hashed.digest == manifest.digest:
        # The note fails in the cache of another account, or on a full disk. The bytes are right all
        # the same.
        try:
            cache.sign(
                manifest.digest,
                hashed.status,
                flushed=False,
                source=cache.trust.source(manifest.digest),
            )
        except OSError as error:
            if error.errno not in _NO_NOTE:
                raise
        with suppress(AccessDenied, NoSpace):
            mend_list(cache.pool.transport, manifest.digest, manifest.size, hashed.pieces)
    return hashed


def is_good(cache: Cache, manifest: Manifest, descriptor: int, progress: Progress = SILENT) -> bool:
    """
    :param descriptor: of a cached file
    :returns: whether this very file holds the right bytes: it is trusted, or is hashed
    """
    assert manifest.digest is not None
    if cache.trust.file_status(manifest.digest, os.fstat(descriptor)) is FileStatus.TRUSTED:
        return True
    return sign_again(cache, manifest, descriptor, progress).digest == manifest.digest


def rehash(cache: Cache, manifest: Manifest, progress: Progress = SILENT) -> bool:
    """
    Hash a cached file again, and trust it again if its digest is right.

    :returns: whether the digest is right
    """
    try:
        with open_bytes(cache, manifest) as descriptor:
            return sign_again(cache, manifest, descriptor, progress).digest == manifest.digest
    except (IntegrityError, FileNotFoundError):
        return False


def discard(cache: Cache, manifest: Manifest, *, keep: bool = False) -> str:
    """
    Remove a file that does not hold the bytes of its name, or a dead link, so that the right bytes
    can take its place.

    :param keep: whether to keep a copy in the form that an interrupted transfer leaves: a transfer
        that can be resumed then fetches only the damaged pieces
    :returns: a warning for the user
    """
    assert manifest.digest is not None
    if keep and layout.has_pieces(manifest.digest, manifest.size):
        _keep(cache, manifest, manifest.digest)
    above = ", ".join(cache.chains.users_of(manifest.digest))
    cache.pool.transport.remove(layout.data(manifest.digest))
    cache.trust.forget(manifest.digest)
    what = f"the bytes of {manifest.id} in the cache {cache.root} had been changed or were gone"
    return (
        f"{what}; what stands on them may have been written above other bytes: {above}"
        if above
        else what
    )


def _keep(cache: Cache, manifest: Manifest, digest: Digest) -> None:
    kept = cache.file(layout.part(random_nonce(), digest))
    subject = Subject(f"the damaged bytes of {manifest.id}", str(cache.pool))
    try:
        with open_bytes(cache, manifest) as damaged:
            size = os.fstat(damaged).st_size
            if not 0 < size <= manifest.size:
                return
            with kept.open(os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
                copy(damaged, file, Transfer(size), subject=subject)
    except (IntegrityError, MissingFile, FileNotFoundError):
        return  # there is nothing to keep
    except BaseException as error:
        kept.remove()
        if not isinstance(error, NoSpace):
            raise


def clear_place(cache: Cache, manifest: Manifest) -> bool:
    """
    Check the file that has the name of some bytes already, before new bytes get that name: it can
    be torn, if it was not flushed before a power cut. It is hashed unless it is trusted, and
    removed if it is wrong.

    :returns: whether the right bytes are there
    """
    assert manifest.digest is not None
    if cache.file(layout.data(manifest.digest)).stat() is None:
        return False
    if check_cached(cache, [manifest]).bad:
        discard(cache, manifest)
        return False
    return True


def make_durable(cache: Cache, chain: Sequence[Manifest]) -> None:
    """Flush those members of a chain to stable storage that a fetch left to the kernel."""
    for manifest in chain:
        assert manifest.digest is not None
        if cache.trust.is_flushed(manifest.digest) or cache.is_link(manifest.digest):
            continue
        with open_regular(cache.file(layout.data(manifest.digest))) as descriptor:
            os.fsync(descriptor)
            found = os.fstat(descriptor)
            if cache.trust.file_status(manifest.digest, found) is FileStatus.TRUSTED:
                cache.trust.record(
                    manifest.digest,
                    descriptor,
                    found,
                    flushed=True,
                    source=cache.trust.source(manifest.digest),
                )


def require_good(
    cache: Cache, chain: Sequence[Manifest], working: Path, progress: Progress = SILENT
) -> None:
    """
    Check the chain that backs a working image, before it backs a state permanently.

    :param chain: the chain in the cache that backs the image, tip first
    :raises DigestMismatch: a file of the chain does not hold what the guest should have seen below
        the image: a process has written to it
    """
    bad = check_cached(cache, chain, progress).bad
    if bad:
        raise DigestMismatch(
            f"{working} stands on {bad[0].id}, whose bytes in the cache {cache.root} have been"
            " changed or are gone: elsewhere its guest would see another disk",
            expected=str(bad[0].digest),
            object=bad[0].object,
            state=bad[0].state,
            path=str(cache.data(bad[0].digest)) if bad[0].digest is not None else None,
            hint=(
                "what the guest sees here can be kept as an image that stands alone:"
                f" qemu-img convert -f qcow2 -O qcow2 {shlex.quote(str(working))} NEW.qcow2;"
                f" then mend the cache: statepool get {bad[0].object} {bad[0].state}"
            ),
        )


def damaged(cache: Cache, manifest: Manifest) -> DigestMismatch:
    """
    :returns: the error for a damaged cached file: no source has the bytes, or no source was asked
    """
    offline = cache.settings.offline
    return DigestMismatch(
        f"the bytes of {manifest.id} in the cache {cache.root} are damaged or gone, and"
        f" {'no source was asked' if offline else 'no source has them'}",
        expected=str(manifest.digest),
        object=manifest.object,
        state=manifest.state,
        pool=str(cache.pool),
        hint=(
            f"a source may have them; without offline: statepool get {manifest.object}"
            f" {manifest.state}"
            if offline
            else (
                f"remove it, with all that stands on it: statepool unset {manifest.object}"
                f" {manifest.state} --cascade"
            )
        ),
    )
