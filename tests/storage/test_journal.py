"""The ring: layout, room, catch-up, trimming and truncation."""

from __future__ import annotations

import struct
from random import Random

import pytest
from crc32c import crc32c

from blockrepl.block import Buffer
from blockrepl.errors import UsageError
from blockrepl.formats.journal import (
    FRAME_STRUCT,
    RING_OFFSET,
    STATE_BYTES,
    FrameHeader,
    FrameKind,
    frame_bytes,
    frame_header,
)
from blockrepl.storage import frame_index
from blockrepl.storage.journal import RING_MIN_BYTES, UNSYNCED_BYTES, Journal, unsynced_limit
from tests.storage.journals import IDENTITY, RING_BYTES, Rig, frame_size


def test_the_hot_struct_and_the_construct_declaration_agree() -> None:
    random = Random(1)
    for _ in range(200):
        values = {field.name: random.getrandbits(8 * field.subcon.sizeof()) for field in frame_header.subcons}
        raw = frame_header.build(values)
        assert FRAME_STRUCT.pack(*values.values()) == raw
        assert FrameHeader._make(FRAME_STRUCT.unpack(raw))._asdict() == values


def test_a_frame_is_laid_out_as_declared() -> None:
    rig = Rig()
    rig.append(1)
    rig.sync()
    body = b"payload"
    [(offset, buffers)] = rig.journal.append(FrameKind.RECORD, 17, 5, 3, 1, 4711, [body], len(body))
    assert offset == RING_OFFSET + 4096
    raw = b"".join(buffers)
    assert len(raw) == 4096
    header = frame_header.parse(raw)
    assert (header.position, header.first, header.count, header.stream, header.sender) == (4096, 17, 5, 3, 1)
    assert (header.size_bytes, header.body_bytes, header.body_crc, header.durable_through) == (4096, 7, 4711, 4096)
    assert header.chain == frame_header.parse(rig.disk.read(RING_OFFSET, 64)).crc
    assert header.crc == crc32c(raw[:60])
    assert raw[64:71] == body
    assert not any(raw[71:])


def test_payloads_go_into_the_writes_as_they_are() -> None:
    rig = Rig()
    parts: list[Buffer] = [memoryview(bytearray(3000)), b"x" * 5000]
    [(_, buffers)] = rig.journal.append(FrameKind.RECORD, 1, 1, 3, 1, 0, parts, 8000)
    assert buffers[1] is parts[0]
    assert buffers[2] is parts[1]


@pytest.mark.parametrize("body_bytes", [0, 1, 4032, 4033, 8128, 8129, 1 << 20])
def test_frames_are_whole_blocks(body_bytes: int) -> None:
    assert frame_bytes(body_bytes) == frame_size(body_bytes)


def test_a_frame_never_wraps_and_a_pad_fills_the_end() -> None:
    rig = Rig()
    number = 0
    while rig.journal.tail + frame_size(20000) <= RING_BYTES:
        number += 1
        rig.append(number, 20000)
        rig.sync()
        rig.journal.trim(rig.journal.tail)
        rig.save(b"")
    end = rig.journal.tail
    assert end < RING_BYTES
    writes = rig.journal.append(FrameKind.RECORD, number + 1, 1, 3, 1, 0, [bytes(20000)], 20000)
    (pad_offset, pad), (offset, _) = writes
    assert pad_offset == RING_OFFSET + end
    header = frame_header.parse(b"".join(pad))
    assert (header.kind, header.size_bytes, header.position) == (FrameKind.PAD, RING_BYTES - end, end)
    assert offset == RING_OFFSET
    assert rig.journal.tail == RING_BYTES + frame_size(20000)


def test_room_that_was_given_up_is_free_only_when_the_superblock_is_durable() -> None:
    rig = Rig()
    number = 0
    while rig.journal.fits(100):
        number += 1
        rig.append(number)
        rig.sync()
    rig.journal.trim(rig.journal.tail)
    assert not rig.journal.fits(0)
    rig.begin_save(b"")
    assert not rig.journal.fits(0)
    with pytest.raises(AssertionError, match="fit"):
        rig.journal.append_note(1)
    rig.end_save()
    assert rig.journal.free_bytes == RING_BYTES
    assert rig.journal.fits(100)


def test_what_is_given_up_while_a_superblock_is_in_the_air_waits_for_the_next() -> None:
    rig = Rig()
    first = rig.append(1)
    second = rig.append(2)
    rig.sync()
    rig.journal.trim(second)
    rig.begin_save(b"")
    rig.journal.trim(rig.journal.tail)
    rig.end_save()
    assert rig.journal.free_bytes == RING_BYTES - (rig.journal.tail - second)
    assert first == 0


def test_unsynced_bytes_are_bounded() -> None:
    rig = Rig()
    number = 0
    while rig.journal.fits(10000):
        number += 1
        rig.append(number, 10000)
    assert rig.journal.unsynced_bytes <= rig.journal.unsynced_limit_bytes == RING_BYTES // 2
    rig.sync()
    assert rig.journal.fits(10000)
    assert unsynced_limit(1 << 40) == UNSYNCED_BYTES


def test_the_largest_body_fits_wherever_the_tail_stands() -> None:
    rig = Rig()
    largest = rig.journal.max_body_bytes
    assert Journal.format(IDENTITY, 256 << 20).max_body_bytes > 32 << 20, "a 32 MiB write with its record header"
    for number in range(1, 300):
        rig.append(number, 5000 * (number % 7))
        rig.sync()
        rig.journal.trim(rig.journal.tail)
        rig.save(b"")
        assert rig.journal.fits(largest)
        assert not rig.journal.fits(largest + 2 * 4096 + rig.journal.unsynced_limit_bytes // 2)


def test_what_is_not_durable_is_neither_given_up_nor_sent() -> None:
    rig = Rig()
    rig.append(1)
    rig.sync()
    rig.append(2)
    with pytest.raises(AssertionError, match="durable"):
        rig.journal.trim(rig.journal.tail)
    assert [ref.first for ref in rig.journal.frames_after(3, 0, 1 << 20)] == [1]
    assert [ref.first for ref in rig.journal.frames_of_sender(1, 0, 1 << 20)] == [1]


def test_late_reports_of_a_sync_change_nothing() -> None:
    rig = Rig()
    rig.append(1)
    middle = rig.journal.tail
    rig.append(2)
    rig.sync()
    rig.journal.synced(middle)
    assert rig.journal.durable == rig.journal.tail
    with pytest.raises(AssertionError):
        rig.journal.synced(rig.journal.tail + 4096)


def test_catch_up_finds_the_records_of_a_stream_after_a_number() -> None:
    rig = Rig(8 << 20)
    random = Random(5)
    model: list[tuple[int, int, int, int]] = []
    number = 1
    while number < 3000:
        count, stream, sender = random.randrange(1, 9), random.choice([3, 3, 3, 4]), random.choice([1, 2])
        rig.append(number, 100, count, stream, sender)
        model.append((number, count, stream, sender))
        number += count
        if random.random() < 0.1:
            rig.note(number)
            rig.sync()
    rig.sync()
    for after in [0, 1, 2, 1500, *random.sample(range(3000), 40), 2999, 5000]:
        for which in (3, 4, 5):
            expected = [(f, c) for f, c, stream, _ in model if stream == which and f + c - 1 > after]
            found = rig.journal.frames_after(which, after, 1 << 30)
            assert [(ref.first, ref.count) for ref in found] == expected
        for which in (1, 2, 5):
            expected = [(f, c) for f, c, _, sender in model if sender == which and f + c - 1 > after]
            found = rig.journal.frames_of_sender(which, after, 1 << 30)
            assert [(ref.first, ref.count) for ref in found] == expected
    for ref in rig.journal.frames_after(3, 0, 1 << 30):
        assert rig.disk.read(ref.body_offset, 8) == b"%08d" % ref.first


def test_catch_up_stops_near_its_limit_but_gives_at_least_one() -> None:
    rig = Rig()
    for number in range(1, 9):
        rig.append(number, 1000)
    rig.sync()
    assert [len(rig.journal.frames_after(3, 0, limit)) for limit in (1, 1000, 1001, 2000, 8000)] == [1, 1, 2, 2, 8]
    assert rig.journal.frames_after(3, 0, 0) == []


def test_trimming_by_number_never_passes_a_number_that_is_still_needed() -> None:
    rig = Rig()
    positions = {number: rig.append(number, count=2) for number in (1, 3, 5)}
    rig.note(6)
    rig.append(7)
    rig.sync()
    journal = rig.journal
    assert [journal.position_after(number) for number in (0, 1, 2, 3, 4)] == [
        positions[1], positions[1], positions[3], positions[3], positions[5],
    ]  # fmt: skip
    assert journal.position_after(6) == journal.tail - 4096
    assert journal.position_after(7) == journal.tail


def test_a_note_below_a_record_before_it_does_not_hide_that_record() -> None:
    rig = Rig()
    rig.append(9)
    rig.note(7)
    rig.sync()
    assert rig.journal.position_after(8) == 0
    assert rig.journal.index.last_note() == 7


def test_the_index_survives_long_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trim moves the columns now and then; what it says stays right, and it does not grow."""
    monkeypatch.setattr(frame_index, "SHRINK_AT", 16)
    rig = Rig()
    kept: list[tuple[int, int, int]] = []
    random = Random(3)
    for number in range(1, 3000):
        stream = random.choice([3, 4, 3 + number // 1000])
        rig.append(number, stream=stream, sender=stream % 2 + 1)
        kept.append((rig.journal.tail - 4096, number, stream))
        if number % 10 == 0:
            rig.sync()
            drop = random.randrange(len(kept))
            rig.journal.trim(kept[drop][0])
            del kept[:drop]
            if rig.journal.used_bytes > RING_BYTES // 2:
                rig.journal.trim(rig.journal.tail)
                kept.clear()
            rig.save(b"")
            after = random.randrange(number)
            for which in (3, 4, 5):
                found = [ref.first for ref in rig.journal.frames_after(which, after, 1 << 30)]
                assert found == [n for _, n, s in kept if s == which and n > after]
            assert [ref.position for ref in rig.journal.frames()] == [position for position, _, _ in kept]
            assert len(rig.journal.index._position) <= max(600, 2 * len(kept) + 40)
    assert len(rig.journal.index._by_stream) <= 3


def test_truncation_discards_beyond_a_number_for_ever() -> None:
    """PROTOCOL, rule 23: a takeover discards beyond n; nothing of it comes back, whatever reached the platter."""
    rig = Rig()
    for number in range(1, 8):
        rig.append(number, count=1)
        rig.sync()
    rig.note(7)
    rig.sync()
    dropped = rig.journal.truncate(rig.journal.position_after(4))
    assert dropped == (3, 300)
    assert not rig.journal.fits(0)
    rig.save(b"taken over at 4")
    assert rig.numbers() == [1, 2, 3, 4]
    assert rig.journal.index.last_note() == 0
    assert rig.examine().state == b"taken over at 4"
    assert [ref.first for ref in rig.examine().journal.frames()] == [1, 2, 3, 4]
    rig.append(5, salt=1)
    rig.disk.sync()
    recovered = rig.restart()
    assert [ref.first for ref in recovered.journal.frames()] == [1, 2, 3, 4, 5]
    assert [ref.first for ref in recovered.journal.frames_after(3, 4, 1 << 20)] == [5]
    rig.journal.truncate(rig.journal.position_after(2))
    rig.save(b"")
    rig.append(3, salt=2)
    rig.sync()
    rig.journal.trim(rig.journal.position_after(2))
    rig.save(b"")
    assert [ref.first for ref in rig.restart().journal.frames()] == [3]


def test_truncation_keeps_durable_frames_only() -> None:
    """Else a power cut takes a part of them, and the new tag begins beyond the tail."""
    rig = Rig()
    rig.append(1)
    rig.append(2)
    with pytest.raises(AssertionError, match="durable"):
        rig.journal.truncate(4096)


def test_the_largest_state_fits_into_a_superblock() -> None:
    rig = Rig()
    rig.save(b"s" * STATE_BYTES)
    assert rig.examine().state == b"s" * STATE_BYTES
    with pytest.raises(AssertionError):
        rig.begin_save(b"s" * (STATE_BYTES + 1))


@pytest.mark.parametrize("ring_bytes", [0, RING_MIN_BYTES - 4096, RING_MIN_BYTES + 512])
def test_a_ring_too_small_or_uneven_is_refused(ring_bytes: int) -> None:
    with pytest.raises(UsageError):
        Journal.format(IDENTITY, ring_bytes)


def test_the_index_takes_about_sixty_bytes_a_frame() -> None:
    rig = Rig(64 << 20)
    for number in range(1, 5000):
        rig.journal.append_note(number) if number % 50 == 0 else rig.journal.append(1, number, 1, 3, 1, 0, [b"x"], 1)
    index = rig.journal.index
    used = sum(column.itemsize for column in index._columns) + 2 * struct.calcsize("Q")
    assert used <= 60


def test_a_durable_position_where_a_pad_starts_may_be_trimmed_to() -> None:
    rig = Rig()
    number = 0
    while rig.journal.tail + frame_size(20000) <= RING_BYTES:
        number += 1
        rig.append(number, 20000)
        rig.sync()
        rig.journal.trim(rig.journal.position_after(number - 5))
        rig.save(b"")
    durable = rig.journal.durable
    rig.append(number + 1, 20000)
    rig.disk.sync()
    rig.journal.trim(durable)
    rig.save(b"")
    assert rig.numbers() == [number + 1]
    assert [ref.first for ref in rig.restart().journal.frames()] == [number + 1]
