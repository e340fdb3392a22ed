"""What a reform decides from promises: who may be source, what is compared, what is copied whole."""

from __future__ import annotations

from typing import Any

import pytest

from blockrepl.formats.link import NO_EPOCH, Epoch
from blockrepl.replication.reform_plan import Plan, Question, Refused, plan

P1, P2, I1, S1, S2 = 1, 2, 3, 4, 5
NAMES = {P1: "p1", P2: "p2", I1: "i1", S1: "s1", S2: "s2"}
OLD, TAKEN = Epoch(4, b"o" * 16), Epoch(5, b"t" * 16)


def said(epoch: Epoch = OLD, **more: Any) -> dict[str, Any]:
    """A PROMISED."""
    return {
        "stored": epoch, "held": 90, "validated": 80, "applied": 80, "number": 0, "numbered": 95, "active": False,
        "direction": 0, "copying": False, "copy_from": 0, "initial": False, "end": 0, "trusted": True,
        "dirty_bytes": 0, "members": [], "alone": False, **more,
    }  # fmt: skip


def after_takeover(**changed: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """The secondaries have taken over, the old primaries are back."""
    data = {
        P1: said(active=True), P2: said(active=True), S1: said(TAKEN, active=True, number=80),
        S2: said(TAKEN, active=True, number=80),
    }  # fmt: skip
    middle = said(held=100)
    for name, change in changed.items():
        node = {name: number for number, name in NAMES.items()}[name]
        (middle if node == I1 else data[node]).update(change)
    return data, middle


def swap(**more: Any) -> Question:
    return Question(1, [S1, S2], [P1, P2], {1: (S1, P1), 2: (S2, P2), 3: (S2, P1)}, NAMES, **more)


def replace(node: int, **more: Any) -> Question:
    return Question(0, [P1, P2], [S1, S2], {1: (P1, S1), 2: (P2, S2), 3: (P1, S2)}, NAMES, node, **more)


def made(question: Question, data: dict[int, dict[str, Any]], middle: dict[str, Any]) -> Plan:
    result = plan(question, data, middle)
    assert isinstance(result, Plan), result
    return result


def refused(question: Question, data: dict[int, dict[str, Any]], middle: dict[str, Any]) -> Refused:
    result = plan(question, data, middle)
    assert isinstance(result, Refused), result
    return result


def test_a_swap_after_a_takeover_copies_what_bits_say_and_can_go_back() -> None:
    found = made(swap(), *after_takeover(s1={"dirty_bytes": 65536}, p2={"dirty_bytes": 131072}))
    assert (found.number, found.direction, found.dirty_bytes) == (101, 1, 196608)
    assert (found.verify, found.initial, found.full) == (False, False, [])


def test_the_number_is_above_everything_that_anybody_knows() -> None:
    assert made(swap(), *after_takeover(p1={"numbered": 500})).number == 501


def test_an_untrusted_bitmap_is_made_up_for_by_the_intermediates_journal() -> None:
    found = made(swap(), *after_takeover(p1={"trusted": False}))
    assert not found.verify
    assert found.initial  # p1's volumes are torn: nothing to go back to


def test_an_untrusted_bitmap_and_a_new_intermediate_mean_that_everything_is_compared() -> None:
    data, middle = after_takeover(p1={"trusted": False}, i1={"stored": NO_EPOCH, "held": 0})
    assert made(swap(), data, middle).verify
    data, middle = after_takeover(i1={"stored": NO_EPOCH, "held": 0})
    assert not made(swap(), data, middle).verify


def test_a_new_target_is_copied_whole_and_cannot_go_back() -> None:
    data = {P1: said(active=True), P2: said(active=True), S1: said(NO_EPOCH, held=0), S2: said()}
    found = made(replace(S1), data, said())
    assert (found.full, found.initial, found.verify) == ([1], True, False)


def test_a_node_that_has_worked_before_is_no_replacement() -> None:
    data = {P1: said(active=True), P2: said(active=True), S1: said(), S2: said(NO_EPOCH)}
    assert "not new" in refused(replace(S1), data, said()).problem
    assert made(replace(S1, force=True), data, said()).full == [1, 2, 3]  # whatever it says that it has


def test_a_new_intermediate_lets_targets_at_one_number_go_back_to_it() -> None:
    data = {P1: said(active=True), P2: said(active=True), S1: said(), S2: said()}
    assert not made(replace(I1), data, said(NO_EPOCH, held=0)).initial
    data[S2]["held"] = 91
    assert made(replace(I1), data, said(NO_EPOCH, held=0)).initial


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"s2": {"active": False}}, "s2 does not serve"),
        ({"p1": {"stored": Epoch(6, b"x" * 16)}}, "p1 has taken over later, in epoch 6"),
        ({"s1": {"stored": NO_EPOCH}}, "s1 is new and empty"),
    ],
)
def test_a_side_that_is_not_the_newest_source_is_refused(changed: dict[str, Any], words: str) -> None:
    assert words in refused(swap(), *after_takeover(**changed)).problem


def test_22_two_epochs_of_one_number_are_split_brain_and_so_are_sources_that_took_over_one_by_one() -> None:
    other = Epoch(TAKEN.number, b"u" * 16)
    found = refused(swap(), *after_takeover(s2={"stored": other}))
    assert f"split brain: two epochs have number 5: s1 in {TAKEN} and s2 in {other}" in found.problem
    assert "split brain" in refused(swap(), *after_takeover(i1={"stored": other})).problem
    alone: dict[str, dict[str, Any]] = {"s1": {"members": [S1]}, "s2": {"members": [S2], "stored": Epoch(6, b"v" * 16)}}
    assert "s1 has taken over without s2" in refused(swap(), *after_takeover(**alone)).problem
    together = {"s1": {"members": [S1, S2]}, "s2": {"members": [S1, S2]}}
    assert made(swap(), *after_takeover(**together)).direction == 1
    assert made(swap(force=True), *after_takeover(s2={"stored": other})).direction == 1


def test_force_makes_the_older_side_the_source() -> None:
    question = replace(0, force=True)
    found = made(question, *after_takeover())
    assert found.direction == 0


def test_a_group_in_order_has_nothing_to_be_formed_anew() -> None:
    data = {P1: said(active=True), P2: said(active=True), S1: said(), S2: said()}
    assert "nothing" in refused(replace(0), data, said()).problem


def test_a_reform_that_died_half_way_is_taken_up_again() -> None:
    new = Epoch(7, b"n" * 16)
    data, middle = after_takeover(
        s1={"stored": new}, s2={"stored": new},
        p1={"stored": new, "active": False, "copying": True, "copy_from": 101, "held": 101, "direction": 1},
    )  # fmt: skip
    found = made(swap(), data, middle)
    assert found.number == 102
    assert found.initial  # one target was turned, the other was not: who is where is not known


def test_targets_between_start_and_end_keep_their_way_back() -> None:
    new = Epoch(7, b"n" * 16)
    state = {"stored": new, "active": False, "copying": True, "copy_from": 101, "direction": 1}
    data, middle = after_takeover(
        s1={"stored": new}, s2={"stored": new}, p1={**state, "held": 140}, p2={**state, "held": 130},
    )  # fmt: skip
    assert not made(swap(), data, middle).initial


def test_targets_that_hold_an_end_are_at_what_they_hold() -> None:
    """The END may be valid: nobody goes back from it. They are at one number only if they hold the same."""
    copy: dict[str, Any] = {"copying": True, "copy_from": 50, "end": 85}
    data = {P1: said(active=True), P2: said(active=True), S1: said(**copy), S2: said(**copy)}
    assert not made(replace(I1), data, said(NO_EPOCH, held=0)).initial
    data[S2]["held"] = 91
    assert made(replace(I1), data, said(NO_EPOCH, held=0)).initial
    data[S2].update(held=90, end=0)  # it never got the END: then that is not valid, but s1 has no way back
    assert made(replace(I1), data, said(NO_EPOCH, held=0)).initial


def test_targets_at_the_end_of_an_initial_copy_have_an_image_to_go_back_to() -> None:
    copy: dict[str, Any] = {"copying": True, "initial": True, "end": 85}
    data = {P1: said(active=True), P2: said(active=True), S1: said(**copy), S2: said(**copy)}
    assert not made(replace(I1), data, said(NO_EPOCH, held=0)).initial
    data[S1]["end"] = data[S2]["end"] = 0
    assert made(replace(I1), data, said(NO_EPOCH, held=0)).initial


def test_a_planned_swap_gives_up_nothing_that_a_primary_completed_alone_in_the_meantime() -> None:
    found = refused(swap(planned=True), *after_takeover(p2={"alone": True}))
    assert "p2 has gone on alone meanwhile" in found.problem
    assert made(swap(planned=True), *after_takeover()).direction == 1
    assert made(swap(), *after_takeover(p2={"alone": True})).direction == 1, "after a takeover an operator gives it up"
