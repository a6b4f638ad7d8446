"""
Whether sources that offer a state mean the same by its name.

A name means one content, so two sources with different content under it cannot both be right. Where the log of one shows that it had the other's
content before, and replaced it, the other one has simply not noticed yet. Where nothing shows that, nobody but the user can say who is right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from attrs import frozen

from statepool.errors import Conflict
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.pools.fold import Publish
from statepool.pools.pool import Pool
from statepool.transfer.offers import Offer


@frozen
class Agreed:
    """
    What sources have in common.

    :param offers: of the same content, those whose bytes a log vouches for first, else in the order given
    :param warnings: which sources have something older
    """

    offers: tuple[Offer, ...]
    warnings: tuple[str, ...] = ()


def agree(wanted: StateId, offers: Sequence[Offer]) -> Agreed:
    """
    :param offers: at least one, best first
    :raises Conflict: they have different content, and nothing shows which is the newer one
    """
    vouched = [offer for offer in offers if offer.managed]
    others = tuple(offer for offer in offers if not offer.managed)
    groups: list[list[Offer]] = []
    for offer in vouched:
        group = next((group for group in groups if difference(group[0], offer) is None), None)
        if group is None:
            groups.append([offer])
        else:
            group.append(offer)
    if len(groups) < 2:
        return Agreed((*vouched, *others))
    newest = [group for group in groups if all(_replaced(group, other) and not _replaced(other, group) for other in groups if other is not group)]
    if len(newest) != 1:
        raise _disagreement(wanted, [group[0] for group in groups])
    (group,) = newest
    warnings = (f"{offer.source} has older content of {wanted}, which {group[0].source} has replaced" for offer in vouched if offer not in group)
    return Agreed((*group, *others), tuple(warnings))


def difference(one: Offer, other: Offer) -> tuple[Manifest, Manifest] | None:
    """:returns: the uppermost members in which two offered chains differ; None if they are the same, or nobody knows"""
    for mine, yours in zip(one.members, other.members, strict=False):
        if mine.manifest.id != yours.manifest.id or not is_same(mine.manifest, yours.manifest):
            return mine.manifest, yours.manifest
    return None if len(one.members) == len(other.members) else (one.members[-1].manifest, other.members[-1].manifest)


def content_of(manifest: Manifest) -> Digest | None:
    """:returns: what stands for the content of a state: its digest, or for a machine state, which has no bytes of its own, one of what it lists"""
    if manifest.kind is Kind.MACHINE:
        return Digest.of(json.dumps(sorted((name, str(digest)) for name, digest in manifest.members.items())).encode())
    return manifest.digest


def is_same(one: Manifest, other: Manifest) -> bool:
    """:returns: whether two manifests speak of the same bytes, before either was rewritten for its place; true if nobody has hashed one of them"""
    mine, yours = _digests(one), _digests(other)
    return not mine or not yours or bool(mine & yours)


def _digests(manifest: Manifest) -> set[Digest]:
    return {digest for digest in (manifest.digest, manifest.origin) if digest is not None}


def _replaced(group: list[Offer], other: list[Offer]) -> bool:
    """Whether the log of a source in one group shows that it had what those in the other one have."""
    different = difference(group[0], other[0])
    if different is None or different[0].id != different[1].id:
        return False
    old = different[1]
    return any(_had(offer.source.pool, old.id, _digests(old)) for offer in group)


def _had(pool: Pool, state: StateId, digests: set[Digest]) -> bool:
    for record in pool.log(state.machine).records():
        for change in record.changes:
            if change.id != state:
                continue
            before = {change.supersedes} | _digests(change.manifest) if isinstance(change, Publish) else {change.digest}
            if before & digests:
                return True
    return False


def _disagreement(wanted: StateId, offers: list[Offer]) -> Conflict:
    first = offers[0]
    different = next(pair for pair in (difference(first, offer) for offer in offers[1:]) if pair is not None)
    what = different[0].id
    contents = ", ".join(f"{offer.source} has {_content(offer, what)}" for offer in offers)
    names = " or ".join(f"--from {offer.source.name}" for offer in offers)
    below = "" if what == wanted else f", in {what.state} below it"
    return Conflict(
        f"the sources disagree about {wanted}{below}: {contents}",
        object=wanted.object,
        state=wanted.state,
        hint=f"say which one is right with {names}, and unset it in the other",
    )


def _content(offer: Offer, what: StateId) -> str:
    return next((str(member.manifest.digest) for member in offer.members if member.manifest.id == what), "none")
