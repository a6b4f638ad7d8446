"""Verification: archives are read once more, and compared with their manifests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import blake3
from attrs import frozen

from statepool.archive.compress import decompressed
from statepool.archive.directory import ArchiveDirectory, Stored
from statepool.archive.manifest import Manifest, Member, read_members
from statepool.archive.names import ArchiveName
from statepool.archive.pool_reader import check_archive, is_of_pool
from statepool.archive.scan import Check, Scanner
from statepool.errors import DigestMismatch, IntegrityError, StatePoolError, UnsafeImage
from statepool.model.digest import Digest
from statepool.model.progress import SILENT, Progress
from statepool.transports.failures import Subject, translating

_READ = 4 << 20
"""Bytes that are read at a time for the digest of an archive."""


@frozen
class Verified:
    """
    The result for one archive.

    :param name: of the archive
    :param error: what is wrong; None if nothing is
    :param member: the name of the damaged member, where one is known
    """

    name: ArchiveName
    error: StatePoolError | None = None
    member: str | None = None


class DamagedMember(DigestMismatch):
    """
    A member of an archive is not what its manifest says.

    :param member: its name
    """

    member: str = ""


def verify(
    directory: ArchiveDirectory,
    stored: dict[ArchiveName, Stored],
    name: ArchiveName,
    *,
    progress: Progress = SILENT,
) -> Verified:
    """
    Read an archive once more, and compare each member with the manifest.

    That the levels below it are there is checked too; they themselves are not read.

    :param stored: all archives of the backup
    :returns: what is wrong, if anything
    """
    try:
        one = directory.chain(name, stored)[-1]
        assert one.manifest is not None
        if is_of_pool(one):
            check_archive(directory.path / one.file, one.manifest.digest, progress)
            return Verified(name)
        progress.begin(f"verify {name}", one.manifest.content_size)
        try:
            for chunk in checked(directory, one):
                progress.advance(len(chunk))
        finally:
            progress.end()
    except StatePoolError as error:
        return Verified(name, error, error.member if isinstance(error, DamagedMember) else None)
    return Verified(name)


def checked(
    directory: ArchiveDirectory,
    stored: Stored,
    *,
    check: Check | None = None,
    emit: Callable[[bytes | memoryview], object] | None = None,
) -> Iterator[bytes]:
    """
    Yield the tar of an archive, and compare it with the manifest while it is read.

    :param check: see :class:`~statepool.archive.scan.Scanner`
    :param emit: likewise
    :raises DamagedMember: a member is not what the manifest says
    :raises IntegrityError: the archive is damaged in another way
    """
    manifest = stored.manifest
    assert manifest is not None
    what = f"{stored.name} in {directory.path}"
    with directory.manifest(stored) as file:
        members = read_members(file, f"the manifest of {what}")
        compare = _Comparison(what, members)
        scanner = Scanner(what, compare.take, check=check, emit=emit)
        with directory.open(stored.file) as descriptor:
            try:
                with (
                    translating("read", Subject(what, path=what)),
                    decompressed(descriptor, stored.name.extension, what) as chunks,
                ):
                    for chunk in chunks:
                        scanner.feed(chunk)
                        yield chunk
                scanner.finish()
            except IntegrityError as error:
                if isinstance(error, DamagedMember | UnsafeImage):  # the reason is told already
                    raise
                raise compare.damaged(error.message) from error
            compare.finish(scanner, manifest)
            _require_digest(descriptor, manifest, what)


class _Comparison:
    """A comparison of the members of an archive with those of its manifest."""

    def __init__(self, what: str, members: Iterator[Member]) -> None:
        self._what, self._members = what, members
        self._next = next(members, None)

    def take(self, member: Member) -> None:
        expected, self._next = self._next, next(self._members, None)
        if expected is None:
            raise self._error(member.name, "the manifest does not have it")
        if member != expected:
            raise self._error(
                expected.name,
                "it was altered" if member.name == expected.name else f"{member.name} is there",
                expected.digest,
                member.digest,
            )

    def damaged(self, why: str) -> IntegrityError:
        """:returns: the error for an archive that cannot be read any further"""
        if self._next is None:
            return IntegrityError(why, path=self._what, hint=_HINT)
        return self._error(self._next.name, why)

    def finish(self, scanner: Scanner, manifest: Manifest) -> None:
        if self._next is not None:
            raise self._error(self._next.name, "it is missing")
        if scanner.offset != manifest.content_size:
            raise IntegrityError(
                f"{self._what} has another length than its manifest says",
                path=self._what,
                hint=_HINT,
            )

    def _error(
        self, name: str, why: str, expected: Digest | None = None, actual: Digest | None = None
    ) -> DamagedMember:
        error = DamagedMember(
            f"{self._what} is damaged at the member {name}: {why}",
            expected=str(expected or ""),
            actual=str(actual or ""),
            path=self._what,
            hint=_HINT,
        )
        error.member = name
        return error


_HINT = "use an older archive that is kept, and make a new one"


def _require_digest(descriptor: int, manifest: Manifest, what: str) -> None:
    """
    Compare the bytes of the file itself: what decompressors skip belongs to no member.
    """
    hasher = blake3.blake3()
    position = 0
    while chunk := os.pread(descriptor, _READ, position):
        hasher.update(chunk)
        position += len(chunk)
    found = Digest("blake3", hasher.hexdigest())
    if found != manifest.digest:
        raise DigestMismatch(
            f"{what} is not the archive of its manifest",
            expected=str(manifest.digest),
            actual=str(found),
            path=what,
            hint=_HINT,
        )
