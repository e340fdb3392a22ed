"""What hosts wrote, when it was acknowledged, and what an image of all volumes tells about it.

Every write takes one stamp from a single counter when it is submitted and one when it is acknowledged. So an image is
a prefix exactly if there is an instant t such that every write whose content is there was submitted before t, and no
write that is missing was acknowledged before t. Writes to one block never overlap in flight, and a block whose last
write has an unknown fate is left alone: the versions of a block have one order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from scripts.torturelib.stamps import FOREIGN

Content = Mapping[int, Iterable[tuple[int, int]]]
"""Volume to (block, stamp found there), blocks that were ever written."""


@dataclass(slots=True)
class Write:
    """``count`` blocks of ``volume`` from ``first`` on; ``zero``: they became zeroes."""

    number: int
    volume: int
    first: int
    count: int
    zero: bool
    submitted: int
    acknowledged: float = math.inf

    def __str__(self) -> str:
        what = "zeroes" if self.zero else "write"
        return f"{what} {self.number} to blocks {self.first}+{self.count} of volume {self.volume}"


@dataclass(slots=True)
class Verdict:
    """What an image held."""

    writes: int = 0  # submitted since the last known state
    acknowledged: int = 0
    lost: list[Write] = field(default_factory=list)  # acknowledged and missing
    problems: list[str] = field(default_factory=list)  # whatever makes it no prefix
    stamped_blocks: int = 0  # that held a write's own content: zeroes equal to zeroes prove nothing


class History:
    """Safe to call from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clock = 0
        self._number = 0
        self._writes: dict[int, Write] = {}
        self._base: dict[tuple[int, int], int] = {}  # block to the stamp it had at the last known state
        self._versions: dict[tuple[int, int], list[Write]] = {}  # block to its writes since

    def submit(self, volume: int, first: int, count: int, *, zero: bool) -> Write:
        """Just before it is sent."""
        with self._lock:
            self._clock += 1
            self._number += 1
            write = Write(self._number, volume, first, count, zero, self._clock)
            self._writes[write.number] = write
            for block in range(first, first + count):
                self._versions.setdefault((volume, block), []).append(write)
            return write

    def acknowledge(self, write: Write) -> None:
        """Just after the answer came."""
        with self._lock:
            self._clock += 1
            write.acknowledged = self._clock

    @property
    def acknowledged(self) -> int:
        """So many writes since the last known state."""
        with self._lock:
            return sum(1 for write in self._writes.values() if write.acknowledged < math.inf)

    def unsure(self) -> set[tuple[int, int]]:
        """Blocks whose last write has an unknown fate."""
        with self._lock:
            return {block for block, writes in self._versions.items() if writes[-1].acknowledged == math.inf}

    def expected(self, volume: int, block: int) -> int | None:
        """The stamp that a read must find; None while that is not known."""
        with self._lock:
            writes = self._versions.get((volume, block))
            if not writes:
                return self._base.get((volume, block), 0)
            last = writes[-1]
            return None if last.acknowledged == math.inf else 0 if last.zero else last.number

    def written(self) -> dict[int, list[int]]:
        """Volume to the blocks that were ever written, ascending."""
        blocks: dict[int, list[int]] = {}
        with self._lock:
            for volume, block in sorted({*self._base, *self._versions}):
                blocks.setdefault(volume, []).append(block)
        return blocks

    def recent(self) -> set[tuple[int, int]]:
        """(volume, block) written since the last known state."""
        with self._lock:
            return set(self._versions)

    def judge(self, content: Content) -> Verdict:
        """``content`` covers all of `written`. Nobody writes meanwhile."""
        verdict = Verdict(len(self._writes), self.acknowledged)
        found: dict[tuple[int, int], int] = {}  # place in the versions of the block, 0: the base; the latest possible
        spans: list[tuple[float, float, tuple[int, int], int]] = []
        loose: list[list[tuple[float, float]]] = []
        for volume, pairs in content.items():
            for block, stamp in pairs:
                where = volume, block
                verdict.stamped_blocks += stamp > 0
                places = self._places(where, stamp)
                if not places:
                    verdict.problems.append(self._foreign(where, stamp))
                    continue
                found[where] = places[-1]
                each = [(*self._span(where, place), where, place) for place in places]
                if len(each) == 1:
                    spans.append(each[0])
                else:
                    loose.append([(low, high) for low, high, *_ in each])
        if not verdict.problems:
            verdict.problems += self._order(spans, loose)
            verdict.problems += self._torn(found)
        verdict.lost = self._lost(found)
        return verdict

    def rebase(self, content: Content) -> None:
        """This is how it is now; all that was written before is over."""
        self._base = {(volume, block): stamp for volume, pairs in content.items() for block, stamp in pairs}
        self._versions.clear()
        self._writes.clear()

    def _places(self, where: tuple[int, int], stamp: int) -> list[int]:
        places = [0] if self._base.get(where, 0) == stamp else []
        for place, write in enumerate(self._versions.get(where, ()), 1):
            if (0 if write.zero else write.number) == stamp:
                places.append(place)
        return places

    def _span(self, where: tuple[int, int], place: int) -> tuple[float, float]:
        """The instants at which this version could be the newest."""
        writes = self._versions.get(where, [])
        low = writes[place - 1].submitted if place else 0
        return low, min((write.acknowledged for write in writes[place:]), default=math.inf)

    def _order(
        self, spans: list[tuple[float, float, tuple[int, int], int]], loose: list[list[tuple[float, float]]]
    ) -> list[str]:
        if not spans:
            return []
        latest = max(spans, key=lambda span: span[0])
        first_missing = min(spans, key=lambda span: span[1])
        if latest[0] > first_missing[1]:
            there = self._versions[latest[2]][latest[3] - 1]
            missing = min(self._versions[first_missing[2]][first_missing[3] :], key=lambda write: write.acknowledged)
            return [f"order: {there} is there, but not {missing}, which was acknowledged before that was submitted"]
        allowed = [(latest[0], first_missing[1])]
        for options in loose:
            allowed = [
                (max(low, each[0]), min(high, each[1]))
                for low, high in allowed
                for each in options
                if max(low, each[0]) <= min(high, each[1])
            ]
            if not allowed:
                return ["order: zeroed blocks fit no instant at which all the others could have been as they are"]
        return []

    def _torn(self, found: dict[tuple[int, int], int]) -> list[str]:
        problems = []
        for where, place in found.items():
            if not place:
                continue
            write = self._versions[where][place - 1]
            if write.zero or write.count == 1:
                continue
            for block in range(write.first, write.first + write.count):
                other = write.volume, block
                if other in found and found[other] < self._versions[other].index(write) + 1:
                    problems.append(f"torn: {write}: block {where[1]} is there, block {block} is not")
        return problems

    def _lost(self, found: dict[tuple[int, int], int]) -> list[Write]:
        lost = {}
        for where, place in found.items():
            for write in self._versions.get(where, [])[place:]:
                if write.acknowledged < math.inf:
                    lost[write.number] = write
        return [lost[number] for number in sorted(lost)]

    def _foreign(self, where: tuple[int, int], stamp: int) -> str:
        volume, block = where
        versions = [self._base.get(where, 0), *(0 if w.zero else w.number for w in self._versions.get(where, []))]
        what = "no whole block" if stamp == FOREIGN else "zeroes" if stamp == 0 else f"write {stamp}"
        return f"block {block} of volume {volume} holds {what}, and not one of {versions[-8:]}"
