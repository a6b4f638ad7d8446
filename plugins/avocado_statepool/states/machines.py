"""
States of machines: of running machines with their RAM, and of machines that are off with all their
images.

A running machine is controlled by QMP, at a socket that no other program uses: QEMU accepts one
client at a time. The parameter ``statepool_monitor`` names the socket, or an attribute of this name
of the machine.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from avocado_statepool.states import params as p
from avocado_statepool.states.images import QCOW2Backend, QCOW2ExtBackend, make_disk
from avocado_statepool.states.sourced import SourcedStateBackend
from avocado_statepool.states.transfer import failures, names_of, replaces

_MONITOR = "statepool_monitor"


class _Machines:
    """The common part of both backends: the root state of a machine exists if it runs."""

    @classmethod
    def _runs(cls, params: Any, object: Any) -> bool:
        if not all(p.root_image(each).exists() for each in p.each_image(params)):
            p.LOG.info("%s lacks an image", params["vms"])
            return False
        return not _wanted(params) or (object is not None and bool(object.is_alive()))

    @classmethod
    def _run(cls, params: Any, object: Any) -> None:
        from statepool import UsageError

        for each in p.each_image(params):
            make_disk(each)
        if not _wanted(params):
            return
        if object is None:
            raise UsageError(
                f"there is no {params['vms']} to start",
                hint="give it by the environment, or use_env = no",
            )
        if not object.is_alive():
            object.create()

    @classmethod
    def _end(cls, params: Any, object: Any) -> None:
        if object is not None and object.is_alive():
            object.destroy(gracefully=False)


class QCOW2VTBackend(_Machines, QCOW2Backend):
    """States of a running machine as snapshots inside its images."""

    _require_running_object = True

    @classmethod
    def show(cls, params: Any, object: Any = None) -> list[str]:
        """:returns: the states that all its images have"""
        return [one.manifest.state for one in _live(params).show(_target(params, object))]

    @classmethod
    def get(cls, params: Any, object: Any = None) -> None:
        """Revert the machine to a state."""
        _live(params).get(_target(params, object), p.state_of("get", params))

    @classmethod
    def set(cls, params: Any, object: Any = None) -> None:
        """Store the present state of the machine."""
        from statepool import Options

        _live(params).set(
            _target(params, object), p.state_of("set", params), Options(replace=replaces(params))
        )

    @classmethod
    def unset(cls, params: Any, object: Any = None) -> None:
        """Remove a state from all its images."""
        _live(params).unset(_target(params, object), p.state_of("unset", params))

    @classmethod
    def _check_root(cls, params: Any, object: Any = None) -> bool:
        return cls._runs(params, object)

    @classmethod
    def _set_root(cls, params: Any, object: Any = None) -> None:
        cls._run(params, object)

    @classmethod
    def _unset_root(cls, params: Any, object: Any = None) -> None:
        cls._end(params, object)


class RamfileBackend(_Machines, SourcedStateBackend):
    """
    States of a machine with all its images at one moment, and with its RAM if it runs.

    ``image_state_backend`` exists since avocado-i2n sets it. It is not used, since images and RAM
    belong together here.
    """

    image_state_backend: Any = QCOW2ExtBackend

    @classmethod
    def _show(cls, params: Any, object: Any = None) -> list[str]:
        return names_of(params, p.open_pool(params), p.OWN)

    @classmethod
    def _get(cls, params: Any, object: Any = None) -> None:
        pool, state, machine = p.open_pool(params), p.state_of("get", params), p.machine_of(params)
        cls._end(params, object)
        places = _places(params)
        for path in places.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        pool.machine(machine).get(state, to=places, overwrite=True)
        ram = os.path.join(params["swarm_pool"], machine.machine, f"{state}.state")
        if object is not None and os.path.exists(ram):
            object.restore_from_file(ram)
            object.resume(timeout=3)

    @classmethod
    def _set(cls, params: Any, object: Any = None) -> None:
        from statepool import Options

        pool, state = p.open_pool(params), p.state_of("set", params)
        if object is None or not object.is_alive():
            failures(
                pool.machine(p.machine_of(params)).set(
                    state, source=_places(params), replace=replaces(params)
                )
            )
        else:
            failures(
                pool.backend("ramfile").set(
                    _target(params, object), state, Options(replace=replaces(params))
                )
            )

    @classmethod
    def _unset(cls, params: Any, object: Any = None) -> None:
        from statepool import NotFound

        try:
            p.open_pool(params).machine(p.machine_of(params)).unset(p.state_of("unset", params))
        except NotFound as error:
            p.LOG.debug("%s", error)

    @classmethod
    def check_root(cls, params: Any, object: Any = None) -> bool:
        """
        :returns: whether the machine has its images and runs; with ``use_env = no``, only whether
            it has its images
        """
        return cls._runs(params, object)

    @classmethod
    def get_root(cls, params: Any, object: Any = None) -> None:
        """Do nothing: the machine runs."""

    @classmethod
    def set_root(cls, params: Any, object: Any = None) -> None:
        """Make missing images of the machine, and start it."""
        cls._run(params, object)

    @classmethod
    def unset_root(cls, params: Any, object: Any = None) -> None:
        """Stop the machine."""
        cls._end(params, object)


def _wanted(params: Any) -> bool:
    return bool(params.get_boolean("use_env", True))


def _places(params: Any) -> dict[str, Path]:
    return {each["images"]: p.working_image(each) for each in p.each_image(params)}


def _live(params: Any) -> Any:
    return p.open_pool(params).backend("qcow2vt")


def _target(params: Any, object: Any) -> Any:
    from statepool import Target, UsageError

    monitor = params.get(_MONITOR) or getattr(object, _MONITOR, None)
    if not monitor:
        hint = (
            f"{_MONITOR} = /path, and start QEMU with -qmp unix:/path,server=on,wait=off besides"
            " its other monitors"
        )
        raise UsageError(f"nobody says where {params['vms']} can be asked by QMP", hint=hint)
    return Target(p.machine_of(params), _places(params), Path(monitor))
