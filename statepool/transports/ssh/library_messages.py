"""
Limits on what paramiko reads from a server or from an agent.

paramiko reads zeros after the end of a message and continues: a message of only a count of 2**32 -
1 keeps a processor busy for hours and fills the memory. It also accepts a packet of any length.
"""

from __future__ import annotations

from functools import cache
from typing import Any

PACKET = 1 << 18
"""
The largest packet that we announce to a server, in bytes: one answer of 255 KiB, the most that
OpenSSH's SFTP server gives, fits into it.
"""

_LONGEST_PACKET = 2 * PACKET
"""
The longest packet that is read, in bytes: with the frame of a channel, padding and what a server
may add (RFC 4253, section 6.1, asks for 35,000).
"""

_LONGEST_REPLY = 1 << 18
"""
The longest reply of an agent, in bytes: the same limit as in ssh (``MAX_AGENT_REPLY_LEN`` in
OpenSSH's ``authfd.c``).
"""

REKEY_BYTES = 1 << 33
"""
Bytes after which new keys are negotiated. paramiko's default of half a GiB interrupts a transfer
about every second; RFC 4344, section 3.2, requires it after 2**32 blocks of AES, which are 64 GiB.
"""


def packetizer() -> Any:
    """
    :returns: a class for the ``packetizer_class`` of a transport, with messages that cannot be read
        beyond their end
    """
    from paramiko.packet import Packetizer

    class Bounded(Packetizer):  # type: ignore[misc]  # paramiko has no types
        def read_all(self, n: int, check_rekey: bool = False) -> bytes:
            if n > _LONGEST_PACKET:
                raise ValueError(f"a packet of {n} bytes")
            data: bytes = super().read_all(n, check_rekey)
            return data

        def read_message(self) -> tuple[int, Any]:
            kind, message = super().read_message()
            return kind, _ending(message)

    Bounded.REKEY_BYTES = REKEY_BYTES
    return Bounded


def open_agent() -> Any:
    """
    :returns: paramiko's connection to the agent, with its keys; the call has no timeout
    :raises ValueError: the agent does not keep to the protocol
    """
    from paramiko import Agent

    class Bounded(Agent):  # type: ignore[misc]
        def __init__(self) -> None:
            try:
                super().__init__()
            except BaseException:
                self.close()
                raise

        def _read_all(self, wanted: int) -> Any:
            if wanted > _LONGEST_REPLY:
                raise ValueError(f"a reply of {wanted} bytes")
            return super()._read_all(wanted)

        def _send_message(self, message: Any) -> tuple[int, Any]:
            kind, reply = super()._send_message(message)
            return kind, _ending(reply)

    return Bounded()


def _ending(message: Any) -> Any:
    """:returns: the same message, which raises ValueError when it is read beyond its end"""
    message.__class__ = _ending_class()
    return message


@cache
def _ending_class() -> Any:
    from paramiko import Message

    class Ending(Message):  # type: ignore[misc]
        def get_bytes(self, n: int) -> bytes:
            data: bytes = self.packet.read(n)
            if len(data) < n:
                raise ValueError(f"a message that ends {n - len(data)} bytes early")
            return data

    return Ending
