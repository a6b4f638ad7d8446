"""What is in the files of a log: records, and checkpoints; and what was read of a log before it is taken apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from attrs import evolve, frozen

from statepool.errors import BadRecord, UnsupportedFormat
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId, is_unicode
from statepool.model.manifests import read_manifests
from statepool.pools import layout
from statepool.pools.fold import KEEP_NONCES, Change, Fold, Publish, Remove

_LARGEST = 1e12
"""Seconds since the epoch, beyond any clock that works."""

_MOST_DIGITS = 20
"""Of the number of a record, as in the names of files."""

RESTORE_LOG = (
    "restore it from a copy of the pool; or move the directory of this log aside, and get its states from another pool with: statepool sync FROM TO"
)
"""What to do about a log that is damaged. The bytes of its states are still there, so nothing has to be copied that is whole."""


@frozen
class Record:
    """
    One change to the states of a machine.

    :param number: its place in the order, from 1
    :param nonce: what its writer knows it by
    :param time: seconds since the epoch, by the writer's clock; for people only
    :param by: the writer
    :param changes: what it did
    """

    number: int
    nonce: str
    time: float
    by: str
    changes: tuple[Change, ...]

    def to_bytes(self) -> bytes:
        """:returns: the content of its file, whose name says the number"""
        return encode(
            {
                "format": layout.FORMAT,
                "nonce": self.nonce,
                "time": self.time,
                "by": self.by,
                "changes": [change.to_json() for change in self.changes],
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes, number: int, where: str) -> Record:
        """
        :param content: what is in the file
        :param number: what the file's name says
        :param where: the file, for messages
        :raises BadRecord: it is not a record
        """
        return cls.from_json(decode(content, where, RESTORE_LOG), number, where)

    @classmethod
    def from_json(cls, data: dict[str, Any], number: int, where: str) -> Record:
        """As :meth:`from_bytes`, of what a JSON reader made of it."""
        changes = data.get("changes")
        if not isinstance(changes, list) or not changes:
            raise BadRecord(f"{where} is not a record: it changes nothing", path=where)
        made = tuple(_changes(changes, where))
        return cls(number, _text(data, "nonce", where), _number(data, "time", where), _text(data, "by", where), made)


def _changes(changes: list[Any], where: str) -> list[Change]:
    if any(not isinstance(change, dict) or ("publish" in change) == ("remove" in change) for change in changes):
        raise BadRecord(f"a change in {where} neither publishes nor removes", path=where)
    try:
        manifests = iter(read_manifests([change["publish"] for change in changes if "publish" in change]))
        return [_publish(change, next(manifests)) if "publish" in change else _remove(change["remove"]) for change in changes]
    except BadRecord as error:
        raise BadRecord(f"{error.message}, in {where}", path=where) from error


def _publish(change: dict[str, Any], manifest: Manifest) -> Publish:
    supersedes = change.get("supersedes")
    return Publish(manifest, Digest.parse(str(supersedes)) if supersedes is not None else None)


def _remove(data: Any) -> Remove:
    if not isinstance(data, dict) or not isinstance(data.get("object"), str) or not isinstance(data.get("state"), str):
        raise BadRecord("a removal does not say of what")
    if not is_unicode(data["object"]) or not is_unicode(data["state"]):
        raise BadRecord("a removal is of something that no name can be")
    if data.get("kind", "image") not in Kind.__members__.values():
        raise BadRecord("a removal has an unknown kind")
    digest = data.get("digest")
    return Remove(StateId(data["object"], data["state"], Kind(data.get("kind", "image"))), Digest.parse(str(digest)) if digest is not None else None)


def encode(data: dict[str, Any]) -> bytes:
    """:returns: the content of a file of ours"""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def decode(content: bytes, where: str, hint: str = "restore the file from a copy of the pool") -> dict[str, Any]:
    """
    :param content: what is in a file of ours
    :param where: the file, for messages
    :param hint: what to do if it is damaged
    :returns: the JSON object in it
    :raises BadRecord: it is not one
    :raises UnsupportedFormat: it is of a format we do not know
    """
    try:
        data = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where} is not JSON", path=where, hint=hint) from error
    if not isinstance(data, dict):
        raise BadRecord(f"{where} is not a JSON object", path=where, hint=hint)
    version = data.get("format")
    if type(version) is not int or version < 1:
        raise BadRecord(f"{where} does not say its format", path=where, hint=hint)
    if version > layout.FORMAT:
        raise UnsupportedFormat(f"{where} is of format {version}, this version knows {layout.FORMAT}", path=where, hint="install a newer statepool")
    return data


def _text(data: dict[str, Any], name: str, where: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not is_unicode(value):
        raise BadRecord(f"{where} has no {name}", path=where, hint=RESTORE_LOG)
    return value


def _number(data: dict[str, Any], name: str, where: str) -> float:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise BadRecord(f"{where} has no {name}", path=where, hint=RESTORE_LOG)
    return float(value)


@frozen
class Checkpoint:
    """
    A fold, written down; its manifests have yet to be read.

    :param machine: whose states
    :param number: of the last record that it speaks for
    :param nonces: of the last records, by their numbers
    :param states: manifests as a JSON reader makes them
    :param superseded: likewise, of states without a name
    """

    machine: str
    number: int
    nonces: dict[int, str]
    states: list[Any]
    superseded: list[Any]

    @classmethod
    def from_bytes(cls, content: bytes, machine: str, number: int, where: str) -> Checkpoint:
        """
        :param content: what is in the file
        :param number: what the file's name says
        :param where: the file, for messages
        :raises BadRecord: it is not a checkpoint
        """
        data = decode(content, where, RESTORE_LOG)
        nonces = data.get("nonces")
        states, superseded = data.get("states"), data.get("superseded")
        if data.get("number") != number or not isinstance(nonces, dict) or not isinstance(states, list) or not isinstance(superseded, list):
            raise BadRecord(f"{where} is not checkpoint {number}", path=where)
        numbers = ((int(key), nonce) for key, nonce in nonces.items() if key.isascii() and key.isdigit() and len(key) <= _MOST_DIGITS)
        kept = {key: nonce for key, nonce in numbers if key > number - KEEP_NONCES}
        if not all(isinstance(nonce, str) and is_unicode(nonce) for nonce in kept.values()):
            raise BadRecord(f"{where} has a nonce that is no text", path=where, hint=RESTORE_LOG)
        return cls(machine, number, kept, states, superseded)

    @staticmethod
    def of(fold: Fold, *, extents: bool = True) -> bytes:
        """
        :param extents: whether to tell where images have data; the manifests are good without
        :returns: the content of the file for a fold
        """

        def form(manifest: Manifest) -> dict[str, Any]:
            return (manifest if extents else evolve(manifest, extents=())).to_json()

        return encode(
            {
                "format": layout.FORMAT,
                "number": fold.number,
                "nonces": {str(number): nonce for number, nonce in fold.nonces.items()},
                "states": [form(manifest) for manifest in fold.states.values()],
                "superseded": [form(manifest) for manifest in fold.superseded],
            }
        )

    def fold(self) -> Fold:
        """
        :returns: the fold that was written down
        :raises BadRecord: it cannot be believed
        """
        return Fold.restore(self.machine, self.number, dict(self.nonces), read_manifests(self.states), read_manifests(self.superseded))


@frozen
class Unfolded:
    """
    What was read of a log, and counts.

    :param machine: whose log
    :param checkpoint: where it begins, or None if that is the first record
    :param records: those after it: the number, what a JSON reader made of it, and the file, for messages
    """

    machine: str
    checkpoint: Checkpoint | None
    records: Sequence[tuple[int, dict[str, Any], str]]

    def fold(self) -> Fold:
        """
        :returns: what it comes to
        :raises BadRecord: it cannot be believed
        """
        fold = self.checkpoint.fold() if self.checkpoint is not None else Fold(self.machine)
        for number, data, where in self.records:
            apply(fold, Record.from_json(data, number, where), where)
        return fold


def apply(fold: Fold, record: Record, where: str) -> None:
    """
    One record more, in place.

    :param where: its file, for messages
    :raises BadRecord: it breaks a rule
    """
    try:
        fold.apply(record.number, record.nonce, record.changes)
    except BadRecord as error:
        raise BadRecord(f"{error.message}: {where} cannot be believed", object=fold.machine, path=where, hint=RESTORE_LOG) from error
