"""libiscsi's own test suite against real nodes, test by test against the record."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.iscsi import suite
from tests.iscsi.groups import PLAIN_NODE, PlainGroup, url
from tests.iscsi.suite import Result, deviations, parse, recorded
from tests.system.conftest import MakeGroup

SIZE = "192MiB"  # more than MAXIMUM WRITE SAME LENGTH: else tests of it are skipped
# Sanitize.Reset looks on for ten seconds while an overwrite goes on at its pace, then sleeps a minute.
LARGE, RESET = "1GiB", "ALL.Sanitize.Reset"
LOG = """
    Send READCAPACITY10 (Expecting SUCCESS) LBA:0 pmi:0
     CUnit - A unit testing framework for C - Version 2.1-3
Suite: Read10
  Test: Simple ...
    Test READ10 of 1-256 blocks at the start of the LUN
    [OK] READ10 returned SUCCESS
passed
  Test: ZeroBlocks ...passed    Send PRIN/READ_KEYS
Suite: Reserve6
  Test: LogOut ...    [SKIPPED] RESERVE6 is not implemented.
passed
  Test: 2Initiators ...
    [FAILED] MODESENSE6 successful but should have failed
    [OK] RELEASE6 returned SUCCESS.
FAILED
    1. test_reserve6_2initiators.c:70  - CU_ASSERT_EQUAL(_r,0)
  Test: LUNReset ...
    Send RESERVE6
"""


def test_the_log_is_read_test_by_test() -> None:
    assert parse(LOG) == [
        Result("Read10.Simple", "passed"),
        Result("Read10.ZeroBlocks", "passed"),
        Result("Reserve6.LogOut", "skipped", "RESERVE6 is not implemented."),
        Result("Reserve6.2Initiators", "failed", "MODESENSE6 successful but should have failed"),
        Result("Reserve6.LUNReset", "ended", " / Send RESERVE6"),
    ]


def test_one_test_gone_bad_is_named() -> None:
    expected = {"Read10.Simple": "passed", "Read10.ZeroBlocks": "passed", "Async.Read": "passed"}
    results = [Result("Read10.Simple", "passed"), Result("Read10.ZeroBlocks", "skipped", "LUN is too big")]
    assert deviations(results, expected).splitlines() == [
        "Read10.ZeroBlocks skipped: LUN is too big (expected: passed)",
        "Async.Read did not run",
    ]


def test_the_record_has_all_tests_and_says_why_some_are_skipped() -> None:
    expected = recorded()
    assert len(expected) == 230
    assert set(expected.values()) == {"passed", "skipped"}
    reasons = [line.partition("# ")[2] for line in suite.RECORD.read_text().splitlines() if " skipped " in line]
    assert len(reasons) == sum(verdict == "skipped" for verdict in expected.values())
    assert all(reasons)


def recorded_but(*skipped: str) -> dict[str, str]:
    """The record, with these families skipped."""
    families = tuple(f"{family}." for family in skipped)
    return {name: "skipped" if name.startswith(families) else verdict for name, verdict in recorded().items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_suite_passes_on_a_plain_volume_over_two_paths_and_with_sanitize(tmp_path: Path) -> None:
    """Blocks of 512 bytes, here and below: the suite's reservation tests write no others. Nothing makes a write to a
    plain image atomic, so WRITE ATOMIC is not there."""
    with ThreadPoolExecutor() as pool:
        patient = pool.submit(run_plain, tmp_path / "large", LARGE, RESET)
        results = run_plain(tmp_path / "usual", SIZE)
        results = [result for result in results if f"ALL.{result.name}" != RESET] + patient.result()
    assert deviations(results, recorded_but("WriteAtomic16")) == ""


def run_plain(folder: Path, size: str, test: str = "ALL") -> list[Result]:
    folder.mkdir()
    with PlainGroup(folder, portals=2, size=size) as group:
        group.create().start()
        results = suite.run(url(group, PLAIN_NODE, 0), url(group, PLAIN_NODE, 0, portal=1), test=test)
        assert "mistake of ours" not in group.log(PLAIN_NODE)
    shutil.rmtree(folder)
    return results


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_suite_passes_on_a_replicated_volume_and_the_secondary_follows_exactly(make_group: MakeGroup) -> None:
    """Both secondaries live. Sanitize by its erasing only: an overwrite takes its time."""
    group = make_group(iscsi_portals=2, sizes={"data": SIZE}, keys="block_size = 512").create().start()
    urls = url(group, "p1", 0), url(group, "p1", 0, portal=1)
    results = suite.run(*urls, sanitize=False)
    assert deviations(results, recorded_but("Sanitize")) == ""
    erased = suite.run(*urls, test="ALL.Sanitize.BlockErase")
    assert [str(result) for result in erased] == ["Sanitize.BlockErase passed"]
    group.settle()
    done = group.cli("verify", "system/data")
    assert done.returncode == 0, done.stdout + done.stderr
    assert group.differing() == []
