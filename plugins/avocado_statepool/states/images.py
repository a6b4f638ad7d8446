"""States of images that are off."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from avocado_statepool.states import params as p
from avocado_statepool.states.sourced import RootSourcedStateBackend, SourcedStateBackend
from avocado_statepool.states.transfer import failures, names_of, replaces


class QCOW2Backend(RootSourcedStateBackend):
    """States of an image as snapshots inside its own file, which has to stay on this host."""

    _require_running_object = False

    @classmethod
    def state_type(cls) -> str:
        """:returns: the name of this kind of states, for messages"""
        return "on/vm" if cls._require_running_object else "off/image"

    @classmethod
    def show(cls, params: Any, object: Any = None) -> list[str]:
        """:returns: the states in the image"""
        return [one.manifest.state for one in _internal(params).show(_target(params))]

    @classmethod
    def get(cls, params: Any, object: Any = None) -> None:
        """Restore the content of the image."""
        from statepool import Options

        _internal(params).get(_target(params), p.state_of("get", params), Options(overwrite=True))

    @classmethod
    def set(cls, params: Any, object: Any = None) -> None:
        """Store the content of the image as a state."""
        from statepool import Options

        _internal(params).set(
            _target(params), p.state_of("set", params), Options(replace=replaces(params))
        )

    @classmethod
    def unset(cls, params: Any, object: Any = None) -> None:
        """Remove a state from the image."""
        _internal(params).unset(_target(params), p.state_of("unset", params))

    # -- the image itself --------------------------------------------------------------------------

    @classmethod
    def _check_root(cls, params: Any, object: Any = None) -> bool:
        if _is_alive(object):
            p.LOG.info("%s runs, and should not", params["vms"])
            return False
        return p.root_image(params).exists()

    @classmethod
    def _set_root(cls, params: Any, object: Any = None) -> None:
        stop(params, object)
        make_disk(params)

    @classmethod
    def _unset_root(cls, params: Any, object: Any = None) -> None:
        stop(params, object)
        path = p.root_image(params)
        p.open_pool(params).throw_away(path)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # it stays while it has other files


class QCOW2ExtBackend(SourcedStateBackend, QCOW2Backend):
    """
    States of an image as chains of files in the cache and its pools: the usual backend. The root
    state exists if the machine has its disk.
    """

    @classmethod
    def _show(cls, params: Any, object: Any = None) -> list[str]:
        return names_of(params, p.open_pool(params), p.OWN)

    @classmethod
    def _get(cls, params: Any, object: Any = None) -> None:
        path = p.working_image(params)
        path.parent.mkdir(parents=True, exist_ok=True)
        p.open_pool(params).image(p.image_of(params)).get(
            p.state_of("get", params), to=path, overwrite=True
        )

    @classmethod
    def _set(cls, params: Any, object: Any = None) -> None:
        force = replaces(params)
        image = p.open_pool(params).image(p.image_of(params))
        failures(
            image.set(
                p.state_of("set", params),
                source=p.working_image(params),
                replace=force,
                squash=force,
            )
        )

    @classmethod
    def _unset(cls, params: Any, object: Any = None) -> None:
        from statepool import NotFound

        try:
            p.open_pool(params).image(p.image_of(params)).unset(p.state_of("unset", params))
        except NotFound as error:
            p.LOG.debug("%s", error)

    @classmethod
    def check_root(cls, params: Any, object: Any = None) -> bool:
        """:returns: whether the machine has its disk"""
        return cls._check_root(params, object)

    @classmethod
    def get_root(cls, params: Any, object: Any = None) -> None:
        """Do nothing: the machine has its disk."""

    @classmethod
    def set_root(cls, params: Any, object: Any = None) -> None:
        """Make a disk for the machine, if it has none."""
        cls._set_root(params, object)

    @classmethod
    def unset_root(cls, params: Any, object: Any = None) -> None:
        """Remove the machine's disk. Its states stay."""
        cls._unset_root(params, object)


def _is_alive(object: Any) -> bool:
    return object is not None and bool(object.is_alive())


def stop(params: Any, object: Any) -> None:
    """Stop a running machine."""
    if _is_alive(object):
        object.destroy(gracefully=params.get_boolean("soft_boot", True))


def make_disk(params: Any) -> None:
    """
    Make a disk by virttest, as the machine's parameters describe it, if the machine has none.

    :raises UsageError: virttest is not installed
    """
    from statepool import UsageError

    path = p.root_image(params)
    if path.exists():
        return
    try:
        from virttest import env_process
    except ImportError as error:
        hint = "install avocado-framework-plugin-vt, or make the disk with qemu-img create"
        raise UsageError(
            f"there is no disk {path}, and virttest is not here to make one",
            path=str(path),
            hint=hint,
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    params.update({"create_image": "yes", "force_create_image": "yes"})
    env_process.preprocess_image(None, params, str(path.with_suffix("")))


def _internal(params: Any) -> Any:
    return p.open_pool(params).backend("qcow2")


def _target(params: Any) -> Any:
    from statepool import Target

    image = p.image_of(params)
    return Target(image, {image.name: Path(p.root_image(params))})
