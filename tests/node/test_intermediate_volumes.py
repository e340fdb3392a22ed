"""Intermediate volumes: no copy is older than what is numbered; what is called durable is (rules 12, 19)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from blockrepl.block import Op
from blockrepl.formats.record import OP_DIGEST, RecordKind, decode_batch, encode_record, iterate_entries, number_record
from blockrepl.node.digests import digest
from blockrepl.node.intermediate_volumes import IntermediateVolumes
from blockrepl.replication.actions import Append
from blockrepl.replication.comparing import Comparing
from tests.node.test_volume_sync import SlowDisk
from tests.replication.roles import GROUP, P1, S1
from tests.replication.test_pairing import Group, resync, split_group

SIZE = 1 << 20
BLOCK = 64 << 10


class Image:
    """In memory; cold when the test says so."""

    fd = 9
    size_bytes = SIZE

    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self.cold = False
        self.broken = False

    def pwrite(self, offset: int, data: memoryview) -> None:
        if self.broken:
            raise OSError(errno.EIO, "broken")
        self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, *, allocate: bool) -> None:
        self.data[offset : offset + length] = bytes(length)

    def read_cached(self, offset: int, view: memoryview) -> bool:
        if not self.cold:
            self.read(offset, view)
        return not self.cold

    def read(self, offset: int, view: memoryview) -> None:
        view[:] = self.data[offset : offset + len(view)]

    def allocation(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        return [(offset, length, True)]


class Workers:
    """Work is done when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], Any], Callable[[Any, Exception | None], None]]] = []

    def run(self, function: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        self.waiting.append((function, done))

    def later(self, function: Callable[[], None]) -> None:
        function()

    def work(self) -> None:
        function, done = self.waiting.pop(0)
        done(function(), None)


class Rig:
    """An intermediate in mid-resync with one dirty block of volume 1, and its images."""

    def __init__(self, *, copying: bool = True) -> None:
        self.group = split_group() if copying else Group()
        role = self.role = self.group.role
        role.pairing.local_source = True
        role.comparing = Comparing(local=True)
        role.state.filled = True
        role._homes = {1: S1}
        if copying:
            self.group.bitmaps[1].mark(0, 1)
            resync(self.group)
        else:
            self.group.join()
        self.image, self.workers, self.disk = Image(), Workers(), SlowDisk()
        images: Any = {1: self.image}
        clock: Any = SimpleNamespace(now_s=lambda: self.group.now_s)
        journal: Any = None
        self.volumes = IntermediateVolumes(role, journal, images, self.disk, clock, self.workers)
        self.copies: list[tuple[int, bytes]] = []
        self.failed: list[str] = []
        self.volumes.on_failed = self.failed.append
        self.volumes.perform = self.perform
        if copying:
            self.volumes.begin_copy(role.pairing.resync_id)

    def perform(self, actions: list[Any]) -> None:
        for action in actions:
            assert isinstance(action, Append)
            self.volumes.appended(action.head, action.record)
            if action.head.kind == RecordKind.UPDATE:
                entry = next(iterate_entries(action.head, action.record))
                self.copies.append((entry[3], bytes(entry[5] or bytes(entry[4]))))

    def number(self, payload: bytes, op: int = Op.WRITE, kind: int = RecordKind.UPDATE) -> tuple[Any, memoryview]:
        """A record of the first block, numbered."""
        role = self.role
        length = BLOCK if op == OP_DIGEST else len(payload)
        head, size = encode_record(
            kind, GROUP, P1, S1, 1, 9, 1, [op], [0], [0], [length], [payload], len(payload)
        )  # fmt: skip
        record = memoryview(bytearray(bytes(head) + payload))
        assert len(record) == size
        found = decode_batch(record)
        found.epoch, found.first, found.previous = 1, role.numbered + 1, role.numbered
        found.header_crc = number_record(record, 0, 1, found.first, found.previous, 0)
        role.numbered += 1
        return found, record


def test_a_block_is_copied_when_nothing_touches_it() -> None:
    rig = Rig()
    rig.image.data[:4] = b"abcd"
    rig.volumes.copy_more()
    assert [(at, data[:4]) for at, data in rig.copies] == [(0, b"abcd")]


def test_a_block_waits_for_a_record_that_is_numbered_and_in_no_image() -> None:
    rig = Rig()
    write = rig.number(b"new!")
    rig.volumes.copy_more()
    assert rig.copies == [], "not even appended: what is copied now would be older, and numbered later"
    rig.volumes.appended(*write)
    rig.volumes.copy_more()
    assert rig.copies == []
    rig.volumes.durable(*write)
    rig.volumes.copy_more()
    assert [data[:4] for _, data in rig.copies] == [b"new!"]


def test_a_block_that_a_write_reaches_while_it_is_fetched_is_read_anew() -> None:
    rig = Rig()
    rig.image.cold = True
    rig.volumes.copy_more()
    write = rig.number(b"new!")
    rig.volumes.appended(*write)
    rig.workers.work()
    assert rig.copies == []
    rig.volumes.durable(*write)
    rig.image.cold = False
    rig.volumes.copy_more()
    assert [data[:4] for _, data in rig.copies] == [b"new!"]


def test_a_copy_ends_with_its_resync() -> None:
    rig = Rig()
    rig.group.do(rig.role.pairing.split(writable=False, now_s=0.0))
    rig.volumes.copy_more()
    assert rig.copies == []


def test_a_rate_holds_the_copy_back() -> None:
    rig = Rig()
    rig.role.pairing.rate_bytes = BLOCK
    rig.volumes.copy_more()
    assert rig.copies == []
    rig.group.now_s += 1.0
    rig.volumes.copy_more()
    assert len(rig.copies) == 1


def test_what_is_stored_while_the_images_are_synced_is_not_called_durable() -> None:
    rig = Rig(copying=False)
    first, second = rig.number(b"one"), rig.number(b"two")
    rig.volumes.durable(*first)
    rig.volumes.tick(100.0)
    rig.volumes.durable(*second)
    assert rig.volumes.stored_through == 0
    rig.disk.end()
    assert rig.volumes.stored_through == first[0].last
    rig.volumes.tick(200.0)
    rig.disk.end()
    assert rig.volumes.stored_through == second[0].last


@pytest.mark.parametrize("sync_fails", [False, True])
def test_after_an_error_nothing_more_is_called_durable(sync_fails: bool) -> None:
    rig = Rig(copying=False)
    rig.image.broken = not sync_fails
    rig.volumes.durable(*rig.number(b"one"))
    rig.volumes.tick(100.0)
    if sync_fails:
        rig.disk.end(OSError(errno.EIO, "broken"))
    assert len(rig.failed) == 1
    assert rig.volumes.stored_through == 0


@pytest.mark.parametrize("same", [False, True])
def test_a_digest_record_is_compared_with_the_image(same: bool) -> None:
    rig = Rig(copying=False)
    rig.image.data[:4] = b"abcd"
    theirs = digest(bytes(rig.image.data[:BLOCK])) if same else b"x" * 16
    head, record = rig.number(theirs, OP_DIGEST, RecordKind.DIGEST)
    rig.volumes.durable(head, record)
    rig.workers.work()
    answer = {
        "number": head.last, "sender": P1, "volume": 1, "offset_bytes": 0, "length_bytes": BLOCK, "blocks": 1,
        "different": [],
    }  # fmt: skip
    joined = rig.role.comparing.answered(answer)
    assert joined is not None
    assert joined["here"] == ([] if same else [0])


def test_a_write_that_comes_between_makes_a_block_seem_different_and_never_the_same() -> None:
    """It is compared by a worker, while later records are stored."""
    rig = Rig(copying=False)
    digests = rig.number(digest(bytes(BLOCK)), OP_DIGEST, RecordKind.DIGEST)
    rig.volumes.durable(*digests)
    rig.volumes.durable(*rig.number(b"new!"))
    rig.workers.work()
    answer = {
        "number": digests[0].last, "sender": P1, "volume": 1, "offset_bytes": 0, "length_bytes": BLOCK, "blocks": 1,
        "different": [],
    }  # fmt: skip
    joined = rig.role.comparing.answered(answer)
    assert joined is not None
    assert joined["here"] == [0]
