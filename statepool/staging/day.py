"""
The directory of a day, and that of all days.

::

    <staging>/YYYY/MM/DD/<peer>/...              the files of a peer, or a pool
    <staging>/YYYY/MM/DD/staged.json             the summary
    <staging>/YYYY/MM/DD/cback.stage             all peers that must succeed have succeeded
    <staging>/YYYY/MM/DD/cback.store             the day has been stored elsewhere
    <staging>/YYYY/MM/DD/.staging/<peer>.jsonl   notes: what has been brought from the peer
    <staging>/YYYY/MM/DD/.staging/<peer>/...     its unfinished files

Nothing in it is reached through a symbolic link, except the staging directory itself.
"""

from __future__ import annotations

import datetime as dt
import grp
import importlib
import json
import os
import pwd
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from attrs import field, frozen

from statepool.beneath import Tree
from statepool.errors import (
    AccessDenied,
    ConfigError,
    FileExists,
    InUse,
    LockTimeout,
    RefusedError,
)
from statepool.model.location import Location
from statepool.pools.locks import FileLocks
from statepool.staging.settings import SUMMARY, WORK, StageSettings
from statepool.transports.base import FileKind
from statepool.transports.failures import Subject, translating
from statepool.transports.local import LocalTransport

FORMAT = "%Y/%m/%d"
"""The path of a day's directory, as for :func:`time.strftime`; CedarBackup has the same."""

_NEEDED_LATER = (
    "statepool.staging.copy_command",
    "statepool.staging.states",
    "statepool.transports.ssh.openssh",
    "statepool.transports.ssh.transport",
)
"""Modules that are imported when a peer of another host needs them."""

MODE = 0o600
"""Mode of new files: what is collected may be for the eyes of root only, such as passwords."""


@frozen
class Owner:
    """
    The owner of new files.

    :param uid: the number of the account
    :param gid: the number of the group
    """

    uid: int
    gid: int

    def give(self, descriptor: int) -> None:
        """Give an open file or directory to this owner."""
        os.fchown(descriptor, self.uid, self.gid)


def owner_of(user: str | None, group: str | None) -> Owner | None:
    """
    :param user: the name of an account; None: none is configured
    :param group: the name of a group; None: that of the account
    :returns: who gets new files; None: the account of this process keeps them, since only root can
        give files away
    :raises ConfigError: there is no such account or group
    """
    if os.geteuid() != 0 or user is None:
        return None
    try:
        account = pwd.getpwnam(user)
        return Owner(account.pw_uid, grp.getgrnam(group).gr_gid if group else account.pw_gid)
    except KeyError as error:
        name = f"{user}:{group}" if group else user
        raise ConfigError(
            f"there is no account {name}", hint="make it, or name another one"
        ) from error


@frozen
class Staging:
    """
    The staging directory.

    :param settings: the settings of the action
    """

    settings: StageSettings
    files: LocalTransport = field(init=False)
    owner: Owner | None = field(init=False)

    def __attrs_post_init__(self) -> None:
        files = LocalTransport(Location("file", str(self.settings.directory)))
        object.__setattr__(self, "files", files)
        settings = self.settings
        object.__setattr__(self, "owner", owner_of(settings.user, settings.group))

    @property
    def tree(self) -> Tree:
        """The staging directory with all below it."""
        return self.files.tree

    def day(self, date: dt.date) -> Day:
        """:returns: the directory of a day, which may not exist yet"""
        return Day(self, date.strftime(FORMAT))

    def days(self) -> Iterator[Day]:
        """:returns: the directories of days that exist, in their order"""
        for year in self._numbers("", 4):
            for month in self._numbers(year, 2):
                for day in self._numbers(f"{year}/{month}", 2):
                    yield Day(self, f"{year}/{month}/{day}")

    def _numbers(self, directory: str, digits: int) -> list[str]:
        return sorted(
            entry.name
            for entry in self.files.scan(directory)
            if entry.kind is FileKind.DIRECTORY
            and len(entry.name) == digits
            and entry.name.isdecimal()
            and entry.name.isascii()
        )

    def make(self, directory: str) -> None:
        """Make a directory below the staging directory, with its parents."""
        parts = directory.split("/")
        for count in range(1, len(parts) + 1):
            path = "/".join(parts[:count])
            if self.files.stat(path) is None:
                self.files.make_directory(path)
                self._give(path)
                self.files.flush("/".join(parts[: count - 1]))

    def _give(self, path: str) -> None:
        if self.owner is None:
            return
        with (
            translating("give", self.subject(path)),
            self.tree.open(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor,
        ):
            self.owner.give(descriptor)

    def subject(self, path: str) -> Subject:
        """:returns: a file, as messages name it"""
        return Subject(f"{self.tree.root}/{path}", path=f"{self.tree.root}/{path}")

    @contextmanager
    def writing(self, path: str) -> Iterator[int]:
        """
        Yield the descriptor of a new temporary file. At the end of the ``with`` block it replaces
        the file at ``path``, atomically and flushed; if the block raises, it is removed.
        """
        above = path.rpartition("/")[0]
        temporary = f"{above}/.{secrets.token_hex(8)}.tmp"
        subject = self.subject(path)
        try:
            with translating("write", subject):
                opened = self.tree.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
                with opened as descriptor:
                    yield descriptor
                    if self.owner is not None:
                        self.owner.give(descriptor)
                    os.fsync(descriptor)
            self.files.rename(temporary, path)
            self.files.flush(above)
        finally:
            self.files.remove(temporary)


@frozen
class Day:
    """
    The directory of a day.

    :param staging: the staging directory
    :param path: relative to it
    """

    staging: Staging
    path: str

    def __str__(self) -> str:
        return f"{self.staging.tree.root}/{self.path}"

    def below(self, *names: str) -> str:
        """:returns: the path of something in it, relative to the staging directory"""
        return "/".join((self.path, *names))

    def prepare(self, peers: Iterable[str]) -> None:
        """Make the directory, and those for notes and for the peers of these names."""
        for name in (WORK, *peers):
            self.staging.make(self.below(name))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """
        Let no other process stage this day, for a ``with`` block.

        :raises InUse: another process does
        """
        locks = FileLocks(self.staging.tree, self.below(WORK))
        with ExitStack() as stack:
            try:
                stack.enter_context(locks.hold("stage", 0))
            except LockTimeout as error:
                raise InUse(
                    f"another process is staging {self}",
                    hint="wait until it has ended",
                    path=str(self),
                ) from error
            self._give(self.below(WORK, "stage.lock"))
            yield

    def has(self, name: str) -> bool:
        """:returns: whether a file is in the directory itself"""
        found = self.staging.files.stat(self.below(name))
        return found is not None and found.kind is FileKind.FILE

    def indicate(self, name: str) -> None:
        """
        Make an indicator; an existing one stays.

        :raises RefusedError: something else has its name
        """
        if self.has(name):
            return
        path = self.below(name)
        try:
            self.staging.files.create(path, b"")
        except FileExists as error:
            if self.has(name):
                return
            raise RefusedError(
                f"{self}/{name} cannot be made: something else has this name",
                hint="find out what put it there, and remove it",
                path=f"{self}/{name}",
            ) from error
        self.staging.files.flush(self.path)
        self._give(path)

    def _give(self, path: str) -> None:
        if self.staging.owner is None:
            return
        with (
            translating("give", self.staging.subject(path)),
            self.staging.tree.open(path, os.O_RDONLY | os.O_NONBLOCK) as descriptor,
        ):
            self.staging.owner.give(descriptor)

    def summarize(self, form: Mapping[str, object]) -> None:
        """Write the summary, in place of an older one."""
        path = self.below(SUMMARY)
        with self.staging.writing(path) as descriptor:
            content = json.dumps(form, indent=1).encode() + b"\n"
            while content:
                content = content[os.write(descriptor, content) :]


def to_store(staging: Staging, today: dt.date, *, only_today: bool = False) -> Day:
    """
    Find the day to store: today, else yesterday, else tomorrow, if it has been staged and not yet
    stored. So a collect and a store on either side of midnight meet.

    :param only_today: take today, also if it has been stored
    :raises RefusedError: there is no such day
    """
    names = staging.settings.indicators
    for days in (0, -1, 1):
        day = staging.day(today + dt.timedelta(days=days))
        if only_today and day.has(names.stage):
            return day
        if only_today:
            break
        if day.has(names.stage) and not day.has(names.store):
            return day
    tried = "today" if only_today else "today, yesterday and tomorrow"
    raise RefusedError(
        f"no day in {staging.tree.root} is staged and not yet stored: looked at {tried}",
        hint="statepool stage",
        path=staging.tree.root,
    )


def become(settings: StageSettings) -> None:
    """
    Let the rest of this process run as the configured account, if it runs as root: peers on other
    hosts know the keys of that account. It cannot be undone.

    :raises ConfigError: there is no such account
    :raises AccessDenied: the kernel refuses it
    """
    owner = owner_of(settings.user, settings.group)
    if owner is None or settings.user is None or owner.uid == 0:
        return
    # The account need not be able to read this installation.
    for name in _NEEDED_LATER:
        importlib.import_module(name)
    try:
        os.initgroups(settings.user, owner.gid)
        os.setgid(owner.gid)
        os.setuid(owner.uid)
    except OSError as error:
        raise AccessDenied(
            f"this process cannot become {settings.user}: {error.strerror}",
            hint="run it as that account",
        ) from error
