"""
The keys of hosts that are known: the files of sshd(8), section "SSH_KNOWN_HOSTS FILE FORMAT".

A line has names (or patterns, or the salted hash of one name), the type of a key, and the key; ``@revoked`` before it says that the key is not to be
believed. Authorities that certify hosts (``@cert-authority``) are passed over.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import os
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from statepool.errors import ConfigError


@frozen
class HostKey:
    """
    A key that some host has, or had.

    :param type: such as ``ssh-ed25519``
    :param blob: the public key as it goes over the wire (RFC 4253, section 6.6)
    """

    type: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -l`` prints it."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    def line(self, name: str) -> str:
        """:returns: the line of ``known_hosts`` that admits it"""
        return f"{name} {self.type} {base64.b64encode(self.blob).decode()}"


@frozen
class Known:
    """
    A key in a file.

    :param key: the key
    :param revoked: it is not to be believed, whoever has it
    :param path: the file
    :param number: the line there, from 1
    """

    key: HostKey
    revoked: bool
    path: Path
    number: int


def known_keys(files: tuple[Path, ...], name: str) -> list[Known]:
    """
    :param files: files of that format; those that do not exist are passed over
    :param name: as they spell it: ``host``, or ``[host]:port`` where the port is not 22
    :returns: the keys that are known for it, in their order
    :raises ConfigError: a file cannot be read
    """
    return [known for path in files for known in _known_in(path, name)]


def _known_in(path: Path, name: str) -> Iterator[Known]:
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint="it holds the keys of hosts that are trusted", path=str(path)) from error
    for number, line in enumerate(lines, 1):
        fields = line.split()
        marker = fields.pop(0) if fields and fields[0].startswith("@") else None
        if len(fields) < 3 or fields[0].startswith("#") or marker not in (None, "@revoked") or not _is_meant(fields[0], name):
            continue
        try:
            blob = base64.b64decode(fields[2], validate=True)
        except (binascii.Error, ValueError):
            continue  # as ssh does: a line that cannot be read admits nobody
        yield Known(HostKey(fields[1], blob), marker is not None, path, number)


def _is_meant(names: str, name: str) -> bool:
    if names.startswith("|"):
        return _is_hash_of(names, name)
    meant = False
    for pattern in names.split(","):
        if fnmatch.fnmatchcase(name.lower(), _escaped(pattern.removeprefix("!").lower())):
            if pattern.startswith("!"):
                return False
            meant = True
    return meant


def _escaped(pattern: str) -> str:
    """Brackets stand for themselves there: only ``*`` and ``?`` are special."""
    return pattern.replace("[", "[[]")


def _is_hash_of(text: str, name: str) -> bool:
    """``|1|SALT|HASH``: both in base64, the hash is the HMAC-SHA1 of the name in small letters."""
    parts = text.split("|")
    if len(parts) != 4 or parts[1] != "1":
        return False
    try:
        salt, wanted = (base64.b64decode(part, validate=True) for part in parts[2:])
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(hmac.new(salt, os.fsencode(name.lower()), "sha1").digest(), wanted)
