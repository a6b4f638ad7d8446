"""
What paramiko reads of a server or of an agent, bounded.

It reads zeros where a message has ended and goes on: a count of 2**32 - 1 that is all there is
keeps a processor busy for hours and fills the memory. And it takes a packet of any length.
"""

from __future__ import annotations

from functools import cache
from typing import Any

PACKET = 1 << 18
"""
The largest packet that a server is told we take, in bytes: one answer of 255 KiB, the most that
OpenSSH's SFTP server gives, fits into it.
"""

_LONGEST_PACKET = 2 * PACKET
"""
The longest that is read, in bytes: with the frame of a channel, padding and what a server may add
(RFC 4253, section 6.1, asks for 35,000).
"""

_LONGEST_REPLY = 1 << 18
"""
The longest reply of an agent, in bytes: as ssh (``MAX_AGENT_REPLY_LEN`` in OpenSSH's ``authfd.c``).
"""

REKEY_BYTES = 1 << 33
"""
New keys are agreed on after so many bytes. paramiko's half a GiB interrupts a transfer every second
or so; RFC 4344, section 3.2, asks for it after 2**32 blocks of AES, which are 64 GiB.
"""


def packetizer() -> Any:
    """
    :returns: a class for the ``packetizer_class`` of a transport, whose messages end where they end
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
    :returns: paramiko's connection to the agent, with its keys; it waits without end
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
    """:returns: the same message, which raises ValueError where more is asked for than there is"""
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
