"""Each planted bug is found within a bounded number of seeds: else the simulator's silence would prove nothing."""

from __future__ import annotations

import pytest

from blockrepl.errors import BlockreplError
from tests.sim.group import Group, Options
from tests.sim.planted import PLANTED, Planted

SEEDS = 30


@pytest.mark.parametrize(("planted", "options"), PLANTED, ids=[each.__name__ for each, _ in PLANTED])
def test_a_planted_bug_is_found(planted: Planted, options: Options) -> None:
    with planted():
        for seed in range(SEEDS):
            try:
                Group(seed, options).run()
            except (AssertionError, BlockreplError):
                return
    pytest.fail(f"{planted.__name__}: {SEEDS} seeds found nothing")
