"""The small model: some scopes to their ends; it finds what is planted. `scripts/simulate --model` does all of them."""

from __future__ import annotations

from random import Random

import pytest

from tests.sim import planted, planted_links
from tests.sim.model.explore import Explorer
from tests.sim.model.links import CALL, P1, S2, I
from tests.sim.model.scope import ONE, SCOPES, Scope
from tests.sim.planted import Planted
from tests.sim.world import Violation

NAMED = {scope.name: scope for scope in SCOPES}


@pytest.mark.parametrize("name", ["production", "one write, crash", "one write, takeover", "one write, stale node"])
def test_every_interleaving_keeps_the_rules(name: str) -> None:
    report = Explorer().explore(NAMED[name])
    assert report.exhausted
    assert report.states > 300
    assert report.ends > 1


@pytest.mark.parametrize("reduced", [True, False], ids=["reduced", "whole"])
@pytest.mark.parametrize(
    ("bug", "scope", "rule"),
    [
        (planted.acknowledge_before_durable, Scope("", writes=ONE), "[1]"),
        (planted.validated_from_one_secondary, Scope("", writes=ONE), "[4]"),
        (planted.prepared_without_a_note, Scope("", writes=ONE), "[4]"),
        (planted.notes_are_forgotten, Scope("", writes=ONE, crashes=1, victims=(S2,)), "[12]"),
        (planted_links.welcome_without_waiting, Scope("", writes=ONE, crashes=1, victims=(P1,)), "[2]"),
        (planted_links.epoch_check_skipped, Scope("", writes=ONE, takeovers=1), "[12]"),
    ],
    ids=lambda value: getattr(value, "__name__", "") or None,
)
def test_a_planted_bug_is_found(bug: Planted, scope: Scope, rule: str, reduced: bool) -> None:
    whole = Scope(**{**vars(scope), "reduced": reduced})
    with bug(), pytest.raises(Violation) as found:
        Explorer().explore(whole, max_states=200_000)
    assert str(found.value).startswith(rule)
    assert "the way there:" in str(found.value)


@pytest.mark.parametrize(
    "bug", [planted_links.takeover_without_promise, planted.apply_before_validate], ids=lambda bug: bug.__name__
)
def test_a_planted_bug_of_takeovers_is_found(bug: Planted) -> None:
    scope = Scope("", writes=ONE, takeovers=1, stale=1, cuts=((CALL[I], I),))
    with bug(), pytest.raises(Violation) as found:
        Explorer().explore(scope, max_states=200_000, chance=Random(1))
    assert str(found.value).startswith("[4]")


def test_the_same_scope_has_the_same_states_every_time() -> None:
    reports = [Explorer().explore(NAMED["one write, stale node"]) for _ in range(2)]
    assert reports[0].states == reports[1].states
    assert reports[0].transitions == reports[1].transitions


def test_a_bound_that_is_met_is_said() -> None:
    report = Explorer().explore(NAMED["production"], max_states=100)
    assert not report.exhausted
    assert "NOT exhausted" in str(report)
