"""The process that serves all platters of a group as loop devices. One JSON list a line on stdin, one answer on stdout.

python -m scripts.torturelib.platter_server FOLDER
["attach", [NAME…], SIZE_BYTES]   the devices
["freeze", [NAME…]]               null: from here on they answer nothing
["lose", [NAME…], SEED]           {"kept", "dropped", "torn"}: pages
["revive", [NAME…]]               null: after it they hold what was left; unmounted meanwhile
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blockrepl.frontends.loop.frontend import LoopFrontend
from scripts.torturelib import enclosure
from scripts.torturelib.platter import Loss, Platter


class Server:
    """The commands."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._platters: dict[str, Platter] = {}
        self._frontends: list[LoopFrontend] = []

    async def attach(self, names: list[str], size_bytes: int) -> list[str]:
        return list(await asyncio.gather(*(self._attach(name, size_bytes) for name in names)))

    async def _attach(self, name: str, size_bytes: int) -> str:
        platter = self._platters[name] = Platter(name, self._folder, size_bytes)
        own = self._folder / name
        own.mkdir()
        frontend = LoopFrontend(lambda: {name: platter}, own)
        self._frontends.append(frontend)
        return await frontend.attach(name)

    async def freeze(self, names: list[str]) -> None:
        for name in names:
            self._platters[name].freeze()

    async def lose(self, names: list[str], seed: str) -> dict[str, int]:
        losses = [asdict(self._platters[name].lose(f"{seed}/{name}")) for name in names]
        return {key: sum(loss[key] for loss in losses) for key in asdict(Loss())}

    async def revive(self, names: list[str]) -> None:
        for name in names:
            self._platters[name].revive()

    async def close(self) -> None:
        await asyncio.gather(*(frontend.close() for frontend in self._frontends))


async def main(folder: Path) -> None:
    """Until stdin ends."""
    server = Server(folder)
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    try:
        while line := await commands.readline():
            command, *arguments = json.loads(line)
            answer: dict[str, Any]
            try:
                answer = {"result": await getattr(server, command)(*arguments)}
            except Exception as error:  # who asked is told
                answer = {"error": repr(error)}
            print(json.dumps(answer), flush=True)
    finally:
        await server.close()


if __name__ == "__main__":
    enclosure.leave_mounts()
    asyncio.run(main(Path(sys.argv[1])))
