"""Events in time order, from one seed; and the trace of what happened."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from tests.sim.disk import SimFile, SimSpills

if TYPE_CHECKING:
    from tests.sim.process import Process

GROUP = bytes(range(16))
TRACE_LINES = 4000


class Killed(BaseException):
    """A process dies between two of its effects. Not an Exception: nobody may catch it."""


class Violation(AssertionError):  # noqa: N818
    """An invariant of PROTOCOL.md does not hold."""


class World:
    """Time, chance and the events to come.

    ``checks`` run after every event.
    """

    def __init__(self, seed: int, random: Random | None = None) -> None:
        self.seed = seed
        self.random = random or Random(seed)
        self.on_message: Callable[[Process, str, bytes], None] | None = None  # from, to, bytes
        self.now_s = 0.0
        self.steps = 0
        self.trace: deque[tuple[float, str, str]] = deque(maxlen=TRACE_LINES)
        self.on_say: Callable[[str, str], None] | None = None
        self.checks: list[Callable[[], None]] = []
        self._heap: list[tuple[float, int, Callable[[], None], Process | None, int]] = []
        self._count = 0

    def say(self, who: str, text: str) -> None:
        """One line of the trace."""
        self.trace.append((self.now_s, who, text))
        if self.on_say is not None:
            self.on_say(who, text)

    def after(self, delay_s: float, what: Callable[[], None], process: Process | None = None) -> None:
        """Call ``what`` later; never if ``process`` has died by then."""
        self._count += 1
        life = process.life if process is not None else 0
        heapq.heappush(self._heap, (self.now_s + delay_s, self._count, what, process, life))

    def step(self) -> bool:
        """One event. False: there is none."""
        if not self._heap:
            return False
        self.now_s, _, what, process, life = heapq.heappop(self._heap)
        if process is None:
            self.enter(None, what)
        elif process.life == life:
            if process.paused_until_s > self.now_s:
                self.after(process.paused_until_s - self.now_s, what, process)
            else:
                self.enter(process, what)
        return True

    def enter(self, process: Process | None, what: Callable[[], None]) -> None:
        """Run an event in a process, then the checks."""
        self.steps += 1
        try:
            what()
        except Killed:
            assert process is not None
            process.crash("in mid-step")
        for check in self.checks:
            check()

    def run(self, until_s: float, done: Callable[[], bool] | None = None) -> bool:
        """Until ``done`` (True) or the time is over (False)."""
        while self._heap and self._heap[0][0] <= until_s:
            self.step()
            if done is not None and done():
                return True
        self.now_s = max(self.now_s, until_s)
        return done is not None and done()


class Clock:
    """`ports.Clock` of one machine: starts anywhere, runs at a rate of its own; its wall clock jumps.

    Invariant: the rates of any two machines differ by less than 2 × (PROTOCOL, rule 16).
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._offset_s = world.random.uniform(1, 1000)
        self._since_s = world.now_s
        self._rate = 1.0
        self.wall_offset_s = 0.0

    def drift(self, rate: float) -> None:
        """From now on it runs at ``rate`` seconds per second."""
        self._offset_s, self._since_s, self._rate = self.now_s(), self._world.now_s, rate

    def now_s(self) -> float:
        """Monotonic, seconds."""
        return (self._world.now_s - self._since_s) * self._rate + self._offset_s

    def boot_ns(self) -> int:
        """Nanoseconds."""
        return int(self.now_s() * 1e9)

    def wall_ns(self) -> int:
        """Nanoseconds."""
        return int((self._world.now_s + self.wall_offset_s) * 1e9) + (1 << 60)


class Machine:
    """Files that survive a process, and lose what was not synced with the power."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.powered = True
        self.files: dict[str, SimFile] = {}
        self.spills = SimSpills()
        self.clock = Clock(world)

    def renew(self) -> None:
        """A new one is put in its place: empty disks."""
        self.files.clear()
        self.spills = SimSpills()

    def cut_power(self) -> None:
        """Every file is left as the platter has it."""
        unit = self.world.random.choice([512, 4096])
        for file in self.files.values():
            file.power_cut(self.world.random, unit)
