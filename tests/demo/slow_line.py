"""A long line: a TCP proxy whose bytes arrive late in one direction. Killing it loses what is on the way.

    python -m tests.demo.slow_line LISTEN_PORT TARGET_PORT DELAY_S

It prints a line when it listens. One secondary behind such a line is always behind the other, so an order that is not
kept shows for certain, and one that is kept is not kept by luck.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

PIECE_BYTES = 1 << 18
ON_THE_WAY = 256  # pieces


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Copy until either end closes; every piece leaves ``delay_s`` after it came."""
    loop = asyncio.get_running_loop()
    way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(ON_THE_WAY)

    async def enter() -> None:
        piece = b"-"
        while piece:
            piece = await reader.read(PIECE_BYTES)
            await way.put((loop.time() + delay_s, piece))

    entering = asyncio.create_task(enter())
    try:
        while True:
            due_s, piece = await way.get()
            await asyncio.sleep(due_s - loop.time())
            if not piece:
                return
            writer.write(piece)
            await writer.drain()
    except OSError:
        pass
    finally:
        entering.cancel()
        writer.close()


async def line(listen_port: int, target_port: int, delay_s: float) -> None:
    """Until it is killed, or who started it has ended."""

    parent = os.getppid()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target_port)
        except OSError:
            writer.close()
            return
        with contextlib.suppress(OSError):
            await asyncio.gather(carry(reader, far_writer, delay_s), carry(far_reader, writer, 0.0))

    server = await asyncio.start_server(accepted, "127.0.0.1", listen_port)
    print("listening", flush=True)
    async with server:
        while os.getppid() == parent:  # noqa: ASYNC110  # killed, it cannot end us, and nothing tells us
            await asyncio.sleep(0.2)


if __name__ == "__main__":
    asyncio.run(line(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
