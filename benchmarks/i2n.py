"""
avocado-i2n, the peer with the same purpose: installed in its own environment, and controlled
through a pipe.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.environments import Unavailable, install

VERSION = "103.0"
REQUIREMENTS = (
    f"avocado-framework-plugin-i2n=={VERSION}",
    f"avocado-framework=={VERSION}",
    f"avocado-framework-plugin-vt=={VERSION}",
    "setuptools<81",  # it uses pkg_resources
)


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
        command = [
            str(install(f"avocado-i2n {VERSION}", REQUIREMENTS)),
            str(Path(__file__).with_name("i2n_worker.py")),
        ]
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
