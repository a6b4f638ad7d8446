"""
States of running machines: the RAM in a file and the disks as external overlays, all of the same
moment and published together.

They are states like all others: they are fetched from sources, stored there, and every byte is
checked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from attrs import evolve

from statepool.backends.base import DEFAULTS, Context, Options, Target
from statepool.backends.freezing import Freezing, machine_of
from statepool.backends.live import refuse_taken
from statepool.backends.machines import QCOW2MachineBackend
from statepool.cache.chains import Chains, key_of
from statepool.cache.working import refuse_inside
from statepool.capture.capture import CaptureResult, absolute, files_of
from statepool.errors import NotFound, RefusedError
from statepool.machine import stream
from statepool.machine.description import MachineConfig
from statepool.machine.disks import disks, is_same_file
from statepool.machine.fingerprint import fingerprint, require_same
from statepool.machine.ram import load_ram, prepare_ram, save_ram
from statepool.machine.running import RunningMachine
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.objects import Image
from statepool.model.outcomes import GetResult
from statepool.pools import layout
from statepool.pools.parts import chains_of
from statepool.qcow2.files import open_regular
from statepool.qcow2.header import is_empty_overlay, read_header_fd, reader
from statepool.sources.pool_source import pools_of

COMPRESSION = "compression"
"""The field of a fingerprint that names the compression of the RAM."""

INCOMING = ("-incoming", "defer")
"""The arguments with which QEMU waits for RAM."""


class RamfileBackend(QCOW2MachineBackend):
    """
    States of running machines, with their RAM.

    :param context: the cache, the sources and the other parts to work with
    :param machine: the running machine, if it is connected already; otherwise a target names the
        socket of its monitor
    :param compress: of set: whether to compress the RAM with zstd, after the machine continues
    :param force: of get: load the RAM even if the machine has another fingerprint
    """

    def __init__(
        self,
        context: Context,
        machine: RunningMachine | None = None,
        *,
        compress: bool = False,
        force: bool = False,
    ) -> None:
        super().__init__(context)
        self._machine = machine
        self._compress = compress
        self._force = force

    # -- setting -----------------------------------------------------------------------------------

    def own_set(self, target: Target, wanted: StateId, options: Options) -> CaptureResult:
        """
        Make a state of the cache from the present condition of the machine. The machine is paused
        meanwhile, and continues in fresh overlays, which have the names of its working images.

        :raises Conflict: the name exists
        :raises RefusedError: the machine writes to an image that is not named, or that cannot have
            states
        """
        self._require_named(target)
        refuse_taken(self.context, wanted, options)
        images = {
            Image(wanted.machine, name): absolute(path) for name, path in target.working.items()
        }
        for image in images:
            refuse_taken(self.context, StateId(str(image), wanted.state), options)
        with machine_of(target, self._machine) as machine:
            machine.require_settled()
            _require_all(machine, images)
            freezing = Freezing(self._cache, machine, images)
            if options.dry_run:
                freezing.look()
                return CaptureResult(Manifest(*wanted))
            self._cache.prepare()
            with self._room_for_ram() as ram:
                return self._take(machine, freezing, ram, wanted, options)

    @contextlib.contextmanager
    def _room_for_ram(self) -> Iterator[Path]:
        """
        Reserve a path at which RAM can be gathered; what a crash leaves there is cleared away
        later.
        """
        staging = self._cache.pool.stage([])
        path = self._cache.root / layout.gathered(staging.marker.nonce)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
            staging.end()

    def _take(
        self,
        machine: RunningMachine,
        freezing: Freezing,
        ram: Path,
        wanted: StateId,
        options: Options,
    ) -> CaptureResult:
        with freezing.prepared(), contextlib.ExitStack() as stack:
            marks = fingerprint(machine)
            with open(ram, "xb") as file:
                label = prepare_ram(machine, file.fileno())
                with machine.held() as running:
                    if running:
                        machine.pause()
                    save_ram(machine, file.fileno(), label=label)
                    freezing.freeze()
            freezing.switch()
            if self._compress:
                compressed = stack.enter_context(self._room_for_ram())
                stream.compress(ram, compressed, progress=self.context.progress)
                ram.unlink()
                ram, marks[COMPRESSION] = compressed, stream.ZSTD
            files = files_of(
                wanted, {image.name: below for image, below in freezing.frozen_images.items()}, ram
            )
            taken = evolve(
                self._capture(wanted, files, options), fingerprint=marks, running=True
            ).run()
        pool = self._cache.pool
        freezing.settle(
            {image: pool.chain(StateId(str(image), wanted.state)) for image in freezing.images}
        )
        return taken

    # -- getting -----------------------------------------------------------------------------------

    def own_places(self, target: Target, options: Options) -> Mapping[str, Path]:
        """
        Check whether the working images can be made, as for a machine that is off.

        :raises RefusedError: working images are named for a machine that runs
        """
        if (target.monitor is not None or self._machine is not None) and target.working:
            raise RefusedError(
                f"{target.object} runs already: its disks cannot become others under its guest",
                hint=(
                    "make the working images first, start QEMU on them with -incoming defer, and"
                    " then get the state into it"
                ),
            )
        return super().own_places(target, options)

    def own_get(
        self,
        target: Target,
        chain: tuple[Manifest, ...],
        places: Mapping[str, Path],
        options: Options,
    ) -> Path | None:
        """
        Make the target's working images; or let a machine that waits on them (``-incoming defer``)
        continue from the state.
        """
        if target.monitor is None and self._machine is None:
            return super().own_get(target, chain, places, options)
        with machine_of(target, self._machine) as machine:
            _require_fresh(machine, self._cache.chains, chain)
            self.load(machine, target, chain[0].state)
        return None

    def load(
        self, machine: RunningMachine, target: Target, state: str, *, paused: bool = False
    ) -> None:
        """
        Load the RAM of a cached state into a machine that waits for it, and let the machine run.

        :param paused: leave it paused
        :raises NotFound: the state has no RAM
        :raises Incompatible: the machine differs from that of the RAM
        :raises IntegrityError: QEMU could not load it
        """
        ram = self._ram(target, state)
        if not self._force:
            require_same(machine, ram.fingerprint, f"{target.object} {state}")
        assert ram.digest is not None
        with stream.readable(
            self._cache.data(ram.digest), ram.fingerprint.get(COMPRESSION, "")
        ) as descriptor:
            load_ram(machine, descriptor)
        if not paused:
            machine.resume()

    def _ram(self, target: Target, state: str) -> Manifest:
        found = self._cache.pool.find(StateId(str(target.object), state, Kind.RAM))
        if found is None:
            raise NotFound(
                f"{target.object} {state} has no RAM: it is a state of a machine that was off",
                object=str(target.object),
                state=state,
                hint="get its images, and start the machine on them",
            )
        return found

    def start(
        self,
        target: Target,
        state: str,
        config: MachineConfig,
        options: Options = DEFAULTS,
        *,
        paused: bool = False,
    ) -> tuple[GetResult, RunningMachine]:
        """
        Bring a state to this host, make working images, and start a machine on them that continues
        from the state. The machine is ours: it ends with this process.

        :param target: with a working image for each image of the state
        :param config: the configuration of the machine, without its images
        :param paused: leave it paused
        :returns: the outcome, and the machine
        :raises Incompatible: the machine differs from that of the state
        """
        got = self.get(target, state, options)
        images = {name: absolute(path) for name, path in target.working.items()}
        ordered = {
            name: images[name]
            for name in [
                *(name for name in config.images if name in images),
                *sorted(set(images) - set(config.images)),
            ]
        }
        self._ram(target, state)
        machine = RunningMachine.start(config.with_images(ordered), arguments=INCOMING)
        try:
            self.load(machine, target, state, paused=paused)
        except BaseException:
            machine.close()
            raise
        return got, machine

    def reload(
        self,
        machine: RunningMachine,
        target: Target,
        state: str,
        options: Options = DEFAULTS,
        *,
        paused: bool = False,
    ) -> GetResult:
        """
        End a machine of ours, and start it again from a state, on new working images that replace
        the old ones.

        :raises RefusedError: the machine is not ours, or runs inside the cache or a source
        """
        if machine.config is None:
            raise RefusedError(
                f"{machine} is not ours to be started again",
                hint="end it, and start it with -incoming defer",
            )
        bare = evolve(target, working={}, monitor=None)
        for path in machine.config.images.values():
            refuse_inside(absolute(path).parent, self._cache, pools_of(self.context.sources))
        # everything that can fail is done before the machine is ended
        self.get(bare, state, options)
        self._ram(bare, state)
        machine.close()
        got = self.get(
            evolve(bare, working=machine.config.images), state, evolve(options, overwrite=True)
        )
        machine.restart(arguments=INCOMING)
        try:
            self.load(machine, target, state, paused=paused)
        except BaseException:
            machine.close()
            raise
        return got


def _require_all(machine: RunningMachine, images: Mapping[Image, Path]) -> None:
    """Require a state of every disk that the guest can write to: the RAM refers to all of them."""
    for disk in disks(machine):
        if not disk.read_only and not any(
            is_same_file(disk.path, path) for path in images.values()
        ):
            raise RefusedError(
                f"{machine} also writes to {disk}, which would be no part of the state",
                hint="name it as one of its images",
            )


def _require_fresh(machine: RunningMachine, chains: Chains, parts: Sequence[Manifest]) -> None:
    """
    Require RAM and disks of the same moment: each disk that the guest can write to has to be an
    empty overlay over the state.
    """
    keys = set(map(key_of, chains_of(parts, lambda manifest: manifest)))
    for disk in disks(machine):
        if not disk.read_only and not _stands_fresh(disk.path, chains, keys):
            raise RefusedError(
                f"{disk} is no unwritten working image of the state: its RAM would not fit to it",
                path=str(disk.path),
                hint="get the state's images anew, and start QEMU on them with -incoming defer",
            )


def _stands_fresh(path: Path, chains: Chains, keys: AbstractSet[Digest]) -> bool:
    with open_regular(path) as descriptor:
        header = read_header_fd(descriptor, str(path))
        if header.backing_name is None or not is_empty_overlay(reader(descriptor), header):
            return False
    standing = chains.parse(os.path.join(path.parent, os.fsdecode(header.backing_name)))
    return standing is not None and standing.key in keys
