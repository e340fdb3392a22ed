"""Ranges of P-VOLs under read: no write in flight touches one when it is read, and later writes to it wait.

Digests and copies go through here, so that each speaks of one sequence number (PROTOCOL, rule 19).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from blockrepl.block import WriteBatch
from blockrepl.replication.pending import PendingQueue, touches


class Purpose(Enum):
    """What a range is read for."""

    VERIFY = "verify"  # an operator's
    DIGEST = "digest"  # of a resync that trusts no bitmap
    COPY = "copy"
    METADATA = "metadata"  # what front ends keep with the volume; its writes touch offset 0
    COPY_HERE = "copy for the intermediate volume only"


COPIES = frozenset({Purpose.COPY, Purpose.COPY_HERE})

Lock = tuple[Purpose, int, int, int]
"""(purpose, volume, start, end) in bytes."""
Waiting = tuple[int, WriteBatch, float]
"""(volume, batch, since when in seconds)."""


class RangeLocks:
    """Invariant: a batch that waits here touches a locked range, or overlaps one that waits before it."""

    def __init__(self, queue: PendingQueue) -> None:
        self._queue = queue
        self._locks: dict[int, Lock] = {}
        self._reading: set[int] = set()
        self._waiting: list[Waiting] = []
        self.waiting_bytes = 0

    def __len__(self) -> int:
        return len(self._locks)

    def lock(self, token: int, purpose: Purpose, volume: int, start: int, end: int) -> None:
        """From now on, writes that touch the range wait."""
        self._locks[token] = (purpose, volume, start, end)

    def ready(self) -> list[tuple[int, Lock]]:
        """Ranges that no write in flight touches: they are to be read now."""
        found = []
        for token, lock in self._locks.items():
            _, volume, start, end = lock
            if token not in self._reading and not self._queue.overlaps(volume, start, end - start):
                self._reading.add(token)
                found.append((token, lock))
        return found

    def release(self, token: int) -> Lock | None:
        """The range is read, and its record goes before what waits: see `let_go`. None: given up meanwhile."""
        self._reading.discard(token)
        return self._locks.pop(token, None)

    def abort(self) -> list[Lock]:
        """Give up ranges that still wait for writes in flight: nobody knows when those come through."""
        return [self._locks.pop(token) for token in [token for token in self._locks if token not in self._reading]]

    def void(self) -> list[Waiting]:
        """Give up every range: what is read now says nothing of what is written next. Returns all that waits."""
        self._locks.clear()
        self._reading.clear()
        waiting, self._waiting = self._waiting, []
        self.waiting_bytes = 0
        return waiting

    def reading(self) -> list[Lock]:
        """Ranges that are being read."""
        return [self._locks[token] for token in self._reading]

    def must_wait(self, volume: int, batch: WriteBatch) -> bool:
        """Behind a locked range, or behind a batch that it overlaps and that waits for one (order)."""
        return self._locked(volume, batch) or _overlaps_any(volume, batch, self._waiting)

    def defer(self, volume: int, batch: WriteBatch, now_s: float) -> None:
        """Let a batch wait."""
        self._waiting.append((volume, batch, now_s))
        self.waiting_bytes += batch.size_bytes

    def let_go(self) -> Iterator[Waiting]:
        """Batches that need not wait any more, in order; each is to be queued before the next is asked for."""
        waiting, self._waiting = self._waiting, []
        for volume, batch, since_s in waiting:
            if self.must_wait(volume, batch):
                self._waiting.append((volume, batch, since_s))
            else:
                self.waiting_bytes -= batch.size_bytes
                yield volume, batch, since_s

    def _locked(self, volume: int, batch: WriteBatch) -> bool:
        return any(volume == v and touches(batch, start, end) for _, v, start, end in self._locks.values())


def _overlaps_any(volume: int, batch: WriteBatch, others: list[Waiting]) -> bool:
    return any(
        volume == theirs and any(touches(batch, o, o + n) for o, n in zip(each.offsets, each.lengths, strict=True))
        for theirs, each, _ in others
    )
