"""A volume in memory whose completions come when the test says so, in any order."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from blockrepl.block import Op, Volume, WriteBatch
from blockrepl.errors import BlockError


class MemoryVolume(Volume):
    """Stores at once, completes at once or at the next `complete`, as ``random`` has it."""

    def __init__(self, name: str, size_bytes: int, block_size_bytes: int, random: Random) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.block_size_bytes = block_size_bytes
        self.writable = True
        self.content = bytearray(size_bytes)
        self.random = random
        self._metadata = b""
        self._later: list[Callable[[], None]] = []

    def submit(self, batch: WriteBatch) -> bool:
        columns = zip(batch.ops, batch.offsets, batch.lengths, batch.payloads, strict=True)
        for op, offset, length, payload in columns:
            assert 0 <= offset <= offset + length <= self.size_bytes, "a command beyond the end reached the volume"
            if op == Op.WRITE:
                assert payload is not None
                assert len(payload) == length
                self.content[offset : offset + length] = payload
            elif op in (Op.ZERO, Op.TRIM):
                self.content[offset : offset + length] = bytes(length)
            else:
                assert payload is not None
                self._metadata = bytes(payload)
        batch.release()
        return self._perhaps_later(lambda: batch.done(batch))

    def read(self, offset_bytes: int, view: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        assert 0 <= offset_bytes <= offset_bytes + len(view) <= self.size_bytes
        view[:] = self.content[offset_bytes : offset_bytes + len(view)]
        return self._perhaps_later(lambda: done(None))

    def flush(self, done: Callable[[BlockError | None], None]) -> None:
        self._later.append(lambda: done(None))

    @property
    def congested(self) -> bool:
        return False

    def when_relieved(self, resume: Callable[[], None]) -> None:
        raise AssertionError("never congested")

    def metadata(self) -> bytes:
        return self._metadata

    def complete(self) -> bool:
        """Complete what is due; False when there was nothing."""
        due, self._later = self._later, []
        self.random.shuffle(due)
        for each in due:
            each()
        return bool(due)

    def _perhaps_later(self, done: Callable[[], None]) -> bool:
        if self.random.random() < 0.7:
            return True
        self._later.append(done)
        return False
