"""
The common parts of image backends: the state that a target and a name mean in a pool, and the
results of operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from statepool.backends.base import Target
from statepool.copying.fetch import Fetch, Fetched
from statepool.errors import UsageError
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, StateId
from statepool.model.names import check_state_name
from statepool.model.objects import Image
from statepool.model.outcomes import GetResult, Verified
from statepool.sources.source import RemoteChain


def image_state(target: Target, state: str) -> StateId:
    """
    :returns: the state that a target and a state's name mean
    :raises InvalidName: no state can have this name
    :raises UsageError: the target is a machine
    """
    if not isinstance(target.object, Image):
        raise UsageError(
            f"{target.object} is a machine, and this backend keeps states of images",
            hint=f"name an image: {target.object}/disk",
        )
    return StateId(str(target.object), check_state_name(state))


def digests_of(manifests: Iterable[Manifest]) -> set[Digest]:
    """:returns: the digests of the bytes of some states"""
    return {manifest.digest for manifest in manifests if manifest.digest is not None}


def cached(chain: tuple[Manifest, ...], verified: Verified) -> GetResult:
    """:returns: the result if the whole chain was in the cache"""
    tip = chain[0]
    return GetResult(
        object=tip.object,
        state=tip.state,
        chain=tuple(link.state for link in chain),
        digest=str(tip.digest),
        verified=verified,
    )


def got(offer: RemoteChain, fetched: Fetched, working: Path | None = None) -> GetResult:
    """:returns: the result of a fetch"""
    tip = fetched.chain[0]
    return GetResult(
        object=tip.object,
        state=tip.state,
        chain=tuple(manifest.state for manifest in fetched.chain),
        digest=str(tip.digest),
        source=str(offer.source) if fetched.how != "none" else None,
        bytes=fetched.bytes,
        verified=fetched.verified,
        working=working,
        how=fetched.how,
        resumed=fetched.resumed,
        again=fetched.again,
    )


def planned(offer: RemoteChain, fetch: Fetch) -> GetResult:
    """:returns: the result that a fetch would have"""
    missing = fetch.missing()
    tip = offer.members[0].manifest
    return GetResult(
        object=tip.object,
        state=tip.state,
        chain=tuple(member.manifest.state for member in offer.members),
        digest=str(tip.digest) if tip.digest is not None else "",
        source=str(offer.source) if missing else None,
        bytes=sum(member.manifest.data_size for member in missing),
        how="copy" if missing else "none",
    )
