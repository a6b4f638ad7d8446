"""
What a pool knows of a state.

The JSON form is the one of the pool's log; ``docs/formats.rst`` describes it field by field. Everything that is read goes through
:meth:`Manifest.from_json`, which believes nothing.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from attrs import field, frozen

from statepool.errors import BadRecord, InvalidName, UsageError
from statepool.model.digest import Digest
from statepool.model.names import ROOT_STATES, check_name, check_state_name
from statepool.model.objects import Image, Machine, parse_object

MAX_EXTENTS = 1000
"""Most data extents that a manifest lists; nearest ones are merged until they fit."""

MAX_LABELS = 64
"""Most labels that a manifest carries."""

LONGEST_LABEL = 4096
"""Characters of one label, and of its name."""

LONGEST_TABLE = MAX_LABELS * 2 * LONGEST_LABEL
"""Characters of all names and texts of one table of a manifest: what labels can have at most, when written as when read."""

ROOT = "root"
"""The one name under which pools keep a root image; the other reserved names are read as this one."""


class Kind(enum.StrEnum):
    """What the bytes of a state are."""

    IMAGE = "image"
    """A qcow2 image."""
    RAM = "ram"
    """The RAM of a machine, as QEMU's migration stream."""
    MACHINE = "machine"
    """No bytes of its own: a list of members."""

    __hash__ = str.__hash__  # that of enumerations is slow, and kinds are part of many keys


_KINDS = {str(kind): kind for kind in Kind}


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


Key = tuple[str, str, str]
"""What the states of one machine that are present are told apart by: object, name and digest."""


@frozen(slots=False)
class Manifest:
    """
    What a pool knows of a state.

    One of many that were read together knows its :attr:`id` and its keys, and makes the rest when somebody looks at it.

    :param object: what the state is a state of
    :param state: its name
    :param kind: what its bytes are
    :param size: length of its bytes
    :param digest: the name of its bytes; None for a machine, and for an unmanaged file that nobody has hashed
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
    size: int = 0
    digest: Digest | None = None
    origin: Digest | None = None
    parent: Parent | None = None
    virtual_size: int = 0
    cluster_size: int = 0
    extents: tuple[tuple[int, int], ...] = ()
    created: float = 0.0
    creator: Mapping[str, str] = field(factory=dict)
    labels: Mapping[str, str] = field(factory=dict)
    fingerprint: Mapping[str, str] = field(factory=dict)
    members: Mapping[str, Digest] = field(factory=dict)

    @property
    def id(self) -> StateId:
        """What it is told apart by."""
        kept: StateId | None = self.__dict__.get("_id")
        if kept is None:
            kept = self.__dict__["_id"] = StateId(self.object, self.state, self.kind)
        return kept

    @property
    def key(self) -> Key | None:
        """What it is told apart by from others of its name; None if it has no bytes."""
        if "_key" not in self.__dict__:
            self.__dict__["_key"] = (self.object, self.state, str(self.digest)) if self.digest is not None else None
        kept: Key | None = self.__dict__["_key"]
        return kept

    @property
    def parent_key(self) -> Key | None:
        """The :attr:`key` of what backs it, or None."""
        if "_parent_key" not in self.__dict__:
            self.__dict__["_parent_key"] = parent_key(self.object, self.parent) if self.parent is not None else None
        kept: Key | None = self.__dict__["_parent_key"]
        return kept

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
        Tell whether ``digest`` names these bytes, or those that they were rewritten from. Ask it of a state of our own cache only: the ``origin``
        that the log of another pool gives is a claim.
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
        Make the manifest of a copy from that of another pool: only the name and what its owner wrote down are taken over. The caller gives all facts,
        which it knows from the bytes.
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
        return {
            key: value
            for key, value in (
                ("object", self.object),
                ("state", self.state),
                ("kind", str(self.kind)),
                ("size", self.size),
                ("digest", str(self.digest) if self.digest else None),
                ("origin", str(self.origin) if self.origin else None),
                ("parent", {"state": self.parent.state, "digest": str(self.parent.digest)} if self.parent else None),
                ("virtual_size", self.virtual_size or None),
                ("cluster_size", self.cluster_size or None),
                ("extents", [list(extent) for extent in self.extents] or None),
                ("created", self.created or None),
                ("creator", dict(self.creator) or None),
                ("labels", dict(self.labels) or None),
                ("fingerprint", dict(self.fingerprint) or None),
                ("members", {name: str(digest) for name, digest in self.members.items()} or None),
            )
            if value is not None
        }

    @classmethod
    def unread(cls, images: Sequence[dict[str, Any]]) -> list[Manifest]:
        """
        :param images: what a JSON reader made of manifests of images that have been found good
        :returns: the manifests, which are read when somebody looks at them
        """
        found = []
        for one in images:
            manifest = cls.__new__(cls)
            subject, state, parent = one["object"], one["state"], one.get("parent")
            values = manifest.__dict__
            values["_unread"] = one
            values["_id"] = StateId(subject, state)
            values["_key"] = (subject, state, one["digest"])
            values["_parent_key"] = (subject, parent["state"], parent["digest"]) if parent is not None else None
            found.append(manifest)
        return found

    if not TYPE_CHECKING:  # to a type checker, there are the fields and nothing else

        def __getattr__(self, name: str) -> Any:
            """Called for what is not there yet."""
            values = self.__dict__
            unread = values.get("_unread")
            if unread is not None and not name.startswith("__"):
                values.update(Manifest.from_json(unread).__dict__)
                values.pop("_unread", None)
            try:
                return values[name]  # another thread can have read it meanwhile
            except KeyError:
                raise AttributeError(f"a manifest has no {name!r}") from None

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """
        :param data: what a JSON reader made of it
        :raises BadRecord: it is not a manifest
        """
        if not isinstance(data, dict):
            raise BadRecord("a manifest is not a JSON object")
        kind = _KINDS.get(_text(data.get("kind", "image"), "kind"))
        if kind is None:
            raise BadRecord(f"a manifest has the unknown kind {data['kind'][:40]!r}")
        try:
            subject, state = _names(data, kind)
            digest = data.get("digest")
            origin = data.get("origin")
            if (digest is None) != (kind is Kind.MACHINE):
                raise BadRecord(f"the manifest of {subject} {state} has {'a' if digest else 'no'} digest")
            size = _count(data, "size")
            return cls(
                object=subject,
                state=state,
                kind=kind,
                size=size,
                digest=_digest(_text(digest, "digest")) if digest is not None else None,
                origin=_digest(_text(origin, "origin")) if origin is not None else None,
                parent=_parent(data["parent"]) if "parent" in data else None,
                virtual_size=_count(data, "virtual_size"),
                cluster_size=_count(data, "cluster_size"),
                extents=_extents(data["extents"], size) if "extents" in data else (),
                created=_time(data.get("created", 0.0)),
                creator=_strings(data, "creator") if "creator" in data else {},
                labels=_strings(data, "labels") if "labels" in data else {},
                fingerprint=_strings(data, "fingerprint") if "fingerprint" in data else {},
                members=_members(data.get("members"), kind, subject),
            )
        except InvalidName as error:
            raise BadRecord(f"a manifest has a bad name: {error.message}") from error


def parent_key(object: str, parent: Parent) -> Key:
    """:returns: the :attr:`Manifest.key` of what backs a state of ``object``"""
    return (object, parent.state, str(parent.digest))


def _names(data: dict[str, Any], kind: Kind) -> tuple[str, str]:
    subject = _text(data.get("object"), "object")
    state = _text(data.get("state"), "state")
    is_image = isinstance(_object(subject), Image)
    if is_image != (kind is Kind.IMAGE):
        raise BadRecord(f"a manifest gives the kind {kind} to {subject}")
    if state != ROOT or not is_image:
        check_state_name(state)
    return subject, state


def check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """
    :param labels: what an owner wants to remember with a state
    :returns: the same
    :raises UsageError: a manifest cannot hold them
    """
    if len(labels) > MAX_LABELS:
        raise UsageError(f"{len(labels)} labels are more than a state can have: {MAX_LABELS}", hint="put what is long into a file of its own")
    for text in (text for item in labels.items() for text in item):
        if not isinstance(text, str):
            raise UsageError(f"{text!r} in a label is not a text", hint="labels are texts with names that are texts")
        if len(text) > LONGEST_LABEL:
            raise UsageError(f"the label {text[:40]!r}… is longer than {LONGEST_LABEL} characters", hint="put what is long into a file of its own")
        if not is_unicode(text):
            raise UsageError(f"the label {text!r} is not Unicode text", hint="write it in UTF-8")
    return labels


def is_unicode(text: str) -> bool:
    """:returns: whether a text can be written again: JSON can have half of a pair of surrogates, which is no character"""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


# What comes many times in a row, as objects and the digests of parents do.
_object = lru_cache(maxsize=64)(parse_object)
_digest = lru_cache(maxsize=64)(Digest.parse)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or len(value) > 4096 or not is_unicode(value):
        raise BadRecord(f"the field {name!r} of a manifest is not a text")
    return value


def _count(data: dict[str, Any], name: str) -> int:
    value = data.get(name, 0)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise BadRecord(f"the field {name!r} of a manifest is not a size in bytes")
    return value


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise BadRecord("the field 'created' of a manifest is not a time")
    return float(value)


def _strings(data: dict[str, Any], name: str) -> dict[str, str]:
    value = data.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LABELS or not are_texts(value):
        raise BadRecord(f"the field {name!r} of a manifest is not a table of at most {MAX_LABELS} texts")
    if is_long(value):
        raise BadRecord(f"the texts in the field {name!r} of a manifest have more than {LONGEST_TABLE} characters")
    return value


def is_long(table: Mapping[str, str]) -> bool:
    """:returns: whether the texts of a table are longer than what is read"""
    return sum(map(len, table)) + sum(map(len, table.values())) > LONGEST_TABLE


def are_texts(*tables: dict[str, Any]) -> bool:
    """:returns: whether all names and values in tables are Unicode texts"""
    names, values = chain.from_iterable(tables), list(chain.from_iterable(map(dict.values, tables)))
    return set(map(type, values)) <= {str} and is_unicode("".join(names)) and is_unicode("".join(values))


def _parent(value: object) -> Parent | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadRecord("the parent in a manifest is not a JSON object")
    state = _text(value.get("state"), "parent.state")
    if state not in ROOT_STATES:
        check_name(state, "a state")
    return Parent(state, _digest(_text(value.get("digest"), "parent.digest")))


def _extents(value: object, size: int) -> tuple[tuple[int, int], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_EXTENTS:
        raise BadRecord(f"the extents of a manifest are not a list of at most {MAX_EXTENTS}")
    extents: list[tuple[int, int]] = []
    end = 0
    for pair in value:
        if type(pair) is not list or len(pair) != 2:
            raise BadRecord("an extent of a manifest is not a pair of an offset and a length")
        offset, length = pair
        if type(offset) is not int or type(length) is not int:
            raise BadRecord("an extent of a manifest is not a pair of an offset and a length")
        if offset < end or length <= 0 or offset + length > size:
            raise BadRecord("the extents of a manifest overlap, are out of order, or leave the file")
        end = offset + length
        extents.append((offset, length))
    return tuple(extents)


def _members(value: object, kind: Kind, machine: str) -> dict[str, Digest]:
    if (value is None) != (kind is not Kind.MACHINE):
        raise BadRecord("machines have members, and nothing else has")
    if value is None:
        return {}
    if not isinstance(value, dict) or not value:
        raise BadRecord("the members in a manifest are not a JSON object")
    for name in value:
        if name == "ram":
            continue
        member = parse_object(name)
        if isinstance(member, Machine) or member.machine != machine:
            raise BadRecord(f"the machine {machine} has the strange member {name!r}")
    return {name: Digest.parse(_text(digest, "members")) for name, digest in value.items()}
