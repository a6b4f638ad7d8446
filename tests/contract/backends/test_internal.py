"""Internal snapshots of an image that is off."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statepool.backends.base import Context, Options, Target
from statepool.backends.external import QCOW2ExtBackend
from statepool.backends.internal import QCOW2Backend
from statepool.errors import Conflict, HasDependants, InUse, NotFound, UnsafeImage, UsageError
from statepool.model.objects import Image, Machine
from statepool.model.outcomes import Presence
from statepool.testing.backends import OVERWRITE, REPLACE, BackendContract, Bench, names, put

SIZE = 256 << 10
Tools = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


class InternalBench(Bench):
    """One image file, whose states are in it."""

    def __init__(self, backend: QCOW2Backend, directory: Path, tools: Tools) -> None:
        super().__init__(backend, [directory])
        self._make, self._write, self._qemu_img = tools
        self.path = directory / "image, of a machine.qcow2"

    def target(self) -> Target:
        target = Target(Image("vm1", "disk"), {"disk": self.path})
        if self.path.exists():
            self.write(target, 0)
        else:
            self._make(self.path, SIZE)
        return target

    def bare(self, target: Target) -> Target:
        return target

    def write(self, target: Target, value: int) -> None:
        self._write(self.path, [(0, SIZE, value)])

    def read(self, target: Target, state: str) -> int:
        raw = self.path.with_suffix(".raw")
        self._qemu_img("convert", "-f", "qcow2", "-O", "raw", self.path, raw)
        (value,) = set(raw.read_bytes())
        raw.unlink()
        return value


class TestQCOW2Backend(BackendContract):
    chains = False
    comparable = False
    roots = False

    @pytest.fixture
    def bench(
        self, context: Context, tmp_path: Path, make_image: Any, write_to_image: Any, qemu_img: Any
    ) -> InternalBench:
        return InternalBench(
            QCOW2Backend(context), tmp_path, (make_image, write_to_image, qemu_img)
        )

    def test_names_of_digits(self, bench: InternalBench) -> None:
        """qemu-img takes a name of digits for the number of a snapshot."""
        target = bench.target()
        for state, value in (("2", 1), ("1", 2), ("3", 3)):
            put(bench, target, state, value)
        for state, value in (("2", 1), ("1", 2)):
            bench.backend.get(target, state, OVERWRITE)
            assert bench.read(target, state) == value
        bench.backend.unset(target, "2")
        assert names(bench, target) == ["1", "3"]
        bench.backend.get(target, "1", OVERWRITE)
        assert bench.read(target, "1") == 2

    def test_killed_while_replacing(self, bench: InternalBench, qemu_img: Any) -> None:
        """
        There are two of the name then: the old one counts, and both go, or give way, together.
        """
        target = bench.target()
        put(bench, target, "install", 7)
        bench.write(target, 8)
        qemu_img("snapshot", "-c", "install", bench.path)
        assert names(bench, target) == ["install"]
        bench.backend.get(target, "install", OVERWRITE)
        assert bench.read(target, "install") == 7
        put(bench, target, "install", 9, REPLACE)
        bench.backend.get(target, "install", OVERWRITE)
        assert bench.read(target, "install") == 9
        assert bench.backend.unset(target, "install").states == {str(bench.path): ("install",)}
        assert names(bench, target) == []

    def test_an_image_that_is_open(self, bench: InternalBench) -> None:
        target = bench.target()
        put(bench, target, "install", 7)
        before = bench.photograph()
        # A program that has the image open as QEMU does; once it has answered, it surely has.
        with subprocess.Popen(
            ["qemu-io", "-f", "qcow2", bench.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.write("length\n")
            holder.stdin.flush()
            holder.stdout.readline()
            for do in (
                lambda: bench.backend.get(target, "install", OVERWRITE),
                lambda: bench.backend.set(target, "other"),
                lambda: bench.backend.unset(target, "install"),
                lambda: bench.backend.unset(target, "root", Options(cascade=True)),
            ):
                with pytest.raises(InUse, match="qemu-io"):
                    do()
            holder.communicate("quit\n", timeout=60)
        assert bench.photograph() == before

    def test_the_image_itself(self, bench: InternalBench) -> None:
        target = bench.target()
        assert bench.backend.check(target, "root")
        assert {at.result for at in bench.backend.set(target, "root").pools} == {Presence.PRESENT}
        assert bench.backend.get(target, "root").working == bench.path
        put(bench, target, "install", 7)
        with pytest.raises(HasDependants) as caught:
            bench.backend.unset(target, "root")
        assert caught.value.dependants == ("vm1/disk install",)
        assert bench.backend.unset(target, "root", Options(cascade=True, dry_run=True)).states
        assert bench.path.exists()
        bench.backend.unset(target, "root", Options(cascade=True))
        assert not bench.path.exists()
        assert not bench.backend.check(target, "root")
        for do in (bench.backend.get, bench.backend.set, bench.backend.unset):
            with pytest.raises(NotFound):
                do(target, "root")

    def test_states_of_a_running_machine_are_left_alone(
        self, bench: InternalBench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = bench.target()
        put(bench, target, "install", 7)
        real = bench.backend._tool.snapshots  # type: ignore[attr-defined]
        monkeypatch.setattr(
            bench.backend._tool,
            "snapshots",
            lambda path: [{**one, "vm-state-size": 4096} for one in real(path)],
        )  # type: ignore[attr-defined]
        assert names(bench, target) == []
        for do in (
            lambda: bench.backend.get(target, "install", OVERWRITE),
            lambda: bench.backend.unset(target, "install"),
        ):
            with pytest.raises(Conflict, match="running machine"):
                do()

    def test_working_images_of_the_cache_only(
        self, bench: InternalBench, context: Context, make_image: Any, tmp_path: Path
    ) -> None:
        make_image(tmp_path / "below.qcow2", SIZE)
        make_image(tmp_path / "above.qcow2", None, backing=tmp_path / "below.qcow2")
        elsewhere = Target(Image("vm1", "disk"), {"disk": tmp_path / "above.qcow2"})
        with pytest.raises(UnsafeImage, match="not in the cache"):
            bench.backend.set(elsewhere, "install")
        below = Target(Image("vm1", "disk"), {"disk": tmp_path / "below.qcow2"})
        QCOW2ExtBackend(context).set(below, "install")
        assert bench.backend.set(below, "further").complete
        assert names(bench, Target(Image("vm1", "disk"))) == []
        assert bench.backend.check(below, "further")

    def test_what_it_needs(self, bench: InternalBench) -> None:
        with pytest.raises(UsageError, match="must be named"):
            bench.backend.set(Target(Image("vm1", "disk")), "install")
        with pytest.raises(UsageError, match="vm1/disk"):
            bench.backend.check(Target(Machine("vm1")), "install")
