"""Chains between the cache and one pool."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from avocado_statepool.states import params as p

if TYPE_CHECKING:
    from statepool import Image, ImageHandle, Machine, SetResult, StatePool

ROOT = "root"


@dataclass(frozen=True)
class _Place:
    """
    A file of a pool, parsed as a state.

    :param pool: the pool's part of the path
    :param machine: its machine
    :param image: its image; empty for a machine
    :param state: its name; ``root`` for the root image
    """

    pool: str
    machine: str
    image: str
    state: str

    @classmethod
    def parse(cls, path: str, params: Any) -> _Place:
        """
        :param path: ``POOL/MACHINE/IMAGE/STATE.qcow2``, ``POOL/MACHINE/STATE.state`` or
            ``POOL/MACHINE/IMAGE.qcow2``
        :raises UsageError: it has none of these forms
        """
        from statepool import UsageError

        parts = PurePosixPath(path).parts
        name = parts[-1]
        machines = (params.get("object_id"), params["vms"])
        if name.endswith(".qcow2") and len(parts) > 3 and parts[-3] in machines:
            return cls(_join(parts[:-3]), parts[-3], parts[-2], name.removesuffix(".qcow2"))
        if len(parts) > 2 and parts[-2] in machines:
            if name.endswith(".state"):
                return cls(_join(parts[:-2]), parts[-2], "", name.removesuffix(".state"))
            if name.endswith(".qcow2"):
                return cls(_join(parts[:-2]), parts[-2], name.removesuffix(".qcow2"), ROOT)
        raise UsageError(
            f"{path} is no file of a state of {params['vms']}",
            hint="MACHINE/IMAGE/STATE.qcow2 or MACHINE/STATE.state in a pool",
        )

    @property
    def subject(self) -> Image | Machine:
        """The object of the state."""
        from statepool import Image, Machine

        return Image(self.machine, self.image) if self.image else Machine(self.machine)

    def handle(self, pool: StatePool) -> Any:
        """
        :returns: the handle of the object in a state pool: images and machines both have ``get``,
            ``set`` and so on
        """
        return (
            pool.image(f"{self.machine}/{self.image}") if self.image else pool.machine(self.machine)
        )


def _join(parts: tuple[str, ...]) -> str:
    return os.path.join(*parts)


def failures(stored: SetResult) -> None:
    """
    Raise an error if a set has failed in a pool.

    :raises TransportError: a pool does not have the state
    """
    from statepool import TransportError

    wrong = [f"{at.pool}: {at.error}" for at in stored.pools if at.error]
    if wrong:
        raise TransportError(
            f"{stored.object} {stored.state} could not be stored: {'; '.join(wrong)}",
            object=stored.object,
            state=stored.state,
        )


class TransferOps:
    """
    Transfers of files of a pool, as avocado-i2n calls them: each file means a state, and is moved
    with all states that back it.

    A pool's path is ``:/path`` (local), ``:;/path`` (links) or ``net:/path`` (another host).
    """

    @classmethod
    def list(cls, pool_path: str, params: Any) -> list[str]:
        """:returns: the names of the files in a directory of a pool, one for each state"""
        prefix, colon, path = pool_path.partition(":")
        parts = PurePosixPath(path.lstrip(";")).parts
        known = (params.get("object_id"), params["vms"])
        depth = 2 if len(parts) > 2 and parts[-2] in known else 1
        link = ";" if path.startswith(";") else ""
        pool = p.open_pool(
            params, [p.source_of(f"{prefix}{colon}{link}{_join(parts[:-depth])}", params)]
        )
        scope = "swarm cluster shared"
        if depth == 2:
            found = pool.image(f"{parts[-2]}/{parts[-1]}").show(scope=scope)
            return [f"{one.manifest.state}.qcow2" for one in found if one.manifest.state != ROOT]
        found = pool.machine(parts[-1]).show(scope=scope)
        names = [
            f"{one.manifest.object.partition('/')[2]}.qcow2"
            for one in found
            if one.manifest.state == ROOT
        ]
        return names + [
            f"{one.manifest.state}.state" for one in found if str(one.manifest.kind) == "ram"
        ]

    @classmethod
    def compare(cls, cache_path: str, pool_path: str, params: Any) -> bool:
        """
        :returns: whether the cache and a pool have the same state and the same states that back it;
            no image data is read
        """
        place, source = _there(pool_path, params)
        pool = p.open_pool(params, [source])
        subject = f"{place.machine}/{place.image}" if place.image else place.machine
        digests = []
        for scope in (p.OWN, source.scope):
            found = [
                one
                for one in pool.show(subject, scope=scope)
                if one.manifest.object == subject and one.manifest.state == place.state
            ]
            digests.append({str(one.manifest.kind): one.manifest.digest for one in found})
        own, far = digests
        return bool(own) and own == far and None not in own.values()

    @classmethod
    def download(cls, cache_path: str, pool_path: str, params: Any) -> None:
        """Fetch a state into the cache, or a root image to its path."""
        place, source = _there(pool_path, params)
        handle = place.handle(p.open_pool(params, [source]))
        if place.state == ROOT:
            Path(cache_path).parent.mkdir(parents=True, exist_ok=True)
            handle.get(ROOT, to=cache_path, overwrite=True)
        else:
            handle.get(place.state, scope=source.scope)

    @classmethod
    def upload(cls, cache_path: str, pool_path: str, params: Any) -> None:
        """Store a state of the cache, or a root image, in a pool."""
        place, source = _there(pool_path, params)
        if place.state == ROOT:
            handle = place.handle(p.open_pool(params, [source]))
            failures(handle.set(ROOT, source=cache_path, scope=source.scope, replace=True))
        else:
            failures(
                place.handle(p.open_pool(params, [source])).store(
                    place.state, to=source.location, replace=True
                )
            )

    @classmethod
    def delete(cls, pool_path: str, params: Any) -> None:
        """
        Remove a state from a pool.

        :raises HasDependants: another state depends on it
        """
        place, source = _there(pool_path, params)
        place.handle(p.open_pool(params, [source])).unset(place.state, scope=source.scope)


def _there(pool_path: str, params: Any) -> tuple[_Place, p.Source]:
    """:returns: the meaning of a file of a pool, and the pool"""
    prefix, colon, path = pool_path.partition(":")
    link = ";" if path.startswith(";") else ""
    place = _Place.parse(path.lstrip(";"), params)
    return place, p.source_of(f"{prefix}{colon}{link}{place.pool}", params)


def _of_kind(name: str, prefix: str) -> Any:
    def call(*arguments: Any) -> Any:
        *before, pool_path, params = arguments
        return getattr(TransferOps, name)(*before, f"{prefix}{pool_path}", params)

    call.__doc__ = (
        f"As ``{name}``, for a path"
        f" {f'without its {prefix}' if prefix else 'on another host, net:/path'}."
    )
    return staticmethod(call)


for _name in ("list", "compare", "download", "upload", "delete"):
    for _kind, _prefix in (("local", ":"), ("link", ":;"), ("remote", "")):
        # list_local and so on, as in avocado-i2n
        setattr(TransferOps, f"{_name}_{_kind}", _of_kind(_name, _prefix))


class QCOW2ImageTransfer:
    """
    States of one pool: ``show_location``, ``get_location`` and so on name the pool; for root
    images, ``shared_pool`` does.
    """

    ops = TransferOps

    @staticmethod
    def get_image_path(params: Any) -> str:
        """:returns: the path of the machine's disk"""
        return str(p.working_image(params))

    # -- chains ------------------------------------------------------------------------------------

    @classmethod
    def get_dependency(cls, state: str, params: Any) -> str:
        """:returns: the parent of a state of the cache; empty if it has none"""
        found = p.open_pool(params).image(p.image_of(params)).show(scope=p.OWN)
        return next(
            (
                one.manifest.parent.state
                for one in found
                if one.manifest.state == state and one.manifest.parent is not None
            ),
            "",
        )

    @classmethod
    def compare_chain(cls, state: str, cache_dir: str, pool_dir: str, params: Any) -> bool:
        """
        :returns: whether the cache and a pool have the same chain of a state, for all images of the
            parameters; every digest is compared
        """
        return all(
            cls.ops.compare(here, there, each)
            for here, there, each in cls._files(state, cache_dir, pool_dir, params)
        )

    @classmethod
    def transfer_chain(
        cls, state: str, cache_dir: str, pool_dir: str, params: Any, down: bool = True
    ) -> None:
        """Move the missing states of a chain, parents first."""
        move: Callable[[str, str, Any], None] = cls.ops.download if down else cls.ops.upload
        for here, there, each in cls._files(state, cache_dir, pool_dir, params):
            move(here, there, each)

    @staticmethod
    def _files(
        state: str, cache_dir: str, pool_dir: str, params: Any
    ) -> Iterator[tuple[str, str, Any]]:
        name = params.get("object_id") or params["vms"]
        for each in p.each_image(params):
            file = os.path.join(name, each["images"], f"{state}.qcow2")
            yield os.path.join(cache_dir, file), os.path.join(pool_dir, file), each

    # -- states ------------------------------------------------------------------------------------

    @classmethod
    def show(cls, params: Any, object: Any = None) -> list[str]:
        """:returns: the states that the pool has"""
        source = p.source_of(params["show_location"], params)
        return names_of(params, p.open_pool(params, [source]), source.scope)

    @classmethod
    def get(cls, params: Any, object: Any = None) -> None:
        """Fetch a state with its chain into the cache."""
        source = p.source_of(params["get_location"], params)
        subject_of(params, p.open_pool(params, [source])).get(
            p.state_of("get", params), scope=source.scope
        )

    @classmethod
    def set(cls, params: Any, object: Any = None) -> None:
        """Store a state of the cache with its chain."""
        source = p.source_of(params["set_location"], params)
        stored = subject_of(params, p.open_pool(params, [source])).store(
            p.state_of("set", params), to=source.location, replace=replaces(params)
        )
        failures(stored)

    @classmethod
    def unset(cls, params: Any, object: Any = None) -> None:
        """
        Remove a state; do nothing if the pool does not have it.

        :raises HasDependants: another state depends on it
        """
        from statepool import NotFound

        source = p.source_of(params["unset_location"], params)
        try:
            subject_of(params, p.open_pool(params, [source])).unset(
                p.state_of("unset", params), scope=source.scope
            )
        except NotFound as error:
            p.LOG.debug("%s", error)

    # -- root images -------------------------------------------------------------------------------

    @classmethod
    def check_root(cls, params: Any, object: Any = None) -> bool:
        """:returns: whether the shared pool has the root image"""
        source = p.shared_pool(params)
        if source is None:
            return False
        found = (
            p.open_pool(params, [source])
            .image(p.root_of(params))
            .show(scope="swarm cluster shared")
        )
        return any(one.manifest.state == ROOT for one in found)

    @classmethod
    def get_root(cls, params: Any, object: Any = None) -> None:
        """Make the machine's disk from the root image of the shared pool."""
        path = p.working_image(params)
        path.parent.mkdir(parents=True, exist_ok=True)
        _root(params).get(ROOT, to=path, overwrite=True)

    @classmethod
    def set_root(cls, params: Any, object: Any = None) -> None:
        """Make the machine's disk the root image of the shared pool."""
        failures(_root(params).set(ROOT, source=p.working_image(params), replace=True))

    @classmethod
    def unset_root(cls, params: Any, object: Any = None) -> None:
        """Remove the root image from the shared pool."""
        _root(params).unset(ROOT, scope="swarm cluster shared")


def _root(params: Any) -> ImageHandle:
    from statepool import UsageError

    source = p.shared_pool(params)
    if source is None:
        raise UsageError(
            f"there is no shared pool for the root image of {params['vms']}",
            hint="shared_pool = /path",
        )
    return p.open_pool(params, [source]).image(p.root_of(params))


def subject_of(params: Any, pool: StatePool) -> Any:
    """
    :returns: the handle of the object of the states: both kinds have ``get``, ``set`` and ``unset``
    """
    return (
        pool.machine(p.machine_of(params))
        if p.is_machine(params)
        else pool.image(p.image_of(params))
    )


def names_of(params: Any, pool: StatePool, scope: str) -> list[str]:
    """
    :returns: the names of the usable states of an object; of a machine, those that all its images
        have
    """
    handle = subject_of(params, pool)
    found = [
        one
        for one in handle.show(scope=scope)
        if one.problem is None and one.manifest.state != ROOT
    ]
    if not p.is_machine(params):
        return sorted({one.manifest.state for one in found})
    whole = {one.manifest.state for one in found if str(one.manifest.kind) == "machine"}
    ram = {
        one.manifest.state for one in found if str(one.manifest.kind) == "ram" and not one.managed
    }
    for name in params.objects("images"):
        ram &= {
            one.manifest.state for one in found if one.manifest.object.partition("/")[2] == name
        }
    return sorted(whole | ram)


def replaces(params: Any) -> bool:
    """:returns: whether ``set_mode`` says that an existing state is replaced"""
    return str(params.get("set_mode") or "ff").startswith("f")
