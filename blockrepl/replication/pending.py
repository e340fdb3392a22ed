"""The writes of a primary between submission and acknowledgement: two queues in batch order, and range questions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from blockrepl.block import Buffer, WriteBatch


@dataclass(slots=True)
class PendingRecord:
    """One batch record on its way. ``batch`` is None for a digest record."""

    number: int  # batch number
    volume: int
    batch: WriteBatch | None
    buffers: list[Buffer]
    size_bytes: int
    frame_bytes: int
    since_s: float
    failed: bool = False  # the host was told that it failed; its fate is open
    kind: int = 1  # RecordKind
    copy: tuple[int, int] | None = None  # a COPY record: (volume, offset)
    metadata: int | None = None  # a copy of metadata: volume
    digest: tuple[int, int] | None = None  # a digest record of a resync: (volume, offset)


class PendingQueue:
    """Sent records wait for the acknowledgement, unsent ones for a link or for credit.

    Invariant: batch numbers rise by one through sent, then unsent.
    """

    def __init__(self) -> None:
        self.sent: deque[PendingRecord] = deque()
        self.unsent: deque[PendingRecord] = deque()
        self.size_bytes = 0
        self.failed = 0

    def __iter__(self) -> Iterator[PendingRecord]:
        yield from self.sent
        yield from self.unsent

    def __len__(self) -> int:
        return len(self.sent) + len(self.unsent)

    def add(self, record: PendingRecord) -> None:
        """Queue behind everything."""
        self.unsent.append(record)
        self.size_bytes += record.size_bytes

    def acknowledged(self, batch: int) -> list[PendingRecord]:
        """Take out every sent record up to ``batch``."""
        done: list[PendingRecord] = []
        sent = self.sent
        while sent and sent[0].number <= batch:
            record = sent.popleft()
            self.size_bytes -= record.size_bytes
            self.failed -= record.failed
            done.append(record)
        return done

    def rewind(self) -> None:
        """The link is gone: everything sent will be sent again."""
        self.unsent.extendleft(reversed(self.sent))
        self.sent.clear()

    def take_all(self) -> list[PendingRecord]:
        """Empty both queues; in batch order."""
        records = list(self)
        self.sent.clear()
        self.unsent.clear()
        self.size_bytes = self.failed = 0
        return records

    def expire(self, before_s: float) -> list[PendingRecord]:
        """Mark and return the records that wait since before ``before_s``."""
        expired = []
        for record in self:
            if record.since_s > before_s:
                break
            if not record.failed:
                record.failed = True
                self.failed += 1
                expired.append(record)
        return expired

    def overlaps(self, volume: int, offset_bytes: int, length_bytes: int, *, failed_only: bool = False) -> bool:
        """Whether a pending write touches the range."""
        end = offset_bytes + length_bytes
        for record in self:
            batch = record.batch
            if batch is None or record.volume != volume or (failed_only and not record.failed):
                continue
            if touches(batch, offset_bytes, end):
                return True
        return False


def touches(batch: WriteBatch, start: int, end: int) -> bool:
    """Whether any command of the batch overlaps [start, end)."""
    return any(o < end and start < o + n for o, n in zip(batch.offsets, batch.lengths, strict=True))
