"""
States of whole machines that are off: all images of a machine are set, got and removed as one.

A machine state is a record that lists a state of each image; these are external overlays, as the default backend for images makes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from attrs import evolve

from statepool.backends.answers import digests_of, planned
from statepool.backends.base import DEFAULTS, Context, Options, Target
from statepool.backends.external import QCOW2ExtBackend
from statepool.backends.sourced import SourcedStateBackend
from statepool.errors import Conflict, NotFound, UsageError
from statepool.model.manifest import ROOT, Kind, Manifest, StateId
from statepool.model.names import check_state_name
from statepool.model.objects import Image, Machine
from statepool.model.outcomes import Got, Presence, Removed, Stored, StoredAt
from statepool.model.progress import Progress
from statepool.pools.fold import member_ids
from statepool.pools.pool import Pool
from statepool.transfer.cache import Cache
from statepool.transfer.fetch import Fetched
from statepool.transfer.intake import Taken, absolute
from statepool.transfer.machine_fetch import MachineFetch, MachineOffer, find_machine_offer, machine_parts
from statepool.transfer.machine_intake import MachineIntake
from statepool.transfer.machine_push import MachinePush
from statepool.transfer.offers import Offer, Source
from statepool.transfer.overlays import make_together
from statepool.transfer.working import check_place

T = TypeVar("T")


class QCOW2MachineBackend(SourcedStateBackend):
    """
    States of machines, as states of all their images in the cache and its sources.

    :param context: what it works with
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._of_images = QCOW2ExtBackend(context)

    # -- what a machine state is, and where --------------------------------------------------------------------------------------------------------

    def own_state(self, target: Target, state: str) -> StateId:
        """As the backend's face says; the target is a machine."""
        return StateId(_machine_of(target).machine, check_state_name(state), Kind.MACHINE)

    def own_root(self, target: Target) -> StateId:
        """
        As the backend's face says.

        :raises UsageError: always: each image of a machine has a root state of its own
        """
        raise UsageError(f"{target.object} has no root state of its own; its images have", hint=f"name an image: {target.object}/disk")

    def own_parts(self, cache: Cache, manifest: Manifest) -> tuple[Manifest, ...]:
        """As the backend's face says: the machine state itself comes first, then the chains of what it lists."""
        return machine_parts(cache, manifest)

    def own_find(self, source: Source, wanted: StateId) -> Offer | None:
        """As the backend's face says."""
        return find_machine_offer(source, wanted)

    def own_fetch(self, cache: Cache, offer: Offer, progress: Progress) -> Fetched:
        """As the backend's face says."""
        assert isinstance(offer, MachineOffer)
        return MachineFetch(cache, offer, progress).run()

    def own_plan(self, offer: Offer) -> Got:
        """As the backend's face says."""
        assert isinstance(offer, MachineOffer)
        return planned(offer, MachineFetch(self._cache, offer))

    def own_push(self, manifest: Manifest, pool: Pool, options: Options) -> StoredAt:
        """As the backend's face says."""
        return MachinePush(self._cache, pool, self.context.progress).attempt_machine(manifest, replace=options.replace)

    def images(self, target: Target, state: str, options: Options = DEFAULTS) -> tuple[str, ...]:
        """
        :returns: the names of the images that a machine state has
        :raises NotFound: it cannot be had
        """
        wanted = self.own_state(target, state)
        try:
            found = self._mirrors(options).look(wanted)
        except NotFound as error:
            raise self._explained(target, state, error) from error.__cause__
        manifest = found.offers[0].members[0].manifest if found.offers else found.cached
        assert manifest is not None
        return tuple(sorted(member.object.partition("/")[2] for member in member_ids(manifest) if member.kind is Kind.IMAGE))

    # -- getting -----------------------------------------------------------------------------------------------------------------------------------

    def get(self, target: Target, state: str, options: Options = DEFAULTS) -> Got:
        """
        Bring a state of all images here; with working images in the target, make all of them, or none.

        :raises NotFound: it cannot be had
        :raises UsageError: working images are named for other images than it has
        """
        try:
            if target.working:
                self._require_all(target, state, self.images(target, state, options))
            result = super().get(target, state, options)
        except NotFound as error:
            raise self._explained(target, state, error) from error.__cause__
        return _of_machine(result, target.working)

    def _require_all(self, target: Target, state: str, images: Iterable[str]) -> None:
        lacking, strange = sorted(set(images) - set(target.working)), sorted(set(target.working) - set(images))
        if lacking or strange:
            what = [f"it has {', '.join(lacking)}, for which none is named"] if lacking else []
            what += [f"it does not have {', '.join(strange)}"] if strange else []
            raise UsageError(
                f"the working images do not fit {target.object} {state}: {'; '.join(what)}", hint="name one for each image, or a directory for all"
            )

    def _explained(self, target: Target, state: str, error: NotFound) -> NotFound:
        """:returns: that a state is not there, with the images that have a state of this name for themselves, and those that do not"""
        if error.state != state:
            return error  # it is something else that is not there
        listed = [one.manifest for one in self.show(target) if one.manifest.kind is Kind.IMAGE]
        known = sorted({manifest.object for manifest in listed} | {f"{target.object}/{name}" for name in _machine_of(target).images})
        has = sorted({manifest.object for manifest in listed if manifest.state == state})
        if not has:
            return error
        lacks = [name for name in known if name not in has]
        told = f"{', '.join(has)} {'has' if len(has) == 1 else 'have'} a state of that name" + (f", and {', '.join(lacks)} not" if lacks else "")
        return NotFound(
            f"there is no state {state} of the machine {target.object}: {told}",
            object=str(target.object),
            state=state,
            hint="name an image, or set the state of all images together",
        )

    def own_places(self, target: Target, options: Options) -> Mapping[str, Path]:
        """
        As the backend's face says.

        :raises FileInTheWay: something is there, and may not be overwritten
        :raises RefusedError: one is inside the cache or a source
        :raises UsageError: two images are to be made in one place
        """
        sources = self.context.sources
        places = {image: check_place(path, self._cache, sources, overwrite=options.overwrite) for image, path in target.working.items()}
        if len(set(places.values())) < len(places):
            raise UsageError(f"two images of {target.object} cannot be one file", hint="name another file for each")
        return places

    def own_get(self, target: Target, chain: tuple[Manifest, ...], places: Mapping[str, Path], options: Options) -> str | None:
        """
        Make the target's working images, all or none.

        :raises Conflict: the state has been replaced by one with other images at this moment
        """
        chains: dict[str, list[Manifest]] = {}
        for manifest in chain:
            if manifest.kind is Kind.IMAGE:
                chains.setdefault(manifest.object.partition("/")[2], []).append(manifest)
        if places and set(places) != set(chains):
            raise Conflict(f"{chain[0].id} has just been replaced", object=chain[0].object, state=chain[0].state, hint="try again")
        if places:
            make_together(self._cache, {path: tuple(chains[image]) for image, path in places.items()}, overwrite=options.overwrite)
        return _directory(places)

    # -- setting and unsetting ---------------------------------------------------------------------------------------------------------------------

    def set(self, target: Target, state: str, options: Options = DEFAULTS) -> Stored:
        """Make the working images of a machine one state, in the cache and in the sources that the scope permits."""
        return evolve(super().set(target, state, options), digest="")

    def own_set(self, target: Target, wanted: StateId, options: Options) -> Taken:
        """
        Make the target's working images states of the cache and a machine state of them, and fresh overlays in their places.

        :raises UsageError: one is lacking
        """
        self._require_named(target)
        if options.squash:
            raise UsageError("states of machines cannot be squashed", hint="squash those of its images, or set the state under another name")
        before = self._members(wanted)
        intake = MachineIntake(
            self._cache,
            wanted.machine,
            wanted.state,
            {image: absolute(path) for image, path in target.working.items()},
            replace=options.replace,
            labels=options.labels,
            creator=self.context.creator,
            progress=self.context.progress,
        )
        taken = intake.run(dry_run=options.dry_run)
        if not options.dry_run and (gone := digests_of(before) - digests_of(taken.members)):
            self._cache.drop(gone)
        return Taken(evolve(taken.manifest, size=taken.bytes), taken.written, "copy" if taken.bytes else "hardlink", taken.warnings)

    def _require_named(self, target: Target) -> None:
        known = _machine_of(target).images
        for lacking in sorted(set(known) - set(target.working)):
            raise UsageError(f"no working image of {target.object}/{lacking} is named", hint="name one for each image of the machine")
        for strange in sorted(set(target.working) - set(known) if known else ()):
            raise UsageError(f"{target.object} has no image {strange}", hint=f"its images are {', '.join(known)}")

    def _members(self, wanted: StateId) -> list[Manifest]:
        fold = self._cache.pool.fold(wanted.machine)
        manifest = fold.states.get(wanted)
        return [fold.states[member] for member in member_ids(manifest)] if manifest is not None else []

    def unset(self, target: Target, state: str, options: Options = DEFAULTS) -> Removed:
        """Remove a state of a machine, and with it those of its images."""
        try:
            removed = super().unset(target, state, options)
        except NotFound as error:
            raise self._explained(target, state, error) from error.__cause__
        return evolve(removed, states={pool: tuple(dict.fromkeys(states)) for pool, states in removed.states.items()})

    # -- root states: those of each image ----------------------------------------------------------------------------------------------------------

    def check_root(self, target: Target) -> bool:
        """:returns: whether the root image of each image of a machine can be had"""
        return all(self._of_images.check_root(image) for image in self._each(target))

    def get_root(self, target: Target, options: Options = DEFAULTS) -> Got:
        """Bring the root images of a machine here, and make working images on them: all, or none."""
        images = self._each(target)
        places = self.own_places(target, options)
        bare = [evolve(image, working={}) for image in images]
        for image in bare:
            self._of_images.get_root(image, evolve(options, dry_run=True))
        found = [self._of_images.get_root(image, options) for image in bare]
        if places and not options.dry_run:
            pool = self._cache.pool
            chains = {places[image.object.name]: pool.chain(StateId(str(image.object), ROOT)) for image in bare if isinstance(image.object, Image)}
            make_together(self._cache, chains, overwrite=options.overwrite)
        result = evolve(found[0], object=str(target.object), bytes=sum(got.bytes for got in found), working=_directory(places))
        return _of_machine(result, target.working)

    def set_root(self, target: Target, options: Options = DEFAULTS) -> Stored:
        """Make the working images of a machine its root images. All are looked at before the first one is set."""
        self._require_named(target)
        stored = self._one_by_one(target, self._of_images.set_root, options)
        pools = [_united([each.pools[number] for each in stored]) for number in range(len(stored[0].pools))]
        warnings = tuple(text for each in stored for text in each.warnings)
        return evolve(stored[0], object=str(target.object), digest="", pools=tuple(pools), warnings=warnings)

    def unset_root(self, target: Target, options: Options = DEFAULTS) -> Removed:
        """Remove the root images of a machine. All are looked at before the first one is removed."""
        removed = self._one_by_one(target, self._of_images.unset_root, options)
        states = {pool: names for each in removed for pool, names in each.states.items()}
        return Removed(str(target.object), states, {pool: text for each in removed for pool, text in each.errors.items()})

    def _one_by_one(self, target: Target, do: Callable[[Target, Options], T], options: Options) -> list[T]:
        images = self._each(target)
        would = [do(image, evolve(options, dry_run=True)) for image in images]
        return would if options.dry_run else [do(image, options) for image in images]

    def _each(self, target: Target) -> list[Target]:
        machine = _machine_of(target)
        names = machine.images or tuple(sorted(target.working))
        names = names or tuple(sorted({one.manifest.object.partition("/")[2] for one in self.show(target) if one.manifest.state == ROOT}))
        if not names:
            raise NotFound(f"no image of {machine} has a root state", object=str(machine), hint="statepool show lists what there is")
        return [
            Target(Image(machine.machine, name), {name: target.working[name]} if name in target.working else {}, target.monitor) for name in names
        ]


def _machine_of(target: Target) -> Machine:
    if not isinstance(target.object, Machine):
        raise UsageError(f"{target.object} is an image, and this backend keeps states of machines", hint=f"name the machine: {target.object.machine}")
    return target.object


def _of_machine(result: Got, working: Mapping[str, Path]) -> Got:
    """:returns: the outcome for a machine, which has no digest; its chain is the longest one of its images"""
    chains: list[list[str]] = [[]]
    for name in result.chain:
        if name == result.state:  # a tip: the machine itself, each image, and RAM
            chains.append([])
        chains[-1].append(name)
    images = {image: os.path.abspath(path) for image, path in working.items()}
    longest: list[str] = max(chains, key=len)
    return evolve(result, chain=tuple(longest), digest="", working=_directory(working), images=images)


def _directory(places: Mapping[str, Path]) -> str | None:
    """:returns: where the working images are, if they are all in one directory"""
    directories = {os.path.dirname(os.path.abspath(path)) for path in places.values()}
    return directories.pop() if len(directories) == 1 else None


def _united(at: list[StoredAt]) -> StoredAt:
    """:returns: what became of several states at one pool, as one"""
    failed = [one for one in at if one.result is Presence.FAILED]
    result = Presence.STORED if any(one.result is Presence.STORED for one in at) else Presence.PRESENT
    return evolve(
        failed[0] if failed else at[0],
        result=Presence.FAILED if failed else result,
        durable=all(one.durable for one in at),
        bytes=sum(one.bytes for one in at),
    )
