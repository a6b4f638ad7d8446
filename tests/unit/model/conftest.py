"""What hypothesis makes values of the model of."""

from __future__ import annotations

import string
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st

from statepool.model.digest import Digest
from statepool.model.names import ROOT_STATES, is_name


@pytest.fixture(scope="session")
def some() -> SimpleNamespace:
    """Strategies, by what they make."""
    letters = string.ascii_letters + string.digits
    names = st.builds(
        str.__add__, st.sampled_from(letters), st.text(letters + "._+-", max_size=127)
    ).filter(is_name)
    digests = st.builds(
        Digest.of, st.binary(max_size=8), st.sampled_from(["blake3p", "blake3", "sha256"])
    )
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    json = st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=12,
    )
    return SimpleNamespace(
        names=names,
        states=names.filter(lambda name: name not in ROOT_STATES),
        digests=digests,
        json=json,
    )
