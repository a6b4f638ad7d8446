"""
Operations on the names of a pool on another host, by SFTP: looking, creating, linking, renaming and
removing.

The protocol has no way to open a file without following a symbolic link: so each file, and each
directory of the pool on the way to it, is looked at first. Only an account of that host can win a
race against this check. What was read is compared with its digest in any case.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from statepool.errors import FileExists, MissingFile, NoSpace, StatePoolError, TransportError
from statepool.model.location import Location
from statepool.model.settings import Settings
from statepool.transports import base
from statepool.transports.base import Entry, FileKind, Stat, Transport
from statepool.transports.failures import Subject, linked, not_regular, wrong_length
from statepool.transports.ssh import batches
from statepool.transports.ssh.channels import channels_of
from statepool.transports.ssh.connection import connection_to
from statepool.transports.ssh.packets import (
    FSYNC,
    HARDLINK,
    POSIX_RENAME,
    STATVFS,
    Answer,
    Attributes,
    Code,
    Flag,
    Garbled,
    Kind,
    Refused,
    attributes,
    attributes_in,
    extension,
    handle_in,
    names_in,
    numbers_in,
    string,
)
from statepool.transports.ssh.server import Server, explained, look_at
from statepool.transports.ssh.sftp import Sftp

INCOMING = ".statepool/incoming"
"""The directory of a pool for unfinished files."""

_OURS = ".statepool/"

_ATTEMPTS = 5
"""
How often creating a name is retried if the name existed, but does not exist when it is looked at.
"""

NEW = Flag.WRITE | Flag.CREATE | Flag.EXCLUSIVE

_PLAIN_FOR = 10.0
"""Seconds for which the result is cached that a directory is no symbolic link."""


class SSHFiles(Transport):
    """
    The part of :class:`~statepool.transports.ssh.transport.SSHTransport` without the bytes of
    states.

    :param location: with a host
    :param settings: how to connect, and how long to wait
    """

    def __init__(self, location: Location, settings: Settings | None = None) -> None:
        super().__init__(location)
        self._root = os.fsencode(location.path.rstrip("/"))
        self._plain: dict[str, float] = {}
        self._connection = connection_to(location, settings or Settings(), self)
        self._channels = channels_of(self._connection)
        self._server: tuple[int, Server] | None = None

    # -- looking -----------------------------------------------------------------------------------

    def scan(self, directory: str) -> list[Entry]:
        """List a directory. The pool's own directory may be behind a symbolic link."""
        return self.scan_many([directory])[0]

    def stat(self, path: str) -> Stat | None:
        """
        Look at a file. The result has no identity, which the protocol does not provide, and times
        in whole seconds.
        """
        return self.stat_many([path])[0]

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """:raises UnsafeImage: it is not a regular file"""
        with self._at("read", path) as sftp:
            (content,) = batches.read(
                sftp, [self._full(path)], self._look(sftp).limits, offset=offset, size=size
            )
        if content is None:
            raise self._missing("read", path)
        if content is batches.NOT_A_FILE:
            raise not_regular(self._subject(path))
        return content

    def readlink(self, path: str) -> str:
        with self._at("read", path) as sftp:
            found, target = sftp.ask_all(
                [(Kind.LSTAT, string(self._full(path))), (Kind.READLINK, string(self._full(path)))]
            )
            if isinstance(found, Answer) and not attributes_in(found).is_link:
                subject = self._subject(path)
                raise TransportError(
                    f"{subject.text} is not a symbolic link", pool=subject.pool, path=path
                )
            return os.fsdecode(names_in(granted(target))[0][0])

    def scan_many(self, directories: Sequence[str]) -> list[list[Entry]]:
        with self._at("list", *directories) as sftp:
            found = batches.scan(
                sftp,
                [self._full(directory) for directory in directories],
                follow=[not directory for directory in directories],
            )
        for directory, names in zip(directories, found, strict=True):
            if names is batches.NOT_A_DIRECTORY:
                raise TransportError(
                    f"cannot list {self._subject(directory).text}: it is not a directory",
                    pool=str(self.location),
                    path=directory,
                )
        return [[Entry(name, _kind(there)) for name, there in names] for names in found]

    def stat_many(self, paths: Sequence[str]) -> list[Stat | None]:
        with self._at("look at", *paths) as sftp:
            found = batches.look(sftp, [self._full(path) for path in paths])
        return [
            Stat(_kind(there), there.size, there.mtime * 10**9) if there is not None else None
            for there in found
        ]

    def read_many(self, paths: Sequence[str], size: int) -> list[bytes | None]:
        with self._at("read", *paths) as sftp:
            full = [self._full(path) for path in paths]
            try:
                found = batches.read(
                    sftp, full, self._look(sftp).limits, size=size, most=base.MOST_TOGETHER
                )
            except batches.TooMuch as error:
                raise base.too_much(self.location, paths[full.index(error.path)]) from error
        for path, content in zip(paths, found, strict=True):
            if content is batches.NOT_A_FILE:
                raise not_regular(self._subject(path))
        return found

    # -- names -------------------------------------------------------------------------------------

    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        """
        Create a file. If the server has no hard links, the file is created under its own name, and
        grows there: a reader can see it incomplete, for a moment.
        """
        with self._at("create", path, needed=len(data)) as sftp:
            if not self._look(sftp).has(HARDLINK):
                self._write_new(sftp, self._full(path), data, flush, path)
                return
            for attempt in range(1, _ATTEMPTS + 1):
                private = self._write_private(sftp, data, flush, path)
                link = extension(HARDLINK, string(private), string(self._full(path)))
                linked, there, _ = sftp.ask_all(
                    [link, (Kind.LSTAT, string(self._full(path))), (Kind.REMOVE, string(private))]
                )
                if self._is_made(linked, there, path, attempt):
                    return

    def link(self, source: str, target: str) -> None:
        """
        Give a file a second name. If the server has no hard links, a file of this pool is renamed
        instead. That suffices for files gathered in ``incoming``: no process looks for them there
        again.
        """
        with self._at("link", target, source) as sftp:
            old, new = self._full(source), self._full(target)
            request = extension(HARDLINK, string(old), string(new))
            if not self._look(sftp).has(HARDLINK):
                self._require_ours(source, target)
                if batches.look(sftp, [new])[0] is not None:
                    raise self._exists(target)
                request = (Kind.RENAME, string(old) + string(new))
            for attempt in range(1, _ATTEMPTS + 1):
                before, linked, after = sftp.ask_all(
                    [(Kind.LSTAT, string(old)), request, (Kind.LSTAT, string(new))]
                )
                if (
                    isinstance(linked, Refused)
                    and isinstance(before, Refused)
                    and before.code == Code.NO_SUCH_FILE
                ):
                    raise self._missing("link", source)
                if self._is_made(linked, after, target, attempt):
                    return

    def _is_made(
        self, made: Answer | Refused, there: Answer | Refused, path: str, attempt: int
    ) -> bool:
        """
        :param made: the answer to a request that creates a name
        :param there: what the server reported of that name directly afterwards
        :returns: whether the name was created; False if a retry may succeed: the name existed, and
            does not any more
        :raises FileExists: the name exists, which a server only reports as a failure
        """
        if isinstance(made, Answer):
            return True
        if made.code == Code.FAILURE and isinstance(there, Answer):
            raise self._exists(path) from made
        if made.code != Code.FAILURE or attempt == _ATTEMPTS:
            raise made
        return False

    def _require_ours(self, source: str, target: str) -> None:
        """
        Refuse a source that is not in ``incoming``: a rename can replace a link only if no process
        looks for the old name.
        """
        if not source.startswith(_OURS):
            subject = self._subject(target)
            raise TransportError(
                f"cannot link {source!r} to {subject.text}: the server makes no hard links",
                hint="do it on that host itself",
                pool=subject.pool,
                path=target,
            )

    def _exists(self, path: str) -> FileExists:
        return FileExists(
            f"cannot create {self._subject(path).text}: it exists",
            pool=str(self.location),
            path=path,
        )

    def rename(self, source: str, target: str) -> None:
        """
        Rename a file. If the server only has the plain rename of SFTP, an existing target is
        removed first.
        """
        with self._at("rename", target, source) as sftp:
            old, new = self._full(source), self._full(target)
            if not self._look(sftp).has(POSIX_RENAME):
                self._rename_plainly(sftp, source, target)
                return
            before, renamed, after = sftp.ask_all(
                [
                    (Kind.LSTAT, string(new)),
                    extension(POSIX_RENAME, string(old), string(new)),
                    (Kind.LSTAT, string(old)),
                ]
            )
            if isinstance(renamed, Refused):
                if isinstance(after, Refused) and after.code == Code.NO_SUCH_FILE:
                    raise self._missing("rename", source)
                raise renamed
            if isinstance(before, Answer) and isinstance(after, Answer):
                # rename(2) does nothing if both are names of one file. Here the old name is
                # removed, as in every other case.
                sftp.ask_all([(Kind.REMOVE, string(old))])

    def _rename_plainly(self, sftp: Sftp, source: str, target: str) -> None:
        request = (Kind.RENAME, string(self._full(source)) + string(self._full(target)))
        first = sftp.ask_all([request])[0]
        if isinstance(first, Answer):
            return
        there, gone = batches.look(sftp, [self._full(source), self._full(target)])
        if there is None:
            raise self._missing("rename", source)
        if gone is None or gone.is_directory:
            raise first
        sftp.ask_all([(Kind.REMOVE, string(self._full(target)))])
        sftp.ask(*request)

    def remove(self, path: str) -> bool:
        with self._at("remove", path) as sftp:
            answer = sftp.ask_all([(Kind.REMOVE, string(self._full(path)))])[0]
            if isinstance(answer, Refused) and answer.code == Code.NO_SUCH_FILE:
                return False
            granted(answer)
        return True

    def symlink(self, target: str, path: str) -> None:
        with self._at("make the symbolic link", path) as sftp:
            private = self._private_link(sftp, os.fsencode(target), path)
            try:
                self._replace(sftp, private, self._full(path))
            except BaseException:
                sftp.ask_all([(Kind.REMOVE, string(private))])
                raise

    def _private_link(self, sftp: Sftp, target: bytes, path: str) -> bytes:
        """:returns: a new symbolic link under a temporary name"""
        first, second = self._private(path)
        # The arguments are in the order of OpenSSH, which is not that of the protocol: so the
        # result is looked at.
        made, found = sftp.ask_all(
            [(Kind.SYMLINK, string(target) + string(first)), (Kind.READLINK, string(first))]
        )
        if isinstance(made, Refused) and made.code == Code.NO_SUCH_FILE and first != second:
            made, found = sftp.ask_all(
                [(Kind.SYMLINK, string(target) + string(second)), (Kind.READLINK, string(second))]
            )
            first = second
        granted(made)
        if names_in(granted(found))[0][0] != target:
            sftp.ask_all([(Kind.REMOVE, string(first))])
            subject = self._subject(path)
            raise TransportError(
                f"the server makes another symbolic link than it is told to: {subject.text}",
                pool=subject.pool,
                path=path,
            )
        return first

    def _replace(self, sftp: Sftp, private: bytes, full: bytes) -> None:
        if self._look(sftp).has(POSIX_RENAME):
            sftp.extended(POSIX_RENAME, string(private), string(full))
            return
        _, renamed = sftp.ask_all(
            [(Kind.REMOVE, string(full)), (Kind.RENAME, string(private) + string(full))]
        )
        granted(renamed)

    def make_directory(self, path: str) -> None:
        """
        Make a directory and its parents; the umask of that account applies only to the pool's own
        directory.
        """
        with self._at("make the directory", f"{path}/" if path else "") as sftp:
            made = batches.make_directories(sftp, self._root, path)
        if made is not None:
            subject = self._subject(path)
            raise FileExists(
                f"cannot make the directory {subject.text}: {made} is a file",
                pool=subject.pool,
                path=path,
            )

    def remove_directory(self, path: str) -> bool:
        with self._at("remove the directory", f"{path}/") as sftp:
            answer = sftp.ask_all([(Kind.RMDIR, string(self._full(path)))])[0]
            if isinstance(answer, Answer):
                return True
            if answer.code == Code.NO_SUCH_FILE or (
                answer.code == Code.FAILURE and batches.has_entries(sftp, self._full(path))
            ):
                return False
            raise answer

    def flush(self, directory: str) -> None:
        """
        Flush a directory. If the server has the extension for fsync, a directory can be opened as a
        file and flushed by it.
        """
        with self._at("flush the directory", f"{directory}/" if directory else "") as sftp:
            if not self._look(sftp).has(FSYNC):
                return
            with self._opened(sftp, self._full(directory), Flag.READ) as handle:
                sftp.extended(FSYNC, string(handle))

    # -- below -------------------------------------------------------------------------------------

    @contextmanager
    def _at(self, doing: str, *paths: str, needed: int = 0) -> Iterator[Sftp]:
        """
        Lend a client to this thread. A refusal of the server inside the block becomes an error of
        this package, unless the block handles it.

        :param paths: the paths concerned, the one that messages name first; if there are more than
            two, messages name none
        """
        subject = self._subject(paths[0].rstrip("/") if 0 < len(paths) <= 2 else "")
        with self._connection.translating(doing, subject):
            try:
                with self._channels.lent() as sftp:
                    self._refuse_links_above(sftp, paths)
                    yield sftp
            except Garbled as error:
                raise TransportError(
                    f"cannot {doing} {subject.text}: {error}", pool=subject.pool, path=subject.path
                ) from error
            except Refused as error:
                raise self._explained(error, doing, subject, needed) from error

    def _refuse_links_above(self, sftp: Sftp, paths: Sequence[str]) -> None:
        """
        Refuse paths in which a directory of the pool is a symbolic link, which the server would
        follow.

        SFTP has no better way than to look first: a link that another account of that host makes
        after that look is followed.
        """
        now = time.monotonic()
        above = {
            "/".join(parts[:count])
            for parts in (path.split("/") for path in paths)
            for count in range(1, len(parts))
        }
        unseen = sorted(
            path for path in above if now - self._plain.get(path, -_PLAIN_FOR) >= _PLAIN_FOR
        )
        for path, found in zip(
            unseen, batches.look(sftp, [self._full(path) for path in unseen]), strict=True
        ):
            if found is not None and found.is_link:
                raise linked(self._subject(path))
            if found is not None:
                self._plain[path] = now

    def _explained(
        self, refused: Refused, doing: str, subject: Subject, needed: int
    ) -> TransportError | NoSpace:
        """
        Translate a refusal. This is done after the channel was released: a thread that holds one
        channel and waits for a second may deadlock.
        """
        free = None
        if needed and refused.code == Code.FAILURE:
            # the refusal matters more than why the free space is unknown
            with suppress(StatePoolError):
                free = self.free_space()
        return explained(refused, doing, subject, needed=needed, free=free)

    def _full(self, path: str) -> bytes:
        return self._root + b"/" + os.fsencode(path) if path else self._root or b"/"

    def _seen(self, path: str) -> str:
        """:returns: the absolute path on the server, for a shell"""
        return f"{self.location.path.rstrip('/')}/{path}"

    def _missing(self, doing: str, path: str) -> MissingFile:
        return MissingFile(
            f"cannot {doing} {self._subject(path).text}: it is not there",
            pool=str(self.location),
            path=path,
        )

    def _look(self, sftp: Sftp) -> Server:
        """:returns: what is known of the server; it is asked once on each connection"""
        if self._server is None or self._server[0] != self._connection.epoch:
            self._server = (self._connection.epoch, look_at(sftp, self._root or b"/"))
        return self._server[1]

    def _free(self, sftp: Sftp) -> int | None:
        if not self._look(sftp).has(STATVFS):
            return None
        answer = sftp.ask_all([extension(STATVFS, string(self._root or b"/"))])[0]
        # The numbers are those of struct statvfs: the second is the size of a block, the fifth is
        # the number of blocks that this account may use.
        _, block, _, _, available = numbers_in(granted(answer), 5)
        return block * available

    @contextmanager
    def _opened(
        self, sftp: Sftp, full: bytes, flags: Flag, mode: int | None = None
    ) -> Iterator[bytes]:
        """:returns: the handle of a file, for the duration of a ``with`` block"""
        handle = handle_in(
            sftp.ask(
                Kind.OPEN, string(full) + int(flags).to_bytes(4, "big") + attributes(mode=mode)
            )
        )
        try:
            yield handle
        except BaseException:
            if sftp.is_idle:  # otherwise the channel is closed, and the handle with it
                sftp.forget(sftp.send((Kind.CLOSE, string(handle))))
            raise
        sftp.ask(Kind.CLOSE, string(handle))

    def _require_file(self, sftp: Sftp, path: str, size: int) -> None:
        found = batches.look(sftp, [self._full(path)])[0]
        if found is None:
            raise self._missing("read", path)
        if not found.is_file:
            raise not_regular(self._subject(path))
        if found.size != size:
            raise wrong_length(self._subject(path), size, found.size)

    def _private(self, path: str) -> list[bytes]:
        """
        :returns: temporary names, to be tried one after the other: a directory that is no pool has
            no directory for them
        """
        name = f".tmp-{os.urandom(10).hex()}"
        above = path.rpartition("/")[0]
        return [self._full(f"{INCOMING}/{name}"), self._full(f"{above}/{name}" if above else name)]

    def _write_private(self, sftp: Sftp, data: bytes, flush: bool, path: str) -> bytes:
        first, second = self._private(path)
        try:
            self._write_new(sftp, first, data, flush, path)
        except MissingFile:
            self._write_new(sftp, second, data, flush, path)
            return second
        return first

    def _write_new(self, sftp: Sftp, full: bytes, data: bytes, flush: bool, path: str) -> None:
        """Create a small file, with its content on stable storage."""
        server = self._look(sftp)
        mode = server.small_files if server.small_files is not None else 0o644
        opened, there = sftp.ask_all(
            [
                (Kind.OPEN, string(full) + int(NEW).to_bytes(4, "big") + attributes(mode=mode)),
                (Kind.LSTAT, string(full)),
            ]
        )
        if isinstance(opened, Refused) and opened.code == Code.NO_SUCH_FILE:
            raise self._missing("create", path) from opened
        self._is_made(opened, there, path, _ATTEMPTS)
        handle = string(handle_in(granted(opened)))
        requests = batches.writes(handle, data, server.limits)
        # The umask of that account must not matter: other accounts that may read the pool need this
        # file.
        if server.small_files is not None:
            requests.append((Kind.FSETSTAT, handle + attributes(mode=mode)))
        if flush and server.has(FSYNC):
            requests.append(extension(FSYNC, handle))
        answers = sftp.ask_all([*requests, (Kind.CLOSE, handle)])
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        if refused:
            sftp.ask_all([(Kind.REMOVE, string(full))])
            raise refused[0]


def granted(answer: Answer | Refused) -> Answer:
    """
    :returns: the answer
    :raises Refused: it is a refusal
    """
    if isinstance(answer, Refused):
        raise answer
    return answer


def _kind(found: Attributes) -> FileKind:
    if found.is_file:
        return FileKind.FILE
    if found.is_link:
        return FileKind.LINK
    return FileKind.DIRECTORY if found.is_directory else FileKind.OTHER
