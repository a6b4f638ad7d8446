"""
Actors on a pool, and what must hold whatever they do: for exploring every interleaving with
:mod:`tests.support.interleave`.

In *every* state that any schedule comes to, so also wherever all actors die at once,

* the fold can be read, and whatever it holds has its bytes, in ``data/`` or in ``trash/``, and its
  parent;
* what was acknowledged holds, unless another actor was told to do the opposite;
* a sweep that comes then loses nothing, and leaves nothing that is not needed once the writers are
  known to be dead;
* the view shows the fold, after that sweep and whenever all actors have ended, and lists of pieces
  are beside their bytes, and nowhere else.

And every change of the files leaves the log as it was, or one record longer: it never forks, and
never forgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pytest
from attrs import field, frozen

from statepool.errors import BadRecord, Conflict, HasDependants, IntegrityError, NotFound
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, StateId
from statepool.pools import collect as collect_module
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.fold import Fold, Publish
from statepool.pools.locks import NoLocks
from statepool.pools.log import MachineLog
from statepool.pools.pool import Pool
from statepool.pools.records import Record
from statepool.pools.staging import Staging
from statepool.pools.writer import Writer
from statepool.transports.base import FileKind, Transport
from tests.support.interleave import Actor, Direct, Explored, Files, Outcomes, Replay, World
from tests.support.pool_states import OBJECT, C, D, E, F, digest_of, pieces_of

# -- the actors ------------------------------------------------------------------------------------


@frozen
class Doing:
    """
    An actor, and what it was told to do.

    :param run: does it
    :param publishes: the states that are there when it has ended well
    :param removes: the states that are gone when it has ended well
    :param replaces: the states that may have other content after it
    :param allowed: the errors that it may end with
    """

    run: Actor
    publishes: tuple[Manifest, ...] = ()
    removes: frozenset[str] = frozenset()
    replaces: frozenset[str] = frozenset()
    allowed: tuple[type[Exception], ...] = field(default=())


def _pool_of(transport: Replay) -> Pool:
    return Pool(transport, locks=transport, nonce=transport.nonce, clock=lambda: 0.0)


def publish(*manifests: Manifest, upload: bool = True, again: bool = True, **how: bool) -> Doing:
    """
    :param upload: bring the bytes even if they seem to be there
    :param again: bring them once more if they are gone at the last look
    """

    def run(transport: Replay) -> str:
        pool = _pool_of(transport)
        for manifest in manifests:
            assert manifest.digest is not None
            staging = pool.stage([manifest.digest])

            def bring(staging: Staging, digest: Digest = manifest.digest) -> None:
                transport.create(staging.path(digest), b"x")

            try:
                if upload or not pool.has_bytes(manifest.digest):
                    bring(staging)
                staging.list_pieces(manifest.digest, manifest.size, pieces_of(manifest.state))
                pool.publish([manifest], staging, again=bring if again else None, **how)
            finally:
                staging.end()
        return "published"

    replaces = frozenset(manifest.state for manifest in manifests) if how else frozenset()
    return Doing(
        run,
        manifests,
        replaces=replaces,
        allowed=(Conflict, HasDependants) if again else (Conflict, HasDependants, IntegrityError),
    )


def remove(name: str, *, cascade: bool = False, also: Sequence[str] = ()) -> Doing:
    """:param also: what else goes if ``cascade`` is asked for"""

    def run(transport: Replay) -> str:
        _pool_of(transport).remove(StateId(OBJECT, name), cascade=cascade)
        return "removed"

    return Doing(
        run,
        removes=frozenset([name]),
        replaces=frozenset([name, *also]),
        allowed=(HasDependants, NotFound),
    )


def collect(*names: str) -> Doing:
    """Collects these bytes, if nobody needs them."""

    def run(transport: Replay) -> str:
        Collector(_pool_of(transport)).collect(map(digest_of, names))
        return "collected"

    return Doing(run)


def sweep() -> Doing:
    """Sweeps the pool."""

    def run(transport: Replay) -> str:
        Collector(_pool_of(transport)).sweep()
        return "swept"

    return Doing(run)


def misjudge(*, at_once: bool = False) -> Doing:
    """
    Takes the writer ``a``, which lives, for dead: removes what it has in ``incoming/``, the marker
    last, and collects the bytes of ``C``.

    :param at_once: in one step
    """

    def run(transport: Replay) -> str:
        if at_once:
            transport.at_once("misjudge")
        else:
            _misjudge(transport, _pool_of(transport))
        return "collected"

    return Doing(run)


def _misjudge(transport: Transport, pool: Pool) -> None:
    mine = [entry.name for entry in transport.scan(layout.INCOMING) if entry.name.startswith("a")]
    for name in sorted(mine, key=lambda name: name.endswith(".json")):
        transport.remove(f"{layout.INCOMING}/{name}")
    Collector(pool).collect([digest_of("C")])


def _misjudging(transport: Direct) -> None:
    _misjudge(transport, Pool(transport, locks=NoLocks(), nonce=lambda: "judge", clock=lambda: 0.0))


def compact() -> Doing:
    """Compacts the log."""

    def run(transport: Replay) -> str:
        _pool_of(transport).log("vm1").compact()
        return "compacted"

    return Doing(run)


def _missing(manifest: Manifest, fold: Fold) -> list[Publish]:
    return [] if manifest.id in fold.states else [Publish(manifest)]


def append(*manifests: Manifest) -> Doing:
    """Adds records one after the other, without anything around them, and compacts after each."""

    def run(transport: Replay) -> str:
        log = _pool_of(transport).log("vm1")
        for manifest in manifests:
            log.append(partial(_missing, manifest))
            log.compact()
        return "appended"

    return Doing(run, manifests)


def rush(*manifests: Manifest) -> Doing:
    """
    As :func:`append`, but each record, with its compaction, in one step: so that the others meet a
    log that goes on fast.
    """

    def run(transport: Replay) -> str:
        for manifest in manifests:
            transport.at_once(manifest.state)
        return "rushed"

    return Doing(run, manifests)


def oversleep(number: int) -> Doing:
    """
    A writer that folded the record before ``number``, slept, and comes too late; it sees that, and
    takes back what it wrote.
    """

    def run(transport: Replay) -> str:
        transport.at_once(f"late {number}")
        transport.at_once(f"take back {number}")
        return "slept"

    return Doing(run)


def _coming_late(number: int) -> Callable[[Direct], None]:
    def run(transport: Direct) -> None:
        record = Record(number, "late", 0.0, "host:1", (Publish(F),))
        if transport.stat(layout.record("vm1", number)) is None:
            transport.create(layout.record("vm1", number), record.to_bytes())

    return run


def _taking_back(number: int) -> Callable[[Direct], None]:
    def run(transport: Direct) -> None:
        path = layout.record("vm1", number)
        if transport.stat(path) is not None and b'"late"' in transport.read(path):
            transport.remove(path)

    return run


def _appending(manifest: Manifest) -> Callable[[Direct], None]:
    def run(transport: Direct) -> None:
        log = MachineLog(transport, "vm1", nonce=lambda: f"rush{manifest.state}", clock=lambda: 0.0)
        log.append(lambda fold: [Publish(manifest)])
        log.compact()

    return run


@frozen
class Read:
    """
    What a reader saw.

    :param number: the number of its fold
    :param nonces: the records in it, newest ones
    :param late: whether the log was longer before it asked
    :param lost: what it could not find, although it was needed before and after
    """

    number: int
    nonces: frozenset[tuple[int, str]]
    late: bool
    lost: frozenset[Digest]


def read(times: int = 1, *, look: bool = True) -> Doing:
    """
    Folds with one pool, so that what it knew before plays its part.

    :param look: for all bytes, each time
    """

    def run(transport: Replay) -> tuple[Read, ...]:
        pool = _pool_of(transport)
        found = []
        for _ in range(times):
            before = transport.at_once("newest")
            fold = pool.fold("vm1")
            missing = frozenset(
                digest for digest in fold.digests if look and not pool.has_bytes(digest)
            )
            lost = missing & pool.fold("vm1").digests if missing else missing
            found.append(
                Read(fold.number, frozenset(fold.nonces.items()), fold.number < before, lost)
            )
        return tuple(found)

    return Doing(run)


# -- what must hold --------------------------------------------------------------------------------


def _fold_of(files: Files) -> Fold:
    return MachineLog(Direct(files), "vm1").fold()


def _trash_of(files: Files) -> set[Digest]:
    return {
        found
        for entry in Direct(files).scan(layout.TRASH)
        if (found := Digest.from_file_name(entry.name.partition("-")[2])) is not None
    }


def _lists_of(files: Files) -> set[Digest]:
    names = (
        entry.name for entry in Direct(files).scan(layout.DATA) if entry.name.endswith(".pieces")
    )
    return {found for name in names if (found := layout.data_of(name)) is not None}


def _data_of(files: Files) -> set[Digest]:
    return {
        found
        for entry in Direct(files).scan(layout.DATA)
        if (found := Digest.from_file_name(entry.name)) is not None
    }


def _view_of(files: Files) -> dict[str, str]:
    return {path: node[2].decode() for path, node in files.items() if node[0] is FileKind.LINK}


def _view_should_be(fold: Fold) -> dict[str, str]:
    return {
        layout.view(key): layout.view_target(key, manifest.digest)
        for key, manifest in fold.states.items()
        if manifest.digest
    }


@frozen
class Rules:
    """
    Judges the states of one world.

    :param doings: its actors
    :param symlinks: whether there is a view
    :param renames: whether files can be renamed
    """

    doings: Mapping[str, Doing]
    symlinks: bool
    renames: bool = True
    _folds: dict[int, tuple[Files, Fold]] = field(init=False, factory=dict)
    _whole: dict[int, tuple[Files, str | None]] = field(init=False, factory=dict)

    def check(self, files: Files, outcomes: Outcomes) -> str | None:
        if id(files) not in self._whole:
            self._whole[id(files)] = files, self._not_whole(files)
        wrong = self._whole[id(files)][1]
        if wrong is not None:
            return wrong
        ended = len(outcomes) == len(self.doings)
        return self._not_kept(self._fold(files), outcomes) or (
            (self._not_shown(files) or self._not_listed(files)) if ended else None
        )

    def check_bytes(self, files: Files, outcomes: Outcomes) -> str | None:
        """As :meth:`check`, but for nothing else."""
        return self._lacking(files, self._fold(files))

    def check_misjudged(self, files: Files, outcomes: Outcomes) -> str | None:
        """
        As :meth:`check`, but a record may be without bytes while writers live that have not taken
        their last look.
        """
        wrong = (
            self._lacking(files, self._fold(files))
            if all(name in outcomes for name, doing in self.doings.items() if doing.publishes)
            else None
        )
        return wrong or self._not_kept(self._fold(files), outcomes)

    def step(self, before: Files, after: Files) -> str | None:
        """The log is as it was, or one record longer."""
        try:
            was, now = self._fold(before), self._fold(after)
        except BadRecord as error:
            return str(error)
        known = {number: nonce for number, nonce in was.nonces.items() if number in now.nonces}
        if now.number not in (was.number, was.number + 1) or any(
            now.nonces[number] != nonce for number, nonce in known.items()
        ):
            return f"the log was {dict(was.nonces)} and is {dict(now.nonces)}"
        return None

    def _fold(self, files: Files) -> Fold:
        if id(files) not in self._folds:
            self._folds[id(files)] = files, _fold_of(files)
        return self._folds[id(files)][1]

    def _not_whole(self, files: Files) -> str | None:
        try:
            fold = self._fold(files)
        except BadRecord as error:
            return str(error)
        return self._lacking(files, fold) or self._not_recovered(files, fold)

    def _lacking(self, files: Files, fold: Fold) -> str | None:
        lost = fold.digests - _data_of(files) - _trash_of(files)
        for manifest in fold.manifests:
            if manifest.digest in lost:
                return f"the bytes of {manifest.id} are gone"
            if manifest.parent is not None and fold.find(manifest.object, manifest.parent) is None:
                return f"the parent of {manifest.id} is gone"
        return None

    def _not_recovered(self, files: Files, fold: Fold) -> str | None:
        """
        What is wrong if everybody dies here, and somebody sweeps twice: while it is not known that
        they are dead, and when it is.
        """
        transport = Direct(files, symlinks=self.symlinks, renames=self.renames)
        nonces = iter(f"sweep{number}" for number in range(100))
        pool = Pool(transport, locks=NoLocks(), nonce=lambda: next(nonces), clock=lambda: 0.0)
        Collector(pool).sweep()
        wrong = self._changed(transport.files, fold)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Writer, "is_dead", property(lambda self: True))
            # and has been for longer than any removal of it is on its way
            patch.setattr(collect_module, "PASSING", -1)
            Collector(pool).sweep()
        if wrong is None:
            wrong = self._changed(transport.files, fold) or self._not_shown(transport.files)
        left = [
            entry.name
            for directory in (layout.INCOMING, layout.TRASH)
            for entry in transport.scan(directory)
        ]
        there = _data_of(transport.files) | _lists_of(transport.files)
        if wrong is None and (left or there != fold.digests):
            wrong = f"{left} and {there - fold.digests} stay"
        return wrong and f"{wrong}, when all die and a sweep comes"

    def _changed(self, files: Files, fold: Fold) -> str | None:
        swept = _fold_of(files)
        if (swept.number, dict(swept.nonces), dict(swept.states)) != (
            fold.number,
            dict(fold.nonces),
            dict(fold.states),
        ):
            return "the fold changes"
        lost = fold.digests - _data_of(files)
        return f"{lost} are gone" if lost else None

    def _not_shown(self, files: Files) -> str | None:
        there, should = _view_of(files), _view_should_be(_fold_of(files))
        return (
            f"the view is {there} and should be {should}"
            if self.symlinks and there != should
            else None
        )

    def _not_listed(self, files: Files) -> str | None:
        lacking = {
            digest
            for digest in self._fold(files).digests - _lists_of(files)
            if layout.has_pieces(digest, 1)
        }
        return f"the lists of {lacking} are gone" if lacking else None

    def _not_kept(self, fold: Fold, outcomes: Outcomes) -> str | None:
        at_work = {
            name: doing
            for name, doing in self.doings.items()
            if not isinstance(outcomes.get(name), type)
        }
        for name, outcome in outcomes.items():
            doing = self.doings[name]
            others = [other for key, other in at_work.items() if key != name]
            if isinstance(outcome, type):
                if outcome not in doing.allowed:
                    return f"{name} fails with {outcome.__name__}"
                continue
            for manifest in doing.publishes:
                there = fold.states.get(manifest.id)
                same = there is not None and (there.digest, there.parent) == (
                    manifest.digest,
                    manifest.parent,
                )
                if not same and not any(manifest.state in other.replaces for other in others):
                    return f"{name} published {manifest.id}, and it is not there"
            for gone in doing.removes:
                if StateId(OBJECT, gone) in fold.states and not any(
                    gone in {m.state for m in other.publishes} for other in others
                ):
                    return f"{name} removed {gone}, and it is there"
            for seen in outcome if isinstance(outcome, tuple) else ():
                wrong = self._misread(fold, seen)
                if wrong is not None:
                    return f"{name} {wrong}"
        return None

    def _misread(self, fold: Fold, seen: Read) -> str | None:
        if seen.late:
            return (
                f"reads the states as of record {seen.number}, which was not the newest when it"
                " began"
            )
        if seen.lost:
            return f"misses {seen.lost} while it is needed"
        if seen.number > fold.number or any(
            fold.nonces.get(number, nonce) != nonce for number, nonce in seen.nonces
        ):
            return f"reads {seen.nonces}, which never was the log"
        return None


AT_ONCE: Mapping[str, Callable[[Direct], object]] = {
    "newest": lambda transport: _fold_of(transport.files).number,
    "misjudge": _misjudging,
    "late 2": _coming_late(2),
    "take back 2": _taking_back(2),
    **{manifest.state: _appending(manifest) for manifest in (C, D, E, F)},
}


def explore(
    doings: Mapping[str, Doing],
    files: Files,
    *,
    locks: bool = False,
    symlinks: bool = False,
    renames: bool = True,
    only_bytes: bool = False,
    misjudged: bool = False,
) -> Explored:
    """
    Let actors meet on a pool.

    :param doings: the actors, by names that begin their nonces
    :param files: what is there at first, as of :func:`pool_with`
    :param locks: whether locks hold
    :param symlinks: whether there is a view
    :param renames: whether files can be renamed
    :param only_bytes: check only that no bytes are lost
    :param misjudged: whether one of the actors is taken for dead while it lives
    """
    rules = Rules(doings, symlinks, renames)
    world = World(
        {name: doing.run for name, doing in doings.items()},
        files,
        rules.check_misjudged if misjudged else rules.check_bytes if only_bytes else rules.check,
        step=rules.step,
        locks=locks,
        symlinks=symlinks,
        renames=renames,
        at_once=AT_ONCE,
    )
    return world.explore()
