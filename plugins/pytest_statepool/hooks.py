"""What pytest calls."""

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
"""Where an item keeps the reports of its phases: a working image is kept if its test failed."""

AFTER = pytest.StashKey[list[Callable[[bool], None]]]()
"""Where an item keeps, during its teardown, what is to be told afterwards whether that failed."""

GIVEN = pytest.StashKey[bool]()
"""Where an item keeps that it was given the states which its markers name."""

RUN = pytest.StashKey[str]()
"""What tells this run from others: the same in all workers."""

_OUTPUT = "vm_state"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    options.add(parser)


def pytest_configure(config: pytest.Config) -> None:
    """
    Declare the marker, and begin to count.

    :raises pytest.UsageError: the ini file says something that does not exist
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
    """Tell a worker which run it is part of."""
    node.workerinput["vm_state_run"] = run_of(node.config)


def run_of(config: pytest.Config) -> str:
    """:returns: what tells this run from others"""
    if RUN not in config.stash:
        import secrets

        config.stash[RUN] = secrets.token_hex(8)
    return config.stash[RUN]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Count what a worker did."""
    output = getattr(node, "workeroutput", {}).get(_OUTPUT)
    if output is not None:
        node.config.stash[TALLY].add_worker_output(output)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the controller what this worker did."""
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
    Look at the markers of all tests, and bring those of one state together, so that workers do not
    fetch in turns.

    :raises pytest.UsageError: a marker or a builder cannot be understood
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            _group(item)
    # pytest-xdist looks at the groups, and others choose and shuffle tests, before we sort what
    # they left.
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
            # The controller only sees that a worker has gone which raises this; what cannot be
            # collected it tells, and once for all workers.
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
        return  # it is told once it is known that the test is to be run
    item.add_marker(pytest.mark.xdist_group(f"vm_state {_key(wishes)}"))


def _sort(items: list[pytest.Item], asking: dict[pytest.Item, list[Wish]]) -> None:
    """
    Within the places that tests which ask for states have among the others, which stay where they
    are.
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
    A test that says which state it starts from, and does not ask for it, would pass without it.
    """
    yield
    # What is around a test speaks for those in it that ask.
    if any(marker.name == MARKER for marker in item.own_markers) and not _asks(item):
        reason = (
            f"{item.nodeid} has the marker {MARKER}, but does not use the state: add the fixture"
            f" {MARKER}, or vm, to its arguments"
        )
        pytest.fail(reason, pytrace=False)


def _asks(item: pytest.Item) -> bool:
    if MARKER in getattr(item, "fixturenames", ()) or item.stash.get(GIVEN, False):
        return True
    # A test may also ask while it runs, by request.getfixturevalue.
    return (
        isinstance(item, pytest.Function)
        and "request" in inspect.signature(item.function).parameters
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Tell those who have to know whether the teardown failed."""
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
    """Keep the reports of a test where its fixtures find them."""
    report = yield
    if report.when == "setup":
        item.stash[REPORT] = {}  # a test can be run once more
    item.stash.setdefault(REPORT, {})[report.when] = report
    return report


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which pools and which cache, where they are named for this run."""
    pools, cache = options.locations(config), options.cache(config)
    return _told(config, pools, cache) if pools or cache is not None else None


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    """
    Say which pools and which cache, where the configuration of this user and project names them,
    and a test asks for a state.
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
    """Say what was fetched, built and used again."""
    lines = list(config.stash[TALLY].lines())
    if lines:
        terminalreporter.write_sep("=", "states of virtual machines")
        for line in lines:
            terminalreporter.write_line(line)
