"""The knobs and their defaults."""

from __future__ import annotations

import pickle

import attrs
import pytest

from statepool.model.secrets import GivenSecrets, SecretKind
from statepool.model.settings import Compress, Settings


def test_defaults_are_those_of_the_documentation() -> None:
    assert attrs.asdict(Settings()) == {
        "fresh": 60.0,
        "offline": False,
        "min_free": 0,
        "lock_timeout": 3600.0,
        "max_depth": 256,
        "tool_timeout": 60.0,
        "probe_timeout": 2.0,
        "timeout": 30.0,
        "connect_timeout": 20.0,
        "retries": 3,
        "retry_pause": 0.5,
        "compress": "auto",
        "carrier": "auto",
        "ssh_config": None,
        "known_hosts": None,
        "secrets": None,
    }


@pytest.mark.parametrize(
    "facts",
    [
        {"fresh": -1},
        {"min_free": -1},
        {"lock_timeout": -0.1},
        {"max_depth": 0},
        {"max_depth": 4097},
        {"tool_timeout": 0},
        {"timeout": 0},
        {"connect_timeout": 0},
        {"retries": -1},
        {"retries": 101},
        {"retry_pause": -1},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(facts) -> None:
    with pytest.raises(ValueError, match=next(iter(facts))):
        Settings(**facts)


def test_compress_is_one_of_three() -> None:
    assert Settings(compress="on").compress is Compress.ON
    with pytest.raises(ValueError, match="sometimes"):
        Settings(compress="sometimes")


def test_secrets_are_neither_shown_nor_compared_and_survive_pickling() -> None:
    settings = Settings(secrets=GivenSecrets(password="hunter2", passphrase="open sesame"))
    assert "hunter2" not in repr(settings)
    assert "sesame" not in repr(settings)
    assert "hunter2" not in repr(settings.secrets)
    assert settings == Settings()
    again = pickle.loads(pickle.dumps(settings))
    assert again.secrets(SecretKind.PASSWORD, "kim@store") == "hunter2"
    assert again.secrets(SecretKind.PASSPHRASE, "key") == "open sesame"


def test_limits_themselves_are_fine() -> None:
    assert Settings(fresh=0, lock_timeout=0, max_depth=1) == Settings(
        fresh=0.0, lock_timeout=0.0, max_depth=1
    )
    assert Settings(max_depth=4096).max_depth == 4096
