"""Records that a writer puts on two volumes in turn, and what an image of both tells about order.

The writer makes record i durable on volume A, then record i on volume B, then record i + 1 on A. So whatever a disaster
leaves must be a beginning of A1 B1 A2 B2 …: whoever holds a later record while an earlier one is missing, on
either volume, saw the writes out of order. What was acknowledged and is missing is lost.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crc32c import crc32c

RECORD_BYTES = 4096
_HEAD = struct.Struct(">8s16sQI")  # magic, run, index (from 1), CRC32C of what precedes and of the body
_MAGIC = b"brdemo01"
_LEDGER = struct.Struct("<QQ")


def build(run: bytes, index: int) -> bytes:
    """Record ``index`` of a run (16 bytes that tell one run's records from those of another)."""
    body = struct.pack(">Q", index) * ((RECORD_BYTES - _HEAD.size) // 8)
    body += bytes(RECORD_BYTES - _HEAD.size - len(body))
    crc = crc32c(body, crc32c(_MAGIC + run + struct.pack(">Q", index)))
    return _HEAD.pack(_MAGIC, run, index, crc) + body


def found(run: bytes, pieces: Iterable[bytes]) -> set[int]:
    """Indices of the records that are there; ``pieces`` are the blocks of a file or volume, from the first."""
    return {index for index, piece in enumerate(pieces, 1) if piece == build(run, index)}


def blocks(path: Path) -> Iterator[bytes]:
    """The records' places in a file."""
    with path.open("rb") as file:
        while piece := file.read(RECORD_BYTES):
            yield piece


@dataclass(frozen=True)
class Verdict:
    """What two volumes hold, against what was acknowledged."""

    records_a: int
    records_b: int
    acked_a: int
    acked_b: int
    acked_writes_lost: int
    order_violations: int
    ahead: tuple[int, ...]  # records that B has and A lacks, the first few

    @property
    def acked(self) -> int:
        """Writes that were acknowledged, on both volumes."""
        return self.acked_a + self.acked_b


def judge(on_a: set[int], on_b: set[int], acked_a: int, acked_b: int) -> Verdict:
    """Compare; ``acked_a`` and ``acked_b`` are the last records acknowledged on each volume."""
    lost = len(set(range(1, acked_a + 1)) - on_a) + len(set(range(1, acked_b + 1)) - on_b)
    ahead = sorted(on_b - on_a)
    return Verdict(
        len(on_a), len(on_b), acked_a, acked_b, lost, _beyond_first_gap(on_a, on_b), tuple(ahead[:5])
    )  # fmt: skip


def _beyond_first_gap(on_a: set[int], on_b: set[int]) -> int:
    """Writes that are there although one before them, in the writer's order, is missing."""
    index = 1
    while index in on_a and index in on_b:
        index += 1
    count_a = sum(1 for each in on_a if each > index)
    count_b = sum(1 for each in on_b if each > index)
    if index in on_a:  # record index is missing on B only: A's is the last of the prefix
        return count_a + count_b
    return count_a + count_b + (1 if index in on_b else 0)


class Ledger:
    """The last record acknowledged on each volume: two numbers in a file, mapped, so that they outlive the writer."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        if fresh:
            path.write_bytes(_LEDGER.pack(0, 0))
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, _LEDGER.size)
        finally:
            os.close(fd)

    def note(self, volume: int, index: int) -> None:
        """``volume``: 0 for A, 1 for B."""
        struct.pack_into("<Q", self._map, volume * 8, index)

    def read(self) -> Sequence[int]:
        """(last of A, last of B)."""
        return _LEDGER.unpack_from(self._map)

    def close(self) -> None:
        """Give back the mapping."""
        self._map.close()
