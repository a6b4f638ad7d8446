"""AutoArchive, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from benchmarks.environments import TIMEOUT, Unavailable, install

VERSION = "2.1.1"

_OVERRIDE = """
import typing

if not hasattr(typing, "override"):  # of Python 3.12, which AutoArchive imports
    from typing_extensions import override

    typing.override = override
"""

_SPECIFICATION = """
[Content]
path = {root}
include-files = .
exclude-files =
[Archive]
dest-dir = {destination}
archiver = targz
"""


def install_autoarchive() -> Path:
    """
    :returns: the interpreter of an environment with AutoArchive
    :raises Unavailable: it cannot be installed
    """
    python = install(
        f"autoarchive {VERSION}", ["setuptools>=78", "wheel", "typing_extensions>=4.5"]
    )
    if (python.parent / "aa").exists():
        return python
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    Path(packages, "sitecustomize.py").write_text(_OVERRIDE)
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-build-isolation"]
    done = subprocess.run(
        [*command, f"AutoArchive=={VERSION}"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise Unavailable(
            f"AutoArchive {VERSION} cannot be installed: {done.stderr.strip()[-200:]}"
        )
    return python


class AutoArchive:
    """
    AutoArchive with one backup, called ``one``.

    :param python: the interpreter of its environment
    :param place: a directory for its files
    :param root: what is archived
    :param destination: the directory with the archives
    """

    def __init__(self, python: Path, place: Path, root: Path, destination: Path) -> None:
        for directory in (place / "conf", place / "home", destination):
            directory.mkdir(parents=True, exist_ok=True)
        (place / "conf/one.aa").write_text(
            _SPECIFICATION.format(root=root, destination=destination)
        )
        self._command = [
            str(python.parent / "aa"),
            "--quiet",
            f"--user-config-dir={place / 'conf'}",
            f"--archive-specs-dir={place / 'conf'}",
        ]
        self._environment = {**os.environ, "HOME": str(place / "home")}

    def create(self, *options: str) -> None:
        """
        Make an archive. Its exit code is 1 if it warns, such as of a restart.

        :raises RuntimeError: it failed
        """
        done = subprocess.run(
            [*self._command, *options, "one"],
            env=self._environment,
            capture_output=True,
            check=False,
            timeout=TIMEOUT,
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(f"AutoArchive ended with {done.returncode}: {done.stderr!r}")
