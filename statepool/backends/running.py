"""
What can be asked of a machine while it runs: the part of its handle that needs QEMU, which is
imported when it is asked for.
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
    """A machine that runs: one that is connected to, or the socket of its monitor."""

Images = Mapping[str, str | os.PathLike[str]]
"""Working images, by the names of a machine's images."""


class RunningStates:
    """States of a machine with its RAM. A mixin of the handle."""

    machine: Machine

    @property
    def context(self) -> Context:
        """What the backends work with."""
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
        Bring a state with RAM here, make working images, and start a QEMU on them that goes on from
        it. It ends with this process, and when it is closed, as a ``with`` block does.

        :param config: what the machine is made of, but for its images; they are plugged in in its
            order
        :param to: the working image of each image
        :param overwrite: whether files there give way
        :param force: load the RAM into another machine than it is of, all the same
        :param paused: let it stand still
        :param scope: from where the state may come; from anywhere if not given
        :raises NotFound: nobody has the state, or it has no RAM
        :raises Incompatible: the machine is another one than the state is of
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
        in the places of the old ones.

        :param machine: which goes on to be usable
        :param force: load the RAM into another machine than it is of, all the same
        :param paused: let it stand still
        :raises NotFound: nobody has the state, or it has no RAM; the machine goes on
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
        Let a QEMU go on from a state that somebody has started with ``-incoming defer`` on its
        fresh working images.

        :param monitor: the socket of its monitor
        :param force: load the RAM into another machine than it is of, all the same
        :raises NotFound: nobody has the state, or it has no RAM
        :raises RefusedError: it does not wait, or does not stand on fresh working images of the
            state
        :raises Incompatible: it is another machine than the state is of
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
        Make what a machine is like at this moment a state, with its RAM. It stands still for a
        moment, and goes on in fresh overlays, which have the names of its working images.

        :param machine: a machine that was started here, or the socket of its monitor
        :param images: its working images; not needed for one that was started here
        :param compress: whether the RAM is compressed, after the machine goes on
        :param replace: whether other content under the name gives way
        :param labels: what its owner wants to remember
        :param scope: which sources; all if not given
        :param wait_for: which pools must have the state for the answer to be complete: ``all``,
            ``any`` or ``own``
        :raises Conflict: the name exists
        :raises RefusedError: it writes to an image that is not named, or that is no QCOW2 image
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
        Make what a machine has written to one of its disks until this moment a state of that image,
        without its RAM and without copying it. The machine goes on in a fresh overlay, which has
        the name of the working image.

        :param image: the name of the image
        :param machine: a machine that was started here, or the socket of its monitor
        :param source: the working image; not needed for a machine that was started here
        :param agent: the socket of the channel to the guest's agent, which makes its file systems
            consistent; else the state is what a power cut would have left
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
