"""The hooks that pytest calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any

import pytest

from pytest_statepool import options
from pytest_statepool.builders import BUILDERS
from pytest_statepool.tally import TALLY, Tally
from pytest_statepool.wishes import MARKER, Wish, wishes_of

REPORT = pytest.StashKey[dict[str, pytest.CollectReport | pytest.TestReport]]()
"""
The key under which an item stores the reports of its phases: a working image is kept if its test
failed.
"""

AFTER = pytest.StashKey[list[Callable[[bool], None]]]()
"""
The key under which an item stores, during its teardown, the functions to call afterwards with
whether it failed.
"""

GIVEN = pytest.StashKey[bool]()
"""The key under which an item stores that it was given the states of its markers."""

RUN = pytest.StashKey[str]()
"""The key of the id of this run, which is the same in all workers."""

_OUTPUT = "vm_state"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    options.add(parser)


def pytest_configure(config: pytest.Config) -> None:
    """
    Declare the marker, and start the tally.

    :raises pytest.UsageError: the ini file has an invalid value
    """
    options.check(config)
    config.addinivalue_line(
        "markers",
        f"{MARKER}(object, state): start from this state of an image or a machine; may be repeated",
    )
    config.stash[TALLY] = Tally()
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None:
        config.stash[RUN] = workerinput["vm_state_run"]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker the id of its run."""
    node.workerinput["vm_state_run"] = run_of(node.config)


def run_of(config: pytest.Config) -> str:
    """:returns: the id of this run"""
    if RUN not in config.stash:
        import secrets

        config.stash[RUN] = secrets.token_hex(8)
    return config.stash[RUN]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the tally of a worker."""
    output = getattr(node, "workeroutput", {}).get(_OUTPUT)
    if output is not None:
        node.config.stash[TALLY].add_worker_output(output)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the tally of this worker to the controller."""
    tally = session.config.stash[TALLY]
    workeroutput = getattr(session.config, "workeroutput", None)
    if workeroutput is not None:
        workeroutput[_OUTPUT] = tally.to_worker_output()


def pytest_unconfigure() -> None:
    """Forget the builders: another run in this process declares its own."""
    BUILDERS.clear()


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None]:
    """
    Check the markers of all tests, and group the tests of each state, so that workers do not fetch
    the same states.

    :raises pytest.UsageError: a marker or a builder cannot be understood
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            _group(item)
    # Before this sorts the remaining tests, pytest-xdist reads the groups, and other plugins select
    # and shuffle tests.
    yield
    asking: dict[pytest.Item, list[Wish]] = {}
    for item in items:
        if item.get_closest_marker(MARKER) is None:
            continue
        try:
            asking[item] = _checked(item)
        except pytest.UsageError as error:
            if not hasattr(config, "workerinput"):
                raise
            # If a worker raised this, the controller would only see that the worker ended. A
            # collection error is reported, and once for all workers.
            report = pytest.CollectReport(item.nodeid, "failed", str(error), None)
            config.hook.pytest_collectreport(report=report)
            items.clear()
            return
    _sort(items, asking)


def _checked(item: pytest.Item) -> list[Wish]:
    wishes = wishes_of(item)
    for wish in wishes:
        try:
            BUILDERS.check(wish.object, wish.state)
        except pytest.UsageError as error:
            raise pytest.UsageError(f"{item.nodeid}: {error}") from error
    return wishes


def _group(item: pytest.Item) -> None:
    if (
        item.get_closest_marker(MARKER) is None
        or item.get_closest_marker("xdist_group") is not None
    ):
        return
    try:
        wishes = wishes_of(item)
    except pytest.UsageError:
        return  # reported when it is known that the test is to be run
    item.add_marker(pytest.mark.xdist_group(f"vm_state {_key(wishes)}"))


def _sort(items: list[pytest.Item], asking: dict[pytest.Item, list[Wish]]) -> None:
    """
    Sort the tests that ask for states among the positions that they have; all other tests stay at
    their positions.
    """
    places = [index for index, item in enumerate(items) if item in asking]
    first: dict[str, int] = {}
    for index in places:
        first.setdefault(_key(asking[items[index]]), index)
    ordered = sorted((items[index] for index in places), key=lambda item: first[_key(asking[item])])
    for index, item in zip(places, ordered, strict=True):
        items[index] = item


def _key(wishes: list[Wish]) -> str:
    return " ".join(map(str, wishes))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """
    Fail a test that names a state in a marker but does not use it: it would pass without the state.
    """
    yield
    # A marker of a class or module counts only for tests in it that use the state.
    if any(marker.name == MARKER for marker in item.own_markers) and not _asks(item):
        reason = (
            f"{item.nodeid} has the marker {MARKER}, but does not use the state: add the fixture"
            f" {MARKER}, or vm, to its arguments"
        )
        pytest.fail(reason, pytrace=False)


def _asks(item: pytest.Item) -> bool:
    if MARKER in getattr(item, "fixturenames", ()) or item.stash.get(GIVEN, False):
        return True
    # A test may also request it while it runs, by request.getfixturevalue.
    return (
        isinstance(item, pytest.Function)
        and "request" in inspect.signature(item.function).parameters
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Call the registered functions with whether the teardown failed."""
    after = item.stash[AFTER] = []
    failed = False
    try:
        yield
    except BaseException as error:
        failed = not isinstance(
            error, (KeyboardInterrupt, pytest.skip.Exception, pytest.exit.Exception)
        )
        raise
    finally:
        del item.stash[AFTER]
        for tell in after:
            tell(failed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Store the reports of a test for its fixtures."""
    report = yield
    if report.when == "setup":
        item.stash[REPORT] = {}  # a test can be run again
    item.stash.setdefault(REPORT, {})[report.when] = report
    return report


def pytest_report_header(config: pytest.Config) -> str | None:
    """Return a line with the pools and the cache, if they are given for this run."""
    pools, cache = options.locations(config), options.cache(config)
    return _told(config, pools, cache) if pools or cache is not None else None


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    """
    Return a line with the pools and the cache, if they come from the configuration of this user and
    project, and a test asks for a state.
    """
    if pytest_report_header(config) is not None or not any(
        item.get_closest_marker(MARKER) for item in items
    ):
        return None
    from statepool import Config, StatePoolError

    try:
        found = Config.load(project=config.rootpath)
    except StatePoolError as error:
        return f"statepool: {error}"
    read = f", as {' and '.join(found.files)} says" if found.files else ""
    return _told(config, [source.name for source in found.sources], found.cache) + read


def _told(config: pytest.Config, pools: list[str], cache: str | None) -> str:
    told = [f"cache {cache}"] if cache is not None else []
    told += [f"pool {place}" for place in pools]
    if options.value(config, "vm_state_offline"):
        told.append("offline")
    return "statepool: " + ", ".join(told)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what was fetched, built and reused."""
    lines = list(config.stash[TALLY].lines())
    if lines:
        terminalreporter.write_sep("=", "states of virtual machines")
        for line in lines:
            terminalreporter.write_line(line)
