"""
The view: the states under their names, for people, for qemu-img and for other tools, as relative
symbolic links to their bytes.

It is derived from the log. We read it only to find the files that other tools put in its places:
unmanaged files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial

from attrs import frozen

from statepool.errors import AccessDenied, InvalidName, MissingFile, TransportError
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.names import ROOT, ROOT_STATES, check_name, check_state_name, is_name
from statepool.pools import layout
from statepool.pools.fold import Fold
from statepool.pools.talks import VAIN
from statepool.transports.base import Entry, FileKind, Stat, Transfer, Transport

_ATTEMPTS = 100
"""
How often a name whose directory vanished is made again: each time, another writer removed a state
at this moment.
"""


Identities = Callable[[], set[tuple[int, int]]]
"""A function that returns the identities of all files in ``data/``."""

LOST_AND_FOUND = "lost+found"
"""
A directory that a file system makes for itself, for its owner only. Where a file system is mounted,
it is no machine and no image.
"""


@frozen
class Unmanaged:
    """
    A file of another tool in a place of the view.

    :param id: the state that it represents
    :param stat: the status of the file
    """

    id: StateId
    stat: Stat


@frozen
class Misnamed:
    """
    A file of another tool that would be a state if its name were valid.

    :param object: what it would be a state of
    :param state: the name that it would have
    :param error: why the name is not valid
    """

    object: str
    state: str
    error: InvalidName


class View:
    """
    The view of a pool.

    :param transport: reaches the pool
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._hashed: dict[tuple[str, Stat], Digest] = {}

    def update(self, ids: Iterable[StateId], fold: Callable[[], Fold]) -> None:
        """
        Bring some places of the view up to date.

        :param ids: the states whose places to look at
        :param fold: returns the states; called again until nothing changed meanwhile, since another
            writer may update the same places with older knowledge
        """
        if not self._transport.capabilities.symlinks:
            return
        wanted = [state for state in ids if state.kind is not Kind.MACHINE]
        for _ in range(VAIN):
            now = fold()
            identities = cache(self._identities)  # looked up once, and only if a file needs it
            for state in wanted:
                self._update(state, now.states.get(state), identities)
            if fold().number == now.number:
                return

    def _update(self, state: StateId, manifest: Manifest | None, identities: Identities) -> None:
        path = layout.view(state)
        found = self._transport.stat(path)
        if manifest is None or manifest.digest is None:
            if found is not None and self._is_ours(path, found, identities):
                self._transport.remove(path)
                self._remove_empty(path.rpartition("/")[0])
            return
        target = layout.view_target(state, manifest.digest)
        is_stale = (
            found is not None
            and self._is_ours(path, found, identities)
            and not self._shows(path, found, manifest, target)
        )
        if found is None or is_stale or self._is_copy(path, found, manifest):
            self._make(path, target)

    def _make(self, path: str, target: str) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._transport.make_directory(path.rpartition("/")[0])
                self._transport.symlink(target, path)
                return
            except MissingFile:
                # Another process removed the last other state, and the directory with it.
                if attempt == _ATTEMPTS:
                    raise
            except TransportError:
                if self._transport.capabilities.symlinks:
                    raise
                self._remove_empty(path.rpartition("/")[0])
                return  # the file system has just refused symbolic links

    def _remove_empty(self, directory: str) -> None:
        while directory and self._transport.remove_directory(directory):
            directory = directory.rpartition("/")[0]

    def _is_ours(self, path: str, found: Stat, identities: Identities) -> bool:
        """
        Return whether the file in a place of the view is a link of ours, or an adopted file: a
        second name of bytes of ours.
        """
        if found.kind is FileKind.LINK:
            try:
                return layout.is_view_target(self._transport.readlink(path))
            except MissingFile:
                return False
            except TransportError:
                if self._transport.capabilities.symlinks:
                    raise
                return False  # this transport cannot read links; a host that can maintains them
        return (
            found.kind is FileKind.FILE
            and found.identity is not None
            and found.identity in identities()
        )

    def _is_copy(self, path: str, found: Stat, manifest: Manifest | None) -> bool:
        """
        Return whether the file in a place of the view is a copy of our link: a program has copied
        the pool and followed links (``scp -r``, ``rsync -L``).

        :param manifest: of the state, from the log; only a file with exactly these bytes is a copy,
            and only if ``data/`` has them, too
        """
        if (
            manifest is None
            or manifest.digest is None
            or found.kind is not FileKind.FILE
            or found.size != manifest.size
        ):
            return False
        data = self._transport.stat(layout.data(manifest.digest))
        if data is None or (found.identity is not None and data.identity == found.identity):
            return False
        if (path, found) not in self._hashed:
            self._hashed[path, found] = self._transport.digest(
                path, Transfer(found.size, manifest.digest.algorithm)
            )
        return self._hashed[path, found] == manifest.digest

    def reclaim(self, manifests: Iterable[Manifest]) -> None:
        """
        Remove copies of our links before the log forgets them: later they would count as files of
        another tool, and so as states.

        :param manifests: of the states that are about to be removed or replaced
        """
        for manifest in manifests:
            path = layout.view(manifest.id)
            found = self._transport.stat(path)
            if found is not None and self._is_copy(path, found, manifest):
                self._transport.remove(path)
                self._remove_empty(path.rpartition("/")[0])

    def _shows(self, path: str, found: Stat, manifest: Manifest, target: str) -> bool:
        assert manifest.digest is not None
        if found.kind is FileKind.LINK:
            try:
                return self._transport.readlink(path) == target
            except MissingFile:
                return False
        data = self._transport.stat(layout.data(manifest.digest))
        return data is not None and data.identity == found.identity

    def _identities(self) -> set[tuple[int, int]]:
        stats = self._transport.stat_many(
            [f"{layout.DATA}/{entry.name}" for entry in self._transport.scan(layout.DATA)]
        )
        return {stat.identity for stat in stats if stat is not None and stat.identity is not None}

    def is_free(self, state: StateId, known: Manifest | None = None) -> bool:
        """
        :param known: the manifest of the state, from the log
        :returns: whether no file of another tool is in the place of a state
        """
        path = layout.view(state)
        found = self._transport.stat(path)
        if (
            found is None
            or self._is_ours(path, found, self._identities)
            or self._is_copy(path, found, known)
        ):
            return True
        return found.kind is FileKind.LINK and not self._transport.capabilities.symlinks

    # -- files of other tools ----------------------------------------------------------------------

    def machines(self) -> list[str]:
        """:returns: the machines that have a directory in the view"""
        return [
            entry.name
            for entry in sorted(self._transport.scan(""), key=lambda entry: entry.name)
            if _is_place(entry)
        ]

    def unmanaged(self, machine: str, fold: Fold) -> list[Unmanaged]:
        """
        :param fold: the fold of the machine
        :returns: the files in places of the view that the log does not know, and that are not left
            over from a removal
        :raises AccessDenied: this account may not list a directory
        """
        found, closed = self.all_unmanaged({machine: fold})
        if closed:
            raise closed[0]
        return found[machine]

    def all_unmanaged(
        self, folds: Mapping[str, Fold]
    ) -> tuple[dict[str, list[Unmanaged]], list[AccessDenied]]:
        """
        Find the unmanaged files of many machines, as :meth:`unmanaged`, in a number of round trips
        that does not grow with the number of machines.

        :param folds: the folds of the machines, by their ids
        :returns: the files by machine, and an error for each directory that this account may not
            list. So such a directory does not hide the others.
        """
        places, closed = self._places(folds, {FileKind.FILE})
        stats = self._transport.stat_many([layout.view(state) for state in places])
        candidates = [
            Unmanaged(state, stat)
            for state, stat in zip(places, stats, strict=True)
            if stat is not None and stat.kind is FileKind.FILE
        ]
        known = self._identities() if candidates else set()
        found: dict[str, list[Unmanaged]] = {machine: [] for machine in folds}
        for candidate in sorted(candidates, key=lambda candidate: candidate.id):
            if candidate.stat.identity is None or candidate.stat.identity not in known:
                found[candidate.id.machine].append(candidate)
        return found, closed

    def misnamed(self) -> list[Misnamed]:
        """
        :returns: the image files in places of the view that are no states, since a state, an image
            or a machine cannot have such a name
        """
        machines = _directories(self._transport.scan(""))
        images: list[tuple[str, str]] = []
        found: list[Misnamed] = []
        unseen: list[AccessDenied] = []  # reported by the search for unmanaged files
        for machine, entries in zip(machines, self._scan_many(machines, unseen), strict=True):
            images += [(machine, image) for image in _directories(entries)]
            found += [
                Misnamed(f"{machine}/{name}", ROOT, error)
                for name, error in _refused(entries, partial(_check_image, machine))
            ]
        objects = [f"{machine}/{image}" for machine, image in images]
        for (machine, image), entries in zip(images, self._scan_many(objects, unseen), strict=True):
            found += [
                Misnamed(f"{machine}/{image}", name, error)
                for name, error in _refused(entries, partial(_check_state, machine, image))
            ]
        return found

    def leftovers(self, machine: str, fold: Fold) -> list[StateId]:
        """
        :returns: the places with a link or file of ours that the log does not know any more
        :raises AccessDenied: this account may not list a directory
        """
        places, closed = self._places({machine: fold}, {FileKind.FILE, FileKind.LINK})
        if closed:
            raise closed[0]
        identities = cache(self._identities)
        stats = self._transport.stat_many([layout.view(state) for state in places])
        return [
            state
            for state, stat in zip(places, stats, strict=True)
            if stat is not None and self._is_ours(layout.view(state), stat, identities)
        ]

    def _places(
        self, folds: Mapping[str, Fold], kinds: Collection[FileKind]
    ) -> tuple[list[StateId], list[AccessDenied]]:
        """
        Return every entry of these kinds in the machines' directories whose name can be that of a
        state, but of none that the log knows; and the errors of directories that are closed to this
        account.
        """
        machines = list(folds)
        places: list[StateId] = []
        images: list[str] = []
        closed: list[AccessDenied] = []
        for machine, entries in zip(machines, self._scan_many(machines, closed), strict=True):
            for entry in entries:
                if _is_place(entry):
                    images.append(f"{machine}/{entry.name}")
                elif entry.kind in kinds:
                    if (name := _stem(entry, layout.IMAGE_SUFFIX)) is not None:
                        places.append(StateId(f"{machine}/{name}", ROOT))
                    elif (name := _stem(entry, layout.RAM_SUFFIX)) is not None:
                        places.append(StateId(machine, name, Kind.RAM))
        for image, entries in zip(images, self._scan_many(images, closed), strict=True):
            names = [_stem(entry, layout.IMAGE_SUFFIX) for entry in entries if entry.kind in kinds]
            places += [
                StateId(image, name)
                for name in names
                if name is not None and name not in ROOT_STATES
            ]
        return [state for state in places if state not in folds[state.machine].states], closed

    def _scan_many(
        self, directories: Sequence[str], closed: list[AccessDenied]
    ) -> list[list[Entry]]:
        """
        :returns: the entries of the directories; empty for a directory that this account may not
            list, whose error is added to ``closed``
        """
        try:
            return self._transport.scan_many(directories)
        except AccessDenied as error:
            if len(directories) > 1:
                return [
                    entries
                    for directory in directories
                    for entries in self._scan_many([directory], closed)
                ]
            closed.append(error)
            return [[]]


def _is_place(entry: Entry) -> bool:
    """Return whether an entry can be the directory of a machine, or of an image."""
    return entry.kind is FileKind.DIRECTORY and is_name(entry.name) and entry.name != LOST_AND_FOUND


def _directories(entries: Iterable[Entry]) -> list[str]:
    """
    Return the names of directories that a user may have meant for machines or images, in order.
    """
    names = sorted(entry.name for entry in entries if entry.kind is FileKind.DIRECTORY)
    return [name for name in names if not name.startswith(".") and name != LOST_AND_FOUND]


def _check_image(machine: str, image: str) -> None:
    check_name(machine, "a machine")
    check_name(image, "an image")


def _check_state(machine: str, image: str, state: str) -> None:
    _check_image(machine, image)
    check_state_name(state, root=False)


def _stem(entry: Entry, suffix: str) -> str | None:
    name = entry.name.removesuffix(suffix)
    return name if name != entry.name and is_name(name) else None


def _refused(
    entries: Iterable[Entry], check: Callable[[str], object]
) -> Iterator[tuple[str, InvalidName]]:
    """Yield the names of image files that a check refuses, without their ending, and the errors."""
    for entry in sorted(entries, key=lambda entry: entry.name):
        name = entry.name.removesuffix(layout.IMAGE_SUFFIX)
        if entry.kind is FileKind.FILE and name != entry.name:
            try:
                check(name)
            except InvalidName as error:
                yield name, error
