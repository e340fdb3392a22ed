"""How far a secondary is behind: in writes, bytes and seconds."""

from __future__ import annotations

from collections import deque

MAX_SAMPLES = 8192


class LagMeter:
    """Samples of one stream: (last number, writes so far, bytes so far, when).

    Invariant: samples ascend; all but the first are above what is applied.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[int, int, int, float]] = deque([(0, 0, 0, 0.0)])

    def sample(self, last: int, writes: int, size_bytes: int, now_s: float) -> None:
        """The stream's newest record is ``last``; totals of the stream since the start."""
        samples = self._samples
        if last > samples[-1][0]:
            samples.append((last, writes, size_bytes, now_s))
            if len(samples) > MAX_SAMPLES:
                del samples[1]

    def lag(self, applied: int, now_s: float) -> tuple[int, int, float]:
        """(writes, bytes, seconds) between ``applied`` and the newest sample."""
        samples = self._samples
        while len(samples) > 1 and samples[1][0] <= applied:
            samples.popleft()
        if len(samples) == 1:
            return 0, 0, 0.0
        base, newest = samples[0], samples[-1]
        return newest[1] - base[1], newest[2] - base[2], max(0.0, now_s - samples[1][3])
