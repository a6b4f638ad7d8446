"""The fixtures for tests and their authors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_statepool import machines, options
from pytest_statepool.builders import where_it_failed
from pytest_statepool.hooks import AFTER, GIVEN, REPORT, run_of
from pytest_statepool.provision import Provisioner, Provisioners
from pytest_statepool.tally import TALLY
from pytest_statepool.wishes import MARKER, Wish, wishes_of
from pytest_statepool.working import Working

if TYPE_CHECKING:
    from statepool import Config, MachineConfig, RunningMachine, StatePool, StatePoolError

_POOLS = pytest.StashKey[dict[int, "tuple[Config, StatePool]"]]()
"""The state pools that were opened here, by the identity of their configuration."""


@pytest.fixture(scope="session")
def vm_state_config(pytestconfig: pytest.Config) -> Config:
    """
    The configuration of the state pool: that of this user and project, overridden by this run's
    options. Override it to change the configuration.
    """
    from statepool import Config

    given: dict[str, Any] = {
        "cache": options.cache(pytestconfig),
        "sources": options.locations(pytestconfig) or None,
    }
    if options.value(pytestconfig, "vm_state_offline"):
        given["offline"] = True
    spelled = {
        key: options.spelled(pytestconfig, name)
        for key, name in {"cache": "vm_state_cache", "sources": "vm_state_pool"}.items()
    }
    with _told():
        return Config.load(given, project=pytestconfig.rootpath, spelled=spelled)


@pytest.fixture(scope="session")
def vm_state_pool(vm_state_config: Config, request: pytest.FixtureRequest) -> Iterator[StatePool]:
    """The cache and its sources. Override it to use another state pool."""
    pools = request.config.stash[_POOLS] = {}
    yield _pool_of(request.config, vm_state_config)
    for _, pool in pools.values():
        pool.close()


def _pool_of(config: pytest.Config, found: Config) -> StatePool:
    from statepool import from_config

    pools = config.stash[_POOLS]
    if id(found) not in pools:
        with _told():
            pools[id(found)] = (found, from_config(found))
    return pools[id(found)][1]


@contextmanager
def _told() -> Iterator[None]:
    """Show an error in the configuration as one line."""
    from statepool import StatePoolError

    try:
        yield
    except StatePoolError as error:
        # ``from None``: the original error is still being handled here, and pytest would show it,
        # too.
        raise pytest.fail.Exception(f"there is no state pool: {error}", pytrace=False) from None


@pytest.fixture(scope="session")
def _vm_state_provisioners(pytestconfig: pytest.Config) -> Iterator[Provisioners]:
    rebuild = run_of(pytestconfig) if options.value(pytestconfig, "vm_state_rebuild") else None
    provisioners = Provisioners(pytestconfig.stash[TALLY], rebuild)
    yield provisioners
    provisioners.close()


@pytest.fixture(scope="module")
def vm_state_provisioner(
    vm_state_pool: StatePool, _vm_state_provisioners: Provisioners, request: pytest.FixtureRequest
) -> Provisioner:
    """
    A maker of working images, which also removes them. A fixture of a class or a module can make a
    working image that its tests share: ``with vm_state_provisioner.working("vm1/disk", "customize")
    as image``.
    """
    made = [pool for _, pool in request.config.stash.get(_POOLS, {}).values()]
    if vm_state_pool in made:
        # pytest makes a session's pool once, even if a directory has its own configuration.
        vm_state_pool = _pool_of(request.config, request.getfixturevalue("vm_state_config"))
    return _vm_state_provisioners.of(vm_state_pool)


@pytest.fixture
def make_vm_state(
    request: pytest.FixtureRequest, vm_state_provisioner: Provisioner
) -> Iterator[Callable[[str, str], Working]]:
    """
    ``make_vm_state("vm1/disk", "customize")``: a fresh working image of a state, removed after the
    test, or kept as ``--vm-state-keep`` says. For a machine, ``make_vm_state("vm1", "customize")``,
    the working images of all its images.
    """
    made: list[Working] = []

    def make(object: str, state: str) -> Working:
        made.append(_provision(request, vm_state_provisioner, object, state))
        return made[-1]

    def settle(keep: bool) -> None:
        if keep:
            request.config.stash[TALLY].kept += [
                str(vm_state_provisioner.keep(working)) for working in made
            ]
            return
        for working in made:
            vm_state_provisioner.throw_away(working)

    yield make
    keep = options.value(request.config, "vm_state_keep")
    after = request.node.stash.get(AFTER, None)
    if keep == "failed" and not _has_failed(request.node) and after is not None:
        # the teardown of another fixture may have failed, or may fail later
        after.append(vm_state_provisioner.postpone(settle))
    else:
        settle(keep == "always" or (keep == "failed" and _has_failed(request.node)))


@pytest.fixture
def vm_state(
    request: pytest.FixtureRequest, make_vm_state: Callable[[str, str], Working]
) -> Working:
    """
    The working image of the state that the test's marker names. If markers name several states,
    ``vm_state["vm2/disk"]`` is one of the working images; if a marker names a machine, so is
    ``vm_state["vm1/disk"]``.
    """
    wishes = wishes_of(request.node)
    if not wishes:
        reason = (
            f"{request.node.nodeid} uses vm_state without saying which: add"
            f' @pytest.mark.{MARKER}("vm1/disk", "customize")'
        )
        pytest.fail(reason, pytrace=False)
    request.node.stash[GIVEN] = True
    made = [make_vm_state(wish.object, wish.state) for wish in wishes]
    return made[0].among(made)


@pytest.fixture
def vm_config() -> MachineConfig:
    """
    The configuration of machines, without their images. Override it, with any scope, to give them
    RAM, network cards and a serial line; the images that it names are plugged in first, in its
    order.
    """
    from statepool import MachineConfig

    return MachineConfig()


@pytest.fixture
def make_vm(
    request: pytest.FixtureRequest,
    vm_state_provisioner: Provisioner,
    # requested first, so that machines end before their images are removed
    make_vm_state: object,  # noqa: ARG001
) -> Iterator[Callable[..., RunningMachine]]:
    """
    ``make_vm(vm_state["vm1/disk"], vm_state["vm1/data"])``: a machine that runs from working images
    of its images, and is stopped after the test. From ``vm_state["vm1"]`` it runs with its RAM if
    the state has it. ``config=`` replaces ``vm_config``.
    """
    from statepool import StatePoolError

    started = ExitStack()

    def make(*workings: Working, config: MachineConfig | None = None) -> RunningMachine:
        found = config if config is not None else request.getfixturevalue("vm_config")
        try:
            return started.enter_context(machines.start(vm_state_provisioner.pool, workings, found))
        except StatePoolError as error:
            told = ", ".join(f"{working.object} {working.state}" for working in workings)
            reason = f"{request.node.nodeid} cannot run a machine from {told or 'nothing'}: {error}"
        pytest.fail(reason, pytrace=False)

    with started:
        yield make


@pytest.fixture
def vm(
    request: pytest.FixtureRequest, vm_state: Working, make_vm: Callable[..., RunningMachine]
) -> RunningMachine:
    """
    The machine that the test's markers name, running from their states: booted, or resumed with its
    RAM if the state has it.
    """
    wishes = wishes_of(request.node)
    machines_named = sorted({wish.machine for wish in wishes})
    if len(machines_named) > 1:
        reason = (
            f"{request.node.nodeid} uses vm, and its markers name {' and '.join(machines_named)}:"
            " start each of them by make_vm, as in "
        )
        pytest.fail(f'{reason}make_vm(vm_state["{wishes[0].object}"])', pytrace=False)
    return make_vm(*(vm_state[wish.object] for wish in wishes))


def _provision(
    request: pytest.FixtureRequest, provisioner: Provisioner, object: str, state: str
) -> Working:
    from statepool import BuildFailed, StatePoolError, parse_object

    try:
        return provisioner.provision(
            Wish(str(parse_object(object)), state), _file_name(request.node.name)
        )
    except StatePoolError as error:
        reason = f"{request.node.nodeid} cannot have {object} {state}: {error}"
        if isinstance(error, BuildFailed) and error.__cause__ is not None:
            reason = f"{reason}\n{where_it_failed(error.__cause__)}".rstrip()
        is_missing = _is_missing(error, provisioner.pool)
    if is_missing and options.value(request.config, "vm_state_missing") == "skip":
        pytest.skip(reason)
    pytest.fail(reason, pytrace=False)


def _is_missing(error: StatePoolError, pool: StatePool) -> bool:
    """
    Return whether the error means that no pool has a state, or that a pool that may have it cannot
    be asked; not that the request, the cache or this host has a fault.
    """
    from statepool import NotFound, TransportError

    is_here = error.pool == str(pool.cache) or (error.pool is None and error.path is not None)
    return isinstance(error, NotFound) or (isinstance(error, TransportError) and not is_here)


def _file_name(name: str) -> str:
    """:returns: the name of a test, made usable as a file name"""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)[
        -60:
    ].strip("-")


def _has_failed(item: pytest.Item) -> bool:
    return any(report.failed for report in item.stash.get(REPORT, {}).values())
