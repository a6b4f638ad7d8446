"""
Settings of anything at all, from options, the environment and files: used, or refused in our words.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from statepool.config import _READERS, load
from statepool.errors import ConfigError

KEYS = [*_READERS, "sources", "fresh", "no-such-setting"]
ODD = st.sampled_from(["1e999", "9" * 5000, "1G", "/x", "٣", "1_0", " "])
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | ODD
FIELDS = st.sampled_from(["location", "name", "scope", "authority"])
NESTED = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner), max_leaves=5
)


@given(st.dictionaries(st.sampled_from(KEYS), NESTED, max_size=3))
def test_options_of_anything(tmp_path: Path, overrides: dict[str, object]) -> None:
    try:
        found = load(overrides, environ={"HOME": str(tmp_path)}, cwd=tmp_path)
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert os.path.isabs(found.cache)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES.map(str) | st.text(max_size=12), max_size=3))
def test_an_environment_of_anything(tmp_path: Path, given: dict[str, str]) -> None:
    variables = {
        f"STATEPOOL_{key.upper().replace('-', '_')}": value for key, value in given.items()
    }
    try:
        found = load(environ={"HOME": str(tmp_path)} | variables, cwd=tmp_path)
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert os.path.isabs(found.cache)


TOML = st.sampled_from(
    [
        "[",
        "]",
        "[[sources]]",
        "=",
        '"',
        "'",
        "\n",
        ".",
        "{",
        "}",
        ",",
        "#",
        "1",
        "true",
        "nan",
        "1979-05-27",
        "'''",
        "\\",
        *KEYS,
    ]
)


@given(
    st.lists(TOML | st.text(max_size=4), max_size=12).map("".join)
    | st.integers(1, 9000).map(lambda depth: "x = " + "[" * depth)
)
def test_a_file_of_anything(tmp_path: Path, text: str) -> None:
    (tmp_path / "statepool.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load(environ={"HOME": str(tmp_path)}, cwd=tmp_path)
    except ConfigError as error:
        assert "\n" not in str(error)
