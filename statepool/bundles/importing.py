"""Import of the state of a bundle into the cache, as from any source: all of it, or nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO

from attrs import frozen

from statepool.bundles.source import BundleTransport
from statepool.bundles.stream import Input, about, name_of, stream_of
from statepool.cache.cache import Cache
from statepool.capture.capture_journal import recover
from statepool.copying.fetch import Fetch
from statepool.errors import UnsafeImage, UsageError
from statepool.model.carried import Imported
from statepool.model.progress import SILENT, Progress
from statepool.pools.parts import chains_of
from statepool.pools.pool import Pool
from statepool.sources.pool_source import PoolSource
from statepool.transports.failures import Subject, translate_os_errors


@contextlib.contextmanager
def opened(bundle: str | os.PathLike[str] | IO[bytes]) -> Iterator[Input]:
    """
    Yield the source of the bytes of a bundle.

    :param bundle: a path, or a file that is open for reading, of which nothing has been read
    :raises UsageError: it is a terminal
    """
    if not isinstance(bundle, str | os.PathLike):
        if bundle.isatty():
            hint = "name a file, or lead one here"
            raise UsageError("a bundle is not read from a terminal", hint=hint)
        yield Input(stream_of(bundle), name_of(bundle))
        return
    path = os.path.abspath(os.fsdecode(bundle))
    with about("read", Subject(path, path=path)):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Input(descriptor, path)
    finally:
        os.close(descriptor)


@frozen
class Import:
    """
    An importer of bundles into a cache.

    :param cache: the target
    :param progress: told of the bytes
    """

    cache: Cache
    progress: Progress = SILENT

    def run(self, source: Input, *, dry_run: bool = False) -> Imported:
        """
        :param source: of the bytes of a bundle, of which nothing has been read
        :param dry_run: only read the list of the bundle's contents, and change nothing
        :returns: what is in the cache now
        :raises Conflict: the cache has a state of one of these names that no source has
        :raises IntegrityError: it is no bundle, or damaged, or its images are not safe to use
        :raises NoSpace: it does not fit
        """
        name = source.name
        with translate_os_errors(f"import {name}", Subject(f"into the cache {self.cache.root}")):
            bundle = BundleTransport(source, name)
            tip = bundle.contents.tip
            pool = Pool(bundle, max_depth=self.cache.settings.max_depth)
            offer = PoolSource(pool, name).resolve(tip.id)
            assert offer is not None, "the record has been looked at"
            self._refuse_deep(bundle)
            fetch = Fetch(self.cache, offer, self.progress, once=bundle.finish)
            moved, warnings = 0, tuple[str, ...]()
            if dry_run:
                moved = sum(member.manifest.data_size for member in fetch.missing())
            else:
                recover(self.cache)
                with self._nothing_left(bundle):
                    fetched = fetch.run()
                moved, warnings = fetched.bytes, fetched.warnings
        chains = chains_of(bundle.contents.manifests, lambda manifest: manifest)
        chain = tuple(link.state for link in reversed(max(chains, key=len)))
        digest = str(tip.digest or "")
        return Imported(tip.object, tip.state, chain, digest, moved, warnings=warnings)

    def _refuse_deep(self, bundle: BundleTransport) -> None:
        """Refuse a chain that is too deep before reading bytes that would be refused in the end."""
        most = self.cache.settings.max_depth
        for chain in chains_of(bundle.contents.manifests, lambda manifest: manifest):
            if len(chain) > most:
                raise UnsafeImage(
                    f"the chain of {chain[-1].id} has {len(chain)} states, more than {most}",
                    check="depth",
                    object=chain[-1].object,
                    state=chain[-1].state,
                    hint="raise max-depth",
                )

    @contextlib.contextmanager
    def _nothing_left(self, bundle: BundleTransport) -> Iterator[None]:
        """Remove the bytes that the block has fetched if it raises, unless a state needs them."""
        try:
            yield
        except BaseException:
            digests = {manifest.digest for manifest in bundle.contents.files}
            self.cache.drop({digest for digest in digests if digest is not None})
            raise
