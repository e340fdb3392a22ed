"""Whole groups under faults: BLOCKREPL_SIM_SEEDS says how many seeds; `scripts/simulate` does more."""

from __future__ import annotations

import os

import pytest

from tests.sim.group import Group, Options

SEEDS = int(os.environ.get("BLOCKREPL_SIM_SEEDS", "80"))
PART = 8


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_no_seed_breaks_an_invariant(first: int) -> None:
    for seed in range(first, min(first + PART, SEEDS)):
        group = Group(seed)
        try:
            group.run()
        except BaseException as error:
            error.add_note(f"replay: scripts/simulate --seed {seed}")
            for now_s, who, text in list(group.world.trace)[-30:]:
                error.add_note(f"{now_s:9.4f} {who:4} {text}")
            raise


def test_a_run_is_the_same_every_time() -> None:
    """A seed that failed must fail again when it is replayed."""

    def trace(seed: int) -> list[tuple[float, str, str]]:
        group = Group(seed, Options(seconds=3))
        group.run()
        return list(group.world.trace)

    assert [trace(seed) for seed in range(3)] == [trace(seed) for seed in range(3)]
