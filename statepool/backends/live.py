"""
States of running machines: internal snapshots with their RAM, and states of single disks while the
machine continues to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import evolve

from statepool.backends.base import DEFAULTS, Context, Options, StateBackend, Target
from statepool.backends.external import QCOW2ExtBackend
from statepool.backends.freezing import Freezing, machine_of
from statepool.capture.capture import CaptureResult, absolute
from statepool.errors import Conflict, MachineError, NotFound, RefusedError, UsageError
from statepool.machine.disks import writable
from statepool.machine.running import RunningMachine
from statepool.machine.snapshots import delete_snapshot, load_snapshot, save_snapshot, snapshots
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.names import ROOT, check_state_name
from statepool.model.objects import Image, Machine
from statepool.model.outcomes import GetResult, Listed, Presence, Removed, SetResult, StoredAt


class QCOW2VTBackend(StateBackend):
    """
    States of a running machine as internal snapshots of all images that it can write to. The
    snapshots lie in the working images themselves, and are removed with them.

    :param context: the cache, the sources and the other parts to work with
    :param machine: the running machine, if it is connected already; otherwise each target names the
        socket of its monitor
    """

    def __init__(self, context: Context, machine: RunningMachine | None = None) -> None:
        super().__init__(context)
        self._machine = machine

    def show(self, target: Target) -> list[Listed]:
        """:returns: the snapshots that all of the machine's writable disks have"""
        with machine_of(target, self._machine) as machine:
            return [
                Listed(
                    Manifest(object=_machine_id(target), state=tag, kind=Kind.MACHINE, size=size),
                    (str(machine),),
                )
                for tag, size in snapshots(machine).items()
            ]

    def check(self, target: Target, state: str) -> bool:
        """
        :returns: whether there is such a snapshot; for the root state: whether the machine runs
        """
        if state == ROOT:
            return self._runs(target)
        check_state_name(state)
        with machine_of(target, self._machine) as machine:
            return state in snapshots(machine)

    def get(self, target: Target, state: str, options: Options = DEFAULTS) -> GetResult:
        """
        Restore the machine. Afterwards it runs if it ran before, and is paused if it was paused.

        :raises NotFound: there is no such snapshot on all disks; for the root state: the machine
            does not run
        """
        if state == ROOT:
            if not self._runs(target):
                raise NotFound(
                    f"{target.object} does not run",
                    object=str(target.object),
                    state=state,
                    hint="start it",
                )
            return GetResult(str(target.object), state, (state,), "")
        check_state_name(state)
        with machine_of(target, self._machine) as machine:
            if options.dry_run:
                if state not in snapshots(machine):
                    raise NotFound(
                        f"{machine} has no snapshot {state}",
                        object=_machine_id(target),
                        state=state,
                    )
            else:
                load_snapshot(machine, state, progress=self.context.progress)
            return GetResult(_machine_id(target), state, (state,), "", source=str(machine))

    def set(self, target: Target, state: str, options: Options = DEFAULTS) -> SetResult:
        """
        Save the condition of the machine. It is paused meanwhile.

        :raises Conflict: such a snapshot exists, and replacing was not asked for
        :raises RefusedError: the machine writes to an image that cannot have snapshots
        :raises UsageError: the state is the root state
        """
        _require_snapshot(target, state)
        with machine_of(target, self._machine) as machine:
            there = any(state in disk.tags for disk in writable(machine))
            if there and not options.replace:
                raise Conflict(
                    f"{machine} has a snapshot {state} already",
                    object=_machine_id(target),
                    state=state,
                    hint="choose another name, or have it replaced",
                )
            if not options.dry_run:
                if there:
                    self._replace(machine, state)
                else:
                    save_snapshot(machine, state, progress=self.context.progress)
            return SetResult(
                _machine_id(target), state, "", (StoredAt(str(machine), Presence.STORED),)
            )

    def _replace(self, machine: RunningMachine, state: str) -> None:
        """
        Replace a snapshot. A snapshot cannot be renamed: so the old one is removed only when there
        is certainly room for the new one.
        """
        passing = f"{state}.new"
        if any(passing in disk.tags for disk in writable(machine)):
            delete_snapshot(machine, passing)
        save_snapshot(machine, passing, progress=self.context.progress)
        delete_snapshot(machine, state)
        try:
            save_snapshot(machine, state, progress=self.context.progress)
        except MachineError as error:
            raise MachineError(
                f"{error.message}; what should become {state} is kept as {passing}", state=state
            ) from error
        delete_snapshot(machine, passing)

    def unset(self, target: Target, state: str, options: Options = DEFAULTS) -> Removed:
        """
        Remove a snapshot from all disks that have it.

        :raises NotFound: no disk has it
        :raises UsageError: the state is the root state
        """
        _require_snapshot(target, state)
        with machine_of(target, self._machine) as machine:
            if options.dry_run:
                if not any(state in disk.tags for disk in writable(machine)):
                    raise NotFound(
                        f"{machine} has no snapshot {state}",
                        object=_machine_id(target),
                        state=state,
                    )
            else:
                delete_snapshot(machine, state, progress=self.context.progress)
            return Removed(_machine_id(target), {str(machine): (state,)})

    def _runs(self, target: Target) -> bool:
        try:
            with machine_of(target, self._machine) as machine:
                return bool(machine.status())
        except (MachineError, NotFound):
            return False


def _machine_id(target: Target) -> str:
    if not isinstance(target.object, Machine):
        raise UsageError(
            f"{target.object} is an image, and this backend keeps states of machines",
            hint=f"name the machine: {target.object.machine}",
        )
    return target.object.machine


def _require_snapshot(target: Target, state: str) -> None:
    if check_state_name(state) == ROOT:
        raise UsageError(
            f"the root state of a running machine is that it runs: {target.object}",
            hint="start it, or stop it",
        )


class LiveImageBackend(QCOW2ExtBackend):
    """
    States of an image, in the form of the default backend, set while a machine runs on the image.
    What was written so far is frozen and becomes the state without a copy. The machine continues in
    a fresh overlay, which has the name of the working image.

    :param context: the cache, the sources and the other parts to work with
    :param machine: the running machine, if it is connected already; otherwise each target names the
        socket of its monitor
    :param agent: the socket of the channel to the guest's agent, which makes its file systems
        consistent. Without it, a state is like a disk after a power cut
    """

    def __init__(
        self, context: Context, machine: RunningMachine | None = None, *, agent: Path | None = None
    ) -> None:
        super().__init__(context)
        self._machine = machine
        self._agent = agent

    def own_places(self, target: Target, options: Options) -> Mapping[str, Path]:
        """
        :raises RefusedError: a working image is named: the machine runs on it
        """
        for path in target.working.values():
            raise RefusedError(
                f"{target.object} is in use by a machine that runs: its disk cannot become another"
                " one under the guest's file systems",
                path=str(path),
                hint="stop the machine first; or get a state with its RAM",
            )
        return {}

    def own_set(self, target: Target, wanted: StateId, options: Options) -> CaptureResult:
        """Capture the image as the default backend does, while the machine runs."""
        if len(target.working) != 1 or not isinstance(target.object, Image):
            raise UsageError(
                f"one working image of {wanted.object} must be named to set a state from",
                hint="--from FILE",
            )
        (working,) = target.working.values()
        path = absolute(working)
        refuse_taken(self.context, wanted, options)
        with machine_of(target, self._machine) as machine:
            machine.require_settled()
            freezing = Freezing(self._cache, machine, {target.object: path})
            if options.dry_run:
                freezing.look()
                return CaptureResult(Manifest(*wanted))
            self._cache.prepare()
            with freezing.prepared():
                freezing.freeze(self._agent)
                freezing.switch()
                (below,) = freezing.frozen_images.values()
                taken = evolve(self._capture(wanted, {wanted: below}, options), running=True).run()
            freezing.settle({target.object: self._cache.pool.chain(wanted)})
            return taken


def refuse_taken(context: Context, wanted: StateId, options: Options) -> None:
    """
    Check before anything is frozen whether a name is taken.

    :raises Conflict: the name is taken, and replacing was not asked for
    """
    there = context.cache.pool.find(wanted)
    if there is not None and not options.replace:
        raise Conflict(
            f"{wanted} exists in {context.cache.pool}",
            object=wanted.object,
            state=wanted.state,
            pool=str(context.cache.pool),
            hint="choose another name, or have it replaced",
        )
