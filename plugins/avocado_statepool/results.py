"""
The report of a job about the states that its tests were given, and the work before and after all
tests.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avocado.core import exit_codes
from avocado.core.extension_manager import PluginPriority
from avocado.core.output import LOG_JOB, LOG_UI
from avocado.core.plugin_interfaces import ResultEvents

from avocado_statepool.jobs import JobImages, open_pool
from avocado_statepool.options import FAIL_ON_MISSING, USED
from avocado_statepool.record import Given, Record
from avocado_statepool.wishes import split

_SUMMARY = "vm-states.json"
"""The file with the states that tests were given, in the directory of a job's results."""


class StatepoolResults(ResultEvents):
    """
    The plugin that holds the directory of a job's working images, and reports what its tests were
    given.
    """

    name = "statepool"
    description = "Says which states of virtual machines tests were given"
    priority = PluginPriority.HIGH  # other plugins show what this one reports about a test

    def __init__(self, config: Any) -> None:
        self._job: Any = None
        self._held: list[JobImages] = []
        self._records: dict[str, Record] = {}
        self._quiet = bool((config or {}).get("stdout_claimed_by"))

    def pre_tests(self, job: Any) -> None:
        """Remove what killed jobs have left, if a test asks for a state."""
        self._job = job
        seen: set[str] = set()
        for suite in job.test_suites:
            key = json.dumps([suite.config.get(name) for name in USED])
            if key not in seen and any(split(test.dependencies)[0] for test in suite.tests):
                seen.add(key)
                self._hold(suite.config)

    def _hold(self, config: Any) -> None:
        from statepool import StatePoolError

        try:
            pool = open_pool(config)
            images = JobImages(pool, Path(self._job.logdir).name)
            images.begin()
        except StatePoolError as error:
            # the tests that ask for a state report this error themselves
            LOG_JOB.error("statepool: %s", error)
        else:
            self._held.append(images)

    def start_test(self, result: Any, state: Any) -> None:
        """Do nothing."""

    def test_progress(self, progress: bool = False) -> None:
        """Do nothing."""

    def end_test(self, result: Any, state: Any) -> None:
        """
        Report what a test was given, or why it was given nothing; the latter becomes an error if
        the settings ask for that.
        """
        logdir = state.get("task_path") or state.get("logdir")
        record = Record.read(Path(logdir)) if logdir else None
        if record is None:
            return
        self._records[str(state.get("name"))] = record
        for given in record.given:
            LOG_JOB.info("%s: %s %s", state.get("name"), given, _how([given]))
        if record.error is None or state.get("status") != "SKIP":
            return
        state["fail_reason"] = record.error
        if self._job.config.get(FAIL_ON_MISSING):
            state["status"] = "ERROR"
            result.skipped -= 1
            result.errors += 1
            self._job.exitcode |= exit_codes.AVOCADO_TESTS_FAIL

    def post_tests(self, job: Any) -> None:
        """Remove all remaining working images, and report what was done."""
        for images in self._held:
            images.end()
        self._held.clear()
        if not self._records:
            return
        text = json.dumps(
            {name: asdict(record) for name, record in self._records.items()}, indent=2
        )
        (Path(job.logdir) / _SUMMARY).write_text(text, encoding="utf-8")
        given = [one for record in self._records.values() for one in record.given]
        missing = sum(record.error is not None for record in self._records.values())
        told = _how(given) + (
            f"; {missing} {'test' if missing == 1 else 'tests'} without" if missing else ""
        )
        LOG_JOB.info("states of virtual machines: %s", told)
        if not self._quiet:
            LOG_UI.info("VM STATES  : %s", told)


def _how(given: list[Given]) -> str:
    fetched = [one for one in given if one.fetched]
    parts = (
        [f"{len(fetched)} fetched ({_size(sum(one.bytes for one in fetched))})"] if fetched else []
    )
    parts += [f"{len(given) - len(fetched)} from the cache"] if len(given) > len(fetched) else []
    return f"{', '.join(parts) or 'none'} in {sum(one.seconds for one in given):.2f} s"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
