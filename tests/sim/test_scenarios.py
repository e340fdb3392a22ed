"""Named scenarios on whole groups, without chance; what each would miss is planted in `test_planted`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sim.scenarios import SCENARIOS, play


@pytest.mark.parametrize("scenario", SCENARIOS, ids=[each.__name__ for each in SCENARIOS])
def test_a_scenario_goes_well(scenario: Callable[[], None]) -> None:
    play(scenario)
