"""
States for actors on a pool, and the files of a pool that has some of them: see
:mod:`tests.support.pool_worlds`.
"""

from __future__ import annotations

from collections.abc import Sequence

from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, Parent
from statepool.model.pieces import Pieces
from statepool.pools import layout
from statepool.pools.locks import NoLocks
from statepool.pools.pool import Pool
from tests.support.interleave import Direct, Files

OBJECT = "vm1/disk"


def digest_of(name: str) -> Digest:
    return Digest.of(name.encode())


def pieces_of(name: str) -> Pieces:
    return Pieces(bytes.fromhex(Digest.of_text(name).hex))


def state(name: str, data: str | None = None, parent: Manifest | None = None) -> Manifest:
    """:returns: a state whose bytes are those of ``data``, by default of its name"""
    below = (
        Parent(parent.state, parent.digest)
        if parent is not None and parent.digest is not None
        else None
    )
    return Manifest(OBJECT, name, size=1, digest=digest_of(data or name), parent=below)


P = state("P")
P2 = state("P", "P2")
C = state("C", parent=P)
C2 = state("C", "C2", parent=P)
D = state("D", parent=P)
E = state("E", parent=P)
F = state("F", parent=P)
D_AS_C = state("D", "C", parent=P)


def pool_with(
    *manifests: Manifest, leftover: Sequence[str] = (), symlinks: bool = False, renames: bool = True
) -> Files:
    """
    :param manifests: the states in it, parents first
    :param leftover: bytes that no record needs, as a removal leaves them
    :returns: the files of a pool
    """
    transport = Direct({}, symlinks=symlinks, renames=renames)
    nonces = iter(f"base{number}" for number in range(100))
    pool = Pool(transport, locks=NoLocks(), nonce=lambda: next(nonces), clock=lambda: 0.0)
    pool.create()
    for manifest in manifests:
        assert manifest.digest is not None
        staging = pool.stage([manifest.digest])
        transport.create(staging.path(manifest.digest), b"x")
        staging.list_pieces(manifest.digest, manifest.size, pieces_of(manifest.state))
        pool.publish([manifest], staging)
        staging.end()
    for name in leftover:
        transport.create(layout.data(digest_of(name)), b"x")
        if layout.has_pieces(digest_of(name), 1):
            transport.create(layout.list_of(layout.data(digest_of(name))), bytes(pieces_of(name)))
    return transport.files
