"""What the parameters of avocado-i2n mean, read where it is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import statepool
from avocado_statepool.record import Given, Record, unlink_images, working
from avocado_statepool.states import (
    QCOW2ExtBackend,
    QCOW2ImageTransfer,
    SourcedStateBackend,
    TransferOps,
    params,
)
from avocado_statepool.wishes import Wish, WrongDependency, split

ROOT = Path(__file__).resolve().parents[3]


class Params(dict[str, str]):
    """As virttest's, as far as it is used."""

    def objects(self, key: str) -> list[str]:
        return list(dict.fromkeys(self.get(key, "").split()))

    def object_params(self, name: str) -> Params:
        return Params(
            self,
            **{
                key.removesuffix(f"_{name}"): value
                for key, value in self.items()
                if key.endswith(f"_{name}")
            },
        )

    def copy(self) -> Params:
        return Params(self)


def given(**more: str) -> Params:
    values = {
        "vms": "vm1",
        "images": "disk",
        "object_id": "vm1-id",
        "object_type": "nets/vms/images",
        "swarm_pool": "/cache",
        "shared_pool": "/shared",
        "nets_host": "here",
        "nets_gateway": "net",
        "image_name": "disk",
        "vms_base_dir": "/run",
    }
    return Params({**values, **more})


def test_importing_needs_nothing_of_others() -> None:
    code = (
        "import avocado_statepool.states, sys; print(*[name for name in sys.modules if"
        " name.partition('.')[0] in sys.argv[1:]])"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "avocado",
        "avocado_i2n",
        "virttest",
        "statepool",
        "paramiko",
    ]
    done = subprocess.run(command, cwd=ROOT / "plugins", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_sources_come_nearest_first_and_know_their_scope() -> None:
    found = given(
        get_location=":/shared :/cache far:/pool near:/pool :;/linked",
        nets_gateway_far="other",
        nets_host_near="there",
        nets_shell_host_near="10.0.0.1",
        nets_shell_port_near="2222",
        nets_username_near="lab",
        nets_password_near="secret",
    )
    sources = params.sources_of("get", found)
    assert [(source.location, source.scope) for source in sources] == [
        (":/shared", "shared"),
        (":;/linked", "shared"),
        ("ssh://lab@10.0.0.1:2222/pool", "swarm"),
        ("ssh://here/pool", "cluster"),
    ]
    assert (sources[2].account, sources[2].password) == ("lab@10.0.0.1:2222", "secret")
    assert SourcedStateBackend.get_sources("get", found) == [
        ":/shared",
        ":;/linked",
        "near:/pool",
        "far:/pool",
    ]
    found["pool_scope"] = "own cluster"
    assert SourcedStateBackend.get_sources("get", found) == ["far:/pool"]
    found["pool_scope"] = "own all"
    with pytest.raises(statepool.UsageError, match="all"):
        params.sources_of("get", found)


def test_passwords_are_for_their_account_only(tmp_path: Path) -> None:
    found = given(
        swarm_pool=str(tmp_path / "cache"),
        nets_shell_host_near="store",
        nets_username_near="lab",
        nets_password_near="secret",
    )
    pool = params.open_pool(found, [params.source_of("near:/pool", found)])
    secrets: Any = pool.settings.secrets
    assert secrets(statepool.SecretKind.PASSWORD, "lab@store:22") == "secret"
    assert secrets(statepool.SecretKind.PASSWORD, "lab@elsewhere:22") is None
    assert secrets(statepool.SecretKind.PASSPHRASE, "lab@store:22") is None
    assert "secret" not in repr(pool.settings)
    found = given(
        swarm_pool=str(tmp_path / "cache"),
        nets_shell_host_near="::1",
        nets_shell_port_near="2222",
        nets_password_near="mine",
    )
    secrets = params.open_pool(found, [params.source_of("near:/pool", found)]).settings.secrets
    assert secrets(statepool.SecretKind.PASSWORD, "anybody@[::1]:2222") == "mine"
    assert secrets(statepool.SecretKind.PASSWORD, "anybody@[::1]:22") is None


@pytest.mark.parametrize("text", ["ssh://user@[::1]:2222/path", "/path", "file:///path"])
def test_locations_of_statepool_can_be_used(text: str) -> None:
    assert params.source_of(text, given()).location == text


def test_files_are_where_avocado_i2n_has_them() -> None:
    assert QCOW2ImageTransfer.get_image_path(given()) == "/run/vm1/disk.qcow2"
    assert (
        QCOW2ImageTransfer.get_image_path(given(image_name="/elsewhere/disk"))
        == "/elsewhere/disk.qcow2"
    )
    with pytest.raises(statepool.UsageError, match="raw"):
        QCOW2ImageTransfer.get_image_path(given(image_format="raw"))


def test_paths_that_are_no_states_are_refused() -> None:
    with pytest.raises(statepool.UsageError, match="no file of a state"):
        TransferOps.download("/cache/x", ":/shared/x", given())


def test_a_cache_alone_has_nothing(tmp_path: Path) -> None:
    assert QCOW2ExtBackend.show(given(swarm_pool=str(tmp_path))) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"uri": "state"},
        {"uri": 7},
        {"uri": "a/b/c/d"},
        {"uri": "vm1/disk/x", "state": "x"},
        {"uri": "vm1/disk/x", "args": ["y"]},
    ],
)
def test_wrong_dependencies_are_refused_with_what_to_write(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        WrongDependency, match=r'write \{"type": "vm-state", "uri": "vm1/disk/customize"\}'
    ):
        Wish.parse(wrong)


def test_dependencies_of_others_are_left_to_them() -> None:
    ours, others = split(
        [{"type": "vm-state", "uri": "vm1/disk/x"}, {"type": "package", "name": "y"}]
    )
    assert ours == [{"uri": "vm1/disk/x"}]
    assert others == [{"type": "package", "name": "y"}]
    assert Wish.parse(ours[0]) == Wish("vm1/disk", "x")
    assert split(None) == ([], [])


def test_a_test_finds_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LookupError, match="AVOCADO_TEST_LOGDIR"):
        working()
    monkeypatch.setenv("AVOCADO_TEST_LOGDIR", str(tmp_path))
    with pytest.raises(LookupError, match="no state is asked for"):
        working()
    images = {"vm1/disk": str(tmp_path / "one"), "vm1/data": str(tmp_path / "two")}
    record = Record("test", [Given("vm1", "ready", images)])
    for _ in range(2):
        record.write(tmp_path)
    assert Record.read(tmp_path) == record
    assert working("vm1/data") == tmp_path / "two"
    assert (tmp_path / "vm-state/vm1/data.qcow2").readlink() == tmp_path / "two"
    for name in (None, "vm2/disk"):
        with pytest.raises(LookupError, match="vm1/disk, vm1/data"):
            working(name)
    for _ in range(2):
        unlink_images(tmp_path)
    assert [path.name for path in (tmp_path / "vm-state").iterdir()] == ["record.json"]
