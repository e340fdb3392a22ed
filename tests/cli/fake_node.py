"""A process that answers on a control socket as ``fake.json`` in its directory says: for tests of the command line.

``{"exit": code}`` ends at once; ``"ready_after"`` counts status requests before it is ready; ``"ignore"`` lists what it
does not obey ("stop", "term"); ``"status"`` is what its status says; ``"answers"`` maps a command to a list of
messages, the last one ``{"result": …}`` or ``{"error": [class, message]}``, or to lists of such, one for each time, of
which the last stays. Requests go to ``requests.jsonl``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from blockrepl import errors
from blockrepl.definition import load
from blockrepl.node.control import ControlServer, Progress

Message = dict[str, Any]
COMMANDS = (
    "attach", "detach", "takeover", "verify", "reform", "bitmap", "pair_create", "pair_split", "pair_resync",
    "pair_delete", "exclude", "include",
)  # fmt: skip


class FakeNode:
    def __init__(self, path: str, name: str) -> None:
        self.definition = load(path)
        self.node = self.definition.node(name)
        plan = self.node.directory / "fake.json"
        self.plan: Message = json.loads(plan.read_text()) if plan.exists() else {}
        self.stopping = asyncio.Event()
        self.asked = 0

    async def run(self) -> None:
        if "exit" in self.plan:
            print("something terrible happened to my disk", file=sys.stderr)
            raise SystemExit(self.plan["exit"])
        ignore = self.plan.get("ignore", [])
        if "term" in ignore:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        commands = {name: self.answer(name) for name in COMMANDS}
        server = ControlServer(self.node.directory, {"status": self.status, "stop": self.stop, **commands})
        await server.start()
        if "stop" in ignore:
            await asyncio.Event().wait()
        await self.stopping.wait()
        await server.close()

    async def status(self, args: Message, progress: Progress) -> Message:
        self.asked += 1
        base = {"schema": 1, "group": self.definition.name, "node": self.node.name, "role": self.node.role}
        ready = self.asked > self.plan.get("ready_after", 0)
        answer = {**base, "pid": os.getpid(), "state": "serving" if ready else "replaying", "ready": ready}
        return {**answer, **self.plan.get("status", {})}

    async def stop(self, args: Message, progress: Progress) -> Message:
        self.stopping.set()
        return {}

    def answer(self, name: str) -> Any:
        async def handler(args: Message, progress: Progress) -> Message:
            with (self.node.directory / "requests.jsonl").open("a") as log:
                log.write(json.dumps([name, args]) + "\n")
            messages = self.plan["answers"][name]
            if isinstance(messages[0], list):
                messages = messages.pop(0) if len(messages) > 1 else messages[0]
            for message in messages:
                if "error" in message:
                    kind, text = message["error"]
                    raise getattr(errors, kind)(text)
                if "result" in message:
                    return dict(message["result"])
                progress(message["progress"])
            raise AssertionError("the plan ends with a result or an error")

        return handler


async def main(path: str, name: str) -> None:
    await FakeNode(path, name).run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]).name))
