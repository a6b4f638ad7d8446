"""
Reconciliation of the sources that offer a state: whether they mean the same content by its name.

A name means one content, so two sources with different content under it cannot both be right. The
configuration says which of them is right; otherwise only the user can decide. A log vouches for
itself only: what it says of its own past, or of the bytes of other pools, proves nothing. A log can
only give way: an ``origin`` admits that the bytes were rewritten from other bytes, so those other
bytes are the state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from attrs import evolve, frozen

from statepool.errors import Conflict
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.sources.source import RemoteChain


@frozen
class Reconciled:
    """
    The sources that agree.

    :param offers: offers of the same content; first those for whose bytes a log vouches, otherwise
        in the given order
    :param warnings: which sources have other content than the authority
    """

    offers: tuple[RemoteChain, ...]
    warnings: tuple[str, ...] = ()


def reconcile(wanted: StateId, offers: Sequence[RemoteChain]) -> Reconciled:
    """
    :param offers: at least one, best first
    :raises Conflict: the sources have different content, and the configuration does not say which
        source is right
    """
    vouched = [offer for offer in offers if offer.managed]
    others = [offer for offer in offers if not offer.managed]
    groups: list[list[RemoteChain]] = []
    for offer in vouched:
        group = next((group for group in groups if difference(group[0], offer) is None), None)
        if group is None:
            groups.append([offer])
        else:
            group.append(offer)
    if len(groups) < 2:
        return Reconciled((*vouched, *_held_to(others, vouched)))
    ruling = [group for group in groups if any(offer.source.authority for offer in group)]
    standing = _not_giving_way(ruling or groups)
    if len(standing) != 1:
        raise _disagreement(wanted, [group[0] for group in standing])
    (group,) = standing
    different = [
        offer for offer in vouched if offer not in group and not _gives_way(offer, group[0])
    ]
    authority = next((offer.source for offer in group if offer.source.authority), None)
    warnings = (
        f"{offer.source} has other content of {wanted} than {authority}, which is the authority"
        for offer in different
    )
    return Reconciled((*group, *_held_to(others, group)), tuple(warnings))


def _held_to(others: list[RemoteChain], vouched: list[RemoteChain]) -> list[RemoteChain]:
    """
    :returns: those offers of unmanaged files that can have the content for which a log vouches;
        each is given the digests that its files must then have
    """
    if not vouched:
        return others
    names = [member.manifest.id for member in vouched[0].members]
    digests = [member.manifest.digest for member in vouched[0].members]
    return [
        evolve(
            offer,
            members=tuple(
                evolve(member, manifest=evolve(member.manifest, digest=digest))
                for member, digest in zip(offer.members, digests, strict=True)
            ),
        )
        for offer in others
        if [member.manifest.id for member in offer.members] == names
    ]


def _not_giving_way(groups: list[list[RemoteChain]]) -> list[list[RemoteChain]]:
    """
    :returns: the groups that do not give way to another group; all groups, if each gives way to
        another one
    """
    standing = [
        group
        for group in groups
        if not any(
            _gives_way(group[0], other[0]) and not _gives_way(other[0], group[0])
            for other in groups
            if other is not group
        )
    ]
    return standing or groups


def _gives_way(one: RemoteChain, other: RemoteChain) -> bool:
    """
    Return whether the log of one source itself says that its chain was rewritten from the chain of
    the other source.
    """
    mine, yours = (
        [member.manifest for member in one.members],
        [member.manifest for member in other.members],
    )
    return (
        len(mine) == len(yours)
        and all(_is_derived(here, there) for here, there in zip(mine, yours, strict=True))
        and any(here.digest != there.digest for here, there in zip(mine, yours, strict=True))
    )


def _is_derived(here: Manifest, there: Manifest) -> bool:
    return here.id == there.id and (
        here.digest == there.digest or (here.origin is not None and here.origin == there.digest)
    )


def difference(one: RemoteChain, other: RemoteChain) -> tuple[Manifest, Manifest] | None:
    """
    :returns: the uppermost members in which two offered chains differ; None if the chains are the
        same, or it is unknown
    """
    for mine, yours in zip(one.members, other.members, strict=False):
        if mine.manifest.id != yours.manifest.id or not is_same(mine.manifest, yours.manifest):
            return mine.manifest, yours.manifest
    return (
        None
        if len(one.members) == len(other.members)
        else (one.members[-1].manifest, other.members[-1].manifest)
    )


def content_of(manifest: Manifest) -> Digest | None:
    """
    :returns: a digest for the content of a state: its own digest; or for a machine state, which has
        no bytes of its own, a digest of its list of members
    """
    if manifest.kind is Kind.MACHINE:
        return Digest.of_text(
            json.dumps(sorted((name, str(digest)) for name, digest in manifest.members.items()))
        )
    return manifest.digest


def is_same(one: Manifest, other: Manifest) -> bool:
    """
    :returns: whether two manifests of sources describe the same bytes; also True if a manifest has
        no digest, since the state has no bytes or they were not hashed
    """
    return one.digest is None or other.digest is None or one.digest == other.digest


def _disagreement(wanted: StateId, offers: list[RemoteChain]) -> Conflict:
    first = offers[0]
    different = next(
        pair for pair in (difference(first, offer) for offer in offers[1:]) if pair is not None
    )
    what = different[0].id
    contents = ", ".join(f"{offer.source} has {_content(offer, what)}" for offer in offers)
    names = " or ".join(f"--from {offer.source.name}" for offer in offers)
    below = "" if what == wanted else f", in {what.state} below it"
    return Conflict(
        f"the sources disagree about {wanted}{below}: {contents}",
        object=wanted.object,
        state=wanted.state,
        hint=(
            f"say which one is right with {names}, and unset it in the other; or for all states,"
            " with authority = true for one source"
        ),
    )


def _content(offer: RemoteChain, what: StateId) -> str:
    return next(
        (str(member.manifest.digest) for member in offer.members if member.manifest.id == what),
        "none",
    )
