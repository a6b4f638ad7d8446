"""
A keeper: lets a machine that is not ours run again if the process that has stopped it is killed.

The keeper is a program of its own, which needs nothing but Python. It reads on its standard input
whether the machine is in our hands (``1``) or not (``0``), and waits for the end of its parent.
Only then does it connect to the machine's monitor.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from io import BufferedRWPair
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""The time for which it retries, in seconds: another program may be using the monitor."""

_PAUSE = 0.05

_OURS = frozenset({"paused", "postmigrate", "restore-vm", "save-vm", "finish-migrate"})
"""The run states in which our process can have stopped a machine."""


def main(path: Path, parent: int) -> int:
    """
    :param path: the socket of the monitor
    :param parent: the process to look after
    :returns: the exit code
    """
    if not _in_our_hands(parent):
        return 0
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if _is_running_again(path):
                return 0
        except (FileNotFoundError, ConnectionRefusedError):
            return 0  # the machine has ended, too
        except (OSError, ValueError):
            pass  # another program uses the monitor, or the machine is just ending: retry
        time.sleep(_PAUSE)
    return 1


def _in_our_hands(parent: int) -> bool:
    """
    Wait for the end of the parent.

    :returns: whether it had stopped the machine
    """
    try:
        process = os.pidfd_open(parent)
    except ProcessLookupError:
        process = -1
    os.write(1, b"r")
    held = False
    while True:
        watched = [0] if process < 0 else [0, process]
        ready, _, _ = select.select(watched, [], [])
        if 0 in ready:
            data = os.read(0, 64)
            if not data:
                return held
            held = data.endswith(b"1")
            os.write(1, b"k")
        elif process in ready:
            return held


def _is_running_again(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            connection.connect(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
        with connection.makefile("rwb") as lines:
            lines.readline()
            _ask(lines, "qmp_capabilities")
            jobs = _ask(lines, "query-jobs").get("return", [])
            if any(job["status"] not in ("concluded", "null") for job in jobs):
                return False
            status = _ask(lines, "query-status").get("return", {}).get("status")
            if status not in _OURS:
                return True
            _ask(lines, "migrate_cancel")
            _ask(lines, "cont")
            return bool(_ask(lines, "query-status").get("return", {}).get("running"))


def _ask(lines: BufferedRWPair, command: str) -> Any:
    """:returns: the whole answer; events are skipped"""
    lines.write(json.dumps({"execute": command}).encode() + b"\n")
    lines.flush()
    while True:
        line = lines.readline()
        if not line:
            raise ConnectionResetError(f"the monitor hung up before it answered {command}")
        answer = json.loads(line)
        if "return" in answer or "error" in answer:
            return answer


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
