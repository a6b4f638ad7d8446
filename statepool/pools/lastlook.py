"""
The last look of a writer at the bytes of what it has published, and what follows if they are gone.

A collector may have taken the writer for dead: it was suspended for longer than markers count, or
another host has its identity. Then its marker and what it had gathered were removed, and perhaps
the bytes, too, before there was a record that needs them. The writer gathers them once more, or
takes its record back, so that no state is left without its bytes.
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
"""Gathers bytes once more, for another staging than the one that was begun for them."""


@frozen
class LastLook:
    """
    Looks at the bytes of one publication.

    :param pool: where it is
    :param staging: what its bytes were gathered for
    :param digests: their names
    :param again: gathers them once more; None if the writer cannot
    """

    pool: Ledger
    staging: Staging
    digests: Sequence[Digest]
    again: Again | None = None

    def settle(self) -> None:
        """
        Give the bytes their names. If they are gone, gather them once more under another marker.

        :raises IntegrityError: they are gone, and cannot be gathered
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
        As :meth:`settle`, for bytes that a record of this writer names. If it fails, the record is
        taken back.

        :param written: what the record says
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
        :returns: whether another writer is about to take back a record that names some of the bytes
        """
        return any(
            marker.taking_back and not marker.digests.isdisjoint(self.digests)
            for marker in read_markers(self.pool.transport)
        )

    def _take_back(self, machine: str, published: Sequence[Publish]) -> bool:
        """
        Remove what a record has published. States on which others stand stay: their writers bring
        the bytes, or say that they are missing.

        :returns: whether the bytes are there after all; then nothing is removed
        """

        def plan(fold: Fold) -> list[Change]:
            # Looked at after the fold: a writer that published the same before it had brought the
            # bytes before it.
            if not self.pool.lacking(self.digests):
                return []
            found = [change.manifest for change in published if fold.holds(change.manifest)]
            ids = [manifest.id for manifest in found]
            return (
                [Remove(manifest.id, manifest.digest) for manifest in reversed(found)]
                if ids and fold.are_free(ids)
                else []
            )

        # The marker tells writers of the same that a record of another writer is not enough for
        # them.
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
    :returns: what publishes states once more that are there; nothing if others stand on them, since
        then they are not taken back
    """
    ids = [manifest.id for manifest in manifests]
    if not fold.are_free(ids):
        return []
    return [
        *(Remove(state, fold.states[state].digest) for state in reversed(ids)),
        *map(Publish, manifests),
    ]
