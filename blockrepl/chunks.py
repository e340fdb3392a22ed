"""Receive buffers, counted by hand.

A chunk belongs to everything that still looks into it: the stream that fills it, each batch whose payload lies in
it, the journal that writes it, the link that sends it on. Whoever keeps a view calls `hold`, and `release` when
done; the last release gives the chunk back to its pool. Forgetting a release costs memory only (the garbage
collector frees the chunk); releasing twice is our own mistake and asserts.

A stream owns a chunk only while it holds an incomplete message. Otherwise all streams of a pool receive into the one
current chunk, one after the other, so a thousand connections that are idle, or that have one small write in flight
each, do not hold a thousand chunks; and the memory stays warm in the cache.
"""

from __future__ import annotations

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Protocol

CHUNK_BYTES = 1 << 18
LAZY_BYTES = 1 << 19  # from here on memory comes when bytes do: announcing 32 MiB costs nothing, zeroing them 30 ms
ROOM_BYTES = 1 << 16  # less room than this, and the current chunk is replaced


class Releasable(Protocol):
    """What a user holds: a chunk, or several at once."""

    def release(self) -> None:
        """One user less."""


class Chunk:
    """A fixed buffer with a count of its users.

    Invariant: users >= 0; the pool may hand it out again only at 0.
    """

    __slots__ = ("buffer", "pool", "users", "view")

    def __init__(self, size_bytes: int, pool: ChunkPool | None) -> None:
        self.buffer: bytearray | mmap
        if size_bytes < LAZY_BYTES:
            self.buffer = bytearray(size_bytes)
        else:
            self.buffer = mmap(-1, size_bytes, MAP_PRIVATE | MAP_ANONYMOUS)
        self.view = memoryview(self.buffer)
        self.users = 1
        self.pool = pool

    def hold(self, count: int = 1) -> None:
        """Count ``count`` more users."""
        self.users += count

    def release(self) -> None:
        """One user less; the last one returns the chunk to its pool."""
        self.users -= 1
        if self.users <= 0:
            assert self.users == 0, "chunk released twice"
            if self.pool is not None:
                self.pool.give_back(self)


class ChunkPool:
    """Chunks of one usual size, kept for reuse; larger ones are made on demand and kept while room lasts."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES, keep_bytes: int = 32 << 20) -> None:
        self.chunk_bytes = chunk_bytes
        self._free: list[Chunk] = []
        self._large: list[Chunk] = []
        self._kept_bytes = 0
        self._keep_bytes = keep_bytes
        self._current: Chunk | None = None
        self._filled = 0  # bytes of the current chunk that someone may still look into

    def take(self, min_bytes: int = 0) -> Chunk:
        """A chunk of at least ``min_bytes``, with one user: the caller. Its content is whatever it held before."""
        if min_bytes <= self.chunk_bytes:
            if self._free:
                chunk = self._free.pop()
                self._kept_bytes -= self.chunk_bytes
                chunk.users = 1
                return chunk
            return Chunk(self.chunk_bytes, self)
        large = self._large
        for index in range(len(large) - 1, -1, -1):
            if len(large[index].buffer) >= min_bytes:
                chunk = large.pop(index)
                self._kept_bytes -= len(chunk.buffer)
                chunk.users = 1
                return chunk
        return Chunk(min_bytes, self)

    def borrow(self) -> tuple[Chunk, int]:
        """The current chunk and where it is free. Ends with `put` or `part_with`, before any other borrow."""
        chunk = self._current
        if chunk is not None:
            if chunk.users == 1:
                self._filled = 0
            elif len(chunk.buffer) - self._filled < ROOM_BYTES:
                chunk.release()
                chunk = None
        if chunk is None:
            chunk = self._current = self.take()
            self._filled = 0
        return chunk, self._filled

    def put(self, chunk: Chunk, filled: int) -> None:
        """End a borrow: bytes up to ``filled`` may be in use."""
        assert chunk is self._current
        self._filled = filled

    def part_with(self, chunk: Chunk) -> None:
        """End a borrow: the borrower keeps the chunk, with the pool's use of it."""
        assert chunk is self._current
        self._current = None

    def adopt(self, chunk: Chunk, filled: int) -> None:
        """A stream gives up the chunk it owned; it becomes the current one if there is none and it is of usual size."""
        if self._current is None and len(chunk.buffer) == self.chunk_bytes:
            self._current = chunk
            self._filled = filled
        else:
            chunk.release()

    def give_back(self, chunk: Chunk) -> None:
        """Called by the last `Chunk.release`."""
        size = len(chunk.buffer)
        if self._kept_bytes + size > self._keep_bytes:
            return
        self._kept_bytes += size
        (self._free if size == self.chunk_bytes else self._large).append(chunk)
