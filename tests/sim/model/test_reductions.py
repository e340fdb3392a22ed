"""What the reductions leave out makes no difference: the same ends as the whole search has. See docs/model.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.sim.model.explore import Explorer
from tests.sim.model.links import P1, P2, S1, S2, I
from tests.sim.model.scope import ONE, Scope

SMALL = {
    "two writes": Scope(""),
    "a primary crashes": Scope("", writes=ONE, crashes=1, victims=(P1,)),
    "the intermediate crashes": Scope("", writes=(), crashes=1, victims=(I,)),
    "a secondary crashes": Scope("", writes=ONE, crashes=1, victims=(S1,)),
    "an idle secondary crashes": Scope("", writes=ONE, crashes=1, victims=(S2,)),
    "a connection breaks": Scope("", writes=ONE, stale=1),
    "a takeover of nothing": Scope("", writes=(), takeovers=1),
    "a takeover loses a connection": Scope("", writes=(), takeovers=1, stale=1, cuts=((0, P1),)),
}


def ends(scope: Scope, *, canonical: bool = True) -> set[Any]:
    """What can be seen of all ends."""
    report = Explorer(canonical=canonical).explore(scope, verdicts=True)
    assert report.exhausted
    return report.verdicts


@pytest.mark.parametrize("scope", SMALL.values(), ids=SMALL)
def test_a_reduced_search_comes_to_the_same_ends(scope: Scope) -> None:
    assert ends(scope) == ends(replace(scope, reduced=False))


@pytest.mark.parametrize("name", ["two writes", "a primary crashes", "a secondary crashes", "a connection breaks"])
def test_what_is_forgotten_makes_no_difference(name: str) -> None:
    whole = replace(SMALL[name], reduced=False)
    assert ends(whole) == ends(whole, canonical=False)


OTHER = {1: 2, 2: 1}  # writes, and volumes


def mirrored(verdict: Any) -> Any:
    """The same with p1, s1 and p2, s2 exchanged."""

    def swap(side: tuple[Any, ...], at: int) -> tuple[Any, ...]:
        volume = tuple(sorted((OTHER[volume], OTHER[write]) for volume, write in side[at]))
        return (*side[:at], volume, *side[at + 1 :])

    order, p1, p2, (s1, s2), *rest = verdict
    p1, p2 = ((tuple(OTHER[write] for write in told), volume) for told, volume in (p1, p2))
    order = tuple((last, OTHER[write]) for last, write in order)
    return order, swap(p2, 1), swap(p1, 1), (swap(s2, 3), swap(s1, 3)), *rest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"crashes": 1, "victims": (P1,)}, {"crashes": 1, "victims": (P2,)}),
        ({"crashes": 1, "victims": (S1,)}, {"crashes": 1, "victims": (S2,)}),
    ],
    ids=["primaries", "secondaries"],
)
def test_machines_that_count_as_each_others_mirror_image_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    found = ends(Scope("", writes=ONE, **one))
    assert found == {mirrored(verdict) for verdict in ends(Scope("", writes=((2, 2),), **other))}
