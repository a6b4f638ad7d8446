"""States of machines with two disks that are off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statepool.backends.base import Context, Options, StateBackend, Target
from statepool.backends.machines import QCOW2MachineBackend
from statepool.errors import HasDependants, UsageError
from statepool.model.objects import Image, Machine
from statepool.testing.backends import BackendContract, Bench, chain, put

SIZE = 256 << 10
IMAGES = ("data", "disk")


class MachineBench(Bench):
    """A machine with two disks, which always hold the same."""

    def __init__(
        self, backend: StateBackend, directory: Path, tools: tuple[Callable[..., Any], ...]
    ) -> None:
        super().__init__(backend, [directory])
        self._directory = directory
        self._make, self._write, self._qemu_img = tools
        self._made = 0

    def target(self) -> Target:
        self._made += 1
        return Target(
            Machine("vm1", IMAGES),
            {
                name: self._make(self._directory / f"{name}-{self._made}.qcow2", SIZE)
                for name in IMAGES
            },
        )

    def write(self, target: Target, value: int) -> None:
        for number, name in enumerate(IMAGES):
            self._write(target.working[name], [(0, SIZE, value + number)])

    def read(self, target: Target, state: str) -> int:
        return min(self._value(path) - IMAGES.index(name) for name, path in target.working.items())

    def _value(self, path: Path) -> int:
        raw = path.with_suffix(".raw")
        self._qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        (value,) = set(raw.read_bytes())
        raw.unlink()
        return value


class TestQCOW2MachineBackend(BackendContract):
    @pytest.fixture
    def bench(
        self, context: Context, tmp_path: Path, make_image: Any, write_to_image: Any, qemu_img: Any
    ) -> MachineBench:
        return MachineBench(
            QCOW2MachineBackend(context), tmp_path, (make_image, write_to_image, qemu_img)
        )

    def test_what_others_stand_on_is_not_removed(self, bench: Bench) -> None:
        """The images of the state that stands on it are named, too."""
        target = chain(bench)
        before = bench.photograph()
        with pytest.raises(HasDependants) as caught:
            bench.backend.unset(target, "install")
        assert caught.value.dependants == (
            "vm1 customize",
            "vm1/data customize",
            "vm1/disk customize",
        )
        assert bench.photograph() == before

    def test_labels_are_kept(self, bench: Bench, context: Context) -> None:
        put(bench, bench.target(), "install", 7, Options(labels={"build": "42"}))
        listed = {str(one.manifest.id): one for one in bench.backend.show(Target(Machine("vm1")))}
        assert set(listed) == {"vm1 install", "vm1/data install", "vm1/disk install"}
        assert all(dict(one.manifest.labels) == {"build": "42"} for one in listed.values())
        assert {one.pools for one in listed.values()} == {
            (str(context.cache.pool), str(context.sources[0]))
        }

    def test_a_dry_run_knows_what_a_source_has(self, bench: Bench) -> None:
        target = bench.target()
        put(bench, target, "install", 7)
        assert [
            at.result for at in bench.backend.set(target, "install", Options(dry_run=True)).pools
        ] == ["present", "present"]

    def test_an_image_is_not_a_machine(self, bench: Bench) -> None:
        with pytest.raises(UsageError, match="name the machine"):
            bench.backend.check(Target(Image("vm1", "disk")), "install")

    def test_what_it_cannot_do(self, bench: Bench) -> None:
        target = bench.target()
        put(bench, target, "install", 7)
        bench.write(target, 8)
        before = bench.photograph()
        with pytest.raises(UsageError, match="squashed"):
            bench.backend.set(target, "install", Options(squash=True))
        assert bench.photograph() == before
