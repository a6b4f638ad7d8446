"""Keys from files and agents, passphrases and passwords; and what is said when none of them will do."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statepool.errors import AccessDenied, TransportError
from statepool.model.secrets import GivenSecrets, SecretKind
from statepool.testing.sshd import Sshd, make_key, run_sshd
from statepool.transports.ssh.connection import Connection

Connect = Callable[..., Connection]
Config = Callable[[str], str]


def config_with(sshd: Sshd, *lines: str) -> str:
    return "\n  ".join(["Host *", f"HostKeyAlias {sshd.known_hosts.read_text().split()[0]}", *lines]) + "\n"


@pytest.fixture
def locked_key(sshd: Sshd, tmp_path: Path) -> Path:
    """The key that is let in, under the passphrase ``open sesame``."""
    path = tmp_path / "locked"
    path.write_bytes(sshd.identity.read_bytes())
    path.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "open sesame", "-f", str(path)], check=True, capture_output=True)
    return path


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """``agent(key)``: an agent of this test's own, that has the key."""
    started = subprocess.run(["ssh-agent", "-s", "-a", str(tmp_path / "agent")], capture_output=True, text=True, check=True).stdout
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    yield lambda key: subprocess.run(["ssh-add", "-q", str(key)], check=True, stdin=subprocess.DEVNULL) and None
    os.kill(int(started.split("SSH_AGENT_PID=")[1].split(";")[0]), signal.SIGTERM)


def refused(connection: Connection) -> AccessDenied:
    with pytest.raises(AccessDenied) as caught:
        _ = connection.transport
    assert caught.value.exit_code == 7
    assert caught.value.hint
    assert not caught.value.transient
    return caught.value


def test_the_wrong_key(sshd: Sshd, connect: Connect, ssh_config: Config, tmp_path: Path) -> None:
    wrong = make_key(tmp_path / "wrong")
    error = refused(connect(sshd.location("/"), sshd.settings(ssh_config=ssh_config(config_with(sshd, f"IdentityFile {wrong}")))))
    assert f"{wrong}: not accepted" in error.message
    assert "takes publickey" in error.message


def test_no_key_at_all(sshd: Sshd, connect: Connect, ssh_config: Config) -> None:
    assert "nothing to offer" in refused(connect(sshd.location("/"), sshd.settings(ssh_config=ssh_config(config_with(sshd))))).message


@pytest.mark.parametrize(("name", "words"), [("missing", "no such file"), ("text", "not a private key"), ("", "cannot be read")])
def test_a_key_file_that_is_none(sshd: Sshd, connect: Connect, ssh_config: Config, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "text").write_text("hello\n")
    settings = sshd.settings(ssh_config=ssh_config(config_with(sshd, f"IdentityFile {tmp_path}/{name}")))
    assert words in refused(connect(sshd.location("/"), settings)).message


def test_an_account_that_does_not_exist(sshd: Sshd, connect: Connect) -> None:
    location = sshd.location("/")
    assert "nosuchuser@127.0.0.1" in refused(connect(type(location)("ssh", "/", "127.0.0.1", "nosuchuser", sshd.port), sshd.settings())).message


@pytest.mark.parametrize("type", ["ecdsa", "rsa"])
def test_keys_of_other_types(connect: Connect, ssh_config: Config, tmp_path: Path, type: str) -> None:
    key = make_key(tmp_path / "key", type=type)
    with run_sshd(options={"AuthorizedKeysFile": f"{key}.pub"}) as server:
        settings = server.settings(ssh_config=ssh_config(config_with(server, f"IdentityFile {key}")))
        assert connect(server.location("/"), settings).transport.is_authenticated()


def test_the_default_keys(sshd: Sshd, connect: Connect, ssh_config: Config, nobodys_environment: Path) -> None:
    (nobodys_environment / ".ssh").mkdir()
    (nobodys_environment / ".ssh/id_ed25519").write_bytes(sshd.identity.read_bytes())
    assert connect(sshd.location("/"), sshd.settings(ssh_config=ssh_config(config_with(sshd)))).transport.is_authenticated()


def test_a_key_with_a_certificate(connect: Connect, ssh_config: Config, tmp_path: Path) -> None:
    authority, key = make_key(tmp_path / "authority"), make_key(tmp_path / "key")
    with run_sshd(options={"TrustedUserCAKeys": f"{authority}.pub", "AuthorizedKeysFile": "none"}) as server:
        settings = server.settings(ssh_config=ssh_config(config_with(server, f"IdentityFile {key}")))
        refused(connect(server.location("/"), settings))
        subprocess.run(["ssh-keygen", "-q", "-s", str(authority), "-I", "test", "-n", server.user, f"{key}.pub"], check=True, capture_output=True)
        assert connect(server.location("/"), settings).transport.is_authenticated()


# -- agents


def test_a_key_of_the_agent(sshd: Sshd, connect: Connect, ssh_config: Config, agent: Callable[[Path], None]) -> None:
    settings = sshd.settings(ssh_config=ssh_config(config_with(sshd)))
    refused(connect(sshd.location("/"), settings))
    agent(sshd.identity)
    assert connect(sshd.location("/"), settings).transport.is_authenticated()


def test_a_configured_key_that_only_the_agent_has(
    sshd: Sshd, connect: Connect, ssh_config: Config, agent: Callable[[Path], None], tmp_path: Path
) -> None:
    agent(sshd.identity)
    agent(make_key(tmp_path / "other"))
    (tmp_path / "mine.pub").write_bytes(sshd.identity.with_suffix(".pub").read_bytes())
    only = "IdentitiesOnly yes"
    settings = sshd.settings(ssh_config=ssh_config(config_with(sshd, f"IdentityFile {tmp_path}/mine", only)))
    assert connect(sshd.location("/"), settings).transport.is_authenticated()
    settings = sshd.settings(ssh_config=ssh_config(config_with(sshd, f"IdentityFile {tmp_path}/other", only)))
    error = refused(connect(sshd.location("/"), settings))
    assert error.message.count("not accepted") == 1, "the agent's other key is not offered"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paramiko leaves its socket open then
def test_an_agent_that_is_gone(sshd: Sshd, connect: Connect, ssh_config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "gone"))
    refused(connect(sshd.location("/"), sshd.settings(ssh_config=ssh_config(config_with(sshd)))))


# -- passphrases and passwords


def test_a_passphrase(sshd: Sshd, connect: Connect, ssh_config: Config, locked_key: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    text = ssh_config(config_with(sshd, f"IdentityFile {locked_key}"))
    asked: list[tuple[SecretKind, str]] = []

    def answer(kind: SecretKind, subject: str) -> str:
        asked.append((kind, subject))
        return "open sesame"

    settings = sshd.settings(ssh_config=text, secrets=answer)
    assert connect(sshd.location("/"), settings).transport.is_authenticated()
    assert asked == [(SecretKind.PASSPHRASE, str(locked_key))]
    assert "sesame" not in caplog.text


@pytest.mark.parametrize(("given", "words"), [(None, "needs a passphrase"), ("close sesame", "not the right one")])
def test_no_passphrase_or_a_wrong_one(sshd: Sshd, connect: Connect, ssh_config: Config, locked_key: Path, given: str | None, words: str) -> None:
    secrets = GivenSecrets(passphrase=given) if given else None
    settings = sshd.settings(ssh_config=ssh_config(config_with(sshd, f"IdentityFile {locked_key}")), secrets=secrets)
    error = refused(connect(sshd.location("/"), settings))
    assert f"{locked_key}: " in error.message
    assert words in error.message
    assert "close sesame" not in str(error)


@pytest.mark.parametrize("methods", ["password", "keyboard-interactive"])
def test_a_password(password_server, connect: Connect, sshd: Sshd, methods: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = password_server(methods)
    location = sshd.location("/", server.port)
    assert connect(location, server.settings(secrets=GivenSecrets(password="hunter2"))).transport.is_authenticated()
    error = refused(connect(location, server.settings(secrets=GivenSecrets(password="hunter3"))))
    assert "the password: not accepted" in error.message
    error = refused(connect(location, server.settings()))
    assert "a password: there is none" in error.message
    assert "hunter" not in caplog.text + str(error)


def test_a_server_that_wants_both(connect: Connect) -> None:
    with run_sshd(options={"AuthenticationMethods": "publickey,password", "PasswordAuthentication": "yes"}) as server:
        error = refused(connect(server.location("/"), server.settings()))
    assert "accepted, but the server also wants password" in error.message


def test_a_server_that_loses_its_patience(connect: Connect, ssh_config: Config, tmp_path: Path) -> None:
    keys = [make_key(tmp_path / f"key{number}") for number in range(5)]
    with run_sshd(options={"MaxAuthTries": "3"}) as server:
        text = config_with(server, *(f"IdentityFile {key}" for key in keys))
        with pytest.raises(TransportError, match="ended the connection while we logged in") as caught:
            _ = connect(server.location("/"), server.settings(ssh_config=ssh_config(text))).transport
    assert "MaxAuthTries" in (caught.value.hint or "")
    assert str(keys[0]) in caught.value.message
