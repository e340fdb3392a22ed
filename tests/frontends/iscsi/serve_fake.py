"""Serve the fake disk, by hand: ``python -m tests.frontends.iscsi.serve_fake PORT``."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import sys

import uvloop

from blockrepl.chunks import ChunkPool
from blockrepl.frontends.iscsi.login import Access, TargetDescription
from blockrepl.frontends.iscsi.server import IscsiServer
from tests.frontends.iscsi.fake import FakeDevice


async def serve(port: int) -> None:
    logging.basicConfig(level=logging.DEBUG)
    target = TargetDescription("iqn.2026-11.org.blockrepl:fake", "fake", 1, Access())
    server = IscsiServer(target, FakeDevice(1 << 18), ChunkPool())
    await server.listen("127.0.0.1", port)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    print("ready", flush=True)
    await stop.wait()
    await server.close()
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"cpu_s={used.ru_utime + used.ru_stime:.3f} rss_kib={used.ru_maxrss}", flush=True)


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
