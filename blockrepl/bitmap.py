"""Dirty bitmaps: one bit per block of a volume. What is set may differ at the other end; what is clear is the same.

Pure: who owns one makes it durable (`storage.bitmap_file`), before the write that a bit covers reaches the disk
(PROTOCOL, rules 17 and 18; claims 6 and 16).
"""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_BYTES = 64 << 10
PAGE_BYTES = 4096 - 4  # bits of one durable page, which has a checksum beside them
PIECE_BYTES = 8 << 10  # of bits, in one message


class Bitmap:
    """Bits of the blocks of one volume. Bit i of byte k is block 8 k + i.

    Invariants: ``count`` is the number of bits set; ``changed`` names every page that was changed since somebody took
    it, in units of `PAGE_BYTES`.
    """

    __slots__ = ("bits", "block_bytes", "blocks", "changed", "count", "size_bytes")

    def __init__(self, size_bytes: int, block_bytes: int = BLOCK_BYTES, bits: bytes | bytearray | None = None) -> None:
        self.size_bytes = size_bytes
        self.block_bytes = block_bytes
        self.blocks = -(-size_bytes // block_bytes)
        self.bits = bytearray(-(-self.blocks // 8)) if bits is None else bytearray(bits)
        assert len(self.bits) == -(-self.blocks // 8)
        self._cut()
        self.count = int.from_bytes(self.bits, "little").bit_count()
        self.changed: set[int] = set()

    def _cut(self) -> None:
        """Bits beyond the last block are never set."""
        spare = len(self.bits) * 8 - self.blocks
        if spare and self.bits:
            self.bits[-1] &= 0xFF >> spare

    @property
    def dirty_bytes(self) -> int:
        """What is set, in bytes of whole blocks; the volume's last block may be short."""
        short = self.blocks * self.block_bytes - self.size_bytes
        last_set = self.blocks and self.bits[-1] >> ((self.blocks - 1) & 7) & 1
        return self.count * self.block_bytes - (short if last_set else 0)

    def mark(self, offset_bytes: int, length_bytes: int) -> bool:
        """Set the bits of every block that the range touches. True: some were clear."""
        if not length_bytes:
            return False
        first, last = offset_bytes // self.block_bytes, (offset_bytes + length_bytes - 1) // self.block_bytes
        bits, before = self.bits, self.count
        for block in range(first, last + 1):
            mask = 1 << (block & 7)
            if not bits[block >> 3] & mask:
                bits[block >> 3] |= mask
                self.count += 1
                self.changed.add((block >> 3) // PAGE_BYTES)
        return self.count != before

    def covers(self, offset_bytes: int, length_bytes: int) -> bool:
        """Whether every block that the range touches is set."""
        if not length_bytes:
            return True
        first, last = offset_bytes // self.block_bytes, (offset_bytes + length_bytes - 1) // self.block_bytes
        return all(self.bits[block >> 3] >> (block & 7) & 1 for block in range(first, last + 1))

    def merge(self, first_block: int, bits: bytes) -> bool:
        """Set what is set in ``bits``; ``first_block`` is a multiple of 8. True: some were clear. Raises ValueError."""
        start = first_block >> 3
        if first_block & 7 or start + len(bits) > len(self.bits):
            raise ValueError(f"bits of blocks {first_block} to {first_block + 8 * len(bits)} of {self.blocks}")
        ours = self.bits[start : start + len(bits)]
        merged = (int.from_bytes(ours, "little") | int.from_bytes(bits, "little")).to_bytes(len(bits), "little")
        if merged == ours:
            return False
        self.bits[start : start + len(bits)] = merged
        self._cut()
        self.count = int.from_bytes(self.bits, "little").bit_count()
        self.changed.update(range(start // PAGE_BYTES, (start + len(bits) - 1) // PAGE_BYTES + 1))
        return True

    def grow(self, size_bytes: int) -> None:
        """The volume is larger now; what is new is clear. In place: whoever holds this bitmap has the larger one."""
        assert size_bytes >= self.size_bytes
        self.size_bytes = size_bytes
        self.blocks = -(-size_bytes // self.block_bytes)
        self.bits.extend(bytes(-(-self.blocks // 8) - len(self.bits)))

    def fill(self) -> None:
        """Set every bit."""
        self.merge(0, b"\xff" * len(self.bits))

    def clear(self) -> None:
        """Clear every bit."""
        if self.count:
            self.changed.update(range(-(-len(self.bits) // PAGE_BYTES)))
            self.bits[:] = bytes(len(self.bits))
            self.count = 0

    def runs(self, from_block: int = 0, most: int = 1 << 30) -> Iterator[tuple[int, int]]:
        """Runs of set blocks from a block on, as (first block, number of blocks), none longer than ``most``."""
        bits, blocks = self.bits, self.blocks
        block = from_block
        while block < blocks:
            if not block & 7 and not bits[block >> 3]:
                block += 8
                continue
            if not bits[block >> 3] >> (block & 7) & 1:
                block += 1
                continue
            end = block + 1
            while end < blocks and end - block < most and bits[end >> 3] >> (end & 7) & 1:
                end += 1
            yield block, end - block
            block = end

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """What is set, as (first block, bits) for `merge`; pieces without a bit are left out."""
        for start in range(0, len(self.bits), PIECE_BYTES):
            piece = bytes(self.bits[start : start + PIECE_BYTES])
            if any(piece):
                yield start * 8, piece
