"""Which frames lie in a journal, from head to tail: compact columns, about 60 bytes a frame."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

from blockrepl.formats.journal import FRAME_HEADER_BYTES, RING_OFFSET, FrameKind

SHRINK_AT = 4096  # entries given up before the columns are moved: trim stays amortised O(1)


class FrameRef(NamedTuple):
    """One frame: its position, where in the file its body stands, and what it holds."""

    position: int
    body_offset: int  # bytes from the start of the file; the body is contiguous
    body_bytes: int
    first: int  # first sequence number; of a NOTE the number noted
    count: int  # type: ignore[assignment]  # hides tuple.count
    kind: int
    stream: int
    sender: int

    @property
    def last(self) -> int:
        """The last sequence number of a record, or the number noted."""
        return self.first + self.count - 1 if self.count else self.first


class FrameIndex:
    """Columns over frames in the order appended. PADs too: one may be where the head or a durable position stands.

    A frame's *ordinal* counts frames ever indexed and never changes; its row is ``ordinal - self._base``. Rows below
    ``self._start`` are given up. For each stream and each sender there is a column of the ordinals of its records, in
    which numbers ascend; `_greatest` is the greatest number up to a row, so that it ascends over all frames.
    """

    def __init__(self, ring_bytes: int) -> None:
        self._ring_bytes = ring_bytes
        self._base = 0
        self._start = 0
        self._position = array("Q")
        self._body_bytes = array("I")
        self._chain = array("I")  # that the frame carries
        self._greatest = array("Q")
        self._first = array("Q")
        self._count = array("I")
        self._stream = array("H")
        self._sender = array("H")
        self._kind = array("B")
        self._columns: tuple[array[int], ...] = (
            self._position, self._body_bytes, self._chain, self._greatest, self._first, self._count, self._stream,
            self._sender, self._kind,
        )  # fmt: skip
        self._by_stream: dict[int, array[int]] = {}
        self._by_sender: dict[int, array[int]] = {}

    def __len__(self) -> int:
        return len(self._position) - self._start

    def __iter__(self) -> Iterator[FrameRef]:
        for row in range(self._start, len(self._position)):
            if self._kind[row] != FrameKind.PAD:
                yield self._ref(row)

    def add(
        self, position: int, body_bytes: int, chain: int, first: int, count: int, stream: int, sender: int, kind: int
    ) -> None:
        """A frame was appended. Hot: 0.7 µs."""
        greatest = self._greatest
        last = first + count - 1 if count else first
        if greatest and greatest[-1] > last:
            last = greatest[-1]
        if kind == FrameKind.RECORD:
            ordinal = self._base + len(greatest)
            try:
                self._by_stream[stream].append(ordinal)
            except KeyError:
                self._by_stream[stream] = array("Q", (ordinal,))
            try:
                self._by_sender[sender].append(ordinal)
            except KeyError:
                self._by_sender[sender] = array("Q", (ordinal,))
        self._position.append(position)
        self._body_bytes.append(body_bytes)
        self._chain.append(chain)
        greatest.append(last)
        self._first.append(first)
        self._count.append(count)
        self._stream.append(stream)
        self._sender.append(sender)
        self._kind.append(kind)

    def chain_at(self, position: int) -> int | None:
        """The chain carried by the frame that starts at ``position``; None when none does."""
        row = bisect_left(self._position, position, self._start)
        if row < len(self._position) and self._position[row] == position:
            return self._chain[row]
        return None

    def position_after(self, number: int) -> int | None:
        """Position of the first frame that holds or notes anything above ``number``; None when none does."""
        row = bisect_right(self._greatest, number, self._start)
        return self._position[row] if row < len(self._position) else None

    def of_stream(self, stream: int, number: int) -> Iterator[FrameRef]:
        """Records of ``stream`` that hold a number above ``number``, ascending."""
        return self._records(self._by_stream.get(stream), number)

    def of_sender(self, sender: int, number: int) -> Iterator[FrameRef]:
        """Records of ``sender`` that hold a number above ``number``, ascending."""
        return self._records(self._by_sender.get(sender), number)

    def last_note(self) -> int:
        """The greatest number noted; 0 for none. Looks at every frame: for the start only."""
        notes = (self._first[row] for row in range(self._start, len(self._kind)) if self._kind[row] == FrameKind.NOTE)
        return max(notes, default=0)

    def trim(self, position: int) -> None:
        """Give up the frames below ``position``."""
        self._start = bisect_left(self._position, position, self._start)
        if self._start > SHRINK_AT and 2 * self._start > len(self._position):
            self._shrink()

    def truncate(self, position: int) -> tuple[int, int]:
        """Drop the frames from ``position`` on; return (sequence numbers, body bytes) of the records dropped."""
        cut = bisect_left(self._position, position, self._start)
        rows = [row for row in range(cut, len(self._kind)) if self._kind[row] == FrameKind.RECORD]
        dropped = sum(self._count[row] for row in rows), sum(self._body_bytes[row] for row in rows)
        for column in self._columns:
            del column[cut:]
        for by in (self._by_stream, self._by_sender):
            for ordinals in by.values():
                del ordinals[bisect_left(ordinals, self._base + cut) :]
        return dropped

    def _shrink(self) -> None:
        gone = self._start
        for column in self._columns:
            del column[:gone]
        self._base += gone
        self._start = 0
        for by in (self._by_stream, self._by_sender):
            for key, ordinals in list(by.items()):
                del ordinals[: bisect_left(ordinals, self._base)]
                if not ordinals:
                    del by[key]

    def _records(self, ordinals: array[int] | None, number: int) -> Iterator[FrameRef]:
        if ordinals is None:
            return
        base = self._base
        last: Callable[[int], int] = lambda ordinal: self._first[ordinal - base] + self._count[ordinal - base] - 1  # noqa: E731
        low = bisect_left(ordinals, base + self._start)
        for at in range(bisect_right(ordinals, number, low, key=last), len(ordinals)):
            yield self._ref(ordinals[at] - base)

    def _ref(self, row: int) -> FrameRef:
        position = self._position[row]
        return FrameRef(
            position,
            RING_OFFSET + position % self._ring_bytes + FRAME_HEADER_BYTES,
            self._body_bytes[row],
            self._first[row],
            self._count[row],
            self._kind[row],
            self._stream[row],
            self._sender[row],
        )
