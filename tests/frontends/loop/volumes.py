"""A volume over a plain file, and ways to make it misbehave."""

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

from blockrepl.block import Op, Volume, WriteBatch
from blockrepl.errors import BlockError


class FileVolume(Volume):
    """Stores at once, in the page cache of a file; counts what it is asked."""

    def __init__(self, path: Path, size_bytes: int, block_size_bytes: int = 4096, *, writable: bool = True) -> None:
        self.name = path.name
        self.size_bytes = size_bytes
        self.block_size_bytes = block_size_bytes
        self.writable = writable
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.fd, size_bytes)
        self.trimmed: list[tuple[int, int]] = []
        self.zeroed: list[tuple[int, int]] = []
        self.flushes = 0
        self.failing: BlockError | None = None
        self.holding = False
        self.held: list[Callable[[], None]] = []
        self.jam = False
        self.resumes: list[Callable[[], None]] = []
        self.batch_lengths: list[int] = []
        self.waiting = asyncio.Event()  # a batch is held, or the front end waits for relief
        self.busy = asyncio.Event()  # a hundred batches were stored

    def submit(self, batch: WriteBatch) -> bool:
        if self.holding:
            self.held.append(lambda: self._late(batch))
            self.waiting.set()
            return False
        self._store(batch)
        return True

    def _late(self, batch: WriteBatch) -> None:
        self._store(batch)
        batch.done(batch)

    def _store(self, batch: WriteBatch) -> None:
        self.batch_lengths.append(len(batch))
        if len(self.batch_lengths) == 100:
            self.busy.set()
        if self.failing is not None:
            batch.fail(self.failing)
        else:
            for op, offset, length, payload in zip(
                batch.ops, batch.offsets, batch.lengths, batch.payloads, strict=True
            ):
                if payload is not None:
                    assert os.pwrite(self.fd, payload, offset) == length
                else:
                    (self.trimmed if op == Op.TRIM else self.zeroed).append((offset, length))
                    self._zero(offset, length)
        batch.release()

    def _zero(self, offset: int, length: int) -> None:
        step = 1 << 20
        for start in range(offset, offset + length, step):
            os.pwrite(self.fd, bytes(min(step, offset + length - start)), start)

    def read(self, offset_bytes: int, view: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        if self.failing is not None:
            raise self.failing
        assert os.preadv(self.fd, [view], offset_bytes) == len(view)
        return True

    def flush(self, done: Callable[[BlockError | None], None]) -> None:
        self.flushes += 1
        done(self.failing)

    @property
    def congested(self) -> bool:
        return self.jam

    def when_relieved(self, resume: Callable[[], None]) -> None:
        self.resumes.append(resume)
        self.waiting.set()

    def relieve(self) -> None:
        self.jam = False
        resumes, self.resumes = self.resumes, []
        for resume in resumes:
            resume()

    def release_held(self) -> None:
        self.holding = False
        held, self.held = self.held, []
        for store in held:
            store()

    def close(self) -> None:
        os.close(self.fd)


NO_SPACE = BlockError(errno.ENOSPC)
