"""Schedules that the simulator found, each in its shortest form."""

from __future__ import annotations

import errno
from typing import Any
from unittest import mock

import pytest

from blockrepl.block import WriteFlag
from blockrepl.errors import BlockError
from blockrepl.formats.journal import frame_bytes
from blockrepl.formats.link import NO_EPOCH, Epoch, LinkRole, Message, Refusal
from blockrepl.formats.record import ENTRY_BYTES, HEADER_BYTES, RecordKind, decode_batch, peek
from blockrepl.replication import opening
from blockrepl.replication.actions import Action, AppendNote, Apply, Close, MarkJournal, SyncJournal, SyncVolumes
from blockrepl.replication.secondary import Phase
from blockrepl.replication.takeover import Takeover
from tests.replication.roles import (
    FREE,
    GROUP,
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
    raw_batch,
    report,
    saved,
    secondary,
    send_batch,
    serving,
    welcome,
    words,
    write,
)
from tests.sim.group import Group, Options
from tests.sim.process import BLOCK


def test_credit_shrinks_with_every_batch_and_not_only_at_the_next_trim() -> None:
    """Else more is granted than the ring holds, and a full ring waits for a checkpoint for ever (rule 6)."""
    role = serving(intermediate(free_bytes=64 << 10))
    greet(role, 1, P1)
    greet(role, 2, P2)
    _, size = raw_batch(1)
    sent = {P1: 0, P2: 0}
    for _ in range(100):
        for link, sender in ((1, P1), (2, P2)):
            now = role.senders.by_link[link]
            if now.credit - now.credit_used >= frame_bytes(size):
                sent[sender] += 1
                send_batch(role, link, sent[sender], sender=sender)
        role.durable(role.numbered, 0.0)
    assert 32 << 10 < sum(sent.values()) * frame_bytes(size) <= 64 << 10


def test_a_record_larger_than_half_a_window_gets_its_credit_with_the_next_heartbeat() -> None:
    role = serving(intermediate(free_bytes=96 << 10))
    window = (96 << 10) // 4
    granted = one(greet(role, 1), Message.WELCOME)["credit"]
    assert granted == window
    send_batch(role, 1, 1, size_bytes=4000)
    role.durable(1, 0.0)
    role.ring(96 << 10)
    beats = [fields for link, kind, fields in messages(role.tick(1.0, 1)) if link == 1 and kind == Message.HEARTBEAT]
    assert beats[0]["credit"] - frame_bytes(raw_batch(1, size_bytes=4000)[1]) == window


def test_a_batch_that_comes_while_nothing_is_numbered_closes_its_link() -> None:
    """Dropped on a link that lives on it would never be sent again, and its host would wait for ever."""
    role = serving(intermediate())
    greet(role, 1)
    role.accepted(9, hello(LinkRole.OPENER, S1, MID), 0.0)
    role.received(9, Message.PROMISE, arrives(Message.PROMISE, epoch=TWO, dry_run=False), 0.0)
    assert role.phase is opening.Phase.FROZEN
    actions = send_batch(role, 1, 1)
    assert [action.link for action in actions if isinstance(action, Close)] == [1]
    assert role.numbered == 0


def test_a_failed_intermediate_stays_failed_when_a_secondary_says_it_is_active() -> None:
    role = serving(intermediate())
    role.fail("disk")
    refused = {"code": Refusal.ACTIVE, "epoch": TWO, "promised": TWO, "text": "taken over"}
    role.received(104, Message.REFUSED, refused, 0.0)
    assert role.fail("another error") == []
    assert role.phase is opening.Phase.FAILED


def test_nothing_is_trimmed_that_one_secondary_has_not_noted() -> None:
    """One that a takeover rolled forward knows of a higher validated number than another has prepared."""
    role = intermediate(durable=12, streams=[(S1, 12), (S2, 11)])
    for node, prepared in ((S1, 12), (S2, 10)):
        role.connected(100 + node, node, NONCE, 0.0)
        role.received(
            100 + node, Message.WELCOME, report(node, prepared=prepared, validated=prepared, through=10), 0.0
        )  # fmt: skip
    assert role.streams.validated == 12
    assert role.releasable == 10


def test_a_secondary_that_holds_a_takeovers_number_without_a_note_of_it_has_lost_nothing() -> None:
    """S1 was rolled forward to 11, S2 holds 11 and noted 10, the takeover died: production goes on."""
    role = intermediate(durable=11, streams=[(S1, 8), (S2, 11)])
    actions = []
    for node, through, prepared in ((S1, 8, 11), (S2, 11, 10)):
        role.connected(100 + node, node, NONCE, 0.0)
        fields = report(node, prepared=prepared, validated=prepared, through=through)
        actions += role.received(100 + node, Message.WELCOME, fields, 0.0)
    assert role.phase is opening.Phase.SERVING
    actions += role.tick(1.0, 1)
    asked = {link: fields["number"] for link, kind, fields in messages(actions) if kind == Message.PREPARE}
    assert asked[105] == 11
    actions = role.received(
        105, Message.PREPARED, {"epoch_number": 1, "number": 11, "applied": 10, "credit": FREE}, 1.0
    )
    assert (105, Message.VALIDATE, {"number": 11}) in messages(actions)


def test_a_checkpoint_that_is_stored_while_the_primary_greets_is_told_with_the_welcome() -> None:
    """HELLO named the one before; an idle primary has no other to tell, and its records would stay in the ring."""
    role = live(primary())
    role.submit(1, write(), 0.0)
    role.received(1, Message.ACK, {"incarnation": 1, "batch": 1, "number": 5, "validated": 0, "credit": FREE}, 0.0)
    syncs = [each for each in role.tick(POLICY.checkpoint_s + 1, 1) if isinstance(each, SyncVolumes)]
    role.lost(1, 1.6)
    saves = role.volumes_synced(syncs[0].token, 1.7)
    assert one(role.connected(2, NONCE, 1.8), Message.HELLO)["checkpoint"] == 0  # not stored yet (rule 7)
    saved(role, saves)
    actions = role.received(2, Message.WELCOME, welcome(through=5, batch=1, credit=FREE), 1.9)
    assert one(actions, Message.CHECKPOINT) == {"number": 5}


def test_an_older_links_note_does_not_speak_for_what_came_on_the_newer_one() -> None:
    """Else records that are not durable count as held: given up from memory, and missing after a power loss."""
    role = secondary(held=4)
    role.accepted(7, hello(LinkRole.INTERMEDIATE, MID, S1), 0.0)
    older = role.received_message(7, Message.PREPARE, {"number": 8, "stream_last": 4}, 1, 0.0)[0]
    assert isinstance(older, AppendNote)
    role.accepted(8, hello(LinkRole.INTERMEDIATE, MID, S1), 0.0)
    head, record, chunk = numbered(9, 4)
    role.record(8, head, 1, record, chunk)
    role.received_message(8, Message.PREPARE, {"number": 8, "stream_last": 4}, 1, 0.0)
    role.noted(older.number, older.epoch, 0.0, older.received)
    assert (role.state.prepared, role.state.held) == (8, 4)


def test_a_restarted_secondary_applies_what_is_validated_without_being_told_again() -> None:
    role = secondary(held=9, prepared=9, validated=9, applied=4)
    assert role.start() == [Apply(9)]
    assert secondary(held=9, prepared=9, validated=9, applied=9).start() == []


def roll(role: Any, link: int, number: int) -> list[Any]:
    """A takeover's PROMISE and STORE of epoch 2, with everything done that they ask for."""
    role.accepted(link, hello(LinkRole.OPENER, S2, S1), 0.0)
    actions = role.received_message(link, Message.PROMISE, arrives(Message.PROMISE, epoch=TWO, dry_run=False), 0, 0.0)
    actions += [each for action in actions if hasattr(action, "token") for each in role.done(action.token, 0.0)]
    for action in actions:
        if words([action]) == ["SaveState"]:
            role.done(action.token, 0.0)
    # The intermediate comes back in between, and is told what is held now.
    role.accepted(7, hello(LinkRole.INTERMEDIATE, MID, S1), 0.0)
    store = arrives(
        Message.STORE, promise=TWO, epoch=TWO, number=number, truncate=True, members=[S1, S2], dry_run=False
    )
    actions = role.received_message(link, Message.STORE, store, 0, 0.0)
    found: list[Any] = role.truncated(actions[0].token, 0, 0, number, 0.0)
    return found


def test_a_takeovers_roll_forward_ends_the_intermediates_link() -> None:
    """It was told of more than is held now, and would send VALIDATE for it."""
    role = secondary(held=12, prepared=12, validated=10, applied=10)
    actions = roll(role, 3, 11)
    assert [action.link for action in actions if isinstance(action, Close)] == [7]
    assert role.link == 0


def test_a_secondary_that_stopped_answers_no_promise() -> None:
    role = secondary()
    role.accepted(3, hello(LinkRole.OPENER, S2, S1), 0.0)
    role.fail("disk")
    actions = role.received_message(3, Message.PROMISE, arrives(Message.PROMISE, epoch=TWO, dry_run=False), 0, 0.0)
    assert words(actions) == ["Close"]
    assert role.state.promised == ONE
    assert role.phase is Phase.FAILED


def test_a_takeover_that_was_overtaken_by_the_intermediate_drains_it_again() -> None:
    """It had gone on in an epoch of its own: what it acknowledged since is not in the number of the first drain."""
    role = Takeover(
        group=GROUP, node=S1, name="s1", intermediate=MID, secondaries=[S1, S2], names={MID: "i", S1: "s1", S2: "s2"},
        new_id=lambda: b"3" * 16, now_s=0.0,
    )  # fmt: skip
    for node in (MID, S1, S2):
        role.connected(node, node, NONCE)
        role.received(node, Message.WELCOME, report(node), 0.0)
    state = arrives(
        Message.PROMISED, validated=7, applied=7, active=False, number=0, members=[], numbered=7, stored=ONE
    )
    two, four = Epoch(2, b"3" * 16), Epoch(4, b"3" * 16)
    role.received(MID, Message.PROMISED, {**state, "epoch": two, "held": 7}, 0.0)
    actions = role.received(S1, Message.PROMISED, {**state, "epoch": THREE, "held": 9}, 1.0)
    asked = [(link, fields["epoch"]) for link, kind, fields in messages(actions) if kind == Message.PROMISE]
    assert asked == [(MID, four)]
    assert messages(role.received(S2, Message.PROMISED, {**state, "epoch": two, "held": 7}, 1.0)) == []
    actions = role.received(MID, Message.PROMISED, {**state, "epoch": four, "held": 9, "validated": 9}, 1.0)
    asked = [(link, fields["epoch"]) for link, kind, fields in messages(actions) if kind == Message.PROMISE]
    assert asked == [(S1, four), (S2, four)]
    late = role.received(S2, Message.PROMISED, {**state, "epoch": two, "held": 7}, 1.0)
    assert (late, role.report.drained) == ([], True)


def test_a_repeated_takeover_stores_again_where_a_later_epoch_was_promised_since() -> None:
    """Such a secondary has the epoch, and must still be brought to its number before it may be activated."""
    role = Takeover(
        group=GROUP, node=S1, name="s1", intermediate=MID, secondaries=[S1, S2], names={MID: "i", S1: "s1", S2: "s2"},
        new_id=lambda: b"3" * 16, now_s=0.0,
    )  # fmt: skip
    role.unreachable(MID, "gone", 0.0)
    for node in (S1, S2):
        role.connected(node, node, NONCE)
        role.received(node, Message.WELCOME, report(node, epoch=TWO, promised=TWO), 0.0)
    held = {"held": 7, "validated": 7, "applied": 7, "number": 7, "members": [S1, S2], "numbered": 7, "stored": TWO}
    role.received(S2, Message.PROMISED, {**held, "epoch": TWO, "active": True}, 0.0)
    actions = role.received(S1, Message.PROMISED, {**held, "epoch": THREE, "active": False}, 0.0)
    assert [(link, fields["epoch"], fields["number"]) for link, kind, fields in messages(actions)
            if kind == Message.STORE] == [(S1, TWO, 7)]  # fmt: skip
    assert role.report.completed


def test_a_sync_that_succeeds_after_one_that_failed_completes_no_fua_write() -> None:
    """Rule 11: the kernel tells of a failed write-back once; the next sync says nothing about those bytes."""
    group = Group(1, Options(story="production"))
    with group.limits():
        group.create()
        process = group.primary("p1")
        assert group.world.run(5.0, lambda: process.alive and process.host.role.phase.value == "live")
        errors: list[BlockError | None] = []
        for batch in (fua_write(), fua_write()):
            batch.done = lambda batch: errors.extend(batch.errors or [None])
            process.volumes[1].submit(batch)
        group.oracle.excused.add("p1")
        file = process.machine.files["volume 1"]
        file.fail("sync")
        group.world.run(group.world.now_s + 1, lambda: len(errors) == 2)
    assert [error.errno_code if error else 0 for error in errors] == [errno.EIO, errno.EIO]


def test_a_primary_that_learns_of_a_takeover_completes_no_fua_write_whose_sync_ends_later() -> None:
    """Rule 24, to the letter: acknowledged and stored, but not yet told to the host."""
    group = Group(1, Options(story="production"))
    with group.limits():
        group.create()
        process = group.primary("p1")
        assert group.world.run(5.0, lambda: process.alive and process.host.role.phase.value == "live")
        answers: list[Any] = []
        batch = fua_write()
        batch.done = lambda batch: answers.append(batch.errors)
        process.disk.slow_until_s = group.world.now_s + 60
        process.volumes[1].submit(batch)
        assert group.world.run(group.world.now_s + 1, lambda: process.host.role.acked > 0)
        assert answers == []
        fields = {"code": Refusal.EPOCH, "epoch": TWO, "promised": TWO, "text": "taken over"}
        process.host.role.received(process.host.role.link, Message.REFUSED, fields, process.machine.clock.now_s())
        process.volumes[1].flush(answers.append)
        group.world.run(group.world.now_s + 3, lambda: len(answers) == 2)
    assert [bool(each) for each in answers] == [True, True]


def test_a_promise_waits_for_records_that_the_ring_has_no_room_for_yet() -> None:
    """It said that it holds them, gave up their memory, and wrote what was in it by then to the journal (rule 23)."""
    group = Group(1, Options(story="production"))
    with group.limits():
        group.create()
        host = group.secondary("s1").host
        assert group.world.run(5.0, lambda: host.role.link != 0)
        journal = host.journal.journal
        with mock.patch.object(journal, "fits", return_value=False):
            host.perform([AppendNote(1, host.role.state.epoch.number, 0)])
            done: list[float] = []

            def synced(now_s: float) -> list[Action]:
                done.append(now_s)
                return []

            host.perform([SyncJournal(host.role.later(synced))])
            host.settle()
            group.world.run(group.world.now_s + 0.5)
            assert done == []
        host._trimmed()
        assert group.world.run(group.world.now_s + 0.5, lambda: bool(done))
    assert host.role.state.prepared == 1


@pytest.mark.parametrize("batch", [1, 2, 300])
def test_a_header_alone_says_how_many_entries_follow(batch: int) -> None:
    """The batch number was taken for it: bits of what a suspended group missed were left out, or made up (rule 18)."""
    chunk, _ = raw_batch(batch)
    head = decode_batch(chunk.view)
    assert peek(chunk.view[:HEADER_BYTES]) == (RecordKind.UPDATE, head.count * ENTRY_BYTES)


def test_records_become_bits_only_when_they_can_be_read_from_the_journal() -> None:
    """They were numbered, and not written yet: the ring's older bytes were read, and no bit was set (rule 18)."""
    group = Group(1, Options(story="production", ring_bytes=1 << 20))
    with group.limits():
        group.create()
        process, middle = group.primary("p1"), group.intermediate
        assert group.world.run(5.0, lambda: process.alive and process.host.role.phase.value == "live")
        host = middle.host
        host.journal.inline_bytes = -1
        middle.disk.slow_until_s = group.world.now_s + 60
        process.volumes[1].submit(write(BLOCK))
        assert group.world.run(group.world.now_s + 1, lambda: host.role.numbered == 1)
        assert host.role.durable_number == 0
        done: list[float] = []

        def marked(now_s: float) -> list[Action]:
            done.append(now_s)
            return []

        host.perform([MarkJournal(0, 1, {}, host.role.expect(marked))])
        assert group.world.run(group.world.now_s + 5, lambda: bool(done))
    assert host.role.pairing.bitmaps[1].count == 1


def test_a_copy_saves_for_its_way_back_only_what_was_there_when_it_began() -> None:
    """Power took what had been applied before a copy began; redone under the copy's undo, it was undone as well."""
    role = secondary(applied=1, held=5, prepared=5, validated=5, copying=True, copy_from=3, start=4)
    assert role.start() == [Apply(3, undo=False)]
    assert role.was_applied(3, 0.0) == [Apply(5, undo=True)]


def fua_write() -> Any:
    """One block, FUA."""
    batch = write(BLOCK)
    batch.flags[0] = WriteFlag.FUA
    batch.fua = True
    return batch


def test_an_epoch_refused_for_any_reason_ends_the_older_one_at_the_primary() -> None:
    """Rule 24: it had received the epoch, though with "not now" and not with "you are history"."""
    role = live(primary())
    refusal = {"code": Refusal.STATE, "epoch": ONE, "promised": TWO, "text": "the journal failed"}
    saved(role, role.received(1, Message.REFUSED, refusal, 0.0))
    assert role.fenced
    role.lost(1, 0.0)
    hello_fields = one(role.connected(2, NONCE, 0.0), Message.HELLO)
    assert hello_fields["promised"] == TWO  # so that the intermediate opens a higher one


def test_a_secondary_that_comes_back_while_an_epoch_is_being_stored_is_asked_again() -> None:
    """It had stored it, and its answer was forgotten with its link: nobody would ever serve."""
    role = intermediate(epoch=NO_EPOCH, promised=NO_EPOCH)
    actions = []
    for node in (S1, S2):
        role.connected(100 + node, node, NONCE, 0.0)
        nothing = report(node, epoch=NO_EPOCH, promised=NO_EPOCH)
        actions += saved(role, role.received(100 + node, Message.WELCOME, nothing, 0.0))
    [promise] = {fields["epoch"] for _, kind, fields in messages(actions) if kind == Message.PROMISE}
    answer = {"epoch": promise, "stored": NO_EPOCH, "held": 0, "validated": 0, "applied": 0, "active": False}
    stored = {"epoch": promise, "applied": 0, "discarded_writes": 0, "discarded_bytes": 0}
    for node in (S1, S2):
        saved(role, role.received(100 + node, Message.PROMISED, answer, 1.0))
    role.received(100 + S1, Message.STORED, stored, 1.0)
    actions = role.lost(100 + S1, 1.0)
    role.received(100 + S2, Message.STORED, stored, 1.0)
    assert [type(each).__name__ for each in actions] == ["Event", "Close"]  # all greet anew
    role.lost(100 + S2, 1.0)
    serving(role, epoch=promise, promised=promise)
    assert role.phase is opening.Phase.SERVING


def test_saving_helper_runs_what_waits() -> None:
    role = intermediate()
    assert saved(role, [role.save(lambda _: [Apply(1)])]) == [Apply(1)]
