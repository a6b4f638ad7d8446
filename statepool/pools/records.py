"""The contents of the files of a log: records, and checkpoints."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from attrs import evolve, frozen

from statepool.errors import BadRecord, UnsupportedFormat
from statepool.model.decoding import Form
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.pools import layout
from statepool.pools.fold import KEEP_NONCES, Change, Fold, Publish, Remove

_LARGEST = 1e12
"""A time in seconds since the epoch that no working clock shows."""

_MOST_DIGITS = 20
"""Most digits of the number of a record, as in file names."""

RESTORE_LOG = (
    "restore it from a copy of the pool; or move the directory of this log aside, and get its"
    " states from another pool with: statepool sync FROM TO"
)
"""
The hint for a damaged log. The bytes of its states still exist, so undamaged bytes need not be
copied.
"""


@frozen
class Record:
    """
    One change to the states of a machine.

    :param number: its position in the log, from 1
    :param nonce: a random name, by which its writer recognises it
    :param time: seconds since the epoch, by the writer's clock; for people only
    :param by: the writer
    :param changes: its changes
    """

    number: int
    nonce: str
    time: float
    by: str
    changes: tuple[Change, ...]

    def to_bytes(self) -> bytes:
        """:returns: the content of its file; the number is in the name of the file"""
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
        :param content: of the file
        :param number: from the name of the file
        :param where: the file, for messages
        :raises BadRecord: the content is not a record
        """
        found = _read(_RECORD, content, where)
        if not found.changes:
            raise BadRecord(f"{where} is not a record: it changes nothing", path=where)
        if not abs(found.time) < _LARGEST:
            raise BadRecord(f"{where} has no time", path=where, hint=RESTORE_LOG)
        try:
            return cls(
                number,
                found.nonce,
                found.time,
                found.by,
                tuple(change.made() for change in found.changes),
            )
        except BadRecord as error:
            raise BadRecord(f"{error.message}, in {where}", path=where) from error


_ABSENT: Any = None
"""The value of a missing field; a field that is null is refused."""


@frozen
class _Removal:
    """The JSON form of a :class:`~statepool.pools.fold.Remove`."""

    object: str
    state: str
    kind: Kind = Kind.IMAGE
    digest: Digest | None = None


@frozen
class _Change:
    """The JSON form of a change: exactly one of ``publish`` and ``remove`` is present."""

    publish: Manifest = _ABSENT
    remove: _Removal = _ABSENT
    supersedes: Digest | None = None

    def made(self) -> Change:
        """
        :returns: the change
        :raises BadRecord: it breaks a rule
        """
        if (self.publish is _ABSENT) == (self.remove is _ABSENT):
            raise BadRecord("a change neither publishes nor removes")
        if self.publish is not _ABSENT:
            return Publish(self.publish.check(), self.supersedes)
        return Remove(
            StateId(self.remove.object, self.remove.state, self.remove.kind), self.remove.digest
        )


@frozen
class _Record:
    """The JSON form of a record."""

    format: int
    nonce: str
    time: float
    by: str
    changes: list[_Change]


@frozen
class _Checkpoint:
    """The JSON form of a checkpoint."""

    format: int
    number: int
    nonces: dict[str, str]
    states: list[Manifest]
    superseded: list[Manifest]


_RECORD, _CHECKPOINT = Form(_Record), Form(_Checkpoint)
_InLog = TypeVar("_InLog", _Record, _Checkpoint)


def _read(form: Form[_InLog], content: bytes, where: str) -> _InLog:
    found = form.decode(content)
    if found is not None and found.format == layout.FORMAT:
        return found
    # Problems are reported in this order: no JSON, an unknown format, a field with a wrong value.
    data = decode(content, where, RESTORE_LOG)
    try:
        return form.convert(data, where)
    except BadRecord as error:
        raise BadRecord(error.message, path=where, hint=error.hint or RESTORE_LOG) from error


def encode(data: dict[str, Any]) -> bytes:
    """:returns: the content of a JSON file of ours"""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def decode(
    content: bytes,
    where: str,
    hint: str = "restore the file from a copy of the pool",
    *,
    known: int = layout.FORMAT,
) -> dict[str, Any]:
    """
    :param content: of a file of ours
    :param where: the file, for messages
    :param hint: what to do if it is damaged
    :param known: the newest format of such a file that this version knows
    :returns: the JSON object in it
    :raises BadRecord: the content is not a JSON object with a format
    :raises UnsupportedFormat: the file is of a newer format
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
    if version > known:
        raise UnsupportedFormat(
            f"{where} is of format {version}, this version knows {known}",
            path=where,
            hint="install a newer statepool",
        )
    return data


@frozen
class Checkpoint:
    """
    A checkpoint: a fold, written down.

    :param machine: the machine of the states
    :param number: of the last record that it includes
    :param nonces: of the last records, by their numbers
    :param states: the states with a name
    :param superseded: the states without a name
    """

    machine: str
    number: int
    nonces: dict[int, str]
    states: list[Manifest]
    superseded: list[Manifest]

    @classmethod
    def from_bytes(cls, content: bytes, machine: str, number: int, where: str) -> Checkpoint:
        """
        :param content: of the file
        :param number: from the name of the file
        :param where: the file, for messages
        :raises BadRecord: the content is not this checkpoint
        """
        found = _read(_CHECKPOINT, content, where)
        if found.number != number:
            raise BadRecord(f"{where} is not checkpoint {number}", path=where)
        numbers = (
            (int(key), nonce)
            for key, nonce in found.nonces.items()
            if key.isascii() and key.isdigit() and len(key) <= _MOST_DIGITS
        )
        kept = {key: nonce for key, nonce in numbers if key > number - KEEP_NONCES}
        try:
            return cls(
                machine,
                number,
                kept,
                [one.check() for one in found.states],
                [one.check() for one in found.superseded],
            )
        except BadRecord as error:
            raise BadRecord(f"{error.message}, in {where}", path=where, hint=RESTORE_LOG) from error

    @staticmethod
    def of(fold: Fold, *, extents: bool = True) -> bytes:
        """
        :param extents: whether to include the extents of images; the manifests are valid without
            them
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
        :raises BadRecord: the checkpoint breaks a rule
        """
        return Fold.restore(
            self.machine, self.number, dict(self.nonces), self.states, self.superseded
        )


def apply(fold: Fold, record: Record, where: str) -> None:
    """
    Apply one more record to a fold, in place.

    :param where: the file of the record, for messages
    :raises BadRecord: the record breaks a rule
    """
    try:
        fold.apply(record.number, record.nonce, record.changes)
    except BadRecord as error:
        raise BadRecord(
            f"{error.message}: {where} cannot be believed",
            object=fold.machine,
            path=where,
            hint=RESTORE_LOG,
        ) from error
