"""
Transports that have the primitives only: all else is what the face of transports makes of them.
"""

from __future__ import annotations

import threading

from statepool.errors import FileExists, MissingFile
from statepool.model.location import Location
from statepool.transports.base import Entry, FileKind, Stat, Transport


class Shelf(Transport):
    """
    Files that can only be looked at, as those of a web server that somebody else fills.

    :param files: what is there, by its path
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(Location("shelf", "/pool"))
        self.files = files

    def scan(self, directory: str) -> list[Entry]:
        start = f"{directory}/" if directory else ""
        below = [
            path.removeprefix(start).partition("/")
            for path in list(self.files)
            if path.startswith(start)
        ]
        return [
            Entry(name, kind)
            for name, kind in {
                name: FileKind.DIRECTORY if slash else FileKind.FILE for name, slash, _ in below
            }.items()
        ]

    def stat(self, path: str) -> Stat | None:
        data = self.files.get(path)
        return Stat(FileKind.FILE, len(data), 1) if data is not None else None

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        data = self.files.get(path)
        if data is None:
            raise MissingFile(
                f"cannot read {path!r} in {self.location}: it is not there",
                pool=str(self.location),
                path=path,
            )
        return data[offset : None if size is None else offset + size]


class Store(Shelf):
    """Files that can be made and removed, too: all that an object store can do."""

    def __init__(self) -> None:
        super().__init__({})
        self._lock = threading.Lock()

    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        with self._lock:
            if path in self.files:
                raise FileExists(
                    f"cannot create {path!r} in {self.location}: it exists",
                    pool=str(self.location),
                    path=path,
                )
            self.files[path] = data

    def remove(self, path: str) -> bool:
        return self.files.pop(path, None) is not None
