"""
Find the state of the cache that backs a working image.

The answer is certain in three cases. The image names a chain of this cache. It names a chain of a
cache that was moved, or of another cache that has the same states: the directory of a chain is
named by the digest of all its names and bytes. Or it names a state in the view of this cache. In
all other cases a hint says what to do.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from attrs import frozen

from statepool.cache.cache import Cache
from statepool.cache.chains import CHAINS, key_of
from statepool.errors import Conflict, StatePoolError, UnsafeImage
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, StateId
from statepool.model.names import ROOT
from statepool.pools import layout
from statepool.pools.fold import Fold
from statepool.qcow2.files import refusal


@frozen
class Backing:
    """
    The meaning of a working image's backing name.

    :param path: the name, made absolute
    :param state: the name of the state that it can mean
    :param key: of a chain, if the path is in the chains of some cache, wherever that cache is
    :param digest: the bytes in the data of this cache to which the path leads, if it does
    """

    path: str
    state: str
    key: Digest | None
    digest: Digest | None

    @classmethod
    def of(cls, cache: Cache, working: Path, name: bytes) -> Backing:
        """
        :param working: the image, absolute
        :param name: its backing name
        """
        path = os.path.join(working.parent, os.fsdecode(name))
        directory, last = os.path.split(path)
        above, chain = os.path.split(directory)
        real, file = os.path.split(os.path.realpath(path))
        return cls(
            path,
            last.removesuffix(".qcow2"),
            Digest.from_file_name(chain) if above.endswith(f"/{CHAINS}") else None,
            (
                Digest.from_file_name(file)
                if real == os.path.realpath(cache.root / layout.DATA)
                else None
            ),
        )

    @property
    def cache(self) -> str:
        """The directory of the cache that the path is in, if it names a chain."""
        return self.path.rpartition(f"/{CHAINS}/")[0]

    def states(self, cache: Cache, fold: Fold) -> Iterator[Manifest]:
        """:returns: the states with this very chain, of whatever object"""
        for manifest in fold.manifests:
            if self.key is not None:
                found = manifest.state == self.state and key_of(fold.chain(manifest)) == self.key
            else:
                # QEMU looks for the backing file beside the name that it was given: there is no
                # file of that name in the data directory.
                view = os.path.realpath(os.path.dirname(cache.root / layout.view(manifest.id)))
                is_view = (
                    manifest.state == self.state
                    and os.path.realpath(os.path.dirname(self.path)) == view
                )
                found = (
                    manifest.digest is not None
                    and manifest.digest == self.digest
                    and (is_view or manifest.parent is None)
                )
            if found:
                yield manifest


def parent_of(cache: Cache, state: StateId, working: Path, name: bytes) -> Manifest:
    """
    :param state: the state that the image will become
    :param working: the image, absolute
    :param name: its backing name
    :returns: the state of the same object that backs the image
    :raises UnsafeImage: a file that is no state of the cache backs it; or it is to become the root
        state, and is backed by another one
    :raises Conflict: a state of another object backs it, or a file that is no longer a state
    """
    backing = Backing.of(cache, working, name)
    found = next(
        (
            one
            for one in backing.states(cache, cache.pool.fold(state.machine))
            if one.object == state.object
        ),
        None,
    )
    if found is None:
        raise _why(cache, state, working, backing)
    if state.state == ROOT and found.id != state:
        problem = f"it stands on {found.id}, and a root state stands on nothing"
        raise refusal(
            "backing",
            str(working),
            problem,
            hint=f"set it under another name; or {_alone(working)}",
            path=str(working),
        )
    return found


def _alone(working: Path) -> str:
    return (
        "make it stand alone, and set what that makes: qemu-img convert -f qcow2 -O qcow2"
        f" {shlex.quote(str(working))} NEW.qcow2"
    )


def _why(cache: Cache, state: StateId, working: Path, backing: Backing) -> StatePoolError:
    conflict: Callable[..., Conflict] = partial(
        Conflict, object=state.object, state=state.state, path=str(working)
    )
    outside = partial(
        UnsafeImage,
        check="backing-outside-cache",
        object=state.object,
        state=state.state,
        path=str(working),
    )
    file = shlex.quote(str(working))
    alone = _alone(working)
    other = _other(cache, backing)
    if other is not None:
        return conflict(
            f"{working} stands on {other.state} of {other.object}, not on a state of"
            f" {state.object}",
            hint=(
                f"set it as a state of that: statepool set {other.object} {state.state} --from"
                f" {file}; or {alone}"
            ),
        )
    if not os.path.exists(backing.path):
        return outside(
            f"{working} is backed by {backing.path}, which is not there, and which is no state of"
            f" {state.object} in the cache {cache.root}",
            hint=(
                "bring it back, or say where it is now: qemu-img rebase -u -f qcow2 -F qcow2 -b"
                f" PLACE {file}"
            ),
        )
    if backing.key is not None and os.path.realpath(backing.cache) == os.path.realpath(cache.root):
        return conflict(
            f"{working} stands on {backing.state}, which is no state of {state.object} in the cache"
            " any more",
            hint=f"nothing of it is lost: {alone}",
        )
    if backing.key is not None:
        return outside(
            f"{working} stands on {backing.state} of another cache, {backing.cache}, which this"
            f" one, {cache.root}, does not have",
            hint=(
                f"name that cache: statepool --cache {shlex.quote(backing.cache)} set"
                f" {state.object} {state.state} --from {file}; or {alone}"
            ),
        )
    return outside(
        f"{working} is backed by {backing.path}, which is no state of {state.object} in the cache"
        f" {cache.root}",
        hint=f"{alone}; or begin with: statepool get OBJECT STATE --to FILE",
    )


def _other(cache: Cache, backing: Backing) -> Manifest | None:
    """:returns: a state of another object that backs an image"""
    folds, _ = cache.pool.usable_folds(cache.pool.logged_machines())
    return next(
        (manifest for fold in folds.values() for manifest in backing.states(cache, fold)), None
    )
