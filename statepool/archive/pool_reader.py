"""
Reading archives of a pool: what is in them, whether they are whole, and the pool that they were
made of.

Nothing is interpreted that a header of the tar says: each byte is compared with what the index and
the logs demand, or is data, whose digest they demand. So members with other names, links and
devices cannot be in an archive that is accepted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TypeVar

from attrs import frozen

from statepool.archive.compress import decompressed
from statepool.archive.definition import BackupType
from statepool.archive.directory import Stored
from statepool.archive.manifest import digest_of
from statepool.archive.pool_contents import (
    HINT,
    MOST_INDEX,
    PROVIDER,
    Contents,
    Index,
    fold_of,
    header_of,
    index_path,
)
from statepool.archive.pool_writer import Check, checking
from statepool.beneath import Beneath, Tree, beside
from statepool.bundles.contents import BLOCK, MEMBER_DIRECTORY, member, padding, record_size
from statepool.bundles.source import Streamed, told
from statepool.bundles.stream import ZSTD, Input, about
from statepool.errors import (
    BadRecord,
    DigestMismatch,
    FileInTheWay,
    IntegrityError,
    StatePoolError,
    about_file,
)
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.model.pieces import PIECE, Pieces
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.fold import Fold
from statepool.pools.log import random_nonce
from statepool.pools.refusals import mismatched
from statepool.transports.base import Transfer, small_file_mode
from statepool.transports.copying import copy_read, hash_read
from statepool.transports.failures import Subject, translated, translating
from statepool.transports.local import LocalTransport

T = TypeVar("T")

WHAT = "the archive"
"""What messages call the file."""


@frozen
class VerifiedPool:
    """
    The result of reading an archive.

    :param path: of the archive
    :param level: its level
    :param states: how many states have bytes in it
    :param problem: what is wrong with it, and with which member; None if nothing is
    """

    path: Path
    level: int | None = None
    states: int = 0
    problem: str | None = None


@frozen
class RestoredPool:
    """
    The result of a restore.

    :param path: of the pool
    :param level: the highest level that was restored
    :param machines: how many logs it has
    :param states: how many states it has
    :param bytes: of the data
    """

    path: Path
    level: int
    machines: int
    states: int
    bytes: int


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Input]:
    """Yield the bytes of the tar in an archive."""
    with about("read", Subject(str(path), path=str(path))):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        packed = _packed(descriptor)
        if packed is None:
            yield Input(descriptor, str(path), what=WHAT, hint=HINT)
        else:
            with decompressed(descriptor, packed, f"{WHAT} {path}") as chunks:
                yield Input(_Chunks(chunks), str(path), what=WHAT, hint=HINT)
    finally:
        os.close(descriptor)


def _packed(descriptor: int) -> BackupType | None:
    """:returns: how a file is compressed; None if it is not"""
    beginning = os.pread(descriptor, _LONGEST_MAGIC, 0)
    return next((kind for magic, kind in _MAGIC.items() if beginning.startswith(magic)), None)


_MAGIC = {
    b"\x1f\x8b": BackupType.TAR_GZ,  # RFC 1952
    b"BZh": BackupType.TAR_BZ2,
    b"\xfd7zXZ\0": BackupType.TAR_XZ,  # The .xz File Format, 2.1.1.1
    ZSTD: BackupType.TAR_ZST,
}
"""How the compressed forms begin."""

_LONGEST_MAGIC = max(map(len, _MAGIC))


class _Chunks:
    """
    Chunks of bytes as a stream.

    :param chunks: the chunks
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        """:returns: how many bytes were put into the buffer; none at the end"""
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def is_of_pool(stored: Stored) -> bool:
    """:returns: whether an archive is of a pool, according to its manifest"""
    return stored.manifest is not None and stored.manifest.provider == PROVIDER


def read_index(path: Path) -> Index:
    """
    Read only the index of an archive.

    :raises BadRecord: it is damaged, or breaks a rule
    :raises IntegrityError: it is no archive of a pool, or damaged
    :raises UnsupportedFormat: it is of a newer format
    """
    with opened(path) as stream:
        return Opened(stream).read_index()[0]


def read_levels(paths: Sequence[Path]) -> tuple[Index, ...]:
    """
    Read the indexes of levels that stand on each other.

    :param paths: of the archives, from level 0 on
    :raises IntegrityError: one of them is missing in the series, of another pool or series, or
        damaged
    """
    found: list[Index] = []
    for path in paths:
        index = read_index(path)
        require_next(found[-1] if found else None, index, path)
        found.append(index)
    return tuple(found)


def require_next(below: Index | None, index: Index, path: Path) -> None:
    """
    :param below: the index of the level below; None if there is none
    :raises IntegrityError: the archive does not stand on this level
    """
    wanted = below.level + 1 if below is not None else 0
    if index.level != wanted:
        problem = f"is level {index.level}, and level {wanted} should be there"
    elif below is not None and index.pool != below.pool:
        problem = f"is of another pool, {index.location}, than the level below"
    elif below is not None and index.base != below.checksum:
        problem = "stands on another level below than the one that is there"
    else:
        return
    hint = "give all levels of one series, from level 0 on"
    raise IntegrityError(f"{WHAT} {path} {problem}", path=str(path), hint=hint)


def verify_archive(
    path: Path, digest: Digest | None = None, progress: Progress = SILENT
) -> VerifiedPool:
    """
    Read an archive wholly, and check every byte, as :func:`check_archive`.

    :returns: what was read, and what is wrong
    """
    try:
        contents = check_archive(path, digest, progress)
        return VerifiedPool(path, contents.index.level, len(contents.files))
    except StatePoolError as error:
        return VerifiedPool(path, problem=error.message)


def check_archive(
    path: Path, digest: Digest | None = None, progress: Progress = SILENT
) -> Contents:
    """
    Read an archive wholly, and check every byte.

    :param digest: of the file, as its manifest says: it also shows damage that changes no byte of
        the tar in a compressed file
    :returns: what is in it
    :raises IntegrityError: it is damaged; the message names the member
    """
    with opened(path) as stream:
        archive = Opened(stream)
        contents = archive.read_contents()
        archive.read_data(progress=progress)
    if digest is not None:
        require_digest(path, digest)
    return contents


def require_digest(path: Path, digest: Digest) -> None:
    """
    Check the digest of a compressed archive: there, bytes can be other ones and mean the same. In a
    tar that is not compressed, every byte is compared anyway.

    :param digest: of the file, as its manifest says
    :raises DigestMismatch: it has another one
    """
    with about("read", Subject(str(path), path=str(path))):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _packed(descriptor) is None:
                return
            found = digest_of(descriptor)
        finally:
            os.close(descriptor)
    if found != digest:
        raise DigestMismatch(
            f"{WHAT} {path} is not the one that its manifest describes: its digest is {found},"
            f" not {digest}",
            expected=str(digest),
            actual=str(found),
            path=str(path),
            hint=HINT,
        )


class Opened:
    """
    An archive that is read once, from its beginning to its end.

    :param stream: the archive, of which nothing has been read
    """

    def __init__(self, stream: Input) -> None:
        self._stream = stream
        self.contents: Contents | None = None

    # -- what it is ----------------------------------------------------------------------------

    def read_index(self) -> tuple[Index, bytes]:
        """:returns: the index, and the content of its file"""
        stream = self._stream
        if bytes(stream.peek(BLOCK)) != MEMBER_DIRECTORY:
            raise IntegrityError(
                f"{stream.name} is not an archive of a pool",
                path=stream.name,
                hint="archives of trees are restored in the same way; bundles with: statepool"
                " import",
            )
        self._expect(layout.OURS, MEMBER_DIRECTORY)
        header = bytes(stream.peek(BLOCK))
        size = record_size(header)
        if size is None or not 0 < size <= MOST_INDEX:
            raise stream.damaged(f"has no index, but {told(header)}")
        head = self._member("its index", stream.read, BLOCK + size + len(padding(size)))
        content = head[BLOCK : BLOCK + size]
        index = Index.read(content, stream.name)
        path = index_path(index.level)
        if head != member(path, content):
            raise stream.damaged(f"has {told(header)} in the place of {path!r}")
        return index, content

    def read_contents(self) -> Contents:
        """:returns: what is in it, according to its index and its logs"""
        index, head = self.read_index()
        known = Contents(index, head, {}, {})
        for name, wanted in list(known.before_logs)[2:]:
            self._expect(name, wanted)
        logs: dict[str, bytes] = {}
        for log in index.logs:
            size = BLOCK + log.size + len(padding(log.size))
            found = self._member(log.path, self._stream.read, size)
            content = found[BLOCK : BLOCK + log.size]
            if found != member(log.path, content) or Digest.of_text(content) != log.digest:
                raise self._damaged(log.path)
            logs[log.name] = content
        self.contents = Contents.read(index, head, logs, self._stream.name)
        return self.contents

    # -- its data ------------------------------------------------------------------------------

    def read_data(self, place: DataPlace | None = None, progress: Progress = SILENT) -> None:
        """
        Read all the rest, and check it.

        :param place: gets the data of the states that it wants
        """
        contents = self.contents
        assert contents is not None, "the contents have been read"
        total = sum(manifest.size for manifest in contents.files)
        progress.begin(f"read {self._stream.name}", total)
        try:
            with checking(self._check) as check:
                for manifest in contents.files:
                    self._read_file(manifest, place, progress, check)
        finally:
            progress.end()
        for name, wanted in contents.after_data:
            self._expect(name, wanted)
        self._stream.finish()

    def _read_file(
        self,
        manifest: Manifest,
        place: DataPlace | None,
        progress: Progress,
        check: Check,
    ) -> None:
        digest = manifest.digest
        assert digest is not None
        name = layout.data(digest)
        self._expect(name, header_of(manifest))
        wanted = place if place is not None and place.wants(digest) else None
        if manifest.size <= PIECE:
            content = memoryview(bytearray(manifest.size))
            extents = manifest.extents or ((0, manifest.size),)
            for offset, length in extents:
                self._member(name, self._stream.fill, content[offset : offset + length])
            check(manifest, content)
            if wanted is not None:
                wanted.put(manifest, content)
            progress.advance(manifest.size)
        else:
            subject = Subject(f"{name} in {self._stream.name}", path=self._stream.name)
            reader = Streamed(self._stream, manifest, subject)
            read = (
                partial(wanted.copy, manifest, reader, progress)
                if wanted is not None
                else partial(
                    hash_read,
                    reader,
                    manifest.size,
                    algorithm=digest.algorithm,
                    progress=progress,
                )
            )
            self._check(manifest, self._member(name, read))
        self._expect(name, padding(manifest.data_size))

    def _check(self, manifest: Manifest, found: Digest) -> None:
        if found != manifest.digest:
            assert manifest.digest is not None
            where = f"in the member {layout.data(manifest.digest)} of {self._stream.name}"
            raise mismatched(manifest, found, where, path=self._stream.name, hint=HINT)

    # -- comparing -----------------------------------------------------------------------------

    def _expect(self, name: str, wanted: bytes) -> None:
        """
        Read the bytes that must come next.

        :param name: of the member that they belong to
        :raises IntegrityError: other bytes came
        """
        if self._member(name, self._stream.read, len(wanted)) != wanted:
            raise self._damaged(name)

    def _damaged(self, name: str) -> IntegrityError:
        return self._stream.damaged(f"is damaged in its member {name}")

    def _member(self, name: str, read: Callable[..., T], *arguments: object) -> T:
        """
        Read bytes of a member.

        :raises IntegrityError: it is cut short, or damaged; with the name of the member
        """
        try:
            return read(*arguments)
        except IntegrityError as error:
            message = f"{error.message}, in its member {name}"
            raise IntegrityError(message, path=error.path, hint=error.hint) from error


class DataPlace:
    """
    The directory that gets the data of a restored pool.

    :param tree: the pool
    :param wanted: the bytes that states need
    """

    def __init__(self, tree: Tree, wanted: Iterable[Digest]) -> None:
        self._data = Tree(f"{tree.root}/{layout.DATA}", held=tree.open(layout.DATA, _DIRECTORY))
        self._wanted = set(wanted)
        with self._data.open("", _DIRECTORY) as directory:
            self._list_mode = small_file_mode(os.fstat(directory).st_mode)
        self.bytes = 0

    @property
    def lacking(self) -> set[Digest]:
        """The bytes that have not come yet."""
        return self._wanted

    def wants(self, digest: Digest) -> bool:
        """:returns: whether these bytes are needed, and have not come yet"""
        return digest in self._wanted

    def put(self, manifest: Manifest, content: memoryview) -> None:
        """Write a small file."""
        with self._new(manifest) as descriptor, self._writing(manifest):
            for offset, length in manifest.extents or ((0, manifest.size),):
                _write(descriptor, content[offset : offset + length], offset)

    def copy(self, manifest: Manifest, reader: Streamed, progress: Progress) -> Digest:
        """
        Write a file while it is read, and the list of its pieces beside it.

        :returns: the digest of what was written
        """
        assert manifest.digest is not None
        pieces = Pieces()
        transfer = Transfer(
            manifest.size, manifest.digest.algorithm, progress=progress, pieces=pieces
        )
        with self._new(manifest) as descriptor:
            found = copy_read(reader, descriptor, transfer).digest
        if found == manifest.digest and layout.has_pieces(found, manifest.size):
            name = layout.list_of(found.file_name)
            with (
                self._writing(manifest),
                self._data.open(name, _NEW, self._list_mode) as descriptor,
            ):
                _write(descriptor, memoryview(bytes(pieces)), 0)
        return found

    @contextlib.contextmanager
    def _new(self, manifest: Manifest) -> Iterator[int]:
        digest = manifest.digest
        assert digest is not None
        with self._writing(manifest):
            opened = self._data.open(digest.file_name, _NEW, layout.READ_ONLY)
        with opened as descriptor:
            with self._writing(manifest):
                os.fchmod(descriptor, layout.READ_ONLY)
                os.ftruncate(descriptor, manifest.size)
            yield descriptor
        self._wanted.discard(digest)
        self.bytes += manifest.size

    def _writing(self, manifest: Manifest) -> AbstractContextManager[None]:
        subject = Subject(f"{manifest.id} in {self._data.root}", path=self._data.root)
        return translating("write", subject, needed=manifest.size)


_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL


def _write(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


# -- restoring -------------------------------------------------------------------------------------


def restore_pool(
    paths: Sequence[Path],
    to: Path,
    progress: Progress = SILENT,
    *,
    digests: Sequence[Digest] = (),
) -> RestoredPool:
    """
    Restore a pool from level 0 and the levels above it. It appears whole, with every byte checked
    and flushed, or not at all.

    :param paths: of the archives, from level 0 on
    :param to: the directory of the pool, absolute; it does not exist, or is empty
    :param digests: of the files, as their manifests say, if they are known
    :returns: what was restored
    :raises FileInTheWay: the directory is not empty, or a file
    :raises IntegrityError: a level is missing, altered, or of another pool
    :raises NoSpace: it does not fit
    """
    read_levels(paths)  # the short part of each is read first, so that little work is done in vain
    place = beside(to)
    _require_free(place, to)
    for path, digest in zip(paths, digests, strict=False):
        require_digest(path, digest)
    with contextlib.ExitStack() as stack:
        archives = [Opened(stack.enter_context(opened(path))) for path in paths]
        levels = [archive.read_contents() for archive in archives]
        folds = _folds(levels, paths[-1])
        building = Beneath(place.tree, f".{place.path[:128]}.{random_nonce()}.tmp")
        with about("make", Subject(str(to), path=str(to))):
            _make_directory(building)
        try:
            tree = _begin(building, levels, folds)
            data = DataPlace(tree, {digest for fold in folds.values() for digest in fold.digests})
            for archive in archives:
                archive.read_data(data, progress)
            if data.lacking:
                raise _lacking(paths[-1], min(data.lacking))
            _link_all(tree, folds)
            _settle(building, place, to)
        except OSError as error:
            if isinstance(error, StatePoolError):
                raise
            raise about_file(translated(error, "write", Subject(str(to), path=str(to)))) from error
        finally:
            building.tree.remove_all(building.path)
    states = sum(len(fold.states) for fold in folds.values())
    return RestoredPool(to, levels[-1].index.level, len(folds), states, data.bytes)


def _require_free(place: Beneath, to: Path) -> None:
    with about("look at", Subject(str(to), path=str(to))):
        found = place.stat()
        if found is None:
            return
        if stat.S_ISDIR(found.st_mode):
            with place.open(os.O_RDONLY | os.O_DIRECTORY) as directory:
                if not os.listdir(directory):
                    return
    raise FileInTheWay(
        f"{to} is there, and is not an empty directory",
        path=str(to),
        hint="name a directory that does not exist, or is empty",
    )


def _folds(levels: Sequence[Contents], path: Path) -> dict[str, Fold]:
    """
    :param path: of the last archive, for messages
    :returns: the states of each machine at the last level
    :raises BadRecord: the logs do not lead there, or bytes are missing in all levels
    """
    last = levels[-1].index
    there = {digest for level in levels for digest in level.index.data}
    folds: dict[str, Fold] = {}
    for machine, position in last.machines.items():
        parts = [level.parts[machine] for level in levels if machine in level.parts]
        fold = folds[machine] = fold_of(machine, parts, str(path))
        if (fold.number, fold.nonces.get(fold.number)) != (position.number, position.nonce):
            raise BadRecord(
                f"the levels up to {path} do not lead to record {position.number} of {machine}",
                object=machine,
                path=str(path),
                hint=HINT,
            )
        if lacking := fold.digests - there:
            raise _lacking(path, min(lacking))
    return folds


def _lacking(path: Path, digest: Digest) -> BadRecord:
    told = f"no level up to {path} has the bytes {digest}, which a state needs"
    return BadRecord(told, path=str(path), hint=HINT)


def _make_directory(place: Beneath) -> None:
    """Make a directory, with the permissions that this process gives to new ones."""
    above, name = place.tree.place(place.path)
    with above as directory:
        os.mkdir(name, 0o777, dir_fd=directory)


def _begin(building: Beneath, levels: Sequence[Contents], folds: Mapping[str, Fold]) -> Tree:
    """
    Make the logs of a pool, in its new directory.

    :returns: the directory
    """
    transport = LocalTransport(Location("file", str(building)))
    for path in (*layout.DIRECTORIES, *map(layout.log, folds)):
        transport.make_directory(path)
    transport.create(layout.POOL_FILE, levels[-1].index.pool.content, flush=False)
    for machine in folds:
        for path, content in _log_files(machine, levels).items():
            transport.create(path, content, flush=False)
    return transport.tree


def _log_files(machine: str, levels: Sequence[Contents]) -> dict[str, bytes]:
    """:returns: the files of the log of a machine: from its last checkpoint on, by their paths"""
    found: dict[str, bytes] = {}
    for level in levels:
        if machine in level.parts and level.parts[machine].checkpoint is not None:
            found.clear()
        found |= {
            log.path: level.logs[log.name] for log in level.index.logs if log.machine == machine
        }
    return found


def _link_all(tree: Tree, folds: Mapping[str, Fold]) -> None:
    """Make the view. No other process knows this directory, so each place is free."""
    made: set[str] = set()
    for fold in folds.values():
        for manifest in fold.states.values():
            if manifest.digest is None:
                continue
            path = layout.view(manifest.id)
            _make_directories(tree, path.rpartition("/")[0], made)
            tree.symlink(layout.view_target(manifest.id, manifest.digest), path)


def _make_directories(tree: Tree, path: str, made: set[str]) -> None:
    if path and path not in made:
        _make_directories(tree, path.rpartition("/")[0], made)
        with contextlib.suppress(FileExistsError):
            _make_directory(Beneath(tree, path))
        made.add(path)


def _settle(building: Beneath, place: Beneath, to: Path) -> None:
    """Flush all that was written, and give it its name."""
    with building.open(os.O_RDONLY | os.O_DIRECTORY) as directory:
        _flush_file_system(directory)
    try:
        building.tree.rename(building.path, place.path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise FileInTheWay(
            f"{to} was made by another process meanwhile",
            path=str(to),
            hint="name a directory that does not exist, or is empty",
        ) from error
    with place.tree.open("", os.O_RDONLY | os.O_DIRECTORY) as directory:
        os.fsync(directory)


def _flush_file_system(descriptor: int) -> None:
    """
    Flush all files of a file system (``syncfs(2)``): a pool can have hundreds of thousands, and to
    flush each of them takes longer than to write them.
    """
    import ctypes

    if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
