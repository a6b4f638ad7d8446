"""Words of anything at all: what addresses are, and what a shell is told of."""

from __future__ import annotations

import shlex

from hypothesis import given
from hypothesis import strategies as st

from statepool.errors import StatePoolError
from statepool.model.location import Location
from statepool.transports.ssh.carrier import Endpoint
from statepool.transports.ssh.shell import quoted


@given(st.text(max_size=30).map("/{}".format) | st.text(max_size=30))
def test_a_path_is_one_word_of_a_shell(path: str) -> None:
    word = quoted(path)
    if word is not None:
        assert shlex.split(word) == [path]
        assert path.startswith("/")
        assert "\n" not in word


@given(st.text(max_size=30).map("ssh://{}".format))
def test_an_address_is_of_a_host_or_refused(text: str) -> None:
    try:
        endpoint = Endpoint.of(Location.parse(text))
    except StatePoolError:
        return
    assert endpoint.host
    assert not endpoint.host.startswith("-")
    assert not (endpoint.user or "").startswith("-")
    assert endpoint.port is None or 0 < endpoint.port < 1 << 16
