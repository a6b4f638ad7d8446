"""The features of an SFTP server, and the translation of its refusals."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from statepool.errors import AccessDenied, MissingFile, NoSpace, TransportError
from statepool.transports.base import small_file_mode
from statepool.transports.failures import Subject
from statepool.transports.ssh.packets import (
    LIMITS,
    Answer,
    Code,
    Kind,
    Limits,
    Refused,
    attributes_in,
    extension,
    numbers_in,
    string,
)
from statepool.transports.ssh.sftp import Sftp

_MARGIN = 1 << 20
"""
Bytes that may still be free on a disk that is full for this account: file systems reserve some.
"""

_LEAST = 4 << 10
"""
The smallest limit of one request that is accepted, in bytes. With a smaller one, a file would be
cut into so many pieces that they take more memory than the file.
"""


@frozen
class Server:
    """
    The known features of a server.

    :param extensions: their names, with what the server says of them
    :param limits: of one request
    :param has_links: whether symbolic links can be made and read
    :param small_files: the mode of files there that are not bytes of states; None: no other account
        may read the pool
    """

    extensions: Mapping[bytes, bytes]
    limits: Limits
    has_links: bool
    small_files: int | None

    def has(self, name: bytes) -> bool:
        """:returns: whether the server has an extension"""
        return name in self.extensions


def look_at(sftp: Sftp, root: bytes) -> Server:
    """
    :param root: the directory of a pool there
    :returns: the features of the server, all requested at once
    """
    questions: list[tuple[int, bytes]] = [(Kind.STAT, string(root)), (Kind.READLINK, string(root))]
    if LIMITS in sftp.extensions:
        questions.append(extension(LIMITS))
    found, link, *limits = sftp.ask_all(questions)
    # A server that has no symbolic links, or does not permit them, says so also for a file that is
    # no link.
    has_links = isinstance(link, Answer) or link.code not in (
        Code.UNSUPPORTED,
        Code.PERMISSION_DENIED,
    )
    mode = small_file_mode(attributes_in(found).mode if isinstance(found, Answer) else 0)
    return Server(
        sftp.extensions, _limits(limits), has_links, mode if mode != small_file_mode(0) else None
    )


def _limits(answers: list[Answer | Refused]) -> Limits:
    """
    Return the limits of requests. OpenSSH answers with the lengths of a packet, of a read and of a
    write, and the number of open files; 0 means unknown.
    """
    usual = Limits()
    if not answers or isinstance(answers[0], Refused):
        return usual
    _, read, write = numbers_in(answers[0], 3)
    return Limits(read if read >= _LEAST else usual.read, write if write >= _LEAST else usual.write)


def explained(
    refused: Refused, doing: str, subject: Subject, *, needed: int = 0, free: int | None = None
) -> TransportError | NoSpace:
    """
    :param refused: the refusal of a server for a file
    :param doing: what was attempted on it: ``read``, ``create``
    :param needed: bytes that were to be written
    :param free: free bytes there, if that is known: a server reports a full disk only as a failure
    :returns: the error of this package to raise from it
    """
    what = f"cannot {doing} {subject.text}"
    if refused.code == Code.NO_SUCH_FILE:
        return MissingFile(
            f"{what}: No such file or directory", pool=subject.pool, path=subject.path
        )
    if refused.code == Code.PERMISSION_DENIED:
        hint = (
            "look at the owner and the mode of the file and of the directories above it, on that"
            " host"
        )
        return AccessDenied(
            f"{what}: Permission denied", hint=hint, pool=subject.pool, path=subject.path
        )
    if free is not None and free < min(needed, _MARGIN):
        hint = "free some space there, for example with statepool gc --everywhere"
        return NoSpace(
            f"{what}: No space left on device",
            needed=needed,
            available=free,
            hint=hint,
            pool=subject.pool,
            path=subject.path,
        )
    if refused.code == Code.UNSUPPORTED:
        return TransportError(
            f"{what}: the server cannot do that",
            hint="statepool doctor says what it lacks",
            pool=subject.pool,
            path=subject.path,
        )
    hint = (
        "an SFTP server has no other word for a full or failing disk, a quota, or a limit: its log"
        " may say more"
    )
    return TransportError(
        f"{what}: the server says only {refused.text or refused.code!r}",
        hint=hint,
        pool=subject.pool,
        path=subject.path,
    )
