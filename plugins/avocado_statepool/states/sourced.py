"""Backends that combine their own operations with the pools that ``pool_scope`` permits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from avocado_statepool.states import params as p
from avocado_statepool.states.transfer import QCOW2ImageTransfer


class RootSourcedStateBackend:
    """
    Root states of the machine's own disk and of the shared pool.

    A subclass implements ``_check_root``, ``_get_root``, ``_set_root`` and ``_unset_root``, which
    act on the disk.
    """

    transport = QCOW2ImageTransfer

    @classmethod
    def check_root(cls, params: Any, object: Any = None) -> bool:
        """
        :returns: whether the object exists or can be fetched; an object that has to run must run
            here
        """
        if cls._check_root(params, object):
            return True
        return (
            p.scopes_of(params) != [p.OWN]
            and not p.is_machine(params)
            and cls.transport.check_root(params, object)
        )

    @classmethod
    def get_root(cls, params: Any, object: Any = None) -> None:
        """
        Make the object available here.

        An existing disk stays unchanged if ``own`` is in the scope: its content may exist nowhere
        else.
        """
        scopes = p.scopes_of(params)
        if p.OWN not in scopes:
            cls.transport.get_root(params, object)
            return
        if (
            scopes != [p.OWN]
            and not cls._check_root(params, object)
            and cls.transport.check_root(params, object)
        ):
            cls.transport.get_root(params, object)
        cls._get_root(params, object)

    @classmethod
    def set_root(cls, params: Any, object: Any = None) -> None:
        """
        Make the object here (scope ``own``), or store the object from here in the shared pool
        (scope ``shared``).

        :raises UsageError: another scope is given; or there is no object here
        """
        from statepool import UsageError

        if cls._one_scope(params) == p.OWN:
            cls._set_root(params, object)
            return
        if not cls._check_root(params, object):
            raise UsageError(
                f"there is no disk here to make the root image of {params['vms']} of",
                hint=f"{p.root_image(params)} is where it should be",
            )
        cls.transport.set_root(params, object)

    @classmethod
    def unset_root(cls, params: Any, object: Any = None) -> None:
        """
        Remove the object here (scope ``own``), or in the shared pool (scope ``shared``).

        :raises UsageError: another scope is given
        """
        remove = cls._unset_root if cls._one_scope(params) == p.OWN else cls.transport.unset_root
        remove(params, object)

    @staticmethod
    def _one_scope(params: Any) -> str:
        from statepool import UsageError

        scopes = p.scopes_of(params)
        if scopes not in ([p.OWN], ["shared"]):
            raise UsageError(
                f"a root state is set and removed in one scope, not in {' '.join(scopes)!r}",
                hint="pool_scope = own, or shared",
            )
        return scopes[0]

    @classmethod
    def _check_root(cls, params: Any, object: Any = None) -> bool:
        raise NotImplementedError

    @classmethod
    def _get_root(cls, params: Any, object: Any = None) -> None:
        """Do nothing by default: the object is here."""

    @classmethod
    def _set_root(cls, params: Any, object: Any = None) -> None:
        raise NotImplementedError

    @classmethod
    def _unset_root(cls, params: Any, object: Any = None) -> None:
        raise NotImplementedError


class SourcedStateBackend:
    """
    States of the cache and of the pools that ``pool_scope`` permits.

    A subclass implements ``_show``, ``_get``, ``_set`` and ``_unset``, which act on the cache and
    the machine's own disk.
    """

    transport = QCOW2ImageTransfer

    @classmethod
    def get_sources(cls, do: str, params: Any) -> list[str]:
        """
        :returns: the pools that ``show_location`` and similar parameters name and ``pool_scope``
            permits, the nearest first
        """
        return [source.text for source in p.sources_of(do, params)]

    @classmethod
    def show(cls, params: Any, object: Any = None) -> list[str]:
        """:returns: the available states"""
        found = set(cls._show(params, object)) if p.OWN in p.scopes_of(params) else set()
        for source in cls.get_sources("show", params):
            found |= set(cls.transport.show(_at("show", source, params), object))
        return sorted(found)

    @classmethod
    def get(cls, params: Any, object: Any = None) -> None:
        """
        Fetch a state into the cache from the best pool that has it. If ``own`` is in the scope,
        restore it on the machine's own disk.

        :raises NotFound: no pool has it
        """
        scopes = p.scopes_of(params)
        sources = p.sources_of("get", params)
        if sources:
            cls._bring(params, p.open_pool(params, sources), " ".join(scopes))
        if p.OWN in scopes:
            cls._get(params, object)

    @classmethod
    def _bring(cls, params: Any, pool: Any, scope: str) -> None:
        handle = (
            pool.machine(p.machine_of(params))
            if p.is_machine(params)
            else pool.image(p.image_of(params))
        )
        got = handle.get(p.state_of("get", params), scope=scope)
        for text in got.warnings:
            p.LOG.warning("%s %s: %s", got.object, got.state, text)

    @classmethod
    def set(cls, params: Any, object: Any = None) -> None:
        """
        Make the machine's own disk a state of the cache, if ``own`` is in the scope, and store it
        in the pools.

        :raises NotFound: it is only to be stored in the pools, and the cache does not have it
        :raises TransportError: it could not be stored in all pools
        """
        if p.OWN in p.scopes_of(params):
            cls._set(params, object)
        _in_all("set", params, lambda found: cls.transport.set(found, object))

    @classmethod
    def unset(cls, params: Any, object: Any = None) -> None:
        """
        Remove a state from the pools, and from the cache, if ``own`` is in the scope.

        avocado-i2n removes a state before it sets a state of the same name: then this does nothing,
        since :meth:`set` replaces it.

        :raises HasDependants: another state depends on it
        """
        if _is_replaced(params):
            p.LOG.debug("%s is kept until it is replaced", params["unset_state"])
            return
        _in_all("unset", params, lambda found: cls.transport.unset(found, object))
        if p.OWN in p.scopes_of(params):
            cls._unset(params, object)

    @classmethod
    def _show(cls, params: Any, object: Any = None) -> list[str]:
        raise NotImplementedError

    @classmethod
    def _get(cls, params: Any, object: Any = None) -> None:
        raise NotImplementedError

    @classmethod
    def _set(cls, params: Any, object: Any = None) -> None:
        raise NotImplementedError

    @classmethod
    def _unset(cls, params: Any, object: Any = None) -> None:
        raise NotImplementedError


def _at(do: str, source: str, params: Any) -> Any:
    found = params.copy()
    found[f"{do}_location"] = source
    return found


def _in_all(do: str, params: Any, work: Callable[[Any], None]) -> None:
    """
    Run an operation on each pool. If a pool fails, the others are still tried; then the first error
    is raised.
    """
    from statepool import StatePoolError

    errors: list[StatePoolError] = []
    for source in p.sources_of(do, params):
        try:
            work(_at(do, source.text, params))
        except StatePoolError as error:
            p.LOG.error("%s of %s: %s", do, source.text, error)
            errors.append(error)
    if errors:
        raise errors[0]


def _is_replaced(params: Any) -> bool:
    # This is how avocado_i2n.states.setup.set_states leaves them if it is about to set the state
    # that it asks to remove.
    return bool(
        params.get("check_opts") == "soft_boot=yes"
        and params.get("set_state") == params.get("unset_state") == params.get("check_state")
    )
