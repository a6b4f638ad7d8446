"""
The meaning of avocado-i2n's parameters: the object, the pools and the files.

The names are those of avocado-i2n 103.0: ``vms``, ``images``, ``object_type``, ``object_id``,
``swarm_pool`` (the cache), ``shared_pool``, ``show_location`` and similar ones, ``pool_scope``,
``image_name``, ``image_format``, ``vms_base_dir``, ``images_base_dir``, ``update_pool_timeout``,
``nets_host``, ``nets_gateway``, ``nets_shell_host``, ``nets_shell_port``, ``nets_username``,
``nets_password``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statepool import Image, Machine, StatePool

LOG = logging.getLogger("avocado.job.statepool")

OWN = "own"
ALL_SCOPES = "own swarm cluster shared"

_TIMEOUT = 300
"""Seconds: the default of ``update_pool_timeout`` in avocado-i2n."""


@dataclass(frozen=True)
class Source:
    """
    A pool that parameters name.

    :param text: as parameters name it
    :param location: as statepool names it
    :param scope: how far it is
    :param rank: its preference: higher is better
    :param account: ``user@host:port`` of a pool on another host; ``@host:port`` if no user is given
    :param password: of that account
    """

    text: str
    location: str
    scope: str
    rank: int = 0
    account: str = ""
    password: str = ""


# -- objects ---------------------------------------------------------------------------------------


def is_machine(params: Any) -> bool:
    """:returns: whether the parameters mean states of a machine, not of an image"""
    return str(params.get("object_type", "images")).rpartition("/")[2] == "vms"


def image_of(params: Any) -> Image:
    """:returns: the image of the states; its machine is named by its id"""
    from statepool import Image

    return Image(params.get("object_id") or params["vms"], params["images"])


def root_of(params: Any) -> Image:
    """
    :returns: the image of a root state; it is named by the names of the machine and of the file
    """
    from statepool import Image

    return Image(params["vms"], os.path.basename(params["image_name"]))


def machine_of(params: Any) -> Machine:
    """:returns: the machine of the states, with its images"""
    from statepool import Machine

    return Machine(params.get("object_id") or params["vms"], params.objects("images"))


def each_image(params: Any) -> Iterable[Any]:
    """:returns: the parameters of each image of a machine"""
    for name in params.objects("images"):
        found = params.object_params(name)
        found["images"] = name
        yield found


def state_of(do: str, params: Any) -> str:
    """:returns: the state of an operation"""
    return str(params[f"{do}_state"])


# -- files -----------------------------------------------------------------------------------------


def working_image(params: Any) -> Path:
    """
    :returns: the path of the machine's disk: ``image_name``, in the machine's directory in
        ``vms_base_dir``
    """
    return _image_file(
        params,
        (
            os.path.join(params["vms_base_dir"], params["vms"])
            if params.get("vms_base_dir")
            else params["images_base_dir"]
        ),
    )


def root_image(params: Any) -> Path:
    """
    :returns: the path of the object itself: ``image_name`` in ``images_base_dir``, or in the
        machine's directory
    """
    place = params.get("images_base_dir")
    if place:
        path = _image_file(params, place)
        if path.exists() or not params.get("vms_base_dir"):
            return path
    return working_image(params)


def _image_file(params: Any, directory: str) -> Path:
    from statepool import UsageError

    form = params.get("image_format") or "qcow2"
    if form != "qcow2":
        raise UsageError(
            f"{params['vms']}/{params['images']} is of the format {form}: states are kept of qcow2"
            " images",
            hint="image_format = qcow2",
        )
    return Path(os.path.join(directory, f"{params['image_name']}.qcow2"))


# -- pools -----------------------------------------------------------------------------------------


def scopes_of(params: Any) -> list[str]:
    """
    :returns: the scopes that are permitted
    :raises UsageError: there is no such scope
    """
    from statepool import UsageError

    found = str(params.get("pool_scope") or ALL_SCOPES).split()
    for scope in found:
        if scope not in ALL_SCOPES.split():
            raise UsageError(f"there is no pool_scope {scope!r}", hint=f"any of {ALL_SCOPES}")
    return found


def sources_of(do: str, params: Any) -> list[Source]:
    """
    :param do: ``show``, ``get``, ``set`` or ``unset``
    :returns: the pools that may be used in addition to the cache, the nearest first
    """
    found = [source_of(text, params) for text in params.objects(f"{do}_location")]
    scopes = scopes_of(params)
    return sorted(
        (source for source in found if source.scope != OWN and source.scope in scopes),
        key=lambda source: -source.rank,
    )


def source_of(text: str, params: Any) -> Source:
    """
    :param text: ``:/path``, ``:;/path``, ``net:/path``, or any location of statepool
    :raises InvalidLocation: it is none of these
    """
    if "://" in text or text.startswith("/"):
        return Source(text, text, _scope(params, params, text.partition("://")[2] or text))
    net, _, path = text.partition(":")
    if not net:
        plain = path.lstrip(";")
        return Source(text, text, _scope(params, params, plain), _rank(params, params, plain))
    far = params.object_params(net)
    host = far.get("nets_shell_host") or far.get("nets_host") or net
    user, port = far.get("nets_username") or "", far.get("nets_shell_port") or ""
    host = f"[{host}]" if ":" in host else host
    account = f"{user}@{host}:{port or 22}"
    location = f"ssh://{f'{user}@' if user else ''}{host}{f':{port}' if port else ''}{path}"
    return Source(
        text,
        location,
        _scope(params, far, path),
        _rank(params, far, path),
        account,
        far.get("nets_password") or "",
    )


def _rank(own: Any, far: Any, path: str) -> int:
    same_net, same_host = (
        bool(own.get(key, "") == far.get(key, "")) for key in ("nets_gateway", "nets_host")
    )
    near = 1000 * same_net + 100 * same_host
    return near + (10 if path == own["swarm_pool"] else 1)


def _scope(own: Any, far: Any, path: str) -> str:
    if own.get("nets_gateway", "") != far.get("nets_gateway", ""):
        return "cluster"
    if own.get("nets_host", "") != far.get("nets_host", ""):
        return "swarm"
    if path == _plain(own.get("shared_pool", "")):
        return "shared"
    return OWN if os.path.normpath(path) == os.path.normpath(own["swarm_pool"]) else "shared"


def _plain(text: str) -> str:
    return text.lstrip(":;")


def shared_pool(params: Any) -> Source | None:
    """:returns: the pool of root images, if there is one"""
    text = params.get("shared_pool") or ""
    return source_of(text if ":" in text else f":{text}", params) if text else None


_POOLS: dict[tuple[Any, ...], StatePool] = {}
"""The state pools in use, which keep connections."""


def open_pool(params: Any, sources: Iterable[Source] = ()) -> StatePool:
    """
    :param sources: the sources from which the cache may be filled
    :returns: a state pool of the cache and these sources
    :raises StatePoolError: a parameter cannot be used
    """
    from statepool import Config, from_config

    known = tuple(dict.fromkeys(sources))
    timeout = params.get("update_pool_timeout") or _TIMEOUT
    key = (os.getpid(), os.path.abspath(params["swarm_pool"]), known, timeout)
    if key not in _POOLS:
        given: dict[str, object] = {
            "cache": params["swarm_pool"],
            "sources": [{"location": source.location, "scope": source.scope} for source in known],
            "lock-timeout": str(timeout),
            "fresh": 0,  # ask the sources each time, as avocado-i2n does
        }
        config = Config.load(
            given,
            spelled={
                "cache": "the parameters: swarm_pool",
                "lock-timeout": "the parameters: update_pool_timeout",
            },
        )
        passwords = {source.account: source.password for source in known if source.password}
        _POOLS[key] = from_config(_with_passwords(config, passwords) if passwords else config)
    return _POOLS[key]


def _with_passwords(config: Any, passwords: Mapping[str, str]) -> Any:
    from attrs import evolve

    before = config.settings.secrets

    def answer(kind: str, subject: str) -> str | None:
        if kind == "password":
            for account, password in passwords.items():
                # If no user is given, the account is the local user's.
                if subject == account or (account.startswith("@") and subject.endswith(account)):
                    return password
        return before(kind, subject) if before is not None else None

    return evolve(config, settings=evolve(config.settings, secrets=answer))
