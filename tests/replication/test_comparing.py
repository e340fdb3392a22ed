"""What the intermediate's own volumes say of digest records, and records that are for them alone (claims 4 and 14)."""

from __future__ import annotations

from typing import Any

import pytest

from blockrepl.block import Op
from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Message
from blockrepl.formats.record import RecordFlag, RecordKind, decode_batch, encode_record
from blockrepl.replication.actions import Append, CopyOwn
from blockrepl.replication.comparing import REMEMBERED, Comparing
from tests.replication.roles import FREE, GROUP, MID, P1, P2, S1
from tests.replication.test_pairing import LINKS, Group, resync, split_group

BLOCK = 65536
ANSWER = {
    "number": 7, "sender": P1, "volume": 1, "offset_bytes": 0, "length_bytes": 3 * BLOCK - 4096, "blocks": 3,
    "different": [BLOCK],
}  # fmt: skip


def local(group: Group, **state: Any) -> Group:
    """It keeps volumes from now on."""
    group.role.pairing.local_source = True
    group.role.comparing = Comparing(local=True)
    for name, value in state.items():
        setattr(group.role.state, name, value)
    return group


def split() -> Group:
    """With bits of hop 2."""
    group = split_group()
    group.bitmaps[1].mark(0, 1)
    return group


# answers


def test_what_differs_here_and_at_the_secondary_goes_to_the_secondary_only() -> None:
    comparing = Comparing(local=True)
    comparing.asked(7)
    assert comparing.compared(7, [0, BLOCK]) is None
    joined = comparing.answered(ANSWER)
    assert joined is not None
    assert (joined["different"], joined["here"]) == ([BLOCK], [0])


def test_the_secondary_s_answer_waits_for_the_comparison_here() -> None:
    comparing = Comparing(local=True)
    comparing.asked(7)
    assert comparing.answered(ANSWER) is None
    joined = comparing.compared(7, [2 * BLOCK])
    assert joined is not None
    assert joined["here"] == [2 * BLOCK]


def test_a_record_that_an_older_process_numbered_counts_as_different_here() -> None:
    joined = Comparing(local=True).answered(ANSWER)
    assert joined is not None
    assert joined["here"] == [0, 2 * BLOCK]


def test_what_is_forgotten_counts_as_different_here() -> None:
    comparing = Comparing(local=True)
    for number in range(7, 8 + REMEMBERED):
        comparing.asked(number)
        comparing.compared(number, [])
    joined = comparing.answered(ANSWER)
    assert joined is not None
    assert joined["here"] == [0, 2 * BLOCK]
    newest = comparing.answered({**ANSWER, "number": 7 + REMEMBERED})
    assert newest is not None
    assert newest["here"] == []


@pytest.mark.parametrize(("is_local", "blocks"), [(False, 3), (True, 0)])
def test_without_volumes_and_without_blocks_an_answer_goes_on_as_it_came(is_local: bool, blocks: int) -> None:
    fields = {**ANSWER, "blocks": blocks}
    assert Comparing(local=is_local).answered(fields) == fields


def test_the_primary_that_asked_gets_one_answer() -> None:
    group = local(Group())
    group.join()
    group.role.comparing.asked(7)
    assert group.do(group.role.received(LINKS[S1], Message.DIGESTED, {**ANSWER, "here": []}, 0.0)) == []
    sent = group.do(group.role.compared(7, [0]))
    assert [(link, kind, fields["here"]) for link, kind, fields in sent] == [(LINKS[P1], Message.DIGESTED, [0])]


# records for the intermediate volumes only


def own_batch(number: int, flags: int = RecordFlag.COPY) -> tuple[Chunk, int]:
    head, size = encode_record(
        RecordKind.UPDATE, GROUP, P1, MID, 1, number, 1, [Op.WRITE], [0], [0], [512], [bytes(512)], 512, flags
    )
    chunk = Chunk(size, None)
    chunk.view[:] = bytes(head) + bytes(512)
    return chunk, size


def test_a_copy_for_the_intermediate_is_numbered_and_acknowledged_and_sent_to_nobody() -> None:
    group = Group()
    group.join()
    group.write(P1, 1)
    chunk, end = own_batch(2)
    sent = group.do(group.role.batch(LINKS[P1], decode_batch(chunk.view), chunk, 0, end, 0.0, 0))
    assert [(kind, fields["number"]) for _, kind, fields in sent if kind == Message.ACK] == [(Message.ACK, 2)]
    assert group.appended[-1].head.stream == MID
    group.prepare(2)
    assert group.role.streams.validated == 2
    assert group.role.streams.sent == 1
    restarted = Group(durable=0)
    for append in group.appended:
        restarted.role.recovered(append.head)
    assert restarted.role.numbered == 2


def test_only_copies_may_be_for_the_intermediate() -> None:
    group = Group()
    group.join()
    chunk, end = own_batch(1, 0)
    with pytest.raises(ProtocolError, match="no secondary"):
        group.role.batch(LINKS[P1], decode_batch(chunk.view), chunk, 0, end, 0.0, 0)


# who copies


def test_whole_volumes_are_the_source_of_what_hop_2_missed() -> None:
    group = local(split(), filled=True)
    asked: list[CopyOwn] = []
    actions = group.role.pairing.resync(now_s=0.0)
    group.do(actions)
    group.rejoin()
    for _ in range(3):
        todo = group.role.tick(group.now_s, group.boot_ns)
        asked += [each for each in todo if isinstance(each, CopyOwn)]
        group.do(todo)
    start = group.role.state.start
    assert [kind for _, kind, _ in group.sent].count(Message.BITMAP) == 0
    for node in (P1, P2):
        group.do(group.role.received(LINKS[node], Message.COPIED, {"id": start}, 0.0))
    assert group.role.state.end == 0, "the intermediate has not copied"
    group.do(group.role.pairing.own_copied(start))
    assert group.role.state.end == group.role.numbered


@pytest.mark.parametrize("filled", [False, True])
def test_volumes_that_are_not_whole_are_no_source(filled: bool) -> None:
    group = local(split(), filled=filled)
    sent = resync(group)
    assert any(kind == Message.BITMAP for _, kind, _ in sent) is not filled
    assert group.role.pairing.copies_here is filled


# when they are whole


def finish(group: Group, *nodes: int) -> None:
    for node in nodes:
        copied = {"id": group.role.state.start}
        group.do(group.role.received(LINKS[node], Message.COPIED, copied, group.now_s))
    group.prepare(group.role.numbered)
    group.tick()


def test_a_verify_makes_them_whole_at_its_end_and_not_before() -> None:
    group = local(split(), filled=True)
    resync(group, verify=True)
    state = group.role.state
    assert (state.filled, state.filling) == (False, True)
    finish(group, P1, P2)
    assert group.pair.name == "PAIR"
    assert (state.filled, state.filling) == (True, False)


def test_in_journal_mode_a_verify_fills_nothing() -> None:
    group = split()
    resync(group, verify=True)
    finish(group, P1, P2)
    assert (group.role.state.filled, group.role.state.filling) == (False, False)


def test_20_no_copy_ends_without_an_excluded_primary() -> None:
    """Its volumes would be at no number, and the bits that say so would be cleared."""
    group = local(split())
    resync(group, verify=True)
    group.do(group.role.lost(LINKS[P2], 0.0))
    group.do(group.role.exclude(P2))
    finish(group, P1)
    assert group.pair.name == "COPY"
    assert not group.role.state.end


def test_a_verify_that_was_broken_off_is_not_replaced_by_a_resync_of_bits() -> None:
    """Else blocks that nobody had compared by then would never be."""
    group = split()
    resync(group, verify=True)
    group.do(group.role.pairing.split(writable=False, now_s=group.now_s))
    sent = resync(group)
    told = [fields["verify"] for _, kind, fields in sent if kind == Message.RESYNC]
    assert told == [True, True]
    finish(group, P1, P2)
    assert group.pair.name == "PAIR"
    group.do(group.role.pairing.split(writable=False, now_s=group.now_s))
    group.prepare(group.role.numbered)
    group.tick()
    group.bitmaps[1].mark(0, 1)
    assert [f["verify"] for _, kind, f in resync(group) if kind == Message.RESYNC] == [False, False]


def test_a_block_of_an_intermediate_volume_is_numbered_for_its_secondary() -> None:
    group = local(split(), filled=True)
    group.role._homes = {1: S1}
    resync(group)
    number = group.role.numbered
    actions = group.role.own_copy(1, BLOCK, bytearray(b"x" * BLOCK)) + group.role.own_copy(1, 0, bytearray(BLOCK))
    heads = [each.head for each in actions if isinstance(each, Append)]
    assert [(h.first, h.stream, h.sender, h.flags) for h in heads] == [
        (number + 1, S1, MID, RecordFlag.COPY), (number + 2, S1, MID, RecordFlag.COPY)
    ]  # fmt: skip
    assert heads[1].body_bytes < 4096 < heads[0].body_bytes, "zeroes travel as such"
    assert group.role.undurable_bytes < FREE
