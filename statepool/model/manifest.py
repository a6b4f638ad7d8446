"""
Manifests: what a pool knows of a state.

The JSON form is that of the pool's log; ``docs/formats.rst`` describes it field by field. A reader
decodes it by the types of the fields (:mod:`~statepool.model.decoding`). Then
:meth:`~Manifest.check` checks the rules that types cannot express.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from attrs import field, fields, frozen

from statepool.errors import BadRecord, InvalidName, UsageError
from statepool.model.decoding import Form, Meta
from statepool.model.digest import Digest
from statepool.model.names import check_name, check_state_name
from statepool.model.objects import Image, Machine, parse_object

MAX_EXTENTS = 1000
"""Most data extents that a manifest lists; the nearest extents are merged until they fit."""

MAX_LABELS = 64
"""Most labels of a manifest."""

LONGEST_LABEL = 4096
"""Most characters of a label, and of its name."""

LONGEST_TABLE = MAX_LABELS * 2 * LONGEST_LABEL
"""
Most characters of all names and texts of one table of a manifest: the limit for labels, when they
are written and when they are read.
"""

_LATEST = 1e12
"""A time in seconds since the epoch that no working clock shows."""


class Kind(enum.StrEnum):
    """The kind of a state's bytes."""

    IMAGE = "image"
    """A qcow2 image."""
    RAM = "ram"
    """The RAM of a machine, as QEMU's migration stream."""
    MACHINE = "machine"
    """No bytes of its own: a list of members."""

    __hash__ = str.__hash__  # the hash of enumerations is slow, and kinds are part of many keys


# A tuple, since thousands of them are made and looked up whenever a log is read.
class StateId(NamedTuple):
    """
    The identity of a named state within one machine.

    :param object: ``machine/image`` or ``machine``
    :param state: the name
    :param kind: distinguishes a machine state from its RAM, which has the same object and name
    """

    object: str
    state: str
    kind: Kind = Kind.IMAGE

    def __str__(self) -> str:
        return f"{self.object} {self.state}" + (" (RAM)" if self.kind is Kind.RAM else "")

    @property
    def machine(self) -> str:
        """The id of the machine whose log has this state."""
        return self.object.partition("/")[0]


@frozen(order=True)
class Parent:
    """The name and the digest of the state that directly backs a state."""

    state: str
    digest: Digest


Key = tuple[str, str, Digest]
"""The identity of a present state within one machine: object, name and digest."""


Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]

if TYPE_CHECKING:  # a manifest that was read may have null in these fields, a checked one has not
    Extents = tuple[tuple[int, int], ...]
    Texts = Mapping[str, str]
    Members = Mapping[str, Digest]
else:
    Extents = Annotated[tuple[tuple[int, int], ...], Meta(max_length=MAX_EXTENTS)] | None
    Texts = Annotated[Mapping[str, str], Meta(max_length=MAX_LABELS)] | None
    Members = Annotated[Mapping[str, Digest], Meta(min_length=1)] | None


class _Keys:
    """The keys of a manifest. They are computed once, since a fold uses them very often."""

    id: StateId
    """The identity of the named state."""
    key: Key | None
    """The identity among all states of its name; None if the state has no bytes."""
    parent_key: Key | None
    """The :attr:`key` of the state that backs it, or None."""


@frozen(slots=False)
class Manifest(_Keys):
    """
    What a pool knows of a state.

    :param object: the object of the state
    :param state: the name of the state
    :param kind: the kind of its bytes
    :param size: length of its bytes
    :param digest: the name of its bytes; None for a machine, and for an unmanaged file that was not
        hashed yet
    :param origin: the digest of the bytes from which these bytes were rewritten, if they were
    :param parent: the state that backs it, or None
    :param virtual_size: size of the disk that a guest sees, in bytes
    :param cluster_size: of the qcow2 file, in bytes
    :param extents: where the file has data, as (offset, length) in bytes; empty means everywhere
    :param created: time of creation, in seconds since the epoch
    :param creator: what made it: versions and host
    :param labels: free notes of the owner
    :param fingerprint: for RAM: what can load it
    :param members: for a machine: the digests of its images and RAM, by ``machine/image`` or
        ``ram``
    """

    object: str
    state: str
    kind: Kind = Kind.IMAGE
    size: Size = 0
    digest: Digest | None = None
    origin: Digest | None = None
    parent: Parent | None = None
    virtual_size: Size = 0
    cluster_size: Size = 0
    extents: Extents = ()
    created: float = 0.0
    creator: Texts = field(factory=dict)
    labels: Texts = field(factory=dict)
    fingerprint: Texts = field(factory=dict)
    members: Members = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        kept, digest, parent = self.__dict__, self.digest, self.parent
        kept["id"] = StateId(self.object, self.state, self.kind)
        kept["key"] = (self.object, self.state, digest) if digest is not None else None
        kept["parent_key"] = (
            (self.object, parent.state, parent.digest) if parent is not None else None
        )

    @property
    def file_name(self) -> str:
        """The plain name of its file, for children and for people."""
        return self.state + (".state" if self.kind is Kind.RAM else ".qcow2")

    @property
    def data_size(self) -> int:
        """Most bytes of the file that are not holes."""
        return sum(length for _, length in self.extents) if self.extents else self.size

    def is_content(self, digest: Digest) -> bool:
        """
        Return whether ``digest`` names these bytes, or the bytes from which they were rewritten.
        Call this only for a state of our own cache: an ``origin`` in the log of another pool is not
        proven.
        """
        return digest in (self.digest, self.origin)

    def derived(
        self,
        *,
        size: int,
        digest: Digest | None = None,
        origin: Digest | None = None,
        parent: Parent | None = None,
        virtual_size: int = 0,
        cluster_size: int = 0,
        extents: tuple[tuple[int, int], ...] = (),
        members: Mapping[str, Digest] | None = None,
    ) -> Manifest:
        """
        Return the manifest of a copy of a state from another pool. Only the name and the owner's
        notes are taken over. The caller gives all facts, which it knows from the bytes.
        """
        return Manifest(
            object=self.object,
            state=self.state,
            kind=self.kind,
            size=size,
            digest=digest,
            origin=origin,
            parent=parent,
            virtual_size=virtual_size,
            cluster_size=cluster_size,
            extents=extents if extents != ((0, size),) else (),
            created=self.created,
            creator=dict(self.creator),
            labels=dict(self.labels),
            fingerprint=dict(self.fingerprint),
            members=dict(members or {}),
        )

    @property
    def text_size(self) -> int:
        """Bytes in a log for the texts that cannot be derived from the state's bytes."""
        tables = [table for table in (self.creator, self.labels, self.fingerprint) if table]
        return sum(len(json.dumps(dict(table), ensure_ascii=False).encode()) for table in tables)

    def to_json(self) -> dict[str, Any]:
        """:returns: the form in a record, without the fields that have no value"""
        data: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        data["kind"] = str(self.kind)
        data["parent"] = (
            {"state": self.parent.state, "digest": self.parent.digest}
            if self.parent is not None
            else None
        )
        data["extents"] = list(map(list, self.extents))
        data |= {name: dict(data[name]) for name in ("creator", "labels", "fingerprint", "members")}
        return {name: value for name, value in data.items() if value or name in _ALWAYS_WRITTEN}

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """
        :param data: the result of a JSON parser
        :raises BadRecord: the data is not a manifest
        """
        return _FORM.convert(data, "a manifest").check()

    def check(self) -> Manifest:
        """
        Check the rules that the types of the fields do not express, for a manifest that was read.

        :returns: the same manifest, without null
        :raises BadRecord: the manifest breaks a rule
        """
        if None in _may_be_null(self.__dict__):
            return Manifest(
                **{name: value for name in _FIELDS if (value := self.__dict__[name]) is not None}
            ).check()
        try:
            self._check_names()
        except InvalidName as error:
            raise BadRecord(f"a manifest has a bad name: {error.message}") from error
        if (self.digest is None) != (self.kind is Kind.MACHINE):
            raise BadRecord(f"the manifest of {self.id} has {'a' if self.digest else 'no'} digest")
        if not 0 <= self.created < _LATEST:
            raise BadRecord("the field 'created' of a manifest is not a time")
        for table in (self.creator, self.labels, self.fingerprint):
            if table and sum(map(len, table)) + sum(map(len, table.values())) > LONGEST_TABLE:
                raise BadRecord(
                    f"the texts in a table of a manifest have more than {LONGEST_TABLE} characters"
                )
        end = 0
        for offset, length in self.extents:
            if offset < end or length <= 0 or offset + length > self.size:
                raise BadRecord(
                    "the extents of a manifest overlap, are out of order, or leave the file"
                )
            end = offset + length
        return self

    def _check_names(self) -> None:
        is_image = self.kind is Kind.IMAGE
        if isinstance(_object(self.object), Image) != is_image:
            raise BadRecord(f"a manifest gives the kind {self.kind} to {self.object}")
        _state_name(self.state, root=is_image)
        if self.parent is not None:
            _name(self.parent.state, "a state")
        if bool(self.members) != (self.kind is Kind.MACHINE):
            raise BadRecord("machines have members, and nothing else has")
        for name in self.members:
            member = parse_object(name) if name != "ram" else None
            if member is not None and (
                isinstance(member, Machine) or member.machine != self.object
            ):
                raise BadRecord(f"the machine {self.object} has the strange member {name!r}")


def check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """
    :param labels: the owner's labels of a state
    :returns: the same labels
    :raises UsageError: a manifest cannot hold them
    """
    if len(labels) > MAX_LABELS:
        raise UsageError(
            f"{len(labels)} labels are more than a state can have: {MAX_LABELS}",
            hint="put what is long into a file of its own",
        )
    for text in (text for item in labels.items() for text in item):
        if not isinstance(text, str):
            raise UsageError(
                f"{text!r} in a label is not a text",
                hint="labels are texts with names that are texts",
            )
        if len(text) > LONGEST_LABEL:
            raise UsageError(
                f"the label {text[:40]!r}… is longer than {LONGEST_LABEL} characters",
                hint="put what is long into a file of its own",
            )
        if not is_unicode(text):
            raise UsageError(f"the label {text!r} is not Unicode text", hint="write it in UTF-8")
    return labels


def is_unicode(text: str) -> bool:
    """
    :returns: whether a text can be encoded again: JSON can contain one half of a surrogate pair,
        which is not a character
    """
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


# The same object often occurs many times in a row, and many objects have states of the same names.
_object = lru_cache(maxsize=64)(parse_object)
_name = lru_cache(maxsize=256)(check_name)
_state_name = lru_cache(maxsize=256)(check_state_name)

_may_be_null = itemgetter("extents", "creator", "labels", "fingerprint", "members")
_FIELDS = [one.name for one in fields(Manifest)]
_ALWAYS_WRITTEN = frozenset({"object", "state", "kind", "size"})
_FORM = Form(Manifest)
