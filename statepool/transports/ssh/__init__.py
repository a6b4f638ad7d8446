"""
Pools on other hosts, over SSH: files by SFTP, with the help of a shell where the account has one.

paramiko is loaded by the modules in here, and only when one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statepool.transports.ssh.transport import SSHTransport

__all__ = ["SSHTransport"]


def __getattr__(name: str) -> Any:
    if name == "SSHTransport":
        from statepool.transports.ssh.transport import SSHTransport

        return SSHTransport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
