"""
The machinery of the benchmarks, and each table once with tiny images, so that none of them rots. No
time is asserted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import (
    appends,
    archive,
    archived_pools,
    bundles,
    cold,
    imports,
    locks,
    machines,
    mirrors,
    peers,
    pytest_runs,
    sets,
    shaped,
    ssh,
    staging,
    start,
    trusted,
)
from benchmarks.__main__ import TABLES, main
from benchmarks.bench import TINY, Bench, chain_files, room
from benchmarks.environments import Unavailable
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, against, aligned, rounds, seconds


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    return Bench(tmp_path_factory.mktemp("benchmarks"), TINY)


def test_a_figure_is_the_median_of_the_ratios_of_pairs() -> None:
    figure = Figure("copy", "cp", (2.0, 3.0, 8.0), (1.0, 2.0, 2.0))
    assert figure.ratios == [2.0, 1.5, 4.0]
    assert figure.ratio == 2.0
    assert figure.row()[4:6] == ["2.00", "1.50 to 4.00"]


@pytest.mark.parametrize(
    ("unit", "most", "met"),
    [
        (Unit.RATIO, 1.5, True),
        (Unit.RATIO, 1.4, False),
        (Unit.SURPLUS, 1.0, True),
        (Unit.SURPLUS, 0.9, False),
        (Unit.TIME, 3.0, True),
        (Unit.TIME, 2.9, False),
    ],
)
def test_a_limit_is_kept_or_not(unit: Unit, most: float, met: bool) -> None:
    figure = Figure("copy", "cp", (3.0, 3.0, 3.0), (2.0, 2.0, 2.0), Limit(unit, most))
    assert figure.is_met is met
    assert figure.row()[-1].startswith("met") is met
    assert Table("a table", [figure]).is_met is met


def test_a_figure_without_a_pair_for_each_time_is_none() -> None:
    with pytest.raises(ValueError, match="copy: a figure needs"):
        Figure("copy", "cp", (1.0, 2.0), (1.0,))


def test_a_fact_that_is_not_as_it_should_be_shows() -> None:
    table = Table("a table", facts=[Fact("copies", "2", "1", is_met=False)])
    assert not table.is_met
    assert "| copies  | 2     | 1        | NOT MET |" in str(table)


def test_pairs_alternate_after_a_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(os, "sync", lambda: done.append("sync"))

    def work(name: str, time: float) -> float:
        done.append(name)
        return time

    figure = against("work", lambda: work("we", 3.0), "they", lambda: work("they", 1.0), 3)
    assert done == [
        "sync",
        "we",
        "sync",
        "they",
        "sync",
        "they",
        "sync",
        "we",
        "sync",
        "we",
        "sync",
        "they",
    ]
    assert figure.ratios == [3.0, 3.0, 3.0]
    assert rounds([lambda: 1.0], 2) == [(1.0, 1.0)]


def test_tables_are_markdown() -> None:
    assert aligned([("a", "bcd"), ("longer", "x|y")]).splitlines() == [
        "| a      | bcd |",
        "| ------ | --- |",
        "| longer | x/y |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (0.0000123, "12.3 µs"), (-0.002, "-2 ms")],
)
def test_times_are_in_units_that_suit_them(value: float, text: str) -> None:
    assert seconds(value) == text


def test_the_chain_is_real(bench: Bench) -> None:
    files = chain_files(bench.pool)
    assert len(files) == 5
    assert os.path.getsize(files[0]) > TINY.root
    assert room(bench.pool / "vm1") >= TINY.root + 4 * TINY.overlay


def test_one_state_is_one_copy_on_disk(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * 8192)
    before = room(tmp_path)
    os.link(tmp_path / "one", tmp_path / "two")
    assert room(tmp_path) == before > 0


TABLES_THAT_RUN = [
    trusted.table,
    sets.table,
    bundles.table,
    imports.table,
    archived_pools.table,
    start.table,
    locks.table,
    appends.table,
    mirrors.table,
]


@pytest.mark.parametrize("make", TABLES_THAT_RUN, ids=lambda make: make.__module__)
def test_tables_run(bench: Bench, make: object) -> None:
    table = make(bench)  # type: ignore[operator]
    assert table.figures
    # Facts hold whatever the size, but for the share of what surrounds the data in a tiny image.
    assert all(fact.is_met for fact in table.facts), str(table)


def test_archives_are_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> Path:
        raise Unavailable("no network in this test")

    monkeypatch.setattr(archive, "install_autoarchive", unavailable)
    table = archive.table(bench)
    assert len(table.figures) == 4
    assert "AutoArchive was not measured: no network in this test." in table.notes


def test_a_pool_on_another_host_is_measured(bench: Bench) -> None:
    table = ssh.table(bench)
    if not table.figures:
        pytest.skip(table.notes[0])
    assert [figure.peer for figure in table.figures] == [
        "scp",
        "SFTPClient.get",
        "scp of the same files",
        "scp there, and sync",
        "scp",
    ]


def test_staging_is_measured_beside_cedar_backup(bench: Bench) -> None:
    table = staging.table(bench)
    if not table.figures:
        pytest.skip(table.notes[0])
    assert [figure.peer for figure in table.figures] == [
        "cback3, scp -B -q -C",
        "cback3, scp -B -q",
        "our first run",
    ]
    assert all(fact.is_met for fact in table.facts), str(table)


def test_compression_runs_over_a_link_of_its_own(bench: Bench) -> None:
    table = shaped.table(bench)
    if not table.figures:
        pytest.skip(table.notes[0])
    assert [figure.what for figure in table.figures] == [
        "cold get, compress=auto",
        "cold get, compress=on",
        "cold get, compress=off",
        "cold get from two mirrors, each with its own link of 1gbit, compress=off",
    ]
    assert all(fact.is_met for fact in table.facts), str(table)


def test_cold_gets_run_where_no_other_file_system_can_be_made(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    table = cold.table(bench)
    assert [note.split(":")[0] for note in table.notes] == ["Without btrfs", "Without xfs"]
    assert all(fact.is_met for fact in table.facts), str(table)


def test_peers_that_cannot_be_had_are_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Unavailable("avocado-i2n cannot be installed: no network")

    monkeypatch.setattr(peers, "I2N", refuse)
    table = peers.table(bench)
    assert [line[0] for line in table.grid[1:]] == [
        "statepool",
        "cp --sparse=auto",
        "qemu-img convert",
        "rsync --archive",
    ]
    assert (
        table.notes[0] == "Without avocado-i2n 103.0: avocado-i2n cannot be installed: no network"
    )


def test_the_tables_have_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(TABLES)
    with pytest.raises(SystemExit):
        main(["nothing"])


def test_machines_run(bench: Bench) -> None:
    table = machines.table(bench)
    if not table.figures:
        pytest.skip(table.notes[0])
    assert [figure.limit is not None for figure in table.figures] == [
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    assert all(fact.is_met for fact in table.facts), str(table)


def test_tests_that_start_from_a_state_are_measured(tmp_path: Path) -> None:
    """
    Below a project whose configuration of pytest is not for these tests: ``make bench`` measures in
    the directory of this one.
    """
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\naddopts = ["--strict-config"]\nnobody_knows = 1\n'
    )
    (tmp_path / "place").mkdir()
    table = pytest_runs.table(Bench(tmp_path / "place", TINY))
    assert [figure.limit for figure in table.figures] == [
        pytest_runs.OVERHEAD,
        pytest_runs.OVERHEAD,
    ]
    assert all(fact.is_met for fact in table.facts), str(table)
