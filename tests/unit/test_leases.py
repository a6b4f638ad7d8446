"""What the kernel grants, and that nobody dies of it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from statepool.leases import held_lease, let_go, try_lease


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a"
    path.write_bytes(b"content")
    return path


def test_a_read_lease_is_granted_while_nobody_can_write(path: Path) -> None:
    with path.open("rb") as file, path.open("rb") as other:
        assert held_lease(file.fileno()) == fcntl.F_UNLCK
        assert try_lease(file.fileno(), fcntl.F_RDLCK)
        assert held_lease(file.fileno()) == fcntl.F_RDLCK
        assert held_lease(other.fileno()) == fcntl.F_UNLCK
        let_go(file.fileno())
        assert held_lease(file.fileno()) == fcntl.F_UNLCK
    with path.open("rb") as file, path.open("r+b"):
        assert try_lease(file.fileno(), fcntl.F_RDLCK) is False


def test_a_write_lease_is_granted_while_nobody_else_has_it_open(path: Path) -> None:
    with path.open("r+b") as file:
        assert try_lease(file.fileno(), fcntl.F_WRLCK)
        assert held_lease(file.fileno()) == fcntl.F_WRLCK
        let_go(file.fileno())
        with path.open("rb"):
            assert try_lease(file.fileno(), fcntl.F_WRLCK) is False


def test_who_waits_for_it_is_told_by_the_lease_and_not_by_a_deadly_signal(path: Path) -> None:
    with path.open("rb") as file:
        assert try_lease(file.fileno(), fcntl.F_RDLCK)
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_RDWR | os.O_NONBLOCK)
        assert held_lease(file.fileno()) == fcntl.F_UNLCK
        let_go(file.fileno())
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


def test_there_are_none_on_what_is_no_file() -> None:
    reading, writing = os.pipe()
    try:
        assert try_lease(reading, fcntl.F_RDLCK) is None
        assert held_lease(reading) == fcntl.F_UNLCK
        with pytest.raises(OSError, match="Invalid argument"):
            let_go(reading)
    finally:
        os.close(reading)
        os.close(writing)
