"""A primary alone, and on its way back (PROTOCOL, rules 7, 8, 16, 17, 19, 21): what they forbid does not happen."""

from __future__ import annotations

import pytest

from blockrepl.bitmap import Bitmap
from blockrepl.block import Op
from blockrepl.formats.link import Epoch, Message, Pair
from blockrepl.formats.record import RecordFlag, RecordKind, decode_batch, iterate_entries
from blockrepl.replication.actions import DigestBlocks, ReadBlocks, SaveBits, SaveState, SyncVolumes
from blockrepl.replication.policy import Policy
from blockrepl.replication.primary import Phase
from tests.replication.alone_host import BLOCK, NEVER, SIZE, Host, alone
from tests.replication.roles import P1, TWO


def test_16_alone_no_sooner_than_twice_the_lease_after_the_newest_stamp_was_received() -> None:
    host = Host()
    host.start()
    host.now_s = 10.0
    host.beat(5)
    host.do(host.role.lost(host.link, 10.0))
    host.tick(5.9)
    assert host.phase == "DETACHED"
    host.tick(0.2)
    assert host.phase == "ALONE"


def test_16_the_link_is_closed_before_it_goes_alone() -> None:
    host = Host()
    host.start()
    host.beat(5)
    host.tick(6.1)
    assert "close" in host.log
    assert host.role.link == 0
    host.tick(0.1)
    assert host.phase == "ALONE"


def test_16_an_older_stamp_that_comes_late_does_not_count_as_new() -> None:
    host = Host()
    host.start()
    host.beat(100)
    host.now_s = 5.0
    host.beat(99)
    assert host.role.stamp_received_s == 0.0


def test_16_a_started_primary_never_goes_alone_unasked() -> None:
    host = Host()
    host.tick(1000)
    assert host.phase == "FRESH"
    assert not host.role.serving


def test_15_with_fence_data_it_never_goes_alone() -> None:
    host = Host(Policy(hold_s=1000.0, link_timeout_s=1e9))
    host.start()
    host.beat(1)
    host.do(host.role.lost(host.link, 0.0))
    host.tick(100)
    host.submit()
    assert host.phase == "DETACHED"
    assert not host.stored


def test_24_a_fenced_primary_does_not_go_alone() -> None:
    host = Host()
    host.start()
    host.beat(1)
    refusal = {"code": 5, "epoch": TWO, "promised": TWO, "text": "a higher epoch"}
    host.do(host.role.received(host.link, Message.REFUSED, refusal, 0.0))
    host.tick(100)
    assert host.phase == "DETACHED"


def test_17_bits_p_vols_and_psue_are_durable_before_the_first_write_completes_alone() -> None:
    host = Host()
    host.start()
    host.beat(1)
    first = host.submit(offset=0)
    host.ack(1, 10)
    assert host.stored == [first]
    pending = host.submit(offset=3 * BLOCK)
    host.do(host.role.lost(host.link, 0.0))
    host.log.clear()
    host.tick(6.1)
    assert host.stored == [first, pending]
    assert host.log[:3] == ["bits", "sync", "state"]
    assert host.log.index("store") > 2
    durable = Bitmap(SIZE, BLOCK, host.durable_bits[1])
    assert durable.covers(0, 1), "acknowledged, not validated: the secondaries may lack it (rule 8)"
    assert durable.covers(3 * BLOCK, 1)
    assert host.role.state.suspended == Pair.PSUE


def test_8_what_is_validated_and_checkpointed_needs_no_bit() -> None:
    host = Host()
    host.start()
    host.submit(offset=0)
    host.ack(1, 10)
    host.submit(offset=BLOCK)
    host.ack(2, 11)
    host.do(host.role.checkpoints.begin(0.0))
    host.beat(1, validated=10)
    host.do(host.role.lost(host.link, 0.0))
    host.tick(6.1)
    assert list(host.bitmaps[1].runs()) == [(1, 1)]


def test_8_many_unconfirmed_batches_are_folded_and_none_is_forgotten() -> None:
    host = Host()
    host.start()
    for number in range(1, 6000):
        host.role.unconfirmed.add(number, 1, [(number % 16) * BLOCK], [4096])
    assert len(host.role.unconfirmed._columns) <= 4097
    host.role.unconfirmed.mark()
    assert host.bitmaps[1].count == 16


def test_17_writes_that_wait_for_their_bits_are_stored_in_order() -> None:
    host = alone()
    host.holds = {SaveBits}
    first, second = host.submit(offset=0), host.submit(offset=5 * BLOCK)
    third = host.submit(offset=0)
    assert not host.stored
    host.holds = set()
    held, host.held = host.held, []
    host.do(held)
    assert host.stored == [first, second, third]


def test_a_write_to_blocks_whose_bits_are_durable_waits_for_nothing() -> None:
    host = alone()
    host.submit(offset=0)
    host.log.clear()
    host.submit(offset=8192)
    assert host.log == ["store"]


def test_7_a_primary_that_stored_psue_never_replays() -> None:
    host = Host(suspended=int(Pair.PSUE), alone=True, checkpoint=7)
    assert host.phase == "ALONE"
    host.submit()
    host.connect(through=99)
    assert host.stored
    assert not host.said(Message.REPLAY)
    assert host.said(Message.HELLO)[0]["suspended"]
    assert host.phase == "JOINED"


def test_suspend_is_obeyed_at_once_where_the_fence_allows_it_and_writes_are_held_where_not() -> None:
    for policy, phase in ((NEVER, Phase.ALONE), (Policy(hold_s=1e9), Phase.LIVE)):
        host = Host(policy)
        host.start()
        batch = host.submit()
        host.do(host.role.received(host.link, Message.SUSPEND, {"pair": Pair.PSUE, "number": 3}, 0.0))
        assert host.phase == phase.name
        assert (host.stored == [batch]) is (phase is Phase.ALONE)


def test_who_was_told_to_go_alone_greets_anew_and_a_resync_takes_it_back() -> None:
    host = Host()
    host.start()
    host.do(host.role.received(host.link, Message.SUSPEND, {"pair": Pair.PSUE, "number": 0}, 0.0))
    assert "close" in host.log
    host.connect(through=0, batch=0, numbering=False, pair=Pair.PSUE)
    assert host.said(Message.HELLO)[-1]["suspended"]
    assert host.phase == "JOINED"
    host.resync()
    assert host.phase == "LIVE"


@pytest.mark.parametrize("held", [SaveBits, SyncVolumes, SaveState])
def test_a_suspension_in_the_middle_of_getting_ready_for_a_resync_voids_it(held: type) -> None:
    """Found by the simulator: it went live, and sent batches that the intermediate did not number."""
    host = alone()
    host.submit(offset=0)
    host.connect(through=0, batch=0, numbering=False, pair=Pair.PSUE)
    host.holds = {held}
    host.resync()
    host.do(host.role.received(host.link, Message.SUSPEND, {"pair": Pair.PSUE, "number": 60}, 0.0))
    host.holds = set()
    late, host.held = host.held, []
    host.do(late)
    batch = host.submit(offset=BLOCK)
    assert batch in host.stored, "alone, as before"
    assert not host.batches
    assert host.role.state.suspended
    if not host.role.link:
        host.connect(through=0, batch=0, numbering=False, pair=Pair.PSUE)
    host.resync(70)
    assert host.phase == "LIVE"
    assert {offset for _, offset, _ in host.copies()} >= {0}


def test_21_on_resync_it_merges_syncs_stores_and_then_writes_are_numbered_again() -> None:
    host = alone()
    host.submit(offset=0)
    host.connect(through=0, batch=0, numbering=False, pair=Pair.PSUE)
    bits = {"volume": 2, "block_bytes": BLOCK, "first_block": 8, "bits": b"\x01"}
    host.do(host.role.received(host.link, Message.BITMAP, bits, 0.0))
    host.log.clear()
    host.resync()
    assert host.log[:3] == ["bits", "sync", "state"]
    assert host.phase == "LIVE"
    assert not host.role.state.suspended
    assert sorted(host.copies()) == [(1, 0, BLOCK), (2, 8 * BLOCK, BLOCK)]
    assert not host.said(Message.COPIED), "the copies are not acknowledged yet"
    host.ack(2, 53)
    assert host.said(Message.COPIED) == [{"id": 50}]
    before = len(host.stored)
    host.submit(offset=BLOCK)
    assert len(host.stored) == before, "numbered first, again"


def test_batches_count_on_from_what_the_intermediate_has_not_from_what_completed_alone() -> None:
    host = Host()
    host.start()
    host.beat(1)
    host.submit(offset=0)  # batch 1, never numbered
    host.do(host.role.lost(host.link, 0.0))
    host.tick(6.1)
    host.connect(through=0, batch=0, numbering=False, pair=Pair.PSUE)
    host.batches.clear()
    host.resync()
    assert [decode_batch(memoryview(bytearray(raw))).batch for raw in host.batches] == [1]


def test_17_bits_stay_until_the_end_is_validated_and_go_then() -> None:
    host = alone()
    host.submit(offset=0)
    host.connect(numbering=False)
    host.resync()
    host.ack(1, 53)
    assert host.bitmaps[1].count == 1
    host.do(host.role.received(host.link, Message.RESYNCED, {"id": 50}, 0.0))
    assert host.bitmaps[1].count == 0
    assert not any(Bitmap(SIZE, BLOCK, host.durable_bits[1]).bits)
    assert host.role.state.resync == 0


def test_17_the_end_of_a_resync_clears_nothing_that_was_suspended_since() -> None:
    host = alone()
    host.submit(offset=0)
    host.connect(numbering=False)
    host.resync()
    host.ack(1, 53)
    host.beat(9)
    host.do(host.role.lost(host.link, host.now_s))
    host.tick(6.1)
    assert host.phase == "ALONE"
    host.connect(numbering=False, resynced=50)
    assert host.bitmaps[1].count == 1


def test_who_was_away_at_the_end_learns_of_it_from_welcome() -> None:
    host = alone()
    host.submit(offset=0)
    host.connect(numbering=False)
    host.resync()
    host.ack(1, 53)
    host.do(host.role.lost(host.link, host.now_s))
    host.connect(resynced=50, through=53, batch=1)
    assert host.bitmaps[1].count == 0


def test_19_a_copy_waits_for_writes_in_flight_and_later_writes_wait_for_the_copy() -> None:
    host = Host()
    host.start()
    early = host.submit(offset=0)
    host.bitmaps[1].mark(0, 1)
    host.holds = {ReadBlocks}
    host.resync()
    assert not host.held, "a write to the range is in flight"
    host.ack(1, 10)
    assert [type(action) for action in host.held] == [ReadBlocks]
    late = host.submit(offset=4096)
    assert len(host.batches) == 1, "it waits for the copy"
    host.holds = set()
    host.do(host.held)
    kinds = [decode_batch(memoryview(bytearray(raw))).flags & RecordFlag.COPY for raw in host.batches]
    assert kinds == [0, RecordFlag.COPY, 0]
    host.ack(3, 13)
    assert host.stored == [early, late]


def test_a_copy_that_was_read_while_the_link_broke_is_sent_again_and_no_block_is_left_out() -> None:
    host = Host()
    host.start()
    for block in range(0, 16, 2):
        host.bitmaps[1].mark(block * BLOCK, 1)
    host.holds = {ReadBlocks}
    host.resync()
    host.do(host.role.lost(host.link, 0.0))
    host.holds = set()
    held, host.held = host.held, []
    host.do(held)
    host.batches.clear()
    host.connect(resync=50)
    host.resync()
    for _ in range(8):
        host.ack(host.role.next_batch - 1, 60)
    assert {offset // BLOCK for _, offset, _ in host.copies()} == set(range(0, 16, 2))
    assert host.said(Message.COPIED)


def test_a_resync_keeps_to_its_rate() -> None:
    host = Host()
    host.start()
    host.bitmaps[1].fill()
    host.resync(rate_bytes=BLOCK * 4)
    host.now_s = 0.0
    for _ in range(40):
        host.tick(0.1)
        host.ack(host.role.next_batch - 1, 60)
    sent = sum(length for _, _, length in host.copies())
    assert 0 < sent <= 4 * BLOCK * 4 + (256 << 10)


def test_8_verify_compares_everything_and_copies_what_differs() -> None:
    host = Host()
    host.start()
    host.resync(verify=True)
    digests = [raw for raw in host.batches if decode_batch(memoryview(bytearray(raw))).kind == RecordKind.DIGEST]
    assert len(digests) == 2
    for volume, different in ((1, [3 * BLOCK]), (2, [])):
        fields = {"number": 59, "sender": P1, "volume": volume, "offset_bytes": 0, "length_bytes": SIZE, "blocks": 16}
        host.do(host.role.received(host.link, Message.DIGESTED, {**fields, "different": different, "here": []}, 0.0))
    assert host.copies() == [(1, 3 * BLOCK, BLOCK)]
    assert not host.said(Message.COPIED)
    host.ack(host.role.next_batch - 1, 60)
    assert host.said(Message.COPIED) == [{"id": 50}]


def test_8_after_an_unclean_stop_the_ranges_are_unknown_until_all_of_before_is_validated() -> None:
    host = Host(clean=False)
    seen = [host.role.trusted]
    host.connect(through=7)
    host.do(host.role.received(host.link, Message.REPLAYED, {"through": 7}, 0.0))
    seen.append(host.role.trusted)
    for validated in (6, 7):
        host.beat(validated, validated=validated)
        seen.append(host.role.trusted)
    assert seen == [False, False, False, True]
    assert Host(clean=True).role.trusted


def test_8_suspended_while_untrusted_it_says_so_for_ever() -> None:
    host = Host(clean=False)
    host.connect(through=7)
    host.do(host.role.received(host.link, Message.REPLAYED, {"through": 7}, 0.0))
    host.beat(1)
    host.do(host.role.lost(host.link, 0.0))
    host.tick(6.1)
    host.connect(numbering=False)
    assert host.said(Message.HELLO)[-1]["trusted"] is False


def test_8_a_clean_stop_stores_the_bits_of_what_the_group_may_lack() -> None:
    host = Host()
    host.start()
    host.submit(offset=0)
    host.ack(1, 10)
    host.submit(offset=2 * BLOCK)
    done: list[bool] = []
    host.do(host.role.suspension.close(lambda: done.append(True)))
    assert done
    assert host.role.state.clean
    assert Bitmap(SIZE, BLOCK, host.durable_bits[1]).count == 2


def test_25_formed_anew_it_is_suspended_with_the_bits_of_what_the_others_may_lack() -> None:
    host = Host(Policy(hold_s=1e9))
    host.start()
    host.submit(offset=0)
    host.ack(1, 10)
    open_ = host.submit(offset=2 * BLOCK)
    host.log.clear()
    host.do(host.role.suspension.reform(Epoch(5, b"5" * 16), 0))
    assert host.log == ["close", "bits", "sync", "state", "reformed"], "17: it never replays any more"
    assert Bitmap(SIZE, BLOCK, host.durable_bits[1]).count == 2
    state = host.role.state
    assert (state.suspended, state.epoch.number, state.incarnation, state.alone) == (Pair.PSUE, 5, 2, False)
    host.connect(epoch=Epoch(5, b"5" * 16), promised=Epoch(5, b"5" * 16), numbering=False)
    host.batches.clear()
    host.resync()
    heads = [decode_batch(memoryview(bytearray(raw))) for raw in host.batches]
    assert (heads[0].incarnation, heads[0].batch) == (2, 1)
    host.ack(1, 70)
    assert open_ in host.stored


def test_a_primary_that_becomes_a_target_marks_what_the_others_lack_and_fails_its_hosts() -> None:
    host = Host(Policy(hold_s=1e9))
    host.start()
    host.submit(offset=0)
    host.ack(1, 10)
    open_ = host.submit(offset=2 * BLOCK)
    host.do(host.role.suspension.retire("the group is swapped"))
    assert host.failed == [open_]
    assert Bitmap(SIZE, BLOCK, host.durable_bits[1]).count == 2
    assert host.log[-1] == "reformed"


def test_a_resync_brings_what_front_ends_keep_with_a_volume_too() -> None:
    host = Host()
    host.start()
    host.metadata[2] = b"registrations"
    host.resync()
    raw = host.batches[-1]
    head = decode_batch(memoryview(bytearray(raw)))
    (entry,) = iterate_entries(head, memoryview(raw))
    assert (entry[0], entry[1], bytes(entry[5] or b"")) == (2, Op.METADATA, b"registrations")
    assert not host.said(Message.COPIED)
    host.ack(head.batch, 60)
    assert host.said(Message.COPIED)


def test_bits_of_others_volumes_are_refused() -> None:
    from blockrepl.errors import ProtocolError

    host = Host()
    host.start()
    for fields in (
        {"volume": 9, "block_bytes": BLOCK, "first_block": 0, "bits": b"\x01"},
        {"volume": 1, "block_bytes": 512, "first_block": 0, "bits": b"\x01"},
        {"volume": 1, "block_bytes": BLOCK, "first_block": 8000, "bits": b"\x01"},
    ):
        with pytest.raises(ProtocolError):
            host.role.received(host.link, Message.BITMAP, fields, 0.0)


def test_3_behind_a_range_that_is_read_writes_keep_their_order_and_complete_though_the_primary_is_alone() -> None:
    """A digest is read while a primary that is alone has met the intermediate again. What waited for it was left behind
    until the resync, and overwrote then what a later write had completed meanwhile.
    """
    host = alone()
    host.connect(pair=Pair.PSUE, numbering=False)
    assert host.phase == "JOINED"
    host.holds = {DigestBlocks}
    host.do(host.role.digest(1, 0, BLOCK))
    older = host.submit(1, 0)
    later = host.submit(1, 0)
    elsewhere = host.submit(1, 5 * BLOCK)
    assert host.stored == [elsewhere]
    host.let_go()
    assert host.stored == [elsewhere, older, later]
