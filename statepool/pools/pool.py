"""
One pool: states by name, published whole or not at all, and removed without leaving dependants
behind.

All guarantees of this module hold whatever other writers do at the same moment, with or without
locks: see ``docs/design.rst`` for the argument and ``tests/races`` for every interleaving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from statepool.errors import Conflict, UnsafeImage
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.pools import layout
from statepool.pools.fold import Change, Fold, Publish, Remove, member_id, member_ids
from statepool.pools.lastlook import Again, LastLook, published_anew
from statepool.pools.ledger import Ledger
from statepool.pools.refusals import (
    lost_ram,
    refuse_dependants,
    refuse_listed,
    refuse_long_texts,
    refuse_moved,
    taken,
)
from statepool.pools.staging import Marker, Staging, read_markers

GCRoots = Callable[[], frozenset[Digest]]
"""
A function that returns the garbage collection roots: the bytes that must stay although no record
needs them, since they back working images, or other caches refer to them.
"""


class Pool(Ledger):
    """
    A place that holds states. It publishes them whole, and removes them without leaving dependants
    behind.
    """

    def check_publishable(
        self,
        manifests: Sequence[Manifest],
        *,
        replace: bool = False,
        supersede: bool = False,
        in_place: bool = False,
    ) -> bool:
        """
        Check whether :meth:`publish` would succeed now, and change nothing. It raises the same
        errors.

        :returns: whether there is anything to do
        """
        fold = self.fold(manifests[0].id.machine)
        planned = self._plan(fold, manifests, replace, supersede)
        for manifest in manifests:
            if not in_place:
                self._require_free(manifest.id, fold.states.get(manifest.id))
        return bool(planned)

    def publish(
        self,
        manifests: Sequence[Manifest],
        staging: Staging,
        *,
        replace: bool = False,
        supersede: bool = False,
        in_place: bool = False,
        durable: bool = True,
        again: Again | None = None,
    ) -> bool:
        """
        Make states visible, all in one record. Their bytes have been gathered in ``staging``, or
        the pool has them.

        :param manifests: their manifests, parents first, all of one machine
        :param replace: replace other content under a name, if it has no dependants
        :param supersede: as ``replace``; an old state that backs others is kept without its name:
            for caches
        :param in_place: the files in their places in the view are the states themselves: they are
            being adopted
        :param durable: also fsync the directories with the names of the bytes and of the record; a
            cache does not need it, since it hashes its files after a reboot
        :param again: gathers the bytes again, if they were removed because a collector took this
            writer for dead
        :returns: whether anything had to be changed; False if the pool had the same states before
        :raises Conflict: a name exists with other content, or a parent has changed
        :raises HasDependants: a state to be replaced has dependants
        :raises IntegrityError: the bytes were removed
        """
        machine = manifests[0].id.machine
        ids = [manifest.id for manifest in manifests]
        digests = [manifest.digest for manifest in manifests if manifest.digest is not None]
        self.check_publishable(manifests, replace=replace, supersede=supersede, in_place=in_place)
        look = LastLook(self, staging, digests, again)
        look.settle()
        if durable:
            self.transport.flush(layout.DATA)
        changes: list[Change] = []

        def plan(fold: Fold, *, anew: bool = False) -> list[Change]:
            changes[:] = self._plan(fold, manifests, replace, supersede) or (
                published_anew(fold, manifests) if anew else []
            )
            if not in_place:
                self.view.reclaim(
                    fold.states[change.id] for change in changes if change.id in fold.states
                )
            return changes

        written = self.append(machine, plan, durable=durable)
        # The last look: a collector may have moved the bytes aside before it could see the record.
        # The staging still has them.
        look.settle_or_take_back(machine, changes)
        if not written and digests:
            # The record is that of another writer. If that writer takes its record back, it has
            # done so by now, or has left a marker.
            anew = look.is_doubted()
            if written := self.append(machine, lambda fold: plan(fold, anew=anew), durable=durable):
                look.settle_or_take_back(machine, changes)
        self.view.update(ids, lambda: self.fold(machine))
        return written

    def _plan(
        self, fold: Fold, manifests: Sequence[Manifest], replace: bool, supersede: bool
    ) -> list[Change]:
        changes: list[Change] = []
        coming = {manifest.id: manifest for manifest in manifests}
        for manifest in manifests:
            old = fold.states.get(manifest.id)
            if old is not None and fold.holds(manifest):
                if supersede and manifest.origin not in (None, old.origin):
                    # the cache has learnt from which bytes these were rewritten
                    changes.append(Publish(manifest, supersedes=old.digest))
                continue
            self._check_parent(fold, manifest, coming)
            refuse_long_texts(self.location, fold, manifest)
            refuse_moved(self.location, fold, manifest)
            if old is None:
                changes.append(Publish(manifest))
            elif (
                supersede
                and old.digest is not None
                and not (old.digest == manifest.digest and fold.has_children(old))
            ):
                refuse_listed(self.location, fold, old, set(coming))
                changes.append(Publish(manifest, supersedes=old.digest))
            elif replace or supersede:
                refuse_dependants(self.location, fold, [old.id], set(coming), "replaced")
                changes += [
                    Remove(old.id, old.digest),
                    *lost_ram(fold, old, manifest),
                    Publish(manifest),
                ]
            else:
                raise taken(manifest.id, self.location)
        return changes

    def _check_parent(
        self, fold: Fold, manifest: Manifest, coming: dict[StateId, Manifest]
    ) -> None:
        for name, digest in manifest.members.items():
            member = coming.get(member_id(manifest, name)) or fold.states.get(
                member_id(manifest, name)
            )
            if member is None or member.digest != digest:
                raise Conflict(
                    f"{manifest.id} lists {name}, which is not in {self.location} as it was",
                    object=manifest.object,
                    pool=str(self.location),
                )
        if manifest.parent is None:
            return
        parent = fold.find(manifest.object, manifest.parent)
        if parent is not None:
            depth = fold.depth(parent) + 1
            if depth <= self.max_depth and fold.has_below(parent, manifest.id):
                raise Conflict(
                    f"{manifest.id} stands on {parent.state}, whose chain has a state of that name",
                    object=manifest.object,
                    state=manifest.state,
                    pool=str(self.location),
                    hint="choose another name",
                )
            if depth > self.max_depth:
                raise UnsafeImage(
                    f"the chain of {manifest.id} has {depth} states, more than {self.max_depth}",
                    check="depth",
                    object=manifest.object,
                    state=manifest.state,
                    hint="set a state without a backing file, or raise max-depth",
                )
            return
        wanted = StateId(manifest.object, manifest.parent.state)
        if wanted in coming and coming[wanted].digest == manifest.parent.digest:
            return
        there = fold.states.get(wanted)
        what = f"is there with the digest {there.digest}" if there is not None else "is not there"
        raise Conflict(
            f"{manifest.id} stands on {manifest.parent.state} with the digest"
            f" {manifest.parent.digest}, which {what} in {self.location}",
            object=manifest.object,
            state=manifest.state,
            pool=str(self.location),
            hint="get the parent again and make the state from that",
        )

    def _require_free(self, state: StateId, known: Manifest | None) -> None:
        if not self.view.is_free(state, known):
            raise Conflict(
                f"{layout.view(state)} in {self.location} is a file of another tool",
                object=state.object,
                state=state.state,
                pool=str(self.location),
                hint=f"make it managed with: statepool adopt {self.location}",
            )

    # -- removing ----------------------------------------------------------------------------------

    def plan_removal(self, state: StateId, *, cascade: bool = False) -> list[StateId]:
        """
        :param cascade: also remove the dependants
        :returns: what a removal would remove now, tips first
        :raises NotFound: the pool does not have the state
        :raises HasDependants: the state has dependants, and ``cascade`` is not set
        """
        return [
            change.id for change in self._plan_removal(self.fold(state.machine), state, cascade)
        ]

    def _plan_removal(self, fold: Fold, state: StateId, cascade: bool) -> list[Remove]:
        if state not in fold.states:
            raise self.missing(state)
        # a machine state is removed with all that it lists
        together = [state, *member_ids(fold.states[state])]
        if not cascade:
            refuse_dependants(self.location, fold, together, set(), "removed")
        ids = [*fold.dependants(together), *together]
        # The RAM of a machine state is of no use without it.
        machines = [gone for gone in ids if gone.kind is Kind.MACHINE]
        going = set(ids)
        ids += [
            ram
            for ram in (StateId(gone.object, gone.state, Kind.RAM) for gone in machines)
            if ram in fold.states and ram not in going
        ]
        return [Remove(gone, fold.states[gone].digest) for gone in ids]

    def remove(
        self,
        state: StateId,
        *,
        cascade: bool = False,
        allowed: Callable[[set[Digest]], None] = lambda digests: None,
    ) -> list[Manifest]:
        """
        Remove a state, and all that has to be removed with it, in one record. A machine state is
        removed with its members. The bytes stay until a collector removes them.

        :param cascade: also remove the dependants
        :param allowed: raises an error if one of these bytes must stay
        :returns: the manifests of the removed states, tips first
        :raises NotFound: the pool does not have the state
        :raises HasDependants: the state has dependants, and ``cascade`` is not set
        """
        gone: list[Manifest] = []

        def plan(fold: Fold) -> list[Remove]:
            if gone and state not in fold.states:
                return []  # our first record counted after all
            changes = self._plan_removal(fold, state, cascade)
            allowed({change.digest for change in changes if change.digest is not None})
            gone[:] = [fold.states[change.id] for change in changes]
            self.view.reclaim(gone)
            return changes

        self.append(state.machine, plan)
        self.view.update([manifest.id for manifest in gone], lambda: self.fold(state.machine))
        return gone

    # -- what is needed ----------------------------------------------------------------------------

    def needed(self, *, besides: Marker | None = None) -> set[Digest]:
        """
        :param besides: a marker that does not count
        :returns: the bytes that a marker or a record needs. Markers are read first: a writer
            removes its marker only after its record exists.
        """
        ignored = besides.nonce if besides is not None else None
        digests = {
            digest
            for marker in read_markers(self.transport)
            if marker.nonce != ignored and not marker.condemns
            for digest in marker.digests
        }
        return digests.union(
            *(fold.digests for fold in self.folds(self.logged_machines()).values())
        )
