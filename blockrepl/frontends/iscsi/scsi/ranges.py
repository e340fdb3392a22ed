"""Which writes may go on: read-modify-write commands have their range to themselves.

Plain writes that overlap are stored in the order submitted (`Volume.submit`), so they need no waiting. A command that
reads what it is going to write must see every earlier write of its range, and no later one may come between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

Span = tuple[int, int]
"""Half-open, in bytes."""


def overlap(first: Sequence[Span], second: Iterable[Span]) -> bool:
    """Whether any span of the one touches any of the other."""
    return any(a < d and c < b for c, d in second for a, b in first)


class Claim:
    """Spans that a command works on. ``exclusive`` ones are to be read and then written."""

    __slots__ = ("exclusive", "go", "spans")

    def __init__(self, spans: Sequence[Span], exclusive: bool, go: Callable[[], None]) -> None:
        self.spans = spans
        self.exclusive = exclusive
        self.go = go


class Ranges:
    """Claims of one logical unit, in the order of their coming.

    Invariant: no granted exclusive claim overlaps another granted claim.
    """

    def __init__(self) -> None:
        self.granted: dict[Claim, None] = {}
        self.waiting: deque[Claim] = deque()
        self.exclusive = 0  # granted and waiting ones; while it is 0 plain writes need not ask

    def claim(self, claim: Claim) -> None:
        """Call ``claim.go`` as soon as nothing earlier stands in its way: perhaps at once."""
        if claim.exclusive:
            self.exclusive += 1
        if self._free(claim, self.waiting):
            self.granted[claim] = None
            claim.go()
        else:
            self.waiting.append(claim)

    def _free(self, claim: Claim, earlier: Iterable[Claim]) -> bool:
        for other in (*self.granted, *earlier):
            if (claim.exclusive or other.exclusive) and overlap(claim.spans, other.spans):
                return False
        return True

    def release(self, claim: Claim) -> None:
        """The command is done; those that waited for it go on."""
        del self.granted[claim]
        if claim.exclusive:
            self.exclusive -= 1
        if not self.waiting:
            return
        still: deque[Claim] = deque()
        freed = []
        for waiting in self.waiting:
            if self._free(waiting, still):
                self.granted[waiting] = None
                freed.append(waiting)
            else:
                still.append(waiting)
        self.waiting = still
        for waiting in freed:
            waiting.go()
