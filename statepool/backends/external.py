"""
External overlays: the default backend for images that are off.

Each state is a file of its own, backed by the one below it; a working image is an empty overlay on top.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from attrs import evolve

from statepool.backends.base import DEFAULTS, Context, Options, StateBackend, Target
from statepool.backends.transfer import QCOW2ImageTransfer, digests_of, got, image_state, planned, root_state
from statepool.errors import NotFound, StatePoolError, UsageError
from statepool.model.manifest import Manifest, StateId
from statepool.model.outcomes import Got, Listed, Presence, Removed, Stored, StoredAt, Verified
from statepool.model.scope import Scope
from statepool.qcow2.checks import Backing, check_file
from statepool.transfer.fetch import Fetch, Fetched
from statepool.transfer.fresh import Answer
from statepool.transfer.intake import Intake, Taken, absolute
from statepool.transfer.linked import refuse_linked
from statepool.transfer.merge import merged
from statepool.transfer.offers import Offer, Source, find_offer, is_unchanged, listing
from statepool.transfer.push import Push
from statepool.transfer.ready import damaged, discard, examine
from statepool.transfer.takeover import recover
from statepool.transfer.working import check_place, make_working
from statepool.transports.failures import Subject, in_our_words


class QCOW2ExtBackend(StateBackend):
    """
    States of an image as files of their own in the cache and its sources.

    :param context: what it works with
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._cache = context.cache

    # -- looking -----------------------------------------------------------------------------------------------------------------------------------

    def show(self, target: Target) -> list[Listed]:
        """:returns: the states of an image, or of all images of a machine, in the cache and in the sources"""
        wanted, machine = str(target.object), target.object.machine
        found = [listing(self._cache.pool, machine)]
        for transfer in self._transfers():
            transfer.source.pool.require()
            found.append(listing(transfer.source.pool, machine))
        return [listed for listed in merged(found) if wanted in (machine, listed.manifest.object)]

    def check(self, target: Target, state: str) -> bool:
        """:returns: whether the cache or a source has a state, with its whole chain"""
        return self._check(image_state(target, state))

    def _check(self, wanted: StateId) -> bool:
        if self._cache.pool.find(wanted) is not None:
            return True
        return any(find_offer(transfer.source, wanted) is not None for transfer in self._transfers())

    def _transfers(self, scope: frozenset[Scope] = frozenset(Scope)) -> list[QCOW2ImageTransfer]:
        if self._cache.settings.offline:
            return []
        return [QCOW2ImageTransfer(self.context, source) for source in self.context.sources if source.scope in scope]

    # -- getting -----------------------------------------------------------------------------------------------------------------------------------

    def get(self, target: Target, state: str, options: Options = DEFAULTS) -> Got:
        """Bring a state into the cache, if it is not there or has been replaced in its source; and make a working image, if the target has one."""
        return self._get(target, image_state(target, state), options)

    def _get(self, target: Target, wanted: StateId, options: Options) -> Got:
        with self._in_our_words(f"get {wanted}"):
            return self._get_it(wanted, target, options)

    def _in_our_words(self, doing: str) -> AbstractContextManager[None]:
        return in_our_words(doing, Subject(f"from or into the cache {self._cache.root}"))

    def _get_it(self, wanted: StateId, target: Target, options: Options) -> Got:
        if not options.dry_run:
            recover(self._cache)
        to = {image: check_place(path, overwrite=options.overwrite) for image, path in target.working.items()}
        offer, cached = self._look(wanted)
        if options.dry_run:
            plan = planned(offer, Fetch(self._cache, offer)) if offer is not None else _cached(self._chain(cached), Verified.TRUSTED)
            return evolve(plan, working=next(map(str, to.values()), None))
        result, chain = self._bring(wanted, offer, cached)
        for manifest in chain:
            if manifest.digest is not None:
                self._cache.trust.touch(manifest.digest)
        for path in to.values():
            make_working(self._cache, chain, path, overwrite=options.overwrite)
            result = evolve(result, working=str(path))
        return result

    def _bring(self, wanted: StateId, offer: Offer | None, cached: Manifest | None) -> tuple[Got, tuple[Manifest, ...]]:
        if offer is None:
            chain = self._chain(cached)
            readiness = examine(self._cache, chain, self.context.progress)
            if not readiness.bad:
                return _cached(chain, readiness.verified), chain
            offer = self._mend(wanted, readiness.bad)
        fetched = Fetch(self._cache, offer, self.context.progress).run()
        self._note(wanted, offer, fetched)
        return got(offer, fetched), fetched.chain

    def _chain(self, cached: Manifest | None) -> tuple[Manifest, ...]:
        assert cached is not None
        return self._cache.pool.fold(cached.id.machine).chain(cached)

    def _note(self, wanted: StateId, offer: Offer, fetched: Fetched) -> None:
        self._cache.fresh.note(wanted, str(offer.source), offer.token, fetched.chain[0].digest)

    def _look(self, wanted: StateId) -> tuple[Offer | None, Manifest | None]:
        """
        Where a state is to be had from.

        :returns: what a source offers, if it is not in the cache, or not as the source has it; and what the cache has
        :raises NotFound: nobody has it
        """
        cached = self._cache.pool.find(wanted)
        answers = self._cache.fresh.answers(wanted)
        for source in (transfer.source for transfer in self._transfers()):
            answer = answers.get(str(source))
            if answer is not None and self._cache.fresh.is_fresh(answer) and answer.digest is None and cached is not None:
                continue
            if answer is not None and cached is not None and answer.digest == cached.digest and self._is_current(source, wanted, answer):
                return None, cached
            offer = find_offer(source, wanted)
            if offer is None:
                if cached is not None:
                    self._cache.fresh.note(wanted, str(source), "none", None)
                continue
            if cached is not None and self._is_same(offer, cached):
                self._cache.fresh.note(wanted, str(source), offer.token, cached.digest)
                return None, cached
            return offer, cached
        if cached is None:
            raise self._nowhere(wanted)
        return None, cached

    def _is_current(self, source: Source, wanted: StateId, answer: Answer) -> bool:
        """Whether what a source said still holds: because it said so a moment ago, or because nothing has changed there since."""
        if self._cache.fresh.is_fresh(answer):
            return True
        if not is_unchanged(source, wanted, answer.token):
            return False
        self._cache.fresh.note(wanted, str(source), answer.token, answer.digest)
        return True

    def _is_same(self, offer: Offer, cached: Manifest) -> bool:
        """Whether an offered chain is the one in the cache. Without digests nobody knows, and what has changed since the last answer is fetched."""
        chain = self._chain(cached)
        return len(chain) == len(offer.members) and all(
            member.manifest.digest is not None and link.state == member.manifest.state and link.is_content(member.manifest.digest)
            for link, member in zip(chain, offer.members, strict=True)
        )

    def _nowhere(self, wanted: StateId) -> NotFound:
        asked = [str(self._cache.pool), *(str(transfer.source) for transfer in self._transfers())]
        return NotFound(
            f"there is no state {wanted.state} of {wanted.object} in {', '.join(asked)}",
            object=wanted.object,
            state=wanted.state,
            hint="statepool show lists what there is" + ("; the sources were not asked, being offline" if self._cache.settings.offline else ""),
        )

    def _mend(self, wanted: StateId, bad: tuple[Manifest, ...]) -> Offer:
        """:returns: an offer to fetch damaged members from anew"""
        for transfer in self._transfers():
            offer = find_offer(transfer.source, wanted)
            if offer is not None:
                for manifest in bad:
                    discard(self._cache, manifest)
                return offer
        raise damaged(self._cache, bad[0])

    # -- setting -----------------------------------------------------------------------------------------------------------------------------------

    def set(self, target: Target, state: str, options: Options = DEFAULTS) -> Stored:
        """Make the target's working image a state, in the cache and in the sources that the scope permits."""
        return self._set(target, image_state(target, state), options)

    def _set(self, target: Target, wanted: StateId, options: Options) -> Stored:
        if len(target.working) != 1:
            raise UsageError(f"one working image of {wanted.object} must be named to set a state from", hint="--from FILE")
        with self._in_our_words(f"set {wanted}"):
            return self._set_it(wanted, target, options)

    def _set_it(self, wanted: StateId, target: Target, options: Options) -> Stored:
        (working,) = target.working.values()
        if not options.dry_run:
            recover(self._cache)
        old = self._cache.pool.find(wanted)
        intake = Intake(
            self._cache,
            wanted,
            absolute(working),
            replace=options.replace,
            labels=options.labels,
            creator=self.context.creator,
            progress=self.context.progress,
        )
        taken = intake.run(dry_run=options.dry_run)
        if old is not None and old.digest not in (None, taken.manifest.digest) and not options.dry_run:
            self._cache.drop(digests_of([old]))
        presence = Presence.STORED if taken.written else Presence.PRESENT
        own = StoredAt(str(self._cache.pool), presence, bytes=taken.manifest.data_size if taken.how != "hardlink" and taken.written else 0)
        others = self._store(taken, options)
        return Stored(wanted.object, wanted.state, str(taken.manifest.digest), (own, *others), taken.warnings)

    def _store(self, taken: Taken, options: Options) -> list[StoredAt]:
        transfers = self._transfers(options.scope)
        if options.dry_run:
            return [self._would_store(transfer, taken) for transfer in transfers]
        chain = self._cache.pool.chain(taken.manifest.id)
        stored = [Push(self._cache, transfer.source.pool, self.context.progress).attempt(chain, replace=options.replace) for transfer in transfers]
        for at, transfer in zip(stored, transfers, strict=True):
            if at.result is not Presence.FAILED and (offer := find_offer(transfer.source, taken.manifest.id)) is not None:
                self._cache.fresh.note(taken.manifest.id, str(transfer.source), offer.token, taken.manifest.digest)
        return stored

    def _would_store(self, transfer: QCOW2ImageTransfer, taken: Taken) -> StoredAt:
        try:
            transfer.source.pool.require(write=True)
            there = transfer.source.pool.find(taken.manifest.id)
        except StatePoolError as error:
            return StoredAt(str(transfer.source), Presence.FAILED, durable=False, error=str(error))
        same = there is not None and taken.manifest.digest is not None and there.is_content(taken.manifest.digest)
        return StoredAt(str(transfer.source), Presence.PRESENT if same else Presence.STORED, bytes=0 if same else taken.manifest.data_size)

    # -- unsetting ---------------------------------------------------------------------------------------------------------------------------------

    def unset(self, target: Target, state: str, options: Options = DEFAULTS) -> Removed:
        """Remove a state from the pools that the scope permits: ``own`` is the cache. What a working image stands on stays until it is gone."""
        return self._unset(target, image_state(target, state), options)

    def _unset(self, target: Target, wanted: StateId, options: Options) -> Removed:
        with self._in_our_words(f"unset {wanted}"):
            return self._unset_it(target, wanted, options)

    def _unset_it(self, target: Target, wanted: StateId, options: Options) -> Removed:
        if not options.dry_run:
            recover(self._cache)
        states: dict[str, tuple[str, ...]] = {}
        errors: dict[str, str] = {}
        absent: list[NotFound] = []
        for transfer in self._transfers(options.scope):
            try:
                states.update(transfer.remove(target, wanted, options).states)
            except NotFound as error:
                absent.append(error)
            except StatePoolError as error:
                if not states and not errors and len(self._transfers(options.scope)) == 1:
                    raise
                errors[str(transfer.source)] = str(error)
        if Scope.OWN in options.scope and not errors:
            try:
                states[str(self._cache.pool)] = self._unset_own(wanted, options)
            except NotFound as error:
                absent.append(error)
        if not states and not errors:
            raise absent[0] if absent else UsageError("no pool is in this scope", hint="scopes are " + ", ".join(Scope))
        return Removed(wanted.object, states, errors)

    def _unset_own(self, wanted: StateId, options: Options) -> tuple[str, ...]:
        pool = self._cache.pool
        if options.dry_run:
            return tuple(gone.state for gone in pool.plan_removal(wanted, cascade=options.cascade))
        removed = pool.remove(wanted, cascade=options.cascade, allowed=lambda digests: refuse_linked(pool, digests))
        self._cache.drop(digests_of(removed))
        for manifest in removed:
            self._cache.fresh.forget(manifest.id)
        return tuple(manifest.state for manifest in removed)

    # -- root images -------------------------------------------------------------------------------------------------------------------------------

    def check_root(self, target: Target) -> bool:
        """:returns: whether the cache or a source has the root image"""
        return self._check(root_state(target))

    def get_root(self, target: Target, options: Options = DEFAULTS) -> Got:
        """Bring the root image into the cache, and make a working image on it, if the target has one."""
        return self._get(target, root_state(target), options)

    def set_root(self, target: Target, options: Options = DEFAULTS) -> Stored:
        """
        Make the target's working image the root image.

        :raises UnsafeImage: something backs it
        """
        for path in target.working.values():
            check_file(path, backing=Backing.NONE)
        return self._set(target, root_state(target), options)

    def unset_root(self, target: Target, options: Options = DEFAULTS) -> Removed:
        """Remove the root image from the pools that the scope permits."""
        return self._unset(target, root_state(target), options)


def _cached(chain: tuple[Manifest, ...], verified: Verified) -> Got:
    tip = chain[0]
    return Got(object=tip.object, state=tip.state, chain=tuple(link.state for link in chain), digest=str(tip.digest), verified=verified)
