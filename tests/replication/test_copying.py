"""A secondary between START and END, split, and formed anew: what is durable before what (rules 18, 20, 23 to 25)."""

from __future__ import annotations

from typing import Any

import pytest

from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError, SequenceGapError
from blockrepl.formats.link import Epoch, LinkRole, Message
from blockrepl.formats.record import RecordFlag, RecordKind, control_record, decode_record, number_record
from blockrepl.replication.actions import Action, Apply, Truncate
from blockrepl.replication.secondary import Phase
from blockrepl.replication.takeover_report import between
from tests.replication.roles import GROUP, MID, ONE, S1, S2, THREE, TWO, arrives, hello, numbered, one, secondary, words

JUMP, INITIAL = int(RecordFlag.JUMP), int(RecordFlag.INITIAL)


def following(**state: Any) -> Any:
    """A secondary with its intermediate on link 7."""
    role = secondary(**state)
    role.accepted(7, hello(LinkRole.INTERMEDIATE, MID, S1), 0.0)
    return role


def control(role: Any, kind: RecordKind, number: int, previous: int, back: int, flags: int = 0) -> list[Action]:
    """A START or END arrives, and is noted as prepared."""
    record = control_record(kind, GROUP, MID, S1, 1, back, flags)
    number_record(record, 0, 1, number, previous, 0)
    chunk = Chunk(len(record), None)
    chunk.view[:] = record
    role.record(7, decode_record(chunk.view), 1, chunk.view, chunk)
    return prepared(role, number)


def prepared(role: Any, number: int) -> list[Action]:
    received = role.received
    role.received_message(7, Message.PREPARE, {"number": number, "stream_last": received}, 1, 0.0)
    actions: list[Action] = role.noted(number, 1, 0.0, received)
    return actions


def validate(role: Any, number: int) -> list[Action]:
    actions: list[Action] = role.received_message(7, Message.VALIDATE, {"number": number}, 1, 0.0)
    return actions


def finish(role: Any, actions: list[Action]) -> list[Action]:
    """What the first action with a token brings about."""
    token = next(action.token for action in actions if hasattr(action, "token"))
    done: list[Action] = role.done(token, 0.0)
    return done


def cut(role: Any, actions: list[Action]) -> list[Action]:
    """The journal was truncated, or counted."""
    [action] = actions
    assert isinstance(action, Truncate)
    done: list[Action] = role.truncated(action.token, 0, 0, 50, 0.0)
    return done


def copying() -> Any:
    """At 50 when a copy began with START 51; 60 is applied."""
    role = following(held=50, prepared=50, validated=50, applied=50)
    control(role, RecordKind.START, 51, 50, 50)
    role.record(7, *_record(60, 51))
    prepared(role, 60)
    finish(role, finish(role, validate(role, 60)))
    role.was_applied(60, 0.0)
    return role


def _record(number: int, previous: int) -> tuple[Any, int, Any, Any]:
    head, record, chunk = numbered(number, previous)
    return head, 1, record, chunk


def test_18_what_is_prepared_and_not_validated_is_kept_while_the_group_is_split() -> None:
    role = following(held=9, prepared=9, validated=5, applied=5)
    actions = role.received_message(7, Message.SPLIT, {"number": 5, "writable": False}, 1, 0.0)
    assert words(actions) == ["SyncVolumes"]
    actions = finish(role, actions)
    assert words(actions) == ["SaveState"]
    assert words(finish(role, actions)) == ["Publish", "Event"]
    assert (role.received, role.state.prepared, role.state.split) == (9, 9, True)
    assert validate(role, 9) == []  # what was in flight at the suspension waits for REJOIN


def test_18_a_split_is_published_only_when_it_is_applied_synced_and_stored() -> None:
    role = following(held=9, prepared=9, validated=5, applied=5)
    actions = role.received_message(7, Message.SPLIT, {"number": 9, "writable": True}, 1, 0.0)
    assert actions == [Apply(9)]
    assert words(role.was_applied(9, 0.0)) == ["SyncVolumes"]


def test_18_hosts_are_stopped_and_the_state_says_so_before_their_bits_are_told() -> None:
    """Else a secondary that starts again publishes, and a host writes what nobody will hear of."""
    role = following(held=9, prepared=9, validated=9, applied=9, split=True, split_writable=True)
    assert words(role.start()) == ["Publish"]
    actions = role.received_message(7, Message.REJOIN, {"number": 9}, 1, 0.0)
    assert words(actions) == ["Withdraw"]
    actions = finish(role, actions)
    assert words(actions) == ["SaveState"]
    assert not role.state.split
    assert words(finish(role, actions)) == ["REJOINED"]


def test_20_nothing_above_its_number_is_applied_before_undo_file_and_state_are_durable() -> None:
    role = following(held=50, prepared=50, validated=50, applied=50)
    control(role, RecordKind.START, 51, 50, 50)
    role.record(7, *_record(60, 51))
    prepared(role, 60)
    actions = validate(role, 60)
    assert words(actions) == ["OpenUndo"]
    actions = finish(role, actions)
    assert words(actions) == ["SaveState"]
    assert (role.state.copying, role.state.copy_from) == (True, 50)
    assert Apply(60, undo=True) in finish(role, actions)


def test_20_what_lies_below_the_start_is_applied_in_order_first() -> None:
    role = following(held=50, prepared=50, validated=30, applied=30)
    control(role, RecordKind.START, 51, 50, 50)
    assert validate(role, 51) == [Apply(50)]
    assert words(role.was_applied(50, 0.0)) == ["OpenUndo"]


def test_20_the_undo_goes_when_images_and_state_are_durable_behind_the_end_and_not_before() -> None:
    role = copying()
    control(role, RecordKind.END, 61, 60, 51)
    assert validate(role, 61) == [Apply(61, undo=True)]
    actions = role.was_applied(61, 0.0)
    assert words(actions) == ["SyncVolumes"]
    assert role.state.copying
    actions = finish(role, actions)
    assert words(actions) == ["SaveState"]
    assert (role.state.copying, role.state.applied) == (False, 61)
    assert words(finish(role, actions))[0] == "DropUndo"


def test_20_nothing_beyond_the_end_is_applied_before_the_copy_has_ended() -> None:
    role = copying()
    control(role, RecordKind.END, 61, 60, 51)
    role.record(7, *_record(70, 61))
    prepared(role, 70)
    assert validate(role, 70) == [Apply(61, undo=True)]
    actions = finish(role, finish(role, role.was_applied(61, 0.0)))
    assert Apply(70) in actions


def test_20_a_start_jumps_only_if_it_says_so() -> None:
    role = following(held=50, prepared=50, validated=50, applied=50)
    with pytest.raises(SequenceGapError):
        control(role, RecordKind.START, 101, 100, 50)
    control(role, RecordKind.START, 101, 100, 50, JUMP)
    assert role.received == 101


def test_20_a_jump_never_goes_back_to_what_is_not_held_or_is_passed() -> None:
    role = following(held=50, prepared=50, validated=50, applied=50)
    with pytest.raises(ProtocolError, match="only 50 is held"):
        control(role, RecordKind.START, 101, 100, 60, JUMP)
    with pytest.raises(ProtocolError, match="50 is applied"):
        control(role, RecordKind.START, 101, 100, 40, JUMP)


def test_20_between_start_and_end_the_promise_says_so() -> None:
    role = copying()
    fields = _promise(role)
    assert (fields["copying"], fields["copy_from"], fields["initial"], fields["end"]) == (True, 50, False, 0)
    role = copying()
    control(role, RecordKind.END, 61, 60, 51)
    assert _promise(role)["end"] == 61
    role = following(held=50, prepared=50, validated=50, applied=50)
    control(role, RecordKind.START, 51, 50, 50, INITIAL)  # held is enough: it may be validated elsewhere
    assert (_promise(role)["copying"], _promise(role)["initial"]) == (True, True)


def _promise(role: Any, epoch: Any = TWO, **more: Any) -> dict[str, Any]:
    role.accepted(3, hello(LinkRole.OPENER, S2, S1), 0.0)
    told = actions = role.received_message(
        3, Message.PROMISE, arrives(Message.PROMISE, epoch=epoch, dry_run=False, **more), 0, 0.0
    )
    while any(hasattr(action, "token") for action in actions):
        actions = [each for action in actions if hasattr(action, "token") for each in role.done(action.token, 0.0)]
        told = told + actions
    return one(told, Message.PROMISED)


def _store(role: Any, number: int, epoch: Any = TWO, **more: Any) -> list[Action]:
    fields = arrives(
        Message.STORE,
        **{"promise": epoch, "epoch": epoch, "number": number, "truncate": True, "members": [S1, S2], "dry_run": False,
           **more},
    )  # fmt: skip
    actions: list[Action] = role.received_message(3, Message.STORE, fields, 0, 0.0)
    return actions


def test_23_a_takeover_that_goes_back_stops_applying_stores_its_epoch_restores_and_only_then_says_so() -> None:
    role = copying()
    _promise(role)
    actions = _store(role, 50)
    assert words(actions) == ["HaltApply"]
    actions = finish(role, actions)
    assert words(actions) == ["Truncate"]
    assert role.state.epoch == ONE  # only counted
    actions = cut(role, actions)
    assert (words(actions), role.state.epoch, role.state.rolling) == (["Truncate"], TWO, True)
    actions = cut(role, actions)
    assert words(actions) == ["RestoreUndo"]
    actions = finish(role, actions)
    assert words(actions) == ["SaveState"]
    assert (role.state.copying, role.state.applied) == (False, 50)
    actions = finish(role, actions)
    assert words(actions)[0] == "DropUndo"
    assert "STORED" in words(finish(role, finish(role, actions)))
    assert (role.phase, role.applied, role.validated) == (Phase.STORED, 50, 50)


def test_23_a_takeover_that_went_back_goes_on_where_it_was_after_a_crash() -> None:
    role = secondary(epoch=TWO, promised=TWO, number=50, rolling=True, copying=True, copy_from=50, start=51, held=50,
                     prepared=50, validated=50, applied=40)  # fmt: skip
    actions = role.start()
    actions = cut(role, actions)
    assert actions == [Apply(50)]  # the power may have taken some of what the copy found
    assert words(role.was_applied(50, 0.0)) == ["RestoreUndo"]


def test_23_a_takeover_cannot_go_back_below_what_is_validated_but_to_a_copys_number() -> None:
    role = copying()
    _promise(role)
    with pytest.raises(ProtocolError, match="takeover at 49"):
        _store(role, 49)


def test_24_an_active_secondary_that_is_behind_takes_the_hello_of_the_intermediate() -> None:
    """It missed that the group was formed anew: to refuse as one that has taken over would stop production."""
    role = secondary(epoch=TWO, promised=TWO, active=True, number=4, held=4, prepared=4)
    assert words(role.accepted(7, hello(LinkRole.INTERMEDIATE, MID, S1, epoch=TWO, promised=TWO), 0.0)) == ["Close"]
    assert one(role.accepted(8, hello(LinkRole.INTERMEDIATE, MID, S1, epoch=THREE), 0.0), Message.WELCOME)["active"]


def test_25_a_source_promises_a_reform_durably_and_serves_on() -> None:
    role = secondary(epoch=ONE, promised=ONE, active=True, number=4, held=4, prepared=4)
    assert _promise(role)["epoch"] == ONE, "no takeover binds it"
    assert _promise(role, reform=True)["epoch"] == TWO
    assert (role.phase, role.state.promised) == (Phase.ACTIVE, TWO)


def test_25_a_target_brings_its_images_to_its_number_before_it_forgets_its_journal() -> None:
    role = following(held=9, prepared=9, validated=5, applied=5)
    _promise(role)
    reform = {"truncate": False, "reform": True, "source": False, "initial": False, "direction": 1}
    actions = _store(role, 100, **reform)
    assert (words(actions), role.durable_state().validated) == (["SaveState"], 9)
    assert finish(role, actions) == [Apply(9)]
    actions = role.was_applied(9, 0.0)
    assert words(actions) == ["SyncVolumes"]
    actions = finish(role, actions)
    assert words(actions) == ["OpenUndo"]
    assert role.state.epoch == ONE
    actions = finish(role, actions)
    assert words(actions) == ["Forget"]
    state = role.state
    assert (state.epoch, state.copying, state.copy_from, state.applied, state.held) == (TWO, True, 100, 100, 100)
    assert "STORED" in words(finish(role, actions))
    assert role.phase is Phase.FOLLOWING


def test_25_a_source_says_with_its_promise_that_it_was_alone() -> None:
    role = secondary(epoch=ONE, promised=ONE, active=True, number=4, held=4, prepared=4)
    role.alone = lambda: True
    assert _promise(role, reform=True)["alone"]


TARGET = {"truncate": False, "reform": True, "source": False, "direction": 1}


@pytest.mark.parametrize("initial", [False, True])
def test_8_a_target_applies_all_it_holds_since_the_sources_bits_may_begin_above_what_is_validated_here(
    initial: bool,
) -> None:
    """The sources hear of a validated number before the targets do: what lies below it, nobody copies again."""
    role = following(held=9, prepared=8, validated=5, applied=5)
    _promise(role)
    actions = _store(role, 100, initial=initial, **TARGET)
    assert (words(actions), role.durable_state().validated) == (["SaveState"], 9), "no takeover goes back behind it"
    assert finish(role, actions) == [Apply(9)]
    assert words(role.was_applied(9, 0.0)) == ["SyncVolumes"]


def test_8_so_does_one_that_is_split_and_its_hosts_are_stopped_first() -> None:
    role = secondary(held=9, prepared=9, validated=5, applied=5, split=True)
    _promise(role)
    actions = _store(role, 100, initial=True, **TARGET)
    assert (words(actions), role.state.split) == (["Withdraw"], True)
    actions = finish(role, actions)
    assert (words(actions), role.state.split) == (["SaveState"], False)
    assert finish(role, actions) == [Apply(9)]


@pytest.mark.parametrize("initial", [False, True])
def test_20_a_target_that_holds_an_end_goes_forward_since_it_may_be_valid_and_all_bits_gone(initial: bool) -> None:
    role = copying()
    control(role, RecordKind.END, 70, 60, 51)
    _promise(role)
    actions = finish(role, _store(role, 100, initial=initial, **TARGET))
    assert actions == [Apply(70, undo=True)]
    actions = finish(role, role.was_applied(70, 0.0))
    assert (words(actions), role.state.copying) == (["SaveState"], False)
    assert "DropUndo" in words(finish(role, actions))


def test_20_a_target_in_mid_copy_drops_what_it_will_undo() -> None:
    """The sources keep the bits of all of it until an END is valid."""
    role = copying()
    role.record(7, *_record(65, 60))
    prepared(role, 65)
    _promise(role)
    assert words(_store(role, 100, initial=False, **TARGET)) == ["SyncVolumes"]
    assert role.applied == 60


def test_25_a_source_that_becomes_a_target_stops_its_hosts_first() -> None:
    role = secondary(epoch=ONE, promised=ONE, active=True, number=4, held=4, prepared=4, applied=4)
    _promise(role, reform=True)
    reform = {"truncate": False, "reform": True, "source": False, "initial": True, "direction": 1}
    actions = _store(role, 100, **reform)
    assert (words(actions), role.phase) == (["Withdraw"], Phase.ACTIVE)
    actions = finish(role, finish(role, actions))
    assert words(actions) == ["Forget"]
    assert (role.phase, role.state.active, role.state.initial) == (Phase.FOLLOWING, False, True)


def test_25_formed_anew_with_nothing_to_go_back_to_it_is_at_no_number_before_any_record_came() -> None:
    """What it holds stands for no number of the group: a takeover then is one of an initial copy."""
    role = secondary(epoch=ONE, promised=ONE, number=4, held=4, prepared=4, applied=4)
    _promise(role, reform=True)
    reform = {"truncate": False, "reform": True, "source": False, "initial": True, "direction": 1}
    finish(role, finish(role, _store(role, 100, **reform)))
    answer = _promise(role, THREE)
    assert (answer["held"], answer["initial"]) == (100, True)
    assert between(answer, 100)


def test_25_a_reform_that_another_one_overtook_leaves_a_source_serving() -> None:
    role = secondary(epoch=ONE, promised=ONE, active=True, number=4, held=4, prepared=4, applied=4)
    _promise(role, reform=True)
    reform = {"truncate": False, "reform": True, "source": False, "initial": True, "direction": 1}
    actions = finish(role, _store(role, 100, **reform))
    _promise(role, THREE, reform=True)
    actions = finish(role, actions)
    assert words(actions) == ["STORED", "Publish"]
    assert (role.phase, role.state.epoch) == (Phase.ACTIVE, ONE)


def test_25_an_intermediate_that_replaces_a_lost_one_is_let_in_though_it_counts_its_processes_from_one_again() -> None:
    def greeted(link: int, epoch: Epoch, incarnation: int) -> list[str]:
        fields = hello(LinkRole.INTERMEDIATE, MID, S1, epoch=epoch, promised=epoch, incarnation=incarnation)
        return words(role.accepted(link, fields, 0.0))

    role = secondary()
    assert greeted(7, ONE, 3) == ["WELCOME"]
    assert greeted(8, ONE, 1) == ["Close"], "a process of the same intermediate that is dead"
    role.state.epoch = role.state.promised = TWO  # a reform has reached this target, and the new intermediate
    assert greeted(9, TWO, 1) == ["Close", "WELCOME"]
    assert greeted(10, ONE, 3)[-1] == "WELCOME", "the lost one's HELLO, read late"
    assert greeted(11, TWO, 1) == ["Close", "WELCOME"], "locks the new one out for no longer than that"


def test_20_a_copy_that_has_not_begun_goes_back_to_the_lower_number_that_a_later_start_says() -> None:
    """Found by the simulator: another secondary never got as far as the first START says."""
    role = following(held=12, prepared=12, validated=8, applied=8)
    control(role, RecordKind.START, 14, 12, 12)
    control(role, RecordKind.START, 16, 14, 8, JUMP)
    promised = _promise(role)
    assert (promised["copying"], promised["copy_from"]) == (True, 8)


def test_20_a_later_start_never_lowers_the_number_below_what_is_applied() -> None:
    role = following(held=12, prepared=12, validated=10, applied=10)
    control(role, RecordKind.START, 14, 12, 12)
    with pytest.raises(ProtocolError, match="more is applied"):
        control(role, RecordKind.START, 16, 14, 8, JUMP)
