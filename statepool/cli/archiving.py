"""What the commands of ``statepool archive`` share: making an archive, and telling of it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statepool.cli.report import warn
from statepool.cli.session import Session
from statepool.cli.signals import orderly

if TYPE_CHECKING:
    from statepool.archive.archiver import Archiver
    from statepool.archive.definition import BackupDefinition, Event
    from statepool.archive.levels import Restarts


def make(
    session: Session,
    archiver: str,
    work_dir: Path,
    *,
    definition: BackupDefinition,
    incremental: bool,
    restarts: Restarts | None,
    strength: int | None,
    overwrite_at_start: bool,
    keep: int,
    level: int | None = None,
    threads: int | None = None,
) -> tuple[Path, list[Event]]:
    """
    Make an archive.

    :param archiver: the name of the archiver
    :param restarts: the rules for levels; without them each level is the next one
    :returns: its path, and the events; those were shown
    """
    maker, listener = archiver_of(session, archiver, work_dir, threads)
    options: dict[str, Any] = {
        "compression_strength": strength,
        "overwrite_at_start": overwrite_at_start,
        "keep": keep,
    }
    with orderly():
        if not (incremental or level is not None or restarts is not None):
            return maker.backup_files(definition, **options), listener.events
        if restarts is not None and level is None:
            level = _restarted(session, maker, definition, restarts, options)
        path = maker.backup_files_incrementally(definition, level=level, **options)
    return path, listener.events


class Told:
    """A listener that shows events, and remembers them."""

    def __init__(self, session: Session) -> None:
        self.events: list[Event] = []
        self._session = session

    def file_added(self, path: str) -> None:
        """Do nothing: there can be millions."""

    def event(self, event: Event) -> None:
        """Show an event."""
        self.events.append(event)
        if not self._session.json and (event.kind.is_warning or self._session.verbose):
            warn(f"{'warning: ' * event.kind.is_warning}{event.text}")


def archiver_of(
    session: Session, name: str, work_dir: Path | None, threads: int | None = None
) -> tuple[Archiver, Told]:
    """
    :param name: of the archiver
    :param threads: how many threads compress; one for each processor if not given
    :returns: the archiver, and what it tells its events to
    """
    from statepool.archive.registry import archiver_class

    listener = Told(session)
    # how other hosts are reached
    options = {"settings": session.config.settings} if name == "pool" else {}
    made = archiver_class(name)(
        work_dir or default_work_dir(),
        listener=listener,
        progress=session.progress(),
        threads=threads or 0,
        **options,
    )
    return made, listener


def default_work_dir() -> Path:
    """:returns: where snapshot files are if the user does not say it"""
    from statepool.config.places import home, xdg
    from statepool.errors import ConfigError

    place = xdg(os.environ, "XDG_STATE_HOME", home(os.environ), ".local/state")
    if place is None:
        raise ConfigError(
            "there is no home directory to keep snapshot files in", hint="name one with --work-dir"
        )
    return Path(place, "statepool/archive")


def _restarted(
    session: Session,
    maker: Archiver,
    definition: BackupDefinition,
    rules: Restarts,
    options: dict[str, Any],
) -> int:
    from statepool.archive.directory import ArchiveDirectory
    from statepool.archive.levels import next_level

    stored = ArchiveDirectory(definition.destination, definition.backup_id).stored()
    chosen = next_level(stored, maker.get_max_backup_level(definition), rules, time.time())
    options["facts"] = chosen.facts
    if not session.json:
        session.say(f"level {chosen.level}: {chosen.reason}")
    return chosen.level
