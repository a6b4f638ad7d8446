"""``statepool run``."""

from __future__ import annotations

import contextlib
import os
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from statepool.capture.scratch import Scratch, scratch
from statepool.cli import complete, names
from statepool.cli import set as setting
from statepool.cli.session import Command, Session
from statepool.cli.signals import orderly
from statepool.errors import Conflict, NotFound, StatePoolError, TransportError
from statepool.handles import MachineHandle
from statepool.model.manifest import Kind
from statepool.model.outcomes import SetResult

if TYPE_CHECKING:
    from statepool.api import ImageHandle
    from statepool.machine.description import MachineConfig
    from statepool.machine.running import RunningMachine

Images = dict[str, Path]


@click.command("run", cls=Command)
@click.argument("object", shell_complete=complete.objects)
@click.argument("state", shell_complete=complete.states)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGUMENTS OF QEMU]")
@click.option(
    "--set",
    "new",
    metavar="NEW",
    help="Keep what was changed as this state, when the machine has ended.",
)
@click.option(
    "--memory",
    type=click.IntRange(min=1),
    default=512,
    metavar="MIB",
    help="RAM of the machine, in MiB; 512 if not given.",
)
@click.option(
    "--processors",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="How many processors it has; 1 if not given.",
)
@click.option(
    "--machine",
    "kind",
    default="q35",
    metavar="TYPE",
    help="Type of the machine, as QEMU's -machine; q35 if not given.",
)
@click.option("--cpu", metavar="MODEL", help="As QEMU's -cpu.")
@click.option("--kvm", is_flag=True, help="Use KVM.")
@click.option(
    "--vnc",
    metavar="DISPLAY",
    help="Show the screen there, as in 127.0.0.1:1. Without it, the serial line is here.",
)
@click.option(
    "--monitor",
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="Make a monitor there, for states to be set meanwhile.",
)
@click.option(
    "--force", is_flag=True, help="Load the RAM of the state although the machine is another one."
)
@click.pass_obj
def command(
    session: Session,
    object: str,
    state: str,
    arguments: tuple[str, ...],
    new: str | None,
    memory: int,
    processors: int,
    kind: str,
    cpu: str | None,
    kvm: bool,
    vnc: str | None,
    monitor: Path | None,
    force: bool,
) -> int:
    """
    Boot a state, and look around in it.

    The machine runs until it is switched off, or ended with Ctrl-A X on its serial line. What is
    changed is thrown away, or kept with --set. A state with RAM goes on from where it was, if the
    machine is the same one: say what it is made of. Whatever comes after -- is handed to QEMU. The
    exit code is 7 if a pool could not take the new state.
    """
    from statepool.machine.description import MIB, MachineConfig

    extra = [*(() if vnc else ("-serial", "mon:stdio")), *arguments]
    if monitor is not None:
        extra += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    config = MachineConfig(
        memory=memory * MIB,
        processors=processors,
        machine=kind,
        cpu=cpu,
        accelerator="kvm" if kvm else "tcg",
        display=f"vnc={vnc}" if vnc else "none",
        terminal=vnc is None,
        speaks_aside=session.json,
        arguments=extra,
    )
    return _Run(session, object, state, force=force).run(config, new)


class _Run:
    """One machine that the user looks at."""

    def __init__(self, session: Session, object: str, state: str, *, force: bool) -> None:
        self._session = session
        self._object = object
        self._state = state
        self._force = force
        self._handle: ImageHandle | MachineHandle = session.handle(object)
        self._machine = session.pool().machine(object.partition("/")[0])

    def run(self, config: MachineConfig, new: str | None) -> int:
        """
        Make working images, run a machine on them, and keep or discard the result.

        :returns: the exit code
        """
        if new is not None and self._is_taken(new):
            raise Conflict(
                f"{self._object} {new} exists",
                object=self._object,
                state=new,
                hint="choose another name",
            )
        with orderly(), scratch(self._machine.context.cache) as place:
            try:
                images = self._images(place.path)
            except NotFound as error:
                self._state = names.meant(self._session, self._object, self._state, error)
                images = self._images(place.path)
            self._session.close()
            with _terminal_as_it_was(), self._started(config, images) as running:
                running.wait()
            stored = self._keep(new, images, place) if new is not None else None
        return 0 if stored is None else setting.answer(self._session, stored)

    def _is_taken(self, new: str) -> bool:
        """
        Return whether a name is taken in a pool that can be asked. It is better to report this now
        than when the machine has stopped.
        """
        try:
            return self._handle.check(new)
        except TransportError:
            return self._handle.check(new, scope="own")

    def _images(self, place: Path) -> Images:
        if isinstance(self._handle, MachineHandle):
            got = self._handle.get(self._state, to=place)
            return {name: Path(path) for name, path in got.images.items()}
        name = self._handle.image.name
        self._handle.get(self._state, to=place / f"{name}.qcow2")
        return {name: place / f"{name}.qcow2"}

    def _started(self, config: MachineConfig, images: Images) -> RunningMachine:
        from statepool.machine.running import RunningMachine

        if isinstance(self._handle, MachineHandle) and self._has_ram():
            return self._handle.start(
                self._state, config, to=images, overwrite=True, force=self._force
            )
        return RunningMachine.start(config.with_images(images))

    def _has_ram(self) -> bool:
        return any(
            one.manifest.kind is Kind.RAM and one.manifest.state == self._state
            for one in self._machine.show(scope="own")
        )

    def _keep(self, new: str, images: Images, place: Scratch) -> SetResult:
        try:
            if isinstance(self._handle, MachineHandle):
                return self._handle.set(new, source=images)
            (path,) = images.values()
            return self._handle.set(new, source=path)
        except StatePoolError as error:
            place.keep()
            error.hint = f"what was changed is kept in {place.path}"
            raise


@contextlib.contextmanager
def _terminal_as_it_was() -> Iterator[None]:
    """
    Restore the terminal at the end: QEMU changes its settings, and cannot restore them if it is
    killed.
    """
    try:
        before = termios.tcgetattr(0)
    except termios.error:
        yield  # there is no terminal
        return
    blocking = os.get_blocking(0)
    try:
        yield
    finally:
        if not _is_in_the_background():
            with contextlib.suppress(termios.error, OSError):  # the terminal was closed
                termios.tcsetattr(0, termios.TCSANOW, before)
                os.set_blocking(0, blocking)


def _is_in_the_background() -> bool:
    """
    :returns: whether this process is in the background of its terminal, so that it would be stopped
        if it changed the terminal's settings
    """
    try:
        return os.tcgetpgrp(0) != os.getpgrp()
    except OSError:
        return False
