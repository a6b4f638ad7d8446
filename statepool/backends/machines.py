"""
States of whole machines that are off: all images of a machine are set, got and removed together.

A machine state is a record that lists a state of each image. The states of the images are external
overlays, as the default backend for images makes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from attrs import evolve

from statepool.backends.base import DEFAULTS, Context, Options, Target
from statepool.backends.external import QCOW2ExtBackend
from statepool.backends.sourced import SourcedStateBackend
from statepool.cache.get_journal import make_together
from statepool.cache.working import check_place
from statepool.capture.capture import CaptureResult, absolute, files_of
from statepool.errors import Conflict, NotFound, UsageError
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.names import ROOT, check_state_name
from statepool.model.objects import Image, Machine
from statepool.model.outcomes import GetResult, Presence, Removed, SetResult, StoredAt
from statepool.pools.fold import member_ids
from statepool.pools.parts import chains_of
from statepool.sources.pool_source import Place, pools_of

T = TypeVar("T")


class QCOW2MachineBackend(SourcedStateBackend):
    """
    States of machines, as states of all their images in the cache and its sources.

    :param context: the cache, the sources and the other parts to work with
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._of_images = QCOW2ExtBackend(context)

    # -- what a machine state is, and where --------------------------------------------------------

    def own_state(self, target: Target, state: str) -> StateId:
        """:returns: the state of a machine that a target and a name mean"""
        return StateId(_machine_of(target).machine, check_state_name(state), Kind.MACHINE)

    def images(self, target: Target, state: str, options: Options = DEFAULTS) -> tuple[str, ...]:
        """
        :returns: the names of the images that a machine state has
        :raises NotFound: the state is not available
        """
        if state == ROOT:
            return tuple(
                image.object.name for image in self._each(target) if isinstance(image.object, Image)
            )
        wanted = self.own_state(target, state)
        try:
            found = self._supply(options).look(wanted)
        except NotFound as error:
            raise self._explained(target, state, error) from error.__cause__
        manifest = found.offers[0].members[0].manifest if found.offers else found.cached
        assert manifest is not None
        return tuple(
            sorted(
                member.object.partition("/")[2]
                for member in member_ids(manifest)
                if member.kind is Kind.IMAGE
            )
        )

    def check(self, target: Target, state: str, options: Options = DEFAULTS) -> bool:
        """
        :returns: whether the cache, or a source that the scope permits, has a state; for the root
            state: whether each image has one
        """
        if state == ROOT:
            return all(self._of_images.check(image, ROOT, options) for image in self._each(target))
        return super().check(target, state, options)

    # -- getting -----------------------------------------------------------------------------------

    def get(self, target: Target, state: str, options: Options = DEFAULTS) -> GetResult:
        """
        Bring a state of all images to this host. If the target has working images, make all of
        them, or none.

        :raises NotFound: the state is not available
        :raises UsageError: working images are named for images that the state does not have
        """
        if state == ROOT:
            return self._get_roots(target, options)
        try:
            if target.working:
                self._require_all(target, state, self.images(target, state, options))
            result = super().get(target, state, options)
        except NotFound as error:
            raise self._explained(target, state, error) from error.__cause__
        return _of_machine(result, target.working)

    def _require_all(self, target: Target, state: str, images: Iterable[str]) -> None:
        lacking, strange = (
            sorted(set(images) - set(target.working)),
            sorted(set(target.working) - set(images)),
        )
        if lacking or strange:
            what = [f"it has {', '.join(lacking)}, for which none is named"] if lacking else []
            what += [f"it does not have {', '.join(strange)}"] if strange else []
            raise UsageError(
                f"the working images do not fit {target.object} {state}: {'; '.join(what)}",
                hint="name one for each image, or a directory for all",
            )

    def _explained(self, target: Target, state: str, error: NotFound) -> NotFound:
        """
        :returns: the error that a state does not exist, with the images that have a state of this
            name of their own, and those that do not
        """
        if error.state != state:
            return error  # something else is missing
        listed = [one.manifest for one in self.show(target) if one.manifest.kind is Kind.IMAGE]
        known = sorted(
            {manifest.object for manifest in listed}
            | {f"{target.object}/{name}" for name in _machine_of(target).images}
        )
        has = sorted({manifest.object for manifest in listed if manifest.state == state})
        if not has:
            return error
        lacks = [name for name in known if name not in has]
        told = f"{', '.join(has)} {'has' if len(has) == 1 else 'have'} a state of that name" + (
            f", and {', '.join(lacks)} not" if lacks else ""
        )
        return NotFound(
            f"there is no state {state} of the machine {target.object}: {told}",
            object=str(target.object),
            state=state,
            hint="name an image, or set the state of all images together",
        )

    def own_places(self, target: Target, options: Options) -> Mapping[str, Path]:
        """
        Check whether the working images can be made, and change nothing.

        :returns: their absolute paths, by the names of the images
        :raises FileInTheWay: a file is there, and may not be overwritten
        :raises RefusedError: a path is inside the cache or a source
        :raises UsageError: two images would be made in one place
        """
        sources = pools_of(self.context.sources)
        places = {
            image: check_place(path, self._cache, sources, overwrite=options.overwrite)
            for image, path in target.working.items()
        }
        if len(set(places.values())) < len(places):
            raise UsageError(
                f"two images of {target.object} cannot be one file",
                hint="name another file for each",
            )
        return places

    def own_get(
        self,
        target: Target,
        chain: tuple[Manifest, ...],
        places: Mapping[str, Path],
        options: Options,
    ) -> Path | None:
        """
        Make the target's working images, all or none.

        :raises Conflict: the state was replaced meanwhile by one with other images
        """
        found = [
            one for one in chains_of(chain, lambda manifest: manifest) if one[0].kind is Kind.IMAGE
        ]
        chains = {one[0].object.partition("/")[2]: one for one in found}
        if places and set(places) != set(chains):
            raise Conflict(
                f"{chain[0].id} has just been replaced",
                object=chain[0].object,
                state=chain[0].state,
                hint="try again",
            )
        if places:
            make_together(
                self._cache,
                {path: chains[image] for image, path in places.items()},
                overwrite=options.overwrite,
            )
        return _directory(places)

    # -- setting and unsetting ---------------------------------------------------------------------

    def set(self, target: Target, state: str, options: Options = DEFAULTS) -> SetResult:
        """
        Make one state of the working images of a machine, in the cache and in the sources that the
        scope permits.
        """
        if state == ROOT:
            return self._set_roots(target, options)
        return evolve(super().set(target, state, options), digest="")

    def own_set(self, target: Target, wanted: StateId, options: Options) -> CaptureResult:
        """
        Make the target's working images states of the cache, make a machine state of these, and put
        fresh overlays in their places.

        :raises UsageError: a working image is lacking
        """
        self._require_named(target)
        if options.squash:
            raise UsageError(
                "states of machines cannot be squashed",
                hint="squash those of its images, or set the state under another name",
            )
        files = files_of(wanted, {image: absolute(path) for image, path in target.working.items()})
        return self._capture(wanted, files, options).run(dry_run=options.dry_run)

    def _require_named(self, target: Target) -> None:
        known = _machine_of(target).images
        for lacking in sorted(set(known) - set(target.working)):
            raise UsageError(
                f"no working image of {target.object}/{lacking} is named",
                hint="name one for each image of the machine",
            )
        for strange in sorted(set(target.working) - set(known) if known else ()):
            raise UsageError(
                f"{target.object} has no image {strange}", hint=f"its images are {', '.join(known)}"
            )

    def store(
        self, target: Target, state: str, to: Place, options: Options = DEFAULTS
    ) -> SetResult:
        """
        Store a cached state of a machine in a pool, with all its parts; for the root state: that of
        each image.
        """
        if state == ROOT:
            return self._stored(
                target,
                lambda image, name, how: self._of_images.store(image, name, to, how),
                options,
            )
        return super().store(target, state, to, options)

    def unset(self, target: Target, state: str, options: Options = DEFAULTS) -> Removed:
        """Remove a state of a machine, and the states of its images with it."""
        if state == ROOT:
            return self._unset_roots(target, options)
        try:
            removed = super().unset(target, state, options)
        except NotFound as error:
            raise self._explained(target, state, error) from error.__cause__
        return evolve(
            removed,
            states={pool: tuple(dict.fromkeys(states)) for pool, states in removed.states.items()},
        )

    # The root state of a machine consists of those of its images. All are checked before any is
    # changed.

    def _get_roots(self, target: Target, options: Options) -> GetResult:
        images = self._each(target)
        places = self.own_places(target, options)
        bare = [evolve(image, working={}) for image in images]
        for image in bare:
            self._of_images.get(image, ROOT, evolve(options, dry_run=True))
        found = [self._of_images.get(image, ROOT, options) for image in bare]
        if places and not options.dry_run:
            pool = self._cache.pool
            chains = {
                places[image.object.name]: pool.chain(StateId(str(image.object), ROOT))
                for image in bare
                if isinstance(image.object, Image)
            }
            make_together(self._cache, chains, overwrite=options.overwrite)
        result = evolve(
            found[0],
            object=str(target.object),
            bytes=sum(got.bytes for got in found),
            working=_directory(places),
        )
        return _of_machine(result, target.working)

    def _set_roots(self, target: Target, options: Options) -> SetResult:
        self._require_named(target)
        return self._stored(target, self._of_images.set, options)

    def _stored(
        self, target: Target, do: Callable[[Target, str, Options], SetResult], options: Options
    ) -> SetResult:
        stored = self._one_by_one(target, do, options)
        pools = [
            _united([each.pools[number] for each in stored])
            for number in range(len(stored[0].pools))
        ]
        warnings = tuple(text for each in stored for text in each.warnings)
        return evolve(
            stored[0], object=str(target.object), digest="", pools=tuple(pools), warnings=warnings
        )

    def _unset_roots(self, target: Target, options: Options) -> Removed:
        removed = self._one_by_one(target, self._of_images.unset, options)
        states = {pool: names for each in removed for pool, names in each.states.items()}
        return Removed(
            str(target.object),
            states,
            {pool: text for each in removed for pool, text in each.errors.items()},
        )

    def _one_by_one(
        self, target: Target, do: Callable[[Target, str, Options], T], options: Options
    ) -> list[T]:
        images = self._each(target)
        would = [do(image, ROOT, evolve(options, dry_run=True)) for image in images]
        return would if options.dry_run else [do(image, ROOT, options) for image in images]

    def _each(self, target: Target) -> list[Target]:
        machine = _machine_of(target)
        names = machine.images or tuple(sorted(target.working))
        names = names or tuple(
            sorted(
                {
                    one.manifest.object.partition("/")[2]
                    for one in self.show(target)
                    if one.manifest.state == ROOT
                }
            )
        )
        if not names:
            raise NotFound(
                f"no image of {machine} has a root state",
                object=str(machine),
                hint="statepool show lists what there is",
            )
        return [
            Target(
                Image(machine.machine, name),
                {name: target.working[name]} if name in target.working else {},
                target.monitor,
            )
            for name in names
        ]


def _machine_of(target: Target) -> Machine:
    if not isinstance(target.object, Machine):
        raise UsageError(
            f"{target.object} is an image, and this backend keeps states of machines",
            hint=f"name the machine: {target.object.machine}",
        )
    return target.object


def _of_machine(result: GetResult, working: Mapping[str, Path]) -> GetResult:
    """
    :returns: the result for a machine, which has no digest; its chain is the longest chain of its
        images
    """
    chains: list[list[str]] = [[]]
    for name in result.chain:
        if name == result.state:  # a tip: the machine itself, each image, and RAM
            chains.append([])
        chains[-1].append(name)
    images = {image: Path(os.path.abspath(path)) for image, path in working.items()}
    longest: list[str] = max(chains, key=len)
    return evolve(
        result, chain=tuple(longest), digest="", working=_directory(working), images=images
    )


def _directory(places: Mapping[str, Path]) -> Path | None:
    """:returns: the directory of the working images, if they are all in the same one"""
    directories = {Path(os.path.abspath(path)).parent for path in places.values()}
    return directories.pop() if len(directories) == 1 else None


def _united(at: list[StoredAt]) -> StoredAt:
    """:returns: the results of several states at one pool, as one result"""
    failed = [one for one in at if one.result is Presence.FAILED]
    result = (
        Presence.STORED if any(one.result is Presence.STORED for one in at) else Presence.PRESENT
    )
    return evolve(
        failed[0] if failed else at[0],
        result=Presence.FAILED if failed else result,
        durable=all(one.durable for one in at),
        bytes=sum(one.bytes for one in at),
    )
