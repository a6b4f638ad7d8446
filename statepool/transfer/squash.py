"""
Setting a state from a working image that stands on this very state: what was written since, and the state as it was, become its new content.

The new content is a new file on the old parent: the bytes of a state never change. Made by a *safe rebase* of a copy: ``qemu-img convert`` with a
backing file would copy what the last of the two holds, and drop the rest without a word.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from attrs import evolve, frozen

from statepool.errors import Conflict, HasDependants
from statepool.model.manifest import Manifest
from statepool.qcow2 import opened
from statepool.qcow2.header import is_empty_overlay, reader
from statepool.qcow2.tool import QemuImg
from statepool.transfer.access import Access, only_ours
from statepool.transfer.intake import Examined, Intake, Taken
from statepool.transfer.passing import passing
from statepool.transfer.space import require_space
from statepool.transfer.working import prepare_working
from statepool.transports.copying import copy


@frozen
class Squash:
    """
    Makes a state of a working image that stands on it.

    :param intake: how the image is to be taken
    """

    intake: Intake

    @property
    def is_due(self) -> bool:
        """Whether the working image stands on the very state that it should become, and was written to."""
        if not self.intake.working.is_file():
            return False
        with opened.exclusive(self.intake.working) as descriptor:
            examined = self.intake.examine(descriptor)
            return self.intake.is_itself(examined) and not is_empty_overlay(reader(descriptor), examined.header)

    def run(self, *, dry_run: bool = False) -> Taken:
        """
        :param dry_run: look at everything, and change nothing
        :returns: the state, with its new content; a fresh overlay is in the place of the working image
        :raises HasDependants: something stands on the state
        :raises NotFound: the state has been removed meanwhile
        :raises InUse: another process has the image open
        """
        with opened.exclusive(self.intake.working) as descriptor:
            examined = self.intake.examine(descriptor)
            if examined.parent is None or not self.intake.is_itself(examined):
                raise Conflict(f"{self.intake.working} does not stand on {self.intake.state} any more", path=str(self.intake.working))
            chain = self.intake.cache.pool.chain_of(examined.parent)
            self._refuse_dependants()
            Access.of(descriptor).require_givable(self.intake.working)
            if dry_run:
                return Taken(examined.parent, written=True, how="copy", warnings=examined.warnings)
            return self._run(descriptor, examined, chain)

    def _refuse_dependants(self) -> None:
        pool, state = self.intake.cache.pool, self.intake.state
        dependants = pool.fold(state.machine).dependants([state])
        if dependants:
            raise HasDependants(
                f"{state} in {pool} cannot get new content: {', '.join(map(str, dependants))} depend on it",
                dependants=[str(one) for one in dependants],
                object=state.object,
                state=state.state,
                pool=str(pool),
                hint="set it under another name",
            )

    def _run(self, descriptor: int, examined: Examined, chain: Sequence[Manifest]) -> Taken:
        cache = self.intake.cache
        require_space(cache.pool, examined.size + chain[0].data_size)
        with passing(cache) as place:
            temporary = place.path / "squash.qcow2"
            with open(temporary, "x+b", buffering=0, opener=only_ours) as file:
                copy(descriptor, file.fileno(), examined.size)
            self._merge(temporary, examined, chain)
            taken = evolve(self.intake, working=temporary, replace=True).run()
            made = cache.pool.chain(self.intake.state)
            prepare_working(cache, made, self.intake.working, standing_on=made, flush=True, access=Access.of(descriptor)).settle(overwrite=True)
        return evolve(taken, how="copy")

    def _merge(self, temporary: Path, examined: Examined, chain: Sequence[Manifest]) -> None:
        """Make a copy of the working image hold what the state itself held, too."""
        cache, tool = self.intake.cache, QemuImg(self.intake.cache.settings.tool_timeout)
        here = str(cache.chains.prepare(chain))
        if examined.header.backing_name != os.fsencode(here):  # that of a cache which was moved, for example
            tool.rebase_unsafe(temporary, here)
        if len(chain) > 1:
            cache.chains.use(chain[1:], temporary)
            tool.rebase(temporary, str(cache.chains.path(chain[1:])))
            return
        flat = temporary.with_suffix(".flat.qcow2")
        os.close(only_ours(str(flat), os.O_RDWR | os.O_CREAT | os.O_EXCL))
        try:
            tool.convert(temporary, flat, options=[f"cluster_size={examined.header.cluster_size}"])
            os.replace(flat, temporary)
        finally:
            flat.unlink(missing_ok=True)
