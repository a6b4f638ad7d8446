"""
Keys from files and agents, passphrases and passwords; and what is said when none of them will do.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statepool.errors import AccessDenied, TransportError
from statepool.model.secrets import GivenSecrets, SecretKind
from statepool.transports.ssh.connection import Connection
from tests.support.sshd import Sshd, make_key, run_sshd

Connect = Callable[..., Connection]
pytestmark = [
    pytest.mark.usefixtures("carrier"),
    # paramiko leaves sockets of agents open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
only_paramiko = pytest.mark.parametrize("carrier", ["paramiko"], indirect=True)
Config = Callable[[str], str]


def config_with(sshd: Sshd, *lines: str) -> str:
    return (
        "\n  ".join(["Host *", f"HostKeyAlias {sshd.known_hosts.read_text().split()[0]}", *lines])
        + "\n"
    )


@pytest.fixture
def locked_key(sshd: Sshd, tmp_path: Path) -> Path:
    """The key that is let in, under the passphrase ``open sesame``."""
    path = tmp_path / "locked"
    path.write_bytes(sshd.identity.read_bytes())
    path.chmod(0o600)
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-P", "", "-N", "open sesame", "-f", str(path)],
        check=True,
        capture_output=True,
    )
    return path


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """``agent(key)``: an agent of this test's own, that has the key."""
    started = subprocess.run(
        ["ssh-agent", "-s", "-a", str(tmp_path / "agent")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    yield (
        lambda key: (
            subprocess.run(["ssh-add", "-q", str(key)], check=True, stdin=subprocess.DEVNULL)
            and None
        )
    )
    os.kill(int(started.split("SSH_AGENT_PID=")[1].split(";")[0]), signal.SIGTERM)


def refused(connection: Connection) -> AccessDenied:
    with pytest.raises(AccessDenied) as caught:
        _ = connection.carrier
    assert caught.value.exit_code == 7
    assert caught.value.hint
    assert not caught.value.transient
    return caught.value


def test_the_wrong_key(sshd: Sshd, connect: Connect, ssh_config: Config, tmp_path: Path) -> None:
    wrong = make_key(tmp_path / "wrong")
    error = refused(
        connect(
            sshd.location("/"),
            sshd.settings(ssh_config=ssh_config(config_with(sshd, f"IdentityFile {wrong}"))),
        )
    )
    assert f"{wrong}: not accepted" in error.message
    assert "takes publickey" in error.message


def test_no_key_at_all(sshd: Sshd, connect: Connect, ssh_config: Config) -> None:
    assert (
        "nothing to offer"
        in refused(
            connect(sshd.location("/"), sshd.settings(ssh_config=ssh_config(config_with(sshd))))
        ).message
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing", "no such file"), ("text", "not a private key"), ("", "cannot be read")],
)
def test_a_key_file_that_is_none(
    sshd: Sshd, connect: Connect, ssh_config: Config, tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "text").chmod(0o600)  # else ssh refuses it for its mode
    settings = sshd.settings(
        ssh_config=ssh_config(config_with(sshd, f"IdentityFile {tmp_path}/{name}"))
    )
    assert words in refused(connect(sshd.location("/"), settings)).message


def test_an_account_that_does_not_exist(sshd: Sshd, connect: Connect) -> None:
    location = sshd.location("/")
    assert (
        "nosuchuser@127.0.0.1"
        in refused(
            connect(
                type(location)("ssh", "/", "127.0.0.1", "nosuchuser", sshd.port), sshd.settings()
            )
        ).message
    )


@pytest.mark.parametrize("type", ["ecdsa", "rsa"])
def test_keys_of_other_types(
    connect: Connect, ssh_config: Config, tmp_path: Path, type: str
) -> None:
    key = make_key(tmp_path / "key", type=type)
    with run_sshd(options={"AuthorizedKeysFile": f"{key}.pub"}) as server:
        settings = server.settings(
            ssh_config=ssh_config(config_with(server, f"IdentityFile {key}"))
        )
        assert connect(server.location("/"), settings).carrier.is_open


# ssh looks into the home directory that the system has for the account, whatever HOME says
@only_paramiko
def test_the_default_keys(
    sshd: Sshd, connect: Connect, ssh_config: Config, nobodys_environment: Path
) -> None:
    (nobodys_environment / ".ssh").mkdir()
    (nobodys_environment / ".ssh/id_ed25519").write_bytes(sshd.identity.read_bytes())
    assert connect(
        sshd.location("/"), sshd.settings(ssh_config=ssh_config(config_with(sshd)))
    ).carrier.is_open


def test_a_key_with_a_certificate(connect: Connect, ssh_config: Config, tmp_path: Path) -> None:
    authority, key = make_key(tmp_path / "authority"), make_key(tmp_path / "key")
    with run_sshd(
        options={"TrustedUserCAKeys": f"{authority}.pub", "AuthorizedKeysFile": "none"}
    ) as server:
        settings = server.settings(
            ssh_config=ssh_config(config_with(server, f"IdentityFile {key}"))
        )
        refused(connect(server.location("/"), settings))
        subprocess.run(
            [
                "ssh-keygen",
                "-q",
                "-s",
                str(authority),
                "-I",
                "test",
                "-n",
                server.user,
                f"{key}.pub",
            ],
            check=True,
            capture_output=True,
        )
        assert connect(server.location("/"), settings).carrier.is_open


@pytest.mark.parametrize("type", ["ed25519", "ecdsa", "rsa"])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PEM", []),
        ("PKCS8", []),
        ("RFC4716", ["-Z", "aes256-gcm@openssh.com"]),
        ("RFC4716", ["-Z", "aes256-cbc"]),
    ],
    ids=["pem", "pkcs8", "gcm", "cbc"],
)
def test_every_way_to_lock_a_key(
    carrier: str,
    connect: Connect,
    ssh_config: Config,
    tmp_path: Path,
    type: str,
    format: str,
    options: list[str],
) -> None:
    if carrier == "paramiko" and (
        (format == "PKCS8" and type != "ed25519") or "aes256-gcm@openssh.com" in options
    ):
        pytest.skip("paramiko reads no keys of that format")
    if carrier == "openssh" and type != "ed25519":
        pytest.skip(
            "ssh reads what ssh-keygen writes: one kind shows that we tell it the passphrase"
        )
    key = make_key(tmp_path / "key", type=type)
    new = ["-P", "", "-N", "open sesame", "-m", format, *options]
    subprocess.run(
        ["ssh-keygen", "-q", "-p", *new, "-f", str(key)], check=True, capture_output=True
    )
    with run_sshd(options={"AuthorizedKeysFile": f"{key}.pub"}) as server:
        text = ssh_config(config_with(server, f"IdentityFile {key}", "IdentitiesOnly yes"))
        for given, words in [
            (None, "needs a passphrase"),
            ("", "needs a passphrase"),
            ("close sesame", "the passphrase is not the right one"),
        ]:
            secrets = GivenSecrets(passphrase=given)
            assert (
                f"{key}: {words}"
                in refused(
                    connect(server.location("/"), server.settings(ssh_config=text, secrets=secrets))
                ).message
            )
        settings = server.settings(ssh_config=text, secrets=GivenSecrets(passphrase="open sesame"))
        assert connect(server.location("/"), settings).carrier.is_open


@pytest.mark.parametrize(
    "content", [b"junk\n", b"\xff\xfe\n", b"ssh-ed25519-cert-v01@openssh.com AAAA x\n", None]
)
def test_a_key_with_a_certificate_that_is_none(
    carrier: str,
    sshd: Sshd,
    connect: Connect,
    ssh_config: Config,
    tmp_path: Path,
    content: bytes | None,
) -> None:
    keys = [tmp_path / "mine", make_key(tmp_path / "other")]
    keys[0].write_bytes(sshd.identity.read_bytes())
    keys[0].chmod(0o600)
    for key in keys:
        certificate = Path(f"{key}-cert.pub")
        certificate.mkdir() if content is None else certificate.write_bytes(content)
    settings = [
        sshd.settings(ssh_config=ssh_config(config_with(sshd, f"IdentityFile {key}")))
        for key in keys[1:]
    ]
    words = (
        f"{keys[1]}-cert.pub: cannot be read"
        if carrier == "paramiko"
        else f"{keys[1]}: not accepted"
    )
    assert words in refused(connect(sshd.location("/"), settings[0])).message
    if carrier == "openssh":
        settings = [
            sshd.settings(ssh_config=ssh_config(config_with(sshd, f"IdentityFile {keys[0]}")))
        ]
        assert connect(sshd.location("/"), settings[0]).carrier.is_open, "the key itself will do"


# -- agents


def test_a_key_of_the_agent(
    sshd: Sshd, connect: Connect, ssh_config: Config, agent: Callable[[Path], None]
) -> None:
    settings = sshd.settings(ssh_config=ssh_config(config_with(sshd)))
    refused(connect(sshd.location("/"), settings))
    agent(sshd.identity)
    assert connect(sshd.location("/"), settings).carrier.is_open


def test_a_configured_key_that_only_the_agent_has(
    sshd: Sshd, connect: Connect, ssh_config: Config, agent: Callable[[Path], None], tmp_path: Path
) -> None:
    agent(sshd.identity)
    agent(make_key(tmp_path / "other"))
    (tmp_path / "mine.pub").write_bytes(sshd.identity.with_suffix(".pub").read_bytes())
    only = "IdentitiesOnly yes"
    settings = sshd.settings(
        ssh_config=ssh_config(config_with(sshd, f"IdentityFile {tmp_path}/mine", only))
    )
    assert connect(sshd.location("/"), settings).carrier.is_open
    settings = sshd.settings(
        ssh_config=ssh_config(config_with(sshd, f"IdentityFile {tmp_path}/other", only))
    )
    error = refused(connect(sshd.location("/"), settings))
    assert error.message.count("not accepted") == 1, "the agent's other key is not offered"


def test_an_agent_that_is_gone(
    carrier: str,
    sshd: Sshd,
    connect: Connect,
    ssh_config: Config,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "gone"))
    error = refused(
        connect(sshd.location("/"), sshd.settings(ssh_config=ssh_config(config_with(sshd))))
    )
    if carrier == "openssh":
        assert "the agent: cannot be reached (No such file" in error.message


class OddAgent:
    """
    An agent of our own, which has one key: what it answers a request with is a function's business;
    None is silence.
    """

    def __init__(self, path: Path, answer: Callable[[bytes], bytes | None]) -> None:
        self.answer = answer
        self.asked: list[int] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.links: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.links.append(self.listener.accept()[0])
                threading.Thread(target=self._talk, args=(self.links[-1],), daemon=True).start()

    def _talk(self, link: socket.socket) -> None:
        with contextlib.suppress(OSError, struct.error):
            while True:
                (length,) = struct.unpack(">I", link.recv(4, socket.MSG_WAITALL))
                request = link.recv(length, socket.MSG_WAITALL)
                self.asked.append(request[0])
                answer = self.answer(request)
                if answer is not None:
                    link.sendall(struct.pack(">I", len(answer)) + answer)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        for link in (self.listener, *self.links):
            link.close()


def text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def keys_answer(*keys: tuple[bytes, bytes]) -> bytes:
    return (
        b"\x0c"
        + struct.pack(">I", len(keys))
        + b"".join(text(blob) + text(comment) for blob, comment in keys)
    )


def blob_of(key: Path) -> bytes:
    return base64.b64decode(key.with_suffix(".pub").read_text().split()[1])


@pytest.fixture
def odd_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[bytes], bytes | None]], OddAgent]]:
    """``odd_agent(answer)``: an agent that answers so."""
    made: list[OddAgent] = []

    def start(answer: Callable[[bytes], bytes | None]) -> OddAgent:
        made.append(OddAgent(tmp_path / "odd", answer))
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "odd"))
        return made[-1]

    yield start
    for agent in made:
        agent.close()


def test_an_agent_that_says_nothing(
    carrier: str, sshd: Sshd, connect: Connect, ssh_config: Config, odd_agent
) -> None:
    odd_agent(lambda request: None)
    knobs = {"connect_timeout": 2, "retries": 0}
    with pytest.raises((AccessDenied, TransportError), match="no answer for") as caught:
        _ = connect(
            sshd.location("/"), sshd.settings(ssh_config=ssh_config(config_with(sshd)), **knobs)
        ).carrier
    assert "agent" in str(caught.value)
    if carrier == "paramiko":
        assert connect(sshd.location("/"), sshd.settings(**knobs)).carrier.is_open, (
            "the key in a file will do"
        )


@pytest.mark.parametrize("answer", [None, b"\x05", b""])
def test_an_agent_that_does_not_sign(
    carrier: str, sshd: Sshd, connect: Connect, ssh_config: Config, odd_agent, answer: bytes | None
) -> None:
    listed = keys_answer((blob_of(sshd.identity), b"mine"))
    odd_agent(lambda request: listed if request[0] == 11 else answer)
    with pytest.raises((AccessDenied, TransportError)) as caught:
        _ = connect(
            sshd.location("/"),
            sshd.settings(ssh_config=ssh_config(config_with(sshd)), connect_timeout=3, retries=0),
        ).carrier
    if answer is not None and carrier == "openssh":
        assert "the agent's key mine: the agent did not sign with it" in caught.value.message


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\x05", "the agent: "),
        (b"\x0c\xff\xff\xff\xff", "the agent: "),
        (bytes(1 << 19), "the agent: "),
        (keys_answer((b"\0\0\0\x02\xff\xff", b"x")), "Tried: "),
    ],
)
def test_an_agent_that_talks_nonsense(
    sshd: Sshd, connect: Connect, ssh_config: Config, odd_agent, answer: bytes, words: str
) -> None:
    odd_agent(lambda request: answer)
    settings = sshd.settings(ssh_config=ssh_config(config_with(sshd)), connect_timeout=4)
    said = refused(connect(sshd.location("/"), settings)).message
    assert words in said
    assert "no answer" not in said, "nothing goes on reading in our process"


def test_a_comment_that_is_not_utf_8(
    carrier: str,
    sshd: Sshd,
    connect: Connect,
    ssh_config: Config,
    agent: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    subprocess.run(
        [
            b"ssh-keygen",
            b"-q",
            b"-t",
            b"ed25519",
            b"-N",
            b"",
            b"-C",
            b"m\xfcller",
            b"-f",
            bytes(tmp_path / "latin"),
        ],
        check=True,
    )
    agent(tmp_path / "latin")
    settings = sshd.settings(ssh_config=ssh_config(config_with(sshd)))
    expected = "the agent's key m\\374ller: not accepted" if carrier == "openssh" else "the agent: "
    assert expected in refused(connect(sshd.location("/"), settings)).message
    if carrier == "paramiko":
        return  # it reads no key of that agent
    agent(sshd.identity)
    assert connect(sshd.location("/"), settings).carrier.is_open


# -- passphrases and passwords


def test_a_passphrase(
    sshd: Sshd,
    connect: Connect,
    ssh_config: Config,
    locked_key: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    text = ssh_config(config_with(sshd, f"IdentityFile {locked_key}"))
    asked: list[tuple[SecretKind, str]] = []

    def answer(kind: SecretKind, subject: str) -> str:
        asked.append((kind, subject))
        return "open sesame"

    settings = sshd.settings(ssh_config=text, secrets=answer)
    assert connect(sshd.location("/"), settings).carrier.is_open
    assert asked == [(SecretKind.PASSPHRASE, str(locked_key))]
    assert "sesame" not in caplog.text


@pytest.mark.parametrize(
    ("given", "words"), [(None, "needs a passphrase"), ("close sesame", "not the right one")]
)
def test_no_passphrase_or_a_wrong_one(
    sshd: Sshd,
    connect: Connect,
    ssh_config: Config,
    locked_key: Path,
    given: str | None,
    words: str,
) -> None:
    secrets = GivenSecrets(passphrase=given) if given else None
    settings = sshd.settings(
        ssh_config=ssh_config(config_with(sshd, f"IdentityFile {locked_key}")), secrets=secrets
    )
    error = refused(connect(sshd.location("/"), settings))
    assert f"{locked_key}: " in error.message
    assert words in error.message
    assert "close sesame" not in str(error)


@pytest.mark.parametrize("methods", ["password", "keyboard-interactive"])
def test_a_password(
    password_server, connect: Connect, sshd: Sshd, methods: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = password_server(methods)
    location = sshd.location("/", server.port)
    assert connect(
        location, server.settings(secrets=GivenSecrets(password="hunter2"))
    ).carrier.is_open
    error = refused(connect(location, server.settings(secrets=GivenSecrets(password="hunter3"))))
    assert "the password: not accepted" in error.message
    error = refused(connect(location, server.settings()))
    assert "a password: there is none" in error.message
    assert "hunter" not in caplog.text + str(error)


def test_a_server_that_wants_both(connect: Connect) -> None:
    with run_sshd(
        options={"AuthenticationMethods": "publickey,password", "PasswordAuthentication": "yes"}
    ) as server:
        error = refused(connect(server.location("/"), server.settings()))
    assert "accepted, but the server also wants password" in error.message


def test_a_server_that_loses_its_patience(
    connect: Connect, ssh_config: Config, tmp_path: Path
) -> None:
    keys = [make_key(tmp_path / f"key{number}") for number in range(5)]
    with run_sshd(options={"MaxAuthTries": "3"}) as server:
        text = config_with(server, *(f"IdentityFile {key}" for key in keys))
        with pytest.raises(
            TransportError, match="ended the connection while we logged in"
        ) as caught:
            _ = connect(server.location("/"), server.settings(ssh_config=ssh_config(text))).carrier
    assert "MaxAuthTries" in (caught.value.hint or "")
    assert str(keys[0]) in caught.value.message
