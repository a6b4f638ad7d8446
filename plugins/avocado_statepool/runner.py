"""
The runner of dependencies of the kind ``vm-state``, and its console script
``avocado-runner-vm-state``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from avocado.core.nrunner.app import BaseRunnerApp
from avocado.core.nrunner.runner import BaseRunner

from avocado_statepool.jobs import JobImages, job_of, open_pool
from avocado_statepool.options import USED
from avocado_statepool.record import Record
from avocado_statepool.wishes import KIND, Wish, WrongDependency

WISHES = "wishes"
"""
The argument with the dependencies of a test, as JSON: a list of mappings. If it is empty, the
working images of the test are released.
"""


class VMStateRunner(BaseRunner):
    """
    A runner that makes the working images that a test asks for, or removes them after it.

    Both are tasks that avocado gets from ``avocado_statepool.tasks``: the arguments are ``wishes``,
    ``logdir`` (of the test) and ``test``.
    """

    name = KIND
    description = "Runner for states of virtual machines"

    CONFIGURATION_USED = USED

    def run(self, runnable: Any) -> Iterator[dict[str, Any]]:
        """:returns: messages for avocado, the last one with the result"""
        yield self.prepare_status("started")
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(_work, runnable.config, runnable.kwargs)
            yield from self.running_loop(work.done)
        told, wrong = work.result()
        for line in told:
            yield self.prepare_status("running", {"type": "stdout", "log": f"{line}\n".encode()})
        if wrong is None:
            yield self.prepare_status("finished", {"result": "pass"})
        else:
            yield self.prepare_status("running", {"type": "stderr", "log": f"{wrong}\n".encode()})
            yield self.prepare_status("finished", {"result": "error", "fail_reason": wrong})


def _work(config: dict[str, Any], arguments: dict[str, Any]) -> tuple[list[str], str | None]:
    """:returns: messages about what was done, and the error, if any"""
    from statepool import StatePoolError

    if "logdir" not in arguments:
        return (
            [],
            (
                "nobody says for which test: the plugin test.pre.statepool is disabled; enable it"
                " in avocado's settings"
            ),
        )
    logdir, test = Path(arguments["logdir"]), arguments["test"]
    try:
        wishes = [Wish.parse(given) for given in _wishes(arguments)]
        pool = open_pool(config)
        try:
            images = JobImages(pool, job_of(logdir))
            if not wishes:
                images.release(logdir)
                return ["the working images are gone"], None
            record = images.provision(wishes, logdir, test)
        finally:
            pool.close()
    except (StatePoolError, WrongDependency) as error:
        hint = getattr(error, "hint", None)
        wrong = (
            f"{test} cannot have its state:"
            f" {getattr(error, 'message', error)}{f' ({hint})' if hint else ''}"
        )
        Record(test, error=wrong).write(logdir)
        return [], wrong
    return [
        f"{given}: {_how(given)}; {', '.join(given.images.values())}" for given in record.given
    ], None


def _wishes(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    found = arguments.get(WISHES, [])
    return list(json.loads(found)) if isinstance(found, str) else list(found)


def _how(given: Any) -> str:
    return (
        f"{given.bytes} bytes from {given.source} in {given.seconds:.2f} s"
        if given.fetched
        else f"from the cache in {given.seconds:.2f} s"
    )


class RunnerApp(BaseRunnerApp):
    """The application of the console script."""

    PROG_NAME = f"avocado-runner-{KIND}"
    PROG_DESCRIPTION = "runner for states of virtual machines"
    RUNNABLE_KINDS_CAPABLE = [KIND]  # noqa: RUF012 - avocado wants it so


def main() -> None:
    """
    Run the console script: avocado calls it with ``capabilities``, ``runnable-run`` or
    ``task-run``.
    """
    RunnerApp(print).run()


if __name__ == "__main__":
    main()
