"""Peers that are Python packages, each installed in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench import ROOT

TIMEOUT = 600
"""Timeout of an installation, in seconds."""


class Unavailable(Exception):
    """An error: a peer is not available here; the text says why."""


def install(name: str, requirements: Sequence[str]) -> Path:
    """
    :param name: the peer and its version
    :param requirements: for pip
    :returns: the interpreter of an environment with the peer, which is made at the first call
    :raises Unavailable: it cannot be installed
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    place = ROOT / ".venv-bench" / f"{name.replace(' ', '-')}-python{version}"
    python = place / "bin/python"
    if (place / "complete").exists():
        return python
    try:
        venv.create(place, with_pip=True, clear=True)
        options = ("--quiet", "--disable-pip-version-check", "--no-input")
        command = [str(python), "-m", "pip", "install", *options, *requirements]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{name} cannot be installed: {error}") from error
    if done.returncode:
        errors = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()
        raise Unavailable(f"{name} cannot be installed: {' '.join(errors[-1:]) or 'pip failed'}")
    (place / "complete").touch()
    return python
