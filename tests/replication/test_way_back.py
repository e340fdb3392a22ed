"""Schedules around a suspension and its end that lose a write, or bring an old one back (PROTOCOL, 7, 8, 16 to 21)."""

from __future__ import annotations

from typing import Any

import pytest

from blockrepl.bitmap import Bitmap
from blockrepl.formats.link import Epoch, Message, Pair
from blockrepl.formats.record import decode_batch, iterate_entries
from blockrepl.replication.actions import DigestBlocks, ReadBlocks, SaveBits, SaveState, SyncVolumes
from blockrepl.replication.copier import Copier
from blockrepl.replication.policy import Policy
from tests.replication.alone_host import BLOCK, SIZE, Host, alone
from tests.replication.roles import TWO

DATA = Policy(hold_s=10.0, link_timeout_s=1e9, checkpoint_s=1e9)
FIVE = Epoch(5, b"5" * 16)


def detached() -> Host:
    host = Host()
    host.start()
    host.beat(1)
    return host


def durable(host: Host, offset: int, volume: int = 1) -> bool:
    return Bitmap(SIZE, BLOCK, host.durable_bits[volume]).covers(offset, 1)


# going alone


def test_17_a_write_whose_fate_is_open_has_its_bit_before_psue_is_stored() -> None:
    """It may be in the journal and at the secondary; power fails after PSUE, and the P-VOL never gets it."""
    host = detached()
    host.submit(offset=3 * BLOCK)
    host.lose()
    host.holds = {SaveState}
    host.tick(6.1)
    assert durable(host, 3 * BLOCK)


def test_16_suspend_ends_the_link_so_that_the_next_hello_declares_it() -> None:
    host = detached()
    host.get(Message.SUSPEND, pair=Pair.PSUE, number=3)
    assert (host.phase, host.role.link) == ("ALONE", 0)
    host.connect(numbering=False, pair=Pair.PSUE)
    assert host.said(Message.HELLO)[-1]["suspended"]
    host.resync()
    assert host.phase == "LIVE"


def test_16_who_was_away_when_the_others_were_suspended_learns_it_from_welcome() -> None:
    host = detached()
    batch = host.submit()
    host.lose()
    host.connect(numbering=False, pair=Pair.PSUE)
    assert host.phase == "ALONE"
    assert host.stored == [batch]


def test_16_a_started_primary_obeys_a_group_that_is_suspended() -> None:
    host = Host()
    host.connect(numbering=False, pair=Pair.PSUE)
    host.get(Message.REPLAYED, through=0)
    assert host.phase == "ALONE"


def test_16_an_intermediate_that_never_sent_a_stamp_can_be_done_without_too() -> None:
    host = Host()
    host.now_s = 50.0
    host.start()
    host.lose()
    host.tick(5.9)
    assert host.phase == "DETACHED"
    host.tick(0.2)
    assert host.phase == "ALONE"


def test_16_a_primary_that_was_stopped_reads_what_came_meanwhile_before_it_gives_the_group_up() -> None:
    host = detached()
    host.tick(0.1)
    host.stand_still(50.0)
    assert host.phase == "LIVE"
    for _ in range(62):
        host.tick(0.1)
    assert host.phase == "ALONE", "it does not wait for ever"


def test_24_a_started_primary_goes_alone_when_it_is_told_so() -> None:
    host = Host(alone_asked=True)
    host.tick(0.1)
    host.tick(5.9)
    assert host.phase == "FRESH"
    host.tick(0.2)
    assert host.phase == "ALONE"
    assert host.role.state.trusted


def test_24_one_that_was_alone_completes_nothing_after_a_restart_before_it_has_met_the_intermediate() -> None:
    """The secondaries may have taken over while it was down, and the line to them be cut."""
    host = Host(suspended=int(Pair.PSUE), alone=True)
    batch = host.submit()
    host.tick(60.0)
    assert (host.phase, host.stored, host.role.readable(1, 0, 512)) == ("ALONE", [], True)
    assert "--alone" in host.role.why_held()
    host.connect(numbering=False, pair=Pair.PSUE)
    assert (host.stored, host.role.why_held()) == ([batch], "")
    host.lose()  # this process has met it, and cannot be fenced
    later = host.submit()
    assert host.stored == [batch, later]


def test_24_told_so_it_goes_on_and_a_site_that_has_taken_over_need_not_be_told() -> None:
    told: dict[str, Any] = {"alone_asked": True, "suspended": int(Pair.PSUE)}
    taken: dict[str, Any] = {"suspended": int(Pair.SSWS), "detached": True}
    for more in (told, taken):
        host = Host(alone=True, **more)
        batch = host.submit()
        assert host.stored == [batch]


def test_22_a_primary_that_met_another_epoch_of_its_number_does_not_go_alone_either() -> None:
    host = detached()
    host.lose()
    host.connect(epoch=host.role.state.epoch._replace(id=b"?" * 16))
    host.lose()
    host.tick(20.0)
    assert (host.phase, "split brain" in host.role.why_held()) == ("DETACHED", True)


def test_24_told_so_after_an_unclean_stop_its_bits_do_not_say_all() -> None:
    host = Host(alone_asked=True, clean=False)
    host.tick(0.1)
    host.tick(6.1)
    assert host.durable_state.suspended
    assert not host.durable_state.trusted


# back again, half of the way


def test_a_link_that_breaks_while_a_resync_is_made_ready_for_leaves_it_alone_and_writing() -> None:
    host = alone()
    host.connect(numbering=False)
    host.holds = {SaveBits}
    host.resync()
    batch = host.submit(offset=BLOCK)
    host.lose()
    host.let_go()
    assert host.phase == "ALONE"
    assert host.stored == [batch], "it waited for the journal, and now completes alone"
    again = host.submit(offset=BLOCK)
    assert host.stored == [batch, again]


def test_21_once_it_is_stored_that_the_journal_counts_again_no_write_completes_alone() -> None:
    host = alone()
    host.connect(numbering=False)
    host.holds = {SaveState}
    host.resync()
    host.lose()
    host.let_go()
    assert host.phase == "DETACHED"
    batch = host.submit()
    assert not host.stored
    host.tick(0.1)
    host.beat_free_s(6.2)
    assert host.phase == "ALONE", "nor is it held for ever"
    assert host.stored == [batch]


def test_batches_that_waited_for_a_resync_are_sent_with_numbers_that_follow() -> None:
    """The link broke when it was stored that the journal counts again: it comes back as one that was never away."""
    host = detached()
    host.submit()  # batch 1, never numbered: completes alone
    host.lose()
    host.tick(6.1)
    host.connect(numbering=False)
    host.holds = {SaveState}
    host.resync()
    host.submit(offset=BLOCK)
    host.lose()
    host.let_go()
    host.batches.clear()
    host.connect(batch=0, resync=50, pair=Pair.COPY)
    assert [decode_batch(memoryview(bytearray(raw))).batch for raw in host.batches] == [1]
    assert host.phase == "LIVE"


def test_21_a_second_resync_does_not_begin_on_what_was_saved_for_the_first() -> None:
    """Between the two it wrote alone: those writes are in the P-VOLs, and not synced yet."""
    host = alone()
    host.connect(numbering=False)
    host.holds = {SyncVolumes}
    host.resync(50)
    host.lose()
    host.submit(offset=5 * BLOCK)
    host.connect(numbering=False)
    host.get(Message.BITMAP, volume=2, block_bytes=BLOCK, first_block=0, bits=b"\x80")
    host.resync(60)
    first = host.held.pop(0)
    host.log.clear()
    host.do(host.role.volumes_synced(first.token, host.now_s))  # type: ignore[union-attr]
    assert host.phase != "LIVE"
    host.let_go()
    assert host.phase == "LIVE"
    assert host.log[:3] == ["bits", "sync", "state"]
    assert host.role.state.resync == 60


def test_a_held_write_does_not_come_back_over_a_newer_one() -> None:
    """Fenced, it held a write and told the host that it failed; then the fence fell, and the host wrote again."""
    host = alone()
    host.connect(numbering=False)
    host.get(Message.REFUSED, code=5, epoch=TWO, promised=TWO, text="a higher epoch")
    old = host.submit(offset=0)
    assert not host.stored
    host.connect(epoch=TWO, promised=TWO, numbering=False)
    new = host.submit(offset=0)
    assert host.stored == [old, new]


def test_7_a_resync_that_ended_while_it_was_down_is_known_after_the_replay() -> None:
    host = Host(resync=50)
    host.bitmaps[1].mark(0, 1)
    host.connect(resynced=50)
    host.get(Message.REPLAYED, through=0)
    assert host.role.state.resync == 0
    assert host.bitmaps[1].count == 0


def test_19_a_block_that_was_read_before_it_went_alone_is_never_sent() -> None:
    """What its hosts wrote alone came after it."""
    host = detached()
    host.bitmaps[1].mark(0, 1)
    host.holds = {ReadBlocks}
    host.resync()
    late = host.held.pop()
    host.holds = set()
    host.lose()
    host.tick(6.1)
    host.submit(offset=0)
    host.connect(numbering=False)
    host.resync(60)
    host.batches.clear()
    host.do(host.role.blocks_read(late.token, b"\x01" * BLOCK, host.now_s))  # type: ignore[union-attr]
    assert not host.batches


# what a resync may not forget


def test_20_between_start_and_end_what_is_validated_is_not_yet_safe() -> None:
    """A takeover goes back to where the copy began: what was written since must be among the bits (rule 8)."""
    host = detached()
    host.resync()
    host.submit(offset=7 * BLOCK)
    host.ack(1, 60)
    host.do(host.role.checkpoints.begin(0.0))
    host.beat(2, validated=60, pair=Pair.COPY)
    host.lose()
    host.do(host.role.suspension.retire("swapped"))
    assert durable(host, 7 * BLOCK)


def test_20_after_its_end_it_is() -> None:
    host = detached()
    host.resync()
    host.submit(offset=7 * BLOCK)
    host.ack(1, 60)
    host.do(host.role.checkpoints.begin(0.0))
    host.beat(2, validated=60, pair=Pair.COPY)
    host.get(Message.RESYNCED, id=50)
    host.beat(3, validated=61)
    host.do(host.role.suspension.retire("swapped"))
    assert not durable(host, 7 * BLOCK)


def test_8_an_unclean_stop_between_start_and_end_is_not_made_good_by_a_validate() -> None:
    host = Host(clean=False, resync=50)
    host.connect(resync=50, pair=Pair.COPY)
    host.get(Message.REPLAYED, through=0)
    host.resync(50)
    host.beat(2, validated=60, pair=Pair.COPY)
    assert not host.role.trusted
    host.get(Message.RESYNCED, id=50)
    assert host.role.trusted


def test_8_a_verify_that_has_not_ended_makes_no_bitmap_trusted() -> None:
    host = Host(suspended=int(Pair.PSUE), alone=True, trusted=False)
    host.connect(numbering=False)
    host.resync(verify=True)
    assert host.phase == "LIVE"
    host.beat(1)
    host.lose()
    host.tick(6.1)
    host.connect(numbering=False)
    assert host.said(Message.HELLO)[-1]["trusted"] is False
    assert not host.durable_state.trusted


def test_8_nor_does_one_that_was_split_in_the_middle() -> None:
    host = Host(suspended=int(Pair.PSUE), alone=True, trusted=False)
    host.connect(numbering=False)
    host.resync(verify=True)
    host.lose()
    host.connect()
    assert host.said(Message.HELLO)[-1]["trusted"] is False


def test_8_a_verify_that_has_ended_does() -> None:
    host = Host(suspended=int(Pair.PSUE), alone=True, trusted=False)
    host.connect(numbering=False)
    host.resync(verify=True)
    host.get(Message.RESYNCED, id=50)
    assert host.durable_state.trusted


# the copier


def dirty(*blocks: int) -> dict[int, Bitmap]:
    bitmap = Bitmap(64 * BLOCK, BLOCK)
    for block in blocks:
        bitmap.mark(block * BLOCK, 1)
    return {1: bitmap}


def copier(bitmaps: dict[int, Bitmap], **given: object) -> Copier:
    return Copier(50, bitmaps, **{"verify": False, "rate_bytes": 0, "cursor": (0, 0), "now_s": 0.0, **given})  # type: ignore[arg-type]


def drain(each: Copier) -> list[tuple[int, int, int]]:
    found = []
    while (piece := each.next_copy(0.0)) is not None:
        found.append(piece)
    return found


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_the_cursor_never_passes_a_block_that_is_not_acknowledged(order: tuple[int, ...]) -> None:
    """After a broken link pieces come again in another order."""
    bitmaps = dirty(2, 10, 20)
    each = copier(bitmaps)
    drain(each)
    each.interrupted(set(), set())
    pieces = sorted(drain(each))
    left = set(pieces)
    for index in order:
        each.acknowledged(pieces[index][0], pieces[index][1])
        left.discard(pieces[index])
        again = copier(bitmaps, cursor=each.cursor)
        assert left <= set(drain(again))
    each.metadata_done(each.next_metadata() or 0)
    assert each.done
    assert drain(copier(bitmaps, cursor=each.cursor)) == []


def test_an_acknowledgement_of_an_older_resyncs_copy_does_not_move_the_cursor() -> None:
    bitmaps = dirty(2, 10, 20)
    each = copier(bitmaps)
    each.acknowledged(1, 20 * BLOCK)
    assert drain(copier(bitmaps, cursor=each.cursor)) == drain(copier(bitmaps))


def test_a_comparison_whose_answer_is_lost_is_asked_for_again() -> None:
    """The secondary had compared, and its link broke: nobody will ever say what it found."""
    host = detached()
    host.resync(verify=True)
    for number in (1, 2):
        host.ack(number, 60 + number)
    assert not host.said(Message.COPIED)
    host.batches.clear()
    host.beat_free_s(31.0)
    asked = [decode_batch(memoryview(bytearray(raw))) for raw in host.batches]
    assert len(asked) == 2
    for volume in (1, 2):
        host.get(
            Message.DIGESTED, number=70, sender=1, volume=volume, offset_bytes=0, length_bytes=SIZE, blocks=16,
            different=[], here=[],
        )  # fmt: skip
    assert host.said(Message.COPIED)


def test_zeroes_travel_as_such_block_by_block() -> None:
    host = detached()
    host.bitmaps[1].mark(0, 4 * BLOCK)
    host.holds = {ReadBlocks}
    host.resync()
    read = host.held.pop()
    data = bytearray(b"\1" * BLOCK + bytes(2 * BLOCK) + b"\1" * BLOCK)
    host.holds = set()
    host.do(host.role.blocks_read(read.token, data, 0.0))  # type: ignore[union-attr]
    raw = memoryview(host.batches[-1])
    head = decode_batch(memoryview(bytearray(raw)))
    entries = [(op, offset, length) for _, op, _, offset, length, _ in iterate_entries(head, raw)]
    assert entries == [(1, 0, BLOCK), (2, BLOCK, 2 * BLOCK), (1, 3 * BLOCK, BLOCK)]
    payloads = [bytes(view) for *_, view in iterate_entries(head, raw) if view is not None]
    assert payloads == [b"\1" * BLOCK] * 2


def test_digests_keep_to_the_rate_too() -> None:
    bitmaps = {1: Bitmap(64 << 20, BLOCK)}
    each = copier(bitmaps, verify=True, rate_bytes=1 << 20)
    asked = 0
    for turn in range(41):
        while (piece := each.next_digest(turn * 0.1)) is not None:
            each.compared(piece[0], piece[1], [], BLOCK)
            asked += piece[2] - piece[1]
    assert 3 << 20 <= asked <= 6 << 20


def test_writes_elsewhere_do_not_wait_behind_one_that_waits_for_a_copy() -> None:
    host = detached()
    host.bitmaps[1].mark(0, 1)
    host.holds = {ReadBlocks}
    host.resync()
    host.submit(offset=0)
    host.submit(offset=8 * BLOCK)
    host.submit(offset=4096)
    raws = [decode_batch(memoryview(bytearray(raw))) for raw in host.batches]
    assert len(raws) == 1, "one of three"
    first = memoryview(host.batches[0])
    assert [offset for _, _, _, offset, _, _ in iterate_entries(raws[0], first)] == [8 * BLOCK]


def test_a_write_that_overlaps_one_that_waits_for_a_copy_waits_too() -> None:
    host = detached()
    host.bitmaps[1].mark(0, 1)
    host.holds = {ReadBlocks}
    host.resync()
    long = host.submit(offset=BLOCK - 2048)  # touches block 0, and block 1, which is free
    late = host.submit(offset=BLOCK)
    assert not host.batches
    host.let_go()
    host.ack(host.role.next_batch - 1, 60)
    assert host.stored == [long, late]


# formed anew


def test_25_a_checkpoint_of_the_old_group_does_not_count_in_the_new() -> None:
    """Its number means something else there: the intermediate would refuse it, or a replay would stop short."""
    host = Host(DATA)
    host.start()
    host.submit()
    host.ack(1, 90)
    host.holds = {SyncVolumes}
    host.do(host.role.checkpoints.begin(0.0))
    host.do(host.role.suspension.reform(FIVE, 0))
    host.let_go()
    assert host.durable_state.checkpoint == 0
    host.connect(epoch=FIVE, promised=FIVE, numbering=False, through=0)
    assert host.said(Message.HELLO)[-1]["checkpoint"] == 0
    host.resync(200)
    assert host.phase == "LIVE"
    assert all(fields["number"] == 0 for fields in host.said(Message.CHECKPOINT)[-1:])


def test_25_formed_anew_while_it_is_going_alone_it_does_one_after_the_other() -> None:
    for held in (SaveBits, SyncVolumes, SaveState):
        host = detached()
        batch = host.submit()
        host.lose()
        host.holds = {held}
        host.tick(6.1)
        host.do(host.role.suspension.reform(FIVE, 0))
        host.let_go()
        assert host.phase == "ALONE"
        state = host.durable_state
        assert (state.suspended, state.alone, state.epoch, state.incarnation) == (Pair.PSUE, True, FIVE, 2)
        assert host.stored == [batch], "hosts that were to be served alone are"


def test_25_it_does_not_go_alone_while_it_is_formed_anew() -> None:
    host = detached()
    host.submit()
    host.lose()
    host.holds = {SaveBits}
    host.do(host.role.suspension.reform(FIVE, 0))
    host.tick(6.1)
    assert host.phase == "DETACHED"
    host.let_go()
    assert (host.phase, host.log[-1]) == ("ALONE", "reformed")


def test_24_who_has_promised_a_reform_does_not_go_alone_any_more_until_it_is_welcomed_in_its_epoch() -> None:
    """It said with its promise that it was not alone, and the swap goes by that."""
    host = detached()
    host.role.suspension.bound = lambda: FIVE
    host.get(Message.SUSPEND, pair=Pair.PSUE, number=3)
    assert host.phase == "LIVE"
    batch = host.submit()
    host.lose()
    host.tick(20.0)
    assert (host.phase, host.stored, "epoch 5" in host.role.why_held()) == ("DETACHED", [], True)
    host.connect(epoch=FIVE, numbering=False, pair=Pair.PSUE)
    assert (host.phase, host.stored) == ("ALONE", [batch])


def test_25_a_resync_of_the_old_group_that_was_about_to_begin_does_not_begin_in_the_new() -> None:
    for held in (SaveBits, SyncVolumes, SaveState):
        host = alone()
        host.connect(numbering=False)
        host.holds = {held}
        host.resync()
        host.do(host.role.suspension.reform(FIVE, 0))
        host.let_go()
        assert (host.phase, host.durable_state.suspended, host.durable_state.resync) == ("ALONE", Pair.PSUE, 0)


def test_a_digest_in_flight_when_it_went_alone_is_not_sent_later() -> None:
    host = detached()
    host.holds = {DigestBlocks}
    host.do(host.role.digest(1, 0, SIZE))
    late = host.held.pop()
    host.holds = set()
    host.lose()
    host.tick(6.1)
    host.connect(numbering=False)
    host.resync()
    host.batches.clear()
    host.do(host.role.digest_ready(late.token, BLOCK, [bytes(16)] * 16, 0.0))  # type: ignore[union-attr]
    assert not host.batches


def test_3_a_write_does_not_overtake_those_held_by_a_fence_while_the_epoch_is_being_stored() -> None:
    host = alone()
    host.connect(numbering=False)
    host.get(Message.REFUSED, code=5, epoch=TWO, promised=TWO, text="a higher epoch")
    old = host.submit(offset=0)
    host.holds = {SaveState}
    host.connect(epoch=TWO, promised=TWO, numbering=False)
    new = host.submit(offset=0)
    assert not host.stored
    host.let_go()
    assert host.stored == [old, new]


def test_22_a_resync_right_behind_a_welcome_waits_until_its_epoch_is_stored() -> None:
    host = alone()
    host.submit()
    host.holds = {SaveState}
    host.connect(epoch=TWO, promised=TWO, numbering=False)
    host.resync()
    assert host.phase == "ALONE_GREETING"
    host.let_go()
    assert host.phase == "LIVE"
    assert host.copies() == [(1, 0, BLOCK)]


def test_19_an_older_comparisons_answer_is_not_taken_for_one_of_this_resync() -> None:
    """What it compared was before writes that were taken alone, or that a START jumped over."""
    host = alone()
    host.submit()
    host.connect(numbering=False, through=140)
    host.resync(120, verify=True)
    for number, counts in ((100, False), (140, False), (141, True)):
        answer = {"number": number, "sender": 1, "volume": 1, "offset_bytes": 0, "length_bytes": SIZE}
        host.get(Message.DIGESTED, **answer, blocks=SIZE // BLOCK, different=[BLOCK], here=[])
        assert (host.copies() == [(1, BLOCK, BLOCK)]) is counts
