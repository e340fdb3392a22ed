from __future__ import annotations

import json
import math

import pytest

from scripts.benchlib import report
from scripts.benchlib.criteria import Verdict, judge
from scripts.benchlib.fio import Sample
from scripts.benchlib.results import Figures, LagResult, Measurement, medians, ratio
from scripts.benchlib.runner import Outcome

WORK = "randwrite-4k-qd32"


def measurement(system: str, iops: float, cpu_s: float, rss_bytes: int = 0, work: str = WORK) -> Measurement:
    sample = Sample(1000, 1000 * 4096, iops, iops * 4096, 10.0, 20.0)
    return Measurement(work, system, sample, {"a": cpu_s, "b": cpu_s}, {"a": rss_bytes, "b": 7})


def verdict(figures: Figures, text: str) -> Verdict:
    (found,) = [each for each in judge(figures) if each.text.startswith(text)]
    return found


def test_result_is_the_median_of_its_rounds_and_the_greatest_peak() -> None:
    rounds = [
        measurement("nbdkit", 9.0, 0.03, 5),
        measurement("nbdkit", 1.0, 0.01, 90),
        measurement("nbdkit", 2.0, 0.02),
    ]
    (result,) = medians(rounds)
    assert (result.iops, result.rounds, result.iops_rounds) == (2.0, 3, [9.0, 1.0, 2.0])
    assert result.rss_bytes == {"a": 90, "b": 7}


def test_cpu_per_operation_is_that_of_all_server_processes_together() -> None:
    (result,) = medians([measurement("nbdkit", 1.0, 0.02)])
    assert result.server_cpu_us_per_op == pytest.approx(40.0)
    assert result.cpu_s_per_gib["a"] == pytest.approx(0.02 * (1 << 30) / 4096000)


def test_raw_disk_has_no_server() -> None:
    sample = Sample(10, 40960, 1.0, 4096.0, 1.0, 2.0)
    (result,) = medians([Measurement(WORK, "disk", sample, {}, {})])
    assert result.server_cpu_us_per_op is None


def test_more_is_better_for_speed_and_less_for_cpu() -> None:
    results = medians([measurement("blockrepl-nbd", 110.0, 0.02), measurement("nbdkit", 100.0, 0.03)])
    speed = verdict(Figures(results), "NBD alone, 4k randwrite QD32 ÷ nbdkit")
    assert speed.reached == pytest.approx(1.1)
    assert (speed.verdict, speed.aim_verdict) == ("ok", "short")
    cpu = verdict(Figures(results), "NBD alone, CPU per 4k write")
    assert cpu.reached == pytest.approx(2 / 3)
    assert (cpu.verdict, cpu.aim_verdict) == ("ok", "short")


def test_what_was_not_measured_is_neither_good_nor_bad() -> None:
    assert {each.verdict for each in judge(Figures([]))} == {"not measured", ""}
    assert ratio(1.0, None) is None
    assert ratio(None, 1.0) is None


def test_one_megabyte_rate_is_held_against_the_disk_shared_by_four_copies() -> None:
    work = "write-1m-qd8"
    results = medians(
        [measurement("blockrepl-replicated", 20.0, 0.01, work=work), measurement("disk", 100.0, 0, work=work)]
    )
    assert verdict(Figures(results), "replicated, 1 MiB write QD8 ÷ (disk").reached == pytest.approx(0.8)


def test_lag_that_never_ends_falls_short_and_is_valid_json() -> None:
    lag = LagResult("blockrepl-replicated", WORK, 100, 1 << 20, None, 3)
    late = verdict(Figures([], [lag]), "replicated, lag is zero")
    assert late.reached == math.inf
    assert late.verdict == "short"
    text = json.dumps(report.document(Outcome(lags=[lag]), "ext2/ext3", 1 << 20), allow_nan=False)
    assert json.loads(text)["lag"][0]["zero_after_s"] is None


def test_document_holds_the_keys_that_readers_rely_on() -> None:
    outcome = Outcome(
        [measurement("nbdkit", 1.0, 0.01)], skipped={"qemu-nbd": "not available: qemu-nbd is not installed"}
    )
    document = json.loads(json.dumps(report.document(outcome, "xfs", 1 << 20)))
    keys = {"work", "system", "iops", "bytes_per_s", "lat_us_p50", "lat_us_p99", "server_cpu_us_per_op"}
    assert keys <= set(document["results"][0])
    assert document["skipped"] == outcome.skipped
