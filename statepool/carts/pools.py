"""
The archive of states: ``vm1/disk/customize`` is a file, ``vm1/loggedin`` all files of a machine.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import TypeVar

from statepool import (
    ConfigError,
    Digest,
    Image,
    Kind,
    Manifest,
    NotFound,
    UsageError,
    check_state_name,
    parse_object,
)
from statepool.carts.archives import Archive, Context, Part, Status, Wanted
from statepool.carts.sinks import Sink

_Found = TypeVar("_Found")


class PoolsArchive(Archive):
    """
    The archive of states of the configured pools.

    Staging fetches a state into the cache of the service, once for any number of carts, and checks
    every byte. Carts then share the bytes with the cache.

    :param context: gives the state pool
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.pool = context.pool(_Watch(lambda count: None))
        self._linking: dict[Digest | None, threading.Lock] = defaultdict(threading.Lock)

    exports = True

    @classmethod
    def open(cls, options: Mapping[str, object], context: Context) -> PoolsArchive:
        """Open the archive; it has no options."""
        if options:
            raise ConfigError("pools have no options here", hint="configure sources of statepool")
        return cls(context)

    def check(self, wanted: Wanted) -> None:
        _parse(wanted.id)

    def stage(self, wanted: Wanted, advance: Callable[[int], None]) -> None:
        """Fetch the state into the cache, with all states that back it."""
        subject, state = _parse(wanted.id)
        of_image = isinstance(parse_object(subject), Image)
        with self._context.pool(_Watch(advance)) as pool:
            (pool.image(subject) if of_image else pool.machine(subject)).get(state)

    def status(self, wanted: Wanted) -> Status:
        if wanted.export:
            bundle = self._here(wanted, partial(self.pool.bundle, *_parse(wanted.id)))
            return Status(near=True, parts=(Part(wanted.path, bundle.size, bundle.created),))
        return Status(near=True, parts=tuple(part for part, _ in self._staged(wanted)))

    def name_of(self, wanted: Wanted) -> str | None:
        if not wanted.export:
            return None
        return self._here(wanted, partial(self.pool.bundle, *_parse(wanted.id))).name

    @contextmanager
    def placing(self, wanted: Wanted, part: Part) -> Iterator[None]:
        """Keep the trust of the cache in bytes that a cart gets as a hard link."""
        if wanted.export:
            yield
            return
        for known, manifest in self._staged(wanted):
            if (known.path, known.digest) == (part.path, part.digest):
                with self._linking[manifest.digest], self.pool.naming(manifest):
                    yield
                return
        yield  # it was replaced meanwhile, which pull says

    def pull(self, wanted: Wanted, part: Part, sink: Sink) -> None:
        if wanted.export:
            bundle = self._here(wanted, partial(self.pool.bundle, *_parse(wanted.id)))
            bundle.write(lambda data: sink.write(bytes(data)))
            return
        for known, manifest in self._staged(wanted):
            if (known.path, known.digest) == (part.path, part.digest):
                with self.pool.open_bytes(manifest) as source:
                    sink.take(source, digest=manifest.digest, immutable=True)
                return
        raise NotFound(f"{wanted.id} was replaced meanwhile", hint="ask for it once more")

    def _staged(self, wanted: Wanted) -> list[tuple[Part, Manifest]]:
        return self._here(wanted, lambda: list(self._parts(wanted)))

    def _here(self, wanted: Wanted, look: Callable[[], _Found]) -> _Found:
        """
        :returns: what is found in the cache, which gets the state again if it was evicted
        """
        try:
            return look()
        except NotFound:
            self.stage(wanted, lambda count: None)
        return look()

    def _parts(self, wanted: Wanted) -> Iterator[tuple[Part, Manifest]]:
        subject, state = _parse(wanted.id)
        device = os.stat(self.pool.cache.path).st_dev
        for manifest in self.pool.parts(subject, state):
            is_tip = manifest.state == state
            if manifest.kind is Kind.MACHINE or not (is_tip or wanted.chain):
                continue
            path = _path(wanted, subject, manifest, is_tip=is_tip)
            part = Part(path, manifest.size, manifest.created, manifest.digest, device)
            yield part, manifest


class _Watch:
    """A progress that passes only the bytes of transfers to a function."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def begin(self, what: str, total: int) -> None:
        """Ignore the begin of a transfer."""

    def end(self) -> None:
        """Ignore the end of a transfer."""


def _path(wanted: Wanted, subject: str, manifest: Manifest, *, is_tip: bool) -> str:
    """
    :returns: the path of a part. The file of a state has the requested path, and the files that
        back it lie beside it under the plain names that images refer to; a machine gets a
        directory.
    """
    if subject != manifest.object or manifest.kind is Kind.RAM:
        inside = manifest.object.partition("/")[2]
        return str(PurePosixPath(wanted.path, inside, manifest.file_name))
    if is_tip:
        return wanted.path
    return str(PurePosixPath(wanted.path).with_name(manifest.file_name))


def _parse(text: str) -> tuple[str, str]:
    """:returns: the object and the name of the state of an id"""
    subject, slash, state = text.rpartition("/")
    if not slash or text.count("/") > 2:
        raise UsageError(
            f"{text[:80]!r} is not the id of a state",
            hint="write MACHINE/IMAGE/STATE, or MACHINE/STATE for a machine with all its images",
        )
    parse_object(subject)
    check_state_name(state)
    return subject, state
