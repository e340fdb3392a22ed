"""A split volume: no write before its bits are durable, none after it was withdrawn, none out of order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import UUID

import pytest

from blockrepl.bitmap import Bitmap
from blockrepl.block import Op, WriteBatch
from blockrepl.errors import BlockError, StorageError
from blockrepl.formats.image import Side
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.image import ImageFile, ImageIdentity
from blockrepl.storage.split_volume import SplitVolume

SIZE_BYTES = 1 << 20


class Rig:
    """A volume whose bits are durable when the test says so."""

    def __init__(self, path: Path, disk: DiskThread) -> None:
        identity = ImageIdentity(UUID(int=1), 1, 4, Side.SECONDARY, SIZE_BYTES, 512)
        ImageFile.create(path, identity)
        self.image = ImageFile.open(path, identity)
        self.bitmap = Bitmap(SIZE_BYTES)
        self.saves: list[Callable[[], None]] = []
        self.done: list[WriteBatch] = []
        self.volume = SplitVolume("data", self.image, disk, self.bitmap, self.saves.append)

    def write(self, offset: int, byte: bytes, *, fua: bool = False) -> bool:
        """True when it is complete at once."""
        batch = WriteBatch(self.done.append)
        batch.ops, batch.offsets, batch.lengths, batch.flags, batch.cookies = [int(Op.WRITE)], [offset], [512], [0], [0]
        batch.payloads = [memoryview(byte * 512)]
        batch.size_bytes = 512
        batch.fua = fua
        complete = self.volume.submit(batch)
        if complete:
            self.done.append(batch)
        return complete

    def at(self, offset: int) -> bytes:
        view = bytearray(1)
        self.image.read(offset, memoryview(view))
        return bytes(view)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    disk = DiskThread(asyncio.get_running_loop(), "split")
    rig = Rig(tmp_path / "data.img", disk)
    yield rig
    disk.close()
    rig.image.close()


async def test_17_a_bit_is_durable_before_the_write_that_it_covers_reaches_the_image(rig: Rig) -> None:
    assert not rig.write(0, b"a")
    assert rig.bitmap.covers(0, 512)
    assert (rig.at(0), rig.done) == (b"\0", [])
    rig.saves[0]()
    assert rig.at(0) == b"a"
    assert [batch.errors for batch in rig.done] == [None]
    assert rig.write(512, b"b"), "the block has its bit"
    assert len(rig.saves) == 1


async def test_what_comes_behind_a_write_that_waits_waits_too(rig: Rig) -> None:
    """The later write of a block wins, and a bit that is set is not durable yet."""
    rig.write(0, b"a")
    rig.write(0, b"b")
    rig.write(131072, b"c")
    assert rig.at(0) == b"\0"
    rig.saves[0]()
    assert (rig.at(0), rig.at(131072)) == (b"b", b"\0")
    rig.saves[1]()
    assert rig.at(131072) == b"c"
    assert len(rig.done) == 3


async def test_a_volume_that_is_withdrawn_waits_for_what_is_under_way_and_takes_nothing_more(rig: Rig) -> None:
    rig.write(0, b"a", fua=True)
    gone = asyncio.Event()
    rig.volume.withdraw(gone.set)
    await asyncio.sleep(0)
    assert not gone.is_set()
    assert rig.write(0, b"b")
    assert rig.done[0].errors is not None
    with pytest.raises(BlockError):
        rig.volume.read(0, memoryview(bytearray(512)), lambda _: None)
    flushed: asyncio.Future[BlockError | None] = asyncio.get_running_loop().create_future()
    rig.volume.flush(flushed.set_result)
    assert await flushed is not None
    rig.saves[0]()
    await asyncio.wait_for(gone.wait(), 10)
    assert rig.at(0) == b"a"
    assert rig.done[1].errors is None


async def test_an_idle_volume_is_withdrawn_at_once(rig: Rig) -> None:
    gone = asyncio.Event()
    rig.volume.withdraw(gone.set)
    await asyncio.wait_for(gone.wait(), 10)


async def test_bits_that_cannot_be_saved_stop_the_volume_before_the_write(rig: Rig) -> None:
    def fail(_: Callable[[], None]) -> None:
        raise StorageError("bitmap broken")

    rig.volume = SplitVolume("data", rig.image, rig.volume._disk, rig.bitmap, fail)
    assert not rig.write(0, b"a")
    await asyncio.sleep(0)
    assert rig.at(0) == b"\0"
    assert rig.done[0].errors is not None
    assert rig.write(0, b"b")
    assert rig.at(0) == b"\0"
