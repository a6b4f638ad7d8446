"""Words of anything at all: what ssh is configured with, whose keys are known, and what a shell is told of."""

from __future__ import annotations

import base64
import hmac
import shlex
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from statepool.errors import ConfigError, StatePoolError
from statepool.model.location import Location
from statepool.model.settings import Settings
from statepool.transports.ssh.hosts import Endpoint, resolve
from statepool.transports.ssh.known_hosts import known_keys
from statepool.transports.ssh.shell import quoted

KEYWORDS = (
    *("Host", "HostName", "Port", "User", "IdentityFile", "ProxyJump", "ProxyCommand", "UserKnownHostsFile", "GlobalKnownHostsFile"),
    *("HostKeyAlias", "ConnectTimeout", "Include", "CanonicalDomains", "IdentitiesOnly", "Ciphers"),
    *("Match host", "Match user", "Match !all", "Match"),
)
ARGUMENTS = (
    *("store", "*", "!store", "s?ore", "22", "65536", "-1", "none", "yes", "%h", "%p", "%%", "%", "${HOME}", "${", "~/x", "~nobody-at-all/x"),
    *("a@b:3", "[::1]:22", "store,other", '"', "'", "\\", '"a b"', "1h30m", "9" * 5000, "final", "all", "٣", "²"),
)
WORDS = st.sampled_from(ARGUMENTS) | st.text(max_size=6)
LINES = st.builds("{}{}{}".format, st.sampled_from(KEYWORDS), st.sampled_from([" ", "=", "\t", " = "]), st.lists(WORDS, max_size=3).map(" ".join))


@given(st.lists(LINES | st.text(max_size=12), max_size=8))
def test_a_configuration_of_anything(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "config").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    # A command may be anything, and would be run.
    if "exec" in (tmp_path / "config").read_text(errors="replace").lower():
        return
    try:
        found = resolve(Endpoint("store", None, "lab"), Settings(ssh_config=str(tmp_path / "config"), connect_timeout=1))
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert 0 < found.port < 1 << 16
    assert found.user
    assert found.address
    assert found.connect_timeout >= 0


NAMES = st.sampled_from(["store", "[store]:2222", "*", "!store", "s?ore", "[s]tore", "|1|", "|1|AAAA|AAAA", "@revoked", "@cert-authority", "#"])


@given(st.lists(st.lists(NAMES | st.sampled_from(["ssh-ed25519", "AAAA", "AAA", "="]) | st.text(max_size=6), max_size=5).map(" ".join), max_size=6))
def test_known_hosts_of_anything(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "known").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    for known in known_keys((tmp_path / "known",), "store"):
        assert known.key.fingerprint
        assert known.path == tmp_path / "known"


@given(st.text(max_size=12), st.binary(max_size=20))
def test_a_hashed_name_is_found_again(tmp_path: Path, name: str, salt: bytes) -> None:
    hashed = hmac.new(salt, name.lower().encode("utf-8", "surrogatepass"), "sha1").digest()
    encoded = [base64.b64encode(part).decode() for part in (salt, hashed)]
    (tmp_path / "known").write_text(f"|1|{encoded[0]}|{encoded[1]} ssh-ed25519 AAAA\n")
    assert name.isascii() <= len(known_keys((tmp_path / "known",), name))


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
