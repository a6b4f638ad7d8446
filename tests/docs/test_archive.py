"""Every command of the page about archives does what it says there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_can_be_followed(open_page: Callable[..., Any]) -> None:
    page = open_page("docs/archive.rst", (ROOT / "docs/archive.rst").read_text(encoding="utf-8"))
    assert page.run() > 15
