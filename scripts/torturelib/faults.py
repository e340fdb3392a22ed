"""Faults by chance, one or two at a time, each undone after a while."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from scripts.torturelib.group import INTERMEDIATE, NODES, PRIMARIES, SECONDARIES, Group

LINKS = [(node, INTERMEDIATE) for node in (*PRIMARIES, *SECONDARIES)]
LONGEST_S = 3.0  # twice the silence after which a link is dropped
SLOW_STOPPED_S, SLOW_RUNNING_S = 0.12, 0.03


class Storm:
    """On ``nodes`` and their links; others are spared. ``happened`` says what was done, in order."""

    def __init__(self, group: Group, chance: random.Random, nodes: Collection[str] = NODES) -> None:
        self._group = group
        self._random = chance
        self._nodes = [node for node in NODES if node in nodes]
        self._links = [pair for pair in LINKS if set(pair) & set(nodes)]
        self._pulse: Pulse | None = None
        self.happened: list[str] = []
        self._faults: list[tuple[float, Callable[[], str]]] = [
            (4, self._kill), (2, self._stop), (3, self._cut), (1, self._isolate), (1, self._slow),
        ]  # fmt: skip
        if group.disks.lose_power:
            self._faults.append((4, self._power))

    def rage(self, seconds: float) -> None:
        """Returns with everything undone: links whole, everybody started. Raises BrokenPromiseError."""
        deadline_s = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline_s:
                for _ in range(self._random.choice((1, 1, 2))):
                    self.strike()
                time.sleep(self._random.uniform(0.05, LONGEST_S))
                self.undo()
                time.sleep(self._random.uniform(0.0, 1.0))
        finally:
            self.undo()

    def strike(self) -> None:
        """One fault."""
        weights, faults = zip(*self._faults, strict=True)
        text = self._random.choices(faults, weights)[0]()
        self.happened.append(text)
        self._group.say(text)

    def undo(self) -> None:
        """The links are whole, everybody runs. Returns before they are ready."""
        if self._pulse is not None:
            self._pulse.end()
            self._pulse = None
        group = self._group
        group.network.heal()
        group.go_on()
        group.check_running()
        group.start(wait=False)

    def _some(self) -> list[str]:
        count = self._random.choice((1, 1, 1, 2, 2, len(self._nodes)))
        return sorted(self._random.sample(self._nodes, min(count, len(self._nodes))))

    def _kill(self) -> str:
        nodes = self._some()
        self._group.kill(nodes)
        return f"kill -9 {' '.join(nodes)}"

    def _power(self) -> str:
        nodes = self._some()
        loss = self._group.cut_power(nodes, str(self._random.random()))
        return f"power cut at {' '.join(nodes)}: {', '.join(f'{count} pages {how}' for how, count in loss.items())}"

    def _stop(self) -> str:
        nodes = self._some()[:2]
        self._group.stop(nodes)
        return f"SIGSTOP {' '.join(nodes)}"

    def _cut(self) -> str:
        one, other = self._random.choice(self._links)
        ways = self._random.choice(([(one, other)], [(other, one)], [(one, other), (other, one)]))
        for sender, receiver in ways:
            self._group.network.cut(sender, receiver)
        return "cut " + ", ".join(f"{sender} to {receiver}" for sender, receiver in ways)

    def _isolate(self) -> str:
        node = self._random.choice(self._nodes)
        for other in NODES:
            if other != node:
                self._group.network.cut(node, other)
                self._group.network.cut(other, node)
        return f"isolate {node}"

    def _slow(self) -> str:
        node = self._random.choice([node for node in SECONDARIES if node in self._nodes] or self._nodes)
        if self._pulse is None and node in self._group.running:
            self._pulse = Pulse(self._group, node)
        return f"slow {node}"


class Pulse(threading.Thread):
    """A slow node: it is stopped for most of the time."""

    def __init__(self, group: Group, node: str) -> None:
        super().__init__(daemon=True)
        self._process = group.running[node]
        self._ending = threading.Event()
        self.start()

    def run(self) -> None:
        with suppress(ProcessLookupError):
            while not self._ending.is_set() and self._process.poll() is None:
                self._process.send_signal(signal.SIGSTOP)
                self._ending.wait(SLOW_STOPPED_S)
                self._process.send_signal(signal.SIGCONT)
                self._ending.wait(SLOW_RUNNING_S)

    def end(self) -> None:
        """It runs at its own speed again."""
        self._ending.set()
        self.join()
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)
