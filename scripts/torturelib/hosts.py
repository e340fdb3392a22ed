"""Hosts that write stamped blocks to all volumes over NBD; a lane's next write waits for the answer to its last.

Lanes run side by side on blocks of their own, each over all volumes in a random order: so every write depends on writes
to volumes of other primaries.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from scripts.torturelib.history import History
from scripts.torturelib.stamps import BLOCK_BYTES, read_stamp, stamp
from tests.demo.nbd_client import NbdVolume

AREA_BLOCKS = 4096  # of each volume, from its start
LANES = 6
HOT_BLOCKS = 48  # of each lane and volume: half of its writes go there, so that blocks are overwritten
MOST_BLOCKS = 8
RETRY_S = 0.1
TIMEOUT_S = 60.0  # longer than any primary holds a write

Address = Callable[[int], str]
"""Volume to the URI where it is served now."""


class Lane(threading.Thread):
    """One chain of dependent writes."""

    def __init__(self, load: Load, lane: int, seed: str) -> None:
        super().__init__(name=f"lane {lane}", daemon=True)
        self._load = load
        self._random = random.Random(f"{seed}/{lane}")
        self._first = lane * (AREA_BLOCKS // LANES)
        self._blocks = AREA_BLOCKS // LANES
        self._unsure: set[tuple[int, int]] = load.history.unsure()
        self._open: dict[int, NbdVolume] = {}

    def run(self) -> None:
        load = self._load
        try:
            while not load.ending.is_set():
                volume = self._random.choice(load.volumes)
                try:
                    self._step(volume)
                except OSError as error:
                    load.errors.append(f"{self.name}, volume {volume}: {error}")
                    self._drop(volume)
                    load.ending.wait(RETRY_S)
        except Exception as error:  # a thread that dies silently proves nothing
            load.broken.append(f"{self.name}: {error!r}")
        finally:
            for volume in list(self._open):
                self._drop(volume)

    def _drop(self, volume: int) -> None:
        opened = self._open.pop(volume, None)
        if opened is not None:
            with suppress(OSError):
                opened.close()

    def _step(self, volume: int) -> None:
        if volume not in self._open:
            self._open[volume] = NbdVolume(self._load.address(volume), TIMEOUT_S)
        disk = self._open[volume]
        dice = self._random.random()
        first, count = self._place()
        if dice < 0.05:
            disk.flush()
        elif dice < 0.15:
            self._check(disk, volume, first)
        elif not any((volume, block) in self._unsure for block in range(first, first + count)):
            self._write(disk, volume, first, count, zero=dice < 0.2, durable=dice > 0.85)

    def _place(self) -> tuple[int, int]:
        blocks = HOT_BLOCKS if self._random.random() < 0.5 else self._blocks
        count = self._random.choice((1, 1, 1, 1, 2, MOST_BLOCKS))
        return self._first + self._random.randrange(blocks - count + 1), count

    def _check(self, disk: NbdVolume, volume: int, block: int) -> None:
        expected = self._load.history.expected(volume, block)
        found = read_stamp(volume, block, disk.read(block * BLOCK_BYTES, BLOCK_BYTES))
        if expected not in (None, found):
            self._load.broken.append(f"read of block {block} of volume {volume}: {found} instead of {expected}")

    def _write(self, disk: NbdVolume, volume: int, first: int, count: int, *, zero: bool, durable: bool) -> None:
        history = self._load.history
        where = [(volume, block) for block in range(first, first + count)]
        write = history.submit(volume, first, count, zero=zero)
        self._unsure.update(where)
        if zero:
            disk.zero(first * BLOCK_BYTES, count * BLOCK_BYTES, durable=durable)
        else:
            content = b"".join(stamp(volume, block, write.number) for _, block in where)
            disk.write(first * BLOCK_BYTES, content, durable=durable)
        history.acknowledge(write)
        self._unsure.difference_update(where)


class Load:
    """All lanes, from `begin` to `end`. ``errors`` are those that a host may see, ``broken`` those that it may not."""

    def __init__(self, history: History, volumes: Sequence[int], address: Address, seed: str) -> None:
        self.history = history
        self.volumes = list(volumes)
        self.address = address
        self.ending = threading.Event()
        self.errors: list[str] = []
        self.broken: list[str] = []
        self._lanes = [Lane(self, lane, seed) for lane in range(LANES)]

    def begin(self) -> Load:
        for lane in self._lanes:
            lane.start()
        return self

    def end(self) -> None:
        """Every lane finishes the command it has under way, or gives up when that has no answer."""
        self.ending.set()
        for lane in self._lanes:
            lane.join(2 * TIMEOUT_S)
            if lane.is_alive():
                self.broken.append(f"{lane.name} does not end: a command has no answer in {2 * TIMEOUT_S:g} s")
