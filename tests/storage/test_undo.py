"""The undo file: what is overwritten comes back, whatever power loss leaves of it."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, rule

from blockrepl.errors import DamagedError, IdentityError, InUseError, MissingError
from blockrepl.formats.undo import ENTRY, FRAME, PAGE_BYTES, undo_entry, undo_frame, undo_header
from blockrepl.storage import undo_file
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.undo import Block, Saved, Undo
from blockrepl.storage.undo_file import UndoFile
from tests.storage.journals import GROUP
from tests.storage.sim_disk import SimDisk

BLOCK = 4096
SIZES = {1: 10 * BLOCK, 2: 3 * BLOCK + 512}  # the last block of volume 2 is short
FILE_BYTES = 1 << 20
SEEDS = st.integers(0, 2**32 - 1)


class Rig:
    """Two volumes and an undo file on disks that lose power; writes go as a secondary's do while it copies."""

    def __init__(self, tag: int = 77) -> None:
        self.volumes = {volume: SimDisk(size) for volume, size in SIZES.items()}
        self.file = SimDisk(FILE_BYTES)
        self.undo = Undo(GROUP, 4, SIZES, 9, tag, BLOCK)
        self.put(self.undo.header())
        self.file.sync()

    def put(self, write: tuple[int, list[bytes | bytearray | memoryview]]) -> None:
        self.file.write(*write)

    def old(self, volume: int, offset: int, length: int) -> list[Saved]:
        """What a write to a range has to save first."""
        saved = []
        for block in self.undo.missing(volume, offset, length):
            data = self.volumes[volume].read(block.offset_bytes, block.length_bytes)
            saved.append(Saved(block, data if any(data) else None))
        return saved

    def recover(self) -> Undo:
        undo, writes = Undo.recover(self.file.read, FILE_BYTES, GROUP, 4, SIZES, 9)
        for write in writes:
            self.put(write)
        return undo

    def restore(self, undo: Undo) -> None:
        for (volume, offset, length), data in undo.entries(self.file.read):
            self.volumes[volume].write(offset, [bytes(length) if data is None else data])

    def overwrite(self, volume: int, offset: int, data: bytes) -> None:
        old = self.old(volume, offset, len(data))
        if old:
            self.put(self.undo.append(old))
            self.file.sync()
            self.undo.synced()
        self.volumes[volume].write(offset, [data])


class PowerCuts(RuleBasedStateMachine):
    """Overwrites, and power cuts between any two steps: going back always gives what the copy found."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        random = Random(5)
        for volume, disk in self.rig.volumes.items():
            disk.write(0, [random.randbytes(SIZES[volume] - BLOCK) + bytes(BLOCK)])
            disk.sync()
        self.before = {volume: bytes(disk.cache) for volume, disk in self.rig.volumes.items()}

    @rule(volume=st.sampled_from([1, 2]), first=st.integers(0, 9), blocks=st.integers(1, 4), byte=st.integers(0, 255))
    def overwrite(self, volume: int, first: int, blocks: int, byte: int) -> None:
        offset = min(first * BLOCK + 512 * (byte % 3), SIZES[volume] - 512)
        length = min(blocks * BLOCK, SIZES[volume] - offset)
        self.rig.overwrite(volume, offset, bytes([byte]) * length)

    @rule(volume=st.sampled_from([1, 2]), synced=st.booleans(), seed=SEEDS)
    def die_while_saving(self, volume: int, synced: bool, seed: int) -> None:
        """The frame is on its way; nothing was overwritten on its account."""
        old = self.rig.old(volume, 0, SIZES[volume])
        if old:
            self.rig.put(self.rig.undo.append(old))
        if synced:
            self.rig.file.sync()
        self.cut_power(seed, 512, 1)

    @rule()
    def sync_the_images(self) -> None:
        for disk in self.rig.volumes.values():
            disk.sync()

    @rule(seed=SEEDS, unit=st.sampled_from([512, 4096]), again=st.integers(1, 2))
    def cut_power(self, seed: int, unit: int, again: int) -> None:
        random = Random(seed)
        for _ in range(again):
            for disk in [self.rig.file, *self.rig.volumes.values()]:
                disk.power_cut(random, unit)
            self.rig.undo = self.rig.recover()
            if random.random() < 0.5:
                self.rig.file.sync()
        self.rig.file.sync()
        self.going_back_gives_what_was_there(random.getrandbits(32))

    def going_back_gives_what_was_there(self, seed: int) -> None:
        rig = self.rig
        saved = {volume: (bytes(disk.cache), bytes(disk.platter), list(disk.pending))
                 for volume, disk in rig.volumes.items()}  # fmt: skip
        random = Random(seed)
        rig.restore(rig.undo)  # cut short …
        for disk in rig.volumes.values():
            disk.power_cut(random, 512)
        rig.restore(rig.undo)  # … and repeated
        assert {volume: bytes(disk.cache) for volume, disk in rig.volumes.items()} == self.before
        for volume, (cache, platter, pending) in saved.items():
            disk = rig.volumes[volume]
            disk.cache[:], disk.platter[:], disk.pending = cache, platter, pending


PowerCuts.TestCase.settings = settings(
    max_examples=60, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPowerCuts = PowerCuts.TestCase


def test_a_block_is_saved_once_and_zeroes_take_a_mark_only() -> None:
    rig = Rig()
    rig.volumes[1].write(0, [b"a" * BLOCK])
    rig.overwrite(1, 100, b"x" * 10)
    with_data = rig.undo.tail
    assert with_data == PAGE_BYTES + 2 * PAGE_BYTES  # header and block
    rig.overwrite(1, 0, b"y" * BLOCK)
    assert rig.undo.tail == with_data
    rig.overwrite(1, BLOCK, b"z" * 3 * BLOCK)
    assert rig.undo.tail == with_data + PAGE_BYTES
    assert [(saved.block.offset_bytes, saved.data is None) for saved in rig.undo.entries(rig.file.read)] == [
        (0, False), (BLOCK, True), (2 * BLOCK, True), (3 * BLOCK, True),
    ]  # fmt: skip


def test_the_last_block_of_a_volume_may_be_short() -> None:
    rig = Rig()
    rig.volumes[2].write(3 * BLOCK, [b"e" * 512])
    assert list(rig.undo.missing(2, 3 * BLOCK + 100, 5)) == [Block(2, 3 * BLOCK, 512)]
    rig.overwrite(2, 3 * BLOCK, b"n" * 512)
    rig.restore(rig.recover())
    assert rig.volumes[2].read(3 * BLOCK, 512) == b"e" * 512


def test_a_torn_last_frame_is_cut_and_its_place_is_used_again() -> None:
    rig = Rig()
    rig.overwrite(1, 0, b"x")
    tail = rig.undo.tail
    rig.volumes[1].write(BLOCK, [b"b" * BLOCK])
    rig.put(rig.undo.append(rig.old(1, BLOCK, 1)))
    rig.file.cache[tail + PAGE_BYTES + 7] ^= 1
    undo = rig.recover()
    assert undo.tail == tail
    assert list(undo.missing(1, 0, 2 * BLOCK)) == [Block(1, BLOCK, BLOCK)]


def test_damage_below_a_later_frame_is_no_torn_tail() -> None:
    rig = Rig()
    for block in range(3):
        rig.overwrite(1, block * BLOCK, b"x")
    rig.file.cache[PAGE_BYTES + 40] ^= 1
    with pytest.raises(DamagedError, match=f"damaged at {PAGE_BYTES}"):
        rig.recover()


def test_frames_of_an_older_copy_are_not_taken() -> None:
    rig = Rig(tag=1)
    rig.volumes[1].write(0, [b"old" * 1000])
    for block in range(4):
        rig.overwrite(1, block * BLOCK, b"x" * 100)
    rig.undo = Undo(GROUP, 4, SIZES, 9, 2, BLOCK)
    rig.put(rig.undo.header())
    assert rig.recover().tail == PAGE_BYTES
    rig.overwrite(2, 0, b"y")
    assert [saved.block.volume for saved in rig.recover().entries(rig.file.read)] == [2]


@pytest.mark.parametrize(("node", "copy"), [(5, 9), (4, 10)])
def test_the_undo_of_another_node_or_copy_is_refused(node: int, copy: int) -> None:
    rig = Rig()
    with pytest.raises(IdentityError):
        Undo.recover(rig.file.read, FILE_BYTES, GROUP, node, SIZES, copy)


def test_a_header_that_is_damaged_is_said_to_be() -> None:
    rig = Rig()
    rig.file.cache[20] ^= 1
    with pytest.raises(DamagedError, match="header"):
        rig.recover()


def test_every_bit_of_a_durable_frame_counts() -> None:
    rig = Rig()
    rig.volumes[1].write(0, [Random(1).randbytes(BLOCK)])
    rig.overwrite(1, 0, b"x")
    used = FRAME.size + ENTRY.size + BLOCK
    rig.overwrite(1, BLOCK, b"x")
    random = Random(2)
    for at in {0, FRAME.size - 1, FRAME.size, used - 1, *(random.randrange(used) for _ in range(60))}:
        rig.file.cache[PAGE_BYTES + at] ^= 1 << random.randrange(8)
        with pytest.raises(DamagedError):
            rig.recover()
        rig.file.cache[:] = rig.file.platter


def test_the_packers_are_the_declarations() -> None:
    rig = Rig()
    rig.volumes[1].write(0, [b"d" * BLOCK])
    rig.overwrite(1, 0, b"x")
    head = undo_header.parse(rig.file.read(0, PAGE_BYTES))
    assert (head.node, head.group, head["copy"], head.tag, head.block_bytes) == (4, GROUP, 9, 77, BLOCK)
    frame = undo_frame.parse(rig.file.read(PAGE_BYTES, FRAME.size))
    assert (frame.count, frame.tag, frame.position, frame.size_bytes) == (1, 77, PAGE_BYTES, 2 * PAGE_BYTES)
    entry = undo_entry.parse(rig.file.read(PAGE_BYTES + FRAME.size, ENTRY.size))
    assert (entry.volume, entry.kind, entry.length_bytes, entry.offset_bytes) == (1, 1, BLOCK, 0)


# the file


@pytest.fixture
async def disk() -> AsyncIterator[DiskThread]:
    thread = DiskThread(asyncio.get_running_loop(), "undo")
    yield thread
    thread.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "undo"


def opened(path: Path, disk: DiskThread, copy: int | None) -> UndoFile:
    return UndoFile.open(path, disk, GROUP, 4, {1: 1 << 20}, copy)


async def finished(start: object, *args: object) -> OSError | None:
    """The outcome of `begin` or `save`."""
    done: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    start(*args, done.set_result)  # type: ignore[operator]
    return await done


async def test_what_was_saved_is_there_after_a_restart_and_gone_when_the_copy_has_ended(
    path: Path, disk: DiskThread
) -> None:
    file = opened(path, disk, None)
    assert await finished(file.begin, 5) is None
    block = Block(1, 0, 65536)
    assert await finished(file.save, [Saved(block, b"o" * 65536)]) is None
    file.close()
    file = opened(path, disk, 5)
    assert [(saved.block, bytes(saved.data or b"")) for saved in file.entries()] == [(block, b"o" * 65536)]
    assert file.used_bytes == path.stat().st_size
    file.drop()
    assert path.stat().st_size == file.used_bytes == 0
    file.close()


async def test_a_file_that_was_left_over_is_emptied(path: Path, disk: DiskThread) -> None:
    file = opened(path, disk, None)
    await finished(file.begin, 5)
    file.close()
    opened(path, disk, None).close()
    assert path.stat().st_size == 0


async def test_a_missing_file_in_mid_copy_stops_the_node(path: Path, disk: DiskThread) -> None:
    with pytest.raises(MissingError, match=str(path)):
        opened(path, disk, 5)


async def test_two_processes_do_not_share_it(path: Path, disk: DiskThread) -> None:
    file = opened(path, disk, None)
    with pytest.raises(InUseError):
        opened(path, disk, None)
    file.close()


async def test_no_space_saves_nothing_and_the_next_try_does(
    path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(path, disk, None)
    await finished(file.begin, 5)
    real = os.pwritev

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("blockrepl.storage.executor.os.pwritev", full)
    saved = [Saved(Block(1, 0, 65536), b"o" * 65536)]
    error = await finished(file.save, saved)
    assert error is not None
    assert error.errno in undo_file.NO_SPACE
    assert file.undo is not None
    assert list(file.undo.missing(1, 0, 1)) == [Block(1, 0, 65536)]
    monkeypatch.setattr("blockrepl.storage.executor.os.pwritev", real)
    assert await finished(file.save, saved) is None
    file.close()
    file = opened(path, disk, 5)
    assert len(list(file.entries())) == 1
    file.close()
