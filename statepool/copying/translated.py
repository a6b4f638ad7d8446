"""A source's manifest in the terms of the cache, which may have rewritten the bytes."""

from __future__ import annotations

from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, Parent
from statepool.qcow2.header import Header
from statepool.transports.reading import Extent


def is_on(header: Header | None, parent: Manifest | None) -> bool:
    """
    Tell whether an image already has the backing name that it needs, so that its bytes can stay as
    they are.
    """
    return header is None or parent is None or header.backing_name == parent.file_name.encode()


def stands_on(cached: Manifest, parent: Manifest | None) -> bool:
    """
    Tell whether a cached state names the parent that the cache has. The same bytes can have been
    rewritten over another copy of their parent.
    """
    if cached.parent is None or parent is None:
        return cached.parent is None and parent is None
    return cached.parent.state == parent.state and cached.parent.digest == parent.digest


def translated(
    promised: Manifest,
    header: Header | None,
    parent: Manifest | None,
    digest: Digest,
    origin: Digest,
    size: int,
    extents: tuple[Extent, ...] = (),
) -> Manifest:
    """
    Return a source's manifest in the terms of the cache.

    :param origin: the digest of the bytes that were fetched; if it differs from ``digest``, they
        were rewritten here
    :param extents: the extents of our own copy; none for a file that is only linked
    """
    assert parent is None or parent.digest is not None
    return promised.derived(
        size=size,
        digest=digest,
        origin=origin if digest != origin else None,
        parent=(
            Parent(parent.state, parent.digest)
            if parent is not None and parent.digest is not None
            else None
        ),
        virtual_size=header.virtual_size if header is not None else 0,
        cluster_size=header.cluster_size if header is not None else 0,
        extents=extents,
    )
