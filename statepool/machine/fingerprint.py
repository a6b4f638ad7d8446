"""
The fingerprint of a machine. Only a QEMU with the same hardware can load the machine's RAM.

QEMU itself detects another amount of RAM and another machine type. But it silently loads RAM into a
machine with another CPU or an additional device, and the guest fails later. So the hardware of a
machine is recorded with its RAM, and compared before loading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from statepool.errors import Incompatible
from statepool.machine.monitor import CommandFailed
from statepool.machine.running import RunningMachine

_WORDS = {
    "qemu": "QEMU",
    "machine": "the machine type",
    "accelerator": "the accelerator",
    "cpu": "the CPU",
    "processors": "the number of processors",
    "memory": "the RAM in bytes",
    "devices": "the devices",
}
"""The fields, and their names in words."""

_SEPARATOR = "; "

_PLUGGED_IN = ("/machine/peripheral", "/machine/peripheral-anon")
"""The places of QEMU's added devices: those with an id, and the others."""


def fingerprint(machine: RunningMachine) -> dict[str, str]:
    """
    :returns: the hardware of a machine: ``qemu``, ``machine``, ``accelerator``, ``cpu``,
        ``processors``, ``memory`` and ``devices``
    :raises MachineError: QEMU has ended
    """
    # All commands are sent together: one after the other they would take a tenth of the time that a
    # guest needs to continue.
    version, processors, kind, kvm, memory, buses, *plugged = machine.monitor.execute_many(
        [
            ("query-version", {}),
            ("query-cpus-fast", {}),
            ("qom-get", {"path": "/machine", "property": "type"}),
            ("query-kvm", {}),
            ("query-memory-size-summary", {}),
            ("query-pci", {}),
            *(("qom-list", {"path": place}) for place in _PLUGGED_IN),
        ]
    )
    numbers = version["qemu"]
    return {
        "qemu": f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}",
        "machine": str(kind).removesuffix("-machine"),
        "accelerator": "kvm" if kvm["enabled"] else "tcg",
        "cpu": _cpu(machine, processors[0]["qom-path"]),
        "processors": str(len(processors)),
        "memory": str(memory["base-memory"]),
        "devices": _SEPARATOR.join(_devices(buses, plugged)),
    }


def _cpu(machine: RunningMachine, path: str) -> str:
    """
    :returns: the model of a CPU, and a digest of its features, since a model can be given more or
        fewer of them
    """
    model = str(machine.execute("qom-get", path=path, property="type"))
    try:
        words = json.dumps(
            machine.execute("qom-get", path=path, property="feature-words"), sort_keys=True
        )
    except CommandFailed:
        return model  # not an x86 CPU
    return f"{model} {hashlib.sha256(words.encode()).hexdigest()[:16]}"


def _devices(buses: list[dict[str, Any]], plugged: list[list[dict[str, Any]]]) -> list[str]:
    """
    :returns: every PCI device with its place and its kind, and the types of all added devices,
        wherever they are
    """
    found = [device for bus in buses for device in _on_bus(bus["devices"])]
    kinds = [
        entry["type"]
        for entries in plugged
        for entry in entries
        if entry["type"].startswith("child<")
    ]
    return sorted(found) + sorted(kind.removeprefix("child<").removesuffix(">") for kind in kinds)


def _on_bus(devices: list[dict[str, Any]]) -> list[str]:
    found = []
    for device in devices:
        kind = device["id"]
        found.append(
            f"PCI {device['bus']:02x}:{device['slot']:02x}.{device['function']}"
            f" {kind['vendor']:04x}:{kind['device']:04x}"
        )
        found += _on_bus(device.get("pci_bridge", {}).get("devices", []))
    return found


def differences(wanted: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """
    :param wanted: the fingerprint of the machine from which the RAM comes
    :param there: the fingerprint of the machine that is to load it
    :returns: the differences, in words; empty if the RAM can be loaded
    """
    found = []
    for name, words in _WORDS.items():
        one, other = wanted.get(name, ""), there.get(name, "")
        if name == "qemu":
            if one.split(".")[:2] != other.split(".")[:2]:  # the last number is no format
                found.append(f"{words} is {other or 'unknown'}, not {one or 'unknown'}")
        elif name == "devices":
            found += _device_differences(one, other)
        elif one != other:
            found.append(f"{words} is {other or 'unknown'}, not {one or 'unknown'}")
    return found


def _device_differences(one: str, other: str) -> list[str]:
    left, right = one.split(_SEPARATOR), other.split(_SEPARATOR)
    missing, extra = list(left), list(right)
    for device in right:
        if device in missing:
            missing.remove(device)
    for device in left:
        if device in extra:
            extra.remove(device)
    return [f"the device {device} is missing" for device in missing if device] + [
        f"there is the device {device} besides" for device in extra if device
    ]


def require_same(machine: RunningMachine, wanted: Mapping[str, str], state: str) -> None:
    """
    Require a machine with the same fingerprint.

    :param machine: the machine that is to load RAM
    :param wanted: the fingerprint of the machine from which the RAM comes
    :param state: for the message
    :raises Incompatible: the fingerprints differ
    """
    found = differences(wanted, fingerprint(machine))
    if found:
        raise Incompatible(
            f"{machine} cannot load the RAM of {state}: {'; '.join(found)}",
            differences=found,
            state=state,
            hint=(
                "start it as the one was that was saved; --force loads it all the same, and the"
                " guest may break"
            ),
        )
