"""A process that serves one file as a loop device until it is killed: FILE SIZE RUNTIME_DIR.

Prints the device, and a line when a hundred batches were stored."""

import asyncio
import sys
from pathlib import Path

from blockrepl.frontends.loop.frontend import LoopFrontend
from tests.frontends.loop.volumes import FileVolume


async def main() -> None:
    volume = FileVolume(Path(sys.argv[1]), int(sys.argv[2]))
    frontend = LoopFrontend(lambda: {"data": volume}, Path(sys.argv[3]))
    print(await frontend.attach("data"), flush=True)
    await volume.busy.wait()
    print("busy", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
