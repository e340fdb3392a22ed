from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest_asyncio

from blockrepl.block import Volume
from blockrepl.chunks import ChunkPool
from blockrepl.formats.image import Side
from blockrepl.frontends.nbd.server import NbdServer
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.image import ImageFile, ImageIdentity
from blockrepl.storage.plain import PlainVolume

SIZE = (64 << 20) + 512


class Rig:
    """A server on a free port that exports plain volumes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pool = ChunkPool()
        self.disk = DiskThread(asyncio.get_running_loop(), "disk")
        self.exports: dict[str, Volume] = {}
        self.images: list[ImageFile] = []
        self.server = NbdServer(lambda: self.exports, self.pool)
        self.address = ("127.0.0.1", 0)

    def add(self, name: str, *, writable: bool = True, size_bytes: int = SIZE, block: int = 512) -> PlainVolume:
        identity = ImageIdentity(UUID(int=7), len(self.images), 2, Side.PRIMARY, size_bytes, block)
        path = self.directory / f"{name}.img"
        ImageFile.create(path, identity)
        image = ImageFile.open(path, identity)
        self.images.append(image)
        volume = PlainVolume(name, image, self.disk, writable=writable)
        self.exports[name] = volume
        return volume

    def uri(self, name: str = "data") -> str:
        return f"nbd://{self.address[0]}:{self.address[1]}/{name}"

    async def until(self, condition: object) -> None:
        assert callable(condition)
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    rig.add("data")
    rig.address = await rig.server.listen("127.0.0.1", 0)
    yield rig
    await rig.server.close()
    rig.disk.close()
    for image in rig.images:
        image.close()
