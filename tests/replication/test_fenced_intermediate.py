"""An intermediate whose secondaries have taken over."""

from __future__ import annotations

import pytest

from blockrepl.errors import UsageError
from blockrepl.formats.link import NO_EPOCH, LinkRole, Message, Refusal
from blockrepl.replication.actions import Close
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.opening import Phase
from tests.replication.roles import (
    MID,
    NONCE,
    ONE,
    S1,
    S2,
    THREE,
    TWO,
    arrives,
    greet,
    hello,
    intermediate,
    one,
    report,
    said,
    saved,
    serving,
)


def test_an_opener_that_waits_for_the_drain_is_let_go_when_the_intermediate_learns_that_it_is_fenced() -> None:
    """A second takeover right after the first: the drain can never end, and the opener must not wait for it."""
    role = serving(intermediate())
    role.accepted(7, hello(LinkRole.OPENER, S1, MID), 0.0)
    for node in (S1, S2):  # they took over, and closed
        role.lost(100 + node, 0.0)
    saved(role, role.received(7, Message.PROMISE, arrives(Message.PROMISE, epoch=TWO, dry_run=False), 0.0))
    role.connected(200, S2, NONCE, 0.0)
    fields = {"code": Refusal.ACTIVE, "epoch": TWO, "promised": TWO, "text": "s2 has taken over"}
    actions = role.received(200, Message.REFUSED, fields, 0.0)
    closed = {action.link: action for action in actions if isinstance(action, Close)}
    assert "taken over" in closed[7].reason
    assert closed[7].last_words


def test_a_reforms_opener_is_not_sent_away_by_the_fence_that_it_came_to_lift() -> None:
    role = intermediate()
    role.accepted(9, hello(LinkRole.REFORMER, S1, MID), 0.0)
    active = {"epoch": TWO, "promised": TWO, "code": int(Refusal.ACTIVE), "text": "s1 has taken over"}
    actions = role.opening.refused(S1, active, 1.0)
    assert role.opening.phase.name == "FENCED"
    assert not [action for action in actions if isinstance(action, Close) and action.link == 9]
    promise = {"epoch": THREE, "dry_run": False, "reform": True}
    assert role.opening.asked_to_promise(9, promise, 2.0)
    assert role.phase is Phase.FROZEN


def test_a_new_intermediate_waits_for_its_replacement_and_a_reform_under_way_is_not_disturbed() -> None:
    role = intermediate(epoch=NO_EPOCH, promised=NO_EPOCH)
    role.opening.behind("secondary 4 holds number 2")
    assert (role.phase, "is new" in role.opening.reason) == (Phase.FENCED, True)
    role.accepted(9, hello(LinkRole.REFORMER, S1, MID), 0.0)
    role.opening.asked_to_promise(9, {"epoch": THREE, "dry_run": False, "reform": True}, 2.0)
    assert role.opening.behind("secondary 5 holds number 2") == []
    assert role.phase is Phase.FROZEN


def test_an_intermediate_that_cannot_store_never_names_the_epoch_that_was_asked_for() -> None:
    role = intermediate()
    role.accepted(9, hello(LinkRole.REFORMER, S1, MID), 0.0)
    role.opening.asked_to_promise(9, {"epoch": THREE, "dry_run": False, "reform": True}, 0.0)
    role.opening.tick(1000.0)
    assert role.phase is not Phase.FROZEN
    store = {"dry_run": False, "reform": True, "epoch": THREE, "promise": THREE, "number": 7}
    answer = said(role.opening.asked_to_store(9, store, 1001.0)[0])
    assert answer is not None
    assert answer[2]["epoch"] == ONE


def test_one_that_lost_only_its_end_stops_for_good() -> None:
    role = intermediate()
    role.opening.behind("secondary 4 holds number 2")
    assert role.phase is Phase.FAILED


def test_a_target_that_was_formed_anew_first_does_not_look_like_a_lost_journal() -> None:
    formed = report(S1, epoch=THREE, promised=THREE, through=50)
    role = intermediate()
    role.accepted(9, hello(LinkRole.REFORMER, S1, MID), 0.0)
    role.opening.asked_to_promise(9, {"epoch": THREE, "dry_run": False, "reform": True}, 0.0)
    assert role.opening.greeted(S1, 200, formed, 1.0) == []
    assert role.phase is Phase.FROZEN
    left = intermediate()  # the opener died before it came here
    left.opening.greeted(S1, 200, formed, 1.0)
    assert (left.opening.phase.name, "do that again" in left.opening.reason) == ("FENCED", True)


def new_intermediate() -> Intermediate:
    return intermediate(epoch=NO_EPOCH, promised=NO_EPOCH)


def test_10_an_empty_intermediate_serves_nobody_beside_a_secondary_that_has_worked_though_nothing_reached_it() -> None:
    role = new_intermediate()
    role.connected(104, S1, NONCE, 0.0)
    role.received(104, Message.WELCOME, report(S1), 0.0)
    assert (role.phase, "replace --node i" in role.opening.reason) == (Phase.FENCED, True)


def test_10_nor_beside_a_primary_that_has_worked_and_never_made_a_checkpoint() -> None:
    """What it had completed was in the lost journal only: it would replay nothing, and serve what it has."""
    role = new_intermediate()
    actions = greet(role, 1, epoch=ONE, fresh=True, highest=0)
    assert "replace --node i" in next(each.reason for each in actions if isinstance(each, Close))
    assert role.phase is Phase.FENCED


@pytest.mark.parametrize("suspended", [False, True])
def test_10_nor_when_all_secondaries_are_new_too_and_it_has_opened_an_epoch_with_them(suspended: bool) -> None:
    """The primary's bits, or its replay, would be all that they get, and that would be called PAIR."""
    role = serving(intermediate(epoch=TWO, promised=TWO), epoch=TWO, promised=TWO)
    actions = greet(role, 1, epoch=ONE, suspended=suspended)
    assert "never opened" in next(each.reason for each in actions if isinstance(each, Close))
    assert not role.senders.by_node[1].live


def test_10_a_primary_whose_epoch_is_in_the_history_is_welcomed_and_so_is_one_that_a_reform_left_behind() -> None:
    for known in ({"history": [(ONE, 0)]}, {"reforms": [ONE]}):
        role = serving(intermediate(epoch=TWO, promised=TWO, **known), epoch=TWO, promised=TWO)
        assert one(greet(role, 1, epoch=ONE, suspended="reforms" in known), Message.WELCOME)["epoch"] == TWO


def test_25_a_promised_reform_is_remembered_after_it_led_nowhere() -> None:
    role = intermediate()
    role.accepted(9, hello(LinkRole.REFORMER, S1, MID), 0.0)
    role.opening.asked_to_promise(9, {"epoch": THREE, "dry_run": False, "reform": True}, 0.0)
    assert role.state.reforms == [THREE]


def test_23_a_takeover_that_died_before_anything_was_replicated_is_superseded_by_the_first_epoch() -> None:
    role = new_intermediate()
    for node in (S1, S2):
        role.connected(100 + node, node, NONCE, 10.0)
        role.received(100 + node, Message.WELCOME, report(node, rolling=True), 10.0)
    assert role.phase is Phase.OPENING
    assert role.opening.higher.number == 2


def test_23_one_that_has_to_be_finished_first_is_named_by_an_intermediate_that_is_new() -> None:
    role = new_intermediate()
    role.connected(104, S1, NONCE, 0.0)
    role.received(104, Message.WELCOME, report(S1, rolling=True, through=5, prepared=7), 0.0)
    assert role.phase is Phase.FENCED
    assert "has not ended: blockrepl takeover, then blockrepl replace --node i" in role.opening.reason


def test_after_a_takeover_the_pair_commands_name_the_state_and_what_comes_first() -> None:
    role = intermediate()
    active = {"epoch": TWO, "promised": TWO, "code": int(Refusal.ACTIVE), "text": "s1 has taken over"}
    role.opening.refused(S1, active, 1.0)
    for command in (role.pairing.delete, role.pairing.resync):
        with pytest.raises(UsageError, match="not possible in state SSWS: the secondary site has taken over") as caught:
            command(now_s=2.0)
        assert "pair resync --swap" in str(caught.value.hint)


def test_one_that_waits_for_its_replacement_says_so_to_who_types_a_command() -> None:
    role = intermediate(epoch=NO_EPOCH, promised=NO_EPOCH)
    role.opening.behind("s1 holds number 2")
    with pytest.raises(UsageError, match=r"fenced: this intermediate is new: .*blockrepl replace"):
        role.pairing.delete(now_s=2.0)
