"""
The states of one machine: what its records come to, one after the other.

A fold is strict: a record that could not have been written by the rules is an error, since whoever reads on would guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from attrs import frozen

from statepool.errors import BadRecord
from statepool.model.digest import Digest
from statepool.model.manifest import Key, Kind, Manifest, Parent, StateId, parent_key


@frozen
class Publish:
    """
    A state is there from now on.

    :param manifest: what is known of it
    :param supersedes: in a cache: the digest that the name had. The old state stays for as long as a child stands on it, without a name.
    """

    manifest: Manifest
    supersedes: Digest | None = None

    @property
    def id(self) -> StateId:
        """Which state."""
        return self.manifest.id

    def to_json(self) -> dict[str, Any]:
        """:returns: the form in a record"""
        data: dict[str, Any] = {"publish": self.manifest.to_json()}
        if self.supersedes:
            data["supersedes"] = str(self.supersedes)
        return data

    def __str__(self) -> str:
        digest = f" as {self.manifest.digest.short}" if self.manifest.digest else ""
        return f"publish {self.manifest.id}{digest}" + (" instead of " + self.supersedes.short if self.supersedes else "")


@frozen
class Remove:
    """
    A state is gone from now on.

    :param id: which
    :param digest: the one that it had; None for a machine state
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

    Immutable for its readers; :meth:`after` gives the next one.

    :param machine: whose
    """

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.number = 0
        self.nonces: dict[int, str] = {}
        self._states: dict[StateId, Manifest] = {}
        self._present: dict[Key, Manifest] = {}
        self._children: dict[Key, int] = {}

    # -- reading -----------------------------------------------------------------------------------------------------------------------------------

    @property
    def states(self) -> Mapping[StateId, Manifest]:
        """The states under their names."""
        return MappingProxyType(self._states)

    @classmethod
    def restore(cls, machine: str, number: int, nonces: dict[int, str], states: Iterable[Manifest], superseded: Iterable[Manifest]) -> Fold:
        """
        :returns: the fold that a checkpoint stands for
        :raises BadRecord: a state in it lacks its parent, or is its own ancestor, or two have one name
        """
        fold = cls(machine)
        fold.number = number
        fold.nonces = nonces
        for manifest in superseded:
            fold._hold(manifest)
        # Where each name is there once, and each state after its parent, as we mostly write them, no chain can come back to a name.
        surely_good = not fold._present
        for manifest in states:
            if fold._states.setdefault(manifest.id, manifest) is not manifest:
                raise BadRecord(f"the checkpoint {number} of {machine} lists {manifest.id} twice", object=machine)
            surely_good = surely_good and (manifest.parent_key is None or manifest.parent_key in fold._present)
            fold._hold(manifest)
        if any(key not in fold._present for key in fold._children):
            raise BadRecord(f"the checkpoint {number} of {machine} lists a state without its parent", object=machine)
        if not surely_good:
            fold._check_chains()
        return fold

    def _check_chains(self) -> None:
        """Look whether a name occurs twice in a chain, at each state once: from the roots up, with the names that are below."""
        above: dict[Key | None, list[Key]] = {}
        for key, manifest in self._present.items():
            if (below := manifest.parent_key) in above:
                above[below].append(key)
            else:
                above[below] = [key]
        names: set[str] = set()
        ways: list[tuple[str, list[Key]]] = [("", above.pop(None, []))]
        while ways:
            name, waiting = ways[-1]
            if not waiting:
                ways.pop()
                names.discard(name)
                continue
            key = waiting.pop()
            if key[1] in names:
                raise self._is_its_own_ancestor(key)
            if (children := above.pop(key, None)) is not None:
                names.add(key[1])
                ways.append((key[1], children))
        for key in filter(None, above):  # no way leads there from a root, so what is below it goes round
            seen: set[Key] = set()
            while key not in seen:
                seen.add(key)
                key = self._present[key].parent_key or key
            raise self._is_its_own_ancestor(key)

    def _is_its_own_ancestor(self, key: Key) -> BadRecord:
        return BadRecord(f"the checkpoint {self.number} of {self.machine} makes {key[0]} {key[1]} its own ancestor", object=self.machine)

    def _hold(self, manifest: Manifest) -> None:
        if (key := manifest.key) is not None:
            self._present[key] = manifest
        if (below := manifest.parent_key) is not None:
            self._children[below] = self._children.get(below, 0) + 1

    @property
    def superseded(self) -> list[Manifest]:
        """States without a name, on which others still stand."""
        return [manifest for manifest in self._present.values() if self._states.get(manifest.id) is not manifest]

    @property
    def manifests(self) -> Iterable[Manifest]:
        """All states, with and without a name."""
        yield from self._present.values()
        yield from (manifest for manifest in self._states.values() if manifest.digest is None)

    @property
    def digests(self) -> set[Digest]:
        """The names of all bytes that are needed."""
        return {Digest.parse(digest) for _, _, digest in self._present}

    def parent_of(self, manifest: Manifest) -> Manifest | None:
        """:returns: what backs a state of this fold"""
        below = manifest.parent_key
        return self._present[below] if below is not None else None

    def find(self, object: str, parent: Parent) -> Manifest | None:
        """:returns: the state that can be the parent of a state of ``object``, with or without a name"""
        return self._present.get(parent_key(object, parent))

    def find_content(self, state: StateId, digest: Digest) -> Manifest | None:
        """:returns: the state of this id, with or without the name, that has these bytes; in a cache also one that it has rewritten from them"""
        exact = self._present.get((state.object, state.state, str(digest)))
        if exact is not None:
            return exact
        return next((manifest for manifest in self._present.values() if manifest.id == state and manifest.origin == digest), None)

    def has_children(self, manifest: Manifest) -> bool:
        """:returns: whether a state, with or without a name, stands directly on this one"""
        key = manifest.key
        return key is not None and bool(self._children.get(key))

    def chain(self, manifest: Manifest) -> tuple[Manifest, ...]:
        """:returns: a state of this fold with all that backs it, tip first"""
        return tuple(self._walk(manifest))

    def _walk(self, manifest: Manifest | None) -> Iterator[Manifest]:
        while manifest is not None:
            yield manifest
            manifest = self.parent_of(manifest)

    def dependants(self, ids: Iterable[StateId]) -> list[StateId]:
        """:returns: the named states that stand on any of these, and the machine states that list any of them; tips first"""
        gone = {state for state in ids if state in self._states}
        found = [
            state
            for state, manifest in self._states.items()
            if state not in gone and any(link.id in gone and self._states[link.id] is link for link in tuple(self._walk(manifest))[1:])
        ]
        lost = gone | set(found)
        found += [state for state, manifest in self._states.items() if state not in lost and lost.intersection(member_ids(manifest))]
        return sorted(found, key=lambda state: -self._depth(state))

    def are_free(self, ids: Sequence[StateId]) -> bool:
        """:returns: whether no other states than these stand on them, or list them"""
        return set(self.dependants(ids)) <= set(ids)

    def holds(self, manifest: Manifest) -> bool:
        """:returns: whether publishing a state would change nothing that matters"""
        old = self._states.get(manifest.id)
        return old is not None and old.digest == manifest.digest and old.parent == manifest.parent and dict(old.members) == dict(manifest.members)

    def standing_on(self, manifest: Manifest) -> list[StateId]:
        """:returns: the named states that stand on this very state, with or without a name"""
        return [state for state, tip in self._states.items() if any(link is manifest for link in tuple(self._walk(tip))[1:])]

    def _depth(self, state: StateId) -> int:
        manifest = self._states[state]
        return 1 << 30 if manifest.digest is None else sum(1 for _ in self._walk(manifest))

    # -- writing -----------------------------------------------------------------------------------------------------------------------------------

    def after(self, number: int, nonce: str, changes: Iterable[Change]) -> Fold:
        """
        :returns: what comes of this fold and one more record
        :raises BadRecord: the record breaks a rule
        """
        result = self.copy()
        result.apply(number, nonce, changes)
        return result

    def copy(self) -> Fold:
        """:returns: a fold of its own"""
        result = Fold(self.machine)
        result.number = self.number
        result.nonces = dict(self.nonces)
        result._states = dict(self._states)
        result._present = dict(self._present)
        result._children = dict(self._children)
        return result

    def apply(self, number: int, nonce: str, changes: Iterable[Change]) -> None:
        """As :meth:`after`, in place: for whoever owns this fold and throws it away on an error."""
        published: list[Manifest] = []
        removed: list[Manifest] = []
        moved: list[Manifest] = []
        for change in changes:
            if isinstance(change, Publish):
                moved += self._find_moved(change.manifest)
                removed += self._publish(change, number, removed)
                published.append(change.manifest)
            else:
                removed.append(self._remove(change, number))
        chains: dict[Key | None, set[str]] = {}
        for manifest in published:
            self._check_published(manifest, number, chains)
        self._drop(removed, number)
        for manifest in moved:
            if self.has_children(manifest):
                raise BadRecord(
                    f"record {number} of {self.machine} puts {manifest.id} on another parent under those that stand on it", object=self.machine
                )
        self.number = number
        self.nonces[number] = nonce
        self.nonces.pop(number - KEEP_NONCES, None)

    def _find_moved(self, manifest: Manifest) -> list[Manifest]:
        """:returns: the manifest, if the same bytes are here under its name on another parent: a child that nobody wrote to is the same on any"""
        held = self.holding(manifest)
        return [manifest] if held is not None and held.parent_key != manifest.parent_key else []

    def holding(self, manifest: Manifest) -> Manifest | None:
        """:returns: what is here with the same bytes under the same name, or was under that name and is kept for the sake of those on it"""
        return self._present.get(manifest.key) if manifest.key is not None else None

    def _publish(self, change: Publish, number: int, removed: Sequence[Manifest]) -> list[Manifest]:
        manifest = change.manifest
        if manifest.id.machine != self.machine:
            raise BadRecord(f"record {number} of {self.machine} speaks of {manifest.object}", object=self.machine)
        old = self._states.get(manifest.id)
        if change.supersedes != (old.digest if old is not None else None) or (old is not None and old.digest is None):
            raise BadRecord(f"record {number} of {self.machine} publishes {manifest.id} over what is there", object=self.machine)
        held = self.holding(manifest)
        if held is not None and held is not old and not any(held is gone for gone in removed) and held.parent_key is not None:
            self._children[held.parent_key] -= 1  # it was kept without a name, and is counted with its name from now on
        self._states[manifest.id] = manifest
        self._hold(manifest)
        return [old] if old is not None else []

    def _remove(self, change: Remove, number: int) -> Manifest:
        manifest = self._states.get(change.id)
        if manifest is None or manifest.digest != change.digest:
            raise BadRecord(f"record {number} of {self.machine} removes {change.id}, which is not there", object=self.machine)
        del self._states[change.id]
        return manifest

    def _check_published(self, manifest: Manifest, number: int, chains: dict[Key | None, set[str]]) -> None:
        """
        :param chains: the names in the chains of those of this record that were looked at before, by their keys
        """
        if manifest.parent_key is not None and manifest.parent_key not in self._present:
            raise BadRecord(
                f"record {number} of {self.machine} publishes {manifest.id} without its parent {manifest.parent_key[1]}", object=self.machine
            )
        names, below = {manifest.id.state}, manifest.parent_key
        while below is not None:
            known = chains.get(below, {below[1]})
            if not names.isdisjoint(known):
                again = min(names & known)
                raise BadRecord(f"record {number} of {self.machine} makes {manifest.object} {again} its own ancestor", object=self.machine)
            names |= known
            parent = self._present.get(below) if below not in chains else None
            below = parent.parent_key if parent is not None else None  # one that lacks its own parent is looked at itself, being of this record
        chains[manifest.key] = names
        for name, digest in manifest.members.items() if manifest.id.kind is Kind.MACHINE else ():
            member = self._states.get(member_id(manifest, name))
            if member is None or member.digest != digest:
                raise BadRecord(f"record {number} of {self.machine} lists {name} in {manifest.id}, which is not there", object=self.machine)

    def _drop(self, removed: Sequence[Manifest], number: int) -> None:
        """Forget states that have no name any more, and those below them that were only kept for their sake."""
        if not removed:
            return
        waiting = [manifest for manifest in removed if manifest.key is not None and self._states.get(manifest.id) is not manifest]
        stuck: list[Manifest] = []
        while len(stuck) < len(waiting):
            manifest = waiting.pop(0)
            key = manifest.key
            assert key is not None
            if self._present.get(key) is manifest and self._children.get(key):
                # Others stand on it: perhaps they go in the same record, so look at it again after them.
                waiting.append(manifest)
                stuck.append(manifest)
                continue
            stuck.clear()
            if self._present.get(key) is manifest:
                del self._present[key]
            if (parent := manifest.parent_key) is not None:
                below = self._present.get(parent)
                self._children[parent] -= 1
                if below is not None and self._states.get(below.id) is not below and below not in waiting:
                    waiting.append(below)
        for manifest in stuck:
            # A superseded state stays for the sake of those on it. A removed one cannot.
            if manifest.id not in self._states:
                raise BadRecord(f"record {number} of {self.machine} removes {manifest.id}, on which others stand", object=self.machine)
        machines = (
            [state for state in self._states if state.kind is Kind.MACHINE] if any(gone.id.kind is not Kind.MACHINE for gone in removed) else []
        )
        for state in machines:
            manifest = self._states[state]
            for name, digest in manifest.members.items():
                member = self._states.get(member_id(manifest, name))
                if member is None or member.digest != digest:
                    raise BadRecord(f"record {number} of {self.machine} takes {name} from {state}", object=self.machine)


KEEP_NONCES = 128
"""How many nonces a fold remembers: more than records are kept behind a checkpoint, so that a late writer can tell whether its record counted."""


def member_id(manifest: Manifest, name: str) -> StateId:
    """:returns: what a machine state means by its member ``name``"""
    if name == "ram":
        return StateId(manifest.object, manifest.state, Kind.RAM)
    return StateId(name, manifest.state, Kind.IMAGE)


def member_ids(manifest: Manifest) -> list[StateId]:
    """:returns: what a machine state lists"""
    return [member_id(manifest, name) for name in manifest.members]
