"""
Which way bytes go is decided by what was measured, and what of a file is moved is told in few
words.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import define

from statepool.model.settings import Compress
from statepool.transports.ssh import compressed
from statepool.transports.ssh.compressed import (
    MEASURED,
    MIB,
    RECONSIDERED,
    WARM_UP,
    ProgramFailed,
    _Choosing,
    few,
    packer,
    within,
)

SIZE = 2048 * MIB


class Job:
    end = SIZE


@define
class FakePacker:
    """A far end that has a program, or has none."""

    how: Compress
    clock: Callable[[], float]
    is_able: bool = True


class Link(_Choosing):
    """Moves nothing, and takes the time that a link would."""

    def __init__(
        self,
        plain: float,
        packed: Callable[[int], float],
        *,
        how: Compress = Compress.AUTO,
        able: bool = True,
    ) -> None:
        self.now = 100.0
        self.moved: list[tuple[str, int]] = []
        self.fails_at: int | None = None
        self._hashed = 0
        self._extents = ((0, SIZE),)
        self._job = Job()  # type: ignore[assignment]
        self._packer = FakePacker(how, lambda: self.now, able)  # type: ignore[assignment]
        self._plain, self._packed = plain, packed

    def _move(self, end: int) -> None:
        self._note("plain", end - self._hashed)
        self.now += (end - self._hashed) / self._plain
        self._hashed = end

    def _pack(self, end: int, goes_on: Callable[[int], bool]) -> None:
        begin = self._hashed
        self.now += 0.3  # programs have to be started
        while self._hashed < end:
            if self.fails_at is not None and self._hashed >= self.fails_at:
                raise ProgramFailed("no more")
            self._hashed += MIB
            self.now += MIB / self._packed(self._hashed)
            if not goes_on(MIB):
                break
        self._note("packed", self._hashed - begin)

    def _note(self, how: str, count: int) -> None:
        if count:
            self.moved.append((how, count // MIB))

    def run(self) -> list[tuple[str, int]]:
        self._choose()
        assert self._hashed == SIZE
        return self.moved


START = [("plain", WARM_UP // MIB), ("plain", MEASURED // MIB)]
REST = (SIZE - WARM_UP - MEASURED) // MIB


def test_a_slow_link_is_compressed_on() -> None:
    assert Link(110 * MIB, lambda at: 200 * MIB).run() == [*START, ("packed", REST)]


def test_a_fast_link_is_not() -> None:
    assert Link(400 * MIB, lambda at: 800 * MIB).run() == [*START, ("plain", REST)]


def test_what_is_slower_is_given_up_and_tried_again_later() -> None:
    moved = Link(110 * MIB, lambda at: 50 * MIB).run()
    assert moved[:4] == [*START, ("packed", MEASURED // MIB + 1), ("plain", RECONSIDERED // MIB)]
    assert sum(count for how, count in moved if how == "packed") < 0.1 * SIZE / MIB


def test_an_image_is_not_the_same_everywhere() -> None:
    """It compresses well up to the middle, and badly from there on."""
    moved = Link(110 * MIB, lambda at: 200 * MIB if at < SIZE // 2 else 60 * MIB).run()
    assert moved[2][0] == "packed"
    assert (
        SIZE // 2 // MIB
        < sum(count for _, count in moved[:3])
        <= SIZE // 2 // MIB + 2 * MEASURED // MIB
    )
    assert moved[3][0] == "plain"


def test_without_a_program_there_is_no_choice() -> None:
    assert Link(110 * MIB, lambda at: 800 * MIB, able=False).run() == [*START, ("plain", REST)]
    assert Link(110 * MIB, lambda at: 800 * MIB, able=False, how=Compress.ON).run() == [
        ("plain", SIZE // MIB)
    ]


def test_on_is_on() -> None:
    assert Link(1000 * MIB, lambda at: MIB, how=Compress.ON).run() == [("packed", SIZE // MIB)]


@pytest.mark.parametrize("how", [Compress.ON, Compress.AUTO])
def test_after_a_failure_the_rest_goes_without(how: Compress) -> None:
    link = Link(110 * MIB, lambda at: 200 * MIB, how=how)
    link.fails_at = 1000 * MIB
    assert link.run()[-1] == ("plain", 1048)


@pytest.mark.parametrize(
    ("path", "how", "size", "compresses"),
    [
        ("/pool/a", Compress.ON, 2 * MIB, True),
        ("/pool/a", Compress.ON, 100, False),
        ("/pool/a", Compress.AUTO, 2 * MIB, False),
        ("/pool/a", Compress.AUTO, 2 * SIZE, True),
        ("/pool/a", Compress.OFF, 2 * SIZE, False),
        ("/new\nline/a", Compress.ON, 2 * SIZE, False),
    ],
)
def test_what_is_worth_a_thought(path: str, how: Compress, size: int, compresses: bool) -> None:
    assert (packer(None, path, how, size) is not None) is compresses  # type: ignore[arg-type]


# -- extents ---------------------------------------------------------------------------------------


def test_parts_of_extents() -> None:
    extents = ((0, 10), (20, 10), (40, 10))
    assert list(within(extents, 0, 100)) == list(extents)
    assert list(within(extents, 5, 25)) == [(5, 5), (20, 5)]
    assert list(within(extents, 10, 20)) == []


def test_few_extents_are_left_alone_and_many_become_few() -> None:
    assert few([(0, 10), (20, 10)]) == [(0, 10), (20, 10)]
    many = [(number * 100_000, 1000) for number in range(5000)]
    found = few(many, most=50)
    assert len(found) <= 50
    assert found[0][0] == 0
    assert sum(found[-1]) == 4999 * 100_000 + 1000
    assert all(
        any(begin <= offset and offset + length <= begin + count for begin, count in found)
        for offset, length in many
    )


def test_the_constants_fit_together() -> None:
    assert compressed.LEAST < WARM_UP < MEASURED < RECONSIDERED
