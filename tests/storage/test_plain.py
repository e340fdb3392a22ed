"""The plain volume on a real image and a real disk thread."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
import pytest_asyncio

from blockrepl.block import Op, WriteBatch, WriteFlag
from blockrepl.chunks import Chunk
from blockrepl.errors import BlockError
from blockrepl.formats.image import Side
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.image import ImageFile, ImageIdentity
from blockrepl.storage.plain import LONG_ZERO_BYTES, QUEUE_BYTES, PlainVolume

SIZE = 256 << 20
IDENTITY = ImageIdentity(UUID(int=7), 1, 2, Side.PRIMARY, SIZE, 512)


class Rig:
    """A volume and what it stands on."""

    def __init__(self, path: Path) -> None:
        ImageFile.create(path, IDENTITY)
        self.image = ImageFile.open(path, IDENTITY)
        self.disk = DiskThread(asyncio.get_running_loop(), "disk")
        self.volume = PlainVolume("data", self.image, self.disk)
        self.done: list[WriteBatch] = []

    def batch(self, *commands: tuple[Op, int, int, WriteFlag, bytes | None]) -> WriteBatch:
        batch = WriteBatch(self.done.append, Chunk(16, None))
        for op, offset, length, flag, payload in commands:
            batch.ops.append(op)
            batch.offsets.append(offset)
            batch.lengths.append(length)
            batch.flags.append(flag)
            batch.cookies.append(0)
            batch.payloads.append(None if payload is None else memoryview(payload))
            batch.size_bytes += 0 if payload is None else length
            batch.fua = batch.fua or bool(flag & WriteFlag.FUA)
        return batch

    def write(self, offset: int, data: bytes, flag: WriteFlag = WriteFlag.NONE) -> WriteBatch:
        return self.batch((Op.WRITE, offset, len(data), flag, data))

    async def flush(self) -> BlockError | None:
        future: asyncio.Future[BlockError | None] = asyncio.get_running_loop().create_future()
        self.volume.flush(future.set_result)
        return await future

    async def until_done(self, *batches: WriteBatch) -> None:
        while not all(batch in self.done for batch in batches):  # noqa: ASYNC110
            await asyncio.sleep(0)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.image.fd, length, offset)

    def break_syncs(self) -> int:
        """Make the image's descriptor one that cannot be synced; returns the good one."""
        good = os.dup(self.image.fd)
        reader, writer = os.pipe()
        os.dup2(writer, self.image.fd)
        os.close(reader)
        os.close(writer)
        return good


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path / "data.img")
    yield rig
    rig.disk.close()
    rig.image.close()


async def test_a_plain_write_is_complete_at_once_and_releases_its_chunk(rig: Rig) -> None:
    batch = rig.write(512, b"x" * 512)
    chunk = batch.chunk
    assert isinstance(chunk, Chunk)
    assert rig.volume.submit(batch) is True
    assert batch.errors is None
    assert batch.chunk is None
    assert chunk.users == 0
    assert rig.done == []
    assert rig.read(0, 1024) == bytes(512) + b"x" * 512


async def test_a_fua_write_is_complete_after_the_sync(rig: Rig) -> None:
    batch = rig.write(0, b"x" * 512, WriteFlag.FUA)
    assert rig.volume.submit(batch) is False
    assert rig.done == []
    await rig.until_done(batch)
    assert batch.errors is None


async def test_a_flush_with_a_healthy_disk_is_well(rig: Rig) -> None:
    rig.volume.submit(rig.write(0, b"x" * 512))
    assert await rig.flush() is None


async def test_what_comes_after_a_long_zero_is_stored_after_it(rig: Rig) -> None:
    rig.volume.submit(rig.write(0, b"old!" * 128))
    zero = rig.batch((Op.ZERO, 0, LONG_ZERO_BYTES + 512, WriteFlag.NONE, None))
    first = rig.write(0, b"1st!" * 256)
    second_zero = rig.batch((Op.TRIM, 512, LONG_ZERO_BYTES + 512, WriteFlag.FUA, None))
    last = rig.write(1024, b"last" * 128, WriteFlag.FUA)
    for batch in (zero, first, second_zero, last):
        assert rig.volume.submit(batch) is False
    await rig.until_done(zero, first, second_zero, last)
    assert rig.done.index(zero) < rig.done.index(first)
    assert rig.read(0, 2048) == b"1st!" * 128 + bytes(512) + b"last" * 128 + bytes(512)


async def test_payload_behind_a_long_zero_congests_and_its_end_relieves(rig: Rig) -> None:
    relieved: list[bool] = []
    zero = rig.batch((Op.ZERO, 0, LONG_ZERO_BYTES + 512, WriteFlag.NONE, None))
    rig.volume.submit(zero)
    before = rig.volume.congested
    data = b"x" * (QUEUE_BYTES // 2 + 512)
    batches = [rig.write(0, data), rig.write(0, data)]
    for batch in batches:
        rig.volume.submit(batch)
    assert (before, rig.volume.congested) == (False, True)
    rig.volume.when_relieved(lambda: relieved.append(rig.volume.congested))
    await rig.until_done(zero, *batches)
    assert relieved == [False]


async def test_after_a_sync_error_nothing_is_ever_promised_again(rig: Rig) -> None:
    assert rig.volume.submit(rig.write(0, b"x" * 512)) is True
    good = rig.break_syncs()
    error = await rig.flush()
    assert error is not None
    assert error.errno_code == errno.EIO
    os.dup2(good, rig.image.fd)  # the disk is well again, but what it lost stays lost
    os.close(good)
    error = await rig.flush()
    assert error is not None
    assert error.errno_code == errno.EIO
    batch = rig.write(0, b"y" * 512)
    assert rig.volume.submit(batch) is True
    assert batch.errors is not None
    assert batch.errors[0] is not None
    assert batch.errors[0].errno_code == errno.EIO
    assert rig.read(0, 512) == b"x" * 512
    with pytest.raises(BlockError):
        rig.volume.read(0, memoryview(bytearray(512)), lambda _: None)


async def test_a_fua_write_whose_sync_fails_fails(rig: Rig) -> None:
    good = rig.break_syncs()
    os.close(good)
    batch = rig.write(0, b"x" * 512, WriteFlag.FUA)
    rig.volume.submit(batch)
    await rig.until_done(batch)
    assert batch.errors is not None
    assert all(error is not None and error.errno_code == errno.EIO for error in batch.errors)


async def test_a_failed_write_is_reported_and_the_volume_goes_on(rig: Rig) -> None:
    good = os.dup(rig.image.fd)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, rig.image.fd)
    os.close(full)
    batch = rig.write(0, b"x" * 512)
    assert rig.volume.submit(batch) is True
    assert batch.errors is not None
    assert batch.errors[0] is not None
    assert batch.errors[0].errno_code == errno.ENOSPC
    os.dup2(good, rig.image.fd)
    os.close(good)
    assert rig.volume.submit(rig.write(0, b"y" * 512)) is True
    assert await rig.flush() is None


async def test_a_cached_read_is_filled_at_once(rig: Rig) -> None:
    rig.volume.submit(rig.write(0, b"warm" * 1024))
    view = memoryview(bytearray(4096))
    assert rig.volume.read(0, view, lambda _: pytest.fail("called")) is True
    assert bytes(view) == b"warm" * 1024


async def test_a_cold_read_is_filled_by_a_worker(rig: Rig) -> None:
    rig.volume.submit(rig.write(0, b"cold" * 1024))
    assert await rig.flush() is None
    os.posix_fadvise(rig.image.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    view = memoryview(bytearray(4096))
    future: asyncio.Future[BlockError | None] = asyncio.get_running_loop().create_future()
    if rig.volume.read(0, view, future.set_result):
        pytest.skip("this file system keeps its pages")
    assert await future is None
    assert bytes(view) == b"cold" * 1024


async def test_a_hole_reads_as_zeroes(rig: Rig) -> None:
    view = memoryview(bytearray(b"x" * 4096))
    future: asyncio.Future[BlockError | None] = asyncio.get_running_loop().create_future()
    if not rig.volume.read(1 << 20, view, future.set_result):
        assert await future is None
    assert bytes(view) == bytes(4096)


async def test_a_read_that_the_disk_cannot_serve_is_an_io_error(rig: Rig) -> None:
    os.ftruncate(rig.image.fd, 0)
    future: asyncio.Future[BlockError | None] = asyncio.get_running_loop().create_future()
    assert rig.volume.read(0, memoryview(bytearray(4096)), future.set_result) is False
    error = await future
    assert error is not None
    assert error.errno_code == errno.EIO


async def test_allocation_tells_holes(rig: Rig) -> None:
    rig.volume.submit(rig.write(1 << 20, b"x" * 65536))
    assert rig.volume.allocation(0, 2 << 20) == [
        (0, 1 << 20, False),
        (1 << 20, 65536, True),
        ((1 << 20) + 65536, (1 << 20) - 65536, False),
    ]


async def test_metadata_are_stored_by_the_disk_thread_and_complete_when_durable(rig: Rig) -> None:
    batch = rig.batch((Op.METADATA, 0, 4, WriteFlag.FUA, b"meta"))
    assert rig.volume.submit(batch) is False
    behind = rig.write(0, b"x" * 512)
    assert rig.volume.submit(behind) is False
    await rig.until_done(batch, behind)
    assert batch.errors is None
    assert rig.volume.metadata() == b"meta"
    assert rig.read(0, 512) == b"x" * 512
