"""Reads and writes: batches, order, ranges, what goes wrong."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.block import Op, WriteFlag
from blockrepl.errors import BlockError
from blockrepl.frontends.iscsi.scsi.unit import PathState
from tests.frontends.iscsi.scsi.rig import BLOCK, BLOCKS, Initiator, MemoryVolume, Rig, io_error

READS = {"08": 6, "28": 10, "a8": 12, "88": 16}
WRITES = {"0a": 6, "2a": 10, "aa": 12, "8a": 16}


def cdb(opcode: str, lba: int, count: int, flags: int = 0) -> bytes:
    size = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}[int(opcode, 16) >> 5]
    head = bytes.fromhex(opcode)
    if size == 6:
        return head + lba.to_bytes(3, "big") + bytes([count & 0xFF, 0])
    head += bytes([flags])
    if size == 10:
        return head + lba.to_bytes(4, "big") + b"\0" + count.to_bytes(2, "big") + b"\0"
    if size == 12:
        return head + lba.to_bytes(4, "big") + count.to_bytes(4, "big") + b"\0\0"
    return head + lba.to_bytes(8, "big") + count.to_bytes(4, "big") + b"\0\0"


def pattern(count: int, seed: int = 1) -> bytes:
    return bytes((seed * 31 + at // 7) & 0xFF for at in range(count * BLOCK))


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def host(rig: Rig) -> Initiator:
    return Initiator(rig, "host")


def released(rig: Rig) -> bool:
    return all(chunk.users == 0 or chunk in rig.pool._free for chunk in rig.out_chunks)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("read", READS)
def test_what_any_write_wrote_any_read_reads(rig: Rig, host: Initiator, write: str, read: str) -> None:
    host.ok(cdb(write, 9, 3), pattern(3))
    assert host.ok(cdb(read, 9, 3), room=3 * BLOCK) == pattern(3)
    assert rig.volume.data[9 * BLOCK : 12 * BLOCK] == pattern(3)
    assert released(rig)


def test_a_run_of_writes_is_one_batch_and_its_replies_come_together(rig: Rig, host: Initiator) -> None:
    tasks = [host.task(cdb("2a", at, 1), pattern(1, at)) for at in range(32)]
    rig.target.execute(tasks)
    assert len(rig.volume.batches) == 1
    assert host.done[-32:] == tasks
    assert released(rig)


def test_the_reads_of_a_run_share_a_chunk_and_each_holds_it(rig: Rig, host: Initiator) -> None:
    tasks = [host.task(cdb("88", at, 8), room=8 * BLOCK) for at in range(8)]
    rig.target.execute(tasks)
    chunks = {id(task.in_chunk) for task in tasks}
    assert len(chunks) == 1
    assert tasks[0].in_chunk is not None
    assert tasks[0].in_chunk.users == 8


def test_a_command_between_writes_does_not_overtake_them(rig: Rig, host: Initiator) -> None:
    tasks = [
        host.task(cdb("2a", 0, 1), pattern(1)),
        host.task(cdb("2f", 0, 1, 0x02), pattern(1)),  # VERIFY
        host.task(cdb("2a", 0, 1), pattern(1, 2)),
    ]
    rig.target.execute(tasks)
    rig.turn()
    assert [task.status for task in tasks] == [0, 0, 0]
    assert rig.volume.data[:BLOCK] == pattern(1, 2)


def test_data_in_many_pieces_is_written_without_being_joined_when_pieces_are_blocks(
    rig: Rig, host: Initiator
) -> None:  # fmt: skip
    host.ok(cdb("2a", 4, 8), pattern(8), cuts=4)
    assert rig.volume.batches[-1][2] == [2 * BLOCK] * 4
    host.ok(cdb("2a", 4, 8), pattern(8, 2), cuts=3)
    assert rig.volume.batches[-1][2] == [8 * BLOCK]
    assert rig.volume.data[4 * BLOCK : 12 * BLOCK] == pattern(8, 2)
    assert released(rig)


def test_a_write_beyond_the_volumes_limit_becomes_several_batches(rig: Rig, host: Initiator) -> None:
    rig.volume.max_write_bytes = 16 * BLOCK
    host.ok(cdb("2a", 0, 50), pattern(50))
    assert [sum(lengths) for _, _, lengths, _ in rig.volume.batches] == [16 * BLOCK] * 3 + [2 * BLOCK]
    assert rig.volume.data[: 50 * BLOCK] == pattern(50)
    assert released(rig)


def test_fua_reaches_the_volume_and_a_read_with_fua_flushes_first(rig: Rig, host: Initiator) -> None:
    host.ok(cdb("2a", 0, 1, 0x08), pattern(1))
    assert rig.volume.batches[-1][3] == [WriteFlag.FUA]
    host.ok(cdb("28", 0, 1, 0x08), room=BLOCK)
    assert rig.volume.flushes == 1


def test_every_write_is_fua_while_the_write_cache_is_off(rig: Rig, host: Initiator) -> None:
    caching = bytes.fromhex("0812 00") + bytes(17)
    host.ok("15 10 00 00 18 00", bytes(4) + caching)
    host.ok(cdb("2a", 0, 1), pattern(1))
    assert rig.volume.batches[-1][3] == [WriteFlag.FUA]


@pytest.mark.parametrize("opcode", [*READS, *WRITES, "2e", "ae", "8e", "2f", "af", "8f", "34", "90", "35", "91"])
@pytest.mark.parametrize(("lba", "count"), [(BLOCKS, 1), (BLOCKS - 1, 2), (BLOCKS + 1, 1), (0x1FFFFF, 2)])
def test_addresses_beyond_the_end_are_refused(host: Initiator, opcode: str, lba: int, count: int) -> None:
    assert host.refused(cdb(opcode, lba, count), bytes(count * BLOCK)) == (5, 0x2100)


@pytest.mark.parametrize("opcode", ["28", "a8", "88", "2a", "aa", "8a", "2e", "8e", "2f"])
def test_no_blocks_are_well_up_to_the_end_and_refused_beyond(host: Initiator, opcode: str) -> None:
    assert host.ok(cdb(opcode, BLOCKS, 0)) == b""
    assert host.refused(cdb(opcode, BLOCKS + 1, 0)) == (5, 0x2100)


def test_a_transfer_larger_than_the_limits_page_says_is_refused(host: Initiator) -> None:
    rig = Rig(blocks=1 << 17)
    assert Initiator(rig, "a").refused(cdb("88", 0, 65537), room=1) == (5, 0x2400)


@pytest.mark.parametrize("opcode", ["0a", "2a", "aa", "8a", "2e", "8b"])
def test_what_was_announced_is_written_when_it_is_less_than_the_cdb_says(
    rig: Rig, host: Initiator, opcode: str
) -> None:  # fmt: skip
    task = host.send(cdb(opcode, 0, 2), pattern(1))
    assert (task.status, task.needed_out_bytes) == (0, 2 * BLOCK)
    assert rig.volume.data[: 2 * BLOCK] == pattern(1) + bytes(BLOCK)
    task = host.send(cdb(opcode, 8, 1), pattern(1)[:200])
    assert task.needed_out_bytes == BLOCK
    found = bytes(rig.volume.data[8 * BLOCK : 9 * BLOCK])
    if opcode in WRITES:
        assert (task.status, found) == (0, pattern(1)[:200] + bytes(BLOCK - 200))
    else:
        assert (task.status, task.sense[2], task.sense[12:14], found) == (2, 5, b"\x0e\x03", bytes(BLOCK))
    task = host.send(cdb(opcode, 0, 1), pattern(3, 5))
    assert (task.status, task.needed_out_bytes) == (0, BLOCK)
    assert released(rig)


@pytest.mark.parametrize(
    ("code", "sense"),
    [(errno.EIO, (3, 0x0C00)), (errno.ENOSPC, (7, 0x2707)), (errno.EROFS, (7, 0x2700))],
)
def test_a_write_that_fails_ends_in_sense_data(rig: Rig, host: Initiator, code: int, sense: tuple[int, int]) -> None:
    rig.volume.write_error = BlockError(code)
    assert host.refused(cdb("2a", 0, 1), pattern(1)) == sense
    assert host.refused(cdb("2e", 0, 1), pattern(1)) == sense
    assert host.refused("42 00 00000000 00 0018 00", bytes.fromhex("0016 0010 00000000") + bytes(11) + b"\1" + bytes(4)
    ) == sense  # fmt: skip
    assert released(rig)


def test_only_the_command_that_failed_in_a_batch_is_refused(rig: Rig, host: Initiator) -> None:
    rig.volume.slow = True
    tasks = [host.task(cdb("2a", at, 1), pattern(1)) for at in range(3)]
    rig.target.execute(tasks)
    batch = rig.volume.waiting.popleft()
    batch.errors = [None, io_error(), None]
    batch.release()
    batch.done(batch)
    assert [task.status for task in tasks] == [0, 2, 0]


def test_a_read_that_fails_gives_its_buffer_back(rig: Rig, host: Initiator) -> None:
    for rig.volume.cold in (False, True):
        rig.volume.read_error = io_error()
        task = host.send(cdb("28", 0, 1), room=BLOCK)
        while rig.volume.reads:
            rig.volume.reads.popleft()()
        assert (task.status, task.sense[2], task.sense[12:14]) == (2, 3, b"\x11\x00")
        assert task.in_chunk is None
        assert task.data_in == ()


def test_a_read_that_waits_for_the_disk_completes_later(rig: Rig, host: Initiator) -> None:
    host.ok(cdb("2a", 0, 1), pattern(1))
    rig.volume.cold = True
    task = host.send(cdb("28", 0, 1), room=BLOCK)
    assert task not in host.done
    rig.volume.reads.popleft()()
    assert task in host.done
    assert bytes(task.data_in[0]) == pattern(1)


def test_an_ordered_task_waits_for_all_before_it_and_all_after_it_wait_for_it(rig: Rig, host: Initiator) -> None:
    rig.volume.slow = True
    first = host.send(cdb("2a", 0, 1), pattern(1))
    ordered = host.send(cdb("2a", 0, 1), pattern(1, 2), attribute=2)
    last = host.send(cdb("2a", 0, 1), pattern(1, 3))
    head = host.send("00" * 6, attribute=3)
    assert len(rig.volume.waiting) == 1
    assert head in host.done
    for task in (first, ordered, last):
        assert task not in host.done
        rig.volume.complete()
        assert task in host.done
    assert rig.volume.data[:BLOCK] == pattern(1, 3)


def test_verify_compares_what_it_is_told_to(host: Initiator) -> None:
    host.ok(cdb("2a", 0, 4), pattern(1) * 4)
    host.ok(cdb("2f", 0, 4, 0x02), pattern(1) * 4)
    host.ok(cdb("8f", 0, 4, 0x06), pattern(1))
    assert host.refused(cdb("af", 0, 4, 0x02), pattern(1) * 3 + pattern(1, 2)) == (0xE, 0x1D00)
    assert host.refused(cdb("8f", 0, 4, 0x06), pattern(1, 2)) == (0xE, 0x1D00)
    assert host.refused(cdb("2f", 0, 4, 0x04), pattern(1)) == (5, 0x2400)
    task = host.send(cdb("2f", 0, 4), pattern(4, 9))
    assert (task.status, task.needed_out_bytes) == (0, 0)


def test_write_atomic_is_one_entry_of_one_batch_or_nothing(rig: Rig, host: Initiator) -> None:
    atomic = "9c00 0000000000000000 0000 {:04x} 0000"
    host.ok(atomic.format(16), pattern(16))
    assert len(rig.volume.batches) == 1
    assert host.refused(atomic.format(16), pattern(8)) == (5, 0x0E03)
    assert host.refused(atomic.format(2049), b"") == (5, 0x2400)
    assert host.refused("9c00 0000000000000000 0001 0001 0000", pattern(1)) == (5, 0x2400)
    rig.volume.atomic_bytes = 0
    assert host.refused(atomic.format(16), pattern(16)) == (5, 0x2000)
    assert b"\x9c" not in host.ok("a30c 01 9c 0000 000000ff 0000")[4:]


def test_a_volume_that_is_withdrawn_fails_what_still_waits(rig: Rig, host: Initiator) -> None:
    rig.volume.slow = True
    host.send(cdb("2a", 0, 1), pattern(1))
    behind = host.send("89 00 0000000000000000 000000 01 0000", pattern(2))
    rig.unit.withdraw(PathState.UNAVAILABLE)
    rig.volume.complete()
    assert behind in host.done
    assert behind.status == 2


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 4), st.booleans()), max_size=30), st.booleans())
def test_any_mix_of_reads_and_writes_is_as_on_a_disk(steps: list[tuple[int, int, bool]], slow: bool) -> None:
    rig = Rig(blocks=64)
    host = Initiator(rig, "host")
    rig.volume.slow = slow
    model = bytearray(64 * BLOCK)
    for number, (lba, count, is_write) in enumerate(steps):
        if is_write:
            rig.target.execute([host.task(cdb("2a", lba, count), pattern(count, number))])
            rig.volume.complete(len(rig.volume.waiting))
            model[lba * BLOCK : (lba + count) * BLOCK] = pattern(count, number)
        else:
            found = host.ok(cdb("88", lba, count), room=count * BLOCK)
            assert found == model[lba * BLOCK : (lba + count) * BLOCK]
    assert rig.volume.data == model
    assert rig.unit.outstanding() == []


def test_a_volume_of_4096_byte_blocks_is_addressed_in_them() -> None:
    rig = Rig(block=4096, blocks=64)
    host = Initiator(rig, "host")
    host.ok(cdb("2a", 3, 1), b"x" * 4096)
    assert rig.volume.data[3 * 4096 : 4 * 4096] == b"x" * 4096
    assert rig.volume.batches[-1][0] == [Op.WRITE]


def test_congestion_of_any_volume_is_congestion(rig: Rig, host: Initiator) -> None:
    other = MemoryVolume()
    rig.add(1, other)
    found = [rig.target.congested]
    other.full = True
    found.append(rig.target.congested)
    assert found == [False, True]
    resumed: list[bool] = []
    rig.target.when_relieved(lambda: resumed.append(True))
    other.full = False
    other.resume()
    assert resumed == [True]
