"""Every command and every example of the page about machines does what it says there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_page_can_be_followed(open_page: Callable[..., Any]) -> None:
    page = open_page("docs/machines.rst", (ROOT / "docs/machines.rst").read_text(encoding="utf-8"))
    assert page.run() > 30
