"""Whole groups under faults: BLOCKREPL_SIM_SEEDS seeds, and as many more as fit into BLOCKREPL_SIM_MINUTES.

`scripts/simulate` does more.
"""

from __future__ import annotations

import os
from collections import deque

import pytest

from tests.sim.bugs import by_name, options_for
from tests.sim.campaign import Tally, campaign
from tests.sim.case import Case, Failure
from tests.sim.group import Group, Options
from tests.sim.shrink import Shrinker

SEEDS = int(os.environ.get("BLOCKREPL_SIM_SEEDS", "80"))
MINUTES = float(os.environ.get("BLOCKREPL_SIM_MINUTES", "4"))
PART = 40
# Seeds behind it are for campaigns: the first that is known to fail, and what comes of it is not decided
# (docs/simulator.md). About four minutes by one of two cores.
LAST = 198
# Processes of a campaign: the cores that the other workers of pytest-xdist leave.
JOBS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_no_seed_breaks_an_invariant(first: int) -> None:
    tally = campaign(first, min(PART, SEEDS - first), Options(), keep_going=True, jobs=JOBS)
    fail_with_story(tally)
    assert tally.runs == min(PART, SEEDS - first)
    assert tally.counts["completions"] > 50 * tally.runs


@pytest.mark.timeout(60 * MINUTES + 600)
def test_no_seed_that_fits_into_the_time_breaks_an_invariant() -> None:
    tally = campaign(SEEDS, max(0, LAST - SEEDS), Options(), keep_going=True, jobs=JOBS, minutes=MINUTES)
    print(tally)
    fail_with_story(tally)
    assert tally.runs > 0 or SEEDS >= LAST


def fail_with_story(tally: Tally) -> None:
    """Of the shortest failure, and how to see it again."""
    if tally.failures:
        case, failure = min(tally.failures, key=lambda each: each[1].at_s)
        story = "\n".join(deque(case.story(), maxlen=60))
        pytest.fail(f"{story}\n\n{failure.text}\n{failure.where}\nreplay: {case.command()} (--shrink makes it short)")


def test_a_run_is_the_same_every_time() -> None:
    """A seed that failed must fail again when it is replayed."""

    def trace(seed: int) -> list[tuple[float, str, str]]:
        group = Group(seed, Options(seconds=3))
        group.run()
        return list(group.world.trace)

    assert [trace(seed) for seed in range(3)] == [trace(seed) for seed in range(3)]


def test_a_fault_that_is_left_out_leaves_the_others_where_they_are() -> None:
    """Else a failing run could not be made short."""

    def faults(keep: frozenset[int] | None) -> list[tuple[float, str, str]]:
        group = Group(5, Options(4.0, story="production", faults=("wall clock", "clock rate"), keep=keep))
        group.run()
        return [line for line in group.world.trace if not line[1] and "clock" in line[2]]

    whole = faults(None)
    assert len(whole) > 2
    assert faults(frozenset(range(2, 50))) == whole[1:]


def test_a_failing_run_is_made_short_and_its_command_line_replays_it() -> None:
    name = "journal_without_sync"
    within = by_name(name)
    for seed in range(30):
        case = Case(seed, options_for(name), name)
        failure = case.run(within)
        if isinstance(failure, Failure) and len(failure.performed) > 4:
            break
    assert isinstance(failure, Failure)
    shorter, again = Shrinker(case, failure, within, tell=lambda _: None).shrink()
    assert len(shorter.options.keep or ()) < len(failure.performed)
    assert again.kind == failure.kind
    assert shorter.run(within) == again
    assert "--faults" in shorter.command()
    assert "--planted journal_without_sync" in shorter.command()
    story = list(shorter.story(within))
    assert any("BATCH" in line for line in story)
