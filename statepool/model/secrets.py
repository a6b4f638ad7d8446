"""
Passwords and passphrases: who is asked for them, and what is given where nobody needs to be asked.

They are never part of what a value prints, nor of a location, a message, a log or a command line.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from attrs import field, frozen

VARIABLES = {"password": "STATEPOOL_SSH_PASSWORD", "passphrase": "STATEPOOL_SSH_PASSPHRASE"}
"""
Where the configuration finds secrets in the environment. No program that we start inherits them.
"""

CART_TOKEN = "STATEPOOL_CART_TOKEN"
"""Where the command line finds the token for a service of carts: likewise."""

SECRET_VARIABLES = (*VARIABLES.values(), CART_TOKEN)
"""All of these."""


class SecretKind(enum.StrEnum):
    """What is asked for."""

    PASSWORD = "password"
    PASSPHRASE = "passphrase"


Secrets = Callable[[SecretKind, str], str | None]
"""
Asked for a secret when it is needed: its kind, and what it is for (``user@host:port`` of an
account, the path of a key file). None stands for "there is none". It may be asked from any thread.
"""


@frozen
class GivenSecrets:
    """
    The same answer for every account, and for every key.

    :param password: for accounts
    :param passphrase: for key files
    """

    password: str | None = field(default=None, repr=False)
    passphrase: str | None = field(default=None, repr=False)

    def __call__(self, kind: SecretKind, subject: str) -> str | None:
        """
        :param kind: what is asked for
        :param subject: what it is for; the answer does not depend on it
        """
        return self.password if kind is SecretKind.PASSWORD else self.passphrase
