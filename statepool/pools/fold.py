"""
The fold: the states of one machine, as the result of its records in their order.

A fold is strict: a record that could not have been written by the rules is an error. A reader that
continued after it would have to guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from attrs import frozen

from statepool.errors import BadRecord
from statepool.model.digest import Digest
from statepool.model.manifest import Key, Kind, Manifest, Parent, StateId
from statepool.model.settings import DEEPEST
from statepool.pools.lineage import (
    MOST_IN_CHAIN,
    depths_of_all,
    depths_of_new,
    its_own_ancestor,
    standing_on,
)


@frozen
class Publish:
    """
    The publication of a state.

    :param manifest: the manifest of the state
    :param supersedes: in a cache: the digest that the name had. The old state stays without a name,
        for as long as it has a child.
    """

    manifest: Manifest
    supersedes: Digest | None = None

    @property
    def id(self) -> StateId:
        """The state."""
        return self.manifest.id

    def to_json(self) -> dict[str, Any]:
        """:returns: the form in a record"""
        data: dict[str, Any] = {"publish": self.manifest.to_json()}
        if self.supersedes:
            data["supersedes"] = str(self.supersedes)
        return data

    def __str__(self) -> str:
        digest = f" as {self.manifest.digest.short}" if self.manifest.digest else ""
        return f"publish {self.manifest.id}{digest}" + (
            " instead of " + self.supersedes.short if self.supersedes else ""
        )


@frozen
class Remove:
    """
    The removal of a state.

    :param id: the state
    :param digest: the digest that it had; None for a machine state
    """

    id: StateId
    digest: Digest | None

    def to_json(self) -> dict[str, Any]:
        """:returns: the form in a record"""
        data = {"object": self.id.object, "state": self.id.state, "kind": str(self.id.kind)}
        if self.digest:
            data["digest"] = str(self.digest)
        return {"remove": data}

    def __str__(self) -> str:
        return f"remove {self.id}"


Change = Publish | Remove


class Fold:
    """
    The states of one machine after a number of records.

    Immutable for its readers; :meth:`after` returns the next fold.

    :param machine: the id of the machine
    """

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.number = 0
        self.nonces: dict[int, str] = {}
        self._states: dict[StateId, Manifest] = {}
        self._present: dict[Key, Manifest] = {}
        self._children: dict[Key, int] = {}
        # Kept so that no query has to walk a chain: the length of the chain of each present state;
        # and for each name how many states stay without it, with a lower bound for the length of
        # their chains.
        self._depths: dict[Key, int] = {}
        self._nameless: dict[StateId, tuple[int, int]] = {}

    # -- reading -----------------------------------------------------------------------------------

    @property
    def states(self) -> Mapping[StateId, Manifest]:
        """The states under their names."""
        return MappingProxyType(self._states)

    @classmethod
    def restore(
        cls,
        machine: str,
        number: int,
        nonces: dict[int, str],
        states: Iterable[Manifest],
        superseded: Iterable[Manifest],
    ) -> Fold:
        """
        :returns: the fold that a checkpoint describes
        :raises BadRecord: it breaks a rule that every record has to keep, so no records can have
            this result
        """
        fold = cls(machine)
        fold.number = number
        fold.nonces = nonces
        present, children, depths = fold._present, fold._children, fold._depths
        nameless, machines = list(superseded), []
        for manifest in nameless:
            fold._hold_nameless(manifest)
        # If each name occurs once, and each state comes after its parent, as we mostly write them,
        # no chain can contain a name twice.
        surely_good = not present
        for manifest in states:
            key, below = manifest.key, manifest.parent_key
            if fold._states.setdefault(manifest.id, manifest) is not manifest or key in present:
                raise fold._is_twice(manifest)
            if below is not None:
                children[below] = children.get(below, 0) + 1
            if key is None:
                machines.append(manifest)
                continue
            present[key] = manifest
            if surely_good:
                depth = depths[key] = 1 + (
                    depths.get(below, MOST_IN_CHAIN) if below is not None else 0
                )
                surely_good = depth <= MOST_IN_CHAIN
        fold._check_restored(machines)
        if not surely_good:
            fold._depths = depths_of_all(present, f"the checkpoint {number} of {machine}")
        for manifest in nameless:
            fold._unname(manifest)
        for manifest in machines:
            fold._check_members(manifest, f"the checkpoint {number}")
        return fold

    def _hold_nameless(self, manifest: Manifest) -> None:
        if manifest.key is None:
            raise BadRecord(
                f"the checkpoint {self.number} of {self.machine} keeps {manifest.id}, which has no"
                " bytes, without its name",
                object=self.machine,
            )
        if manifest.key in self._present:
            raise self._is_twice(manifest)
        self._hold(manifest)

    def _check_restored(self, machines: Iterable[Manifest]) -> None:
        # By the keys, and not by other attributes: many manifests were read together, and access to
        # any other attribute takes a manifest apart.
        for subject in {key[0] for key in self._present}.union(
            manifest.object for manifest in machines
        ):
            if StateId(subject, "").machine != self.machine:
                raise BadRecord(
                    f"the checkpoint {self.number} of {self.machine} speaks of {subject}",
                    object=self.machine,
                )
        if any(key not in self._present for key in self._children):
            raise BadRecord(
                f"the checkpoint {self.number} of {self.machine} lists a state without its parent",
                object=self.machine,
            )

    def _is_twice(self, manifest: Manifest) -> BadRecord:
        return BadRecord(
            f"the checkpoint {self.number} of {self.machine} lists {manifest.id} twice",
            object=self.machine,
        )

    def _hold(self, manifest: Manifest) -> None:
        if (key := manifest.key) is not None:
            self._present[key] = manifest
        if (below := manifest.parent_key) is not None:
            self._children[below] = self._children.get(below, 0) + 1

    def _unname(self, manifest: Manifest) -> None:
        """
        Note that a state stays without its name: a state that gets the name later can have it in
        its chain.
        """
        assert manifest.key is not None
        depth = self._depths[manifest.key]
        count, lowest = self._nameless.get(manifest.id, (0, depth))
        self._nameless[manifest.id] = (count + 1, min(lowest, depth))

    def _forget_nameless(self, state: StateId) -> None:
        count, lowest = self._nameless.pop(state)
        if count > 1:
            self._nameless[state] = (count - 1, lowest)

    @property
    def superseded(self) -> list[Manifest]:
        """States without a name, which other states are still backed by."""
        return [
            manifest
            for manifest in self._present.values()
            if self._states.get(manifest.id) is not manifest
        ]

    @property
    def manifests(self) -> Iterable[Manifest]:
        """All states, with and without a name."""
        yield from self._present.values()
        yield from (manifest for manifest in self._states.values() if manifest.digest is None)

    @property
    def digests(self) -> set[Digest]:
        """The digests of all needed bytes."""
        return {digest for _, _, digest in self._present}

    def parent_of(self, manifest: Manifest) -> Manifest | None:
        """:returns: the state that backs a state of this fold, or None"""
        below = manifest.parent_key
        return self._present[below] if below is not None else None

    def find(self, object: str, parent: Parent) -> Manifest | None:
        """
        :returns: the state, with or without a name, that ``parent`` means for a state of ``object``
        """
        return self._present.get((object, parent.state, parent.digest))

    def find_content(self, state: StateId, digest: Digest) -> Manifest | None:
        """
        :returns: the state of this id, with or without the name, that has these bytes; in a cache
            also a state that was rewritten from them
        """
        exact = self._present.get((state.object, state.state, digest))
        if exact is not None:
            return exact
        return next(
            (
                manifest
                for manifest in self._present.values()
                if manifest.id == state and manifest.origin == digest
            ),
            None,
        )

    def has_children(self, manifest: Manifest) -> bool:
        """:returns: whether this state has a child, with or without a name"""
        key = manifest.key
        return key is not None and bool(self._children.get(key))

    def chain(self, manifest: Manifest) -> tuple[Manifest, ...]:
        """:returns: a state of this fold with all that backs it, tip first"""
        return tuple(self._walk(manifest))

    def _walk(self, manifest: Manifest | None) -> Iterator[Manifest]:
        while manifest is not None:
            yield manifest
            manifest = self.parent_of(manifest)

    def depth(self, manifest: Manifest) -> int:
        """:returns: the number of states in the chain of a state of this fold"""
        return self._depths[manifest.key] if manifest.key is not None else 1

    def tips_first(self) -> list[Manifest]:
        """
        :returns: all states that have bytes, with and without a name, each before what backs it
        """
        return sorted(self._present.values(), key=self.depth, reverse=True)

    def is_named(self, manifest: Manifest) -> bool:
        """:returns: whether the name of a state currently means this manifest"""
        return self._states.get(manifest.id) is manifest

    def machine_listing(self, state: StateId) -> StateId | None:
        """
        :returns: the machine state that lists a state, or None; only the machine state of the same
            name can
        """
        machine = StateId(self.machine, state.state, Kind.MACHINE)
        manifest = self._states.get(machine) if state.kind is not Kind.MACHINE else None
        return machine if manifest is not None and member_name(state) in manifest.members else None

    def has_below(self, tip: Manifest, state: StateId) -> bool:
        """:returns: whether the chain of ``tip`` contains a state that has this name, or had it"""
        named = self._states.get(state)
        depths = [self.depth(named)] if named is not None else []
        depths += [self._nameless[state][1]] if state in self._nameless else []
        return bool(depths) and self._is_in_chain(tip.key, state, min(depths))

    def _is_in_chain(self, key: Key | None, state: StateId, lowest: int) -> bool:
        """:param lowest: a lower bound for the length of the chains of states of this name"""
        for _ in range(DEEPEST):
            if key is None or self._depths[key] < lowest:
                return False
            if key[1] == state.state:
                return True
            key = self._present[key].parent_key
        raise BadRecord(
            f"a log of {self.machine} uses the name of {state} again above more states than any"
            " writer may",
            object=self.machine,
        )

    def dependants(self, ids: Iterable[StateId]) -> list[StateId]:
        """
        :returns: the dependants of any of these: the named states above them, and the machine
            states that list any of them; tips first
        """
        gone = {state for state in ids if state in self._states}
        above = self._above([self._states[state] for state in gone])
        found = sorted(
            sorted(state for state in map(_id, above) if state not in gone),
            key=self._depth,
            reverse=True,
        )
        listing = (self.machine_listing(state) for state in (*gone, *found))
        machines = {machine for machine in listing if machine is not None} - gone
        return sorted(machines) + found

    def _above(self, manifests: Iterable[Manifest]) -> list[Manifest]:
        """:returns: the named states that are backed by any of these, directly or not"""
        keys = [
            manifest.key
            for manifest in manifests
            if manifest.key is not None and self.has_children(manifest)
        ]
        return (
            [manifest for manifest in standing_on(keys, self._present) if self.is_named(manifest)]
            if keys
            else []
        )

    def are_free(self, ids: Sequence[StateId]) -> bool:
        """:returns: whether these states have no dependants other than themselves"""
        return set(self.dependants(ids)) <= set(ids)

    def holds(self, manifest: Manifest) -> bool:
        """:returns: whether the publication of a state would change nothing that matters"""
        old = self._states.get(manifest.id)
        return (
            old is not None
            and old.digest == manifest.digest
            and old.parent == manifest.parent
            and dict(old.members) == dict(manifest.members)
        )

    def standing_on(self, manifest: Manifest) -> list[StateId]:
        """
        :returns: the named states that are backed by exactly this state, which may have lost its
            name
        """
        return sorted(map(_id, self._above([manifest])))

    def _depth(self, state: StateId) -> int:
        return self.depth(self._states[state])

    # -- writing -----------------------------------------------------------------------------------

    def after(self, number: int, nonce: str, changes: Iterable[Change]) -> Fold:
        """
        :returns: the fold after one more record
        :raises BadRecord: the record breaks a rule
        """
        result = self.copy()
        result.apply(number, nonce, changes)
        return result

    def copy(self) -> Fold:
        """:returns: an independent copy"""
        result = Fold(self.machine)
        result.number = self.number
        result.nonces = dict(self.nonces)
        result._states = dict(self._states)
        result._present = dict(self._present)
        result._children = dict(self._children)
        result._depths = dict(self._depths)
        result._nameless = dict(self._nameless)
        return result

    def apply(self, number: int, nonce: str, changes: Iterable[Change]) -> None:
        """
        Apply one more record in place, as :meth:`after`: for a caller that owns this fold and
        discards it on an error.
        """
        published: list[Manifest] = []
        removed: dict[int, Manifest] = {}
        moved: list[Manifest] = []
        for change in changes:
            if isinstance(change, Publish):
                old = self._publish(change, number, removed, moved)
                published.append(change.manifest)
            else:
                old = self._remove(change, number)
            if old is not None:
                removed[id(old)] = old
        self._check_published(published, removed.values(), number)
        self._drop(list(removed.values()), number)
        for manifest in moved:
            if self.has_children(manifest):
                raise BadRecord(
                    f"record {number} of {self.machine} puts {manifest.id} on another parent under"
                    " those that stand on it",
                    object=self.machine,
                )
        self.number = number
        self.nonces[number] = nonce
        self.nonces.pop(number - KEEP_NONCES, None)

    def holding(self, manifest: Manifest) -> Manifest | None:
        """
        :returns: the present state with the same bytes that has the same name, or had it and is
            kept since other states are backed by it
        """
        return self._present.get(manifest.key) if manifest.key is not None else None

    def _publish(
        self, change: Publish, number: int, removed: Mapping[int, Manifest], moved: list[Manifest]
    ) -> Manifest | None:
        """
        :param removed: the states from which this record has taken the names, by identity
        :param moved: receives the manifest if the same bytes are present under its name with
            another parent: an overlay without data has the same bytes on any parent
        :returns: the state that had the name
        """
        manifest = change.manifest
        if manifest.id.machine != self.machine:
            raise BadRecord(
                f"record {number} of {self.machine} speaks of {manifest.object}",
                object=self.machine,
            )
        old = self._states.get(manifest.id)
        if change.supersedes != (old.digest if old is not None else None) or (
            old is not None and old.digest is None
        ):
            raise BadRecord(
                f"record {number} of {self.machine} publishes {manifest.id} over what is there",
                object=self.machine,
            )
        held = self.holding(manifest)
        if held is not None and held.parent_key != manifest.parent_key:
            moved.append(manifest)
        if held is not None and held is not old and id(held) not in removed:
            # The state was kept without a name, and counts as a named one from now on.
            self._forget_nameless(held.id)
            if held.parent_key is not None:
                self._children[held.parent_key] -= 1
        self._states[manifest.id] = manifest
        self._hold(manifest)
        return old

    def _remove(self, change: Remove, number: int) -> Manifest:
        manifest = self._states.get(change.id)
        if manifest is None or manifest.digest != change.digest:
            raise BadRecord(
                f"record {number} of {self.machine} removes {change.id}, which is not there",
                object=self.machine,
            )
        del self._states[change.id]
        return manifest

    def _check_published(
        self, published: Sequence[Manifest], removed: Iterable[Manifest], number: int
    ) -> None:
        for manifest in published:
            if manifest.parent_key is not None and manifest.parent_key not in self._present:
                raise BadRecord(
                    f"record {number} of {self.machine} publishes {manifest.id} without its parent"
                    f" {manifest.parent_key[1]}",
                    object=self.machine,
                )
        self._depths |= depths_of_new(
            published, self._present, self._depths, f"record {number} of {self.machine}"
        )
        # The chain can only contain another state of the same name if there is a present state that
        # lost the name, now or before.
        lowest: dict[StateId, int] = {}
        for manifest in removed:
            if manifest.key is not None:
                lowest[manifest.id] = min(
                    self._depths[manifest.key], lowest.get(manifest.id, MOST_IN_CHAIN)
                )
        for manifest in published:
            if manifest.key is None:
                self._check_members(manifest, f"record {number}")
                continue
            depths = [lowest[manifest.id]] if manifest.id in lowest else []
            depths += [self._nameless[manifest.id][1]] if manifest.id in self._nameless else []
            # A state that this record publishes and takes the name from again can also be backed by
            # the state that has the name then.
            if depths and self._is_in_chain(
                manifest.parent_key, manifest.id, min(depths) if self.is_named(manifest) else 1
            ):
                raise its_own_ancestor(manifest.key, f"record {number} of {self.machine}")

    def _check_members(self, manifest: Manifest, what: str) -> None:
        for name, digest in manifest.members.items():
            member = self._states.get(member_id(manifest, name))
            if member is None or member.digest != digest:
                raise BadRecord(
                    f"{what} of {self.machine} lists {name} in {manifest.id}, which is not there",
                    object=self.machine,
                )

    def _drop(self, removed: Sequence[Manifest], number: int) -> None:
        """
        Forget states that lost their names, and the nameless states below them that were kept only
        for them.
        """
        without_name = [
            manifest
            for manifest in removed
            if manifest.key is not None and not self.is_named(manifest)
        ]
        lost_now = set(map(id, without_name))
        waiting = list(without_name)
        gone: set[int] = set()
        while waiting:
            manifest = waiting.pop()
            key = manifest.key
            if id(manifest) in gone or key is None:
                continue
            if self._present.get(key) is manifest:
                if self._children.get(key):
                    # it has children: perhaps the same record removes them, and the last of them
                    # brings the loop here again
                    continue
                del self._present[key], self._depths[key]
                self._children.pop(key, None)
                if id(manifest) not in lost_now:
                    self._forget_nameless(manifest.id)
            gone.add(id(manifest))
            if (parent := manifest.parent_key) is not None:
                self._children[parent] -= 1
                below = self._present.get(parent)
                if below is not None and not self._children[parent] and not self.is_named(below):
                    waiting.append(below)
        for manifest in without_name:
            if id(manifest) in gone:
                continue
            # A superseded state stays for the states that it backs. A removed state cannot stay.
            if manifest.id not in self._states:
                raise BadRecord(
                    f"record {number} of {self.machine} removes {manifest.id}, on which others"
                    " stand",
                    object=self.machine,
                )
            self._unname(manifest)
        self._check_still_listed(removed, number)

    def _check_still_listed(self, removed: Iterable[Manifest], number: int) -> None:
        for manifest in removed:
            listing = self.machine_listing(manifest.id)
            member = self._states.get(manifest.id)
            if listing is not None and (
                member is None
                or member.digest != self._states[listing].members[member_name(manifest.id)]
            ):
                raise BadRecord(
                    f"record {number} of {self.machine} takes {member_name(manifest.id)} from"
                    f" {listing}",
                    object=self.machine,
                )


KEEP_NONCES = 128
"""
How many nonces a fold remembers: more than the records kept behind a checkpoint, so that a late
writer can tell whether its record counted.
"""


def member_id(manifest: Manifest, name: str) -> StateId:
    """:returns: the state that a machine state lists as its member ``name``"""
    if name == "ram":
        return StateId(manifest.object, manifest.state, Kind.RAM)
    return StateId(name, manifest.state, Kind.IMAGE)


def member_name(state: StateId) -> str:
    """:returns: the name by which a machine state lists a state"""
    return "ram" if state.kind is Kind.RAM else state.object


def _id(manifest: Manifest) -> StateId:
    return manifest.id


def member_ids(manifest: Manifest) -> list[StateId]:
    """:returns: the states that a machine state lists"""
    return [member_id(manifest, name) for name in manifest.members]
