"""
Reasons to refuse a change of a pool: names that are taken, and dependants, which keep the states
below them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

from statepool.errors import Conflict, DigestMismatch, HasDependants, NoSpace, NotFound
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.pools.fold import Fold, Remove, member_ids

SHORT = 4 << 10
"""Bytes of labels and other texts that every state may have."""

ROOM_FOR_TEXTS = 16 << 20
"""
Bytes of texts that all states of one machine with more than :data:`SHORT` may have together: a
checkpoint must hold them, with all else.
"""


def refuse_long_texts(location: Location, fold: Fold, manifest: Manifest) -> None:
    """
    Refuse a state whose texts are too long for the log.

    :raises NoSpace: with the labels and other texts of the state, no checkpoint could hold the fold
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
    :param pool: the name of the pool in the message
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
    :param where: where the bytes are, or come from; follows their name in the message
    :param promised: the expected digest, if not that of the manifest
    :param facts: the pool or the path
    :returns: the error that the bytes of a state do not have the digest in its manifest
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
    :param pool: the name of the pool in the message
    :param details: which content is in the pool, and which was given
    :returns: the error that a name exists with other content
    """
    message = f"{state} exists in {pool} with other content" + (f": {details}" if details else "")
    return Conflict(message, object=state.object, state=state.state, pool=str(pool), hint=hint)


def refuse_dependants(
    pool: Location, fold: Fold, ids: Iterable[StateId], besides: set[StateId], verb: str
) -> None:
    """
    Refuse to remove or replace states that have dependants.

    :param ids: the states to be removed or replaced
    :param besides: the states that are removed or changed together with them
    :param verb: the operation, for messages
    :raises HasDependants: the states have other dependants
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
    Refuse to put a nameless state with dependants on another parent.

    An unwritten child has the same bytes on any parent. If these bytes are kept for their
    dependants, they must stay on their parent: on another parent, all dependants would have other
    content.

    :raises HasDependants: the change would do that
    """
    held = fold.holding(manifest)
    if (
        held is None
        or held.parent_key == manifest.parent_key
        or held is fold.states.get(manifest.id)
    ):
        return  # the state that has the name is replaced, or refused, like other content under it
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
    Refuse to replace a member of a machine state alone: it is replaced together with the machine
    state, or not at all.

    :param old: the state to be replaced
    :param besides: the states that are replaced together with it
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
    """
    :returns: the removal of the RAM of a machine state that loses its RAM: it is of no use any more
    """
    ram = StateId(old.object, old.state, Kind.RAM)
    lost = "ram" in old.members and "ram" not in new.members and ram in fold.states
    return [Remove(ram, fold.states[ram].digest)] if lost else []
