"""
The optional help of a shell on the far side: kernel locks there, and digests made there. It is
never required.

Many accounts have no shell. Some refuse to run a command, some run something else instead, such as
``internal-sftp``. So a command proves that a shell ran it: it prints a nonce, and only lines that
begin with the nonce count, whatever else the login prints.

The command is a script of this module for ``/bin/sh``, in one line. No part of it comes from a
manifest or from a pool. Only the path of the pool is chosen by the user: it is quoted twice, since
the account's own shell (which need not be a POSIX one) passes the script to ``/bin/sh``. For paths
with characters that are special in some shells even inside quotes, no shell is used.
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
import shlex
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Self

from attrs import define

from statepool.errors import AccessDenied, BadRecord, LockTimeout, TransportError
from statepool.model.digest import Digest
from statepool.model.pieces import LENGTH, PIECE, PIECES, Pieces, count
from statepool.transports.ssh.carrier import Stream
from statepool.transports.ssh.connection import Connection

ANSWERS_WITHIN = 10.0
"""Timeout in seconds for a shell to prove itself; less if the general timeout is shorter."""

LEAST_HASHED = 1 << 20
"""
The lowest rate of hashing on a far side, in bytes per second: after the time that follows from it,
its signs of life are ignored.
"""

PROGRAMS = ("flock", "b3sum", "openssl", "sha256sum", "zstd", "python3", "timeout")
"""Programs of a far side that are used if they are there."""

MODULES = ("blake3", "zstandard")
"""Modules of its Python that are used if they are there."""

TICK = 5
"""Seconds between two signs of life of a long-running script."""

BEAT = 20.0
"""Seconds between two signs of life of this process while it holds a lock there."""

PATIENCE = 90
"""
Seconds without a sign of life after which the far side releases a lock: a host that lost its power
closes no connection.
"""

MOST_NOISE = 1 << 20
"""The most bytes of other output before the awaited line."""

LONGEST_SCRIPT = 24 << 10
"""
Bytes of one script. Its quotes are quoted once more, and Linux permits 128 KiB for one argument
(``MAX_ARG_STRLEN``).
"""

_QUICK = (
    ("b3sum", "blake3", "b3sum --no-names <{}"),
    # It uses the SHA instructions of processors, and sha256sum of coreutils 9.1 does not: five
    # times as fast. After the digest comes a name with an asterisk, which a shell would expand.
    ("openssl", "sha256", "openssl dgst -sha256 -r <{} | cut -c -64"),
    ("sha256sum", "sha256", "sha256sum <{}"),
)
"""Programs, their algorithms, and how they print the digest of a file, the fastest first."""

_SPECIAL = re.compile(r"[\x00-\x1f\x7f\\!\ud800-\udfff]")
"""
Control characters end a line; a backslash is special between single quotes in fish(1), and an
exclamation mark in csh(1).
"""

_B3_IN_PYTHON = (
    "import sys, blake3; h = blake3.blake3(max_threads=blake3.blake3.AUTO); f = open(sys.argv[1],"
    " 'rb', buffering=0); any(h.update(b) is None for b in iter(lambda: f.read(1 << 21), b''));"
    " print(h.hexdigest())"
)

_PIECES_IN_PYTHON = (
    "import sys, blake3; f = sys.stdin.buffer; any(print(blake3.blake3(b).hexdigest(), flush=True)"
    f" for b in iter(lambda: f.read({PIECE}), b''))"
)


def quoted(path: str) -> str | None:
    """
    :param path: absolute, on the far side
    :returns: it as one word of a shell, or None if it cannot be quoted for every shell
    """
    return shlex.quote(path) if path.startswith("/") and _SPECIAL.search(path) is None else None


class Shell:
    """
    The shell of an account, if it has one.

    :param connection: to the account
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._programs: frozenset[str] | None = None
        self._modules: frozenset[str] | None = None

    @property
    def patience(self) -> float:
        """How long a script may print nothing, in seconds."""
        return self._connection.settings.timeout + TICK

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connection.is_open

    @property
    def programs(self) -> frozenset[str]:
        """
        Those of :data:`PROGRAMS` that are there, and ``sh``; empty if there is no shell. Queried
        once.

        :raises TransportError: the connection was lost
        """
        if self._programs is None:
            self._programs = self._look()
        return self._programs

    @property
    def modules(self) -> frozenset[str]:
        """Those of :data:`MODULES` that Python has there. Queried once."""
        if self._modules is None:
            found = frozenset[str]()
            if "python3" in self.programs:
                script = "; ".join(
                    f"python3 -c 'import {name}' 2>/dev/null && say has {name}" for name in MODULES
                )
                found = frozenset(
                    line[1] for line in self._ask(script) if line[0] == "has" and len(line) == 2
                )
            self._modules = found
        return self._modules

    def _look(self) -> frozenset[str]:
        words = " ".join(PROGRAMS)
        script = (
            f"say has sh; for p in {words}; do command -v $p >/dev/null 2>&1 && say has $p; done;"
            " say end"
        )
        try:
            return frozenset(
                line[1]
                for line in self._ask(script)
                if line[0] == "has" and len(line) == 2 and line[1] in (*PROGRAMS, "sh")
            )
        except TransportError:
            if not self._connection.is_open:
                raise
            # It refused, or printed nothing: the connection works, so the account has no shell.
            return frozenset()

    def _ask(self, script: str) -> list[list[str]]:
        """:returns: the lines of a short script"""
        seconds = min(ANSWERS_WITHIN, self._connection.settings.timeout)
        with self.start(script) as command:
            command.end_of_input()
            return list(command.lines(seconds))

    def start(self, script: str, *, window: int = 4 << 20) -> Command:
        """
        :param script: for ``/bin/sh``, in one line; it reports with ``say WORD...``
        :param window: how many bytes the far side may send ahead
        :returns: the running command
        """
        nonce = secrets.token_hex(8)
        # The first newline ends a line that another program may have left incomplete.
        text = f"echo; say() {{ echo {nonce} $*; }}; {script}"
        return Command(
            self._connection,
            self._connection.open(f"exec /bin/sh -c {shlex.quote(text)}", window=window),
            nonce,
        )

    def try_start(self, script: str) -> Command | None:
        """
        :returns: as :meth:`start`, or None if the server starts no further command now, because of
            its limit
        """
        try:
            return self.start(script)
        except TransportError:
            if not self.is_connected:
                raise
            return None

    # -- locks -------------------------------------------------------------------------------------

    def hold(self, path: str, timeout: float) -> contextlib.AbstractContextManager[None] | None:
        """
        Lock a file there by flock(2), as :class:`~statepool.pools.locks.FileLocks` does here; the
        kernel releases the lock when the connection ends.

        :param path: the lock file, absolute; it is made if it is missing
        :param timeout: how long to wait for another holder, in seconds
        :returns: holds the lock for the duration of a ``with`` block, and raises
            :class:`~statepool.errors.LockTimeout` where it is entered; None where there is no such
            lock
        """
        word = quoted(path)
        if word is None or "flock" not in self.programs:
            return None
        started = self.try_start(self._locking(word, timeout))
        return None if started is None else self._held(started, path, timeout)

    @contextlib.contextmanager
    def _held(self, started: Command, path: str, timeout: float) -> Iterator[None]:
        with started as command:
            lines = command.lines(self.patience, within=timeout + 4 * self.patience)
            answer = next((line[0] for line in lines if line[0] != "wait"), "no")
            if answer == "busy":
                raise LockTimeout(
                    f"another process held {path} on {self._connection} for more than"
                    f" {timeout:g} s",
                    seconds=timeout,
                    path=path,
                    hint="wait for it, or raise lock-timeout",
                )
            if answer != "held" and not self.is_connected:
                raise TransportError(
                    f"cannot lock {path} on {self._connection}: the connection was lost",
                    hint="try again",
                    transient=True,
                    path=path,
                )
            if answer != "held":
                hint = "make it writable for the group of the pool, on that host"
                raise AccessDenied(
                    f"the lock {path} on {self._connection} cannot be opened", path=path, hint=hint
                )
            beat = _Beat(command)
            beat.start()
            try:
                yield
            finally:
                beat.end()
                command.finish()

    def _locking(self, word: str, timeout: float) -> str:
        """
        Return a script that takes a lock, reports that, and holds the lock until its input ends, or
        until the signs of life stop.
        """
        rounds = max(math.ceil(timeout / TICK), 1)
        how = f"-w {timeout / rounds:.3f}" if timeout > 0 else "-n"
        again = "test $? -eq 1 || exit; n=$((n-1)); test $n -gt 0 || { say busy; exit; }; say wait"
        keep = (
            f'while test "$(timeout {PATIENCE} head -c 1)" = x; do :; done'
            if "timeout" in self.programs
            else "cat >/dev/null"
        )
        return (
            f"umask 002; exec 9>>{word}; n={rounds}; until flock {how} 9; do {again}; done; say"
            f" held; {keep}"
        )

    # -- digests -----------------------------------------------------------------------------------

    def digest(
        self, path: str, size: int, algorithm: str, pieces: Pieces | None = None
    ) -> Digest | None:
        """
        Make the digest of a file on the far side.

        :param path: absolute
        :param size: how long it must be, in bytes
        :param algorithm: of the digest
        :param pieces: gets the digests of its pieces, where the algorithm has some
        :returns: the digest of its bytes, or None if it could not be made there for any reason:
            then the file has to be read from here
        """
        word = quoted(path)
        if word is None:
            return None
        if algorithm == PIECES:
            raw = self._hash_pieces(word, size)
            (pieces := pieces if pieces is not None else Pieces()).become(raw or b"")
            return Digest.of_pieces(pieces, size) if raw is not None else None
        program = self._hashing(algorithm)
        # The ticker must not keep our output open when the script is killed.
        tick = f"(while sleep {TICK} >/dev/null 2>&1; do say wait; done) & t=$!"
        found = (
            self._hashed(f"{tick}; d=$({program} {word}); kill $t; say digest $d", word, size)
            if program is not None
            else []
        )
        return _digest(algorithm, found[0]) if found else None

    @property
    def quick_algorithm(self) -> str | None:
        """The algorithm of a program there that hashes a file without starting an interpreter."""
        return self._quick[0] if self._quick is not None else None

    @property
    def _quick(self) -> tuple[str, str] | None:
        known = ((name, line) for program, name, line in _QUICK if program in self.programs)
        return next(known, None)

    def digests(self, files: Mapping[str, int]) -> list[Digest | None]:
        """
        Make the digests of many files, with few commands.

        :param files: absolute paths with the lengths that they must have, in bytes
        :returns: their digests by :attr:`quick_algorithm`, in their order; None for each file that
            has another length, or could not be hashed
        """
        found: list[Digest | None] = []
        batch: list[str] = []
        left, limit, quick = list(files.items()), 0.0, self._quick
        while left:
            path, size = left.pop(0)
            word = quoted(path)
            batch.append(
                f"test ! -L {word} && test -f {word} && test $(wc -c <{word}) -eq {size:d} && say"
                f" digest $({quick[1].format(word)}) || say digest none"
                if word is not None and quick is not None
                else "say digest none"
            )
            limit += size / LEAST_HASHED
            if not left or sum(map(len, batch)) > LONGEST_SCRIPT:
                found += self._digests(batch, limit)
                batch, limit = [], 0.0
        return found

    def _digests(self, batch: list[str], limit: float) -> list[Digest | None]:
        # The ticker must not keep our output open when the script is killed.
        tick = f"(while sleep {TICK} >/dev/null 2>&1; do say wait; done) & t=$!"
        command = self.try_start(f"{tick}; {'; '.join(batch)}; kill $t; say end")
        found: list[Digest | None] = []
        if command is not None:
            with command:
                command.end_of_input()
                for line in command.lines(self.patience, within=4 * self.patience + limit):
                    if line[0] == "digest" and len(found) < len(batch):
                        # A program that failed has printed nothing.
                        text = line[1] if len(line) > 1 else ""
                        found.append(_digest(self.quick_algorithm or "", text))
        return found + [None] * (len(batch) - len(found))

    def _hash_pieces(self, word: str, size: int) -> bytes | None:
        """
        Hash the pieces of a file on the far side, by programs that make BLAKE3 digests and know
        nothing of pieces.

        :returns: the digests
        """
        if "b3sum" in self.programs:
            # The loop keeps the file open: each dd continues where the one before it ended. What
            # was read before an error must not count as a piece.
            read = f"{{ dd bs={PIECE} count=1 iflag=fullblock 2>/dev/null || say bad >&3; }}"
            able = "dd if=/dev/null of=/dev/null iflag=fullblock 2>/dev/null || exit; exec 3>&1"
            hashing = (
                f"{able}; n={count(size)}; while test $n -gt 0; do say digest $({read} | b3sum"
                f" --no-names); n=$((n-1)); done <{word}"
            )
        elif "blake3" in self.modules:
            hashing = (
                f"python3 -c {shlex.quote(_PIECES_IN_PYTHON)} <{word} | while read d; do say digest"
                " $d; done"
            )
        else:
            return None
        found = self._hashed(hashing, word, size)
        try:
            raw = b"".join(map(bytes.fromhex, found))
        except ValueError:
            return None  # another program printed that
        return raw if raw and len(raw) == count(size) * LENGTH else None

    def _hashed(self, hashing: str, word: str, size: int) -> list[str]:
        """
        :param hashing: a script that prints digests of the file that ``word`` names
        :returns: the digests, or nothing if any other output came
        """
        check = (
            f"test -L {word} && exit; test -f {word} || exit; test $(wc -c <{word}) -eq {size:d} ||"
            " exit"
        )
        command, found = self.try_start(f"{check}; {hashing}"), list[str]()
        if command is None:
            return found
        with command:
            command.end_of_input()
            for line in command.lines(
                self.patience, within=4 * self.patience + size / LEAST_HASHED
            ):
                if line[0] == "bad" or len(found) > max(count(size), 1):
                    return []
                if line[0] == "digest" and len(line) > 1:
                    found.append(line[1])
        return found

    def _hashing(self, algorithm: str) -> str | None:
        """:returns: a command that prints the digest of the file that is named after it"""
        if algorithm == "sha256" and "sha256sum" in self.programs:
            return "sha256sum --"
        if algorithm == "blake3" and "b3sum" in self.programs:
            return "b3sum --no-names --"
        if algorithm == "blake3" and "blake3" in self.modules:
            return f"python3 -c {shlex.quote(_B3_IN_PYTHON)}"
        return None


@define(eq=False)
class Command:
    """
    A script that runs on the far side.

    :param connection: to the far side
    :param stream: its input and output
    :param nonce: what begins the lines that count
    """

    connection: Connection
    stream: Stream
    nonce: str

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing tells the other side, if it is still there.
        with contextlib.suppress(TransportError), self.connection.translating("close a channel to"):
            self.stream.close()

    def end_of_input(self) -> None:
        """Close the input: a program that may run there instead of our script ends now."""
        with self.connection.translating("run a command on"):
            self.stream.shutdown_write()

    def lines(self, patience: float, within: float = math.inf) -> Iterator[list[str]]:
        """
        :param patience: the longest wait for a line, in seconds
        :param within: the longest time for all lines, in seconds
        :returns: the words of each line that the script reports, until it ends or has reported
            ``end``
        :raises TransportError: no line came in time, or the connection was lost
        """
        rest, noise = b"", 0
        self.stream.settimeout(patience)
        begun = last = time.monotonic()
        while True:
            data = self.receive(64 << 10)
            now = time.monotonic()
            if now - last > 2 * patience or now - begun > within:
                raise self._late(now - begun)
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                words = line.decode("utf-8", "replace").split()
                if len(words) > 1 and words[0] == self.nonce:
                    if words[1] == "end":
                        return
                    yield words[1:]
                    last = time.monotonic()
                else:
                    noise += len(line) + 1
            if noise > MOST_NOISE or len(rest) > MOST_NOISE:
                raise TransportError(
                    f"the shell of {self.connection} says too much", pool=str(self.connection)
                )

    def _late(self, seconds: float) -> TransportError:
        return TransportError(
            f"the shell of {self.connection} has not come to an end within {seconds:.0f} s",
            hint="look at the load of that host; the setting timeout says how long to wait",
            transient=True,
            pool=str(self.connection),
        )

    def rest_after(self, word: str) -> bytes | None:
        """
        :param word: that the script reports before its output becomes binary
        :returns: the part of that output that has arrived already, or None if the script has ended
            without it
        """
        mark, found = f"{self.nonce} {word}\n".encode(), b""
        begun, patience = time.monotonic(), self.connection.settings.timeout
        while (at := found.find(mark)) < 0:
            data = self.receive(64 << 10)
            if time.monotonic() - begun > 2 * patience:
                raise self._late(2 * patience)
            if not data or len(found) > MOST_NOISE:
                return None
            found += data
        return found[at + len(mark) :]

    def receive(self, size: int) -> bytes:
        """:returns: some of its output, at most ``size`` bytes; empty when it has ended"""
        with self.connection.translating("run a command on"):
            data: bytes = self.stream.recv(size)
        return data

    def exit_status(self) -> int:
        """:returns: the exit status of the script, once it has ended; -1 if it was killed"""
        with self.connection.translating("run a command on"):
            return self.connection.carrier.exit_status(
                self.stream, self.connection.settings.timeout
            )

    def send(self, data: bytes) -> None:
        """Send input to the script."""
        with self.connection.translating("run a command on"):
            self.stream.sendall(data)

    def finish(self) -> None:
        """Close its input, and wait until it has ended, unless the connection is lost."""
        with contextlib.suppress(TransportError):  # if the connection ends, the script ends
            self.end_of_input()
            for _ in self.lines(min(ANSWERS_WITHIN, self.connection.settings.timeout)):
                pass


class _Beat:
    """A thread that sends signs of life to a script."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="statepool-lock", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Stop the thread."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        # The lock was lost with the connection; the work under the lock gets the same error.
        with contextlib.suppress(TransportError):
            while not self._done.wait(BEAT):
                self._command.send(b"x")


def _digest(algorithm: str, text: str) -> Digest | None:
    try:
        return Digest(algorithm, text.lower())
    except BadRecord:
        return None  # another program printed that


def shell_of(connection: Connection) -> Shell:
    """
    :returns: the shell of a connection. All pools on that host share it, so that it is queried
        once.
    """
    return _shells.setdefault(connection, Shell(connection))


_shells: weakref.WeakKeyDictionary[Connection, Shell] = weakref.WeakKeyDictionary()
