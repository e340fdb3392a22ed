"""Ranges of P-VOLs under read: no write in flight touches one when it is read, and later writes to it wait.

Digests and copies go through here, so that each speaks of one sequence number (PROTOCOL, rule 19).
"""

from __future__ import annotations

from collections import deque
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


class RangeLocks:
    """Invariant: a batch that waits here touches a locked range, or stands behind one that does."""

    def __init__(self, queue: PendingQueue) -> None:
        self._queue = queue
        self._locks: dict[int, Lock] = {}
        self._reading: set[int] = set()
        self._deferred: deque[tuple[int, WriteBatch, float]] = deque()
        self.deferred_bytes = 0

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

    def release(self, token: int) -> Lock:
        """The range is read, and its record queued: see `let_go`."""
        self._reading.discard(token)
        return self._locks.pop(token)

    def abort(self) -> list[Lock]:
        """Give up ranges that still wait for writes in flight: nobody knows when those come through."""
        return [self._locks.pop(token) for token in [token for token in self._locks if token not in self._reading]]

    def reading(self) -> list[Lock]:
        """Ranges that are being read."""
        return [self._locks[token] for token in self._reading]

    def must_wait(self, volume: int, batch: WriteBatch) -> bool:
        """Behind a locked range, or behind a batch that waits for one (order)."""
        return bool(self._deferred) or self._locked(volume, batch)

    def defer(self, volume: int, batch: WriteBatch, now_s: float) -> None:
        """Let a batch wait."""
        self._deferred.append((volume, batch, now_s))
        self.deferred_bytes += batch.size_bytes

    def let_go(self) -> Iterator[tuple[int, WriteBatch, float]]:
        """Batches that need not wait any more, in order; each is to be queued before the next is asked for."""
        while self._deferred and not self._locked(*self._deferred[0][:2]):
            volume, batch, since_s = self._deferred.popleft()
            self.deferred_bytes -= batch.size_bytes
            yield volume, batch, since_s

    def give_up(self) -> list[tuple[int, WriteBatch, float]]:
        """Everything that waits: the primary has failed."""
        waiting = list(self._deferred)
        self._deferred.clear()
        self.deferred_bytes = 0
        return waiting

    def _locked(self, volume: int, batch: WriteBatch) -> bool:
        return any(volume == v and touches(batch, start, end) for _, v, start, end in self._locks.values())
