from __future__ import annotations

import configparser

import pytest

from scripts.benchlib.criteria import judge
from scripts.benchlib.fio import Sample
from scripts.benchlib.registry import FACTORIES
from scripts.benchlib.results import Figures, LagResult, Measurement, StormResult, medians
from scripts.benchlib.works import FIO_DIRECTORY, QUICK_CELLS, SYSTEMS, WORKS, Work, cells

UNITS = {"k": 1 << 10, "m": 1 << 20}


@pytest.mark.parametrize("work", WORKS.values(), ids=lambda work: work.name)
def test_job_file_says_what_the_work_says(work: Work) -> None:
    jobs = configparser.ConfigParser()
    jobs.read(work.job_file)
    assert jobs.sections() == [work.name]
    job = jobs[work.name]
    size = job["bs"]
    assert (job["rw"], int(size[:-1]) * UNITS[size[-1]]) == (work.rw, work.block_bytes)
    assert (job.getint("iodepth"), job.getboolean("fsync", fallback=False)) == (work.depth, work.fsync)
    assert job["time_based"] == "1", "or a small image ends the run early"


def test_every_job_file_is_a_work() -> None:
    assert {path.stem for path in FIO_DIRECTORY.glob("*.fio")} == set(WORKS)


def test_every_system_can_be_started() -> None:
    assert set(FACTORIES) == set(SYSTEMS)


def test_raw_disk_is_not_asked_to_read() -> None:
    assert cells(["randread-4k-qd32"], ["nbdkit", "disk"], quick=False) == [("randread-4k-qd32", "nbdkit")]


def test_quick_run_keeps_to_the_chosen_systems_and_works() -> None:
    pairs = cells(["randwrite-4k-qd1", "read-1m-qd8"], ["nbdkit", "disk"], quick=True)
    assert pairs == [("randwrite-4k-qd1", "disk"), ("read-1m-qd8", "nbdkit")]


def test_quick_run_measures_everything_that_is_judged() -> None:
    sample = Sample(1000, 4096000, 1000.0, 4096000.0, 10.0, 20.0)
    measured = [
        Measurement(work, system, sample, {} if system == "disk" else {"server": 0.01}, {"server": 1 << 20})
        for work, system in QUICK_CELLS
    ]
    lag = LagResult("blockrepl-replicated", "randwrite-4k-qd32", 5, 20480, 0.1, 9)
    storm = StormResult("blockrepl-iscsi", 100, 1, 90.0, 200.0, 150.0, 900.0)
    figures = Figures(medians(measured), [lag], [storm])
    assert [verdict.text for verdict in judge(figures) if verdict.reached is None] == []
