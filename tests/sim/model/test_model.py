"""The small model: some scopes to their ends; it finds what is planted. `scripts/simulate --model` does all of them."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from tests.sim import planted
from tests.sim.model.explore import Explorer
from tests.sim.model.scope import SCOPES, Scope
from tests.sim.planted import Planted
from tests.sim.world import Violation

NAMED = {scope.name: scope for scope in SCOPES}
ONE = ((1, 1),)


@pytest.mark.parametrize("name", ["production", "one write, stale node", "one write, crash of a secondary"])
def test_every_interleaving_keeps_the_rules(name: str) -> None:
    explorer = Explorer()
    whole = explorer.explore(replace(NAMED[name], reduced=False))
    reduced = explorer.explore(NAMED[name])
    assert whole.exhausted
    assert reduced.exhausted
    assert whole.states > reduced.states > 300
    assert whole.ends == reduced.ends > 2  # what is left out leads nowhere else


@pytest.mark.parametrize(
    ("bug", "scope", "rule"),
    [
        (planted.acknowledge_before_durable, Scope("", writes=ONE), "[1]"),
        (planted.validated_from_one_secondary, Scope("", writes=ONE), "[4]"),
        (planted.prepared_without_a_note, Scope("", writes=ONE), "[4]"),
        (planted.notes_are_forgotten, Scope("", writes=ONE, crashes=1, victims=("s1", "s2")), ""),
        (planted.drain_without_freeze, Scope("", writes=ONE, takeovers=1), "[5, 6]"),
    ],
    ids=lambda value: getattr(value, "__name__", "") or None,
)
def test_a_planted_bug_is_found(bug: Planted, scope: Scope, rule: str) -> None:
    with bug(), pytest.raises(Violation) as found:
        Explorer().explore(scope, max_states=200_000, chance=Random(1))
    assert str(found.value).startswith(rule)
    assert "the way there:" in str(found.value)


def test_the_same_scope_has_the_same_states_every_time() -> None:
    reports = [Explorer().explore(NAMED["one write, stale node"]) for _ in range(2)]
    assert reports[0].states == reports[1].states
    assert reports[0].transitions == reports[1].transitions


def test_a_bound_that_is_met_is_said() -> None:
    report = Explorer().explore(NAMED["production"], max_states=100)
    assert not report.exhausted
    assert "NOT exhausted" in str(report)
