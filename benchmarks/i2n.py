"""
avocado-i2n, the peer with the same purpose: installed in its own environment, and controlled
through a pipe.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.bench import ROOT

VERSION = "103.0"
REQUIREMENTS = (
    f"avocado-framework-plugin-i2n=={VERSION}",
    f"avocado-framework=={VERSION}",
    f"avocado-framework-plugin-vt=={VERSION}",
    "setuptools<81",  # it uses pkg_resources
)
ENVIRONMENT = (
    ROOT
    / ".venv-bench"
    / f"avocado-i2n-{VERSION}-python{sys.version_info.major}.{sys.version_info.minor}"
)
TIMEOUT = 600
"""Timeout of the installation, in seconds."""


class Unavailable(Exception):
    """An error: avocado-i2n is not available here; the text says why."""


def install() -> Path:
    """
    :returns: the interpreter of an environment with avocado-i2n, which is made at the first call
    :raises Unavailable: it cannot be installed
    """
    python = ENVIRONMENT / "bin/python"
    if (ENVIRONMENT / "complete").exists():
        return python
    try:
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        command = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            *REQUIREMENTS,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"avocado-i2n {VERSION} cannot be installed: {error}") from error
    if done.returncode:
        errors = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()
        raise Unavailable(
            f"avocado-i2n {VERSION} cannot be installed: {' '.join(errors[-1:]) or 'pip failed'}"
        )
    (ENVIRONMENT / "complete").touch()
    return python


class I2N:
    """
    A process that runs avocado-i2n.

    :param work: the directory of its working images, as ``vm1/disk.qcow2``
    :param log: the file for its output
    :raises Unavailable: it cannot be installed, or does not start
    """

    def __init__(self, work: Path, log: Path) -> None:
        self._work = work
        self._log = log
        command = [str(install()), str(Path(__file__).with_name("i2n_worker.py"))]
        with open(log, "w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=work,
            )
        self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = self._log.read_text().strip().splitlines()[-1:]
            raise Unavailable(f"avocado-i2n ended: {' '.join(last)}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def do(self, operation: str, state: str, *, pool: Path, cache: Path) -> float:
        """
        :param operation: ``get`` or ``set``
        :returns: its duration, in seconds
        """
        assert self._process.stdin is not None
        request = {
            "do": operation,
            "state": state,
            "pool": str(pool),
            "cache": str(cache),
            "work": str(self._work),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
