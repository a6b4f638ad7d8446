"""The face of all backends, and how one is found by its name."""

from __future__ import annotations

import importlib.metadata
import pickle
from pathlib import Path

import pytest

from statepool.backends.base import (
    DEFAULTS,
    ENTRY_POINTS,
    Options,
    StateBackend,
    Target,
    load_backend,
)
from statepool.backends.external import QCOW2ExtBackend
from statepool.errors import UsageError
from statepool.model.objects import Image
from statepool.model.scope import Scope


def register(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    entries = importlib.metadata.EntryPoints(
        importlib.metadata.EntryPoint(name, value, ENTRY_POINTS) for name, value in values.items()
    )
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda *, group: entries.select(group=group)
    )


def test_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, qcow2ext="statepool.backends.external:QCOW2ExtBackend")
    assert load_backend("qcow2ext") is QCOW2ExtBackend


def test_a_name_that_nobody_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, one="a:B", two="a:B")
    with pytest.raises(UsageError, match=r"no backend 'lvm'.*one, two"):
        load_backend("lvm")


@pytest.mark.parametrize(
    "value", ["statepool.backends.base:load_backend", "pathlib:Path", "statepool.errors:UsageError"]
)
def test_what_is_no_backend(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    register(monkeypatch, strange=value)
    with pytest.raises(UsageError, match="is registered as the backend 'strange', but is none"):
        load_backend("strange")


def test_a_backend_must_do_everything() -> None:
    class Half(StateBackend):
        def check(self, target: Target, state: str) -> bool:
            return True

    with pytest.raises(TypeError, match="abstract"):
        Half(None)  # type: ignore[abstract, arg-type]


def test_nothing_is_overwritten_by_default() -> None:
    assert Options() == DEFAULTS
    assert not any((DEFAULTS.overwrite, DEFAULTS.replace, DEFAULTS.cascade, DEFAULTS.dry_run))
    assert DEFAULTS.scope == frozenset(Scope)


@pytest.mark.parametrize("path", ["", "work/", "work.qcow2//", "work/.", "..", "/"])
def test_a_working_image_is_named_as_a_file(path: str) -> None:
    with pytest.raises(UsageError, match="name a file"):
        Target(Image("vm1", "disk"), {"disk": path})


def test_values_can_be_sent_to_other_processes() -> None:
    target = Target(Image("vm1", "disk"), {"disk": Path("/work.qcow2")})
    assert pickle.loads(pickle.dumps((target, DEFAULTS))) == (target, DEFAULTS)
