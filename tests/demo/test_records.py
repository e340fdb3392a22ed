"""The demo's check: it must find what is lost, and what came out of order, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.demo.records import RECORD_BYTES, Ledger, blocks, build, found, judge
from tests.demo.writer import main as write
from tests.demo.writer import run as write_records

RUN = bytes(range(16))


def upto(last: int) -> set[int]:
    return set(range(1, last + 1))


def test_a_record_has_its_size_and_differs_by_run_and_index() -> None:
    assert len(build(RUN, 1)) == RECORD_BYTES
    assert len({build(RUN, 1), build(RUN, 2), build(bytes(16), 1)}) == 3


def test_found_takes_a_record_only_whole_and_in_its_place() -> None:
    torn = bytearray(build(RUN, 3))
    torn[-1:] = b"x"
    pieces = [build(RUN, 1), build(RUN, 1), bytes(torn), build(bytes(16), 4), build(RUN, 5), build(RUN, 6)[:512]]
    assert found(RUN, pieces) == {1, 5}


@pytest.mark.parametrize(
    ("last_a", "last_b", "acked_a", "acked_b", "lost", "violations"),
    [
        (9, 9, 9, 9, 0, 0),
        (10, 9, 9, 9, 0, 0),  # A10 was on its way
        (10, 10, 10, 9, 0, 0),  # B10 was on its way
        (7, 7, 9, 9, 4, 0),  # a prefix, two of each missing
        (8, 7, 9, 9, 3, 0),
        (9, 7, 9, 9, 2, 1),  # A9 came after B8, which is missing
        (6, 9, 9, 9, 3, 3),  # B is ahead of A by three
        (0, 0, 9, 9, 18, 0),
        (0, 1, 1, 1, 1, 1),
    ],
)
def test_verdict_on_volumes_that_end_at_different_records(
    last_a: int, last_b: int, acked_a: int, acked_b: int, lost: int, violations: int
) -> None:
    verdict = judge(upto(last_a), upto(last_b), acked_a, acked_b)
    assert (verdict.acked_writes_lost, verdict.order_violations) == (lost, violations)


def test_a_hole_in_the_middle_is_a_violation_even_if_both_volumes_have_it() -> None:
    verdict = judge({1, 2, 4}, {1, 2, 4}, 4, 4)
    assert (verdict.acked_writes_lost, verdict.order_violations) == (2, 2)


def test_records_that_b_has_and_a_lacks_are_named() -> None:
    assert judge(upto(3), upto(5), 5, 5).ahead == (4, 5)


@given(st.sets(st.integers(1, 12)), st.sets(st.integers(1, 12)))
def test_no_violation_is_reported_exactly_for_prefixes_of_the_writers_order(on_a: set[int], on_b: set[int]) -> None:
    order = [(volume, index) for index in range(1, 13) for volume in "ab"]
    there = [index in (on_a if volume == "a" else on_b) for volume, index in order]
    prefix = there == sorted(there, reverse=True)
    assert (judge(on_a, on_b, 0, 0).order_violations == 0) == prefix


def test_writer_notes_each_write_after_it_was_made_and_before_the_next(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", fresh=True)
    seen = []

    def target(volume: str) -> object:
        return lambda index, record: seen.append((volume, index, tuple(ledger.read())))

    write_records(ledger, RUN, [target("a"), target("b")], 2)  # type: ignore[list-item]
    assert seen == [("a", 1, (0, 0)), ("b", 1, (1, 0)), ("a", 2, (1, 1)), ("b", 2, (2, 1))]
    assert tuple(ledger.read()) == (2, 2)


def test_writer_leaves_records_that_are_found_again(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger", fresh=True).close()
    a, b = tmp_path / "a", tmp_path / "b"
    assert write([str(tmp_path / "ledger"), RUN.hex(), str(a), str(b), "3"]) == 0
    assert found(RUN, blocks(a)) == found(RUN, blocks(b)) == {1, 2, 3}


def test_writer_ends_at_the_first_error_with_what_was_acknowledged_before(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", fresh=True)
    assert write([str(tmp_path / "ledger"), RUN.hex(), str(tmp_path / "a"), "/dev/full", "3"]) == 1
    assert tuple(ledger.read()) == (1, 0)
    assert os.path.getsize(tmp_path / "a") == RECORD_BYTES
