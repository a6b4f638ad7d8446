"""
The last look of a writer at the bytes that it has published, and the recovery if they were removed.

A collector may have taken the writer for dead: the writer was suspended for longer than markers
count, or another host has its identity. Then its marker and the bytes that it had gathered were
removed, and perhaps those in ``data/``, too, before there was a record that needs them. The writer
gathers the bytes again, or takes its record back, so that no state is left without its bytes.
``tests/races/test_protocol_model.py`` shows what each step is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import frozen

from statepool.errors import IntegrityError, StatePoolError
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.pools.fold import Change, Fold, Publish, Remove
from statepool.pools.ledger import Ledger
from statepool.pools.staging import Marker, Staging, read_markers
from statepool.pools.writer import Writer

Again = Callable[[Staging], object]
"""A function that gathers bytes again, for another staging than the first one."""


@frozen
class LastLook:
    """
    The last look at the bytes of one publication.

    :param pool: the pool
    :param staging: where the bytes were gathered
    :param digests: the names of the bytes
    :param again: gathers the bytes again; None if the writer cannot
    """

    pool: Ledger
    staging: Staging
    digests: Sequence[Digest]
    again: Again | None = None

    def settle(self) -> None:
        """
        Give the bytes their names. If they were removed, gather them again under another marker.

        :raises IntegrityError: the bytes were removed, and cannot be gathered again
        """
        try:
            self.staging.settle(self.digests)
        except IntegrityError:
            if self.again is None:
                raise
            renewed = self.pool.stage(self.digests)
            try:
                self.again(renewed)
                renewed.settle(self.digests)
            finally:
                renewed.end()

    def settle_or_take_back(self, machine: str, written: Sequence[Change]) -> None:
        """
        Do as :meth:`settle`, for bytes that a record of this writer needs. If that fails, take the
        record back.

        :param written: the changes in the record
        """
        try:
            self.settle()
        except StatePoolError:
            if not self._take_back(
                machine, [change for change in written if isinstance(change, Publish)]
            ):
                raise

    def is_doubted(self) -> bool:
        """
        :returns: whether another writer is about to take back a record that needs some of the bytes
        """
        return any(
            marker.taking_back and not marker.digests.isdisjoint(self.digests)
            for marker in read_markers(self.pool.transport)
        )

    def _take_back(self, machine: str, published: Sequence[Publish]) -> bool:
        """
        Remove the states that a record has published. States with dependants stay: the writers of
        the dependants bring the bytes, or report that they are missing.

        :returns: whether the bytes exist after all; then nothing is removed
        """

        def plan(fold: Fold) -> list[Change]:
            # Check this after the fold: if another writer published the same before the fold, it
            # had brought the bytes before that.
            if not self.pool.lacking(self.digests):
                return []
            found = [change.manifest for change in published if fold.holds(change.manifest)]
            ids = [manifest.id for manifest in found]
            return (
                [Remove(manifest.id, manifest.digest) for manifest in reversed(found)]
                if ids and fold.are_free(ids)
                else []
            )

        # The marker tells other writers of the same states that a record of this writer is not
        # enough for them.
        marker = Marker(
            self.pool.nonce(), frozenset(self.digests), Writer.current(), taking_back=True
        )
        staging = Staging.begin(self.pool.transport, marker)
        try:
            removed = self.pool.append(machine, plan)
            self.pool.view.update(
                [change.manifest.id for change in published], lambda: self.pool.fold(machine)
            )
            return not removed and not self.pool.lacking(self.digests)
        finally:
            staging.end()


def published_anew(fold: Fold, manifests: Sequence[Manifest]) -> list[Change]:
    """
    :returns: the changes that publish existing states again; empty if they have dependants, since
        then they are not taken back
    """
    ids = [manifest.id for manifest in manifests]
    if not fold.are_free(ids):
        return []
    return [
        *(Remove(state, fold.states[state].digest) for state in reversed(ids)),
        *map(Publish, manifests),
    ]
