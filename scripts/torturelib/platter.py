"""A disk with a volatile cache that can lose power. Only what was flushed is sure to be on the platter.

What a power cut leaves of the rest: each page of each write is kept, dropped, or torn at a sector, in any combination;
later pages may be there while earlier ones are not. Two files: ``cache``, what the running system reads, and
``platter``, what is left after a power cut.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blockrepl.block import Volume, WriteBatch
from blockrepl.errors import BlockError

PAGE_BYTES = 4096
SECTOR_BYTES = 512
FLUSH_S = 0.001
CACHE_BYTES = 64 << 20  # what lies longer in the cache is written out, as disks do
ZERO_STEP_BYTES = 1 << 20
COPY_BYTES = 4 << 20


@dataclass
class Loss:
    """What a power cut did to unflushed pages, by count."""

    kept: int = 0
    dropped: int = 0
    torn: int = 0


class Platter(Volume):
    """`Volume` of a loop device. `freeze`, then kill whoever uses it, then `lose`: no answer is given between."""

    def __init__(self, name: str, folder: Path, size_bytes: int) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.block_size_bytes = PAGE_BYTES
        self.writable = True
        self.cache_path, self.platter_path = folder / f"{name}.cache", folder / f"{name}.platter"
        self._cache, self._platter = (
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for path in (self.cache_path, self.platter_path)
        )
        for fd in (self._cache, self._platter):
            os.ftruncate(fd, size_bytes)
        self._unflushed: list[tuple[int, bytes]] = []
        self._unflushed_bytes = 0
        self._written_out = 0  # so many writes so far
        self._frozen = False
        self._dead = False
        self._held: list[Callable[[], None]] = []  # answers that nobody gets before `lose`

    # what the loop device asks

    def submit(self, batch: WriteBatch) -> bool:
        self._store(batch)
        if self._frozen:  # on its way when the power went: it may arrive as well as not
            self._held.append(lambda: batch.done(batch))
            return False
        return True

    def _store(self, batch: WriteBatch) -> None:
        for offset, length, payload in zip(batch.offsets, batch.lengths, batch.payloads, strict=True):
            if payload is not None:
                self._write(offset, bytes(payload))
                continue
            for start in range(offset, offset + length, ZERO_STEP_BYTES):
                self._write(start, bytes(min(ZERO_STEP_BYTES, offset + length - start)))
        batch.release()

    def _write(self, offset: int, data: bytes) -> None:
        os.pwrite(self._cache, data, offset)
        if self._dead:
            return
        self._unflushed.append((offset, data))
        self._unflushed_bytes += len(data)
        if self._unflushed_bytes > CACHE_BYTES and not self._frozen:
            self._write_out(len(self._unflushed))

    def read(self, offset_bytes: int, view: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        os.preadv(self._cache, [view], offset_bytes)
        return True

    def flush(self, done: Callable[[BlockError | None], None]) -> None:
        """What came before is on the platter FLUSH_S later, and not a moment earlier."""
        asyncio.get_running_loop().call_later(FLUSH_S, self._flushed, len(self._unflushed) + self._written_out, done)

    def _flushed(self, upto: int, done: Callable[[BlockError | None], None]) -> None:
        if self._frozen:
            self._held.append(lambda: done(None))
            return
        if not self._dead:
            self._write_out(upto - self._written_out)
        done(None)

    @property
    def congested(self) -> bool:
        return False

    def when_relieved(self, resume: Callable[[], None]) -> None:
        raise AssertionError("never congested")

    def _write_out(self, count: int) -> None:
        for offset, data in self._unflushed[: max(0, count)]:
            os.pwrite(self._platter, data, offset)
            self._unflushed_bytes -= len(data)
            self._written_out += 1
        del self._unflushed[: max(0, count)]

    # what happens to it

    def freeze(self) -> None:
        """The power goes now: nothing is answered, nothing reaches the platter."""
        self._frozen = True

    def lose(self, seed: str) -> Loss:
        """Decide what the cut left. What was held is now answered, so that the dying can die; it goes nowhere."""
        assert self._frozen
        chance, loss = random.Random(seed), Loss()
        keep, drop = chance.choice(((0, 1), (0.5, 0.5), (0.45, 0.45), (0.9, 0.05)))  # the rest is torn
        for offset, data in self._unflushed:
            for start in range(0, len(data), PAGE_BYTES):
                dice = chance.random()
                page = data[start : start + PAGE_BYTES]
                if dice < keep:
                    os.pwrite(self._platter, page, offset + start)
                    loss.kept += 1
                elif dice < keep + drop:
                    loss.dropped += 1
                else:
                    self._tear(chance, offset + start, page)
                    loss.torn += 1
        self._unflushed.clear()
        self._dead, self._frozen = True, False
        held, self._held = self._held, []
        for answer in held:
            answer()
        return loss

    def _tear(self, chance: random.Random, offset: int, page: bytes) -> None:
        for start in range(0, len(page), SECTOR_BYTES):
            if chance.random() < 0.5:
                os.pwrite(self._platter, page[start : start + SECTOR_BYTES], offset + start)

    def revive(self) -> None:
        """The power is back: the cache holds what is on the platter. Nobody may use the device meanwhile."""
        assert self._dead
        os.ftruncate(self._cache, 0)
        os.ftruncate(self._cache, self.size_bytes)
        at = 0
        while True:
            try:
                at = os.lseek(self._platter, at, os.SEEK_DATA)
            except OSError:  # ENXIO: no data beyond
                break
            end = os.lseek(self._platter, at, os.SEEK_HOLE)
            while at < end:
                data = os.pread(self._platter, min(COPY_BYTES, end - at), at)
                at += os.pwrite(self._cache, data, at)
        self._dead = False

    def close(self) -> None:
        """Close the files."""
        os.close(self._cache)
        os.close(self._platter)
