"""Every command and every example of the page about archives of pools does what it says there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_can_be_followed(open_page: Callable[..., Any]) -> None:
    path = ROOT / "docs/archive-pools.rst"
    page = open_page("docs/archive-pools.rst", path.read_text(encoding="utf-8"))
    assert page.run() > 30
