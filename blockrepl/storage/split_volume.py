"""An S-VOL that is split from its group and written by hosts of its own: every write is in a bitmap first.

A bit is durable before the write that it covers reaches the image, else power may keep the block and lose the bit
(PROTOCOL, rule 17). Only the first write of a block waits for that.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable

from blockrepl.bitmap import Bitmap
from blockrepl.block import WriteBatch
from blockrepl.errors import BlockError, StorageError
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.image import ImageFile
from blockrepl.storage.plain import QUEUE_BYTES, FlushDone, PlainVolume

SaveBits = Callable[[Callable[[], None]], None]
"""Make the bits durable as they are now, then call. Raises StorageError."""


class SplitVolume(PlainVolume):
    """`PlainVolume` behind a bitmap; `withdraw` ends it.

    Invariant: a batch reaches the image only when the bits of all its ranges are durable, and batches in the order
    submitted. ``_queue`` holds those that wait for bits, or behind such.
    """

    def __init__(
        self, name: str, image: ImageFile, disk: DiskThread, bitmap: Bitmap, save_bits: SaveBits, *,
        writable: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(name, image, disk, writable=writable)
        self._bitmap = bitmap
        self._save_bits = save_bits
        self._queue: deque[tuple[WriteBatch, int]] = deque()  # (batch, the save that it waits for)
        self._queue_bytes = 0
        self._saves = 0  # asked for
        self._saved = 0  # durable; they end in order
        self._under_way = 0  # batches, flushes and reads that have not ended
        self._gone: BlockError | None = None
        self._withdrawn: Callable[[], None] | None = None

    # hosts

    def submit(self, batch: WriteBatch) -> bool:
        stopped = self._gone or self.failed
        if stopped is not None:
            batch.fail(stopped)
            batch.release()
            return True
        self._under_way += 1
        done = batch.done

        def ended(batch: WriteBatch) -> None:
            done(batch)
            self._ended()

        batch.done = ended
        if self._mark(batch) or self._queue:
            self._queue.append((batch, self._saves))
            self._queue_bytes += batch.size_bytes
            return False
        if super().submit(batch):
            batch.done = done
            self._ended()
            return True
        return False

    def _mark(self, batch: WriteBatch) -> bool:
        """Set the bits of a batch; True: some were clear, and are being made durable."""
        new = [self._bitmap.mark(offset, length) for offset, length in zip(batch.offsets, batch.lengths, strict=True)]
        if not any(new):
            return False
        self._saves += 1
        try:
            self._save_bits(self._bits_saved)
        except StorageError as error:
            self.stop(str(error))
        return True

    def _bits_saved(self) -> None:
        self._saved += 1
        self._go_on()

    def _go_on(self) -> None:
        while self._queue and (self._queue[0][1] <= self._saved or self.failed is not None):
            batch, _ = self._queue.popleft()
            self._queue_bytes -= batch.size_bytes
            if super().submit(batch):
                batch.done(batch)
        self._relieve()

    def stop(self, reason: str) -> None:
        """The bitmap cannot be written: nothing is, from now on."""
        if self.failed is None:
            self.failed = BlockError(errno.EIO, f"{self.name}: {reason}")
        self._loop.call_soon(self._go_on)

    def flush(self, done: FlushDone) -> None:
        if self._gone is not None:
            self._loop.call_soon(done, self._gone)
            return
        self._under_way += 1

        def flushed(error: BlockError | None) -> None:
            done(error)
            self._ended()

        super().flush(flushed)

    def read(self, offset_bytes: int, view: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        if self._gone is not None:
            raise self._gone
        self._under_way += 1

        def filled(error: BlockError | None) -> None:
            done(error)
            self._ended()

        try:
            at_once = super().read(offset_bytes, view, filled)
        except BlockError:
            self._ended()
            raise
        if at_once:
            self._ended()
        return at_once

    @property
    def congested(self) -> bool:
        return super().congested or self._queue_bytes > QUEUE_BYTES

    # the end

    def withdraw(self, done: Callable[[], None]) -> None:
        """Fail every later command; ``done`` when those that came before have ended, their writes in the image."""
        self._gone = BlockError(errno.EIO, f"{self.name} is not split any more")
        self._withdrawn = done
        self._loop.call_soon(self._ended, 0)

    def _ended(self, count: int = 1) -> None:
        self._under_way -= count
        if self._withdrawn is not None and not self._under_way:
            done, self._withdrawn = self._withdrawn, None
            done()
