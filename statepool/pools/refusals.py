"""
What a change of a pool is refused for: names that are taken, and states that stand on others, which
keep them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

from statepool.errors import Conflict, DigestMismatch, HasDependants, NoSpace, NotFound
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.pools.fold import Fold, Remove, member_ids

SHORT = 4 << 10
"""Bytes of labels and other texts that any state may have."""

ROOM_FOR_TEXTS = 16 << 20
"""
Bytes that those of all states of one machine with more than that may have together: with all else,
a checkpoint must hold them.
"""


def refuse_long_texts(location: Location, fold: Fold, manifest: Manifest) -> None:
    """
    :raises NoSpace: the labels and other texts of a state would fill the log, so that no checkpoint
        could hold it
    """
    length = manifest.text_size
    if length <= SHORT:
        return
    others = sum(
        size for one in fold.manifests if one.id != manifest.id and (size := one.text_size) > SHORT
    )
    if length + others > ROOM_FOR_TEXTS:
        raise NoSpace(
            f"the labels of {manifest.id} take {length} bytes, and those of other states {others}: "
            f"the log of {fold.machine} in {location} has no room for more than {ROOM_FOR_TEXTS}",
            object=manifest.object,
            state=manifest.state,
            pool=str(location),
            hint=(
                "remove states with long labels; of a state that comes from a source, name another"
                " one with --from"
            ),
        )


def absent(state: StateId, pool: object) -> NotFound:
    """
    :param pool: as it is called in messages
    :returns: the error that a pool does not have a state
    """
    return NotFound(
        f"there is no state {state.state} of {state.object} in {pool}",
        object=state.object,
        state=state.state,
        pool=str(pool),
        hint=f"statepool show {state.object} lists what is there",
    )


def mismatched(
    manifest: Manifest,
    actual: Digest,
    where: str,
    *,
    hint: str,
    promised: Digest | None = None,
    **facts: str,
) -> DigestMismatch:
    """
    :param actual: the digest of the bytes
    :param where: they are, or come from, behind their name in the message
    :param promised: what it should be, if not that of the manifest
    :param facts: the pool or the path
    :returns: the error that the bytes of a state are not what its manifest promises
    """
    promised = promised or manifest.digest
    return DigestMismatch(
        f"the bytes of {manifest.id} {where} are {actual}, not {promised}",
        expected=str(promised),
        actual=str(actual),
        object=manifest.object,
        state=manifest.state,
        hint=hint,
        **facts,
    )


def taken(
    state: StateId,
    pool: object,
    details: str = "",
    hint: str = "choose another name, or have it replaced with --replace",
) -> Conflict:
    """
    :param pool: as it is called in messages
    :param details: which content is there, and which here
    :returns: the error that a name exists with other content
    """
    message = f"{state} exists in {pool} with other content" + (f": {details}" if details else "")
    return Conflict(message, object=state.object, state=state.state, pool=str(pool), hint=hint)


def refuse_dependants(
    pool: Location, fold: Fold, ids: Iterable[StateId], besides: set[StateId], verb: str
) -> None:
    """
    :param ids: what is to be removed or replaced
    :param besides: what goes or changes together with it
    :param verb: what is to be done, for messages
    :raises HasDependants: something else stands on it
    """
    wanted = list(ids)
    dependants = [state for state in fold.dependants(wanted) if state not in besides]
    if dependants:
        raise HasDependants(
            f"{wanted[0]} in {pool} cannot be {verb}: {', '.join(map(str, dependants))} depend"
            " on it",
            dependants=[str(state) for state in dependants],
            object=wanted[0].object,
            state=wanted[0].state,
            pool=str(pool),
            hint=f"remove them first, or unset {wanted[0].state} with --cascade",
        )


def refuse_moved(pool: Location, fold: Fold, manifest: Manifest) -> None:
    """
    A child that nobody wrote to has the same bytes on any parent. Where they are kept for the sake
    of those on them, they stay on the parent they have: on another one, all that stands on them
    would have another content.

    :raises HasDependants: it would be so
    """
    held = fold.holding(manifest)
    if (
        held is None
        or held.parent_key == manifest.parent_key
        or held is fold.states.get(manifest.id)
    ):
        return  # what has the name is replaced, or refused, like any other content under it
    if not (standing := fold.standing_on(held)):
        return
    raise HasDependants(
        f"{manifest.id} in {pool} cannot be put on another parent: {', '.join(map(str, standing))}"
        " stand on the same bytes above the old one",
        dependants=[str(state) for state in standing],
        object=manifest.object,
        state=manifest.state,
        pool=str(pool),
        hint="remove them first",
    )


def refuse_listed(pool: Location, fold: Fold, old: Manifest, besides: set[StateId]) -> None:
    """
    What a machine state lists is replaced together with it, or not at all.

    :param old: what is to be replaced
    :param besides: what is replaced together with it
    :raises HasDependants: a machine state lists it
    """
    machine = StateId(old.id.machine, old.state, Kind.MACHINE)
    if (
        machine in fold.states
        and machine not in besides
        and old.id in member_ids(fold.states[machine])
    ):
        raise HasDependants(
            f"{old.id} in {pool} cannot be replaced alone: {machine} lists it",
            dependants=[str(machine)],
            object=old.object,
            state=old.state,
            pool=str(pool),
            hint=f"get or set {machine}, or remove that first",
        )


def lost_ram(fold: Fold, old: Manifest, new: Manifest) -> list[Remove]:
    """:returns: what removes the RAM of a machine state that has none any more: it is of no use"""
    ram = StateId(old.object, old.state, Kind.RAM)
    lost = "ram" in old.members and "ram" not in new.members and ram in fold.states
    return [Remove(ram, fold.states[ram].digest)] if lost else []
