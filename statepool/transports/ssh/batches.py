"""
Many small requests to an SFTP server, in a number of round trips that does not grow with their
number.

Each step is requested for all files before the first answer is awaited.
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Container, Iterator, Sequence
from itertools import islice
from typing import Final, TypeVar

from statepool.transports.ssh.moving import LONGEST, require_progress
from statepool.transports.ssh.packets import (
    Answer,
    Attributes,
    Code,
    Flag,
    Garbled,
    Kind,
    Limits,
    Refused,
    attributes,
    attributes_in,
    data_in,
    handle_in,
    names_in,
    string,
)
from statepool.transports.ssh.sftp import Sftp

T = TypeVar("T")

OPEN_AT_ONCE = 200
"""The most files that are open on the server at the same time; OpenSSH permits about a thousand."""

ASKED_AT_ONCE = 16_384
"""The most requests without an answer: the answers have to fit into the window of the channel."""

READ_AT_ONCE = 256
"""The most pieces of files that are requested at the same time."""

MOST_LISTED = 128 << 20
"""
The most bytes of names that are accepted for directories which are listed together. Each name takes
about two hundred.
"""

LISTED_FIRST = 16
"""
Parts of a directory that are requested at once. OpenSSH puts a hundred names into each; a request
too many is answered in a few bytes.
"""

LISTED_NEXT = 128
"""Parts that are requested next, if those did not contain all names."""

NOT_A_FILE: Final[bytes] = bytes(bytearray(b"not a file"))
NOT_A_DIRECTORY: Final[list[tuple[str, Attributes]]] = []
"""Special answers, recognised by their identity."""

_GONE = (Code.NO_SUCH_FILE,)


def _groups(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def look(sftp: Sftp, paths: Sequence[bytes], *, follow: bool = False) -> list[Attributes | None]:
    """
    :returns: the attributes of files; None for a missing file
    :raises Refused: the server refuses to tell
    """
    kind = Kind.STAT if follow else Kind.LSTAT
    found: list[Attributes | None] = []
    for group in _groups(paths, ASKED_AT_ONCE):
        found += _looked(sftp, [(kind, string(path)) for path in group])
    return found


def _looked(sftp: Sftp, requests: Sequence[tuple[int, bytes]]) -> list[Attributes | None]:
    """
    Receive attributes. Each answer is parsed when it arrives, since it can be longer than it should
    be. All answers are received, so that the channel stays usable.
    """
    answers = [
        answer if isinstance(answer, Refused) else attributes_in(answer)
        for answer in sftp.each_answer(requests)
    ]
    return [_unless_gone(answer) for answer in answers]


def _there(answer: Answer | Refused) -> Attributes | None:
    return _unless_gone(answer if isinstance(answer, Refused) else attributes_in(answer))


def _unless_gone(found: Attributes | Refused) -> Attributes | None:
    if not isinstance(found, Refused):
        return found
    if found.code in _GONE:
        return None
    raise found


def _open(sftp: Sftp, requests: list[tuple[int, bytes] | None]) -> list[bytes | None]:
    """:returns: handles as they go over the wire; None for a file that does not exist (any more)"""
    answers = iter(sftp.ask_all([request for request in requests if request is not None]))
    handles: list[bytes | None] = []
    refused: Refused | None = None
    for request in requests:
        answer = next(answers) if request is not None else None
        if isinstance(answer, Refused) and answer.code not in _GONE:
            refused = answer
        handles.append(string(handle_in(answer)) if isinstance(answer, Answer) else None)
    if refused is not None:
        _close(sftp, handles)
        raise refused
    return handles


def _close(sftp: Sftp, handles: Sequence[bytes | None]) -> None:
    """
    Close handles without waiting for the answers: after reading, closing reports nothing of use.
    """
    sftp.forget(sftp.send(*((Kind.CLOSE, handle) for handle in handles if handle is not None)))


# -- reading ---------------------------------------------------------------------------------------


class TooMuch(Exception):
    """
    An error: the files are longer than what may be read together.

    :param path: the first one of them that does not fit
    """

    def __init__(self, path: bytes) -> None:
        super().__init__(path)
        self.path = path


def read(
    sftp: Sftp,
    paths: Sequence[bytes],
    limits: Limits,
    *,
    offset: int = 0,
    size: int | None = None,
    most: float = math.inf,
) -> list[bytes | None]:
    """
    :param size: the most to read of each file, in bytes; None: to the end
    :param most: the most to read of all of them together, in bytes
    :returns: the content of files; None for a missing file, and :data:`NOT_A_FILE` for anything
        else, which is not opened
    :raises TooMuch: the files are longer than that according to the server; nothing was read
    """
    found = look(sftp, paths)
    left = most
    for path, there in zip(paths, found, strict=True):
        left -= _wanted(there, offset, size) if there is not None and there.is_file else 0
        if left < 0:
            raise TooMuch(path)
    content: list[bytes | None] = []
    for group in _groups(list(zip(paths, found, strict=True)), OPEN_AT_ONCE):
        content += _read_group(sftp, group, limits, offset, size)
    return content


def _read_group(
    sftp: Sftp,
    group: Sequence[tuple[bytes, Attributes | None]],
    limits: Limits,
    offset: int,
    size: int | None,
) -> list[bytes | None]:
    flags = int(Flag.READ).to_bytes(4, "big") + attributes()
    handles = _open(
        sftp,
        [
            (Kind.OPEN, string(path) + flags) if there is not None and there.is_file else None
            for path, there in group
        ],
    )
    wanted = [
        _wanted(there, offset, size) if handle is not None else 0
        for handle, (_, there) in zip(handles, group, strict=True)
    ]
    parts: list[list[bytes]] = [[] for _ in group]
    ended: set[int] = set()
    pieces = _pieces(wanted, min(limits.read, LONGEST), ended)
    while some := list(islice(pieces, READ_AT_ONCE)):
        requests = [
            (Kind.READ, (handles[index] or b"") + struct.pack(">QI", offset + start, length))
            for index, start, length in some
        ]
        for (index, start, length), answer in zip(some, sftp.each_answer(requests), strict=True):
            parts[index].append(_rest(sftp, handles[index] or b"", offset + start, length, answer))
            if len(parts[index][-1]) < length:
                ended.add(index)
    _close(sftp, handles)
    return [
        _content(there, handle, part)
        for (_, there), handle, part in zip(group, handles, parts, strict=True)
    ]


def _pieces(
    wanted: Sequence[int], longest: int, ended: Container[int]
) -> Iterator[tuple[int, int, int]]:
    """
    :param wanted: how many bytes to read of each file
    :param longest: bytes of one piece
    :param ended: files whose end was reached: a server can report any length
    :returns: the number of the file, the offset, and the number of bytes
    """
    for index, count in enumerate(wanted):
        for start in range(0, count, longest):
            if index in ended:
                break
            yield index, start, min(longest, count - start)


def _wanted(there: Attributes | None, offset: int, size: int | None) -> int:
    left = max(there.size - offset, 0) if there is not None else 0
    return left if size is None else min(size, left)


def _content(there: Attributes | None, handle: bytes | None, parts: list[bytes]) -> bytes | None:
    if there is not None and not there.is_file:
        return NOT_A_FILE
    return b"".join(parts) if handle is not None else None


def _rest(sftp: Sftp, handle: bytes, offset: int, length: int, answer: Answer | Refused) -> bytes:
    """
    :returns: the bytes of an answer, and the rest that a short answer lacks, unless the file ends
        there
    """
    got, turns = b"", 0
    while not isinstance(answer, Refused):
        got += b"".join(data_in(answer))
        if len(got) > length:
            raise Garbled("the server answers with more than it was asked for")
        if len(got) == length:
            return got
        turns += 1
        require_progress(turns)
        (answer,) = sftp.ask_all(
            [(Kind.READ, handle + struct.pack(">QI", offset + len(got), length - len(got)))]
        )
    if answer.code != Code.EOF:
        raise answer
    return got


def writes(handle: bytes, data: bytes, limits: Limits) -> list[tuple[int, bytes]]:
    """:returns: the requests that write a small file"""
    length = min(limits.write, LONGEST)
    return [
        (Kind.WRITE, handle + struct.pack(">Q", start) + string(data[start : start + length]))
        for start in range(0, len(data), length)
    ]


# -- directories -----------------------------------------------------------------------------------


def scan(
    sftp: Sftp, paths: Sequence[bytes], *, follow: Sequence[bool]
) -> list[list[tuple[str, Attributes]]]:
    """
    :param follow: for each of them, whether it may be a symbolic link
    :returns: the entries of directories, without names that are not UTF-8; none if the directory
        does not exist; :data:`NOT_A_DIRECTORY` for anything else
    """
    looks = [
        (Kind.STAT if links else Kind.LSTAT, string(path))
        for path, links in zip(paths, follow, strict=True)
    ]
    found = [there for group in _groups(looks, ASKED_AT_ONCE) for there in _looked(sftp, group)]
    names: list[list[tuple[str, Attributes]]] = []
    for group in _groups(list(zip(paths, found, strict=True)), OPEN_AT_ONCE):
        listed = _scan_group(
            sftp,
            [path if there is not None and there.is_directory else None for path, there in group],
        )
        names += [
            NOT_A_DIRECTORY if there is not None and not there.is_directory else part
            for (_, there), part in zip(group, listed, strict=True)
        ]
    return names


def _scan_group(sftp: Sftp, paths: list[bytes | None]) -> list[list[tuple[str, Attributes]]]:
    handles = _open(
        sftp, [(Kind.OPENDIR, string(path)) if path is not None else None for path in paths]
    )
    found: list[list[tuple[str, Attributes]]] = [[] for _ in paths]
    open_ = [index for index, handle in enumerate(handles) if handle is not None]
    count, length = LISTED_FIRST, 0
    while open_:
        asked = [
            (index, (Kind.READDIR, handles[index] or b"")) for index in open_ for _ in range(count)
        ]
        ended: set[int] = set()
        for (index, _), answer in zip(
            asked, sftp.each_answer([request for _, request in asked]), strict=True
        ):
            if isinstance(answer, Refused):
                if answer.code != Code.EOF:
                    raise answer
                ended.add(index)
                continue
            length += answer.length
            if length > MOST_LISTED:
                raise Garbled(
                    f"the server does not come to the end of a listing: {length} bytes of names"
                    " so far"
                )
            found[index] += _utf8(names_in(answer))
        open_ = [index for index in open_ if index not in ended]
        count = LISTED_NEXT
    _close(sftp, handles)
    return found


def _utf8(names: list[tuple[bytes, Attributes]]) -> Iterator[tuple[str, Attributes]]:
    for name, there in names:
        try:
            text = name.decode("utf-8")
        except UnicodeDecodeError:
            continue  # it cannot be a name of ours
        if text not in (".", "..") and "/" not in text and "\0" not in text:
            yield text, there


def has_entries(sftp: Sftp, path: bytes) -> bool:
    """:returns: whether it is a directory with at least one entry of any name"""
    there = look(sftp, [path])[0]
    if there is None or not there.is_directory:
        return False
    (handle,) = _open(sftp, [(Kind.OPENDIR, string(path))])
    if handle is None:
        return False
    (answer,) = sftp.ask_all([(Kind.READDIR, handle)])
    _close(sftp, [handle])
    return isinstance(answer, Answer) and any(
        name not in (b".", b"..") for name, _ in names_in(answer)
    )


def make_directories(sftp: Sftp, root: bytes, path: str) -> str | None:
    """
    Make a directory and its parents, with the permissions of the pool's directory.

    :param root: the directory of the pool
    :param path: of the directory in it
    :returns: the path that exists and is no directory, or None
    """
    parts = path.split("/") if path else []
    wanted = [root + b"/" + "/".join(parts[:count]).encode() for count in range(1, len(parts) + 1)]
    if look(sftp, [root or b"/"], follow=True)[0] is None:
        _make_root(sftp, root)
    looks = [(Kind.STAT, string(root or b"/")), *((Kind.LSTAT, string(full)) for full in wanted)]
    makes = [(Kind.MKDIR, string(full) + attributes()) for full in wanted]
    answers = sftp.ask_all(makes + looks)
    made, found = answers[: len(makes)], answers[len(makes) :]
    permissions = stat.S_IMODE(_granted_mode(found[0])) | stat.S_IRWXU
    sftp.ask_all(
        [
            (Kind.SETSTAT, string(full) + attributes(mode=permissions))
            for full, answer in zip(wanted, made, strict=True)
            if isinstance(answer, Answer)
        ]
    )
    for count, (answer, there) in enumerate(zip(made, found[1:], strict=True), 1):
        if isinstance(answer, Answer):
            continue
        kind = _there(there)
        if kind is not None and not kind.is_directory:
            return repr("/".join(parts[:count]))
        if kind is None:
            raise answer
    return None


def _granted_mode(answer: Answer | Refused) -> int:
    if isinstance(answer, Refused):
        raise answer
    return attributes_in(answer).mode


def _make_root(sftp: Sftp, root: bytes) -> None:
    parts = root.split(b"/")[1:]
    sftp.ask_all(
        [
            (Kind.MKDIR, string(b"/" + b"/".join(parts[:count])) + attributes())
            for count in range(1, len(parts) + 1)
        ]
    )
