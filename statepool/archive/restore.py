"""
Restoring of directories.

The levels are read in their order, and given to GNU tar. Each member is checked before GNU tar gets
it. What the lists of directories say is done before: files that had been deleted are deleted,
directories that had been renamed are renamed.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attrs import field, frozen

from statepool.archive.directory import ArchiveDirectory, Stored
from statepool.archive.external import Ended, Tar
from statepool.archive.lists import Lists, remove
from statepool.archive.names import ArchiveName
from statepool.archive.pool_reader import is_of_pool, restore_pool
from statepool.archive.scan import Entry, names_in, renames_in
from statepool.archive.verify import checked
from statepool.beneath import Tree
from statepool.errors import FileInTheWay, NotFound, UnsafeImage, UsageError
from statepool.model.progress import SILENT, Progress
from statepool.pools.log import random_nonce
from statepool.transports.failures import Subject, translate_os_errors


class UnsafeMember(UnsafeImage):
    """A member of an archive that could write outside the directory that is restored."""


@frozen
class Restored:
    """
    What was restored.

    :param target: the directory, or the file
    :param archives: what it was restored from, the lowest level first
    :param members: how many members of archives were used; of a pool, how many states it has
    :param warnings: messages of GNU tar
    """

    target: Path
    archives: tuple[ArchiveName, ...]
    members: int
    warnings: tuple[str, ...] = field(default=())


def choose(
    stored: dict[ArchiveName, Stored],
    *,
    level: int | None = None,
    keeping_id: str | None = None,
    until: float = math.inf,
) -> ArchiveName:
    """
    Choose the newest archive that fits.

    :param stored: all archives of a backup
    :param level: only this level, of what is kept under ``keeping_id``, or is not kept
    :param keeping_id: only what is kept under this id
    :param until: only archives that were made at this time or before, in seconds since the epoch
    :raises NotFound: there is none
    """
    found = [
        (one.manifest.created if one.manifest is not None else math.inf, name.level, name)
        for name, one in stored.items()
        if (level is None or name.level == level)
        and (name.keeping_id == keeping_id or (level is None and keeping_id is None))
    ]
    old_enough = [one for one in found if one[0] <= until]
    if not old_enough:
        what = "no archive of this backup is as old as that"
        if not found:
            what = "there is no such archive of this backup"
        raise NotFound(what, hint="statepool archive list shows which there are")
    return max(old_enough)[2]


class Restore:
    """
    The restoring of one archive, with the levels that it stands on.

    :param directory: the directory with the archives
    :param name: of the archive
    :param trusted: whether devices, and links that lead out of the directory, are restored
    :param progress: is told of the bytes of the tars
    :raises NotFound: the archive, or a level that it stands on, is missing
    :raises IntegrityError: the manifest of one of them is missing or altered
    """

    def __init__(
        self,
        directory: ArchiveDirectory,
        name: ArchiveName,
        *,
        trusted: bool = False,
        progress: Progress = SILENT,
    ) -> None:
        self._directory, self._name = directory, name
        self._trusted, self._progress = trusted, progress
        self.chain = directory.chain(name, directory.stored())

    def to(self, target: str | os.PathLike[str], *, overwrite: bool = False) -> Restored:
        """
        Restore all files into a directory.

        A directory that does not exist, or is empty, appears whole, or not at all. Over one with
        files all archives are read and checked first, and then once more while they are written.

        :param overwrite: whether the directory may have files. Those that the archive does not
            have are deleted from the directories that it has.
        :raises FileInTheWay: the directory has files
        :raises IntegrityError: an archive is damaged, or has unsafe members
        """
        path = Path(os.path.abspath(target))
        if is_of_pool(self.chain[-1]):
            return self._pool(path)
        with translate_os_errors("restore", Subject(str(path), path=str(path))):
            if _has_files(path):
                if not overwrite:
                    raise FileInTheWay(
                        f"{path} has files", path=str(path), hint="--overwrite restores over them"
                    )
                self._check_all()
                return self._restored(path, *self._extract(path, None))
            with _appearing(path) as temporary:
                done = self._extract(temporary, None)
            return self._restored(path, *done)

    def one(
        self, member: str, target: str | os.PathLike[str], *, overwrite: bool = False
    ) -> Restored:
        """
        Restore one file, or one directory with all below it.

        :param member: its path, relative to the root
        :param target: its new path
        :param overwrite: whether an existing file is replaced; a directory never is
        :raises NotFound: it was not there at this level
        :raises UsageError: the archive is of a pool
        """
        parts = [part for part in member.split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            raise UsageError(f"{member!r} is not a path below the root")
        if is_of_pool(self.chain[-1]):
            raise UsageError(
                f"{self._name} is of a pool, which is restored as a whole",
                hint="restore it, and get a state from there",
            )
        wanted = "/".join(parts)
        path = Path(os.path.abspath(target))
        with translate_os_errors("restore", Subject(str(path), path=str(path))):
            if os.path.lexists(path) and (not overwrite or path.is_dir()):
                raise FileInTheWay(f"{path} exists", path=str(path), hint="choose another name")
            with _scratch(path) as temporary:
                done = self._extract(temporary, None if self._renames else wanted)
                found = _found(temporary, parts)
                if found is None:
                    raise NotFound(
                        f"{wanted} is not in {self._name}", hint="see which levels have it"
                    )
                _move(found, path)
        return self._restored(path, *done)

    # -- parts -------------------------------------------------------------------------------------

    def _pool(self, path: Path) -> Restored:
        paths = [self._directory.path / one.file for one in self.chain]
        digests = [one.manifest.digest for one in self.chain if one.manifest is not None]
        done = restore_pool(paths, path, self._progress, digests=digests)
        return self._restored(path, done.states, ())

    @property
    def _renames(self) -> bool:
        return any(one.manifest is not None and one.manifest.renames for one in self.chain)

    def _restored(self, path: Path, members: int, warnings: Sequence[str]) -> Restored:
        names = tuple(one.name for one in self.chain)
        return Restored(path, names, members, tuple(warnings))

    def _check_all(self) -> None:
        guard = _Guard(str(self._name), trusted=self._trusted)
        for one in self.chain:
            with self._shown("check", one):
                for chunk in checked(self._directory, one, check=guard.allow):
                    self._progress.advance(len(chunk))

    @contextlib.contextmanager
    def _shown(self, doing: str, one: Stored) -> Iterator[None]:
        assert one.manifest is not None
        self._progress.begin(f"{doing} {one.name}", one.manifest.content_size)
        try:
            yield
        finally:
            self._progress.end()

    def _extract(self, into: Path, wanted: str | None) -> tuple[int, list[str]]:
        """
        :param wanted: only this path, with all below it; None for all
        :returns: how many members were used, and the messages of GNU tar
        """
        lists = Lists(Tree(into))
        guard = _Guard(str(self._name), trusted=self._trusted, wanted=wanted, lists=lists)
        messages: list[str] = []
        for one in self.chain:
            with Tar(self._arguments(into), data=True) as tar, self._shown("restore", one):
                try:
                    for chunk in checked(self._directory, one, check=guard.allow, emit=tar.write):
                        self._progress.advance(len(chunk))
                except Ended:
                    pass  # its exit code tells why
            tar.require_success(f"restore {one.name}")
            messages += tar.messages
        return guard.used, messages

    @staticmethod
    def _arguments(into: Path) -> list[str]:
        arguments = [
            "--extract",
            "--file=-",
            f"--directory={into}",
            "--preserve-permissions",
            "--numeric-owner",
            "--delay-directory-restore",
            "--quoting-style=escape",
            "--warning=no-timestamp",
            "--warning=no-unknown-keyword",
        ]
        arguments.append("--same-owner" if os.geteuid() == 0 else "--no-same-owner")
        return arguments


class _Guard:
    """
    Decides which members are restored.

    :param what: the name of the archive, for messages
    :param trusted: whether devices, and links that lead out, are allowed
    :param wanted: the only path that is wanted, with all below it and the directories above it
    :param lists: does what lists of directories say; None if nothing is written
    """

    def __init__(
        self,
        what: str,
        *,
        trusted: bool,
        wanted: str | None = None,
        lists: Lists | None = None,
    ) -> None:
        self._what, self._trusted, self._lists = what, trusted, lists
        self._wanted = os.fsencode(wanted) if wanted is not None else None
        self._links: set[bytes] = set()  # symbolic links that may be there
        self.used = 0

    def allow(self, entry: Entry) -> bool:
        """
        Check a member, and do what the list of a directory says.

        :returns: whether the member is wanted
        :raises UnsafeMember: it could write outside the directory
        """
        path = self._plain(entry.name, entry)
        for above in _above(path):
            if above in self._links:
                raise self._bad(entry, f"it would be written through the link {_shown(above)}")
        self._check_kind(entry, path)
        if entry.dumpdir is not None:
            self._check_list(entry)
        wanted = self._is_wanted(path)
        self.used += wanted
        if wanted and entry.dumpdir is not None and self._lists is not None:
            self._lists.apply(os.fsdecode(path), entry.dumpdir)
        return wanted

    def _check_kind(self, entry: Entry, path: bytes) -> None:
        match entry.kind:
            case "2":
                self._links.add(path)
                if not self._trusted and _leads_out(path, entry.link):
                    raise self._bad(
                        entry, f"it is a link that leads out: {_shown(entry.link)}", trust=True
                    )
            case "1":
                target = self._plain(entry.link, entry)
                self._links.discard(path)
                if target in self._links:
                    self._links.add(path)
                for above in _above(target):
                    if above in self._links:
                        raise self._bad(entry, "it is a hard link through a symbolic link")
            case "3" | "4":
                self._links.discard(path)
                if not self._trusted:
                    raise self._bad(entry, "it is a device", trust=True)
            case _:
                self._links.discard(path)

    def _check_list(self, entry: Entry) -> None:
        assert entry.dumpdir is not None
        for letter, name in names_in(entry.dumpdir):
            if letter in "YND":
                if b"/" in name or name in (b".", b".."):
                    raise self._bad(entry, "its list has a name that leads out")
            elif letter not in "RTX":
                raise self._bad(entry, f"its list has the unknown letter {letter!r}")
        self._follow(entry, renames_in(entry.dumpdir))

    def _follow(self, entry: Entry, renames: Mapping[bytes, bytes]) -> None:
        """Follow the renames of a list: the links that are there get other names."""
        paths = {self._plain(old, entry): self._plain(new, entry) for old, new in renames.items()}
        for old in paths:
            self._require_no_link(old, entry)
        self._links = {self._renamed(link, paths) for link in self._links}
        for new in paths.values():
            self._require_no_link(new, entry)
        if b"" in {*paths, *paths.values()}:
            raise self._bad(entry, "its list renames the directory itself")

    def _require_no_link(self, path: bytes, entry: Entry) -> None:
        if any(above in self._links for above in _above(path)):
            raise self._bad(entry, f"its list renames {_shown(path)}, which leads through a link")

    @staticmethod
    def _renamed(link: bytes, paths: Mapping[bytes, bytes]) -> bytes:
        for above in sorted(_above(link), key=len, reverse=True):
            if above in paths:
                return paths[above] + link[len(above) :]
        return link

    def _is_wanted(self, path: bytes) -> bool:
        wanted = self._wanted
        return (
            wanted is None
            or path in (b"", wanted)
            or path.startswith(wanted + b"/")
            or wanted.startswith(path + b"/")
        )

    def _plain(self, name: bytes, entry: Entry) -> bytes:
        parts = name.split(b"/")
        if name.startswith(b"/"):
            raise self._bad(entry, "its path is absolute")
        if b".." in parts:
            raise self._bad(entry, "its path has '..'")
        return b"/".join(part for part in parts if part not in (b"", b"."))

    def _bad(self, entry: Entry, why: str, *, trust: bool = False) -> UnsafeMember:
        hint = "nothing of it was restored: find out who made this archive"
        if trust:
            hint = "if you trust who made this archive, --trusted restores it"
        return UnsafeMember(
            f"the member {_shown(entry.name)} of {self._what} is not restored: {why}",
            check="member",
            hint=hint,
        )


def _shown(name: bytes) -> str:
    return os.fsdecode(name).encode("utf-8", "backslashreplace").decode()


def _above(path: bytes) -> Iterator[bytes]:
    position = path.find(b"/")
    while position >= 0:
        yield path[:position]
        position = path.find(b"/", position + 1)


def _leads_out(path: bytes, link: bytes) -> bool:
    """:returns: whether a link, followed step by step from its directory, leaves the root"""
    if link.startswith(b"/"):
        return True
    depth = path.count(b"/")
    for part in link.split(b"/"):
        if part == b"..":
            depth -= 1
            if depth < 0:
                return True
        elif part not in (b"", b"."):
            depth += 1
    return False


def _has_files(path: Path) -> bool:
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is not None
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Yield a new directory beside a path, which is removed at the end of a ``with`` block."""
    temporary = path.parent / f".{path.name[:128]}.{random_nonce()}.tmp"
    os.mkdir(temporary, 0o700)
    try:
        yield temporary
    finally:
        with Tree(path.parent).open("", os.O_RDONLY | os.O_DIRECTORY) as above:
            remove(above, temporary.name)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Yield a new directory, which gets its name at the end of a ``with`` block."""
    with _scratch(path) as above:
        temporary = above / "tree"
        os.mkdir(temporary)
        yield temporary
        # replaces an empty directory, and fails if it is not empty any more
        _move(temporary, path)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(path: Path, target: Path) -> None:
    """Give a file or a directory its name, after all that was restored is on stable storage."""
    os.sync()  # one call for all files
    status = os.lstat(path)
    is_directory = stat.S_ISDIR(status.st_mode)
    if is_directory:  # a directory that forbids writing cannot be moved to another one
        os.chmod(path, stat.S_IMODE(status.st_mode) | stat.S_IRWXU)
    os.rename(path, target)
    if is_directory:
        os.chmod(target, stat.S_IMODE(status.st_mode))
    _flush_directory(target.parent)


def _found(top: Path, parts: Sequence[str]) -> Path | None:
    """:returns: a file that was restored; None if it is not there, or behind a link"""
    path = top
    for part in parts[:-1]:
        path /= part
        if path.is_symlink() or not path.is_dir():
            return None
        os.chmod(path, stat.S_IRWXU)
    path /= parts[-1]
    return path if os.path.lexists(path) else None
