"""
States of the disks of a machine that continues to run: what was written so far is frozen, and the
machine switches to fresh overlays.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import define, field, frozen

from statepool.backends.base import Target
from statepool.cache.cache import Cache
from statepool.capture.frozen import Names, names_below, settle_names
from statepool.errors import InUse, MachineError, RefusedError, UnsafeImage, UsageError
from statepool.machine.agent import file_systems_frozen
from statepool.machine.disks import Disk, disk_of
from statepool.machine.jobs import run_job
from statepool.machine.running import RunningMachine
from statepool.model.manifest import Manifest, Parent
from statepool.model.objects import Image
from statepool.qcow2 import opened
from statepool.qcow2.files import open_regular
from statepool.qcow2.header import (
    apply_patches,
    backing_patch,
    is_empty_overlay,
    read_header_fd,
    read_header_file,
    reader,
)


@contextlib.contextmanager
def machine_of(target: Target, given: RunningMachine | None) -> Iterator[RunningMachine]:
    """
    Get the running machine of a target, for the length of a ``with`` block.

    :param target: with the socket of a monitor
    :param given: the machine, if it is connected already
    :returns: the machine
    :raises UsageError: the target has no monitor
    """
    if given is not None:
        yield given
    elif target.monitor is not None:
        with RunningMachine.connect(target.monitor) as machine:
            yield machine
    else:
        raise UsageError(
            f"no running machine is named for {target.object}",
            hint="name the socket of its monitor",
        )


@frozen
class _Layer:
    """
    One disk to freeze.

    :param disk: the disk of the machine
    :param names: the names of its image
    :param node: the block node name of the overlay in QEMU
    """

    disk: Disk
    names: Names
    node: str


@define
class Freezing:
    """
    The freezing of the disks of a running machine.

    :param cache: the cache that holds the chains of their images
    :param machine: the running machine
    :param images: its working images, absolute, by their image objects
    """

    cache: Cache
    machine: RunningMachine
    images: Mapping[Image, Path]
    _layers: dict[Image, _Layer] = field(factory=dict)
    _is_frozen: bool = False

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """
        Prepare everything for freezing, for the length of a ``with`` block. If the block fails, the
        machine goes back to its previous images.

        :raises NotFound: the machine does not use one of the images
        :raises RefusedError: the machine cannot write to one of them
        :raises UnsafeImage: one of them is not backed by the cache
        """
        try:
            for image, path in self.images.items():
                self._layers[image] = self._prepare(image, path)
            yield
        except BaseException:
            if self._is_frozen:
                with contextlib.suppress(MachineError):  # the first error says more
                    self._melt()
            else:
                self._drop()
            raise

    def look(self) -> None:
        """Check whether freezing is possible, as :meth:`prepared` does, and change nothing."""
        for image, path in self.images.items():
            disk_of(self.machine, path)
            self._chain(image, path)

    def _prepare(self, image: Image, path: Path) -> _Layer:
        settle_names(path, self.cache.chains.leads_here)
        disk = disk_of(self.machine, path)
        self._mend(image, disk, path)
        names = Names.new(path)
        chain = self._chain(image, path)
        if chain:
            self.cache.chains.use(chain, Path(names.below))
        try:
            names.prepare(disk.size)
        except BaseException:
            self.cache.chains.release(Path(names.below))
            raise
        return _Layer(disk, names, "statepool-" + secrets.token_hex(6))

    def _mend(self, image: Image, disk: Disk, path: Path) -> None:
        """
        Recover after a crash: a process that had frozen this image was killed. If the frozen image
        has become a state, rebase this image to the backing chain of that.

        :raises RefusedError: the frozen image is not a state
        """
        names = names_below(path)
        if names is None:
            return
        with open_regular(names.below) as descriptor:
            header = read_header_fd(descriptor, str(names.below))
            is_state = is_empty_overlay(reader(descriptor), header)
        if not is_state:
            raise RefusedError(
                f"{path} stands on {names.below}, which was frozen to become a state when that was"
                " cut off",
                path=str(path),
                hint="end the machine; the next command on this image puts it right",
            )
        chain = self._chain(image, Path(names.below))
        record = self.cache.chains.use(chain, path)
        backing = str(self.cache.chains.path(chain))
        self.machine.execute(
            "change-backing-file", device=disk.node, image_node_name=disk.node, backing_file=backing
        )
        self.cache.chains.release(path, besides=record)
        names.below.remove()
        self.cache.chains.release(Path(names.below))

    def _chain(self, image: Image, path: Path) -> tuple[Manifest, ...]:
        """:returns: the chain that backs an image, tip first; empty if nothing backs it"""
        header = read_header_file(path)
        if header.backing_name is None:
            return ()
        found = self.cache.chains.parse(os.path.join(path.parent, os.fsdecode(header.backing_name)))
        fold = self.cache.pool.fold(image.machine)
        parent = (
            fold.find(str(image), Parent(found.state, found.digest)) if found is not None else None
        )
        if parent is None:
            raise UnsafeImage(
                f"{path} is backed by {os.fsdecode(header.backing_name)}, which is no state of"
                f" {image} in the cache {self.cache.root}",
                check="backing-outside-cache",
                path=str(path),
                hint=f"run the machine on a working image: statepool get {image} STATE --to FILE",
            )
        return fold.chain(parent)

    @property
    def frozen_images(self) -> dict[Image, Path]:
        """The frozen images: what was written until the moment of freezing."""
        return {image: Path(layer.names.below) for image, layer in self._layers.items()}

    def freeze(self, agent: Path | None = None) -> None:
        """
        Freeze all disks at one moment. The guest stays running or paused, as it was.

        :param agent: the socket of the channel to a guest agent, which makes the guest's file
            systems consistent
        :raises MachineError: QEMU or the agent failed; nothing is frozen
        """
        actions = [
            {
                "type": "blockdev-snapshot-sync",
                "data": {
                    "node-name": layer.disk.node,
                    "snapshot-file": str(layer.names.live),
                    "snapshot-node-name": layer.node,
                    "format": "qcow2",
                    "mode": "existing",
                },
            }
            for layer in self._layers.values()
        ]
        with file_systems_frozen(agent):
            self.machine.execute("transaction", actions=actions)
            self._is_frozen = True

    def switch(self) -> None:
        """
        Give the overlays the names of the images. The guest does not have to wait for that.

        :raises RefusedError: QEMU keeps an image open for writing
        """
        for layer in self._layers.values():
            layer.names.switch()
        for layer in self._layers.values():
            _require_unwritten(layer)

    def settle(self, chains: Mapping[Image, tuple[Manifest, ...]]) -> None:
        """
        Rebase the machine's images to the states in the cache that the frozen images have become.

        :param chains: the chains of the states, tip first
        """
        for image, layer in self._layers.items():
            chain = chains[image]
            record = self.cache.chains.use(chain, layer.names.working)
            self._rebase(layer, str(self.cache.chains.path(chain)))
            self.cache.chains.release(layer.names.working, besides=record)
            layer.names.below.remove()
            self.cache.chains.release(Path(layer.names.below))

    def _rebase(self, layer: _Layer, backing: str) -> None:
        try:
            self.machine.execute(
                "change-backing-file",
                device=layer.node,
                image_node_name=layer.node,
                backing_file=backing,
            )
        except MachineError:
            # QEMU has ended meanwhile. If it has not, the lease is refused.
            with opened.exclusive(layer.names.working) as descriptor:
                header = read_header_fd(descriptor, str(layer.names.working))
                apply_patches(descriptor, backing_patch(reader(descriptor), header, backing) or ())
            layer.names.live.remove()

    def _drop(self) -> None:
        """Remove what was prepared: nothing was frozen."""
        for layer in self._layers.values():
            layer.names.clear()
            self.cache.chains.release(Path(layer.names.below))

    def _melt(self) -> None:
        """
        Write the changes since the freezing back into the frozen images, and let the machine
        continue there. A machine that has ended stays on its overlay.
        """
        for layer in self._layers.values():
            names = layer.names
            names.take_back()
            try:
                run_job(
                    self.machine,
                    "block-commit",
                    what=f"go back to {names.working}",
                    device=layer.node,
                    base_node=layer.disk.node,
                    auto_dismiss=False,
                    complete=True,
                )
            except MachineError:
                names.switch()
                raise
            names.clear()
            self.cache.chains.release(Path(names.below))
        self._layers = {}


def _require_unwritten(layer: _Layer) -> None:
    try:
        with opened.shared(layer.names.below):
            pass
    except InUse as error:
        raise RefusedError(
            f"QEMU keeps {layer.names.working} open for writing below an overlay, so that it cannot"
            " become a state",
            path=str(layer.names.working),
            hint="give the file's block node auto-read-only=on, or let -drive make it",
        ) from error
