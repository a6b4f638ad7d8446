"""
Keys of ours, in files.

The library for cryptography reads them, since it knows more formats and ciphers of ssh-keygen than paramiko, which signs with them.
"""

from __future__ import annotations

import binascii
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_OPENSSH = b"-----BEGIN OPENSSH PRIVATE KEY-----"


class UnusableKey(Exception):
    """A key that cannot be used; the text says why."""


def load_key(path: Path, passphrase: Callable[[], str | None]) -> Any:
    """
    :param path: the file
    :param passphrase: asked for it if the file needs one; None, or an empty text: there is none
    :returns: a key of paramiko
    :raises FileNotFoundError: there is no such file
    :raises UnusableKey: it cannot be read
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnusableKey(f"cannot be read: {error.strerror}") from error
    try:
        return _for_paramiko(_read(data, None))
    except TypeError:  # this is how it is said that a passphrase is needed
        return _for_paramiko(_unlocked(data, passphrase()))


def add_certificate(key: Any, path: Path) -> None:
    """
    :param key: a key of paramiko, which gets the certificate beside its file, if there is one
    :param path: the file of the key
    :raises UnusableKey: the certificate cannot be read
    """
    certificate = path.with_name(path.name + "-cert.pub")
    if not os.path.lexists(certificate):
        return
    try:
        key.load_certificate(str(certificate))
    except Exception as error:  # a parser raises whatever it stumbles over
        raise UnusableKey(f"cannot be read ({_said(error)})") from error


def public_blob(path: Path) -> bytes | None:
    """:returns: the public half of a key, where its file lies beside that of the private one"""
    try:
        fields = path.with_name(path.name + ".pub").read_text(encoding="utf-8", errors="replace").split()
        return binascii.a2b_base64(fields[1]) if len(fields) > 1 else None
    except (OSError, ValueError):
        return None


def _read(data: bytes, passphrase: bytes | None) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    try:
        return (load_ssh_private_key if _OPENSSH in data else load_pem_private_key)(data, passphrase)
    except TypeError:
        raise
    except UnsupportedAlgorithm as error:
        raise UnusableKey(f"is a key of a kind that only the agent can use ({_said(error)})") from error
    except Exception as error:
        raise UnusableKey(f"is not a private key ({_said(error)})") from error


def _unlocked(data: bytes, passphrase: str | None) -> Any:
    if not passphrase:
        raise UnusableKey("needs a passphrase, and there is none")
    try:
        return _read(data, passphrase.encode(errors="surrogateescape"))
    except (UnusableKey, TypeError, UnicodeEncodeError) as error:
        from cryptography.exceptions import UnsupportedAlgorithm

        if isinstance(error.__cause__, UnsupportedAlgorithm):
            raise
        raise UnusableKey("the passphrase is not the right one") from error


def _for_paramiko(loaded: Any) -> Any:
    """Handed over in the one format that it reads of every kind of key."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from paramiko import ECDSAKey, Ed25519Key, RSAKey

    kinds: dict[type, Any] = {RSAPrivateKey: RSAKey, Ed25519PrivateKey: Ed25519Key, EllipticCurvePrivateKey: ECDSAKey}
    kind = next((kinds[known] for known in kinds if isinstance(loaded, known)), None)
    if kind is None:
        raise UnusableKey("is a key of a kind that only the agent can use")
    try:
        text = loaded.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
        return kind.from_private_key(io.StringIO(text))
    except Exception as error:
        raise UnusableKey(f"is a key of a kind that only the agent can use ({_said(error)})") from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
