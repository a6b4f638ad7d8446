"""AutoArchive's configuration files. What they mean was found out by running its version 2.1.1."""

from __future__ import annotations

from pathlib import Path

import pytest

from statepool.archive.aaconfig import Config, Spec, read_config, read_spec, read_specs
from statepool.archive.definition import BackupType
from statepool.errors import ConfigError, StatePoolError

CONTENT = "[Content]\npath = /srv\ninclude-files = data\nexclude-files =\n"


def written(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def spec(directory: Path, text: str, config: Config | None = None) -> Spec:
    return read_spec(written(directory, "archive_specs/mine.aa", text), config)


def test_what_is_not_said(tmp_path: Path) -> None:
    found = spec(tmp_path, CONTENT)
    assert found.definition.backup_id == "mine"
    assert found.definition.backup_type is BackupType.TAR_GZ
    assert found.definition.destination == Path.cwd()
    assert found.definition.root == "/srv"
    assert found.definition.include_files == {"data"}
    assert found.definition.exclude_files == frozenset()
    assert (found.archiver, found.strength, found.keep) == ("external", None, 0)
    assert (found.incremental, found.restarting, found.remove_obsolete) == (False, False, False)
    assert (found.restart_after_level, found.restart_after_age) == (10, None)
    assert found.unused == ()


def test_all_that_can_be_said(tmp_path: Path) -> None:
    found = spec(
        tmp_path,
        """# a comment
; another one
[Archive]
archiver = tarzst
compression-level = 7
dest-dir = ~/backups
overwrite-at-start = yes
incremental = yes
restarting = YES
restart-after-level = 5
restart-after-age = 30
full-restart-after-count = 3
full-restart-after-age = 90
max-restart-level-size = 60
remove-obsolete-backups = true
keep-old-backups = 1
number-of-old-backups = 4
[Content]
name = other
path = ~
include-files = data "work stuff" /documents ../../etc
exclude-files = data/photo  "data/long videos"
""",
    )
    home = Path("~").expanduser()
    assert found.definition.backup_id == "other"
    assert found.definition.backup_type is BackupType.TAR_ZST
    assert found.definition.destination == home / "backups"
    assert found.definition.root == str(home)
    assert found.definition.include_files == {"data", "work stuff", "documents", "etc"}
    assert found.definition.exclude_files == {"data/photo", "data/long videos"}
    assert (found.strength, found.overwrite_at_start) == (7, True)
    assert (found.incremental, found.restarting, found.remove_obsolete) == (True, True, True)
    assert (found.restart_after_level, found.restart_after_age) == (5, 30)
    assert (found.full_restart_after_count, found.full_restart_after_age) == (3, 90)
    assert (found.max_restart_level_size, found.keep) == (60, 4)


@pytest.mark.parametrize(
    ("name", "archiver", "kind"),
    [
        ("tar", "external", "tar"),
        ("tarbz2", "external", "tar.bz2"),
        ("tarxz", "external", "tar.xz"),
        ("targz_internal", "internal", "tar.gz"),
    ],
)
def test_archivers(tmp_path: Path, name: str, archiver: str, kind: str) -> None:
    found = spec(tmp_path, f"[Archive]\narchiver = {name}\n{CONTENT}")
    assert (found.archiver, found.definition.backup_type) == (archiver, kind)


def test_old_archives_are_only_kept_if_it_is_said(tmp_path: Path) -> None:
    assert spec(tmp_path, f"[Archive]\nnumber-of-old-backups = 4\n{CONTENT}").keep == 0
    assert spec(tmp_path, f"[Archive]\nkeep-old-backups = yes\n{CONTENT}").keep == 1


def test_wildcards_are_those_of_the_shell(tmp_path: Path) -> None:
    for name in ("one.log", "two.log", "sub/three.log", ".hidden.log"):
        written(tmp_path / "root", name, "")
    text = f"[Content]\npath = {tmp_path}/root\ninclude-files = *.log */*.log\n"
    found = spec(tmp_path, text + 'exclude-files = "t[wx]o*"\n').definition
    assert found.include_files == {"one.log", "two.log", "sub/three.log"}
    assert found.exclude_files == {"two.log"}


# -- the configuration of the program --------------------------------------------------------------


def test_a_configuration_says_what_a_specification_does_not(tmp_path: Path) -> None:
    config = read_config(
        written(
            tmp_path,
            "aa.conf",
            """[General]
archive-specs-dir = specs
verbose = 2
[Archive]
Archiver = tarxz
dest-dir = /backups%20
incremental = yes
compression-level =
command-before-all-backups = mount /backups
""",
        )
    )
    assert config.specs == tmp_path / "specs"
    assert [(one.section, one.keyword) for one in config.unused] == [
        ("General", "verbose"),
        ("Archive", "command-before-all-backups"),
    ]
    assert "timer" in str(config.unused[1])
    found = spec(tmp_path, f"[Archive]\nincremental = no\n{CONTENT}", config)
    assert found.definition.backup_type is BackupType.TAR_XZ
    assert found.definition.destination == Path("/backups%20")
    assert (found.incremental, found.strength) == (False, None)


def test_forced_values_override_specifications(tmp_path: Path) -> None:
    text = "[Archive]\nforce-incremental = yes\nforce-archiver = tar\nforce-dest-dir = /forced\n"
    config = read_config(written(tmp_path, "aa.conf", text))
    found = spec(
        tmp_path, f"[Archive]\nincremental = no\narchiver = tarxz\ndest-dir = /x\n{CONTENT}", config
    )
    assert (found.incremental, found.definition.backup_type) == (True, BackupType.TAR)
    assert found.definition.destination == Path("/forced")


def test_a_keyword_without_a_value_takes_back_what_the_configuration_says(tmp_path: Path) -> None:
    config = read_config(
        written(tmp_path, "aa.conf", "[Archive]\nrestart-after-age = 5\nrestart-after-level = 3\n")
    )
    text = f"[Archive]\nrestart-after-age =\nrestart-after-level =\n{CONTENT}"
    found = spec(tmp_path, text, config)
    assert (found.restart_after_age, found.restart_after_level) == (None, 10)


def test_the_specifications_of_a_configuration(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, "aa.conf", "[General]\n"))
    with pytest.raises(StatePoolError, match="archive_specs"):
        read_specs(config)
    for name in ("b.aa", "a.aa", "README"):
        written(tmp_path, f"archive_specs/{name}", CONTENT)
    assert [one.definition.backup_id for one in read_specs(config)] == ["a", "b"]
    written(tmp_path, "archive_specs/c.aa", CONTENT + "name = a\n")
    with pytest.raises(ConfigError, match="same name"):
        read_specs(config)


# -- references ------------------------------------------------------------------------------------


def test_references_within_a_file_and_to_others(tmp_path: Path) -> None:
    """The example of AutoArchive's manual, and a variable of one's own."""
    written(
        tmp_path,
        "archive_specs/data-nas.aa",
        "[Content]\npath = /\nwhere = data\ninclude-files = %(where)s-nas\nexclude-files = tmp\n"
        "[Archive]\ndest-dir = /mnt/nas\n",
    )
    written(tmp_path, "elsewhere/more.aa", "[Content]\ninclude-files = more\n")
    config = Config({}, tmp_path / "archive_specs")
    found = spec(
        tmp_path,
        """[External]
data-nas
more = ../elsewhere/more.aa
[Content]
path = @(data-nas.path)
include-files = @(data-nas.include-files) "@(more.include-files)"
exclude-files = @(data-nas.exclude-files) videos
[Archive]
dest-dir = /mnt/backup_disk
""",
        config,
    )
    assert found.definition.root == "/"
    assert found.definition.include_files == {"data-nas", "more"}
    assert found.definition.exclude_files == {"tmp", "videos"}
    assert found.definition.destination == Path("/mnt/backup_disk")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path = %(nothing)s", "nothing"),
        ("path = @(other.path)", "no file in the section"),
        ("path = @(mine.nothing)", "there is no nothing"),
        ("path = @(mine.path)", "in a circle"),
        ("path = @(missing.path)", "missing.aa"),
    ],
)
def test_references_that_lead_nowhere(tmp_path: Path, text: str, told: str) -> None:
    config = Config({}, tmp_path / "archive_specs")
    with pytest.raises(StatePoolError, match=told):
        spec(
            tmp_path,
            f"[External]\nmine\nmissing\n[Content]\n{text}\ninclude-files = x\nexclude-files =\n",
            config,
        )


# -- what is not used, and what is wrong -----------------------------------------------------------


def test_keywords_without_a_meaning_here_are_told(tmp_path: Path) -> None:
    found = spec(
        tmp_path,
        f"[Archive]\ncommand-after-backup = umount /x\n{CONTENT}"
        "variable = x\nused = y\nname = %(used)s\n",
    )
    assert [(one.section, one.keyword) for one in found.unused] == [
        ("Archive", "command-after-backup"),
        ("Content", "variable"),
    ]
    assert str(found.path) in str(found.unused[0])
    assert found.definition.backup_id == "y"


WRONG_SPECS = {
    "another section": f"[Contents]\nx = 1\n{CONTENT}",
    "no content": "[Archive]\nincremental = yes\n",
    "no path": "[Content]\ninclude-files = x\nexclude-files =\n",
    "no exclude-files": "[Content]\npath = /\ninclude-files = x\n",
    "a keyword of the other file": f"[Archive]\nverbose = 1\n{CONTENT}",
    "a keyword of the other section": f"{CONTENT}incremental = yes\n",
    "a forced keyword": f"[Archive]\nforce-incremental = yes\n{CONTENT}",
    "no equals sign": f"[Archive]\nincremental\n{CONTENT}",
    "not a number": f"[Archive]\nrestart-after-level = many\n{CONTENT}",
    "below zero": f"[Archive]\nrestart-after-level = -1\n{CONTENT}",
    "neither yes nor no": f"[Archive]\nincremental = maybe\n{CONTENT}",
    "no archiver": f"[Archive]\narchiver = zip\n{CONTENT}",
    "no name": f"{CONTENT}name = a/b\n",
    "no section": "path = /\n",
    "nothing": "",
    "a keyword twice": f"{CONTENT}path = /x\n",
    "no text": "[Content]\npath = \0\n" + "x" * 3,
}


@pytest.mark.parametrize("what", WRONG_SPECS)
def test_a_specification_that_is_wrong(tmp_path: Path, what: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.aa"):
        spec(tmp_path, WRONG_SPECS[what])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "incremental = yes\n",
        "[Content]\npath = /\n",
        "[Archive]\nlevel = 3\n",
        "[Archive]\nverbose = 1\n",
        "[General]\nincremental = yes\n",
        "[Archive]\nno-incremental = yes\n",
        "[Archive]\nforce-keep-old-backups = yes\n",
        "[Archive]\nrestart-after-age = soon\n",
    ],
)
def test_a_configuration_that_is_wrong(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"aa\.conf"):
        read_config(written(tmp_path, "aa.conf", text))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(StatePoolError, match="missing"):
        read_spec(tmp_path / "missing.aa")
    (tmp_path / "binary.aa").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ConfigError, match="binary"):
        read_spec(tmp_path / "binary.aa")
    (tmp_path / "long.aa").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="longer"):
        read_spec(tmp_path / "long.aa")
