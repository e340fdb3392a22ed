"""Recovery of a journal volume: every row of the decision table on real rings, and schedules that PROTOCOL names."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from crc32c import crc32c

from blockrepl.errors import DamagedError, IdentityError, MissingError
from blockrepl.formats.journal import (
    FRAME_HEADER_BYTES,
    FRAME_MAGIC,
    FRAME_STRUCT,
    FRAME_UNSIGNED_STRUCT,
    RING_OFFSET,
    FrameHeader,
    FrameKind,
)
from blockrepl.formats.slots import SLOT_BYTES, SlotKind
from blockrepl.storage.journal import Journal
from blockrepl.storage.recovery import Found, Verdict, judge, recover
from blockrepl.storage.slots import Identity
from tests.storage.journals import GROUP, IDENTITY, RING_BYTES, Rig, body_of, good_body
from tests.storage.sim_disk import SimDisk

TAG = 7


def header_at(disk: SimDisk, position: int) -> FrameHeader:
    raw = disk.read(RING_OFFSET + position % RING_BYTES, FRAME_HEADER_BYTES)
    return FrameHeader._make(FRAME_STRUCT.unpack(raw))


def put_header(disk: SimDisk, place: int, header: FrameHeader) -> None:
    """Write ``header`` with a right CRC at the ring offset ``place``."""
    unsigned = FRAME_UNSIGNED_STRUCT.pack(*header[:-1])
    disk.write(RING_OFFSET + place, [unsigned + crc32c(unsigned).to_bytes(4, "big")])
    disk.sync()


def second_lap() -> Rig:
    """A ring in its second lap: frames 1000 … 1003 stand at its start, remains of the first lap behind them."""
    rig = Rig(tag=TAG)
    for number in range(1, 257):
        rig.append(number)
        rig.sync()
    rig.journal.trim(rig.journal.tail)
    rig.save(b"lap")
    for number in range(1000, 1004):
        rig.append(number)
    rig.disk.sync()  # and the journal is not told: no later frame speaks for these
    return rig


LAST = RING_BYTES + 3 * 4096  # where frame 1003 of `second_lap` stands


def edited(**fields: int) -> Callable[[Rig], None]:
    def edit(rig: Rig) -> None:
        put_header(rig.disk, LAST % RING_BYTES, header_at(rig.disk, LAST)._replace(**fields))

    return edit


def torn_header(rig: Rig) -> None:
    rig.disk.write(RING_OFFSET + LAST % RING_BYTES + 20, [b"\xff"])


def torn_body(rig: Rig) -> None:
    rig.disk.write(RING_OFFSET + LAST % RING_BYTES + 100, [b"\xff"])


def zeroed(rig: Rig) -> None:
    rig.disk.write(RING_OFFSET + LAST % RING_BYTES, [bytes(4096)])


def intact(rig: Rig) -> None:
    pass


WHAT_IS_THERE = {
    "the frame itself": (intact, Found.FRAME, True),
    "a torn body": (torn_body, Found.FRAME, False),
    "a torn header": (torn_header, Found.NOTHING, False),
    "zeros": (zeroed, Found.NOTHING, False),
    "another chain": (edited(chain=99), Found.REMNANT, False),
    "an earlier lap": (edited(position=LAST - RING_BYTES), Found.STALE_LAP, False),
    "a later lap": (edited(position=LAST + RING_BYTES), Found.LATER, False),
    "a later history": (edited(tag=TAG + 1), Found.LATER, False),
    "another journal's frame": (edited(tag=TAG + 5000), Found.NOTHING, False),
    "an earlier history": (edited(tag=TAG - 1), Found.NOTHING, False),
    "a misplaced frame of this lap": (edited(position=LAST + 4096), Found.NOTHING, False),
    "a misplaced frame of an earlier lap": (edited(position=LAST - 4096), Found.NOTHING, False),
    "a size that is not the body's": (edited(size_bytes=8192), Found.NOTHING, False),
    "a size beyond the ring": (edited(kind=FrameKind.PAD, size_bytes=RING_BYTES, body_bytes=0), Found.NOTHING, False),
    "an unknown kind": (edited(kind=9), Found.NOTHING, False),
    "an unknown version": (edited(version=2), Found.NOTHING, False),
    "a frame that boasts": (edited(durable_through=LAST + 4096), Found.NOTHING, False),
}


@pytest.mark.parametrize("witness", ["nobody", "superblock", "later frame"])
@pytest.mark.parametrize("what", WHAT_IS_THERE)
def test_every_row_of_the_decision_table(what: str, witness: str) -> None:
    rig = second_lap()
    if witness == "later frame":
        rig.sync()
        rig.append(1004)
        rig.disk.sync()
    elif witness == "superblock":
        rig.sync()
        rig.save(b"after")
    edit, found, body_good = WHAT_IS_THERE[what]
    edit(rig)
    rig.disk.sync()
    verdict = judge(found, body_good, witness != "nobody")
    if verdict is Verdict.DAMAGED:
        before = bytes(rig.disk.platter)
        with pytest.raises(DamagedError, match=rf"position {LAST}, after number 1002") as caught:
            rig.examine()
        assert caught.value.hint
        assert bytes(rig.disk.platter) == before
        return
    recovered = rig.examine()
    numbers = [ref.first for ref in recovered.journal.frames()]
    if verdict is Verdict.CUT:
        assert numbers == [1000, 1001, 1002]
        assert recovered.cut_position == LAST
        assert recovered.found_at_cut is found
    else:
        assert numbers == [1000, 1001, 1002, 1003] + [1004] * (witness == "later frame")


def test_the_table_itself() -> None:
    """All inputs: only a whole frame in its place is taken, damage is never cut, a torn tail is never damage."""
    for found in Found:
        for body_good in (False, True):
            for shown_durable in (False, True):
                verdict = judge(found, body_good, shown_durable)
                if found is Found.FRAME and body_good:
                    assert verdict is Verdict.TAKE
                elif found is Found.LATER:
                    assert verdict is Verdict.DAMAGED
                else:
                    assert verdict is (Verdict.DAMAGED if shown_durable else Verdict.CUT)


def test_stale_laps_and_remnants_are_told_apart() -> None:
    rig = second_lap()
    zeroed_at = RING_BYTES + 4096
    rig.disk.write(RING_OFFSET + 4096, [bytes(4096)])
    rig.disk.sync()
    recovered = rig.examine()
    assert recovered.cut_position == zeroed_at
    assert recovered.remnants == 2
    assert recovered.stale_laps == 252
    written = [offset for offset, _ in recovered.writes]
    assert written[2:] == [RING_OFFSET + 2 * 4096, RING_OFFSET + 3 * 4096], "stale laps are left alone"


def test_a_cut_record_does_not_come_back_behind_a_resent_one() -> None:
    """PROTOCOL, rule 9: 1 is lost, 2 reached the platter; 1 is sent again, the same bytes; 2 is not."""
    rig = Rig()
    rig.append(1)
    rig.append(2)
    rig.disk.sync()
    lost = rig.disk.read(RING_OFFSET, 4096)
    rig.disk.write(RING_OFFSET, [bytes(4096)])
    rig.disk.sync()
    rig.restart()
    assert rig.numbers() == []
    rig.append(1)
    assert rig.disk.read(RING_OFFSET, 4096) == lost, "the schedule is what it claims to be"
    rig.disk.sync()
    rig.restart()
    assert rig.numbers() == [1]


def test_what_was_cut_is_gone_after_a_power_cut_before_anything_is_appended() -> None:
    rig = Rig()
    for number in range(1, 6):
        rig.append(number)
    rig.disk.sync()
    rig.disk.write(RING_OFFSET + 4096, [bytes(4096)])
    rig.disk.sync()
    rig.restart()
    rig.disk.power_cut(Random(1), 512)
    magic = FRAME_MAGIC.to_bytes(4, "big")
    marked = [place for place in range(0, RING_BYTES, 4096) if rig.disk.read(RING_OFFSET + place, 4) == magic]
    assert marked == [0]


def test_a_tail_whose_sync_failed_is_written_again() -> None:
    """A failed write-back leaves clean pages: the process sees them, the platter has not got them, fsync says well."""
    rig = Rig()
    rig.append(1)
    rig.sync()
    rig.append(2, 9000)
    rig.disk.pending.clear()  # the sync failed; the next process starts on the same page cache
    rig.restart()
    assert rig.numbers() == [1, 2]
    rig.disk.power_cut(Random(1), 512)
    assert [ref.first for ref in rig.examine().journal.frames()] == [1, 2]


def test_a_superblock_whose_sync_failed_is_written_again() -> None:
    rig = Rig()
    rig.append(1)
    rig.sync()
    rig.journal.trim(rig.journal.tail)
    rig.begin_save(b"newest")
    rig.disk.pending.clear()
    assert rig.restart().state == b"newest"
    rig.begin_save(b"newer still")  # goes to the other slot, and is torn
    rig.disk.platter[0:SLOT_BYTES] = rig.disk.platter[0:100] + bytes(SLOT_BYTES - 100)
    rig.disk.power_cut(Random(3), 512)
    assert rig.examine().state in (b"newest", b"newer still")


@pytest.mark.parametrize("gap", [0, 1])
def test_the_farthest_witness_is_found(gap: int) -> None:
    """Unsynced up to the limit, synced, unsynced up to the limit again; of all that only the last frame is left."""
    rig = Rig()
    limit = rig.journal.unsynced_limit_bytes
    frames = limit // 4096
    if gap:
        rig.append(5000)
        rig.sync()
    start = rig.journal.tail
    for number in range(1, frames + 1):
        rig.append(number)
    rig.sync()
    for number in range(frames + 1, 2 * frames + (0 if gap else 1)):
        rig.append(number)
    rig.disk.sync()
    last = rig.journal.tail - 4096
    rig.disk.write(RING_OFFSET + start, [bytes(last - start)])
    rig.disk.sync()
    with pytest.raises(DamagedError, match=f"position {start}"):
        rig.examine()


def test_damage_names_the_numbers_around_it() -> None:
    rig = Rig()
    for number in range(10, 15):
        rig.append(number)
        rig.sync()
    rig.disk.write(RING_OFFSET + 2 * 4096, [b"xxxx"])
    with pytest.raises(DamagedError, match=r"after number 11.*number 13\) shows that everything below 12288"):
        rig.examine()


def test_a_superblock_older_than_the_ring_is_damage() -> None:
    """The newest slot rots after the room it freed was used again: the older one must not be believed."""
    rig = Rig()
    number = 0
    for _ in range(3):
        for _ in range(200):
            number += 1
            rig.append(number)
            rig.sync()
        rig.journal.trim(rig.journal.tail)
        rig.save(b"")
    for _ in range(250):
        number += 1
        rig.append(number)
        rig.sync()
    newest = rig.journal.slots.generation % 2 * SLOT_BYTES
    rig.disk.write(newest + 50, [b"rot"])
    with pytest.raises(DamagedError):
        rig.examine()


def test_frames_of_another_journal_inside_a_payload_are_not_believed() -> None:
    """A journal file lies on a replicated volume: its frames, right position and CRC, stand in our payload."""
    inner = Rig(tag=12345)
    for number in range(1, 5):
        inner.append(number)
        inner.sync()
    image = inner.disk.read(RING_OFFSET, 4 * 4096)
    rig = Rig(tag=99)
    payload = bytes(4096 - FRAME_HEADER_BYTES) + image[4096:]  # at 4096 of the frame: where they belong
    rig.perform(rig.journal.append(FrameKind.RECORD, 1, 1, 3, 1, crc32c(payload), [payload], len(payload)))
    rig.disk.sync()
    rig.disk.write(RING_OFFSET, [bytes(512)])  # the header is torn off
    recovered = rig.restart()
    assert recovered.cut_position == 0
    assert recovered.remnants == 0


def test_a_full_ring_is_recovered_whole() -> None:
    rig = Rig()
    number = 0
    while rig.journal.fits(100):
        number += 1
        rig.append(number)
        rig.sync()
    assert rig.journal.free_bytes == 0
    recovered = rig.restart()
    assert rig.numbers() == list(range(1, number + 1))
    assert not rig.journal.fits(0)
    assert recovered.remnants == 0


def test_a_recovered_journal_takes_nothing_before_it_is_synced() -> None:
    rig = Rig()
    rig.append(1)
    rig.disk.sync()
    journal = rig.examine().journal
    assert journal.durable == 0
    assert not journal.fits(0)
    with pytest.raises(AssertionError):
        journal.append_note(1)
    with pytest.raises(AssertionError):
        journal.superblock(b"")
    assert journal.frames_after(3, 0, 1 << 20) == []
    journal.synced(journal.tail)
    assert journal.fits(0)
    assert len(journal.frames_after(3, 0, 1 << 20)) == 1


def test_bodies_are_shown_in_order_and_once() -> None:
    rig = Rig()
    for number in range(1, 34):
        rig.append(number, [10, 50000][number % 2])
        rig.sync()
    seen: list[tuple[int, bytes]] = []

    def look(header: FrameHeader, body: memoryview) -> bool:
        seen.append((header.first, bytes(body)))
        return good_body(header, body)

    recover(rig.disk.read, look, IDENTITY)
    assert seen == [(number, body_of(number, [10, 50000][number % 2])) for number, _ in seen]
    assert [number for number, _ in seen] == rig.numbers()


def test_notes_are_shown_although_they_have_no_body() -> None:
    """What a secondary promised stands in the header of a note: it must learn of it after a restart (rule 14)."""
    rig = Rig()
    rig.append(1)
    rig.note(5)
    rig.sync()
    seen: list[tuple[int, int]] = []

    def check(header: FrameHeader, body: memoryview) -> bool:
        seen.append((header.kind, header.first))
        return good_body(header, body)

    recover(rig.disk.read, check, IDENTITY)
    assert seen == [(FrameKind.RECORD, 1), (FrameKind.NOTE, 5)]


def test_the_ring_is_read_in_large_pieces() -> None:
    rig = Rig(4 << 20)
    for number in range(1, 500):
        rig.append(number)
        rig.sync()
    lengths: list[int] = []

    def read(offset: int, length: int) -> bytes:
        lengths.append(length)
        return rig.disk.read(offset, length)

    recover(read, good_body, IDENTITY)
    assert len(lengths) < 12


def test_a_journal_of_another_group_node_kind_or_size_is_refused() -> None:
    rig = Rig()
    for other in (
        Identity(bytes(16), 2, SlotKind.JOURNAL),
        Identity(GROUP, 3, SlotKind.JOURNAL),
        Identity(GROUP, 2, SlotKind.STATE),
    ):
        with pytest.raises(IdentityError):
            recover(rig.disk.read, good_body, other)
    with pytest.raises(IdentityError, match="ring"):
        recover(rig.disk.read, good_body, IDENTITY, 2 * RING_BYTES)


def test_a_file_that_create_never_made_a_journal_of_is_missing() -> None:
    disk = SimDisk(Journal.format(IDENTITY, RING_BYTES).file_bytes)
    with pytest.raises(MissingError):
        recover(disk.read, good_body, IDENTITY)


def test_a_truncation_that_is_in_the_page_cache_only_costs_no_durable_frame() -> None:
    """kill -9 before it is durable; then power fails when recovery has erased and the superblock is still not there."""
    rig = Rig()
    rig.append(1)
    rig.sync()
    rig.append(2)
    rig.sync()
    rig.journal.truncate(4096)
    rig.begin_save(b"truncated")
    recovered = rig.examine()
    assert recovered.state == b"truncated"
    for offset, buffers in recovered.writes:
        if offset >= RING_OFFSET:
            rig.disk.platter[offset : offset + 4096] = b"".join(buffers)[:4096]
    rig.disk.pending.clear()
    rig.disk.cache[:] = rig.disk.platter
    assert [ref.first for ref in rig.examine().journal.frames()] == [1, 2]
