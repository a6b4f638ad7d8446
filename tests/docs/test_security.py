"""The page on security names tests: they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PAGE = (ROOT / "docs/security.rst").read_text(encoding="utf-8")


def test_every_promise_names_tests_that_are_there() -> None:
    files = set(re.findall(r"``(tests/\S+\.py)``", PAGE))
    functions = set(re.findall(r"``(test_\w+)``", PAGE))
    assert len(files) > 10
    assert len(functions) > 10
    assert {name for name in files if not (ROOT / name).is_file()} == set()
    sources = [
        path.read_text(encoding="utf-8")
        for place in ("tests", "statepool/testing")
        for path in (ROOT / place).rglob("*.py")
    ]
    there = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    assert functions - there == set()
