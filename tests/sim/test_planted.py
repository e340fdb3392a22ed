"""Each planted bug is found within a bounded number of seeds: else the simulator's silence would prove nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sim.bugs import PLANTED
from tests.sim.case import Case, Failure
from tests.sim.group import Options
from tests.sim.planted import Planted
from tests.sim.planted_pairs import PLANTED as SCENARIOS
from tests.sim.scenarios import play
from tests.sim.world import Violation

SEEDS = 200
DOCUMENT = Path(__file__).parents[2] / "docs" / "planted.md"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("planted", "options"), PLANTED, ids=[each.__name__ for each, _ in PLANTED])
def test_a_planted_bug_is_found(planted: Planted, options: Options) -> None:
    assert any(isinstance(Case(seed, options).run(planted), Failure) for seed in range(SEEDS))


@pytest.mark.parametrize(("planted", "scenario"), SCENARIOS, ids=[each.__name__ for each, _ in SCENARIOS])
def test_a_planted_bug_breaks_its_scenario(planted: Planted, scenario: Callable[[], None]) -> None:
    with planted(), pytest.raises(Violation):
        play(scenario)


def test_the_document_names_the_scenario_of_such_a_bug() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| `(\w+)` \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == [
        (bug.__name__, (bug.__doc__ or "").strip().splitlines()[0], scenario.__name__) for bug, scenario in SCENARIOS
    ]


def test_enough_is_planted() -> None:
    assert len(PLANTED) + len(SCENARIOS) >= 47


def test_the_document_names_every_planted_bug_and_what_it_breaks() -> None:
    found = DOCUMENT.read_text().split("## Scenarios")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", found, re.MULTILINE))
    assert rows == {bug.__name__: (bug.__doc__ or "").strip().splitlines()[0] for bug, _ in PLANTED}
