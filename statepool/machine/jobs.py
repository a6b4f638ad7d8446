"""Jobs: operations of QEMU that take a while."""

from __future__ import annotations

import secrets
from typing import Any

from statepool.errors import MachineError
from statepool.machine.running import RunningMachine, wait_until
from statepool.model.progress import SILENT, Progress

JOB_TIMEOUT = 600.0
"""The timeout of a job, in seconds."""

_PREFIX = "statepool-"
"""The prefix of our jobs' names."""


class JobFailed(MachineError):
    """A job of QEMU failed."""


def run_job(
    machine: RunningMachine,
    command: str,
    *,
    what: str,
    timeout: float = JOB_TIMEOUT,
    progress: Progress = SILENT,
    complete: bool = False,
    **arguments: Any,
) -> None:
    """
    Run a job to its end.

    :param command: the command that starts the job, which takes a ``job-id``
    :param what: its description, for the progress and the error
    :param timeout: in seconds; a job that takes longer is cancelled if QEMU can do so
    :param progress: told of its progress
    :param complete: whether the job has to be told to complete when it is ready
    :param arguments: of the command
    :raises JobFailed: the job failed
    :raises MachineError: the job took too long, or QEMU has ended
    """
    forget_jobs(machine)
    name = _PREFIX + secrets.token_hex(8)
    machine.execute(command, job_id=name, **arguments)
    watch = _Watch(machine, name, progress, complete)
    progress.begin(what, 0)
    try:
        if not wait_until(watch.is_over, timeout=timeout):
            machine.execute("job-cancel", id=name)
            raise MachineError(
                f"{machine} did not end this within {timeout:g} s: {what}",
                hint="allow it more time",
            )
    finally:
        progress.end()
    machine.execute("job-dismiss", id=name)
    if watch.error is not None:
        raise JobFailed(f"{machine} failed: {what}: {watch.error}")


def forget_jobs(machine: RunningMachine) -> None:
    """
    Dismiss those jobs of ours that a killed process started: no process has waited for their end.
    """
    for job in machine.execute("query-jobs"):
        if job["id"].startswith(_PREFIX) and job["status"] == "concluded":
            machine.execute("job-dismiss", id=job["id"])


class _Watch:
    def __init__(
        self, machine: RunningMachine, name: str, progress: Progress, complete: bool
    ) -> None:
        self._machine = machine
        self._name = name
        self._progress = progress
        self._complete = complete
        self._done = 0
        self.error: str | None = None

    def is_over(self) -> bool:
        for job in self._machine.execute("query-jobs"):
            if job["id"] != self._name:
                continue
            self._progress.advance(max(0, job["current-progress"] - self._done))
            self._done = job["current-progress"]
            self.error = job.get("error")
            if self._complete and job["status"] == "ready":
                self._complete = False
                self._machine.execute("job-complete", id=self._name)
            return bool(job["status"] == "concluded")
        raise MachineError(
            f"{self._machine} does not know its job {self._name} any more",
            hint="does another program use its monitor?",
        )
