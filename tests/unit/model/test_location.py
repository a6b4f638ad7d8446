"""A pool's address: what is printed is read back as the same value."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statepool.errors import InvalidLocation, StatePoolError
from statepool.model.location import Location

WORDS = st.text(
    st.characters(min_codepoint=32, exclude_characters="/\x7f", exclude_categories=["Cs"]),
    min_size=1,
)
NAMES = st.lists(st.integers(32, 255).filter(lambda byte: byte not in b"/\x7f"), min_size=1).map(
    lambda name: os.fsdecode(bytes(name))
)
PATHS = st.lists(WORDS | NAMES, max_size=4).map(lambda parts: "/" + "/".join(parts))
HOSTS = st.sampled_from(
    ["store", "store.example.org", "10.0.0.7", "::1", "fe80::1%eth0", "a_b", "A-1"]
)
USERS = st.none() | st.sampled_from(["lab", "lab@example.org", "_x", "a.b-c+d"])
LOCATIONS = st.builds(
    Location, st.sampled_from(["file", "link", "oci", "x+y.z-1"]), PATHS
) | st.builds(
    Location, st.sampled_from(["ssh", "s3"]), PATHS, HOSTS, USERS, st.none() | st.integers(1, 65535)
)


@given(LOCATIONS)
def test_what_is_printed_is_read_back(location: Location) -> None:
    assert Location.parse(str(location)) == location
    assert str(location).isascii()
    assert pickle.loads(pickle.dumps(location)) == location


@given(
    st.text(max_size=30)
    | st.builds("{}://{}".format, st.sampled_from(["file", "ssh", "x"]), st.text(max_size=30))
)
def test_what_is_read_is_printed_so_that_it_is_read_again(text: str) -> None:
    try:
        location = Location.parse(text)
    except InvalidLocation:
        return
    assert Location.parse(str(location)) == location


@pytest.mark.parametrize(
    ("text", "location", "printed"),
    [
        ("/srv/pool", Location("file", "/srv/pool"), "file:///srv/pool"),
        ("/srv//pool/", Location("file", "/srv/pool"), "file:///srv/pool"),
        ("/", Location("file", "/"), "file:///"),
        ("file:///srv/pool", Location("file", "/srv/pool"), "file:///srv/pool"),
        ("FILE:///srv/pool", Location("file", "/srv/pool"), "file:///srv/pool"),
        ("link:///srv/pool", Location("link", "/srv/pool"), "link:///srv/pool"),
        ("ssh://store/srv/p%FF", Location("ssh", "/srv/p\udcff", "store"), "ssh://store/srv/p%FF"),
        ("/srv/m\udcfcller", Location("file", "/srv/m\udcfcller"), "file:///srv/m%FCller"),
        ("file:///srv/%C3%A9", Location("file", "/srv/\u00e9"), "file:///srv/%C3%A9"),
        ("file:///srv/my%20pool%3F", Location("file", "/srv/my pool?"), "file:///srv/my%20pool%3F"),
        ("file:///srv/%FF", Location("file", "/srv/\udcff"), "file:///srv/%FF"),
        ("/srv/\udcff", Location("file", "/srv/\udcff"), "file:///srv/%FF"),
        ("ssh://store/srv", Location("ssh", "/srv", "store"), "ssh://store/srv"),
        (
            "ssh://lab@store:2222/srv",
            Location("ssh", "/srv", "store", "lab", 2222),
            "ssh://lab@store:2222/srv",
        ),
        (
            "ssh://lab@[::1]:22/srv",
            Location("ssh", "/srv", "::1", "lab", 22),
            "ssh://lab@[::1]:22/srv",
        ),
        # as avocado-i2n writes them
        (":/srv/pool", Location("file", "/srv/pool"), "file:///srv/pool"),
        (":;/srv/pool", Location("link", "/srv/pool"), "link:///srv/pool"),
        ("store:/srv/pool", Location("ssh", "/srv/pool", "store"), "ssh://store/srv/pool"),
    ],
)
def test_forms(text: str, location: Location, printed: str) -> None:
    assert Location.parse(text) == location
    assert str(location) == printed


def test_relative_paths_are_those_of_the_directory_where_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("cache", "./cache", "cache/"):
        assert Location.parse(text) == Location("file", str(tmp_path / "cache"))
    assert Location.parse("./a:b") == Location("file", str(tmp_path / "a:b"))


def test_tilde_is_the_home_directory(nobodys_environment: Path) -> None:
    assert Location.parse("~/pool") == Location("file", str(nobodys_environment / "pool"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "file://",
        "file://host",
        "file://host/path",
        "link://host/path",
        "ssh:///path",
        "ssh://host",
        "ssh://:22/path",
        "ssh://user@/path",
        "ssh://host:/path",
        "ssh://host:0/path",
        "ssh://host:65536/path",
        "ssh://host:x/path",
        "ssh://host:22:22/path",
        "ssh://::1/path",
        "ssh://[::1/path",
        "ssh://[x]y/path",
        "ssh://user:secret@host/path",
        "ssh://user%3Asecret@host/path",
        "ssh://-oProxyCommand=x/path",
        "ssh://-l@host/path",
        "ssh://us er@host/path",
        "ssh://host/path?x=1",
        "ssh://host/path#x",
        "file:///a%0Ab",
        "file:///a%00b",
        "/a\nb",
        "/a\ud800",
        "file:///a\ud800",
        "host:path",
        "store:22:/path",
        "-host:/path",
        "c:",
        ":",
        ":;",
        "::/path",
    ],
)
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(InvalidLocation):
        Location.parse(text)


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(StatePoolError) as caught:
        Location.parse("ssh://user:hunter2@host/path")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "facts",
    [
        {"scheme": "file", "path": "relative"},
        {"scheme": "file", "path": ""},
        {"scheme": "ssh", "path": "/x", "host": "a b"},
        {"scheme": "ssh", "path": "/x", "host": ""},
        {"scheme": "oci", "path": "/x", "user": "lab"},
        {"scheme": "oci", "path": "/x", "port": 22},
        {"scheme": "ssh", "path": "/x", "host": "a", "port": -1},
    ],
)
def test_bad_values_cannot_be_made(facts) -> None:
    with pytest.raises(InvalidLocation):
        Location(**facts)


def test_local_ones_are_known() -> None:
    assert [
        scheme
        for scheme in ("file", "link", "ssh", "oci")
        if Location(scheme, "/x", "h" if scheme == "ssh" else None).is_local
    ] == [
        "file",
        "link",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "\ud800",
        "~\ud800/x",
        "~\0/x",
        "~user\udfff",
        "/a\ud800",
        "file:///\ud800",
        "ssh://h/\ud800",
        "h\ud800:/x",
        ":;/\ud8ff",
    ],
)
def test_what_no_file_can_be_named(text: str) -> None:
    with pytest.raises(InvalidLocation):
        Location.parse(text)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("root@lab:/srv/pool", "ssh://root@lab/srv/pool"),
        ("root@192.0.2.7:/srv//pool/", "ssh://root@192.0.2.7/srv/pool"),
        ("root@[::1]:/x", "ssh://root@[::1]/x"),
        ("[fe80::1]:/x", "ssh://[fe80::1]/x"),
        ("lab@store:/srv/a b", "ssh://lab@store/srv/a%20b"),
        ("lab@store:/srv/?", "ssh://lab@store/srv/%3F"),
        ("ssh://lab:/srv/pool", "ssh://lab/srv/pool"),
        ("ssh://root@lab:srv/pool", "ssh://root@lab/srv/pool"),
    ],
)
def test_what_is_written_as_for_scp_is_told_how_to_be_written(text: str, meant: str) -> None:
    with pytest.raises(InvalidLocation) as caught:
        Location.parse(text)
    assert (caught.value.hint or "").endswith(meant)
    assert str(Location.parse(meant)) == meant
