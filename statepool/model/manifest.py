"""
What a pool knows of a state.

The JSON form is the one of the pool's log; ``docs/formats.rst`` describes it field by field. A
reader decodes it by the types of the fields (:mod:`~statepool.model.decoding`), and then asks each
manifest to :meth:`~Manifest.check` what types cannot say.
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
"""Most data extents that a manifest lists; nearest ones are merged until they fit."""

MAX_LABELS = 64
"""Most labels that a manifest carries."""

LONGEST_LABEL = 4096
"""Characters of one label, and of its name."""

LONGEST_TABLE = MAX_LABELS * 2 * LONGEST_LABEL
"""
Characters of all names and texts of one table of a manifest: what labels can have at most, when
written as when read.
"""

_LATEST = 1e12
"""Seconds since the epoch, beyond any clock that works."""


class Kind(enum.StrEnum):
    """What the bytes of a state are."""

    IMAGE = "image"
    """A qcow2 image."""
    RAM = "ram"
    """The RAM of a machine, as QEMU's migration stream."""
    MACHINE = "machine"
    """No bytes of its own: a list of members."""

    __hash__ = str.__hash__  # that of enumerations is slow, and kinds are part of many keys


# Thousands of these are made and looked up whenever a log is read: hence a tuple.
class StateId(NamedTuple):
    """
    What the states of one machine are told apart by.

    :param object: ``machine/image`` or ``machine``
    :param state: the name
    :param kind: a machine's state and its RAM share object and name
    """

    object: str
    state: str
    kind: Kind = Kind.IMAGE

    def __str__(self) -> str:
        return f"{self.object} {self.state}" + (" (RAM)" if self.kind is Kind.RAM else "")

    @property
    def machine(self) -> str:
        """The id of the machine whose log speaks of this state."""
        return self.object.partition("/")[0]


@frozen(order=True)
class Parent:
    """What backs a state: the name and the digest of the state directly below."""

    state: str
    digest: Digest


Key = tuple[str, str, Digest]
"""What the states of one machine that are present are told apart by: object, name and digest."""


Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]

if TYPE_CHECKING:  # a manifest has no null where one that is read may have it
    Extents = tuple[tuple[int, int], ...]
    Texts = Mapping[str, str]
    Members = Mapping[str, Digest]
else:
    Extents = Annotated[tuple[tuple[int, int], ...], Meta(max_length=MAX_EXTENTS)] | None
    Texts = Annotated[Mapping[str, str], Meta(max_length=MAX_LABELS)] | None
    Members = Annotated[Mapping[str, Digest], Meta(min_length=1)] | None


class _Keys:
    """
    What a manifest is found by: made with it once, since a fold asks for them again and again.
    """

    id: StateId
    """What it is told apart by."""
    key: Key | None
    """What it is told apart by from others of its name; None if it has no bytes."""
    parent_key: Key | None
    """The :attr:`key` of what backs it, or None."""


@frozen(slots=False)
class Manifest(_Keys):
    """
    What a pool knows of a state.

    :param object: what the state is a state of
    :param state: its name
    :param kind: what its bytes are
    :param size: length of its bytes
    :param digest: the name of its bytes; None for a machine, and for an unmanaged file that nobody
        has hashed
    :param origin: the digest of the bytes that these were rewritten from, where they were
    :param parent: what backs it, or None
    :param virtual_size: size of the disk that a guest sees, in bytes
    :param cluster_size: of the qcow2 file, in bytes
    :param extents: where the file has data, as (offset, length) in bytes; empty means everywhere
    :param created: seconds since the epoch
    :param creator: what made it: versions and host
    :param labels: whatever its owner wants to remember
    :param fingerprint: of RAM: what can load it
    :param members: of a machine: the digests of its images and RAM, by ``machine/image`` or ``ram``
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
        """The plain name by which children and people know its file."""
        return self.state + (".state" if self.kind is Kind.RAM else ".qcow2")

    @property
    def data_size(self) -> int:
        """Bytes that are not holes, at most."""
        return sum(length for _, length in self.extents) if self.extents else self.size

    def is_content(self, digest: Digest) -> bool:
        """
        Tell whether ``digest`` names these bytes, or those that they were rewritten from. Ask it of
        a state of our own cache only: the ``origin`` that the log of another pool gives is a claim.
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
        Make the manifest of a copy from that of another pool: only the name and what its owner
        wrote down are taken over. The caller gives all facts, which it knows from the bytes.
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
        """Bytes that the texts which nothing can be derived from take in a log."""
        tables = [table for table in (self.creator, self.labels, self.fingerprint) if table]
        return sum(len(json.dumps(dict(table), ensure_ascii=False).encode()) for table in tables)

    def to_json(self) -> dict[str, Any]:
        """:returns: the form in a record: fields without a value are left out"""
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
        :param data: what a JSON reader made of it
        :raises BadRecord: it is not a manifest
        """
        return _FORM.convert(data, "a manifest").check()

    def check(self) -> Manifest:
        """
        Find out what the types of the fields do not say of a manifest that was read.

        :returns: the same, without a null
        :raises BadRecord: it breaks a rule
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
    :param labels: what an owner wants to remember with a state
    :returns: the same
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
    :returns: whether a text can be written again: JSON can have half of a pair of surrogates, which
        is no character
    """
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


# The states of one object come many times in a row, and many objects have states of the same names.
_object = lru_cache(maxsize=64)(parse_object)
_name = lru_cache(maxsize=256)(check_name)
_state_name = lru_cache(maxsize=256)(check_state_name)

_may_be_null = itemgetter("extents", "creator", "labels", "fingerprint", "members")
_FIELDS = [one.name for one in fields(Manifest)]
_ALWAYS_WRITTEN = frozenset({"object", "state", "kind", "size"})
_FORM = Form(Manifest)
