"""
Descriptions of machines, their fingerprints, and what the tiny guest is made of: without any QEMU.
"""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from statepool.errors import IntegrityError, InvalidName, MachineError, NotFound, UsageError
from statepool.machine import stream
from statepool.machine.agent import GuestAgent, file_systems_frozen
from statepool.machine.description import MachineConfig
from statepool.machine.fingerprint import differences
from statepool.testing.guest import archive, make_guest

MADE_OF = {
    "qemu": "7.2.22",
    "machine": "pc-q35-7.2",
    "accelerator": "tcg",
    "cpu": "qemu64-x86_64-cpu faced010f2472578",
    "processors": "1",
    "memory": "134217728",
    "devices": "PCI 00:01.0 1af4:1001; PCI 00:02.0 1af4:1001; virtio-blk-pci; virtio-blk-pci",
}


# -- descriptions ----------------------------------------------------------------------------------


def test_a_command_has_all_that_a_description_says(tmp_path: Path) -> None:
    images = {"disk": tmp_path / "a, b.qcow2", "data+1": tmp_path / "c.qcow2"}
    config = MachineConfig(
        images,
        memory=1 << 30,
        processors=2,
        machine="pc",
        cpu="max",
        accelerator="kvm",
        arguments=["-nic", "none"],
    )
    command = config.command()
    assert command[0] == "qemu-system-x86_64"
    assert command[-2:] == ["-nic", "none"]
    for pair in (
        ["-m", "1024M"],
        ["-smp", "2"],
        ["-machine", "pc"],
        ["-cpu", "max"],
        ["-accel", "kvm"],
        ["-display", "none"],
    ):
        assert any(command[index : index + 2] == pair for index in range(len(command)))
    disks = [
        json.loads(command[index + 1]) for index, word in enumerate(command) if word == "-blockdev"
    ]
    assert [disk["file"]["filename"] for disk in disks] == [str(path) for path in images.values()]
    assert (
        [disk["node-name"] for disk in disks]
        == ["disk0", "disk1"]
        == [config.node("disk"), config.node("data+1")]
    )
    assert {disk["driver"] for disk in disks} == {"qcow2"}


def test_paths_are_absolute_and_descriptions_are_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = MachineConfig({"disk": "x.qcow2"})
    assert config.images == {"disk": tmp_path / "x.qcow2"}
    assert config == MachineConfig({"disk": tmp_path / "x.qcow2"})
    assert config.with_images({}) == MachineConfig()


@pytest.mark.parametrize("memory", [0, -1, 1000, (1 << 20) + 1])
def test_ram_is_given_in_whole_mebibytes(memory: int) -> None:
    with pytest.raises(UsageError, match="cannot have"):
        MachineConfig(memory=memory)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arguments": "-nographic"}, "the arguments of QEMU are not a list, but '-nographic'"),
        ({"images": "disk"}, "the images of a machine are not 'disk'"),
        ({"processors": 0}, "cannot have 0 processors"),
        ({"processors": "2"}, "cannot have '2' processors"),
        ({"accelerator": "x"}, "there is no accelerator 'x'"),
        ({"accelerator": None}, "there is no accelerator None"),
    ],
)
def test_what_no_machine_can_be_made_of(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        MachineConfig(**wrong)
    assert caught.value.hint


def test_an_accelerator_has_properties() -> None:
    assert "tcg,thread=single" in MachineConfig(accelerator="tcg,thread=single").command()


def test_names_of_images_are_names() -> None:
    with pytest.raises(InvalidName):
        MachineConfig({"../disk": Path("x")})


# -- fingerprints ----------------------------------------------------------------------------------


def test_the_same_machine_has_no_differences() -> None:
    assert differences(MADE_OF, MADE_OF) == []
    assert differences(MADE_OF, {**MADE_OF, "qemu": "7.2.1"}) == []
    assert differences({**MADE_OF, "compression": "zstd"}, MADE_OF) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"qemu": "8.0.0"}, ["QEMU is 8.0.0, not 7.2.22"]),
        ({"machine": "pc-i440fx-7.2"}, ["the machine type is pc-i440fx-7.2, not pc-q35-7.2"]),
        ({"accelerator": "kvm"}, ["the accelerator is kvm, not tcg"]),
        (
            {"cpu": "max-x86_64-cpu 00"},
            ["the CPU is max-x86_64-cpu 00, not qemu64-x86_64-cpu faced010f2472578"],
        ),
        ({"processors": "2"}, ["the number of processors is 2, not 1"]),
        ({"memory": "1"}, ["the RAM in bytes is 1, not 134217728"]),
        (
            {"devices": "PCI 00:01.0 1af4:1001; virtio-blk-pci"},
            ["the device PCI 00:02.0 1af4:1001 is missing", "the device virtio-blk-pci is missing"],
        ),
        (
            {"devices": MADE_OF["devices"] + "; virtio-rng-pci"},
            ["there is the device virtio-rng-pci besides"],
        ),
        (
            {"qemu": "8.0.0", "memory": "1"},
            ["QEMU is 8.0.0, not 7.2.22", "the RAM in bytes is 1, not 134217728"],
        ),
    ],
)
def test_every_difference_is_told(change: dict[str, str], told: list[str]) -> None:
    assert differences(MADE_OF, {**MADE_OF, **change}) == told


def test_a_fingerprint_that_lacks_something_differs() -> None:
    assert differences({}, MADE_OF)[0] == "QEMU is 7.2.22, not unknown"


# -- compressed RAM --------------------------------------------------------------------------------


def read(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


def test_what_is_compressed_is_read_as_it_was(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000
    (tmp_path / "ram").write_bytes(data)
    stream.compress(tmp_path / "ram", tmp_path / "small")
    assert (tmp_path / "small").stat().st_size < len(data) // 10
    with stream.readable(tmp_path / "small", "zstd") as descriptor:
        assert read(descriptor) == data
    with stream.readable(tmp_path / "ram", "") as descriptor:
        assert read(descriptor) == data


def test_a_reader_may_have_enough_before_the_end(tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(bytes(50 << 20))
    stream.compress(tmp_path / "ram", tmp_path / "small")
    with stream.readable(tmp_path / "small", "zstd"):
        pass
    assert not any(thread.name == "statepool-zstd" for thread in threading.enumerate())


def test_what_is_not_compressed_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(b"no zstd at all" * 1000)
    with (
        pytest.raises(IntegrityError, match="not what zstd wrote"),
        stream.readable(tmp_path / "ram", "zstd") as descriptor,
    ):
        read(descriptor)
        raise IntegrityError("QEMU could not load it")
    with (
        pytest.raises(IntegrityError, match="unknown way: 'lz5'"),
        stream.readable(tmp_path / "ram", "lz5"),
    ):
        pass


# -- the guest agent -------------------------------------------------------------------------------


class Agent(threading.Thread):
    """Answers as an agent would; the first line is left from somebody else's talk."""

    def __init__(self, path: Path, refused: str | None) -> None:
        super().__init__()
        self.refused = refused
        self.heard: list[str] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.start()

    def run(self) -> None:
        connection, _ = self.listener.accept()
        with connection, connection.makefile("rwb") as lines:
            lines.write(b'{"return": 0}\n\xffgarbage\n')
            lines.flush()
            for line in lines:
                question = json.loads(line)
                self.heard.append(question["execute"])
                answer: dict[str, object] = {"return": question.get("arguments", {}).get("id", 1)}
                if question["execute"] == self.refused:
                    answer = {"error": {"class": "GenericError", "desc": "not today"}}
                lines.write(json.dumps(answer).encode() + b"\n")
                lines.flush()

    def end(self) -> None:
        self.join()
        self.listener.close()


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a")


def test_an_agent_freezes_and_thaws(place: Path) -> None:
    agent = Agent(place / "agent", None)
    with file_systems_frozen(place / "agent") as frozen:
        assert frozen
    agent.end()
    assert agent.heard == ["guest-sync", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]


def test_an_agent_that_refuses(place: Path) -> None:
    agent = Agent(place / "agent", "guest-fsfreeze-freeze")
    with (
        pytest.raises(MachineError, match="refused guest-fsfreeze-freeze: not today"),
        file_systems_frozen(place / "agent"),
    ):
        raise AssertionError("nothing was frozen")
    agent.end()
    assert agent.heard[-1] == "guest-fsfreeze-thaw"


def test_what_fails_meanwhile_thaws(place: Path) -> None:
    agent = Agent(place / "agent", None)
    with pytest.raises(ZeroDivisionError), file_systems_frozen(place / "agent"):
        raise ZeroDivisionError
    agent.end()
    assert agent.heard[-1] == "guest-fsfreeze-thaw"


def test_no_agent(place: Path) -> None:
    with file_systems_frozen(None) as frozen:
        assert not frozen
    with pytest.raises(NotFound), file_systems_frozen(place / "nowhere"):
        pass
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "silent"))
        listener.listen()
        with pytest.raises(MachineError, match=r"no guest agent answers at .* within 0\.1 s"):
            GuestAgent(place / "silent", timeout=0.1)


# -- the guest -------------------------------------------------------------------------------------


def test_the_archive_is_one_that_cpio_reads(tmp_path: Path) -> None:
    archived = archive(
        [
            ("bin", 0o040755, b""),
            ("bin/odd", 0o100755, b"12345"),
            ("init", 0o100755, b"#!/bin/sh\n"),
        ]
    )
    assert archived.startswith(b"070701")
    assert len(archived) % 4 == 0
    for part in (b"bin/odd\0", b"12345", b"TRAILER!!!\0"):
        assert part in archived
    try:
        done = subprocess.run(["cpio", "-itv"], input=archived, capture_output=True, check=True)
    except FileNotFoundError:
        return  # the kernel of the tests with a real guest reads it, too
    assert b"bin/odd" in done.stdout


def test_a_guest_needs_its_packages(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="vmlinuz") as caught:
        make_guest(tmp_path, tmp_path / "initramfs")
    assert "tools/guest" in str(caught.value)
