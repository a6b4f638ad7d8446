"""Names of archives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statepool.archive.names import (
    EXTENSIONS,
    KEEPING_IDS,
    ArchiveName,
    age_of,
    check_backup_id,
    next_keeping_id,
    parse_snapshot_name,
    snapshot_name,
)
from statepool.errors import InvalidName, RefusedError

IDS = st.from_regex(r"[a-z][a-z0-9. ä_-]{0,20}[A-Z_]", fullmatch=True)


def test_names_are_those_of_autoarchive() -> None:
    assert str(ArchiveName("one", "tar.gz")) == "one.tar.gz"
    assert str(ArchiveName("one", "tar.gz", 2)) == "one.2.tar.gz"
    assert str(ArchiveName("one", "tar.xz", 2, "ab")) == "one.2.ab.tar.xz"
    assert str(ArchiveName("one", "tar", 0, "aa")) == "one.aa.tar"
    assert (snapshot_name("one", 0), snapshot_name("one", 3)) == ("one.snar", "one.3.snar")


def test_keeping_ids() -> None:
    assert (KEEPING_IDS[0], KEEPING_IDS[25], KEEPING_IDS[26]) == ("aa", "az", "ba")
    assert (len(KEEPING_IDS), KEEPING_IDS[-1]) == (676, "zz")
    assert (next_keeping_id(None), next_keeping_id("az")) == ("aa", "ba")
    assert (age_of(None), age_of("aa"), age_of("zz")) == (0, 1, 676)
    with pytest.raises(RefusedError, match="676 archives are kept"):
        next_keeping_id("zz")


@given(
    IDS,
    st.sampled_from(EXTENSIONS),
    st.integers(0, 9999),
    st.one_of(st.none(), st.sampled_from(KEEPING_IDS)),
)
def test_a_name_can_be_read(
    backup_id: str, extension: str, level: int, keeping_id: str | None
) -> None:
    name = ArchiveName(backup_id, extension, level, keeping_id)
    assert ArchiveName.parse(str(name)) == name
    assert ArchiveName.parse(name.manifest) is None
    assert parse_snapshot_name(snapshot_name(backup_id, level)) == (backup_id, level)


@pytest.mark.parametrize(
    "text", ["one", ".tar", "one.01.tar", "one.tar.lz", "one.AA.tar", "-x.tar", "one.12345.tar"]
)
def test_other_files_are_no_archives(text: str) -> None:
    found = ArchiveName.parse(text)
    assert found is None or str(found) == text
    assert found is None or found.keeping_id is None


@pytest.mark.parametrize(
    "text", ["", "a/b", "..", "-a", "a\n", "one.1", "one.aa", "a.tar", "x" * 201]
)
def test_ids_that_cannot_be_used(text: str) -> None:
    with pytest.raises(InvalidName):
        check_backup_id(text)
