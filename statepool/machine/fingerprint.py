"""
What can load the RAM of a machine: only a QEMU with the same hardware in it.

QEMU itself notices another amount of RAM and another machine type. It loads RAM into a machine with
another CPU, or with a device more, without a word, and the guest breaks later. So what a machine is
made of is remembered with its RAM, and compared before loading.
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
"""The fields, and what they are in words."""

_SEPARATOR = "; "

_PLUGGED_IN = ("/machine/peripheral", "/machine/peripheral-anon")
"""Where QEMU keeps the devices that it was told of: those with an id, and the others."""


def fingerprint(machine: RunningMachine) -> dict[str, str]:
    """
    :returns: what a machine is made of: ``qemu``, ``machine``, ``accelerator``, ``cpu``,
        ``processors``, ``memory`` and ``devices``
    :raises MachineError: QEMU has ended
    """
    # Together: one after the other they would take a tenth of the time that a guest needs to go on.
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
    """The model, and a digest of its features: a model can be given more or less of them."""
    model = str(machine.execute("qom-get", path=path, property="type"))
    try:
        words = json.dumps(
            machine.execute("qom-get", path=path, property="feature-words"), sort_keys=True
        )
    except CommandFailed:
        return model  # not an x86 one
    return f"{model} {hashlib.sha256(words.encode()).hexdigest()[:16]}"


def _devices(buses: list[dict[str, Any]], plugged: list[list[dict[str, Any]]]) -> list[str]:
    """
    Every PCI device with its place and its kind, and the types of what was plugged in, wherever it
    is.
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
    :param wanted: of the machine whose RAM it is
    :param there: of the one that is to load it
    :returns: what differs, in words; empty if it can be loaded
    """
    found = []
    for name, words in _WORDS.items():
        one, other = wanted.get(name, ""), there.get(name, "")
        if name == "qemu":
            if one.split(".")[:2] != other.split(".")[:2]:  # its last number changes no format
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
    :param machine: that is to load RAM
    :param wanted: the fingerprint of the machine whose RAM it is
    :param state: for the message
    :raises Incompatible: they differ
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
