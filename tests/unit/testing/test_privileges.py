"""Whoever runs the tests, what is not permitted is not permitted."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.support.privileges import permissions_count


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"")
    path.chmod(0)
    return path


def test_modes_count_until_it_is_over(secret: Path) -> None:
    with permissions_count(), pytest.raises(PermissionError):
        secret.read_bytes()
    with pytest.raises(KeyError), permissions_count():
        raise KeyError
    if os.geteuid() == 0:
        assert secret.read_bytes() == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may read it")
def test_other_threads_are_left_alone(secret: Path) -> None:
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(secret.read_bytes()))
    started, go_on = threading.Event(), threading.Event()

    def early() -> None:
        started.set()
        go_on.wait()
        found.append(secret.read_bytes())

    earlier = threading.Thread(target=early)
    earlier.start()
    started.wait()
    with permissions_count():
        go_on.set()
        earlier.join()
    thread.start()
    thread.join()
    assert found == [b"", b""]
