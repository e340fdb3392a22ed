"""The schedules that PROTOCOL.md's rules forbid, one test each; the number is the rule's."""

from __future__ import annotations

from typing import Any

import pytest

from blockrepl.errors import ProtocolError, SequenceGapError
from blockrepl.formats.link import LinkRole, Message, Refusal
from blockrepl.replication import opening
from blockrepl.replication.actions import (
    Append,
    AppendNote,
    Apply,
    Close,
    Event,
    FailBatch,
    Replay,
    SaveState,
    StoreBatch,
    StoreRecord,
    SyncVolumes,
)
from blockrepl.replication.primary import Phase as PrimaryPhase
from blockrepl.replication.secondary import Phase
from tests.replication.roles import (
    FREE,
    MID,
    NONCE,
    ONE,
    P1,
    P2,
    POLICY,
    S1,
    S2,
    THREE,
    TWO,
    arrives,
    greet,
    hello,
    intermediate,
    live,
    messages,
    numbered,
    one,
    primary,
    report,
    saved,
    secondary,
    send_batch,
    serving,
    welcome,
    words,
    write,
)


def follow(role: Any, link: int = 7, **fields: Any) -> Any:
    """The intermediate connects to a secondary."""
    role.accepted(link, hello(LinkRole.INTERMEDIATE, MID, role.node, **fields), 0.0)
    return role


# 1 to 7: writing


def test_1_a_hello_of_a_dead_incarnation_does_not_kill_the_live_connection() -> None:
    role = serving(intermediate())
    greet(role, 1, incarnation=2)
    actions = greet(role, 2, incarnation=1)
    assert [(each.link, words([each])) for each in actions if isinstance(each, Close)] == [(2, ["Close"])]
    assert role.senders.by_node[P1].link == 1


def test_1_a_new_connection_kills_the_older_one_and_its_unread_batches() -> None:
    role = serving(intermediate())
    greet(role, 1)
    actions = greet(role, 2, incarnation=2)
    assert [each.link for each in actions if isinstance(each, Close)] == [1]
    assert send_batch(role, 1, 1) == []
    assert role.numbered == 0


def test_1_a_batch_of_another_incarnation_is_not_numbered_on_a_live_link() -> None:
    role = serving(intermediate())
    greet(role, 1, incarnation=2)
    with pytest.raises(ProtocolError):
        send_batch(role, 1, 1, incarnation=1)
    assert role.numbered == 0


def test_1_a_resent_batch_is_answered_from_the_durable_watermark_only() -> None:
    role = serving(intermediate())
    greet(role, 1)
    send_batch(role, 1, 1)
    assert words(send_batch(role, 1, 1)) == []  # appended, not synced: not "duplicate, fine"
    role.durable(1, 0.0)
    assert one(send_batch(role, 1, 1), Message.ACK)["batch"] == 1
    assert role.numbered == 1


def test_1_a_gap_in_the_batches_closes_the_link() -> None:
    role = serving(intermediate())
    greet(role, 1)
    with pytest.raises(SequenceGapError):
        send_batch(role, 1, 2)


def test_1_a_new_incarnation_is_durable_before_it_is_welcomed() -> None:
    """Else a restarted intermediate takes the dead one's HELLO for the newer."""
    role = serving(intermediate())
    actions = role.accepted(1, hello(LinkRole.PRIMARY, P1, MID, incarnation=5), 0.0)
    assert words(actions) == ["SaveState"]
    assert role.durable_state().primaries[0].incarnation == 5
    assert words(saved(role, actions)) == ["WELCOME"]


def test_1_a_welcome_must_echo_the_nonce() -> None:
    role = primary()
    role.connected(1, NONCE, 0.0)
    with pytest.raises(ProtocolError):
        role.received(1, Message.WELCOME, welcome(nonce=b"o" * 16), 0.0)


def test_2_nothing_is_acknowledged_before_it_is_durable() -> None:
    role = serving(intermediate())
    greet(role, 1)
    greet(role, 2, P2)
    assert words(send_batch(role, 1, 1)) == ["Append"]
    assert words(send_batch(role, 2, 1, sender=P2)) == ["Append"]
    acks = [(link, fields["number"]) for link, kind, fields in messages(role.durable(1, 0.0)) if kind == Message.ACK]
    assert acks == [(1, 1)]


def test_3_a_write_is_stored_when_it_is_acknowledged_and_not_before() -> None:
    role = live(primary())
    assert words(role.submit(1, write(), 0.0)) == ["BATCH"]
    actions = role.received(
        1, Message.ACK, {"incarnation": 1, "batch": 1, "number": 1, "validated": 0, "credit": FREE}, 0.0
    )
    assert [type(action) for action in actions] == [StoreBatch]


def test_1_an_acknowledgement_for_a_dead_process_completes_nothing_of_the_living_one() -> None:
    """Its batches have the same numbers; the frame may come late, on a later connection."""
    role = live(primary(incarnation=2))
    role.submit(1, write(), 0.0)
    late = {"incarnation": 1, "batch": 1, "number": 1, "validated": 0, "credit": FREE}
    assert role.received(1, Message.ACK, late, 0.0) == []
    assert [type(each) for each in role.received(1, Message.ACK, {**late, "incarnation": 2}, 0.0)] == [StoreBatch]


def test_3_writes_are_sent_again_in_the_order_in_which_they_are_to_win() -> None:
    role = live(primary())
    for offset in (0, 512, 1024):
        role.submit(1, write(offset=offset), 0.0)
    role.lost(1, 0.0)
    role.submit(1, write(offset=1536), 0.0)
    role.connected(2, NONCE, 0.0)
    actions = role.received(2, Message.WELCOME, welcome(through=2, batch=1, credit=FREE), 0.0)
    assert [type(action) for action in actions if isinstance(action, StoreBatch)] == [StoreBatch]
    assert [record.number for record in role.queue.sent] == [2, 3, 4]


def test_6_nothing_is_sent_beyond_the_credit_and_the_rest_goes_when_it_rises() -> None:
    role = live(primary(), credit=4096)
    assert words(role.submit(1, write(), 0.0)) == ["BATCH"]
    assert words(role.submit(1, write(), 0.0)) == []
    beat = {"stamp_ns": 1, "echo_ns": 0, "numbered": 0, "validated": 0, "applied": 0, "credit": 8192, "pair": 2}
    assert words(role.received(1, Message.HEARTBEAT, beat, 0.0)) == ["BATCH"]


def test_6_a_batch_beyond_the_credit_is_refused() -> None:
    role = serving(intermediate(free_bytes=4096 * 8))
    greet(role, 1)
    send_batch(role, 1, 1)
    send_batch(role, 1, 2)
    with pytest.raises(ProtocolError, match="credit"):
        send_batch(role, 1, 3)


def test_6_a_reconnect_leaks_no_credit() -> None:
    role = serving(intermediate(free_bytes=1 << 16))
    granted = {one(greet(role, link), Message.WELCOME)["credit"] for link in range(1, 20)}
    assert granted == {(1 << 16) // 4}


def test_7_a_started_primary_serves_nothing_until_it_has_replayed_and_settled() -> None:
    role = primary(checkpoint=3, epoch=ONE, promised=ONE)
    seen = [role.serving]
    role.connected(1, NONCE, 0.0)
    seen.append(role.serving)
    actions = role.received(1, Message.WELCOME, welcome(through=9), 0.0)
    assert one(actions, Message.REPLAY) == {"after": 3}
    head, record, _ = numbered(9, 3)
    assert [type(each) for each in role.record(1, head, record, 0.0)] == [StoreRecord]
    seen.append(role.serving)
    actions = role.received(1, Message.REPLAYED, {"through": 9}, 0.0)
    assert [type(each) for each in actions] == [SyncVolumes]
    seen.append(role.serving)
    token = actions[0].token  # type: ignore[union-attr]
    actions = role.volumes_synced(token, 0.0)
    seen.append(role.serving)
    assert one(saved(role, actions), Message.CHECKPOINT) == {"number": 9}
    assert seen == [False] * 5
    assert role.serving


def test_7_welcome_waits_until_all_of_the_dead_process_is_durable_and_names_it() -> None:
    role = serving(intermediate())
    greet(role, 1)
    send_batch(role, 1, 1)
    assert words(greet(role, 2, incarnation=2, fresh=True)) == ["Close", "SaveState"]
    fields = one(role.durable(1, 0.0), Message.WELCOME)
    assert (fields["through"], fields["batch"]) == (1, 0)


def test_7_a_replay_that_breaks_off_begins_again_from_the_checkpoint() -> None:
    role = primary(checkpoint=3, epoch=ONE, promised=ONE)
    role.connected(1, NONCE, 0.0)
    role.received(1, Message.WELCOME, welcome(through=9), 0.0)
    head, record, _ = numbered(8, 3)
    role.record(1, head, record, 0.0)
    role.lost(1, 0.0)
    assert role.phase is PrimaryPhase.FRESH
    role.connected(2, NONCE, 0.0)
    assert one(role.received(2, Message.WELCOME, welcome(through=9), 0.0), Message.REPLAY) == {"after": 3}


def test_7_the_intermediate_replays_to_the_number_that_its_welcome_named() -> None:
    role = serving(intermediate())
    greet(role, 1)
    send_batch(role, 1, 1)
    role.durable(1, 0.0)
    greet(role, 2, incarnation=2)
    actions = role.received(2, Message.REPLAY, {"after": 0}, 0.0)
    assert [(each.after, each.through) for each in actions if isinstance(each, Replay)] == [(0, 1)]


# 9 to 12: journal


def test_10_an_intermediate_that_recovered_less_than_a_primary_saw_acknowledged_stops() -> None:
    role = serving(intermediate(durable=7))
    actions = greet(role, 1, highest=9)
    assert role.phase is opening.Phase.FAILED
    assert words(actions) == ["Event", "Close"]


def test_10_an_intermediate_that_recovered_less_than_a_secondary_holds_stops() -> None:
    role = intermediate(durable=7)
    role.connected(104, S1, NONCE, 0.0)
    role.received(104, Message.WELCOME, report(S1, through=9), 0.0)
    assert role.phase is opening.Phase.FAILED


def test_11_after_a_disk_error_a_primary_completes_nothing_and_every_waiting_write_fails() -> None:
    role = live(primary())
    role.submit(1, write(), 0.0)
    actions = role.failed("EIO")
    assert words(actions) == ["Event", "FailBatch", "Close"]
    assert [type(each) for each in role.submit(1, write(), 0.0)] == [FailBatch]
    assert not role.serving


def test_11_a_note_that_is_told_after_an_error_is_answered_by_nothing() -> None:
    role = follow(secondary())
    role.received_message(7, Message.PREPARE, {"number": 3, "stream_last": 0}, 1, 0.0)
    role.fail("EIO")
    assert role.noted(3, 1, 0.0) == []
    assert role.state.prepared == 0


def test_12_a_record_is_kept_until_its_own_primary_has_checkpointed_it() -> None:
    role = serving(intermediate())
    greet(role, 1)
    send_batch(role, 1, 1)
    role.durable(1, 0.0)
    role.transmitted(S1, 104, 1, 4096, 0.0)
    role.tick(1.0, 1)
    for link in (104, 105):
        role.received(link, Message.PREPARED, {"epoch_number": 1, "number": 1, "applied": 0, "credit": FREE}, 1.0)
    assert (role.streams.validated, role.releasable) == (1, 0)
    role.received(1, Message.CHECKPOINT, {"number": 1}, 1.0)
    assert role.releasable == 1


def test_12_a_checkpoint_of_what_was_never_given_is_refused() -> None:
    role = serving(intermediate())
    greet(role, 1)
    with pytest.raises(ProtocolError):
        role.received(1, Message.CHECKPOINT, {"number": 1}, 0.0)


# 13 and 14: sending


def test_13_a_gap_in_a_stream_is_refused_and_a_record_that_is_held_is_dropped() -> None:
    role = follow(secondary(held=4))
    head, record, chunk = numbered(9, 6)
    with pytest.raises(SequenceGapError):
        role.record(7, head, 1, record, chunk)
    head, record, chunk = numbered(4, 2)
    assert role.record(7, head, 1, record, chunk) == []
    head, record, chunk = numbered(6, 4)
    assert [type(each) for each in role.record(7, head, 1, record, chunk)] == [Append]


def test_13_a_record_of_another_epoch_is_refused() -> None:
    role = follow(secondary())
    head, record, chunk = numbered(1, 0)
    with pytest.raises(ProtocolError):
        role.record(7, head, 2, record, chunk)


def test_14_prepared_is_answered_when_the_note_is_durable_and_not_before() -> None:
    role = follow(secondary())
    actions = role.received_message(7, Message.PREPARE, {"number": 8, "stream_last": 0}, 1, 0.0)
    assert [type(each) for each in actions] == [AppendNote]
    assert one(role.noted(8, 1, 0.0), Message.PREPARED)["number"] == 8


def test_14_prepare_of_what_has_not_come_is_refused() -> None:
    role = follow(secondary())
    with pytest.raises(SequenceGapError):
        role.received_message(7, Message.PREPARE, {"number": 8, "stream_last": 5}, 1, 0.0)


def test_14_idle_secondaries_are_asked_too_and_nothing_is_validated_before_all_have_answered() -> None:
    role = serving(intermediate())
    greet(role, 1)
    send_batch(role, 1, 1)
    actions = role.durable(1, 0.0) + role.transmitted(S1, 104, 1, 4096, 0.0) + role.tick(1.0, 1)
    asked = {link: fields for link, kind, fields in messages(actions) if kind == Message.PREPARE}
    assert asked == {104: {"number": 1, "stream_last": 1}, 105: {"number": 1, "stream_last": 0}}
    answer = {"epoch_number": 1, "number": 1, "applied": 0, "credit": FREE}
    assert "VALIDATE" not in words(role.received(105, Message.PREPARED, answer, 1.0))
    actions = role.received(104, Message.PREPARED, answer, 1.0)
    assert [link for link, kind, _ in messages(actions) if kind == Message.VALIDATE] == [104, 105]


def test_14_prepared_of_an_older_epoch_says_nothing_about_this_one() -> None:
    role = serving(intermediate())
    greet(role, 1)
    send_batch(role, 1, 1)
    role.durable(1, 0.0)
    role.transmitted(S1, 104, 1, 4096, 0.0)
    role.tick(1.0, 1)
    late = {"epoch_number": 0, "number": 1, "applied": 0, "credit": FREE}
    for link in (104, 105):
        assert role.received(link, Message.PREPARED, late, 1.0) == []
    assert role.streams.valid_counter == 0


def test_14_a_secondary_applies_only_what_is_validated_and_is_told_only_what_it_prepared() -> None:
    role = follow(secondary(prepared=5, held=5))
    with pytest.raises(ProtocolError):
        role.received_message(7, Message.VALIDATE, {"number": 6}, 1, 0.0)
    assert role.received_message(7, Message.VALIDATE, {"number": 5}, 1, 0.0) == [Apply(5)]


def test_14_after_a_restart_the_highest_number_that_a_secondary_saw_validated_counts() -> None:
    role = intermediate(durable=9, validated=2)
    for node, validated in ((S1, 6), (S2, 5)):
        role.connected(100 + node, node, NONCE, 0.0)
        role.received(100 + node, Message.WELCOME, report(node, prepared=6, validated=validated), 0.0)
    assert role.streams.validated == 6


# 15: fence data


def test_15_a_held_write_fails_in_time_and_its_range_is_not_read_until_its_fate_is_known() -> None:
    role = live(primary())
    role.submit(1, write(), 0.0)
    role.lost(1, 0.0)
    actions = role.tick(POLICY.hold_s + 1, 1)
    assert [type(each) for each in actions if isinstance(each, FailBatch)] == [FailBatch]
    assert (role.readable(1, 0, 512), role.readable(1, 512, 512)) == (False, True)
    role.connected(2, NONCE, 0.0)
    actions = role.received(2, Message.WELCOME, welcome(through=1, batch=1, credit=FREE), 0.0)
    assert [each.report for each in actions if isinstance(each, StoreBatch)] == [False]
    assert role.readable(1, 0, 512)


# 22 to 24: epochs


def test_22_two_stored_epochs_of_one_number_are_split_brain() -> None:
    role = intermediate()
    role.connected(104, S1, NONCE, 0.0)
    role.received(104, Message.WELCOME, report(S1, epoch=ONE._replace(id=b"?" * 16)), 0.0)
    assert role.phase is opening.Phase.FAILED
    assert "split brain" in role.opening.reason
    refused = secondary().accepted(7, hello(LinkRole.INTERMEDIATE, MID, S1, epoch=ONE._replace(id=b"?" * 16)), 0.0)
    assert words(refused) == ["Close"]


def test_22_so_they_are_between_a_primary_and_the_intermediate() -> None:
    """Each refuses the other, and the primary goes on with neither: not alone, and not in the other's epoch."""
    other = ONE._replace(id=b"?" * 16)
    refused = greet(serving(intermediate()), 1, epoch=other)
    assert "split brain" in next(each.reason for each in refused if isinstance(each, Close))
    role = live(primary(epoch=other, promised=other), epoch=other)
    role.lost(1, 0.0)
    role.connected(2, NONCE, 0.0)
    actions = role.received(2, Message.WELCOME, welcome(), 0.0)
    assert [type(each) for each in actions if not isinstance(each, Event)] == [Close]
    assert (role.state.epoch, "split brain" in role.why_held(), role.readable(1, 0, 512)) == (other, True, False)
    role.lost(2, 0.0)
    role.connected(3, NONCE, 0.0)
    role.parted = ""
    role.received(3, Message.REFUSED, {"code": Refusal.EPOCH, "epoch": ONE, "promised": ONE, "text": "no"}, 0.0)
    assert "split brain" in role.why_held()


def promise(role: Any, link: int = 3, epoch: Any = TWO) -> list[Any]:
    """A takeover asks a secondary to promise; the answers to what that brings about, in order."""
    role.accepted(link, hello(LinkRole.OPENER, S2, S1), 0.0)
    told = actions = role.received_message(
        link, Message.PROMISE, arrives(Message.PROMISE, epoch=epoch, dry_run=False), 0, 0.0
    )
    while any(hasattr(action, "token") for action in actions):
        actions = [each for action in actions if hasattr(action, "token") for each in role.done(action.token, 0.0)]
        told = told + actions
    return list(told)


def test_23_a_promise_ends_the_intermediates_link_and_is_durable_before_it_is_told() -> None:
    role = follow(secondary(held=4, prepared=4))
    actions = promise(role)
    assert words(actions) == ["Close", "SyncJournal", "SaveState", "PROMISED"]
    assert actions[0].link == 7
    assert role.phase is Phase.PROMISED


def test_23_a_prepare_that_a_promise_overtook_is_not_answered() -> None:
    role = follow(secondary())
    role.received_message(7, Message.PREPARE, {"number": 8, "stream_last": 0}, 1, 0.0)
    promise(role)
    assert role.noted(8, 1, 0.0) == []


def test_23_a_record_that_a_promise_overtook_is_not_taken() -> None:
    role = follow(secondary())
    promise(role)
    head, record, chunk = numbered(1, 0)
    assert role.record(7, head, 1, record, chunk) == []
    assert role.received == 0


def test_23_a_store_without_the_promise_changes_nothing_and_names_the_epoch_that_is_stood_by() -> None:
    role = follow(secondary(held=4, prepared=4))
    promise(role, 3, THREE)
    role.accepted(4, hello(LinkRole.OPENER, S2, S1), 0.0)
    store = arrives(Message.STORE, promise=TWO, epoch=TWO, number=4, truncate=True, members=[S1, S2], dry_run=False)
    assert one(role.received_message(4, Message.STORE, store, 0, 0.0), Message.STORED)["epoch"] == THREE
    assert role.state.epoch == ONE


def test_23_a_frozen_intermediate_answers_the_opener_only_when_everything_is_validated() -> None:
    role = serving(intermediate())
    greet(role, 1)
    send_batch(role, 1, 1)
    role.accepted(9, hello(LinkRole.OPENER, S1, MID), 0.0)
    told = role.received(9, Message.PROMISE, arrives(Message.PROMISE, epoch=TWO, dry_run=False), 0.0)
    told += saved(role, told) + role.durable(1, 0.0) + role.transmitted(S1, 104, 1, 4096, 0.0) + role.tick(0.1, 1)
    answer = {"epoch_number": 1, "number": 1, "applied": 0, "credit": FREE}
    told += role.received(105, Message.PREPARED, answer, 1.0)
    assert "PROMISED" not in words(told)
    assert one(role.received(104, Message.PREPARED, answer, 1.0), Message.PROMISED)["held"] == 1


def test_23_a_promise_that_led_nowhere_is_superseded_after_a_while() -> None:
    role = serving(intermediate())
    role.accepted(9, hello(LinkRole.OPENER, S1, MID), 0.0)
    saved(role, role.received(9, Message.PROMISE, arrives(Message.PROMISE, epoch=TWO, dry_run=False), 0.0))
    role.tick(POLICY.open_backoff_s + 1, 1)
    assert role.phase.name == "STARTING"
    for node in (S1, S2):
        role.lost(100 + node, 6.0)
        role.connected(200 + node, node, NONCE, 6.0)
        actions = role.received(200 + node, Message.WELCOME, report(node), 12.0)
    assert role.phase.name == "OPENING"
    asked = [fields["epoch"].number for _, kind, fields in messages(saved(role, actions)) if kind == Message.PROMISE]
    assert asked == [3, 3]


def test_24_a_primary_that_was_told_of_a_higher_epoch_serves_nothing_until_it_is_welcomed_in_it() -> None:
    role = live(primary())
    role.received(1, Message.REFUSED, {"code": Refusal.EPOCH, "epoch": TWO, "promised": TWO, "text": "over"}, 0.0)
    role.lost(1, 0.0)
    assert not role.readable(1, 0, 512)
    role.connected(2, NONCE, 0.0)
    with pytest.raises(ProtocolError):
        role.received(2, Message.WELCOME, welcome(epoch=ONE), 0.0)
    role.lost(2, 0.0)
    role.connected(3, NONCE, 0.0)
    saved(role, role.received(3, Message.WELCOME, welcome(epoch=THREE), 0.0))
    assert role.readable(1, 0, 512)


def test_24_a_started_intermediate_numbers_nothing_until_every_secondary_agrees() -> None:
    role = intermediate()
    assert words(greet(role, 1)) == ["SaveState"]
    role.connected(104, S1, NONCE, 0.0)
    assert words(role.received(104, Message.WELCOME, report(S1), 0.0)) == []
    role.connected(105, S2, NONCE, 0.0)
    assert "WELCOME" in words(role.received(105, Message.WELCOME, report(S2), 0.0))
    assert role.phase is opening.Phase.SERVING


def test_24_an_intermediate_that_meets_an_active_secondary_is_fenced_for_good() -> None:
    role = serving(intermediate())
    greet(role, 1)
    refused = {"code": Refusal.ACTIVE, "epoch": TWO, "promised": TWO, "text": "taken over"}
    actions = role.received(104, Message.REFUSED, refused, 0.0)
    assert role.phase is opening.Phase.FENCED
    assert [each.link for each in actions if isinstance(each, Close)] == [1, 104]
    assert any(isinstance(each, SaveState) for each in actions)
    role.tick(1000.0, 1)
    assert role.phase is opening.Phase.FENCED


def test_24_an_active_secondary_refuses_the_intermediate() -> None:
    role = secondary(epoch=TWO, promised=TWO, active=True, number=4, held=4, prepared=4)
    actions = role.accepted(7, hello(LinkRole.INTERMEDIATE, MID, S1), 0.0)
    assert words(actions) == ["Close"]
    assert role.link == 0
