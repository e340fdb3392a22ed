"""A disk that loses power: what was not synced survives in any subset of its sectors."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from blockrepl.block import Buffer


class SimDisk:
    """Bytes as the processes see them (page cache), and as the platter has them."""

    def __init__(self, size_bytes: int) -> None:
        self.cache = bytearray(size_bytes)
        self.platter = bytearray(size_bytes)
        self.pending: list[tuple[int, bytes]] = []

    def write(self, offset: int, buffers: Iterable[Buffer]) -> None:
        data = b"".join(buffers)
        assert offset >= 0
        assert offset + len(data) <= len(self.cache)
        self.cache[offset : offset + len(data)] = data
        self.pending.append((offset, data))

    def sync(self) -> None:
        for offset, data in self.pending:
            self.platter[offset : offset + len(data)] = data
        self.pending.clear()

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= len(self.cache)
        return bytes(self.cache[offset : offset + length])

    def power_cut(self, random: Random, unit_bytes: int) -> None:
        """Each unit of each write since the last sync reached the platter or did not."""
        style = random.choice(["any", "whole writes", "nothing", "everything"])
        for offset, data in self.pending:
            whole = random.random() < 0.5
            for start in range(0, len(data), unit_bytes):
                kept = {
                    "any": random.random() < 0.5,
                    "whole writes": whole,
                    "nothing": False,
                    "everything": True,
                }[style]
                if kept:
                    piece = data[start : start + unit_bytes]
                    self.platter[offset + start : offset + start + len(piece)] = piece
        self.pending.clear()
        self.cache[:] = self.platter
