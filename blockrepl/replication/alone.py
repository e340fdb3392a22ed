"""A primary without its group: what it must remember to be found again, and writes that it completes alone.

While it replicates it keeps the ranges of what the secondaries may not have yet, in memory. When it is suspended these
become bits, durably, before PSUE is stored; then each write's bits are durable before the write reaches the P-VOL
(PROTOCOL, rules 8, 16 and 17).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from blockrepl.bitmap import Bitmap
from blockrepl.block import WriteBatch

FOLD_AT = 4096  # batches; beyond them the oldest become bits, in memory

Columns = tuple[int, int, list[int], list[int]]
"""(number, volume, offsets, lengths) of a batch that was acknowledged at or below the number."""


class Unconfirmed:
    """Ranges of batches above min(validated, checkpoint): the secondaries, or the P-VOL's disk, may not have them.

    Between START and END a takeover goes back to where the copy began: nothing is confirmed then (PROTOCOL, rule 20).

    Invariant: every acknowledged batch with a number above what was confirmed is in here.
    """

    def __init__(self, bitmaps: Mapping[int, Bitmap]) -> None:
        self._columns: deque[Columns] = deque()
        self._bitmaps = bitmaps
        self._folded: dict[int, Bitmap] = {}
        self._folded_through = 0

    def add(self, number: int, volume: int, offsets: list[int], lengths: list[int]) -> None:
        """A batch was acknowledged, by an ACK that names ``number``. Hot: once per batch."""
        columns = self._columns
        columns.append((number, volume, offsets, lengths))
        if len(columns) > FOLD_AT:
            self._fold(columns.popleft())

    def columns(self) -> Iterator[Columns]:
        """For people: what is in here, oldest first, but what was folded into bits."""
        return iter(self._columns)

    def confirmed(self, number: int, *, copying: bool) -> None:
        """Everything up to ``number`` is validated, and durable in the P-VOLs. ``copying``: between START and END."""
        columns = self._columns
        while columns and columns[0][0] <= number:
            oldest = columns.popleft()
            if copying:
                self._fold(oldest)
        if self._folded_through and number >= self._folded_through and not copying:
            self._folded.clear()
            self._folded_through = 0

    def _fold(self, columns: Columns) -> None:
        number, volume, offsets, lengths = columns
        bitmap = self._folded.get(volume)
        if bitmap is None:
            like = self._bitmaps[volume]
            bitmap = self._folded[volume] = Bitmap(like.size_bytes, like.block_bytes)
        elif bitmap.size_bytes < self._bitmaps[volume].size_bytes:  # the volume has grown since
            bitmap.grow(self._bitmaps[volume].size_bytes)
        mark(bitmap, offsets, lengths)
        self._folded_through = max(self._folded_through, number)

    def mark(self) -> None:
        """Set the bits of everything in here."""
        for _, volume, offsets, lengths in self._columns:
            mark(self._bitmaps[volume], offsets, lengths)
        for volume, bitmap in self._folded.items():
            for first, bits in bitmap.pieces():
                self._bitmaps[volume].merge(first, bits)

    def clear(self) -> None:
        """What is in the bitmaps need not be remembered here."""
        self._columns.clear()
        self._folded.clear()
        self._folded_through = 0


def mark(bitmap: Bitmap, offsets: list[int], lengths: list[int]) -> bool:
    """Set the bits of a batch. True: some were clear."""
    before = bitmap.count
    for offset, length in zip(offsets, lengths, strict=True):
        bitmap.mark(offset, length)
    return bitmap.count != before


@dataclass(slots=True)
class Solo:
    """A write that completes without the group. ``report``: the host waits for it."""

    volume: int
    batch: WriteBatch
    report: bool


class SoloWrites:
    """Writes whose bits are on their way to the disk, in order.

    Invariant: a write leaves only when its bits, and those of every write before it, are durable.
    """

    def __init__(self, bitmaps: Mapping[int, Bitmap]) -> None:
        self._bitmaps = bitmaps
        self._waiting: deque[Solo] = deque()
        self._covered = 0  # of those waiting, how many the save under way covers
        self.size_bytes = 0
        self.saves = 0  # of bits, under way: what is set may not be durable yet

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, volume: int, batch: WriteBatch, *, report: bool = True) -> bool:
        """Mark its bits. True: all of them are durable already, and no write waits: it may be stored now."""
        bitmap = self._bitmaps[volume]
        new = mark(bitmap, batch.offsets, batch.lengths)
        if not (new or self._waiting or self.saves or bitmap.changed):
            return True
        self._waiting.append(Solo(volume, batch, report))
        self.size_bytes += batch.size_bytes
        return False

    def begin_save(self) -> bool:
        """Whether bits must be saved now: `saved` says that those of all writes waiting now are durable."""
        if self._covered or not self._waiting:
            return False
        self._covered = len(self._waiting)
        return True

    def saved(self) -> list[Solo]:
        """The bits are durable: these may be stored, in this order."""
        done = [self._waiting.popleft() for _ in range(self._covered)]
        self._covered = 0
        self.size_bytes -= sum(solo.batch.size_bytes for solo in done)
        return done

    def give_up(self) -> list[Solo]:
        """All that wait: the primary has failed."""
        done = list(self._waiting)
        self._waiting.clear()
        self._covered = self.size_bytes = 0
        return done
