"""
Whether a cached chain can be used as it is: its files are there, and trusted, or hashed once more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from attrs import frozen

from statepool.beneath import Descriptor
from statepool.errors import DigestMismatch, IntegrityError
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.model.outcomes import Verified
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.qcow2.files import open_regular
from statepool.transfer.cache import Cache
from statepool.transfer.trust import Standing
from statepool.transports.copying import hash_file


@frozen
class Readiness:
    """
    What is to be said of a cached chain.

    :param verified: what stands behind the bytes that are good
    :param bad: members whose bytes are gone or are not what they should be
    """

    verified: Verified
    bad: tuple[Manifest, ...] = ()


def examine(cache: Cache, chain: Sequence[Manifest], progress: Progress = SILENT) -> Readiness:
    """
    Look at the files of a chain, and hash those that are not trusted.

    :param chain: of the cache, tip first
    """
    verified = Verified.TRUSTED
    bad = []
    for manifest in chain:
        assert manifest.digest is not None
        standing = cache.trust.standing(manifest.digest, cache.status(manifest.digest))
        if standing is Standing.MISSING and not cache.is_link(manifest.digest) and cache.pool.has_bytes(manifest.digest):
            standing = Standing.DOUBTFUL
        if standing is Standing.DOUBTFUL:
            verified = Verified.REHASHED
            if not rehash(cache, manifest, progress):
                standing = Standing.MISSING
        if standing is Standing.MISSING:
            bad.append(manifest)
    return Readiness(verified, tuple(bad))


def actual_digest(cache: Cache, manifest: Manifest, progress: Progress = SILENT) -> Digest:
    """
    :returns: the digest of a cached file as it is now
    :raises IntegrityError: it is no regular file, or not as long as it should be
    :raises MissingFile: it is not there
    """
    assert manifest.digest is not None
    # Another process may just be looking whether anybody has it open: that is waited for.
    descriptor = open_regular(cache.bytes(manifest.digest) or cache.file(layout.data(manifest.digest)))
    try:
        size = os.fstat(descriptor).st_size
        if size != manifest.size:
            raise IntegrityError(
                f"the bytes of {manifest.id} in {cache.root} are {size} long, not {manifest.size}",
                object=manifest.object,
                state=manifest.state,
                path=str(cache.data(manifest.digest)),
            )
        progress.begin(f"check {manifest.id}", size)
        try:
            return hash_file(descriptor, size, algorithm=manifest.digest.algorithm, progress=progress)
        finally:
            progress.end()
    finally:
        os.close(descriptor)


def rehash(cache: Cache, manifest: Manifest, progress: Progress = SILENT) -> bool:
    """
    Hash a cached file once more, and trust it again if it is what it should be.

    :returns: whether it is
    """
    assert manifest.digest is not None
    try:
        if actual_digest(cache, manifest, progress) != manifest.digest:
            return False
    except (IntegrityError, FileNotFoundError):
        return False
    source = cache.trust.source(manifest.digest)
    try:
        cache.sign(manifest.digest, flushed=False, source=source)
    except OSError as error:
        # Somebody else's cache, or a full disk: what is right is right, and is hashed again by the next one who asks.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
    return True


def discard(cache: Cache, manifest: Manifest) -> None:
    """Take away a file that does not hold what its name says, or a link that leads nowhere, so that the right bytes can take its place."""
    assert manifest.digest is not None
    cache.pool.transport.remove(layout.data(manifest.digest))
    cache.trust.forget(manifest.digest)


def clear_place(cache: Cache, manifest: Manifest) -> bool:
    """
    Before bytes get their name: what lies under it already can be torn, if it came without a flush before a power cut. It is hashed unless it is
    trusted, and taken away if it is wrong.

    :returns: whether the right bytes are there
    """
    assert manifest.digest is not None
    if cache.file(layout.data(manifest.digest)).stat() is None:
        return False
    if examine(cache, [manifest]).bad:
        discard(cache, manifest)
        return False
    return True


def make_durable(cache: Cache, chain: Sequence[Manifest]) -> None:
    """Bring the bytes of a chain to stable storage, those of its members that a fetch left to the kernel."""
    for manifest in chain:
        assert manifest.digest is not None
        if cache.trust.is_flushed(manifest.digest) or cache.is_link(manifest.digest):
            continue
        with Descriptor(open_regular(cache.file(layout.data(manifest.digest)))) as descriptor:
            os.fsync(descriptor)
            if cache.trust.standing(manifest.digest, os.fstat(descriptor)) is Standing.TRUSTED:
                cache.trust.record(manifest.digest, descriptor, flushed=True, source=cache.trust.source(manifest.digest))


def damaged(cache: Cache, manifest: Manifest) -> DigestMismatch:
    """:returns: the error for a cached file that no source can mend, or was asked to"""
    offline = cache.settings.offline
    return DigestMismatch(
        f"the bytes of {manifest.id} in the cache {cache.root} are damaged or gone, and {'no source was asked' if offline else 'no source has them'}",
        expected=str(manifest.digest),
        object=manifest.object,
        state=manifest.state,
        pool=str(cache.pool),
        hint=f"a source may have them; without offline: statepool get {manifest.object} {manifest.state}"
        if offline
        else f"remove it, with all that stands on it: statepool unset {manifest.object} {manifest.state} --cascade",
    )
