"""
The agent that has keys of ours (draft-miller-ssh-agent): it says which, and signs with them.

It may have stopped, or be at the other end of a link that hangs, so no wait for it is without end. It gets half of the time that is left for
connecting: then there is still time for what else there is to offer.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import Any

from attrs import define

from statepool.transports.ssh.keys import UnusableKey

_REQUEST_IDENTITIES, _IDENTITIES_ANSWER = 11, 12
_SIGN_REQUEST, _SIGN_RESPONSE = 13, 14
"""Section 6.1 there."""

_SHARE = 0.5

_LARGEST = 256 << 10
"""Bytes of an answer: the limit that OpenSSH's own agent has."""


class AgentFailure(Exception):
    """It did not do what it was asked for; the text says why."""


@define(eq=False)
class Agent:
    """
    A connection to the agent. Made by :meth:`reached`.

    :param link: a connected socket
    :param deadline: when all of the connecting has to be done, by the monotonic clock
    """

    link: socket.socket
    deadline: float
    failed: bool = False
    """It fell silent, or spoke nonsense: there is no use in asking it again."""

    @classmethod
    def reached(cls, deadline: float) -> Agent | None:
        """
        :param deadline: when all of the connecting has to be done, by the monotonic clock
        :returns: the agent that ``SSH_AUTH_SOCK`` names, or None if there is none
        :raises AgentFailure: it cannot be reached
        """
        path = os.environ.get("SSH_AUTH_SOCK")
        if not path:
            return None
        seconds = _share_of(deadline)
        link = socket.socket(socket.AF_UNIX)
        try:
            # A socket of Python's with a timeout gives up at once where others wait for the agent, too.
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))
            link.connect(path)
        except BlockingIOError as error:
            link.close()
            raise AgentFailure(_silent(seconds)) from error
        except OSError as error:
            link.close()
            raise AgentFailure(f"cannot be reached at {path} ({error.strerror or error})") from error
        return cls(link, deadline)

    def public_keys(self) -> list[tuple[bytes, str]]:
        """
        :returns: the public keys that it has, each with its comment
        :raises AgentFailure: it does not say
        """
        from paramiko.message import Message

        answer = self._asked(bytes([_REQUEST_IDENTITIES]))
        if answer[:1] != bytes([_IDENTITIES_ANSWER]):
            raise AgentFailure("does not say which keys it has")
        fields = Message(answer[1:])
        # paramiko gives zeros where an answer is too short: no more keys are asked of it than there is room for
        count = min(fields.get_int(), len(answer) // 8)
        return [(fields.get_binary(), fields.get_binary().decode("utf-8", "replace")) for _ in range(count)]

    def sign(self, blob: bytes, data: bytes, flags: int) -> bytes:
        """
        :param blob: the public key
        :param data: what is to be signed
        :param flags: the algorithm, where a key has several (section 6.1 there)
        :raises AgentFailure: it does not sign
        """
        from paramiko.message import Message

        request = Message()
        request.add_byte(bytes([_SIGN_REQUEST]))
        request.add_string(blob)
        request.add_string(data)
        request.add_int(flags)
        answer = self._asked(request.asbytes())
        if answer[:1] != bytes([_SIGN_RESPONSE]):
            raise AgentFailure("refused")
        signature: bytes = Message(answer[1:]).get_binary()
        return signature

    def close(self) -> None:
        """End the connection."""
        self.link.close()

    def _asked(self, request: bytes) -> bytes:
        seconds = _share_of(self.deadline)
        until = time.monotonic() + seconds
        try:
            self.link.settimeout(seconds)
            self.link.sendall(struct.pack(">I", len(request)) + request)
            (length,) = struct.unpack(">I", self._read(4, until))
            if length > _LARGEST:
                raise AgentFailure("does not keep to the protocol")
            return self._read(length, until)
        except TimeoutError as error:
            self.failed = True
            raise AgentFailure(_silent(seconds)) from error
        except OSError as error:
            self.failed = True
            raise AgentFailure(f"the connection was lost ({error.strerror})") from error
        except AgentFailure:
            self.failed = True
            raise

    def _read(self, wanted: int, until: float) -> bytes:
        data = b""
        while len(data) < wanted:
            self.link.settimeout(max(0.001, until - time.monotonic()))
            more = self.link.recv(wanted - len(data))
            if not more:
                raise AgentFailure("ended the connection")
            data += more
        return data


def agent_key(agent: Agent, blob: bytes, comment: str) -> Any:
    """
    :param agent: who has it
    :param blob: the public key
    :returns: a key of paramiko that the agent signs with; its ``failure`` says why the agent did not
    :raises UnusableKey: it cannot be read
    """
    from paramiko.agent import ALGORITHM_FLAG_MAP, AgentKey
    from paramiko.message import Message

    class Key(AgentKey):  # type: ignore[misc]  # paramiko has no types
        failure: str | None = None

        def sign_ssh_data(self, data: bytes, algorithm: str | None = None) -> bytes:
            try:
                return agent.sign(self.asbytes(), data, ALGORITHM_FLAG_MAP.get(algorithm, 0))
            except AgentFailure as error:
                self.failure = f"the agent did not sign with it: {error}"
                # paramiko signs in the thread of its connection, which an error would end: the server refuses this one instead, and we go on
                void = Message()
                void.add_string(algorithm or self.get_name())
                void.add_string(bytes(64))
                return bytes(void.asbytes())

    try:
        return Key(agent, blob, comment)
    except Exception as error:  # a parser raises whatever it stumbles over
        raise UnusableKey(str(error) or type(error).__name__) from error


def _share_of(deadline: float) -> float:
    return max(0.1, _SHARE * (deadline - time.monotonic()))


def _silent(seconds: float) -> str:
    return f"no answer for {round(seconds, 1):g} seconds"
