"""The posted list of a cart: it is checked completely before any work is done."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from typing import Any

import blake3
from attrs import asdict, frozen

from statepool import RefusedError, UsageError
from statepool.carts.archives import Archive, Wanted, check_plain
from statepool.carts.hashes import check_hash
from statepool.carts.settings import ServeSettings

_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")

RESERVED = frozenset({"carts", "pools", "page", "metrics", "healthz", "readyz"})
"""Reserved names that cannot be the uid of a cart, since the service uses them in its paths."""


@frozen
class Entry:
    """
    One file of a list.

    :param archive: the name of the archive that has it
    :param wanted: the wanted entry of that archive
    :param hash_type: type of the sum; it and the sum can be empty
    :param hash_sum: in hexadecimal
    """

    archive: str
    wanted: Wanted
    hash_type: str
    hash_sum: str


@frozen
class Request:
    """
    A request for a cart.

    :param entries: the files
    :param bundle: whether to make the tar in advance
    """

    entries: tuple[Entry, ...]
    bundle: bool

    @property
    def digest(self) -> str:
        """A digest of the list, the same for the same files in any order."""
        entries = sorted((asdict(entry) for entry in self.entries), key=json.dumps)
        form = json.dumps({"entries": entries, "bundle": self.bundle}, sort_keys=True)
        return f"blake3:{blake3.blake3(form.encode()).hexdigest()}"


def check_uid(text: str) -> str:
    """
    :returns: the checked uid of a cart
    :raises UsageError: no cart can have this uid
    """
    if not _UID.match(text) or text in RESERVED:
        hint = "use up to 128 letters, digits, ., _ and -, such as the output of uuidgen"
        raise UsageError(f"{text[:80]!r} cannot be the uid of a cart", hint=hint)
    return text


def parse_request(
    body: bytes, settings: ServeSettings, archives: Mapping[str, Archive], objects: str
) -> Request:
    """
    :param body: JSON
    :param objects: a pattern that the ids must match
    :raises UsageError: it is not a valid list; the message names the entry
    :raises RefusedError: an id is not permitted
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        hint = 'send {"fileids": [{"id", "path", "hashtype", "hashsum"}]}'
        raise UsageError(f"the list is not valid JSON: {str(error)[:200]}", hint=hint) from error
    fileids = _get(data, "fileids", list, "the list")
    bundle = _get(data, "bundle", bool, "the list", settings.bundle)
    if len(fileids) > settings.max_files:
        raise UsageError(
            f"{len(fileids)} files are more than a cart can have: {settings.max_files}",
            hint="divide them among several carts",
        )
    entries = []
    for number, item in enumerate(fileids):
        try:
            entries.append(_entry(item, settings, archives))
        except UsageError as error:
            text = f"fileids[{number}]: {error.message}"
            raise UsageError(text, hint=error.hint) from error
    for entry in entries:
        if not fnmatch.fnmatchcase(entry.wanted.id, objects):
            raise RefusedError(
                f"{entry.wanted.id} is not permitted to this token", hint=f"it is for {objects}"
            )
    _refuse_collisions(entries)
    return Request(tuple(entries), bundle)


def _entry(item: Any, settings: ServeSettings, archives: Mapping[str, Archive]) -> Entry:
    what = "the entry"
    number = item.get("id") if isinstance(item, dict) else None
    is_number = isinstance(number, int) and not isinstance(number, bool)
    name = str(number) if is_number else _get(item, "id", str, what)
    path = check_plain(_get(item, "path", str, what).lstrip("/"), "the path")
    chain = _get(item, "chain", bool, what, False)
    archive = _get(item, "archive", str, what, settings.archive)
    if archive not in archives:
        hint = f"there are {', '.join(archives)}"
        raise UsageError(f"there is no archive {archive[:40]!r}", hint=hint)
    export = _get(item, "export", bool, what, False)
    if export and not archives[archive].exports:
        hint = "leave export out, or name an archive of pools"
        raise UsageError(f"the archive {archive} has no states that can be exported", hint=hint)
    kind = _get(item, "hashtype", str, what, "")
    kind, value = check_hash(kind, _get(item, "hashsum", str, what, ""))
    wanted = Wanted(name, path, chain, export)
    archives[archive].check(wanted)
    return Entry(archive, wanted, kind, value)


def _get(data: Any, key: str, kind: type, what: str, default: Any = None) -> Any:
    if not isinstance(data, dict):
        raise UsageError(f"{what} is not a JSON object", hint="see docs/serve.rst")
    value = data.get(key, default)
    if value is None or not isinstance(value, kind):
        names = {list: "a list", bool: "true or false", str: "a text"}
        raise UsageError(f"{key!r} of {what} must be {names[kind]}", hint="see docs/serve.rst")
    return value


def _refuse_collisions(entries: list[Entry]) -> None:
    known: dict[str, str] = {}
    for entry in entries:
        path, name = entry.wanted.path, entry.wanted.id
        if path in known:
            raise UsageError(
                f"{known[path]} and {name} would both be at {path}", hint="give them other paths"
            )
        known[path] = name
    for path, name in known.items():
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if (above := "/".join(parts[:depth])) in known:
                raise UsageError(
                    f"{above} would be the file {known[above]}, and a directory with {name}",
                    hint="give them other paths",
                )
