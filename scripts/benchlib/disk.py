"""What the disk itself can do: the limit of everything that is durable.

QD1 is one write and one fdatasync each; QD32 is the best that group commit could be: 32 writes and one fdatasync;
1 MiB QD8 is eight sequential MiB and one fdatasync. All on a file that is written and synced before.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.benchlib.fio import FileTarget, Sample
from scripts.benchlib.systems import Running
from scripts.benchlib.works import Work
from scripts.benchlib.workspace import Workspace


@contextmanager
def raw(directory: Workspace) -> Iterator[Running]:
    """The file that the bench itself writes."""
    image = directory.image("disk")
    yield Running(FileTarget(image), {}, (image,))


def measure(work: Work, path: Path, runtime_s: float, *, seed: int = 1) -> Sample:
    """Groups of ``work.depth`` writes and one fdatasync, for ``runtime_s``. Latency is that of a whole group."""
    generator = random.Random(seed)
    data = generator.randbytes(work.block_bytes)
    blocks = path.stat().st_size // work.block_bytes
    file = os.open(path, os.O_WRONLY)
    try:
        return _groups(work, file, data, blocks, generator, runtime_s)
    finally:
        os.close(file)


def _groups(work: Work, file: int, data: bytes, blocks: int, generator: random.Random, runtime_s: float) -> Sample:
    latencies_s: list[float] = []
    next_block = 0
    start_s = now_s = time.perf_counter()
    while now_s - start_s < runtime_s:
        for _ in range(work.depth):
            block = generator.randrange(blocks) if work.rw == "randwrite" else next_block % blocks
            next_block += 1
            os.pwrite(file, data, block * work.block_bytes)
        os.fdatasync(file)
        before_s, now_s = now_s, time.perf_counter()
        latencies_s.append(now_s - before_s)
    elapsed_s = now_s - start_s
    ops = len(latencies_s) * work.depth
    bytes_written = ops * work.block_bytes
    p50_s, p99_s = percentile(latencies_s, 50), percentile(latencies_s, 99)
    return Sample(ops, bytes_written, ops / elapsed_s, bytes_written / elapsed_s, p50_s * 1e6, p99_s * 1e6)


def percentile(values: list[float], percent: int) -> float:
    """The value that ``percent`` of the values do not exceed (interpolated); of a single value, that value."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
