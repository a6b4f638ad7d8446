"""
The choice of the carrier: the installed program ``ssh``, unless it is missing or another carrier is
configured.
"""

from __future__ import annotations

import os
import pwd
import shutil
from importlib.util import find_spec

from statepool.errors import ConfigError
from statepool.model.settings import CarrierName, Settings
from statepool.transports.ssh.carrier import Carrier, Endpoint


def choose(settings: Settings) -> tuple[CarrierName, str]:
    """
    :returns: the carrier to use, and why
    :raises ConfigError: no carrier can be used
    """
    program = shutil.which("ssh")
    if settings.carrier is CarrierName.PARAMIKO:
        return CarrierName.PARAMIKO, "it is configured"
    if settings.carrier is CarrierName.OPENSSH:
        if program is None:
            raise ConfigError(
                "carrier = openssh: there is no program ssh here",
                hint="install it (Debian: openssh-client), or leave out carrier",
            )
        return CarrierName.OPENSSH, "it is configured"
    if program is not None and _has_name():
        return CarrierName.OPENSSH, f"{program} is installed"
    why = (
        "the account of this process has no name, which ssh insists on"
        if program is not None
        else "there is no program ssh here"
    )
    if find_spec("paramiko") is None:
        raise ConfigError(
            f"nothing here carries SSH: {why}, and no Python package paramiko",
            hint="install ssh (Debian: openssh-client), or paramiko for this Python",
        )
    return CarrierName.PARAMIKO, why


def carrier_for(endpoint: Endpoint, settings: Settings) -> Carrier:
    """:returns: the carrier of a connection; it is not connected yet"""
    name, _ = choose(settings)
    if name is CarrierName.OPENSSH:
        from statepool.transports.ssh.openssh import OpenSSH

        return OpenSSH(endpoint, settings)
    from statepool.transports.ssh.library import Paramiko

    return Paramiko(endpoint, settings)


def _has_name() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True
