"""Lines between nodes where namespaces are lacking: a process of TCP proxies whose directions can be held one by one.

    python -m scripts.torturelib.lines PORT=TARGET_PORT…

It prints a line when it listens. Commands on stdin, one a line, answered each by a line: "PORT forward|backward
pass|hold". What is held stays where it is, as with a cut cable under TCP: it arrives when the line is whole again, or
never, if an end gives up before.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

PIECE_BYTES = 1 << 18


class Line:
    """One port. ``ways``: forward is from who dials."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.ways = {"forward": asyncio.Event(), "backward": asyncio.Event()}
        for way in self.ways.values():
            way.set()

    async def accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for way in self.ways.values():  # a handshake needs both
                await way.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            carry(reader, far_writer, self.ways["forward"]), carry(far_reader, writer, self.ways["backward"])
        )


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: asyncio.Event) -> None:
    """Copy until an end closes; the end of it is held as the bytes are."""
    with contextlib.suppress(OSError):
        while piece := await reader.read(PIECE_BYTES):
            await way.wait()
            writer.write(piece)
            await writer.drain()
    await way.wait()
    writer.close()


async def main(arguments: list[str]) -> None:
    """Until stdin ends."""
    lines = {}
    for argument in arguments:
        port, _, target = argument.partition("=")
        lines[port] = Line(int(target))
        await asyncio.start_server(lines[port].accepted, "127.0.0.1", int(port))
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    print("listening", flush=True)
    while command := await commands.readline():
        port, way, state = command.decode().split()
        event = lines[port].ways[way]
        (event.set if state == "pass" else event.clear)()
        print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
