"""
Set a state from a working image that is backed by this very state: the changes since, and the old
content of the state, become its new content.

The new content is a new file on the old parent: the bytes of a state never change. It is made by a
*safe rebase* of a copy. ``qemu-img convert`` with a backing file would copy only what the upper of
the two holds, and silently drop the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from attrs import evolve, frozen

from statepool.cache.access import Access, only_ours
from statepool.cache.space import require_space
from statepool.cache.working import prepare_working
from statepool.capture.capture import Capture, CaptureResult, Looked
from statepool.capture.scratch import scratch
from statepool.errors import Conflict, HasDependants
from statepool.model.manifest import Manifest
from statepool.qcow2 import opened
from statepool.qcow2.tool import QemuImg
from statepool.transports.base import Transfer
from statepool.transports.copying import copy


@frozen
class Squash:
    """
    The replacement of a state by a working image that is backed by it.

    :param capture: how to capture the image
    """

    capture: Capture

    @property
    def _working(self) -> Path:
        return self.capture.files[self.capture.state]

    @property
    def is_due(self) -> bool:
        """
        Whether the working image is backed by the very state that it should become, and was written
        to.
        """
        if not self._working.is_file():
            return False
        with opened.exclusive(self._working) as descriptor:
            looked = self.capture.look(self.capture.state, self._working, descriptor)
            return looked.is_itself and not looked.is_unwritten

    def run(self, *, dry_run: bool = False) -> CaptureResult:
        """
        :param dry_run: check everything, and change nothing
        :returns: the state, with its new content; a fresh overlay takes the place of the working
            image
        :raises HasDependants: other states depend on the state
        :raises NotFound: the state has been removed meanwhile
        :raises InUse: another process has the image open
        """
        with opened.exclusive(self._working) as descriptor:
            looked = self.capture.look(self.capture.state, self._working, descriptor)
            if looked.parent is None or not looked.is_itself:
                raise Conflict(
                    f"{self._working} does not stand on {self.capture.state} any more",
                    path=str(self._working),
                )
            chain = self.capture.cache.pool.chain_of(looked.parent)
            self._refuse_dependants()
            Access.of(descriptor).require_givable(self._working)
            if dry_run:
                return CaptureResult(
                    looked.parent,
                    how="copy",
                    bytes=looked.parent.data_size,
                    warnings=looked.warnings,
                )
            return self._run(looked, chain)

    def _refuse_dependants(self) -> None:
        pool, state = self.capture.cache.pool, self.capture.state
        dependants = pool.fold(state.machine).dependants([state])
        if dependants:
            raise HasDependants(
                f"{state} in {pool} cannot get new content: {', '.join(map(str, dependants))}"
                " depend on it",
                dependants=[str(one) for one in dependants],
                object=state.object,
                state=state.state,
                pool=str(pool),
                hint="set it under another name",
            )

    def _run(self, looked: Looked, chain: Sequence[Manifest]) -> CaptureResult:
        cache, state = self.capture.cache, self.capture.state
        require_space(cache.pool, looked.size + chain[0].data_size)
        with scratch(cache) as place:
            temporary = place.path / "squash.qcow2"
            with open(temporary, "x+b", buffering=0, opener=only_ours) as file:
                copy(looked.descriptor, file.fileno(), Transfer(looked.size))
            self._merge(temporary, looked, chain)
            taken = evolve(self.capture, files={state: temporary}, replace=True).run()
            made = cache.pool.chain(state)
            access = Access.of(looked.descriptor)
            prepare_working(
                cache, made, self._working, standing_on=made, flush=True, access=access
            ).settle(overwrite=True)
        return evolve(taken, how="copy", bytes=taken.manifest.data_size)

    def _merge(self, temporary: Path, looked: Looked, chain: Sequence[Manifest]) -> None:
        """Add the content of the old state to a copy of the working image."""
        cache, tool = self.capture.cache, QemuImg(self.capture.cache.settings.tool_timeout)
        assert looked.header is not None
        here = str(cache.chains.prepare(chain))
        # the name can differ: for example, that of a cache that was moved
        if looked.header.backing_name != os.fsencode(here):
            tool.rebase_unsafe(temporary, here)
        if len(chain) > 1:
            cache.chains.use(chain[1:], temporary)
            tool.rebase(temporary, str(cache.chains.path(chain[1:])))
            return
        flat = temporary.with_suffix(".flat.qcow2")
        os.close(only_ours(str(flat), os.O_RDWR | os.O_CREAT | os.O_EXCL))
        try:
            tool.convert(temporary, flat, options=[f"cluster_size={looked.header.cluster_size}"])
            os.replace(flat, temporary)
        finally:
            flat.unlink(missing_ok=True)
