"""
Internal snapshots: states of an image that is off, kept in the image file itself.

They need no pool and no second file. They stay in the image and are never copied elsewhere. This is
for an image that stays on one host.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from attrs import frozen

from statepool.backends.base import DEFAULTS, Context, Options, StateBackend, Target
from statepool.errors import (
    Conflict,
    FileInTheWay,
    HasDependants,
    MissingFile,
    NotFound,
    UnsafeImage,
    UsageError,
)
from statepool.model.manifest import Manifest
from statepool.model.names import ROOT, check_state_name, is_name
from statepool.model.objects import Image
from statepool.model.outcomes import (
    GetResult,
    Listed,
    Presence,
    Removed,
    SetResult,
    StoredAt,
    Verified,
)
from statepool.qcow2 import opened
from statepool.qcow2.checks import Backing, check_file
from statepool.qcow2.header import Header
from statepool.qcow2.tool import QemuImg


@frozen
class Snapshot:
    """
    An internal snapshot.

    :param identifier: the identifier that QEMU uses
    :param name: the name of the state
    :param created: in seconds since the epoch
    :param ram: size of the RAM that it holds, in bytes; 0 for a state of an image that was off
    """

    identifier: str
    name: str
    created: float
    ram: int


class QCOW2Backend(StateBackend):
    """
    States of an image as internal snapshots. The target names the image as its working image.

    A get restores the content of the image and loses what was written since; so it needs permission
    to overwrite.

    :param context: the cache, the sources and the other parts to work with; neither its cache nor
        its sources are changed
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._tool = QemuImg(context.cache.settings.tool_timeout)

    # -- looking -----------------------------------------------------------------------------------

    def show(self, target: Target) -> list[Listed]:
        """:returns: the states in an image; empty if there is no image"""
        path = _path(target, needed=False)
        if path is None or not os.path.lexists(path):
            return []
        header = self._checked(target, path)
        where = (str(path),)
        named = {snapshot.name: snapshot for snapshot in reversed(self._snapshots(path))}
        found = [one for one in named.values() if one.ram == 0 and is_name(one.name)]
        return [
            Listed(
                Manifest(
                    str(target.object),
                    one.name,
                    virtual_size=header.virtual_size,
                    cluster_size=header.cluster_size,
                    created=one.created,
                ),
                where,
            )
            for one in sorted(found, key=lambda one: one.name)
        ]

    def check(self, target: Target, state: str) -> bool:
        """:returns: whether an image has a state; for the root state: whether the image exists"""
        if state == ROOT:
            return self._is_there(target)
        check_state_name(state)
        return any(listed.manifest.state == state for listed in self.show(target))

    def _checked(self, target: Target, path: Path) -> Header:
        """Check an image before any other program opens it. Raises an error if it is not safe."""
        header = check_file(path, str(path), backing=Backing.WORKING)
        name = os.fsdecode(header.backing_name) if header.backing_name is not None else None
        if (
            name is not None
            and self.context.cache.chains.parse(os.path.join(path.parent, name)) is None
        ):
            raise UnsafeImage(
                f"{path} is backed by {name}, which is not in the cache {self.context.cache.root}",
                check="backing-outside-cache",
                object=str(target.object),
                path=str(path),
                hint="make it stand alone, or begin with a working image of a state",
            )
        return header

    def _snapshots(self, path: Path) -> list[Snapshot]:
        """
        :returns: all snapshots, those of running machines included, in the order of their table
        """
        return [
            Snapshot(
                str(one["id"]),
                str(one["name"]),
                float(one["date-sec"]) + float(one["date-nsec"]) / 1e9,
                int(one["vm-state-size"]),
            )
            for one in self._tool.snapshots(path)
        ]

    def _found(self, target: Target, state: str) -> tuple[Path, list[Snapshot]]:
        """
        :returns: the image, which no other process has open, and its snapshots with a name, oldest
            first
        :raises NotFound: there is no such image
        :raises InUse: another process has it open
        """
        check_state_name(state)
        path = self._free(target)
        found = [snapshot for snapshot in self._snapshots(path) if snapshot.name == state]
        if any(snapshot.ram for snapshot in found):
            raise Conflict(
                f"{state} of {target.object} in {path} is a state of a running machine, with"
                " its RAM",
                object=str(target.object),
                state=state,
                path=str(path),
                hint="choose another name, or the backend for running machines",
            )
        return path, found

    def _free(self, target: Target) -> Path:
        path = _path(target)
        assert path is not None
        if not os.path.lexists(path):
            raise NotFound(
                f"there is no image {path}",
                object=str(target.object),
                path=str(path),
                hint=f"make it with: qemu-img create -f qcow2 {shlex.quote(str(path))} SIZE",
            )
        self._checked(target, path)
        # A lease would keep qemu-img out as well, so this only checks. qemu-img locks its images
        # itself, and so detects a process that opens the image from now on.
        with opened.exclusive(path):
            pass
        return path

    # -- the operations ----------------------------------------------------------------------------

    def get(self, target: Target, state: str, options: Options = DEFAULTS) -> GetResult:
        """
        Restore an earlier content of an image. For the root state: check that the image exists.

        :raises FileInTheWay: the image may not be overwritten
        :raises InUse: another process has it open
        """
        if state == ROOT:
            return self._get_image(target)
        path, found = self._found(target, state)
        if not found:
            raise self._missing(target, state, path)
        if not options.overwrite:
            raise FileInTheWay(
                f"{path} would lose what was written to it since {state}",
                object=str(target.object),
                state=state,
                path=str(path),
                hint="allow it to be overwritten",
            )
        if not options.dry_run:
            self._tool.apply_snapshot(path, found[0].identifier)
        return GetResult(
            str(target.object), state, (state,), "", verified=Verified.UNMANAGED, working=path
        )

    def set(self, target: Target, state: str, options: Options = DEFAULTS) -> SetResult:
        """
        Save the content of an image as a snapshot. For the root state: check that the image exists,
        since it is its own root state.

        :raises Conflict: a state of this name exists
        :raises InUse: another process has the image open
        """
        if state == ROOT:
            return self._set_image(target)
        path, found = self._found(target, state)
        if found and not options.replace:
            raise Conflict(
                f"{target.object} {state} exists in {path}",
                object=str(target.object),
                state=state,
                path=str(path),
                hint="choose another name, or have it replaced",
            )
        if not options.dry_run:
            # Make the new one first: then a state of this name exists at every moment. A search
            # finds the old one until it is removed.
            self._tool.create_snapshot(path, state)
            for _ in found:
                self._tool.delete_snapshot(path, state)
        return SetResult(str(target.object), state, "", (StoredAt(str(path), Presence.STORED),))

    def unset(self, target: Target, state: str, options: Options = DEFAULTS) -> Removed:
        """
        Remove a state from an image. For the root state: remove the image.

        :raises HasDependants: the image is to be removed, but not the states in it
        :raises InUse: another process has the image open
        """
        if state == ROOT:
            return self._unset_image(target, options)
        path, found = self._found(target, state)
        if not found:
            raise self._missing(target, state, path)
        for _ in found if not options.dry_run else ():
            self._tool.delete_snapshot(path, state)
        return Removed(str(target.object), {str(path): (state,)})

    def _missing(self, target: Target, state: str, path: Path) -> NotFound:
        return NotFound(
            f"there is no state {state} of {target.object} in {path}",
            object=str(target.object),
            state=state,
            path=str(path),
        )

    # -- the image itself --------------------------------------------------------------------------

    def _is_there(self, target: Target) -> bool:
        path = _path(target, needed=False)
        if path is None or not os.path.lexists(path):
            return False
        try:
            self._checked(target, path)
        except MissingFile:
            return False  # it was removed meanwhile
        return True

    def _get_image(self, target: Target) -> GetResult:
        path = self._free(target)
        return GetResult(
            str(target.object), ROOT, (ROOT,), "", verified=Verified.UNMANAGED, working=path
        )

    def _set_image(self, target: Target) -> SetResult:
        path = self._free(target)
        return SetResult(str(target.object), ROOT, "", (StoredAt(str(path), Presence.PRESENT),))

    def _unset_image(self, target: Target, options: Options) -> Removed:
        path = self._free(target)
        states = tuple(dict.fromkeys(snapshot.name for snapshot in self._snapshots(path)))
        if states and not options.cascade:
            raise HasDependants(
                f"{path} has the states {', '.join(states)}",
                dependants=[f"{target.object} {state}" for state in states],
                object=str(target.object),
                path=str(path),
                hint="remove them first",
            )
        if not options.dry_run:
            path.unlink()
            self.context.cache.chains.release(path)
        return Removed(str(target.object), {str(path): (*states, ROOT)})


def _path(target: Target, *, needed: bool = True) -> Path | None:
    if not isinstance(target.object, Image):
        raise UsageError(
            f"{target.object} is a machine, and this backend keeps states of images",
            hint=f"name an image: {target.object}/disk",
        )
    path = target.working.get(target.object.name)
    if path is None and needed:
        raise UsageError(f"the image file of {target.object} must be named: its states are in it")
    return Path(os.path.abspath(path)) if path is not None else None
