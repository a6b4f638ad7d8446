"""
The chains that back working images: for each chain a directory of symbolic links named after its
states, and records of the working images that use it.

QEMU looks for a sibling backing file in the directory of the name that it was given, not of the
target of a link. So such a directory works as a chain, and two versions of one name can exist side
by side.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from attrs import evolve, frozen

from statepool.beneath import Beneath, Tree, beside
from statepool.errors import BadRecord, StatePoolError
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.pools import layout
from statepool.pools.json_files import (
    make_directory,
    names_in,
    read_json,
    unfinished_in,
    write_json,
)
from statepool.pools.log import random_nonce
from statepool.pools.writer import Writer
from statepool.qcow2.files import refusal
from statepool.qcow2.header import read_header_file
from statepool.qcow2.opened import is_open
from statepool.transports.failures import SYMLINKS, Subject, translated

GRACE = 7 * 24 * 3600
"""
How long a chain is kept for a working image that has vanished, in seconds: it may have been moved.
"""

_SUFFIX = ".qcow2"
_USES = ".uses"
_RECORD = ".json"
_ASIDE = ".gone-"
_LINKS_TO = "../../data/"

CHAINS = f"{layout.OURS}/chains"
"""
The directory of a cache for the chains that back working images; no other pool has such a
directory.
"""


@frozen
class Standing:
    """
    The chain that backs a working image.

    :param key: of the chain
    :param digest: of the chain's tip
    :param state: the tip's name
    """

    key: Digest
    digest: Digest
    state: str


def key_of(chain: Sequence[Manifest]) -> Digest:
    """
    :param chain: tip first
    :returns: the name of the directory of a chain. It depends on all names and digests of the
        chain. The tip's digest alone would not be enough: an unwritten child has the same bytes
        over any parent.
    """
    return Digest.of_text("".join(f"{manifest.state} {manifest.digest}\n" for manifest in chain))


@frozen
class Use:
    """
    The use of a chain by a working image, according to its record.

    :param record: the file of the record
    :param working: the path of the image, absolute
    :param missing_since: when it was noticed that the image is missing, in seconds since the epoch
    :param writer: the process that made the image, if that is known
    :param is_ours: whether this account has written the record. Records of other accounts are
        heeded, but the files that they name are left alone.
    """

    record: Beneath
    working: str
    missing_since: float | None
    writer: Writer | None = None
    is_ours: bool = True

    @property
    def temporary(self) -> Path:
        """The path of the image while it is being written."""
        return temporary_name(Path(self.working), self.record)


class Chains:
    """
    The chains of a cache.

    :param tree: the cache
    :param file: finds the file that holds some bytes, which can be in another pool
    :param changes: whether records may be written: the cache of a neighbour is only read
    """

    def __init__(
        self, tree: Tree, file: Callable[[Digest], Beneath | None], *, changes: bool = True
    ) -> None:
        self._tree = tree
        self._file = file
        self._changes = changes
        self._recovered = False

    def path(self, chain: Sequence[Manifest]) -> Path:
        """:returns: the backing file of a working image on a chain, which is given tip first"""
        return self.directory_of(key_of(chain)) / chain[0].file_name

    def directory_of(self, key: Digest) -> Path:
        """
        :returns: the directory of the links of a chain, for messages and for programs that only
            know paths
        """
        return Path(self._tree.root, _of(key))

    def has(self, key: Digest) -> bool:
        """:returns: whether this chain has a directory"""
        return Beneath(self._tree, _of(key)).stat() is not None

    def parse(self, backing: str) -> Standing | None:
        """
        :returns: the chain to which a backing name leads; None if it leads elsewhere, or the chain
            was removed
        """
        directory, name = os.path.split(backing)
        # by name, as QEMU looks for it; nothing is opened
        parent, last = os.path.split(os.path.realpath(directory))
        key = Digest.from_file_name(last)
        if (
            key is None
            or not name.endswith(_SUFFIX)
            or parent != os.path.realpath(Path(self._tree.root, CHAINS))
        ):
            return None
        tip = self._links(key).get(name)
        return Standing(key, tip, name.removesuffix(_SUFFIX)) if tip is not None else None

    def leads_here(self, backing: str) -> bool:
        """:returns: whether an absolute backing name leads to an existing chain"""
        return self.parse(backing) is not None

    def _links(self, key: Digest) -> dict[str, Digest]:
        """:returns: the digests to which the names of a chain lead"""
        try:
            opened = self._tree.open(_of(key), os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return {}
        with opened as directory:
            targets = {
                name: self._target(name, directory)
                for name in sorted(os.listdir(directory))
                if name != _USES
            }
        return {name: digest for name, digest in targets.items() if digest is not None}

    def _target(self, path: str, directory: int | None = None) -> Digest | None:
        """
        :param directory: the directory to which ``path`` is relative; by default, that of the cache
        :returns: the digest to which a link of ours leads; None if it is no such link, or was
            removed
        """
        try:
            text = (
                self._tree.readlink(path)
                if directory is None
                else os.readlink(path, dir_fd=directory)
            )
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINVAL):
                return None
            raise translated(
                error,
                "read the symbolic link",
                Subject(str(Beneath(self._tree, path))),
                lacks=SYMLINKS,
            ) from error
        return (
            Digest.from_file_name(text.removeprefix(_LINKS_TO))
            if text.startswith(_LINKS_TO)
            else None
        )

    def _is_copy(self, path: str) -> bool:
        """
        Return whether there is a file of this account in the place of a link: a program has copied
        the cache and followed links.
        """
        found = Beneath(self._tree, path).stat()
        return found is not None and stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()

    def prepare(self, chain: Sequence[Manifest]) -> Path:
        """
        Make the directory of a chain with its links, where anything is missing.

        :param chain: tip first
        :returns: the path of the tip; the names of the states that back it are beside it
        """
        key = key_of(chain)
        there = self._links(key)
        if not there or Beneath(self._tree, f"{_of(key)}/{_USES}").stat() is None:
            make_directory(self._tree, f"{_of(key)}/{_USES}")
        for manifest in reversed(chain):
            assert manifest.digest is not None
            if there.get(manifest.file_name) == manifest.digest:
                continue
            path = f"{_of(key)}/{manifest.file_name}"
            try:
                self._tree.symlink(_LINKS_TO + manifest.digest.file_name, path)
            except FileExistsError as error:
                if self._is_copy(path):
                    self._tree.remove(path)
                    self._tree.symlink(_LINKS_TO + manifest.digest.file_name, path)
                    continue
                # The key depends on all names and digests of the chain, so it is the same link,
                # unless another account put another link there. If the link was just removed, the
                # caller notices that afterwards.
                if (
                    self._target(path) != manifest.digest
                    and Beneath(self._tree, path).stat() is not None
                    and self._target(path) != manifest.digest
                ):
                    raise refusal(
                        "chain-link",
                        str(Beneath(self._tree, path)),
                        f"it does not lead to {manifest.digest.file_name}",
                        hint=(
                            "another account that can write to the cache has put it there:"
                            " remove it"
                        ),
                    ) from error
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                raise translated(
                    error,
                    "make the symbolic link",
                    Subject(str(Beneath(self._tree, path))),
                    lacks=SYMLINKS,
                ) from error
        return self.directory_of(key) / chain[0].file_name

    # -- uses --------------------------------------------------------------------------------------

    def use(
        self,
        chain: Sequence[Manifest],
        working: Path,
        *,
        flush: bool = False,
        record: Beneath | None = None,
    ) -> Beneath:
        """
        Record that a working image is about to be made on a chain, and prepare the chain.

        :param chain: tip first
        :param working: the path of the image, absolute
        :param flush: whether the record must survive a power cut: the temporary name of the image
            depends on it
        :param record: the record of an image that has been written already, if another process
            removed the record
        :returns: the record, to be removed with the image
        """
        key = key_of(chain)
        record = record or Beneath(self._tree, f"{_of(key)}/{_USES}/{random_nonce()}.json")
        is_new = prepare = not self.has(key)
        while True:
            try:
                if prepare:
                    self.prepare(chain)
                self._write(Use(record, str(working), None, Writer.current()), flush=flush)
            except FileNotFoundError:
                pass  # another process removed the directory: make it again
            except BaseException:
                self.forget(record, with_chain=is_new)
                raise
            # In this order: a process that removes the chain removes its links first, and then
            # looks for records.
            if {(manifest.file_name, manifest.digest) for manifest in chain} <= self._links(
                key
            ).items() and record.stat() is not None:
                return record
            prepare = True

    def forget(self, record: Beneath, *, with_chain: bool) -> None:
        """
        Remove the record of a working image that was not made.

        :param with_chain: also remove the directory of the chain, if it has no other use
        """
        record.remove()
        key = _key_of(record)
        if with_chain and key is not None and next(self._uses(key), None) is None:
            self._remove(key)

    def abandon(self, working: Path, digest: Digest) -> None:
        """
        Recover after a crash: remove the uses of some bytes by an image that is not backed by them,
        if the writers of the records have ended; also remove chains that have no other use.
        """
        for key in self._keys():
            for use in self._uses(key) if digest in self.members(key) else ():
                if (
                    use.working == str(working)
                    and use.is_ours
                    and use.writer is not None
                    and use.writer.has_ended_here
                ):
                    self.forget(use.record, with_chain=True)

    def release(self, working: Path, *, besides: Beneath | None = None) -> None:
        """
        Remove the records of a working image that was removed, or is backed by another chain now.
        The record of an image stays if another process is about to put that image into this place,
        or has just done so.

        :param besides: the record of the image that the caller has put there
        """
        own = _key_of(besides) if besides is not None else None
        for key in self._keys():
            for use in self._uses(key):
                if use.working == str(working) and use.record != besides:
                    self._release(key, use, covered=key == own)
        # Another process that has just put an image on the same chain there can have taken our
        # record for an older one, as we have taken its record.
        if (
            besides is not None
            and own is not None
            and besides.stat() is None
            and self._stands_on(str(working), own)
        ):
            with suppress(FileNotFoundError):  # a newer image is there, and the chain was removed
                self._write(Use(besides, str(working), None, Writer.current()))

    def _release(self, key: Digest, use: Use, *, covered: bool) -> None:
        """:param covered: whether another record says that the image is backed by this chain"""

        def counts() -> bool:
            # In this order: the image gets its own name before it loses its temporary name.
            return os.path.lexists(use.temporary) or (
                not covered and self._stands_on(use.working, key)
            )

        _remove_unfinished(use)  # without the record, its name is not known
        if counts():
            return
        use.record.remove()
        # if the image has been written meanwhile: its writer looks for the record only after that
        if counts():
            with suppress(FileNotFoundError):
                self._write(use)

    def _keys(self) -> list[Digest]:
        return [
            digest
            for digest in map(Digest.from_file_name, names_in(self._tree, CHAINS))
            if digest is not None
        ]

    def _uses(self, key: Digest) -> Iterator[Use]:
        directory = f"{_of(key)}/{_USES}"
        for name in names_in(self._tree, directory):
            if name.endswith(_RECORD):
                yield self._read(f"{directory}/{name}")

    def users(self, key: Digest, *, now: float | None = None) -> list[str]:
        """
        :param now: seconds since the epoch; by default the current time
        :returns: the working images for which a chain is kept
        """
        moment = time.time() if now is None else now
        return [use.working for use in self._uses(key) if self._is_live(key, use, moment)]

    def users_of(self, digest: Digest) -> list[str]:
        """:returns: the working images that are backed by some bytes, directly or not"""
        return sorted(
            {
                working
                for key in self._keys()
                if digest in self.members(key)
                for working in self.users(key)
            }
        )

    def _is_live(self, key: Digest, use: Use, now: float) -> bool:
        """
        Return whether a use still counts. Note when its image vanished, and remove the record when
        that is long ago.

        If this account changes the record of another account, it becomes the owner of the record,
        but does not take over the writer in it: nothing is done in the name of that writer.
        """
        noted = use if use.is_ours else evolve(use, writer=None)
        if self._stands_on(use.working, key):
            if use.missing_since is not None and self._changes:
                self._write_if_it_fits(evolve(noted, missing_since=None))
            return True
        if use.missing_since is None:
            if self._changes:
                self._write_if_it_fits(evolve(noted, missing_since=now))
            return True
        if now - use.missing_since < GRACE:
            return True
        if self._changes:
            use.record.remove()
        return False

    def uses(self) -> list[tuple[dict[str, Digest], Use]]:
        """
        :returns: the working images for which chains are kept, each with the names of its chain and
            the digests to which they lead
        """
        return [
            (self._links(key), use)
            for key in self._keys()
            for use in self._uses(key)
            if self._is_live(key, use, time.time())
        ]

    def release_vanished(self, *, dry_run: bool = False) -> list[str]:
        """
        Remove the uses of working images that have vanished from directories which are there, and
        were not just moved: the caller knows that. Those of other accounts stay.

        :param dry_run: only report what would be removed
        :returns: the places of these images
        """
        gone = []
        for key in self._keys():
            for use in self._uses(key):
                if (
                    use.is_ours
                    and os.path.isdir(os.path.dirname(use.working))
                    and not os.path.lexists(use.working)
                    and not os.path.lexists(use.temporary)
                ):
                    gone.append(use.working)
                    if not dry_run:
                        self._release(key, use, covered=False)
        return gone

    def _stands_on(self, working: str, key: Digest) -> bool:
        if not os.path.lexists(working):
            return False
        try:
            header = read_header_file(Path(working), wait=False)
        except (StatePoolError, BlockingIOError):
            # the file exists, and its backing file is unknown; or a process, perhaps this one, is
            # just setting it
            return True
        if header.backing_name is None:
            return False
        parsed = self.parse(
            os.path.join(os.path.dirname(working), os.fsdecode(header.backing_name))
        )
        return parsed is not None and parsed.key == key

    def members(self, key: Digest) -> frozenset[Digest]:
        """:returns: the digests of a chain"""
        return frozenset(self._links(key).values())

    def in_use(self) -> dict[Digest, list[str]]:
        """:returns: the keys of the chains in use, with the working images that use them"""
        found = {key: self.users(key) for key in self._keys()}
        return {key: users for key, users in found.items() if users}

    def gc_roots(self) -> frozenset[Digest]:
        """
        :returns: the bytes that back working images, and the bytes of chains that a process has
            open
        """
        keys = self._keys()
        under = {digest for key in keys if self.users(key) for digest in self.members(key)}
        rest = {digest for key in keys for digest in self.members(key)} - under
        return frozenset(under | {digest for digest in rest if self._is_open(digest)})

    def _is_open(self, digest: Digest) -> bool:
        file = self._file(digest)
        return file is not None and is_open(file)

    def prune(self, digests: Iterable[Digest], needed: set[Digest]) -> None:
        """
        Remove the directories of chains that contain one of these digests, are not in use, and are
        not needed by any state.
        """
        wanted = set(digests)
        for key in self._keys():
            members = self.members(key)
            if wanted & members and not members <= needed and not self.users(key):
                self._remove(key)

    def idle(self, needed: set[Digest]) -> list[Digest]:
        """:returns: the keys of chains that are not in use, and are not needed by any state"""
        chains = ((key, self.members(key)) for key in self._keys())
        return [
            key
            for key, members in chains
            if (not members or not members <= needed) and not self.users(key)
        ]

    def prune_all(self, needed: set[Digest]) -> None:
        """Remove the directories of all chains that are idle."""
        for key in self.idle(needed):
            self._remove(key)

    def _remove(self, key: Digest) -> None:
        """
        Remove a chain's directory in place: some file systems cannot rename a directory (overlayfs,
        a directory of a lower layer).

        First remove the links, then look again for a record of use, since another process may have
        begun to use the chain at this moment. That process checks, after its record is written,
        that all links exist, and makes them again. A directory with a record in it cannot be
        removed.
        """
        links = self._links(key)
        for name in names_in(self._tree, _of(key)):
            if name in links or self._is_copy(f"{_of(key)}/{name}"):
                self._tree.remove(f"{_of(key)}/{name}")
        names = names_in(self._tree, f"{_of(key)}/{_USES}")
        if any(name.endswith(_RECORD) for name in names):
            for name, digest in links.items():
                with suppress(FileExistsError, FileNotFoundError):
                    self._tree.symlink(_LINKS_TO + digest.file_name, f"{_of(key)}/{name}")
            return
        # temporary files of records; a writer that is still writing such a file begins again
        for name in names:
            self._tree.remove(f"{_of(key)}/{_USES}/{name}")
        for path in (f"{_of(key)}/{_USES}", _of(key)):
            try:
                place, name = self._tree.place(path)
                with place as directory:
                    os.rmdir(name, dir_fd=directory)
            except FileNotFoundError:
                pass  # another process removes the same chain
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return  # a process has begun to use it

    def recover(self) -> None:
        """
        Recover after a crash: remove working images that were being written, and finish removals of
        chains by older versions, which moved the chains aside.
        """
        if not self._recovered:
            # Only once for each opening of the cache: to read every record before every get would
            # take longer than the get.
            self._recovered = True
            for use in (use for key in self._keys() for use in self._uses(key)):
                _remove_unfinished(use)
        for name in names_in(self._tree, CHAINS):
            key = (
                Digest.from_file_name(name.removeprefix(_ASIDE).partition("-")[2])
                if name.startswith(_ASIDE)
                else None
            )
            if key is not None:
                self._settle_aside(f"{CHAINS}/{name}", key)

    def _settle_aside(self, aside: str, key: Digest) -> None:
        back = _of(key)
        records = [
            name for name in names_in(self._tree, f"{aside}/{_USES}") if name.endswith(".json")
        ]
        if records:
            make_directory(self._tree, f"{back}/{_USES}")
            for name in names_in(self._tree, aside):
                if self._target(f"{aside}/{name}") is not None:
                    self._tree.rename(f"{aside}/{name}", f"{back}/{name}")
            for name in records:
                self._tree.rename(f"{aside}/{_USES}/{name}", f"{back}/{_USES}/{name}")
        self._tree.remove_all(aside)  # what is left is examined again by the next removal

    def unfinished(self) -> list[Beneath]:
        """
        :returns: the temporary files of records that are being written, or were when a process was
            killed
        """
        return [
            file
            for key in self._keys()
            for file in unfinished_in(self._tree, f"{_of(key)}/{_USES}")
        ]

    def _write(self, use: Use, *, flush: bool = False) -> None:
        writer = use.writer.to_json() if use.writer is not None else None
        data = {
            "format": 1,
            "working": use.working,
            "missing_since": use.missing_since,
            "writer": writer,
        }
        write_json(self._tree, use.record.path, data, flush=flush)

    def _write_if_it_fits(self, use: Use) -> None:
        """
        Write a record, unless the disk is full. Then a later command notes it: a command that makes
        room must not need any.
        """
        try:
            self._write(use)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _read(self, path: str) -> Use:
        """
        Read a record. An unreadable record, torn by a power cut, counts as a use whose image has
        just vanished: it is safer to keep the chain.
        """
        record = Beneath(self._tree, path)
        try:
            data: Any
            data, status = read_json(self._tree, path)
            since, writer = data.get("missing_since"), data.get("writer")
            return Use(
                record,
                str(data["working"]),
                float(since) if since is not None else None,
                Writer.from_json(writer) if writer is not None else None,
                status.st_uid == os.geteuid(),
            )
        except FileNotFoundError:
            return Use(record, "", 0.0)
        except (ValueError, KeyError, TypeError, AttributeError, BadRecord):
            return Use(record, "", None)


def _of(key: Digest) -> str:
    return f"{CHAINS}/{key.file_name}"


def _key_of(record: Beneath) -> Digest | None:
    return Digest.from_file_name(PurePath(record.path).parts[-3])


def temporary_name(working: Path, record: Beneath) -> Path:
    """:returns: the path of a working image with this record while it is being written"""
    return working.with_name(_temporary(record))


def _temporary(record: Beneath) -> str:
    return f".statepool-{record.path.rpartition('/')[2].removesuffix('.json')}.tmp"


def _remove_unfinished(use: Use) -> None:
    """
    Remove a working image whose writer was killed while it wrote the image. This account must have
    written the record and own the file; other accounts recover their own images.
    """
    if not use.is_ours or use.writer is None:
        return
    # There is a record for each working image, and almost all images are finished, so that is
    # checked first.
    if (
        not os.path.lexists(os.path.join(os.path.dirname(use.working), _temporary(use.record)))
        or not use.writer.has_ended_here
    ):
        return
    file = beside(use.temporary)
    with suppress(PermissionError, FileNotFoundError, NotADirectoryError):
        if (found := file.stat()) is not None and found.st_uid == os.geteuid():
            file.remove()
