"""The archive of a plain directory: an id is the path of a file in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from statepool import (
    AccessDenied,
    ConfigError,
    LocalTransport,
    Location,
    NotFound,
    StatePoolError,
    TransportError,
)
from statepool.carts.archives import Archive, Context, Part, Status, Wanted, check_plain
from statepool.carts.sinks import Sink


class DirectoryArchive(Archive):
    """
    An archive of files of this host. No symbolic link beneath the directory is followed, so no id
    leads out of it.

    :param root: the directory, absolute
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._files = LocalTransport(Location("file", root))

    @classmethod
    def open(cls, options: Mapping[str, object], context: Context) -> DirectoryArchive:
        """Open the archive; the option ``path`` names the directory."""
        path = options.get("path")
        if set(options) != {"path"} or not isinstance(path, str) or not os.path.isabs(path):
            raise ConfigError(
                "a directory has one option, its absolute path", hint='write: path = "/srv/files"'
            )
        return cls(path)

    def check(self, wanted: Wanted) -> None:
        check_plain(wanted.id, "the id")

    def stage(self, wanted: Wanted, advance: Callable[[int], None]) -> None:
        """
        Check that the file exists; nothing else is needed.

        :raises TransportError: the directory does not exist, for example because it is not mounted
        """
        if not os.path.isdir(self._root):
            raise TransportError(
                f"the archive {self._root} is not there",
                hint="is its file system mounted?",
                transient=True,
            )
        self.status(wanted)

    def status(self, wanted: Wanted) -> Status:
        with self._open(wanted) as descriptor:
            found = os.fstat(descriptor)
        return Status(near=True, parts=(Part(wanted.path, found.st_size, found.st_mtime),))

    def pull(self, wanted: Wanted, part: Part, sink: Sink) -> None:
        with self._open(wanted) as source:
            sink.take(source)

    def _open(self, wanted: Wanted) -> AbstractContextManager[int]:
        try:
            opened = self._files.beneath(wanted.id).open(os.O_RDONLY | os.O_NONBLOCK)
        except PermissionError as error:
            raise AccessDenied(
                f"{wanted.id} in {self._root} may not be read", hint="change its permissions"
            ) from error
        except OSError as error:
            raise self._missing(wanted, os.strerror(error.errno or 0)) from error
        if not stat.S_ISREG(os.fstat(opened.number).st_mode):
            opened.close()
            raise self._missing(wanted, "Not a regular file")
        return opened

    def _missing(self, wanted: Wanted, reason: str) -> StatePoolError:
        return NotFound(
            f"there is no file {wanted.id} in {self._root}: {reason}",
            path=wanted.id,
            hint="correct the id, or put the file there",
        )
