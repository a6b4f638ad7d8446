"""The results of export and import. Values only: they can be compared, printed and pickled."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from statepool.model.outcomes import Presence, StoredAt


@frozen
class Exported:
    """
    The result of an export of a state into a file.

    :param object: what it is a state of
    :param state: the name of the state
    :param chain: the names of the states of its chain, tip first
    :param digest: of the tip
    :param path: the file; None for a stream
    :param bytes: how many bytes were written
    :param flat: whether the file is one image without a backing file, and not a bundle
    :param compress: how it is compressed: ``zstd``, ``zlib`` or ``none``
    :param warnings: what the user should know: which sources failed, or delivered wrong data
    """

    object: str
    state: str
    chain: tuple[str, ...]
    digest: str
    path: Path | None = None
    bytes: int = 0
    flat: bool = False
    compress: str = "none"
    warnings: tuple[str, ...] = ()


@frozen
class Imported:
    """
    The result of an import of a bundle into the cache.

    :param object: what it is a state of
    :param state: its name
    :param chain: the names of the states of its chain, tip first
    :param digest: of the tip
    :param bytes: how many bytes were moved into the cache: those that the cache did not have
    :param stored: the result at another pool, if the caller named one
    :param warnings: what the user should know: what was wrong in the cache and has been repaired
    """

    object: str
    state: str
    chain: tuple[str, ...]
    digest: str
    bytes: int = 0
    stored: StoredAt | None = None
    warnings: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the named pool has the state, too."""
        return self.stored is None or self.stored.result is not Presence.FAILED
