"""
Names of archives: ``ID[.LEVEL][.KEEPING_ID].EXTENSION``, as AutoArchive writes them.

Level 0, and an archive without levels, has no number. A keeping id is two letters, ``aa`` to
``zz``; ``aa`` is the newest kept archive.
"""

from __future__ import annotations

import re
import string

from attrs import frozen

from statepool.errors import InvalidName, RefusedError, UsageError

KEEPING_IDS = tuple(
    one + other for one in string.ascii_lowercase for other in string.ascii_lowercase
)
"""All keeping ids, the newest first: there are 676."""

EXTENSIONS = ("tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst")
"""The extensions of archives, one for each type."""

MANIFEST = ".manifest"
"""What the name of a manifest has behind the name of its archive."""

MOST_LEVELS = 9999
"""The highest level. It only bounds what is read of a name."""

_TAIL = re.compile(
    r"(?P<level>\.[1-9][0-9]{0,3})?(?P<kept>\.[a-z]{2})?\.(?P<extension>tar(?:\.(?:gz|bz2|xz|zst))?)"
)
_SNAPSHOT = re.compile(r"(?P<level>\.[1-9][0-9]{0,3})?\.snar")
_ID = re.compile(r"[^/\0.-][^/\0]{0,199}")
_AMBIGUOUS = re.compile(r".*\.(?:[0-9]+|[a-z]{2}|tar)", re.DOTALL)


def check_backup_id(text: str) -> None:
    """
    :raises InvalidName: names of archives cannot be made of this id
    """
    if (
        _ID.fullmatch(text) is None
        or not text.isprintable()
        or len(text.encode(errors="surrogateescape")) > 200
    ):
        raise InvalidName(
            f"{text!r} cannot be the id of a backup",
            hint="an id has 1 to 200 printable characters, no '/', and no '.' or '-' first",
        )
    if _AMBIGUOUS.fullmatch(text):
        raise InvalidName(
            f"{text!r} cannot be the id of a backup: its end would be read as a level or a"
            " keeping id",
            hint="choose an id that does not end in '.', and a number, two letters or 'tar'",
        )


def check_keeping_id(text: str) -> None:
    """
    :raises InvalidName: it is not a keeping id
    """
    if text not in _ORDER:
        raise InvalidName(
            f"{text!r} is not a keeping id", hint="keeping ids are 'aa' to 'zz', two letters"
        )


def check_level(level: int) -> None:
    """
    :raises UsageError: there is no such level
    """
    if not 0 <= level <= MOST_LEVELS:
        raise UsageError(f"there is no level {level}", hint=f"levels are 0 to {MOST_LEVELS}")


_ORDER = {text: number for number, text in enumerate(KEEPING_IDS)}


def age_of(keeping_id: str | None) -> int:
    """:returns: 0 for an archive that is not kept, 1 for ``aa``, … 676 for ``zz``"""
    return 0 if keeping_id is None else _ORDER[keeping_id] + 1


def next_keeping_id(keeping_id: str | None) -> str:
    """
    :returns: the id under which an archive is kept when a newer one is kept too
    :raises RefusedError: it is the last
    """
    age = age_of(keeping_id)
    if age == len(KEEPING_IDS):
        raise RefusedError(
            f"no keeping id comes after {keeping_id}: {len(KEEPING_IDS)} archives are kept",
            hint="remove the oldest",
        )
    return KEEPING_IDS[age]


@frozen(order=True)
class ArchiveName:
    """
    The name of an archive, in its parts.

    :param backup_id: the id of the backup
    :param extension: of the file, without the first dot
    :param level: 0 also for an archive without levels
    :param keeping_id: None if it is not kept
    """

    backup_id: str
    extension: str
    level: int = 0
    keeping_id: str | None = None

    def __str__(self) -> str:
        level = f".{self.level}" if self.level else ""
        kept = f".{self.keeping_id}" if self.keeping_id is not None else ""
        return f"{self.backup_id}{level}{kept}.{self.extension}"

    @property
    def manifest(self) -> str:
        """The name of its manifest."""
        return f"{self}{MANIFEST}"

    @classmethod
    def parse(cls, text: str) -> ArchiveName | None:
        """:returns: the parts of the name of an archive; None if it is not one"""
        for dot in (found.start() for found in re.finditer(r"\.", text)):
            tail = _TAIL.fullmatch(text, dot)
            if tail is None:
                continue
            level, kept = tail["level"], tail["kept"]
            try:
                check_backup_id(text[:dot])
            except InvalidName:
                return None
            return cls(
                text[:dot],
                tail["extension"],
                int(level[1:]) if level else 0,
                kept[1:] if kept else None,
            )
        return None


def snapshot_name(backup_id: str, level: int) -> str:
    """:returns: the name of the snapshot file that a level was made with"""
    return f"{backup_id}.{level}.snar" if level else f"{backup_id}.snar"


def parse_snapshot_name(text: str) -> tuple[str, int] | None:
    """:returns: id and level of a snapshot file; None if this is not the name of one"""
    for dot in (found.start() for found in re.finditer(r"\.", text)):
        tail = _SNAPSHOT.fullmatch(text, dot)
        if tail is not None:
            try:
                check_backup_id(text[:dot])
            except InvalidName:
                return None
            return text[:dot], int(tail["level"][1:]) if tail["level"] else 0
    return None
