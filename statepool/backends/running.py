"""
Operations on a running machine: the part of its handle that needs QEMU. It is imported only when it
is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from statepool.backends.base import Context, Options, Target
from statepool.errors import UsageError
from statepool.model.objects import Image, Machine
from statepool.model.outcomes import GetResult, SetResult, WaitFor
from statepool.model.scope import Scope, Scopes

if TYPE_CHECKING:
    from statepool.machine.description import MachineConfig
    from statepool.machine.running import RunningMachine

    Running = RunningMachine | str | os.PathLike[str]
    """A running machine: one that is connected, or the socket of its monitor."""

Images = Mapping[str, str | os.PathLike[str]]
"""Working images, by the names of a machine's images."""


class RunningStates:
    """The states of a machine with its RAM: a mixin of the handle."""

    machine: Machine

    @property
    def context(self) -> Context:
        """The cache, the sources and the other parts that the backends work with."""
        raise NotImplementedError

    def start(
        self,
        state: str,
        config: MachineConfig,
        *,
        to: Images,
        overwrite: bool = False,
        force: bool = False,
        paused: bool = False,
        scope: Scopes | None = None,
    ) -> RunningMachine:
        """
        Bring a state with RAM to this host, make working images, and start a QEMU on them that
        continues from the state. QEMU ends with this process, or when it is closed, for example at
        the end of a ``with`` block.

        :param config: the configuration of the machine, without its images; these are plugged in in
            the order of the configuration
        :param to: the working image of each image
        :param overwrite: whether to overwrite files there
        :param force: load the RAM even if the machine has another fingerprint
        :param paused: leave the machine paused
        :param scope: the pools from which the state may come; any if not given
        :raises NotFound: no pool has the state, or it has no RAM
        :raises Incompatible: the machine differs from that of the state
        :raises MachineError: QEMU does not start
        """
        from statepool.backends.ramfile import RamfileBackend

        backend = RamfileBackend(self.context, force=force)
        options = Options(overwrite=overwrite, scope=Scope.permitted(scope))
        return backend.start(self._running_target(to), state, config, options, paused=paused)[1]

    def reload(
        self,
        state: str,
        machine: RunningMachine,
        *,
        force: bool = False,
        paused: bool = False,
        scope: Scopes | None = None,
    ) -> GetResult:
        """
        End a QEMU that was started here, and start it again from a state, on fresh working images
        that replace the old ones.

        :param machine: the machine; the object stays usable
        :param force: load the RAM even if the machine has another fingerprint
        :param paused: leave the machine paused
        :raises NotFound: no pool has the state, or it has no RAM; the machine continues to run
        :raises RefusedError: the QEMU is not ours
        """
        from statepool.backends.ramfile import RamfileBackend

        backend = RamfileBackend(self.context, force=force)
        return backend.reload(
            machine,
            self._running_target({}),
            state,
            Options(scope=Scope.permitted(scope)),
            paused=paused,
        )

    def load(
        self, state: str, monitor: Running, *, force: bool = False, scope: Scopes | None = None
    ) -> GetResult:
        """
        Load a state into a QEMU that was started with ``-incoming defer`` on fresh working images
        of the state, and let it run.

        :param monitor: the socket of its monitor
        :param force: load the RAM even if the machine has another fingerprint
        :raises NotFound: no pool has the state, or it has no RAM
        :raises RefusedError: QEMU does not wait, or does not use fresh working images of the state
        :raises Incompatible: the machine differs from that of the state
        """
        from statepool.backends.ramfile import RamfileBackend

        machine, socket = _either(monitor)
        backend = RamfileBackend(self.context, machine, force=force)
        return backend.get(
            self._running_target({}, socket), state, Options(scope=Scope.permitted(scope))
        )

    def set_running(
        self,
        state: str,
        machine: Running,
        *,
        images: Images | None = None,
        compress: bool = False,
        replace: bool = False,
        labels: Mapping[str, str] | None = None,
        scope: Scopes | None = None,
        wait_for: str = WaitFor.ALL,
        dry_run: bool = False,
    ) -> SetResult:
        """
        Make a state from the present condition of a machine, with its RAM. The machine is paused
        for a moment, and continues in fresh overlays, which have the names of its working images.

        :param machine: a machine that was started here, or the socket of its monitor
        :param images: its working images; not needed for a machine that was started here
        :param compress: whether to compress the RAM, after the machine continues
        :param replace: whether to replace other content under the name
        :param labels: notes of the state's owner
        :param scope: the sources to use; all if not given
        :param wait_for: which pools must have the state for the answer to be complete: ``all``,
            ``any`` or ``own``
        :raises Conflict: the name exists
        :raises RefusedError: the machine writes to an image that is not named, or that is not a
            QCOW2 image
        :raises InUse: another program is using its monitor
        """
        from statepool.backends.ramfile import RamfileBackend

        connected, socket = _either(machine)
        backend = RamfileBackend(self.context, connected, compress=compress)
        options = Options(
            replace=replace,
            labels=labels or {},
            scope=Scope.permitted(scope),
            wait_for=WaitFor.parse(wait_for),
            dry_run=dry_run,
        )
        return backend.set(
            self._running_target(_images_of(connected, images), socket), state, options
        )

    def set_running_image(
        self,
        image: str,
        state: str,
        machine: Running,
        *,
        source: str | os.PathLike[str] | None = None,
        agent: str | os.PathLike[str] | None = None,
        replace: bool = False,
        labels: Mapping[str, str] | None = None,
        scope: Scopes | None = None,
        wait_for: str = WaitFor.ALL,
        dry_run: bool = False,
    ) -> SetResult:
        """
        Make a state of an image from what a machine has written to it until this moment, without
        the RAM and without a copy. The machine continues in a fresh overlay, which has the name of
        the working image.

        :param image: the name of the image
        :param machine: a machine that was started here, or the socket of its monitor
        :param source: the working image; not needed for a machine that was started here
        :param agent: the socket of the channel to the guest's agent, which makes its file systems
            consistent; without it, the state is like a disk after a power cut
        :raises Conflict: the name exists
        :raises MachineError: the agent does not answer
        """
        from statepool.backends.live import LiveImageBackend

        connected, socket = _either(machine)
        known = _images_of(connected, {image: source} if source is not None else None)
        if image not in known:
            raise UsageError(
                f"the machine has no image {image}", hint="its images are " + ", ".join(known)
            )
        backend = LiveImageBackend(
            self.context, connected, agent=Path(agent) if agent is not None else None
        )
        options = Options(
            replace=replace,
            labels=labels or {},
            scope=Scope.permitted(scope),
            wait_for=WaitFor.parse(wait_for),
            dry_run=dry_run,
        )
        target = Target(Image(self.machine.machine, image), {image: known[image]}, socket)
        return backend.set(target, state, options)

    def _running_target(self, working: Images, monitor: Path | None = None) -> Target:
        return Target(self.machine, working, monitor)


def _either(machine: Running) -> tuple[RunningMachine | None, Path | None]:
    if isinstance(machine, str | os.PathLike):
        return None, Path(machine)
    return machine, None


def _images_of(machine: RunningMachine | None, images: Images | None) -> Images:
    if images is not None:
        return images
    if machine is None or machine.config is None:
        raise UsageError("no working image is named", hint="name one for each image of the machine")
    return machine.config.images
