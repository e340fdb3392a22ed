"""Images read from under the nodes: stamped blocks, and both ends side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.torturelib.stamps import BLOCK_BYTES, ZEROES, read_stamp

CHUNK_BYTES = 1 << 20


def stamps_of(path: Path, volume: int, blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(block, stamp) of these blocks of an image."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for block in blocks:
            yield block, read_stamp(volume, block, os.pread(fd, BLOCK_BYTES, block * BLOCK_BYTES))
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Compared:
    """Two images. Only blocks that hold something prove anything."""

    nonzero_blocks: int
    differing: tuple[int, ...]  # blocks


def differing_blocks(one: Path, other: Path) -> tuple[int, ...]:
    """Blocks whose content is not the same."""
    return compare(one, other).differing


def compare(one: Path, other: Path) -> Compared:
    """Every block that is data in either."""
    first, second = (os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in (one, other))
    nonzero, differing = 0, []
    try:
        for start in sorted(_data_chunks(first) | _data_chunks(second)):
            a, b = (os.pread(fd, CHUNK_BYTES, start) for fd in (first, second))
            for at in range(0, max(len(a), len(b)), BLOCK_BYTES):
                block_a, block_b = a[at : at + BLOCK_BYTES], b[at : at + BLOCK_BYTES]
                nonzero += block_a != ZEROES
                if block_a != block_b:
                    differing.append((start + at) // BLOCK_BYTES)
    finally:
        os.close(first)
        os.close(second)
    return Compared(nonzero, tuple(differing))


def _data_chunks(fd: int) -> set[int]:
    """Where chunks begin that are not all hole."""
    chunks: set[int] = set()
    at, end = 0, os.fstat(fd).st_size
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = os.lseek(fd, data, os.SEEK_HOLE)
        chunks.update(range(data // CHUNK_BYTES * CHUNK_BYTES, at, CHUNK_BYTES))
    return chunks
