from __future__ import annotations

import os
import subprocess
import sys

import pytest
from attrs import evolve

from statepool.errors import BadRecord
from statepool.pools.writer import Writer


@pytest.fixture
def here() -> Writer:
    return Writer.current()


def test_this_process_is_alive(here: Writer) -> None:
    assert here.pid == os.getpid()
    assert here.is_here
    assert not here.is_dead


def test_a_process_that_ended_is_dead(here: Writer) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "from statepool.pools.writer import Writer; print(Writer.current().start); input()"], stdin=-1, stdout=-1
    )
    assert child.stdout is not None
    writer = evolve(here, pid=child.pid, start=int(child.stdout.readline()))
    assert not writer.is_dead
    child.kill()
    # A process that its parent has not asked after keeps its id, but does nothing any more.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert writer.is_dead
    child.communicate()
    assert writer.is_dead


def test_a_process_id_that_was_used_again_is_another_writer(here: Writer) -> None:
    assert evolve(here, start=here.start + 1).is_dead


def test_nobody_survives_a_boot(here: Writer) -> None:
    before = evolve(here, boot="another")
    assert before.is_here
    assert before.is_dead
    assert evolve(before, space=here.space + 1).is_dead


def test_nothing_is_known_of_other_hosts(here: Writer) -> None:
    there = evolve(here, host="another", pid=1 << 22)
    assert not there.is_here
    assert not there.is_dead


def test_nothing_is_known_of_other_containers(here: Writer) -> None:
    there = evolve(here, space=here.space + 1, pid=1 << 22)
    assert not there.is_here
    assert not there.is_dead


def test_json_round_trip(here: Writer) -> None:
    assert Writer.from_json(here.to_json()) == here


@pytest.mark.parametrize("lie", [{"host": 1}, {"boot": None}, {"pid": "1"}, {"pid": True}, {"start": 1.0}, {"space": None}], ids=str)
def test_what_is_no_writer(here: Writer, lie: dict[str, object]) -> None:
    with pytest.raises(BadRecord):
        Writer.from_json({**here.to_json(), **lie})
    with pytest.raises(BadRecord):
        Writer.from_json([])


def test_a_child_is_another_writer(here: Writer) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, str(Writer.current().pid).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == str(child).encode()
    os.close(reading)
    os.close(writing)
