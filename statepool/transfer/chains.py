"""
What working images are backed by: for each chain a directory of symbolic links named after its states, and records of who uses it.

QEMU looks for a sibling backing name in the directory of the name it was given, not where a link leads, so such a directory works as a chain, and two
versions of one name can live side by side.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from attrs import evolve, frozen

from statepool.errors import BadRecord, StatePoolError
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.pools.log import random_nonce
from statepool.pools.writer import Writer
from statepool.qcow2.header import read_header_file
from statepool.qcow2.opened import is_open
from statepool.transfer.notes import make_directory, write_note

GRACE = 7 * 24 * 3600
"""How long a chain is kept for a working image that has vanished, in seconds: it may have been moved."""

_SUFFIX = ".qcow2"
_USES = ".uses"
_ASIDE = ".gone-"
_LINKS_TO = "../../data/"


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
    :returns: what the directory of a chain is called: all its names and bytes. The tip's bytes alone do not tell: a child nobody wrote to is the same
        bytes over any parent.
    """
    return Digest.of("".join(f"{manifest.state} {manifest.digest}\n" for manifest in chain).encode())


@frozen
class Use:
    """A working image that stands on a chain, as its record says."""

    record: Path
    working: str
    missing_since: float | None
    writer: Writer | None = None

    @property
    def temporary(self) -> Path:
        """What the image is called while it is being written."""
        return temporary_name(Path(self.working), self.record)


class Chains:
    """
    Keeps the chains of a cache.

    :param directory: where
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._recovered = False

    def path(self, chain: Sequence[Manifest]) -> Path:
        """:returns: what a working image on a chain, tip first, names as its backing file"""
        return self.directory_of(key_of(chain)) / chain[0].file_name

    def directory_of(self, key: Digest) -> Path:
        """:returns: where the links of a chain are"""
        return self._directory / key.file_name

    def parse(self, backing: str) -> Standing | None:
        """:returns: the chain that a backing name stands for, or None if it leads elsewhere, or to a chain that is gone"""
        directory, name = os.path.split(backing)
        parent, last = os.path.split(os.path.realpath(directory))
        key = Digest.from_file_name(last)
        if key is None or not name.endswith(_SUFFIX) or parent != os.path.realpath(self._directory):
            return None
        tip = self._links(key).get(name)
        return Standing(key, tip, name.removesuffix(_SUFFIX)) if tip is not None else None

    def _links(self, key: Digest) -> dict[str, Digest]:
        """:returns: the bytes that the names of a chain lead to"""
        directory = self.directory_of(key)
        found: dict[str, Digest] = {}
        try:
            for name in os.listdir(directory):
                digest = Digest.from_file_name(os.path.basename(os.readlink(directory / name))) if name != _USES else None
                if digest is not None:
                    found[name] = digest
        except FileNotFoundError:
            return {}  # somebody takes it away
        return found

    def prepare(self, chain: Sequence[Manifest]) -> Path:
        """
        :param chain: tip first
        :returns: the tip's name, with those of all that back it beside it
        """
        directory = self.directory_of(key_of(chain))
        make_directory(directory / _USES)
        for manifest in reversed(chain):
            assert manifest.digest is not None
            try:
                os.symlink(_LINKS_TO + manifest.digest.file_name, directory / manifest.file_name)
            except FileExistsError:
                pass  # the same link: the key stands for all names and digests of the chain
        return directory / chain[0].file_name

    # -- uses --------------------------------------------------------------------------------------------------------------------------------------

    def use(self, chain: Sequence[Manifest], working: Path, *, flush: bool = False, record: Path | None = None) -> Path:
        """
        A working image is about to be made on a chain, which is prepared for it.

        :param chain: tip first
        :param working: where, absolute
        :param flush: whether a power cut must not take the record: it says what the image is called while it is being written
        :param record: that of an image which has been written, if somebody has taken it away
        :returns: the record of it, to be removed with the image
        """
        key = key_of(chain)
        record = record or self.directory_of(key) / _USES / f"{random_nonce()}.json"
        is_new = not self.directory_of(key).exists()
        while True:
            try:
                self.prepare(chain)
                _write_use(Use(record, str(working), None, Writer.current()), flush=flush)
            except FileNotFoundError:
                continue  # somebody took the directory away: make it again
            except BaseException:
                self.forget(record, with_chain=is_new)
                raise
            if record.exists() and len(self._links(key)) == len(chain):
                return record

    def forget(self, record: Path, *, with_chain: bool) -> None:
        """
        A working image did not come about: its record goes.

        :param with_chain: and with it the directory of the chain, if nobody else uses that
        """
        record.unlink(missing_ok=True)
        key = Digest.from_file_name(record.parent.parent.name)
        if with_chain and key is not None and next(self._uses(key), None) is None:
            self._remove(key)

    def release(self, working: Path, *, besides: Path | None = None) -> None:
        """
        A working image is gone, or stands on something else: forget the records of it. That of an image which another process is about to put into
        its place stays, or has just put there.

        :param besides: the record of the image that the caller has put there
        """
        own = Digest.from_file_name(besides.parent.parent.name) if besides is not None else None
        for key in self._keys():
            for use in self._uses(key):
                if use.working == str(working) and use.record != besides:
                    self._release(key, use, covered=key == own)
        # Who has just put an image on the same chain there can have taken our record for an older one, as we have taken theirs.
        if besides is not None and own is not None and not besides.exists() and self._stands_on(str(working), own):
            with suppress(FileNotFoundError):  # another image is there by now, and the chain gone
                _write_use(Use(besides, str(working), None, Writer.current()))

    def _release(self, key: Digest, use: Use, *, covered: bool) -> None:
        """
        :param covered: whether another record says that the image stands on this chain
        """

        def counts() -> bool:
            # In this order: the image has its own name before it loses that other one.
            return os.path.lexists(use.temporary) or (not covered and self._stands_on(use.working, key))

        _remove_unfinished(use)  # nobody knows its name without the record
        if counts():
            return
        use.record.unlink(missing_ok=True)
        if counts():  # it has been written meanwhile; its writer looks for the record only after that
            with suppress(FileNotFoundError):
                _write_use(use)

    def _keys(self) -> list[Digest]:
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        return [digest for digest in map(Digest.from_file_name, sorted(names)) if digest is not None]

    def _uses(self, key: Digest) -> Iterator[Use]:
        directory = self._directory / key.file_name / _USES
        try:
            names = sorted(os.listdir(directory))
        except FileNotFoundError:
            return
        for name in names:
            if name.endswith(".json"):
                yield _read_use(directory / name)

    def users(self, key: Digest, *, now: float | None = None) -> list[str]:
        """
        :param now: seconds since the epoch; the time if not given
        :returns: the working images for whose sake a chain is kept
        """
        moment = time.time() if now is None else now
        return [use.working for use in self._uses(key) if self._is_live(key, use, moment)]

    def _is_live(self, key: Digest, use: Use, now: float) -> bool:
        """Whether a use still counts. Notes when its image vanished, and forgets it when that is long ago."""
        if self._stands_on(use.working, key):
            if use.missing_since is not None:
                _write_use(evolve(use, missing_since=None))
            return True
        if use.missing_since is None:
            _write_use(evolve(use, missing_since=now))
            return True
        if now - use.missing_since < GRACE:
            return True
        use.record.unlink(missing_ok=True)
        return False

    def _stands_on(self, working: str, key: Digest) -> bool:
        if not os.path.lexists(working):
            return False
        try:
            header = read_header_file(Path(working), wait=False)
        except (StatePoolError, BlockingIOError):
            return True  # it is there, and we cannot tell what it stands on; or somebody, perhaps we, is just taking it over
        if header.backing_name is None:
            return False
        parsed = self.parse(os.path.join(os.path.dirname(working), os.fsdecode(header.backing_name)))
        return parsed is not None and parsed.key == key

    def members(self, key: Digest) -> frozenset[Digest]:
        """:returns: the bytes that a chain is made of"""
        return frozenset(self._links(key).values())

    def in_use(self) -> dict[Digest, list[str]]:
        """:returns: the keys that something stands on, with the working images, or what has them open"""
        found = {key: self.users(key) for key in self._keys()}
        return {key: users for key, users in found.items() if users}

    def held(self) -> frozenset[Digest]:
        """:returns: the bytes under working images, and those that some process has open"""
        keys = self._keys()
        under = {digest for key in keys if self.users(key) for digest in self.members(key)}
        rest = {digest for key in keys for digest in self.members(key)} - under
        data = self._directory.parent / "data"
        # The file of a link pool is behind a link.
        files = {digest: Path(os.path.realpath(data / digest.file_name)) for digest in rest}
        return frozenset(under | {digest for digest, file in files.items() if file.exists() and is_open(file)})

    def prune(self, digests: Iterable[Digest], needed: set[Digest]) -> None:
        """Remove the directories of chains with one of these digests in them that nobody uses and that no state needs."""
        wanted = set(digests)
        for key in self._keys():
            members = self.members(key)
            if wanted & members and not members <= needed and not self.users(key):
                self._remove(key)

    def idle(self, needed: set[Digest]) -> list[Digest]:
        """:returns: the keys of chains that nobody uses and that no state needs"""
        return [key for key in self._keys() if not self.members(key) <= needed and not self.users(key)]

    def prune_all(self, needed: set[Digest]) -> None:
        """Remove the directories of all chains that are idle."""
        for key in self.idle(needed):
            self._remove(key)

    def _remove(self, key: Digest) -> None:
        """
        Remove a chain's directory: moved aside first, then looked at once more, since somebody may have begun to use it at this moment. Whoever
        begins looks, after its record is written, whether it is still where it was written.
        """
        aside = self._directory / f"{_ASIDE}{random_nonce()}-{key.file_name}"
        try:
            os.rename(self._directory / key.file_name, aside)
        except FileNotFoundError:
            return  # somebody else removes it
        self._settle_aside(aside, key)

    def recover(self) -> None:
        """End what a crash interrupted: removals of chains, and working images that were being written."""
        if not self._recovered:
            # Once by each who opens the cache: to read every record before every get would take longer than the get.
            self._recovered = True
            for use in (use for key in self._keys() for use in self._uses(key)):
                _remove_unfinished(use)
        for name in os.listdir(self._directory) if self._directory.is_dir() else ():
            key = Digest.from_file_name(name.removeprefix(_ASIDE).partition("-")[2]) if name.startswith(_ASIDE) else None
            if key is not None:
                self._settle_aside(self._directory / name, key)

    def _settle_aside(self, aside: Path, key: Digest) -> None:
        back = self._directory / key.file_name
        records = list((aside / _USES).glob("*.json"))
        if records:
            make_directory(back / _USES)
            for path in aside.iterdir():
                if path.is_symlink():
                    os.replace(path, back / path.name)
            for record in records:
                os.replace(record, back / _USES / record.name)
        import shutil  # only here: removals are rare, and it brings much with it

        shutil.rmtree(aside, ignore_errors=True)  # whatever is left is looked at again by the next removal


def temporary_name(working: Path, record: Path) -> Path:
    """:returns: what a working image with this record is called while it is being written"""
    return working.with_name(f".statepool-{record.stem}.tmp")


def _remove_unfinished(use: Use) -> None:
    """Remove a working image whose writer was killed over it; whoever may not do that leaves it to who may."""
    if use.writer is not None and use.writer.is_dead and os.path.lexists(use.temporary):
        with suppress(PermissionError):
            use.temporary.unlink(missing_ok=True)


def _write_use(use: Use, *, flush: bool = False) -> None:
    writer = use.writer.to_json() if use.writer is not None else None
    write_note(use.record, {"format": 1, "working": use.working, "missing_since": use.missing_since, "writer": writer}, flush=flush)


def _read_use(record: Path) -> Use:
    """An unreadable record, torn by a power cut, counts as a use whose image has just vanished: better kept than lost."""
    try:
        data = json.loads(record.read_bytes())
        since = data.get("missing_since")
        writer = data.get("writer")
        return Use(
            record, str(data["working"]), float(since) if since is not None else None, Writer.from_json(writer) if writer is not None else None
        )
    except FileNotFoundError:
        return Use(record, "", 0.0)
    except (ValueError, KeyError, TypeError, AttributeError, BadRecord):
        return Use(record, "", None)
