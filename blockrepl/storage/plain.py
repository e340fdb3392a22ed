"""A volume that is an image and nothing more: SMPL, and an S-VOL after a takeover.

What a failure means (PROTOCOL, rule 11): a write that fails is reported and changes nothing else, since no flush
promises bytes of a write that failed. A *sync* that fails stops the volume for good: the kernel may have dropped the
pages that it could not write, so a later sync that succeeds proves nothing, and a later read may show older bytes.
From then on every command fails with EIO; only opening the image anew, after the disk was seen to, ends that.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable
from functools import partial

from blockrepl.block import Op, Volume, WriteBatch
from blockrepl.errors import BlockError
from blockrepl.storage.cold import ColdReads
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.image import ImageFile, block_error

LONG_ZERO_BYTES = 4 << 20  # zeroing more than this may block for milliseconds: it goes to the disk thread
QUEUE_BYTES = 64 << 20  # payload that waits behind a long zero before hosts are held back

FlushDone = Callable[[BlockError | None], None]


class PlainVolume(Volume):
    """`Volume` over an image. Needs the running loop; the image and the disk thread belong to the caller.

    Invariant: while a long zero runs in the disk thread, ``_waiting`` holds every batch that came after it, so
    overlapping batches are stored in the order submitted.
    """

    def __init__(self, name: str, image: ImageFile, disk: DiskThread, *, writable: bool = True) -> None:
        assert not (writable and image.read_only)
        self.name = name
        self.size_bytes = image.size_bytes
        self.block_size_bytes = image.identity.block_size_bytes
        self.writable = writable
        self.failed: BlockError | None = None  # set for good by a sync that failed
        self._image = image
        self._disk = disk
        self._loop = asyncio.get_running_loop()
        self._cold = ColdReads(self._loop)
        self._busy = False  # a long zero is in the disk thread
        self._waiting: deque[WriteBatch] = deque()
        self._waiting_bytes = 0
        self._resume: list[Callable[[], None]] = []

    # write

    def submit(self, batch: WriteBatch) -> bool:
        if self._busy:
            self._waiting.append(batch)
            self._waiting_bytes += batch.size_bytes
            return False
        if self.failed is None and self._needs_thread(batch):
            self._store_in_thread(batch)
            return False
        return self._store(batch)

    def _needs_thread(self, batch: WriteBatch) -> bool:
        if batch.size_bytes == sum(batch.lengths):
            return Op.METADATA in batch.ops  # syncs
        return any(
            payload is None and length > LONG_ZERO_BYTES
            for payload, length in zip(batch.payloads, batch.lengths, strict=True)
        )

    def _store(self, batch: WriteBatch) -> bool:
        assert self.writable
        if self.failed is not None:
            batch.fail(self.failed)
            batch.release()
            return True
        self._image.store(batch)
        batch.release()
        if batch.fua:
            self._disk.sync(self._image.fd, partial(self._fua_synced, batch))
            return False
        return True

    def _fua_synced(self, batch: WriteBatch, error: OSError | None) -> None:
        failed = self._synced(error)
        if failed is not None:
            batch.fail(failed)
        batch.done(batch)

    def _store_in_thread(self, batch: WriteBatch) -> None:
        self._busy = True
        self._disk.call(partial(self._image.store, batch), partial(self._stored_in_thread, batch))

    def _stored_in_thread(self, batch: WriteBatch, error: OSError | None) -> None:
        assert error is None  # store keeps errors per command
        batch.release()
        self._busy = False
        if batch.fua:
            self._disk.sync(self._image.fd, partial(self._fua_synced, batch))
        else:
            batch.done(batch)
        waiting = self._waiting
        while waiting and not self._busy:
            following = waiting.popleft()
            self._waiting_bytes -= following.size_bytes
            if self._needs_thread(following):
                self._store_in_thread(following)
            elif self._store(following):
                following.done(following)
        self._relieve()

    def _relieve(self) -> None:
        if not self.congested:
            resume, self._resume = self._resume, []
            for call in resume:
                call()

    def flush(self, done: FlushDone) -> None:
        if self.failed is not None:
            self._loop.call_soon(done, self.failed)
        else:
            self._disk.sync(self._image.fd, partial(self._flushed, done))

    def _flushed(self, done: FlushDone, error: OSError | None) -> None:
        done(self._synced(error))

    def _synced(self, error: OSError | None) -> BlockError | None:
        """What a sync means for those who waited; also for one that was queued behind a sync that failed."""
        if error is not None and self.failed is None:
            self.failed = BlockError(errno.EIO, f"{self._image.path}: sync failed, volume stopped: {error}")
        return self.failed

    # read

    def read(self, offset_bytes: int, view: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        if self.failed is not None:
            raise self.failed
        try:
            if self._image.read_cached(offset_bytes, view):
                return True
        except OSError as error:
            raise block_error(error) from error
        self._cold.read(self._image.fd, offset_bytes, view, done)
        return False

    # flow

    @property
    def congested(self) -> bool:
        return self._waiting_bytes > QUEUE_BYTES

    def when_relieved(self, resume: Callable[[], None]) -> None:
        self._resume.append(resume)

    def metadata(self) -> bytes:
        return self._image.metadata()

    def allocation(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int, bool]] | None:
        try:
            return self._image.allocation(offset_bytes, length_bytes)
        except OSError:
            return None
