"""
The main interface: a cache with its sources as one state pool, and handles of the objects that have
states.

>>> import statepool
>>> pool = statepool.StatePool(cache="cache", sources=["/srv/pool"])   # doctest: +SKIP
>>> pool.image("vm1/disk").get("customize", to="work.qcow2")           # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from attrs import evolve

from statepool.backends.base import Context, Options, StateBackend, Target, load_backend
from statepool.backends.external import QCOW2ExtBackend
from statepool.backends.machines import QCOW2MachineBackend
from statepool.beneath import Descriptor
from statepool.cache.cache import Cache
from statepool.cache.check_cached import naming
from statepool.cache.working import require_image, throw_away
from statepool.capture.importing import importable
from statepool.capture.scratch import lasting
from statepool.care.doctor import survey_copies, survey_host, survey_pool
from statepool.care.gc import gc_cache, gc_source, kept_in, thin_keys
from statepool.care.verify import verify_all
from statepool.config import Config, load
from statepool.copying.adopt import Adoption
from statepool.copying.sync import Sync
from statepool.ensure import Builder, Ensurer, Recipe
from statepool.errors import NotFound, UsageError
from statepool.handles import Handle, MachineHandle
from statepool.model.carried import Imported
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.model.names import check_state_name
from statepool.model.objects import Image, Machine, parse_image, parse_object
from statepool.model.outcomes import (
    Adopted,
    Checked,
    Collection,
    Ensured,
    Finding,
    GetResult,
    Listing,
    Logged,
    SetResult,
    SourceStatus,
    Synced,
    WaitFor,
)
from statepool.model.progress import SILENT, Progress
from statepool.model.scope import Scope, Scopes
from statepool.model.settings import Settings
from statepool.policy import Policy
from statepool.pools.parts import parts_of
from statepool.pools.pool import Pool
from statepool.qcow2.files import open_regular
from statepool.qcow2.tool import QemuImg
from statepool.sources.merge import making_many
from statepool.sources.pool_source import Place, PoolSource, open_pool, pools_of
from statepool.sources.source import Source, require_distinct
from statepool.transports.failures import Subject, translate_os_errors
from statepool.version import __version__

if TYPE_CHECKING:
    from statepool.bundles.export import Bundle


class StatePool:
    """
    A cache with its sources, used as one.

    No pool is contacted before the first request. A state pool can be used from several threads,
    and after a fork. A ``with`` block closes it at its end.

    :param cache: the directory of the cache; it is made when the first state is put into it
    :param sources: the pools that it can be filled from, best first: paths, URLs or sources
    :param settings: the limits, timeouts and other options
    :param progress: told of every transfer
    :raises InvalidLocation: an address cannot be parsed
    :raises UsageError: the cache is not a directory of this host, a pool is named twice, or the
        sources are not a list
    """

    def __init__(
        self,
        cache: Place,
        sources: Sequence[Place | Source] = (),
        *,
        settings: Settings | None = None,
        progress: Progress = SILENT,
    ) -> None:
        if isinstance(sources, str | bytes | os.PathLike | Location | Source):
            raise UsageError(
                f"the sources are not a list, but {str(sources)!r}",
                hint="write a list, also of one source",
            )
        self.settings = settings or Settings()
        self.progress = progress
        self._cache = Cache.open(open_pool(cache, self.settings), self.settings)
        self._sources = tuple(self._source(source) for source in sources)
        require_distinct(self._cache.pool, self._sources)

    def __repr__(self) -> str:
        return (
            f"StatePool(cache={str(self.cache)!r},"
            f" sources={[str(location) for location in self.sources]!r})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _source(self, source: Place | Source) -> Source:
        if isinstance(source, Source):
            return source
        return PoolSource(pool := open_pool(source, self.settings), str(pool))

    @cached_property
    def _context(self) -> Context:
        return Context(self._cache, self._sources, self.progress, {"statepool": __version__})

    @cached_property
    def _backend(self) -> QCOW2ExtBackend:
        return QCOW2ExtBackend(self._context)

    @property
    def cache(self) -> Location:
        """The location of the cache."""
        return self._cache.pool.location

    @property
    def sources(self) -> tuple[Location, ...]:
        """The locations of the sources, best first."""
        return tuple(source.location for source in self._sources)

    def image(self, name: str | Image) -> ImageHandle:
        """
        :param name: ``machine/image``
        :raises InvalidName: it is not of that form
        """
        return ImageHandle(
            name if isinstance(name, Image) else parse_image(name), self._backend, self._cache
        )

    def machine(self, name: str | Machine, images: Sequence[str] = ()) -> MachineHandle:
        """
        :param name: the name of the machine
        :param images: the names of all its images, if they are known: then a state of only some of
            them is refused
        :raises InvalidName: one of the names cannot be used
        """
        return MachineHandle(
            name if isinstance(name, Machine) else Machine(name, images),
            QCOW2MachineBackend(self._context),
        )

    def backend(self, name: str) -> StateBackend:
        """
        :param name: as registered in the entry point group ``statepool.backends``
        :returns: a backend that works with this cache and these sources
        :raises UsageError: nothing has this name
        """
        return load_backend(name)(self._context)

    def policy(self, *, skip: Sequence[str] = ()) -> Policy:
        """
        :param skip: kinds of objects that are left out: ``images``, ``machines``
        :returns: the operations on many objects, with modes that say what to do where a state
            exists, and where it does not
        """
        of_machines = QCOW2MachineBackend(self._context)
        return Policy(
            lambda subject: of_machines if isinstance(subject, Machine) else self._backend,
            skip=skip,
        )

    def import_bundle(
        self,
        bundle: str | os.PathLike[str] | IO[bytes],
        *,
        to: Place | None = None,
        replace: bool = False,
        dry_run: bool = False,
    ) -> Imported:
        """
        Import the state of a bundle into the cache, with all that it depends on: all of it, or
        nothing.

        :param bundle: a bundle that :meth:`ImageHandle.export` has written: a path, or a file that
            is open for reading
        :param to: also store it in this pool: the name of a source, or the location of a pool
        :param replace: whether to replace other content under the name there
        :raises Conflict: the cache has another state of this name, which was set here and is in no
            source
        :raises IntegrityError: the file is not a bundle, or is damaged, or is not safe to use;
            nothing was imported
        :raises NoSpace: the state does not fit; nothing was imported
        """
        # seldom needed, and slow to import
        from statepool.bundles.importing import Import, opened

        with opened(bundle) as source:
            imported = Import(self._cache, self.progress).run(source, dry_run=dry_run)
        if to is None or dry_run:
            return imported
        subject = parse_object(imported.object)
        handle = self.machine(subject) if isinstance(subject, Machine) else self.image(subject)
        return evolve(
            imported, stored=handle.store(imported.state, to=to, replace=replace).pools[0]
        )

    def show(self, object: str | None = None, *, scope: Scopes | None = None) -> Listing:
        """
        :param object: only its states: ``machine`` or ``machine/image``
        :param scope: the pools to look in: any of ``own``, ``swarm``, ``cluster``, ``shared``; all
            if not given
        :returns: the states, each with the pools that have it, and the sources that could not be
            asked
        :raises NotAPool: no source could be asked, since none is a pool
        """
        options = Options(scope=Scope.permitted(scope))
        with making_many():
            return (
                self._backend.show(Target(parse_object(object)), options)
                if object is not None
                else self._backend.show_all(options)
            )

    def parts(self, object: str, state: str) -> tuple[Manifest, ...]:
        """
        Return the parts of a cached state, without asking a source: for an image, its chain, tip
        first; for a machine, its own manifest, and the chains of its images and of its RAM.

        :raises NotFound: the cache does not have it
        """
        subject = parse_object(object)
        backend = (
            QCOW2MachineBackend(self._context) if isinstance(subject, Machine) else self._backend
        )
        wanted = backend.own_state(Target(subject), state)
        found = self._cache.pool.find(wanted)
        if found is None:
            raise self._cache.pool.missing(wanted)
        return parts_of(self._cache.pool, found)

    def open_bytes(self, part: Manifest) -> Descriptor:
        """
        Open the bytes of a cached state for reading. They match its manifest if the state was got
        before: a get checks them.

        :param part: as :meth:`parts` returned it
        :returns: the open file, which closes at the latest with the last reference to it
        :raises NotFound: the cache does not have them any more
        """
        file = self._cache.bytes(part.digest) if part.digest is not None else None
        if file is None:
            raise self._cache.pool.missing(part.id)
        return open_regular(file)

    @contextlib.contextmanager
    def naming(self, part: Manifest) -> Iterator[None]:
        """
        Let the file of a cached state get other names, hard links, for the duration of a ``with``
        block. That changes its status; still it is not hashed once more. Only one thread of a host
        should do so with the same file at a time, or it may be hashed.

        :raises NotFound: the cache does not have the bytes any more
        """
        with self.open_bytes(part) as descriptor, naming(self._cache, part, descriptor):
            yield

    def bundle(self, object: str, state: str) -> Bundle:
        """
        Return the bundle that an export of a cached state would be, not compressed, without asking
        a source. Nothing is kept of it: its bytes are made when they are wanted.

        :raises NotFound: the cache does not have it
        """
        from statepool.bundles.export import Bundle, Export  # few ask, and it brings much with it

        with translate_os_errors("export", Subject(f"from the cache {self._cache.root}")):
            return Bundle.of(Export(self._cache, self.parts(object, state), self.progress))

    def sources_status(self, *, scope: Scopes | None = None) -> list[SourceStatus]:
        """
        Return the sources in the order in which they would be asked for a state, with the reasons.
        No source is contacted.

        :param scope: only sources of these scopes; all if not given
        """
        return self._backend.status(Options(scope=Scope.permitted(scope) | {Scope.OWN}))

    @property
    def _asked(self) -> tuple[Source, ...]:
        return () if self.settings.offline else self._sources

    def verify(self, object: str | None = None, state: str | None = None) -> list[Checked]:
        """
        Read states again, in the cache and in the sources, to find damage.

        :returns: what was read, and what is wrong with it; a source that cannot be read has an
            entry of its own
        :raises NotFound: there is nothing of this name
        """
        subject = str(parse_object(object)) if object is not None else None
        name = check_state_name(state) if state is not None else None
        found = verify_all(self._cache, pools_of(self._asked), subject, name, self.progress)
        if not found and subject is not None:
            raise NotFound(
                f"there is no state {name or ''} of {subject}".replace("  ", " "),
                object=subject,
                state=name,
                hint="statepool show",
            )
        return found

    def gc(
        self,
        *,
        everywhere: bool = False,
        keep_keys: int | None = None,
        now: bool = False,
        dry_run: bool = False,
    ) -> Collection:
        """
        Collect garbage: leftovers of crashes, bytes without a state, old records behind
        checkpoints.

        :param everywhere: in the sources too; one that cannot be changed is left alone, and has a
            ``problem`` in the answer
        :param keep_keys: also remove old versions of built states, except this many of each, and
            except those that have dependants
        :param now: do not keep bytes for working images that have vanished: they were not moved
        :param dry_run: only report what would be removed
        :returns: what was removed, and what stays in the cache although no state needs it
        :raises UsageError: ``keep_keys`` is less than one
        :raises NotAPool: a source is not a pool; nothing was removed anywhere
        """
        if keep_keys is not None and keep_keys < 1:
            raise UsageError(
                f"{keep_keys} keys cannot be kept of a state",
                hint="keep at least one; statepool unset removes states",
            )
        pools = pools_of(self._asked) if everywhere else []
        for pool in pools:
            pool.require()
        with translate_os_errors("tidy up", Subject(f"the cache {self._cache.root}")):
            gone = (
                thin_keys(self._cache.pool, keep_keys, dry_run=dry_run)
                if keep_keys is not None
                else []
            )
            gone += gc_cache(self._cache, now=now, dry_run=dry_run)
        for pool in pools:
            gone += gc_source(pool, keep_keys, dry_run=dry_run)
        return Collection(gone, kept_in(self._cache))

    def log(self, object: str | None = None) -> list[Logged]:
        """
        :param object: only the events of this object
        :returns: the events in the cache and in the sources, oldest first, as far back as records
            are kept
        :raises NotAPool: a source is not a pool
        """
        subject = str(parse_object(object)) if object is not None else None
        pools = pools_of(self._asked)
        for pool in pools:
            pool.require()
        return [
            logged
            for pool in (self._cache.pool, *pools)
            for machine in pool.machines_of(subject)
            for logged in _logged(pool, machine, subject)
        ]

    def throw_away(self, working: str | os.PathLike[str]) -> None:
        """
        Delete a working image of a cached state, if it exists; any other file is refused. What
        backed it may then be evicted.
        """
        throw_away(self._cache, require_image(working))

    def working_directory(self) -> Path:
        """
        :returns: a directory in the cache, made if it is missing, for working images for which the
            user gave no place: there the cache can share blocks
        """
        return self._cache.working_directory()

    def doctor(self) -> list[Finding]:
        """:returns: what this host and its pools have and lack, and what to do about it"""
        found = [
            *survey_host(self._cache, QemuImg(self.settings.tool_timeout)),
            *survey_copies(self._cache, pools_of(self._asked)),
        ]
        for pool in pools_of(self._sources):
            found += survey_pool(pool)
        return found

    def close(self) -> None:
        """Close connections."""
        for source in self._sources:
            source.close()


def _logged(pool: Pool, machine: str, subject: str | None) -> Iterator[Logged]:
    for record in pool.log(machine).records():
        changes = tuple(
            str(change) for change in record.changes if subject in (None, machine, change.id.object)
        )
        if changes:
            yield Logged(str(pool), machine, record.number, record.time, record.by, changes)


class ImageHandle(Handle):
    """One image of a machine, in a state pool."""

    _backend: QCOW2ExtBackend

    def __init__(self, image: Image, backend: QCOW2ExtBackend, cache: Cache) -> None:
        self.image = image
        self._backend = backend
        self._cache = cache

    def __str__(self) -> str:
        return str(self.image)

    def __repr__(self) -> str:
        return f"<ImageHandle {self} in {self._cache.pool}>"

    def _target(self, working: str | os.PathLike[str] | None = None) -> Target:
        return Target(self.image, {self.image.name: working} if working is not None else {})

    def get(
        self,
        state: str,
        *,
        to: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        mirror: Place | None = None,
        scope: Scopes | None = None,
        dry_run: bool = False,
    ) -> GetResult:
        """
        Bring a state into the cache, and make a working image if asked to.

        :param to: the path of a working image to make
        :param overwrite: whether to overwrite a file there
        :param mirror: get the state from this source, given by its name or location; if not given,
            from the best one that has it
        :param scope: the pools from which it may come: any of ``own``, ``swarm``, ``cluster``,
            ``shared``; all if not given
        :raises NotFound: no pool has the state
        :raises Conflict: sources disagree about it
        :raises FileInTheWay: a file is there
        :raises RefusedError: the place is inside the cache or a source
        """
        named = frozenset(str(place) for place in (mirror,) if place is not None)
        return self._backend.get(
            self._target(to),
            state,
            Options(
                overwrite=overwrite, scope=Scope.permitted(scope), sources=named, dry_run=dry_run
            ),
        )

    @contextlib.contextmanager
    def working(
        self, state: str, *, keep: str = "never", directory: str | os.PathLike[str] | None = None
    ) -> Iterator[Path]:
        """
        Make a working image for the length of a ``with`` block.

        :param keep: ``never``, ``failed`` (if the block raises) or ``always``
        :param directory: its directory; one beside the cache's data if not given
        :raises UsageError: ``keep`` has another value
        """
        name = self.image.name
        with lasting(
            self._cache,
            {name: f"{self.image}-{state}".replace("/", "-")},
            keep=keep,
            directory=directory,
        ) as paths:
            self.get(state, to=paths[name])
            yield paths[name]

    def set(
        self,
        state: str,
        *,
        source: str | os.PathLike[str],
        replace: bool = False,
        squash: bool = False,
        labels: Mapping[str, str] | None = None,
        scope: Scopes | None = None,
        wait_for: str = WaitFor.ALL,
        dry_run: bool = False,
    ) -> SetResult:
        """
        Make a working image a state, in the cache and in the sources. A fresh overlay takes its
        place, so that the machine can continue.

        :param source: the working image
        :param replace: whether to replace other content under the name
        :param squash: if the image is backed by the very state to set, make the content of both the
            new content of the state
        :param scope: the sources to use: any of ``own``, ``swarm``, ``cluster``, ``shared``; all if
            not given
        :param wait_for: which pools must have the state for the answer to be complete: ``all``;
            ``any``: the cache and one source; ``own``: the cache. All pools are tried in any case,
            before this returns.
        :raises Conflict: the name exists with other content
        """
        options = Options(
            replace=replace,
            squash=squash,
            labels=labels or {},
            scope=Scope.permitted(scope),
            wait_for=WaitFor.parse(wait_for),
            dry_run=dry_run,
        )
        return self._backend.set(self._target(source), state, options)

    def import_file(
        self,
        state: str,
        file: str | os.PathLike[str],
        *,
        sha256: str | None = None,
        sha512: str | None = None,
        raw: bool = False,
        replace: bool = False,
        labels: Mapping[str, str] | None = None,
        scope: Scopes | None = None,
        wait_for: str = WaitFor.ALL,
        dry_run: bool = False,
    ) -> SetResult:
        """
        Make a state of a copy of a disk image that stands alone, such as a downloaded one. The file
        stays exactly as it is.

        :param file: qcow2, raw, VMDK, VDI, VHD, VHDX or QED; also compressed by gzip, bzip2, xz or
            zstd
        :param sha256: the checksum that the file must have, as 64 hexadecimal digits
        :param sha512: likewise, as 128 digits
        :param raw: take it as a raw image, although nothing in it shows that it is one
        :param replace: whether to replace other content under the name
        :param scope: the sources to use, as for :meth:`set`
        :param wait_for: which pools must have the state, as for :meth:`set`
        :param dry_run: convert it, and throw the result away
        :raises UsageError: a checksum is not of its kind
        :raises DigestMismatch: the file has another checksum
        :raises UnsafeImage: it is no image of these formats, or needs other files
        :raises InUse: a process can write to it
        :raises Conflict: the name exists with other content
        """
        checksums = {"sha256": sha256, "sha512": sha512}
        with importable(
            self._cache, file, checksums, raw=raw, progress=self._backend.context.progress
        ) as source:
            options = Options(
                replace=replace,
                labels=labels or {},
                scope=Scope.permitted(scope),
                copying=os.path.samefile(source, file),
                wait_for=WaitFor.parse(wait_for),
                dry_run=dry_run,
            )
            return self._backend.set(self._target(source), state, options)

    def ensure(
        self,
        state: str,
        build: Builder,
        *,
        parent: str | None = None,
        key: str | None = None,
        parameters: Mapping[str, object] | None = None,
        timeout: float | None = None,
        again: str | None = None,
    ) -> Ensured:
        """
        Get a state, or build it: once for all workers and hosts that ask; the others wait
        meanwhile.

        The state is kept under its name and a key for what it was made from, as in
        ``connect--1f0c9d2a7b3e``.

        :param build: gets the path of a working image of the parent, and changes it. Without a
            parent it makes the image there.
        :param parent: the state to start from
        :param key: the identification of the builder; its source code if not given
        :param parameters: other inputs of the state: part of the key
        :param timeout: the timeout of the builder, in seconds; with one, it runs in a thread of its
            own
        :param again: build the state anew, once for each such text, under a key that is used from
            then on; the old state stays, and is in the answer
        :raises UsageError: the timeout is not valid, or an input of the key is not known
        :raises BuildFailed: the builder failed; nothing was kept
        :raises NotFound: the parent is not available
        """
        return self.ensure_recipe(
            state, Recipe(build, parent, key, parameters or {}, timeout, again=again)
        )

    def ensure_recipe(self, state: str, recipe: Recipe) -> Ensured:
        """Get a state, or build it, as :meth:`ensure` does, with all inputs in one value."""
        return Ensurer(self._backend, self.image).ensure(state, recipe)


def init(location: Place, *, dry_run: bool = False, settings: Settings | None = None) -> Location:
    """
    Make an empty pool; an existing one stays as it is.

    :param settings: timeouts and other options, also for connections to other hosts
    :returns: its location
    :raises AccessDenied: the directory cannot be written
    """
    pool = open_pool(location, settings or Settings())
    pool.create(dry_run=dry_run)
    return pool.location


def adopt(
    location: Place,
    *,
    relocate: bool = False,
    dry_run: bool = False,
    settings: Settings | None = None,
    progress: Progress = SILENT,
) -> list[Adopted]:
    """
    Make the states that another tool put into a pool managed.

    :param relocate: also rewrite absolute backing names in them
    :param settings: timeouts and other options, also for connections to other hosts
    :raises NotAPool: the pool has no log yet
    """
    return Adoption(
        open_pool(location, settings or Settings()), relocate=relocate, progress=progress
    ).run(dry_run=dry_run)


def sync(
    origin: Place,
    target: Place,
    object: str | None = None,
    *,
    delete: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    settings: Settings | None = None,
    progress: Progress = SILENT,
) -> Synced:
    """
    Copy chains from one pool to another. An interrupted run is simply started again: it continues
    with what is missing.

    :param object: only its states: ``machine`` or ``machine/image``
    :param delete: also remove from the target the states that the origin does not have
    :param replace: replace other content under a name, if no state depends on it
    :param dry_run: report what would be done, and change nothing
    :raises NotAPool: the origin or the target is not a pool
    :raises UsageError: both are the same pool
    """
    subject = str(parse_object(object)) if object is not None else None
    known = settings or Settings()
    source, sink = open_pool(origin, known), open_pool(target, known)
    if source.transport.identity == sink.transport.identity:
        raise UsageError(f"{source} and {sink} are the same pool", hint="name two pools")
    return Sync(source, sink, delete=delete, replace=replace, progress=progress).run(
        subject, dry_run=dry_run
    )


def from_config(config: Config | None = None, *, progress: Progress = SILENT) -> StatePool:
    """
    :param config: the configuration; read from the system's, the user's and the project's files and
        the environment if not given
    :raises ConfigError: a setting in it cannot be used
    """
    found = config if config is not None else load()
    sources = [
        PoolSource(
            open_pool(one.location, found.settings_for(one)), one.name, one.scope, one.authority
        )
        for one in found.sources
    ]
    return StatePool(found.cache, sources, settings=found.settings, progress=progress)
