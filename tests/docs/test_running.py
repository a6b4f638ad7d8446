"""The commands on the page about machines that run, with one that does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from statepool.api import StatePool, init
from statepool.model.objects import Machine
from tests.support.machines import IMAGES, Lab

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_can_be_followed(
    open_page: Callable[..., Any], guests: Lab, tmp_path: Path
) -> None:
    init(tmp_path / "pool")
    (tmp_path / "statepool.toml").write_text(
        'cache = "cache"\nsources = [ { location = "pool", name = "store" } ]\n'
    )
    machine = StatePool(cache=tmp_path / "cache", sources=[tmp_path / "pool"]).machine(
        Machine("vm1", tuple(IMAGES))
    )
    machine.set("customize", source=guests.copies(tmp_path / "installed"))
    images = machine.get("customize", to=tmp_path / "run").images
    page = open_page("docs/running.rst", (ROOT / "docs/running.rst").read_text(encoding="utf-8"))
    with guests.foreign({name: Path(path) for name, path in images.items()}) as guest:
        guest.console.ask("format vda", "done format")
        guest.machine.close()
        for name in ("monitor", "agent"):
            (tmp_path / "run" / name).symlink_to(guest.directory / name)
        assert page.run(("console",)) == 4
        before = guest.console.tick()
        assert guest.console.tick() > before
