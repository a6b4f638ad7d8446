"""Settings: what overrides what, what paths are relative to, and what is refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statepool.config import Config, SourceConfig, load
from statepool.errors import ConfigError
from statepool.model.location import Location
from statepool.model.scope import Scope
from statepool.model.secrets import SecretKind
from statepool.model.settings import Settings


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def environ(tmp_path: Path, home: Path) -> dict[str, str]:
    return {"HOME": str(home), "XDG_CONFIG_DIRS": str(tmp_path / "etc")}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    project.mkdir()
    return project


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(project: Path, environ: dict[str, str], text: str) -> ConfigError:
    path = write(project / "statepool.toml", text)
    with pytest.raises(ConfigError) as caught:
        load(environ=environ, cwd=project)
    assert str(path) in caught.value.message
    assert caught.value.path == str(path)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


def source(path: str | Path, name: str | None = None, scope: Scope = Scope.SHARED) -> SourceConfig:
    location = Location.parse(str(path))
    return SourceConfig(location, name or str(location), scope)


def test_a_fifo_is_not_waited_for(environ: dict[str, str], project: Path) -> None:
    os.mkfifo(project / "statepool.toml")
    with pytest.raises(ConfigError, match="is not a regular file"):
        load(environ=environ, cwd=project)


# -- layers


def test_defaults(environ: dict[str, str], home: Path, project: Path) -> None:
    assert load(environ=environ, cwd=project) == Config(
        cache=f"{home}/.local/share/statepool", sources=(), settings=Settings()
    )


def test_default_cache_follows_xdg(environ: dict[str, str], project: Path) -> None:
    assert (
        load(environ={**environ, "XDG_DATA_HOME": "/var/tmp/x"}, cwd=project).cache
        == "/var/tmp/x/statepool"
    )


@pytest.mark.parametrize("where", ["home", "variable"])
def test_a_cache_in_the_place_of_earlier_versions_is_used_and_the_user_is_told(
    environ: dict[str, str], tmp_path: Path, home: Path, project: Path, where: str
) -> None:
    old = home / ".cache/statepool"
    if where == "variable":
        environ |= {"XDG_CACHE_HOME": str(tmp_path / "some where")}
        old = tmp_path / "some where/statepool"
    old.mkdir(parents=True)
    new = home / ".local/share/statepool"
    assert load(environ=environ, cwd=project).cache == str(new)  # that is no cache
    (old / ".statepool").mkdir()
    config = load(environ=environ, cwd=project)
    assert config.cache == str(old)
    assert load({"cache": "/c"}, environ=environ, cwd=project).advice == ()
    (advice,) = config.advice
    subprocess.run(["sh", "-c", advice.partition("nothing uses it: ")[2]], check=True)
    moved = load(environ=environ, cwd=project)
    assert (moved.cache, moved.advice) == (str(new), ())
    assert (new / ".statepool").is_dir()
    assert old.resolve() == new.resolve()


def test_the_file_of_a_project_is_looked_for_from_its_directory_upwards(
    environ: dict[str, str], tmp_path: Path, project: Path
) -> None:
    deep = tmp_path / "checkout/some/tests"
    deep.mkdir(parents=True)
    assert load(environ=environ, cwd=project, project=deep).files == ()
    above = write(tmp_path / "checkout/statepool.toml", 'cache = "mine"')
    found = load(environ=environ, cwd=project, project=deep)
    assert (found.files, found.cache) == ((str(above),), str(tmp_path / "checkout/mine"))
    nearer = write(deep / "statepool.toml", "fresh = 1")
    assert load(environ=environ, cwd=project, project=deep).files == (str(nearer),)
    here = write(project / "statepool.toml", "fresh = 2")
    assert load(environ=environ, cwd=project, project=deep).files == (str(here),)
    assert load(environ=environ, cwd=project).files == (str(here),)
    assert load(
        environ={**environ, "STATEPOOL_CONFIG": str(above)}, cwd=project, project=deep
    ).files == (str(above),)


def test_a_file_of_another_account_above_a_project_is_not_obeyed(
    environ: dict[str, str], tmp_path: Path, project: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another account")
    deep = tmp_path / "checkout/tests"
    deep.mkdir(parents=True)
    above = write(tmp_path / "checkout/statepool.toml", "fresh = 1")
    os.chown(above, 12345, 12345)
    assert load(environ=environ, cwd=project, project=deep).files == ()
    os.chown(deep, 12345, 12345)
    assert load(environ=environ, cwd=project, project=deep).files == (str(above),)


def test_relative_xdg_directories_are_ignored(
    environ: dict[str, str], home: Path, project: Path
) -> None:
    write(project / "etc/statepool/statepool.toml", "fresh = 1")
    write(project / "conf/statepool/statepool.toml", "fresh = 2")
    config = load(
        environ={
            **environ,
            "XDG_DATA_HOME": "x",
            "XDG_CACHE_HOME": "x",
            "XDG_CONFIG_HOME": "conf",
            "XDG_CONFIG_DIRS": "etc",
        },
        cwd=project,
    )
    assert config.cache == f"{home}/.local/share/statepool"
    assert config.settings.fresh == 60
    assert config.files == ()


def test_each_layer_overrides_those_before_it(
    environ: dict[str, str], tmp_path: Path, home: Path, project: Path
) -> None:
    keys = {"fresh": 5.0, "lock-timeout": 4.0, "tool-timeout": 3.0, "max-depth": 2, "min-free": 1}
    names = list(keys)
    files = [
        tmp_path / "etc/statepool/statepool.toml",
        home / ".config/statepool/statepool.toml",
        project / "statepool.toml",
    ]
    for number, file in enumerate(files, 1):
        write(file, "\n".join(f"{key} = {100 + number}" for key in names[: 6 - number]))
    environ |= {"STATEPOOL_FRESH": "104", "STATEPOOL_LOCK_TIMEOUT": "104"}
    config = load({"fresh": 105}, environ=environ, cwd=project)
    assert config.settings == Settings(
        fresh=105, lock_timeout=104, tool_timeout=103, max_depth=102, min_free=101
    )
    assert config.files == tuple(map(str, files))


def test_first_system_directory_matters_most(
    environ: dict[str, str], tmp_path: Path, project: Path
) -> None:
    write(tmp_path / "etc1/statepool/statepool.toml", "fresh = 1")
    write(tmp_path / "etc2/statepool/statepool.toml", "fresh = 2\nmax-depth = 2")
    settings = load(
        environ={**environ, "XDG_CONFIG_DIRS": f"{tmp_path}/etc1:{tmp_path}/etc2"}, cwd=project
    ).settings
    assert (settings.fresh, settings.max_depth) == (1, 2)


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_named_file_replaces_the_others(
    environ: dict[str, str], home: Path, project: Path, by: str
) -> None:
    write(home / ".config/statepool/statepool.toml", "fresh = 1")
    write(project / "statepool.toml", "fresh = 2")
    mine = write(project / "sub/mine.toml", "max-depth = 7")
    if by == "argument":
        config = load(
            config_file="sub/mine.toml",
            environ={**environ, "STATEPOOL_CONFIG": "/nowhere"},
            cwd=project,
        )
    else:
        config = load(environ={**environ, "STATEPOOL_CONFIG": "sub/mine.toml"}, cwd=project)
    assert config.settings == Settings(max_depth=7)
    assert config.files == (str(mine),)


def test_sources_are_replaced_not_added_up(environ: dict[str, str], project: Path) -> None:
    write(project / "statepool.toml", 'sources = ["/a", "/b"]')
    assert load({"sources": ["/c"]}, environ=environ, cwd=project).sources == (source("/c"),)
    assert load({"sources": None}, environ=environ, cwd=project).sources == (
        source("/a"),
        source("/b"),
    )


def test_empty_variables_are_not_set(environ: dict[str, str], project: Path) -> None:
    write(project / "statepool.toml", 'cache = "/c"\nfresh = 1')
    config = load(
        environ={**environ, "STATEPOOL_CACHE": "", "STATEPOOL_FRESH": "", "STATEPOOL_CONFIG": ""},
        cwd=project,
    )
    assert (config.cache, config.settings.fresh) == ("/c", 1)


# -- values


def test_whole_file(environ: dict[str, str], home: Path, project: Path) -> None:
    write(
        project / "statepool.toml",
        """
        cache = "/var/cache/states"
        sources = [
            "/srv/pool",
            { location = "ssh://lab@store:2222/srv/pool", name = "store", scope = "cluster" },
            "link:///srv/links",
        ]
        fresh = 1.5
        offline = true
        min-free = "10G"
        lock-timeout = 10
        max-depth = 12
        tool-timeout = 5
        probe-timeout = 0.5
        timeout = 6
        connect-timeout = 2.5
        retries = 0
        retry-pause = 0.1
        compress = "off"
        ssh-config = "ssh_config"
        known-hosts = "~/hosts"
        """,
    )
    assert load(environ=environ, cwd=project) == Config(
        cache="/var/cache/states",
        sources=(
            source("/srv/pool"),
            source("ssh://lab@store:2222/srv/pool", "store", Scope.CLUSTER),
            source("link:///srv/links"),
        ),
        settings=Settings(
            fresh=1.5,
            offline=True,
            min_free=10 << 30,
            lock_timeout=10,
            max_depth=12,
            tool_timeout=5,
            probe_timeout=0.5,
            timeout=6,
            connect_timeout=2.5,
            retries=0,
            retry_pause=0.1,
            compress="off",
            ssh_config=f"{project}/ssh_config",
            known_hosts=f"{home}/hosts",
        ),
        files=(str(project / "statepool.toml"),),
    )


def test_sources_as_array_of_tables(environ: dict[str, str], project: Path) -> None:
    write(
        project / "statepool.toml",
        '[[sources]]\nlocation = "/a"\nname = "one"\n[[sources]]\nlocation = "/b"\nscope = "swarm"',
    )
    assert load(environ=environ, cwd=project).sources == (
        source("/a", "one"),
        source("/b", scope=Scope.SWARM),
    )


def test_everything_from_the_environment(environ: dict[str, str], project: Path) -> None:
    environ |= {
        "STATEPOOL_CACHE": "here",
        "STATEPOOL_SOURCES": "/a:b  ssh://x/y\n\tstore:/z\n",
        "STATEPOOL_FRESH": "0.5",
        "STATEPOOL_OFFLINE": "yes",
        "STATEPOOL_MIN_FREE": "2M",
        "STATEPOOL_LOCK_TIMEOUT": "7",
        "STATEPOOL_MAX_DEPTH": "9",
        "STATEPOOL_TOOL_TIMEOUT": "8",
        "STATEPOOL_TIMEOUT": "6",
        "STATEPOOL_CONNECT_TIMEOUT": "2",
        "STATEPOOL_RETRIES": "1",
        "STATEPOOL_RETRY_PAUSE": "0",
        "STATEPOOL_COMPRESS": "on",
        "STATEPOOL_SSH_CONFIG": "/etc/mine",
        "STATEPOOL_KNOWN_HOSTS": "hosts",
    }
    assert load(environ=environ, cwd=project) == Config(
        cache=str(project / "here"),
        sources=(source("/a:b"), source("ssh://x/y"), source("ssh://store/z")),
        settings=Settings(
            fresh=0.5,
            offline=True,
            min_free=2 << 20,
            lock_timeout=7,
            max_depth=9,
            tool_timeout=8,
            timeout=6,
            connect_timeout=2,
            retries=1,
            retry_pause=0,
            compress="on",
            ssh_config="/etc/mine",
            known_hosts=f"{project}/hosts",
        ),
    )


def test_paths_are_relative_to_their_file(
    environ: dict[str, str], home: Path, project: Path
) -> None:
    file = write(
        project / "conf/mine.toml",
        'cache = "c"\nsources = ["p", "../q", "./r:s", "~/t", "~", "file:///u", ":/v", ":;/w",'
        ' "host:/x"]',
    )
    config = load(config_file=file, environ=environ, cwd="/")
    base = f"{project}/conf"
    assert config.cache == f"{base}/c"
    expected = [
        f"{base}/p",
        f"{base}/../q",
        f"{base}/./r:s",
        home / "t",
        home,
        "/u",
        "/v",
        "link:///w",
        "ssh://host/x",
    ]
    assert [source.location for source in config.sources] == [
        Location.parse(str(path)) for path in expected
    ]


def test_paths_of_flags_are_relative_to_the_working_directory(
    environ: dict[str, str], project: Path
) -> None:
    config = load({"cache": Path("c"), "sources": ("p", Path("q"))}, environ=environ, cwd=project)
    assert config.cache == str(project / "c")
    assert config.sources == (source(project / "p"), source(project / "q"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("12", 12),
        ('"12"', 12),
        ('"3K"', 3072),
        ('"3k"', 3072),
        ('"3 KiB"', 3072),
        ('"1.5M"', 3 << 19),
        ('"2T"', 2 << 40),
        ('"1P"', 1 << 50),
    ],
)
def test_sizes(environ: dict[str, str], project: Path, text: str, size: int) -> None:
    write(project / "statepool.toml", f"min-free = {text}")
    assert load(environ=environ, cwd=project).settings.min_free == size


@given(st.integers(0, 1 << 62))
def test_any_whole_size_is_exact(size: int) -> None:
    config = load(
        {"min-free": size},
        environ={"HOME": "/nowhere", "XDG_CONFIG_DIRS": "/nowhere"},
        cwd="/nowhere",
    )
    text = load(
        environ={
            "HOME": "/nowhere",
            "XDG_CONFIG_DIRS": "/nowhere",
            "STATEPOOL_MIN_FREE": str(size),
        },
        cwd="/nowhere",
    )
    assert config.settings.min_free == text.settings.min_free == size


# -- what is refused


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("cash = 1", "cash"),
        ("[cache]\nx = 1", "cache"),
        ("cache = 1", "cache"),
        ('cache = ""', "cache"),
        ('cache = "ssh://host/path"', "cache"),
        ('cache = "link:///path"', "cache"),
        ('cache = "a\\u0000b"', "cache"),
        ('sources = "/srv/pool"', "sources"),
        ("sources = 1", "sources"),
        ("sources = [1]", "sources[0]"),
        ('sources = ["/a", ""]', "sources[1]"),
        ('sources = ["nonsense:here"]', "sources[0]"),
        ('sources = ["ssh:///no/host"]', "sources[0]"),
        ('sources = [["/a"]]', "sources[0]"),
        ("sources = [{}]", "sources[0]"),
        ('sources = [{ location = "/a", colour = "red" }]', "sources[0].colour"),
        ("sources = [{ location = 1 }]", "sources[0].location"),
        ('sources = [{ location = "/a", scope = "near" }]', "sources[0].scope"),
        ('sources = [{ location = "/a", scope = "own" }]', "sources[0].scope"),
        ('sources = [{ location = "/a", scope = ["shared"] }]', "sources[0].scope"),
        ('sources = [{ location = "/a", name = "" }]', "sources[0].name"),
        ('sources = [{ location = "/a", name = 1 }]', "sources[0].name"),
        ('sources = [{ location = "/a", name = "a b" }]', "sources[0].name"),
        ('sources = [{ location = "/a", name = "cache" }]', "sources[0].name"),
        ('sources = [{ location = "/a", name = "x" }, { location = "/b", name = "x" }]', "sources"),
        ('sources = ["/a", "file:///a"]', "sources"),
        ('fresh = "60"', "fresh"),
        ("fresh = true", "fresh"),
        ("fresh = -1", "fresh"),
        ("fresh = nan", "fresh"),
        ("fresh = inf", "fresh"),
        ("offline = 1", "offline"),
        ('offline = "yes"', "offline"),
        ("min-free = -1", "min-free"),
        ("min-free = 1.5", "min-free"),
        ("min-free = true", "min-free"),
        ('min-free = "10GB"', "min-free"),
        ('min-free = "much"', "min-free"),
        ("lock-timeout = -1", "lock-timeout"),
        ("max-depth = 0", "max-depth"),
        ("max-depth = 5000", "max-depth"),
        ("max-depth = 1.5", "max-depth"),
        ('max-depth = "8"', "max-depth"),
        ("tool-timeout = 0", "tool-timeout"),
        ("probe-timeout = 0", "probe-timeout"),
        ("probe-timeout = 'soon'", "probe-timeout"),
        ("tool-timeout = 1979-05-27", "tool-timeout"),
        ("min_free = 1", "min_free"),
        ("timeout = 0", "timeout"),
        ("retries = 101", "retries"),
        ('compress = "sometimes"', "compress"),
        ("compress = 1", "compress"),
        ('ssh-config = ""', "ssh-config"),
        ("known-hosts = 1", "known-hosts"),
        ('ssh-password = "x"', "ssh-password"),
    ],
)
def test_what_a_file_cannot_say(
    environ: dict[str, str], project: Path, text: str, key: str
) -> None:
    assert f": {key}: " in refused(project, environ, text).message


def test_likely_names_are_suggested(environ: dict[str, str], project: Path) -> None:
    assert "min-free" in (refused(project, environ, "min_free = 1").hint or "")
    assert "max-depth" in (refused(project, environ, "zzz = 1").hint or "")


@pytest.mark.parametrize("text", ["cache = ", "= 1", "a = 1\na = 2", "x = " + "[" * 5000])
def test_what_is_not_toml(environ: dict[str, str], project: Path, text: str) -> None:
    assert "TOML" in refused(project, environ, text).message


def test_what_is_not_text(environ: dict[str, str], project: Path) -> None:
    (project / "statepool.toml").write_bytes(b'cache = "\xff"')
    with pytest.raises(ConfigError, match="UTF-8"):
        load(environ=environ, cwd=project)


def test_a_directory_is_not_a_file(environ: dict[str, str], project: Path) -> None:
    (project / "statepool.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load(environ=environ, cwd=project)


@pytest.mark.parametrize("name", ["missing.toml", "/missing/missing.toml"])
def test_a_named_file_must_be_there(environ: dict[str, str], project: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: there is no such file"):
        load(config_file=name, environ=environ, cwd=project)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("STATEPOOL_CACHE", "ssh://host/x"),
        ("STATEPOOL_SOURCES", "/a foo:bar"),
        ("STATEPOOL_SOURCES", "/a /a"),
        ("STATEPOOL_FRESH", "soon"),
        ("STATEPOOL_FRESH", "inf"),
        ("STATEPOOL_OFFLINE", "perhaps"),
        ("STATEPOOL_MIN_FREE", "-1"),
        ("STATEPOOL_MAX_DEPTH", "1e3"),
        ("STATEPOOL_MAX_DEPTH", "9" * 100),
        ("STATEPOOL_TOOL_TIMEOUT", "0"),
        ("STATEPOOL_CONNECT_TIMEOUT", "-1"),
        ("STATEPOOL_RETRIES", "often"),
        ("STATEPOOL_COMPRESS", "zstd"),
    ],
)
def test_what_a_variable_cannot_say(
    environ: dict[str, str], project: Path, variable: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=f"the environment: {variable}: ") as caught:
        load(environ={**environ, variable: value}, cwd=project)
    assert caught.value.hint


def test_mistyped_variables_are_refused_and_foreign_ones_are_not(
    environ: dict[str, str], project: Path
) -> None:
    with pytest.raises(ConfigError, match="STATEPOOL_SOURCE is not a setting") as caught:
        load(environ={**environ, "STATEPOOL_SOURCE": "/a"}, cwd=project)
    assert "STATEPOOL_SOURCES" in (caught.value.hint or "")
    assert load(environ={**environ, "STATEPOOL_VERSION": "7"}, cwd=project) == load(
        environ=environ, cwd=project
    )


def test_secrets_come_from_the_environment_and_are_never_shown(
    environ: dict[str, str], project: Path
) -> None:
    config = load(
        environ={
            **environ,
            "STATEPOOL_SSH_PASSWORD": "hunter2",
            "STATEPOOL_SSH_PASSPHRASE": "open sesame",
        },
        cwd=project,
    )
    assert config.settings.secrets is not None
    assert config.settings.secrets(SecretKind.PASSWORD, "kim@store:22") == "hunter2"
    assert config.settings.secrets(SecretKind.PASSPHRASE, "id_ed25519") == "open sesame"
    assert "hunter2" not in repr(config)
    assert "sesame" not in repr(config)
    assert (
        load(environ={**environ, "STATEPOOL_SSH_PASSWORD": ""}, cwd=project).settings.secrets
        is None
    )


def test_what_an_override_cannot_say(environ: dict[str, str], project: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the overrides: cache: "):
        load({"cache": ""}, environ=environ, cwd=project)
    with pytest.raises(ConfigError, match=r"^the overrides: colour: "):
        load({"colour": "red"}, environ=environ, cwd=project)


def test_an_override_is_spelled_as_where_it_comes_from(
    environ: dict[str, str], project: Path
) -> None:
    spelled = {"sources": "the command line: --source"}
    with pytest.raises(ConfigError, match=r"^the command line: --source: not a location: ''"):
        load({"sources": [""]}, environ=environ, cwd=project, spelled=spelled)
    with pytest.raises(ConfigError, match=r"^the command line: --source\.name: not a name"):
        load(
            {"sources": [{"location": "p", "name": "a b"}]},
            environ=environ,
            cwd=project,
            spelled=spelled,
        )
    with pytest.raises(ConfigError, match=r"^the overrides: fresh: "):
        load({"fresh": "soon"}, environ=environ, cwd=project, spelled=spelled)
    with pytest.raises(ConfigError, match=r"^the environment: STATEPOOL_SOURCES: "):
        load({}, environ={**environ, "STATEPOOL_SOURCES": "p p"}, cwd=project, spelled=spelled)


def test_a_working_directory_that_is_gone(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="working directory"):
        load(environ=environ)


def test_a_file_may_begin_with_a_byte_order_mark(environ: dict[str, str], project: Path) -> None:
    (project / "statepool.toml").write_bytes(b"\xef\xbb\xbffresh = 7\n")
    assert load(environ=environ, cwd=project).settings.fresh == 7


@pytest.mark.parametrize("given", [True, False])
def test_an_authority(environ: dict[str, str], project: Path, given: bool) -> None:
    write(
        project / "statepool.toml",
        f'sources = [{{ location = "/pool", authority = {str(given).lower()} }}, "/other"]',
    )
    assert [source.authority for source in load(environ=environ, cwd=project).sources] == [
        given,
        False,
    ]


def test_what_is_no_authority(environ: dict[str, str], project: Path) -> None:
    error = refused(project, environ, 'sources = [{ location = "/pool", authority = "yes" }]')
    assert "sources[0].authority" in error.message
    assert error.hint == "write true or false"
