"""Serve one image over NBD, for benchmarks and by hand: ``python -m tests.frontends.nbd.serve_plain FILE SIZE PORT``.

Prints ``ready`` when it listens, and the CPU time it took when it is told to end (SIGTERM).
"""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
from pathlib import Path
from uuid import UUID

import uvloop

from blockrepl.chunks import ChunkPool
from blockrepl.formats.image import Side
from blockrepl.frontends.nbd.server import NbdServer
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.image import ImageFile, ImageIdentity
from blockrepl.storage.plain import PlainVolume


async def serve(path: Path, size_bytes: int, port: int) -> None:
    identity = ImageIdentity(UUID(int=1), 1, 1, Side.PRIMARY, size_bytes, 512)
    ImageFile.create(path, identity)
    image = ImageFile.open(path, identity)
    loop = asyncio.get_running_loop()
    disk = DiskThread(loop, "disk")
    volume = PlainVolume("data", image, disk)
    server = NbdServer(lambda: {"data": volume}, ChunkPool())
    await server.listen("127.0.0.1", port)
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    print("ready", flush=True)
    await stop.wait()
    await server.close()
    disk.close()
    image.close()
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"cpu_s={used.ru_utime + used.ru_stime:.3f} rss_kib={used.ru_maxrss}", flush=True)


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
