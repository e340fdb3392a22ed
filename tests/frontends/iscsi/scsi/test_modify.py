"""Commands that read before they write, and that write more than they are sent."""

from __future__ import annotations

import pytest

from blockrepl.block import Op, WriteFlag
from tests.frontends.iscsi.scsi.rig import BLOCK, BLOCKS, Initiator, Rig
from tests.frontends.iscsi.scsi.test_transfer import cdb, pattern, released


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def host(rig: Rig) -> Initiator:
    return Initiator(rig, "host")


def compare_and_write(lba: int, count: int) -> str:
    return f"8900 {lba:016x} 000000 {count:02x} 0000"


def test_compare_and_write_writes_what_it_became_only_when_all_is_equal(rig: Rig, host: Initiator) -> None:
    host.ok(cdb("2a", 5, 2), pattern(2))
    host.ok(compare_and_write(5, 2), pattern(2) + pattern(2, 2))
    assert rig.volume.batches[-1][0] == [Op.WRITE]
    assert rig.volume.data[5 * BLOCK : 7 * BLOCK] == pattern(2, 2)
    wrong = bytearray(pattern(2, 2))
    wrong[700] ^= 1
    task = host.send(compare_and_write(5, 2), bytes(wrong) + bytes(2 * BLOCK))
    assert (task.status, task.sense[2], task.sense[12:14]) == (2, 0xE, b"\x1d\x00")
    assert task.sense[0] == 0xF0  # information is valid
    assert int.from_bytes(task.sense[3:7], "big") == 700
    assert rig.volume.data[5 * BLOCK : 7 * BLOCK] == pattern(2, 2)
    assert released(rig)


@pytest.mark.parametrize(("count", "blocks", "sense"), [(1, 4, 0x0E03), (3, 4, 0x0E03), (0, 4, 0x2400)])
def test_compare_and_write_wants_exactly_twice_its_blocks(
    host: Initiator, count: int, blocks: int, sense: int
) -> None:  # fmt: skip
    assert host.refused(compare_and_write(0, count), bytes(blocks * BLOCK)) == (5, sense)


def test_compare_and_write_sees_the_writes_before_it_and_holds_back_those_behind(rig: Rig, host: Initiator) -> None:
    rig.volume.slow = True
    first = host.send(cdb("2a", 0, 8), pattern(8))
    compare = host.send(compare_and_write(2, 1), pattern(8)[2 * BLOCK : 3 * BLOCK] + b"n" * BLOCK)
    behind = host.send(cdb("2a", 2, 1), b"z" * BLOCK)
    beside = host.send(cdb("2a", 9, 1), b"y" * BLOCK)
    assert len(rig.volume.waiting) == 2  # the first and the one beside
    rig.volume.complete()
    assert first in host.done
    assert compare not in host.done
    assert len(rig.volume.waiting) == 2  # beside, and what the compare became
    rig.volume.complete(2)
    assert compare in host.done
    assert compare.status == 0
    assert beside in host.done
    assert behind not in host.done
    rig.volume.complete()
    assert behind in host.done
    assert rig.volume.data[2 * BLOCK : 3 * BLOCK] == b"z" * BLOCK
    assert not rig.unit.ranges.granted
    assert rig.unit.ranges.exclusive == 0
    assert released(rig)


def test_of_two_that_compare_the_same_only_one_wins(rig: Rig) -> None:
    rig.volume.slow = True
    one, two = Initiator(rig, "one"), Initiator(rig, "two")
    tasks = [
        each.send(compare_and_write(0, 1), bytes(BLOCK) + mark * BLOCK) for each, mark in ((one, b"1"), (two, b"2"))
    ]
    rig.volume.complete()
    assert not rig.volume.waiting
    assert [task.status for task in tasks] == [0, 2]
    assert rig.volume.data[:BLOCK] == b"1" * BLOCK


def test_orwrite_sets_bits(rig: Rig, host: Initiator) -> None:
    host.ok(cdb("2a", 1, 2), b"\xa5" * 2 * BLOCK)
    host.ok(cdb("8b", 1, 2), b"\x5a" * BLOCK + b"\x01" * BLOCK)
    assert rig.volume.data[BLOCK : 3 * BLOCK] == b"\xff" * BLOCK + b"\xa5" * BLOCK


@pytest.mark.parametrize("opcode", ["41", "93"])
def test_write_same_of_zeroes_is_zeroes_and_of_a_pattern_is_writes(rig: Rig, host: Initiator, opcode: str) -> None:
    host.ok(cdb("2a", 0, 64), pattern(64))
    host.ok(cdb(opcode, 8, 16), bytes(BLOCK))
    assert rig.volume.batches[-1] == ([Op.ZERO], [8 * BLOCK], [16 * BLOCK], [WriteFlag.NO_HOLE])
    host.ok(cdb(opcode, 24, 16, 0x08), bytes(BLOCK))
    assert rig.volume.batches[-1] == ([Op.TRIM], [24 * BLOCK], [16 * BLOCK], [0])
    host.ok(cdb(opcode, 40, 16, 0x08), b"p" * BLOCK)  # unmapped blocks read as zeroes: this must be written
    assert rig.volume.batches[-1][0] == [Op.WRITE]
    assert rig.volume.data[: 64 * BLOCK] == (
        pattern(64)[: 8 * BLOCK] + bytes(32 * BLOCK) + b"p" * 16 * BLOCK + pattern(64)[56 * BLOCK :]
    )
    assert released(rig)


def test_a_long_pattern_is_written_batch_after_batch_and_stops_when_aborted(rig: Rig, host: Initiator) -> None:
    rig.volume.max_write_bytes = 64 * BLOCK
    rig.volume.slow = True
    task = host.send(cdb("93", 0, 1000), b"p" * BLOCK)
    rig.volume.complete()
    rig.turn()
    responses = host.abort(1, tag=task.tag)
    assert responses == []
    rig.volume.complete()
    rig.turn()
    assert responses == [0]
    assert task.aborted
    assert rig.volume.data[: 129 * BLOCK] == b"p" * 128 * BLOCK + bytes(BLOCK)


@pytest.mark.parametrize(
    ("command", "size", "sense"),
    [
        (cdb("93", 0, 0), BLOCK, 0x2400),  # WSNZ
        (cdb("93", 0, 1, 0x10), BLOCK, 0x2400),  # ANCHOR
        (cdb("93", 0, 1), BLOCK // 2, 0x0E03),
        (cdb("93", 0, 1, 0x08), BLOCK * 2, 0x0E03),
        (cdb("93", 0, 1), 0, 0x0E03),
        (cdb("93", BLOCKS, 1), BLOCK, 0x2100),
    ],
)
def test_a_write_same_that_is_wrong_is_refused(host: Initiator, command: bytes, size: int, sense: int) -> None:
    assert host.refused(command, bytes(size)) == (5, sense)


def test_a_write_same_without_data_is_zeroes_when_it_says_so(rig: Rig, host: Initiator) -> None:
    host.ok(cdb("2a", 0, 8), pattern(8))
    for command in (cdb("93", 0, 2, 0x08), cdb("93", 2, 2, 0x01), cdb("93", 4, 2, 0x09)):
        task = host.send(command)
        assert (task.status, task.needed_out_bytes) == (0, 0)
    assert rig.volume.data[: 8 * BLOCK] == bytes(6 * BLOCK) + pattern(8)[6 * BLOCK :]


def unmap(*extents: tuple[int, int]) -> tuple[str, bytes]:
    body = b"".join(lba.to_bytes(8, "big") + count.to_bytes(4, "big") + bytes(4) for lba, count in extents)
    data = (len(body) + 6).to_bytes(2, "big") + len(body).to_bytes(2, "big") + bytes(4) + body
    return f"42 00 00000000 00 {len(data):04x} 00", data


def test_unmap_is_one_batch_of_trims(rig: Rig, host: Initiator) -> None:
    host.ok(cdb("2a", 0, 64), pattern(64))
    host.ok(*unmap((0, 8), (3, 0), (16, 8)))
    assert rig.volume.batches[-1][:3] == ([Op.TRIM] * 2, [0, 16 * BLOCK], [8 * BLOCK] * 2)
    assert rig.volume.data[: 8 * BLOCK] == bytes(8 * BLOCK)
    assert host.refused(*unmap((0, 1), (BLOCKS - 1, 2))) == (5, 0x2100)
    assert host.refused(*unmap(*[(0, 1)] * 257)) == (5, 0x2600)
    assert host.ok(*unmap((BLOCKS, 0))) == b""
    assert host.refused("42 00 00000000 00 0004 00", bytes(4)) == (5, 0x1A00)
    assert host.refused("42 01 00000000 00 0008 00", bytes(8)) == (5, 0x2400)


def test_get_lba_status_tells_what_is_mapped_from_where_it_was_asked(host: Initiator) -> None:
    host.ok(cdb("2a", 16, 8), pattern(8))
    answer = host.ok("9e12 0000000000000003 00000100 0000")
    assert int.from_bytes(answer[:4], "big") == len(answer) - 4
    found = [
        (int.from_bytes(answer[at : at + 8], "big"), int.from_bytes(answer[at + 8 : at + 12], "big"), answer[at + 12])
        for at in range(8, len(answer), 16)
    ]
    assert found == [(3, 13, 1), (16, 8, 0), (24, BLOCKS - 24, 1)]
    assert host.ok("9e12 0000000000000003 00000018 0000")[8:] == answer[8:24]
    assert host.refused(f"9e12 {BLOCKS:016x} 00000018 0000") == (5, 0x2100)
