"""
The only caller of qemu-img.

Formats are always named, never probed. Paths are made absolute, so that none of them looks like an
option or like a protocol: QEMU takes the part before a colon for a protocol only if no slash comes
first. An image must have passed our own checks before qemu-img gets it, since qemu-img opens what
an image tells it to.
"""

from __future__ import annotations

import json
import os
import re
import select
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statepool.errors import ToolError

if TYPE_CHECKING:
    import subprocess

_ENVIRONMENT = {"LC_ALL": "C", "PATH": os.defpath}
"""
The whole environment of qemu-img: so nothing in the caller's environment can change its effects or
its messages.
"""


class QemuImg:
    """
    The installed qemu-img, which is looked for at first use.

    :param timeout: the timeout of one call, in seconds
    """

    def __init__(self, timeout: float = 60) -> None:
        self.timeout = timeout
        self._binary: str | None = None
        self._version: str | None = None

    def version(self) -> str:
        """
        :returns: the version, such as ``7.2.22``
        :raises ToolError: qemu-img is missing or failed
        """
        if self._version is None:
            words = self._run(["--version"]).partition("\n")[0].split()
            if words[:2] != ["qemu-img", "version"] or len(words) < 3:
                raise ToolError(f"qemu-img does not say its version, but {' '.join(words)[:100]!r}")
            self._version = words[2]
        return self._version

    def info(
        self, path: Path | str, *, force_share: bool = True, format: str = "qcow2"
    ) -> dict[str, Any]:
        """
        :param path: an image; its backing file is not opened
        :param force_share: also while a process writes to it
        :param format: QEMU's driver for it
        :returns: the output of ``qemu-img info``, as in QEMU's ``ImageInfo``
        :raises ToolError: qemu-img is missing, failed or took too long
        """
        share = ["-U"] if force_share else []
        return self._json(["info", *share, "-f", format, "--output=json", _absolute(path)])

    def check(self, path: Path | str, *, force_share: bool = False) -> dict[str, Any]:
        """
        :param path: a qcow2 image; its backing files are opened, too
        :param force_share: also while a process writes to it
        :returns: the output of ``qemu-img check``, as in QEMU's ``ImageCheck``: see its
            ``corruptions``, ``leaks`` and ``check-errors``
        :raises ToolError: qemu-img is missing, could not check, or took too long
        """
        share = ["-U"] if force_share else []
        # Codes 2 and 3 mean that errors or leaks were found; the JSON text says more.
        return self._json(
            ["check", *share, "-f", "qcow2", "--output=json", _absolute(path)], accept=(0, 2, 3)
        )

    def create_overlay(
        self, path: Path | str, backing_name: str, virtual_size: int, *, cluster_size: int = 65536
    ) -> None:
        """
        Write an empty overlay, over any file at ``path``, without opening its backing file.

        :param backing_name: the name as it will be in the image
        :param virtual_size: in bytes
        :param cluster_size: in bytes
        :raises ToolError: qemu-img is missing, failed or took too long
        """
        options = ["-o", f"cluster_size={cluster_size}"]
        self._run(
            [
                "create",
                "-q",
                "-f",
                "qcow2",
                *options,
                "-u",
                "-b",
                backing_name,
                "-F",
                "qcow2",
                _absolute(path),
                str(virtual_size),
            ]
        )

    def rebase_unsafe(self, path: Path | str, backing_name: str) -> None:
        """
        Give an image another backing name, without opening the old or the new backing file.

        :param backing_name: the name as it will be in the image; the backing format is given as
            qcow2
        :raises ToolError: qemu-img is missing, failed or took too long
        """
        self._run(
            [
                "rebase",
                "-q",
                "-u",
                "-f",
                "qcow2",
                "-b",
                backing_name,
                "-F",
                "qcow2",
                _absolute(path),
            ]
        )

    def rebase(self, path: Path | str, backing_name: str) -> None:
        """
        Rebase an image to another backing file, and write into it the data that a guest would then
        miss: the layers between the two become part of it.

        This is how to squash states: ``convert`` with a backing file copies only the content of the
        uppermost layer, and silently drops the rest.

        :param path: a qcow2 image of our own; its old and new chains are opened
        :param backing_name: of a qcow2 image, looked for from the directory of ``path``
        :raises ToolError: qemu-img is missing, failed or took too long; the image may then hold a
            part of the data, under its old backing name
        """
        self._run(
            ["rebase", "-q", "-f", "qcow2", "-b", backing_name, "-F", "qcow2", _absolute(path)]
        )

    def compare(self, a: Path | str, b: Path | str) -> bool:
        """
        :returns: whether a guest sees the same in two qcow2 images; behind the end of the shorter
            one there must be only zeros
        :raises ToolError: qemu-img is missing, could not compare, or took too long
        """
        command = ["compare", "-q", "-U", "-f", "qcow2", "-F", "qcow2", _absolute(a), _absolute(b)]
        return self._call(command, accept=(0, 1)).returncode == 0

    def convert(
        self,
        source: Path | str,
        target: Path | str,
        *,
        source_format: str = "qcow2",
        target_format: str = "qcow2",
        options: Sequence[str] = (),
        compress: bool = False,
        watch: Callable[[float], object] | None = None,
    ) -> None:
        """
        Write what a guest sees in ``source`` into a new image without a backing file, over any file
        at ``target``.

        :param options: of the new image, such as ``cluster_size=65536``
        :param compress: compress its clusters
        :param watch: is called with the part that is done, from 0 to 1. The timeout is then for
            qemu-img doing nothing, however long the whole takes.
        :raises ToolError: qemu-img is missing, failed or took too long
        """
        given = [
            *(["-c"] if compress else []),
            *(word for option in options for word in ("-o", option)),
        ]
        command = [
            "convert",
            "-q" if watch is None else "-p",
            "-f",
            source_format,
            "-O",
            target_format,
            *given,
            _absolute(source),
            _absolute(target),
        ]
        if watch is None:
            self._run(command)
        else:
            self._watched(command, watch)

    def snapshots(self, path: Path | str) -> list[dict[str, Any]]:
        """
        :param path: a qcow2 image that no process writes to; its backing file is not opened
        :returns: its internal snapshots in the order of their table, as in QEMU's ``SnapshotInfo``
        :raises ToolError: qemu-img is missing, failed or took too long
        """
        found = self.info(path, force_share=False).get("snapshots", [])
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise ToolError(f"qemu-img info says something strange of the snapshots of {path}")
        return found

    def create_snapshot(self, path: Path | str, name: str) -> None:
        """
        Save the content of an image as a snapshot. Several snapshots can have the same name.

        :param path: a qcow2 image that no process has open; its chain is opened, too
        :raises ToolError: qemu-img is missing, failed or took too long
        """
        self._snapshot("-c", path, name)

    def apply_snapshot(self, path: Path | str, identifier: str) -> None:
        """
        Restore the content of a snapshot; the present content is lost.

        :param path: a qcow2 image that no process has open; its chain is opened, too
        :param identifier: the identifier of the snapshot, not its name: qemu-img takes a name of
            digits for an identifier
        :raises ToolError: qemu-img is missing, failed or took too long
        """
        self._snapshot("-a", path, identifier)

    def delete_snapshot(self, path: Path | str, name: str) -> None:
        """
        Remove a snapshot; the first one, if several have this name.

        :param path: a qcow2 image that no process has open; its chain is opened, too
        :raises ToolError: qemu-img is missing, failed or took too long
        """
        self._snapshot("-d", path, name)

    def _snapshot(self, action: str, path: Path | str, name: str) -> None:
        # The command has no option for the format. In these options a doubled comma means a comma.
        image = f"driver=qcow2,file.driver=file,file.filename={_absolute(path).replace(',', ',,')}"
        self._run(["snapshot", "-q", action, name, "--image-opts", image])

    def _json(self, arguments: list[str], accept: tuple[int, ...] = (0,)) -> dict[str, Any]:
        output = self._run(arguments, accept)
        try:
            value = json.loads(output)
        except ValueError as error:
            raise ToolError(
                f"qemu-img {arguments[0]} printed something that is not JSON: {output[:100]!r}"
            ) from error
        if not isinstance(value, dict):
            raise ToolError(
                f"qemu-img {arguments[0]} printed something that is not a JSON object:"
                f" {output[:100]!r}"
            )
        return value

    def _run(self, arguments: list[str], accept: tuple[int, ...] = (0,)) -> str:
        return self._call(arguments, accept).stdout

    def _call(
        self, arguments: list[str], accept: tuple[int, ...]
    ) -> subprocess.CompletedProcess[str]:
        import subprocess  # only when qemu-img is needed, which is seldom

        binary = self._found()
        try:
            done = subprocess.run(
                [binary, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                env=_ENVIRONMENT,
                timeout=self.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ToolError(
                f"qemu-img {arguments[0]} did not end within {self.timeout:g} s, and was stopped",
                hint="allow it more time",
            ) from error
        except OSError as error:
            raise _cannot_run(binary, error) from error
        if done.returncode not in accept:
            raise ToolError(f"qemu-img {arguments[0]} failed: {_first_line(done)}")
        return done

    def _found(self) -> str:
        import shutil  # likewise

        if self._binary is None:
            self._binary = shutil.which("qemu-img")
            if self._binary is None:
                raise ToolError("qemu-img is not installed", hint="install qemu-utils")
        return self._binary

    def _watched(self, arguments: list[str], watch: Callable[[float], object]) -> None:
        """Run qemu-img with ``-p``, and tell what is done as it says it."""
        import subprocess  # likewise
        import tempfile

        binary = self._found()
        with tempfile.TemporaryFile() as said, ExitStack() as ending:
            try:
                process = subprocess.Popen(
                    [binary, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    env=_ENVIRONMENT,
                )
            except OSError as error:
                raise _cannot_run(binary, error) from error
            ending.enter_context(process)
            ending.callback(process.kill)  # of no effect once it was waited for
            assert process.stdout is not None
            output, work = process.stdout.fileno(), ""
            waiting = select.poll()
            waiting.register(output, select.POLLIN)
            while True:
                if not waiting.poll(self.timeout * 1000):
                    before, work = work, _work(process.pid)
                    if work == before:
                        raise ToolError(
                            f"qemu-img {arguments[0]} did nothing for {self.timeout:g} s, and was"
                            " stopped",
                            hint="allow it more time",
                        )
                    continue
                if not (text := os.read(output, 4096)):
                    break
                if parts := _DONE.findall(text):
                    watch(float(parts[-1]) / 100)
            if process.wait() != 0:
                said.seek(0)
                done = subprocess.CompletedProcess(
                    arguments, process.returncode, "", said.read().decode(errors="replace")
                )
                raise ToolError(f"qemu-img {arguments[0]} failed: {_first_line(done)}")


_DONE = re.compile(rb"\((\d+\.\d+)/100%\)")


def _work(pid: int) -> str:
    """:returns: how much a process has read and written, see ``man 5 proc``"""
    with open(f"/proc/{pid}/io", encoding="ascii") as file:
        return file.read()


def _cannot_run(binary: str, error: OSError) -> ToolError:
    return ToolError(f"cannot run {binary}: {error.strerror}", hint="install qemu-utils")


def _first_line(done: subprocess.CompletedProcess[str]) -> str:
    for line in done.stderr.splitlines():
        if line.strip():
            return line.strip().removeprefix("qemu-img: ")
    if done.returncode < 0:
        return f"it was ended by signal {-done.returncode}"
    return f"it ended with exit code {done.returncode} and said nothing"


def _absolute(path: Path | str) -> str:
    return os.path.abspath(path)
