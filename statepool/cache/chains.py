"""
What working images are backed by: for each chain a directory of symbolic links named after its
states, and records of who uses it.

QEMU looks for a sibling backing name in the directory of the name it was given, not where a link
leads, so such a directory works as a chain, and two versions of one name can live side by side.
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
"""Where a cache keeps what working images are backed by; no other pool has such a directory."""


@frozen
class Standing:
    """
    What a working image stands on.

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
    :returns: what the directory of a chain is called: all its names and bytes. The tip's bytes
        alone do not tell: a child nobody wrote to is the same bytes over any parent.
    """
    return Digest.of_text("".join(f"{manifest.state} {manifest.digest}\n" for manifest in chain))


@frozen
class Use:
    """
    A working image that stands on a chain, as its record says.

    :param record: the file that says so
    :param working: the image, absolute
    :param missing_since: when it was noticed that the image is not there, in seconds since the
        epoch
    :param writer: the process that made it, if that is known
    :param is_ours: whether this account has written the record; what another one says is heeded,
        but nothing is done to the files it names
    """

    record: Beneath
    working: str
    missing_since: float | None
    writer: Writer | None = None
    is_ours: bool = True

    @property
    def temporary(self) -> Path:
        """What the image is called while it is being written."""
        return temporary_name(Path(self.working), self.record)


class Chains:
    """
    Keeps the chains of a cache.

    :param tree: the cache
    :param file: finds the file that holds some bytes, which a cache can have in another pool
    :param changes: whether anything may be noted there: the cache of a neighbour is only looked at
    """

    def __init__(
        self, tree: Tree, file: Callable[[Digest], Beneath | None], *, changes: bool = True
    ) -> None:
        self._tree = tree
        self._file = file
        self._changes = changes
        self._recovered = False

    def path(self, chain: Sequence[Manifest]) -> Path:
        """:returns: what a working image on a chain, tip first, names as its backing file"""
        return self.directory_of(key_of(chain)) / chain[0].file_name

    def directory_of(self, key: Digest) -> Path:
        """
        :returns: where the links of a chain are, for messages and for programs that only know paths
        """
        return Path(self._tree.root, _of(key))

    def has(self, key: Digest) -> bool:
        """:returns: whether there is a directory of this chain"""
        return Beneath(self._tree, _of(key)).stat() is not None

    def parse(self, backing: str) -> Standing | None:
        """
        :returns: the chain that a backing name stands for, or None if it leads elsewhere, or to a
            chain that is gone
        """
        directory, name = os.path.split(backing)
        # by name, as QEMU looks for it; nothing is opened there
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
        """:returns: whether a backing name, absolute, is that of a chain which is there"""
        return self.parse(backing) is not None

    def _links(self, key: Digest) -> dict[str, Digest]:
        """:returns: the bytes that the names of a chain lead to"""
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
        :param directory: what ``path`` is a name in; that of the cache, if not given
        :returns: the bytes to which one of our links leads, or None if it is none, or gone
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
        Whether there is a file of ours in the place of a link: a program has copied the cache and
        followed links.
        """
        found = Beneath(self._tree, path).stat()
        return found is not None and stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()

    def prepare(self, chain: Sequence[Manifest]) -> Path:
        """
        :param chain: tip first
        :returns: the tip's name, with those of all that back it beside it
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
                # The key stands for all names and digests of the chain, so it is the same link,
                # unless somebody put another one there. One that was just removed is missed
                # afterwards.
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
        A working image is about to be made on a chain, which is prepared for it.

        :param chain: tip first
        :param working: where, absolute
        :param flush: whether a power cut must not take the record: it says what the image is called
            while it is being written
        :param record: that of an image which has been written, if somebody has taken it away
        :returns: the record of it, to be removed with the image
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
                pass  # somebody took the directory away: make it again
            except BaseException:
                self.forget(record, with_chain=is_new)
                raise
            # In this order: who removes the chain takes its links first, and then looks for
            # records.
            if {(manifest.file_name, manifest.digest) for manifest in chain} <= self._links(
                key
            ).items() and record.stat() is not None:
                return record
            prepare = True

    def forget(self, record: Beneath, *, with_chain: bool) -> None:
        """
        A working image did not come about: its record goes.

        :param with_chain: and with it the directory of the chain, if nobody else uses that
        """
        record.remove()
        key = _key_of(record)
        if with_chain and key is not None and next(self._uses(key), None) is None:
            self._remove(key)

    def abandon(self, working: Path, digest: Digest) -> None:
        """
        Forget, of writers that are gone, uses of some bytes by an image that does not stand on
        them, and chains that nothing else uses.
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
        A working image is gone, or stands on something else: forget the records of it. That of an
        image which another process is about to put into its place stays, or has just put there.

        :param besides: the record of the image that the caller has put there
        """
        own = _key_of(besides) if besides is not None else None
        for key in self._keys():
            for use in self._uses(key):
                if use.working == str(working) and use.record != besides:
                    self._release(key, use, covered=key == own)
        # Who has just put an image on the same chain there can have taken our record for an older
        # one, as we have taken theirs.
        if (
            besides is not None
            and own is not None
            and besides.stat() is None
            and self._stands_on(str(working), own)
        ):
            with suppress(FileNotFoundError):  # another image is there by now, and the chain gone
                self._write(Use(besides, str(working), None, Writer.current()))

    def _release(self, key: Digest, use: Use, *, covered: bool) -> None:
        """
        :param covered: whether another record says that the image stands on this chain
        """

        def counts() -> bool:
            # In this order: the image has its own name before it loses that other one.
            return os.path.lexists(use.temporary) or (
                not covered and self._stands_on(use.working, key)
            )

        _remove_unfinished(use)  # nobody knows its name without the record
        if counts():
            return
        use.record.remove()
        # it has been written meanwhile; its writer looks for the record only after that
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
        :param now: seconds since the epoch; the time if not given
        :returns: the working images for whose sake a chain is kept
        """
        moment = time.time() if now is None else now
        return [use.working for use in self._uses(key) if self._is_live(key, use, moment)]

    def users_of(self, digest: Digest) -> list[str]:
        """:returns: the working images that stand on some bytes, or on what stands on these"""
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
        Whether a use still counts. Notes when its image vanished, and forgets it when that is long
        ago.

        An account that notes this for another one takes over that record, but not the claim of a
        writer in it: nothing is done in its name.
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
        :returns: the working images for whose sake chains are kept, each with the names of its
            chain and the bytes to which they lead
        """
        return [
            (self._links(key), use)
            for key in self._keys()
            for use in self._uses(key)
            if self._is_live(key, use, time.time())
        ]

    def _stands_on(self, working: str, key: Digest) -> bool:
        if not os.path.lexists(working):
            return False
        try:
            header = read_header_file(Path(working), wait=False)
        except (StatePoolError, BlockingIOError):
            # it is there, and we cannot tell what it stands on; or somebody, perhaps we, is just
            # taking it over
            return True
        if header.backing_name is None:
            return False
        parsed = self.parse(
            os.path.join(os.path.dirname(working), os.fsdecode(header.backing_name))
        )
        return parsed is not None and parsed.key == key

    def members(self, key: Digest) -> frozenset[Digest]:
        """:returns: the bytes that a chain is made of"""
        return frozenset(self._links(key).values())

    def in_use(self) -> dict[Digest, list[str]]:
        """
        :returns: the keys that something stands on, with the working images, or what has them open
        """
        found = {key: self.users(key) for key in self._keys()}
        return {key: users for key, users in found.items() if users}

    def gc_roots(self) -> frozenset[Digest]:
        """:returns: the bytes under working images, and those that some process has open"""
        keys = self._keys()
        under = {digest for key in keys if self.users(key) for digest in self.members(key)}
        rest = {digest for key in keys for digest in self.members(key)} - under
        return frozenset(under | {digest for digest in rest if self._is_open(digest)})

    def _is_open(self, digest: Digest) -> bool:
        file = self._file(digest)
        return file is not None and is_open(file)

    def prune(self, digests: Iterable[Digest], needed: set[Digest]) -> None:
        """
        Remove the directories of chains with one of these digests in them that nobody uses and that
        no state needs.
        """
        wanted = set(digests)
        for key in self._keys():
            members = self.members(key)
            if wanted & members and not members <= needed and not self.users(key):
                self._remove(key)

    def idle(self, needed: set[Digest]) -> list[Digest]:
        """:returns: the keys of chains that nobody uses and that no state needs"""
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
        Remove a chain's directory where it is: some file systems cannot rename a directory
        (overlayfs, one of a lower layer).

        First the links, then look once more for a record of use, since another process may have
        begun to use the chain at this moment: that process looks, after its record is written,
        whether all links are there, and makes them again. A directory with a record in it cannot be
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
        # of records that were never finished; a writer that is at work on one begins again
        for name in names:
            self._tree.remove(f"{_of(key)}/{_USES}/{name}")
        for path in (f"{_of(key)}/{_USES}", _of(key)):
            try:
                place, name = self._tree.place(path)
                with place as directory:
                    os.rmdir(name, dir_fd=directory)
            except FileNotFoundError:
                pass  # another process removes it, too
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return  # a process begins to use it

    def recover(self) -> None:
        """
        End what a crash interrupted: working images that were being written, and removals of chains
        by versions that moved these aside.
        """
        if not self._recovered:
            # Once by each who opens the cache: to read every record before every get would take
            # longer than the get.
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
        self._tree.remove_all(aside)  # whatever is left is looked at again by the next removal

    def unfinished(self) -> list[Beneath]:
        """
        :returns: the records of uses that are being written, or were when a process was killed
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
        On a full disk it is noted by the next who looks: what makes room there must not need any.
        """
        try:
            self._write(use)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _read(self, path: str) -> Use:
        """
        An unreadable record, torn by a power cut, counts as a use whose image has just vanished:
        better kept than lost.
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
    """:returns: what a working image with this record is called while it is being written"""
    return working.with_name(_temporary(record))


def _temporary(record: Beneath) -> str:
    return f".statepool-{record.path.rpartition('/')[2].removesuffix('.json')}.tmp"


def _remove_unfinished(use: Use) -> None:
    """
    Remove a working image whose writer was killed over it, if this account has written the record
    of it, and owns the file; other accounts are left to end what is theirs.
    """
    if not use.is_ours or use.writer is None:
        return
    # There are as many as there are working images, and hardly one of them is unfinished: that is
    # asked first.
    if (
        not os.path.lexists(os.path.join(os.path.dirname(use.working), _temporary(use.record)))
        or not use.writer.has_ended_here
    ):
        return
    file = beside(use.temporary)
    with suppress(PermissionError, FileNotFoundError, NotADirectoryError):
        if (found := file.stat()) is not None and found.st_uid == os.geteuid():
            file.remove()
