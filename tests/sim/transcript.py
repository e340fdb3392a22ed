"""Conversations of a whole group as readable text: one line per message, in the order sent; heartbeats are left out."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.sim.group import Options
from tests.sim.process import BLOCK, Process
from tests.sim.sites import group_for
from tests.sim.words import sentences
from tests.sim.write import Write


class Steady(Random):
    """No chance at all: every delay is a middling one, every choice the first."""

    def __init__(self) -> None:
        super().__init__(0)
        self._drawn = 0

    def random(self) -> float:
        return 0.5

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def randint(self, a: int, b: int) -> int:
        return a

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        return 0 if stop is None else start

    def shuffle(self, x: Any) -> None:
        """As they are."""

    def getrandbits(self, k: int) -> int:
        self._drawn += 1
        return self._drawn

    def randbytes(self, n: int) -> bytes:
        return self.getrandbits(64).to_bytes(n, "big")


class Transcript:
    """A group without chance or faults, and what its processes say to each other."""

    def __init__(self, story: str = "production", ring_bytes: int = 1 << 20) -> None:
        """``story`` "never" is the fence level, "sites" has data nodes at both sites."""
        self.lines: list[str] = []
        self.group = group_for(0, Options(story=story, volumes=2, ring_bytes=ring_bytes), Steady())
        self.group.world.on_message = self._message

    def note(self, text: str) -> None:
        """What happens next, for the reader."""
        self.lines.append(f"-- {text}")

    def quiet(self, seconds: float = 1.0) -> None:
        """Let them talk."""
        self.group.world.run(self.group.world.now_s + seconds)

    def write(self, volume: int, blocks: int = 1, site: int = 0, fill: bytes = b"\0") -> Write:
        """A host writes ``fill`` into the first blocks."""
        from tests.replication.roles import write

        group = self.group
        process: Any = group.processes[str(group.layout.volumes[volume][site])]
        size = blocks * BLOCK
        batch = write(size)
        payload = (fill * size)[:size]
        batch.payloads[0] = memoryview(payload)
        ours = Write(volume, list(batch.ops), [0], [size], [payload], group.oracle.completed)
        group.oracle.host_submits(process, batch, ours)

        def done(batch: Any) -> None:
            self.lines.append(f"-- {process.name} tells its host: {'EIO' if batch.errors else 'well'}")
            if batch.errors is None:
                group.oracle.complete(process, ours)

        batch.done = done

        def submit() -> None:
            process.volumes[volume].submit(batch)

        group.world.enter(process, submit)
        return ours

    def _message(self, process: Process, peer: str, data: bytes) -> None:
        self.lines += sentences(process.name, peer, data)
