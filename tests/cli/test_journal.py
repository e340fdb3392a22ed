"""``journal`` over journals on disk, as the node writes them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from blockrepl.block import Buffer, Op, WriteFlag
from blockrepl.formats.journal import FrameKind
from blockrepl.formats.record import RecordKind, encode_record, number_record
from blockrepl.formats.slots import SlotKind
from blockrepl.storage.executor import write_all
from blockrepl.storage.journal import Journal, Write
from blockrepl.storage.slots import Identity
from tests.cli.conftest import FakeGroup, Run

RING_BYTES = 1 << 20
TIME_NS = 1_700_000_000_000_000_000


class Disk:
    """The intermediate's journal volume, written and synced at once."""

    def __init__(self, group: FakeGroup) -> None:
        node = group.node("i1")
        self.group_id = group.definition.group_id.bytes
        self.path = node.directory / "journal"
        self.journal = Journal.format(Identity(self.group_id, node.id, SlotKind.JOURNAL), RING_BYTES, 7)
        self.number = 1
        self.last: dict[int, int] = {}
        self.path.write_bytes(bytes(self.journal.file_bytes))
        self.superblock()

    def put(self, *writes: Write) -> None:
        fd = os.open(self.path, os.O_WRONLY)
        for offset, buffers in writes:
            write_all(fd, offset, buffers)
        os.close(fd)

    def superblock(self) -> None:
        self.put(self.journal.superblock(b""))
        self.journal.superblock_synced()

    def record(self, stream: int, *writes: tuple[int, int, int, int]) -> int:
        """Append a record of (volume, op, offset, length); return its position."""
        ops, offsets, lengths = ([write[column] for write in writes] for column in (1, 2, 3))
        payloads = [memoryview(bytes(write[3])) if write[1] == Op.WRITE else None for write in writes]
        payload_bytes = sum(len(payload) for payload in payloads if payload is not None)
        flags = [int(WriteFlag.FUA)] * len(writes)
        columns = (ops, flags, offsets, lengths, payloads)
        head, size = encode_record(
            RecordKind.UPDATE, self.group_id, 1, stream, 3, self.number, writes[0][0], *columns, payload_bytes
        )
        crc = number_record(head, 0, 2, self.number, self.last.get(stream, 0), TIME_NS)
        buffers: list[Buffer] = [head, *(payload for payload in payloads if payload is not None)]
        count, first = len(writes), self.number
        frame = self.journal.append(FrameKind.RECORD, first, count, stream, 1, crc, buffers, size)
        self.put(*frame)
        self.journal.synced(self.journal.tail)
        self.number += count
        self.last[stream] = self.number - 1
        return self.journal.tail


@pytest.fixture
def disk(group: FakeGroup) -> Disk:
    return Disk(group)


def test_records_are_printed_readably_oldest_first(disk: Disk, group: FakeGroup, run: Run) -> None:
    disk.record(4, (1, Op.WRITE, 8192, 4096))
    disk.record(5, (2, Op.WRITE, 0, 4096), (2, Op.TRIM, 65536, 131072))
    disk.put(*disk.journal.append_note(3))
    lines = [" ".join(line.split()) for line in run("journal", group.path).out.splitlines()]
    assert lines[0] == "journal of i1: 20 KiB of 1 MiB used, positions 0 to 20480"
    assert lines[2].startswith("1 2023-11-1")
    assert lines[2].endswith("update p1 s1 0 2 3.1 4.1 KiB data: write 4096 bytes at 8192 fua")
    assert lines[3].endswith("update p1 s2 0 2 3.2 4.2 KiB log: 1 × write, 4 KiB; log: 1 × trim, 128 KiB")
    assert lines[4] == "3 note prepared 3"
    assert "log: trim 131072 bytes at 65536 fua" in run("journal", group.path, "--entries").out


def test_json_has_every_entry_and_limit_leaves_out_the_oldest(disk: Disk, group: FakeGroup, run: Run) -> None:
    for place in range(5):
        disk.record(4, (1, Op.WRITE, place * 4096, 4096))
    document = run("journal", group.path, "--node", "i1", "--limit", "2", "--json").json
    assert (document["left_out"], [record["first"] for record in document["records"]]) == (3, [4, 5])
    assert document["records"][1]["entries"] == [
        {"number": 5, "volume": "data", "op": "write", "flags": ["fua"], "offset_bytes": 16384, "length_bytes": 4096}
    ]
    assert document["records"][1]["previous"] == 4
    assert len(run("journal", group.path, "--limit", "0", "--json").json["records"]) == 5


def test_a_ring_that_went_round_is_read_from_its_head(disk: Disk, group: FakeGroup, run: Run) -> None:
    for place in range(20):
        position = disk.record(4, (1, Op.WRITE, place * 4096, 100_000))
        disk.journal.trim(position)
        disk.superblock()
    disk.record(4, (1, Op.ZERO, 0, 4096))
    records = run("journal", group.path, "--json").json["records"]
    assert [record["first"] for record in records] == [21]


def test_a_record_whose_body_is_damaged_is_named_and_the_rest_is_shown(disk: Disk, group: FakeGroup, run: Run) -> None:
    disk.record(4, (1, Op.WRITE, 0, 4096))
    disk.record(4, (1, Op.WRITE, 0, 4096))
    raw = bytearray(disk.path.read_bytes())
    raw[32768 + 64 + 1000] ^= 1
    disk.path.write_bytes(raw)
    kinds = [record["kind"] for record in run("journal", group.path, "--json").json["records"]]
    assert kinds == ["unreadable", "update"]
    assert "wrong checksum" in run("journal", group.path).out


def test_a_frame_that_was_truncated_away_is_not_shown(disk: Disk, group: FakeGroup, run: Run) -> None:
    kept = disk.record(4, (1, Op.WRITE, 0, 4096))
    disk.record(4, (1, Op.WRITE, 0, 4096))
    disk.journal.truncate(kept)
    disk.superblock()
    assert [record["first"] for record in run("journal", group.path, "--json").json["records"]] == [1]


def test_nothing_is_written_and_no_lock_is_taken(disk: Disk, group: FakeGroup, run: Run, tmp_path: Path) -> None:
    disk.record(4, (1, Op.WRITE, 0, 4096))
    before = disk.path.read_bytes()
    with disk.path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run("journal", group.path).code == 0
    assert disk.path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 21, "is not there"),
        (b"", 24, "ends at byte 0"),
        (bytes(1 << 16), 21, "never written"),
        (b"x" * (1 << 16), 24, "neither copy of its header is whole"),
    ],
)
def test_what_is_no_journal_is_told_so(
    group: FakeGroup, run: Run, content: bytes | None, code: int, words: str
) -> None:
    if content is not None:
        (group.node("s1").directory / "journal").write_bytes(content)
    result = run("journal", group.path, "--node", "s1")
    assert result.code == code
    assert words in result.err


def test_the_journal_of_another_node_is_not_mistaken_for_this_one(disk: Disk, group: FakeGroup, run: Run) -> None:
    disk.path.rename(group.node("s1").directory / "journal")
    assert run("journal", group.path, "--node", "s1").code == 22


def test_a_node_with_plain_volumes_only_has_no_journal(group: FakeGroup, run: Run) -> None:
    text = group.path.read_text()
    group.path.write_text(text.replace('primary = "p1"\nsecondary = "s1"', 'primary = "p1"\nsecondary = "none"'))
    result = run("journal", group.path, "--node", "p1")
    assert (result.code, result.err.splitlines()[1]) == (2, "hint: journals are at p2, i1, s2")
