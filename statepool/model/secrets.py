"""
Passwords and passphrases: a function that is asked for them, or fixed answers.

They are never part of the printed form of a value, of a location, a message, a log or a command
line.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from attrs import field, frozen

VARIABLES = {"password": "STATEPOOL_SSH_PASSWORD", "passphrase": "STATEPOOL_SSH_PASSPHRASE"}
"""
The environment variables from which the configuration reads secrets. No program that we start
inherits them.
"""

CART_TOKEN = "STATEPOOL_CART_TOKEN"
"""Where the command line finds the token for a service of carts: likewise."""

SECRET_VARIABLES = (*VARIABLES.values(), CART_TOKEN)
"""All of these."""


class SecretKind(enum.StrEnum):
    """The kind of a secret."""

    PASSWORD = "password"
    PASSPHRASE = "passphrase"


Secrets = Callable[[SecretKind, str], str | None]
"""
A function that returns a secret when it is needed. Its arguments are the kind, and what the secret
is for (``user@host:port`` of an account, the path of a key file). It returns None if there is no
secret. It may be called from any thread.
"""


@frozen
class GivenSecrets:
    """
    Fixed secrets: the same for every account, and for every key file.

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
