"""What the intermediate's numbers give, over swaps of the sites: records, and contents that volumes began anew with."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from blockrepl.block import Op
from blockrepl.formats.record import RecordFlag, RecordHead, RecordKind, iterate_entries
from tests.sim.write import Write

SNAPSHOT_EVERY = 50


@dataclass(slots=True)
class Numbered:
    """A record of the history."""

    head: RecordHead
    record: bytes
    write: Write | None


class History:
    """One line of numbers.

    A volume's content at a number is what its source held when it took part in the newest resync begun below that
    number, and the hosts' writes since; copies add nothing to it. So a copy that brings something else is found.
    """

    def __init__(self, sizes: dict[int, int]) -> None:
        """``sizes``: volume → bytes."""
        self.records: list[Numbered] = []
        self._lasts: list[int] = []
        self._floor = 0  # a reform's number: what came before it has no successor
        self._bases: dict[int, list[tuple[int, bytes]]] = {v: [(0, bytes(size))] for v, size in sizes.items()}
        self._windows: list[list[int]] = []  # [START, END] of every resync
        self._snapshots: dict[tuple[int, int, int], bytes] = {}

    @property
    def numbered(self) -> int:
        """The highest number given."""
        return max(self._floor, self._lasts[-1] if self._lasts else 0)

    def add(self, each: Numbered) -> None:
        """The next one."""
        head = each.head
        if head.kind == RecordKind.START and (not self._windows or self._windows[-1][1] < 1 << 62):
            self._windows.append([head.first, 1 << 62])
        elif head.kind == RecordKind.END and self._windows:
            self._windows[-1][1] = head.last
        self.records.append(each)
        self._lasts.append(head.last)

    def count(self, number: int) -> int:
        """Of the records at or below a number."""
        return bisect_right(self._lasts, number)

    def cut(self, number: int) -> None:
        """What lies above was never durable, or is nobody's any more."""
        keep = self.count(number)
        if keep < len(self.records):
            del self.records[keep:], self._lasts[keep:]
            self._snapshots.clear()
        for window in self._windows:
            if number < window[1] < 1 << 62:
                window[1] = 1 << 62
        self._windows = [window for window in self._windows if window[0] <= number]

    def begin_anew(self, number: int) -> None:
        """The group was formed anew above a number."""
        self.cut(number)
        self._floor = max(self._floor, number)
        if self._windows and self._windows[-1][1] == 1 << 62:  # it will not end
            self._windows[-1][1] = number + 1

    def rebase(self, volume: int, number: int, content: bytes) -> None:
        """The source of a volume takes part in the resync that began at a number."""
        bases = self._bases[volume]
        if bases[-1][0] == number:
            bases.pop()
        bases.append((number, content))
        self._snapshots = {key: each for key, each in self._snapshots.items() if key[0] != volume}

    def base(self, volume: int) -> int:
        """Where its newest content begins."""
        return self._bases[volume][-1][0]

    def consistent_at(self, number: int) -> bool:
        """Whether secondaries at a number are at a prefix of their own."""
        return not any(start <= number < end for start, end in self._windows)

    def find(self, first: int) -> Numbered | None:
        """The record with this first number."""
        index = self.count(first - 1)
        found = index < len(self.records) and self.records[index].head.first == first
        return self.records[index] if found else None

    def writes_above(self, number: int) -> list[Write]:
        """Of hosts, the records above a number."""
        return [each.write for each in self.records[self.count(number) :] if each.write is not None]

    def image(self, volume: int, number: int) -> bytes:
        """What a volume holds at a number."""
        index = bisect_right([start for start, _ in self._bases[volume]], number) - 1
        begin, content = self._bases[volume][index]
        count = self.count(number)
        part = count // SNAPSHOT_EVERY
        known = self._snapshots.get((volume, index, part))
        if known is not None:
            image, at = bytearray(known), part * SNAPSHOT_EVERY
        else:
            image, at = bytearray(content), self.count(begin)
        for place in range(at, count):
            if place % SNAPSHOT_EVERY == 0:
                self._snapshots.setdefault((volume, index, place // SNAPSHOT_EVERY), bytes(image))
            self._apply(self.records[place], volume, image)
        return bytes(image)

    @staticmethod
    def _apply(each: Numbered, volume: int, image: bytearray) -> None:
        if each.head.kind != RecordKind.UPDATE or each.head.flags & RecordFlag.COPY:
            return
        for at, op, _, offset, length, payload in iterate_entries(each.head, memoryview(each.record)):
            if at == volume:
                image[offset : offset + length] = payload if op == Op.WRITE and payload else bytes(length)
