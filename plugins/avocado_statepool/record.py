"""
What a test was given: a record in its log directory, and links to its working images beside it.

::

    vm-state/record.json        what was provisioned, or why it could not be
    vm-state/vm1/disk.qcow2     the working image of vm1/disk, as a symbolic link
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "vm-state"
"""The directory of the record of a test, in its log directory."""

_FILE = "record.json"
_LOGDIR = "AVOCADO_TEST_LOGDIR"
"""
The environment variable with a test's log directory: avocado sets it for its own kind of tests, and
for programs that are run as tests.
"""


@dataclass
class Given:
    """
    A state that a test was given.

    :param object: the object of the state
    :param state: its name
    :param images: the working images, by ``machine/image``
    :param fetched: whether it was fetched from a pool
    :param bytes: how many bytes were moved
    :param seconds: how long it took
    :param source: the pool from which it came
    """

    object: str
    state: str
    images: dict[str, str]
    fetched: bool = False
    bytes: int = 0
    seconds: float = 0.0
    source: str | None = None

    def __str__(self) -> str:
        return f"{self.object} {self.state}"


@dataclass
class Record:
    """
    The result of the wishes of a test.

    :param test: its name
    :param given: the states that it was given
    :param error: why it could not be given a state
    """

    test: str
    given: list[Given] = field(default_factory=list)
    error: str | None = None

    def write(self, logdir: Path) -> None:
        """Write the record atomically, and link the working images beside it."""
        folder = logdir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for given in self.given:
            for name, path in given.images.items():
                link = folder / f"{name}.qcow2"
                link.parent.mkdir(exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(path)
        passing = folder / f"{_FILE}.tmp"
        passing.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        passing.rename(folder / _FILE)

    @classmethod
    def read(cls, logdir: Path) -> Record | None:
        """:returns: the record of a test, or None if it has none"""
        try:
            text = (logdir / FOLDER / _FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        found = json.loads(text)
        return cls(found["test"], [Given(**given) for given in found["given"]], found["error"])


def unlink_images(logdir: Path) -> None:
    """Remove the links to the working images; the record stays."""
    for path in (logdir / FOLDER).glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def working(object: str | None = None, test: Any = None) -> Path:
    """
    :param object: ``machine/image``; may be omitted if the test has only one working image
    :param test: the test, or its log directory; the one that runs in this process if not given
    :returns: the working image that this test was given
    :raises LookupError: it was not given one; the message says what to do
    """
    record = Record.read(_logdir(test))
    if record is None:
        raise LookupError(
            'no state is asked for; write :avocado: dependency={"type": "vm-state", "uri":'
            ' "vm1/disk/customize"} in its docstring'
        )
    images = {name: path for given in record.given for name, path in given.images.items()}
    if object is None and len(images) == 1:
        return Path(next(iter(images.values())))
    if object not in images:
        asked = "one of several" if object is None else object
        raise LookupError(
            f"{record.test} was given no working image of {asked}: it has"
            f" {', '.join(images) or 'none'}; name one of these"
        )
    return Path(images[object])


def _logdir(test: Any) -> Path:
    place = getattr(test, "logdir", test) or os.environ.get(_LOGDIR)
    if not place:
        raise LookupError(
            f"nobody knows which test this is: {_LOGDIR} is not set; run it by avocado, as one of"
            " its own tests or as a program"
        )
    return Path(place)
