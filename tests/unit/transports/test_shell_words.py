"""What a shell on another host may be told of."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from statepool.transports.ssh.shell import quoted

NASTY = [
    "/srv/with space",
    "/srv/it's",
    '/srv/"quoted"',
    "/srv/$(touch here)",
    "/srv/`touch here`",
    "/srv/${HOME}",
    "/srv/a;touch here",
    "/srv/a&&touch here|cat>here<here",
    "/srv/*?[a-z]{b,c}",
    "/srv/~root",
    "/srv/#comment",
    "/srv/-rf",
    "/srv/--help",
    "/srv/größe",
    "/-",
]


@pytest.mark.parametrize("path", NASTY)
def test_a_path_arrives_as_it_is_through_two_shells(path: str) -> None:
    word = quoted(path)
    assert word is not None
    script = f"printf %s {word}"
    command = f"exec /bin/sh -c {shlex.quote(script)}"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=True)
    assert done.stdout.decode() == path


@pytest.mark.parametrize(
    "path",
    [
        "relative",
        "",
        "-rf",
        "~/pool",
        "/srv/new\nline",
        "/srv/nul\0",
        "/srv/tab\t",
        "/srv/\x1b[0m",
        "/srv/back\\slash",
        "/srv/!!",
    ],
)
def test_no_shell_is_told_of_such_a_path(path: str) -> None:
    assert quoted(path) is None


def test_nor_of_one_that_is_no_text() -> None:
    assert quoted(b"/srv/\xff".decode("utf-8", "surrogateescape")) is None
