"""Export of a state as a bundle, or as a standalone image."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import blake3
from attrs import evolve, field, frozen

from statepool.backends.base import Options, Target
from statepool.backends.sourced import SourcedStateBackend
from statepool.bundles.contents import Contents, data_header, padding
from statepool.bundles.holes import data_of
from statepool.bundles.place import made
from statepool.bundles.stream import Output, name_of
from statepool.cache.cache import Cache
from statepool.cache.check_cached import damaged, open_bytes
from statepool.cache.working import check_place
from statepool.errors import UsageError
from statepool.model.carried import Exported
from statepool.model.manifest import Kind, Manifest
from statepool.model.names import ROOT
from statepool.model.objects import Machine
from statepool.model.progress import SILENT, Progress
from statepool.pools.parts import parts_of
from statepool.pools.refusals import mismatched
from statepool.qcow2.tool import QemuImg
from statepool.sources.pool_source import pools_of
from statepool.transports.copying import hash_read
from statepool.transports.failures import Subject, translate_os_errors
from statepool.transports.reading import Extent, Reader, Slice, slices

COMPRESSIONS = ("zstd", "none")
"""The compressions of a bundle."""

FLAT_COMPRESSIONS = ("none", "zstd", "zlib")
"""The compressions of a standalone image."""


@frozen
class Form:
    """
    The form in which a state is exported.

    :param flat: whether as one image without a backing file, not as a bundle
    :param compress: how it is compressed; the first compression for this form if not given
    :param overwrite: whether an existing file is replaced
    :raises UsageError: this form does not have this compression
    """

    flat: bool = False
    compress: str | None = None
    overwrite: bool = False

    def __attrs_post_init__(self) -> None:
        if self.compress is not None and self.compress not in self._known:
            what = "an image" if self.flat else "a bundle"
            hint = "choose one of " + ", ".join(self._known)
            raise UsageError(f"{what} cannot be compressed with {self.compress!r}", hint=hint)

    @property
    def _known(self) -> tuple[str, ...]:
        return FLAT_COMPRESSIONS if self.flat else COMPRESSIONS

    @property
    def compression(self) -> str:
        """The compression of the file."""
        return self.compress or self._known[0]


def export(
    backend: SourcedStateBackend,
    target: Target,
    state: str,
    to: str | os.PathLike[str] | IO[bytes],
    options: Options,
    form: Form,
) -> Exported:
    """
    Fetch a state into the cache, if it is not there, and write it into a file.

    :param to: a path, or a file that is open for writing
    :returns: what was written
    :raises FileInTheWay: the file exists
    :raises NotFound: no pool has the state
    :raises UsageError: it cannot be written in this form
    """
    if isinstance(target.object, Machine) and state == ROOT:
        raise UsageError(
            f"the root state of {target.object} is that of each of its images",
            object=str(target.object),
            state=state,
            hint=f"export each: statepool export {target.object}/IMAGE {state} -o FILE",
        )
    cache, sources = backend.context.cache, backend.context.sources
    place: Path | IO[bytes]
    if isinstance(to, str | os.PathLike):
        place = check_place(to, cache, pools_of(sources), overwrite=form.overwrite)
    else:
        _require_stream(place := to, form)
    got = backend.get(target, state, options)
    wanted = backend.own_state(target, state)
    with translate_os_errors(f"export {wanted}", Subject(f"from the cache {cache.root}")):
        manifest = cache.pool.find(wanted)
        if manifest is None:
            raise cache.pool.missing(wanted)
        work = Export(cache, parts_of(cache.pool, manifest), backend.context.progress)
        size = work.to_file(place, form) if isinstance(place, Path) else work.to_stream(place, form)
    return Exported(
        object=got.object,
        state=got.state,
        chain=got.chain,
        digest=got.digest,
        path=place if isinstance(place, Path) else None,
        bytes=size,
        flat=form.flat,
        compress=form.compression,
        warnings=got.warnings,
    )


def _require_stream(to: IO[bytes], form: Form) -> None:
    if form.flat:
        raise UsageError(
            "an image cannot be written to a stream: qemu-img needs a file",
            hint="name a file, or export a bundle",
        )
    if to.isatty():
        raise UsageError(
            "a bundle is not written to a terminal",
            hint="name a file, or lead it to another command: … | ssh HOST statepool import -",
        )


@frozen
class Export:
    """
    A writer of a state with all states that back it.

    :param cache: the cache with the state
    :param parts: of the state, see :mod:`~statepool.pools.parts`
    :param progress: told of the bytes
    """

    cache: Cache
    parts: Sequence[Manifest]
    progress: Progress = SILENT

    def to_file(self, path: Path, form: Form) -> int:
        """
        :param path: absolute
        :returns: the length of the new file, in bytes
        """
        with made(path, overwrite=form.overwrite) as (descriptor, temporary):
            if form.flat:
                self._write_flat(temporary, form.compression)
            else:
                out = Output(descriptor, str(path), compress=form.compression != "none")
                self.write_bundle(out)
            return os.fstat(descriptor).st_size

    def to_stream(self, to: IO[bytes], form: Form) -> int:
        """:returns: how many bytes were written"""
        to.flush()
        out = Output(to.fileno(), name_of(to), compress=form.compression != "none")
        self.write_bundle(out)
        return out.written

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Protect the bytes from the collector for the duration of a ``with`` block."""
        digests = {part.digest for part in self.parts if part.digest is not None}
        staging = self.cache.pool.stage(digests)
        try:
            lacking = self.cache.pool.lacking(digests)
            for part in self.parts:
                if part.digest in lacking:
                    raise damaged(self.cache, part)
            yield
        finally:
            staging.end()

    def contents(self) -> Contents:
        """:returns: what its bundle has in it"""
        with self._kept():
            return Contents.of([self._with_places(part) for part in self.parts])

    def write_bundle(self, out: Output, contents: Contents | None = None) -> None:
        """Write its bundle. What is in it is looked at unless it is given."""
        contents = contents or self.contents()
        with self._kept():
            out.write(contents.beginning)
            total = sum(manifest.size for manifest in contents.files)
            self.progress.begin(f"export {contents.tip.id}", total)
            try:
                for manifest in contents.files:
                    self._write_data(manifest, out)
            finally:
                self.progress.end()
            out.write(contents.closing)
            out.finish()

    def _with_places(self, part: Manifest) -> Manifest:
        if part.digest is None:
            return part
        with open_bytes(self.cache, part) as descriptor:
            return evolve(part, extents=data_of(descriptor, part.size, self._subject(part)))

    def _write_data(self, manifest: Manifest, out: Output) -> None:
        assert manifest.digest is not None
        out.write(data_header(manifest))

        def write(part: Slice, content: memoryview) -> None:
            for offset, length in part.data:
                out.write(content[offset - part.start :][:length])

        with open_bytes(self.cache, manifest) as descriptor:
            reader = Placed(descriptor, manifest.extents, self._subject(manifest))
            found = hash_read(
                reader,
                manifest.size,
                algorithm=manifest.digest.algorithm,
                progress=self.progress,
                each=write,
            )
        if found != manifest.digest:
            raise mismatched(
                manifest,
                found,
                f"in the cache {self.cache.root}",
                pool=str(self.cache.pool),
                hint=f"mend the cache: statepool get {manifest.object} {manifest.state}",
            )
        out.write(padding(manifest.data_size))

    def _subject(self, part: Manifest) -> Subject:
        return Subject(f"{part.id} in the cache {self.cache.root}", str(self.cache.pool))

    def _write_flat(self, target: Path, compress: str) -> None:
        tip = self.parts[0]
        if tip.kind is not Kind.IMAGE:
            raise UsageError(
                f"{tip.id} is a state of a machine, and one image cannot hold it",
                object=tip.object,
                state=tip.state,
                hint=f"export one of its images, {tip.object}/IMAGE, or leave --flat out",
            )
        options = [f"cluster_size={tip.cluster_size}"]
        options += [f"compression_type={compress}"] if compress != "none" else []
        with self._kept():
            chain = self.cache.chains.prepare(self.parts)
            tool = QemuImg(self.cache.settings.tool_timeout)
            tool.convert(chain, target, options=options, compress=compress != "none")


@frozen
class Bundle:
    """
    A bundle, not compressed, whose bytes are made when they are wanted.

    :param size: how many there are
    :param created: when the state was, in seconds since the epoch
    """

    size: int
    created: float
    _work: Export = field(repr=False)
    _contents: Contents = field(repr=False)

    @classmethod
    def of(cls, work: Export) -> Bundle:
        """
        :raises IntegrityError: the cache does not have all its bytes
        """
        contents = work.contents()
        return cls(contents.size, contents.tip.created, work, contents)

    @property
    def name(self) -> str:
        """A name of its bytes, in hexadecimal: they follow from its record, with its digests."""
        return blake3.blake3(self._contents.beginning).hexdigest()

    def write(self, take: Callable[[memoryview], object]) -> None:
        """
        Make its bytes.

        :param take: is given them, one piece after the other; the memory of a piece is used again
        :raises IntegrityError: the cache does not have all its bytes, or other ones
        """
        self._work.write_bundle(Output(take, "a bundle", compress=False), self._contents)


class Placed(Reader):
    """A reader of the given data extents of a file."""

    def __init__(self, descriptor: int, extents: Sequence[Extent], subject: Subject) -> None:
        super().__init__(descriptor, subject)
        self._extents = extents

    def slices(self, size: int) -> Iterator[Slice]:
        """Return slices with data at the extents; without extents, everywhere."""
        return slices(self._extents or ((0, size),), size)
