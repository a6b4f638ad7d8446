"""The directory that is archived: what of it, and how much."""

from __future__ import annotations

import os
from collections.abc import Iterator

from statepool.archive.definition import BackupDefinition, Event, EventKind, SubOperation
from statepool.errors import MissingFile, TransportError, about_file
from statepool.transports.failures import Subject, translating


def included(definition: BackupDefinition) -> list[str]:
    """
    :returns: the names that are archived with all below them, relative to the root
    :raises MissingFile: the root, or one of them, does not exist
    """
    root = definition.root
    try:
        with translating("archive", Subject(root, path=root)):
            if not os.path.isdir(root):
                os.scandir(root).close()  # tells why
        names = sorted(definition.include_files) or ["."]
        for name in names:
            path = os.path.join(root, name)
            if not os.path.lexists(path):
                raise MissingFile(
                    f"there is no {name} in {root}", path=path, hint="it was to be archived"
                )
    except TransportError as error:
        raise about_file(error) from error.__cause__
    return names


def is_excluded(definition: BackupDefinition, path: str) -> bool:
    """
    :param path: relative to the root, normalised
    :returns: whether the definition leaves it out; what is below it is then left out too
    """
    return path in definition.exclude_files


def excluded_events(definition: BackupDefinition) -> Iterator[Event]:
    """:returns: an event for each path that exists and is left out"""
    for path in sorted(definition.exclude_files):
        if os.path.lexists(os.path.join(definition.root, path)):
            yield Event(EventKind.EXCLUDED, SubOperation.STAT, path, f"{path}: excluded")


def size_of_tree(definition: BackupDefinition) -> int:
    """:returns: the bytes of all files that are archived; what cannot be read counts as empty"""
    total = 0
    waiting = [name if name != "." else "" for name in included(definition)]
    while waiting:
        name = waiting.pop()
        if is_excluded(definition, name):
            continue
        try:
            path = os.path.join(definition.root, name)
            if os.path.islink(path) or not os.path.isdir(path):
                total += os.lstat(path).st_size
                continue
            with os.scandir(path) as entries:
                waiting += [os.path.join(name, entry.name) for entry in entries]
        except OSError:  # an estimate: the archiver itself tells of it
            continue
    return total
