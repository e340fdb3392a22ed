from __future__ import annotations

import json
from typing import Any

import pytest

from scripts.benchlib.fio import LoadError, parse
from scripts.benchlib.works import WORKS


def side(p50_us: int, p99_us: int, **more: Any) -> dict[str, Any]:
    percentiles = {"1.000000": 1, "50.000000": p50_us * 1000, "99.000000": p99_us * 1000}
    return {"lat_ns": {"min": 1, "percentile": percentiles}, **more}


def output(error: int = 0, ops: int = 9553) -> str:
    write = side(900, 2500, total_ios=ops, io_bytes=ops * 4096, iops=31737.5, bw_bytes=129996800)
    read = {"lat_ns": {"min": 0}, "total_ios": 0, "io_bytes": 0, "iops": 0.0, "bw_bytes": 0}
    return json.dumps({"jobs": [{"error": error, "read": read, "write": write, "sync": side(100, 200)}]})


def test_figures_are_those_of_the_side_that_the_work_uses() -> None:
    sample = parse(WORKS["randwrite-4k-qd32"], output())
    assert (sample.ops, sample.bytes, sample.iops, sample.bytes_per_s) == (9553, 9553 * 4096, 31737.5, 129996800.0)
    assert (sample.lat_us_p50, sample.lat_us_p99) == (900.0, 2500.0)


def test_flush_after_each_write_counts_in_its_latency() -> None:
    sample = parse(WORKS["randwrite-4k-qd1-fsync"], output())
    assert (sample.lat_us_p50, sample.lat_us_p99) == (1000.0, 2700.0)


def test_line_of_the_nbd_engine_before_the_json_is_skipped() -> None:
    assert parse(WORKS["randwrite-4k-qd1"], "fio: connected to NBD server\n" + output()).ops == 9553


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (output(error=5), "error 5"),
        (output(ops=0), "not one operation"),
        ("fio: could not connect\n", "no JSON: 'fio: could not connect'"),
    ],
)
def test_failed_run_is_an_error_that_says_why(text: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        parse(WORKS["randwrite-4k-qd32"], text)


def test_read_work_does_not_take_the_writes() -> None:
    with pytest.raises(LoadError, match="not one operation"):
        parse(WORKS["randread-4k-qd32"], output())
