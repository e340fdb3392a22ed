"""Serves one FUSE connection on the event loop: requests are read as batches, volumes take them, replies go out.

Why all of it is on the thread of the loop: a thread that reads hands over once per batch, and on two cores that cost
more than the reading: 20 µs of CPU per 4 KiB write instead of 12, and no more throughput, also where the thread
only read ahead of writes of 1 MiB. Neither smaller requests (128 to 512 KiB) nor smaller batches were better either.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable

from blockrepl.block import Volume, WriteBatch
from blockrepl.chunks import Chunk, ChunkPool
from blockrepl.errors import BlockError, ProtocolError
from blockrepl.formats import fuse
from blockrepl.frontends.loop import protocol
from blockrepl.frontends.loop.protocol import MAX_IO_BYTES, PAGE_BYTES, Geometry, ReadRequest, Session

CHUNK_BYTES = 2 * MAX_IO_BYTES
BATCH_REQUESTS = 64  # then other users of the loop get their turn
KEEP_BYTES = 32 << 20
HUGE_PAGE_BYTES = 2 << 20


class _PagePool(ChunkPool):
    """Chunks that begin at a page: the kernel fills a payload page by page, and one that straddles pages costs it twice
    the work. Those of whole huge pages lie in such (that took 4 % of CPU off a write of 1 MiB).
    """

    def __init__(self, chunk_bytes: int) -> None:
        super().__init__(chunk_bytes, KEEP_BYTES)

    def take(self, min_bytes: int = 0) -> Chunk:
        assert min_bytes == 0
        if self._free:
            return super().take()
        chunk = Chunk(0, self)
        chunk.view = _pages(self.chunk_bytes)
        return chunk

    def give_back(self, chunk: Chunk) -> None:
        if self._kept_bytes < self._keep_bytes:
            self._kept_bytes += self.chunk_bytes
            self._free.append(chunk)


def _pages(size: int) -> memoryview:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if size % HUGE_PAGE_BYTES:
        return memoryview(mmap.mmap(-1, size, flags=flags))
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=flags)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE_BYTES
    return memoryview(memory)[start : start + size]


class Memory:
    """Memory for payloads, shared by all connections of a front end.

    A request is read straight to where it stays: its header into ``head``, its payload to the next page of the
    current chunk.
    """

    def __init__(self) -> None:
        self.head = memoryview(bytearray(fuse.IO_HEADER_BYTES))
        self._chunks = _PagePool(CHUNK_BYTES)
        self._answers = _PagePool(MAX_IO_BYTES)
        self._chunk: Chunk | None = None
        self._filled = 0

    def room(self) -> tuple[Chunk, int]:
        """The current chunk, and the first byte in it that nobody looks into."""
        chunk = self._chunk
        if chunk is not None:
            if chunk.users == 1:
                self._filled = 0
            elif CHUNK_BYTES - self._filled < MAX_IO_BYTES:
                chunk.release()
                chunk = None
        if chunk is None:
            chunk = self._chunk = self._chunks.take()
            self._filled = 0
        return chunk, self._filled

    def filled(self, end: int) -> None:
        """Bytes of the current chunk before ``end`` may be in use."""
        self._filled = end

    def take_answer(self) -> Chunk:
        """Room for the answer to a READ."""
        return self._answers.take()


class FuseServer:
    """One connection, from mount to the end. All methods run on the event loop."""

    def __init__(
        self, fd: int, volume: Volume, memory: Memory, *, read_only: bool, lost: Callable[[Exception], None]
    ) -> None:
        """Takes over ``fd``, an open, non-blocking /dev/fuse. ``lost``: it ended, but not by `close`."""
        geometry = Geometry(volume.size_bytes, volume.block_size_bytes, read_only, os.getuid(), os.getgid())
        self._session = Session(geometry, self._batch_done)
        self._fd = fd
        self._volume = volume
        self._memory = memory
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._reading = False
        self._resume()

    @property
    def closed(self) -> bool:
        """The connection has ended: users of the file get errors."""
        return self._fd < 0

    def resize(self) -> None:
        """The volume has grown."""
        self._session.resize(self._volume.size_bytes)

    def close(self) -> None:
        """End the connection. Requests in flight fail with ECONNABORTED, which a loop device turns into EIO."""
        if self._fd >= 0:
            self._pause()
            os.close(self._fd)
            self._fd = -1

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _resume(self) -> None:
        if self._fd >= 0 and not self._reading:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        if self._volume.congested:
            self._pause()
            self._volume.when_relieved(self._resume)
            return
        chunk, filled = self._memory.room()
        view = chunk.view
        request, head, readv, fd = self._session.request, self._memory.head, os.readv, self._fd
        last = CHUNK_BYTES - MAX_IO_BYTES
        try:
            for _ in range(BATCH_REQUESTS):
                body = view[filled:]
                try:
                    size = readv(fd, (head, body))
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno == errno.ENOENT:  # the request was taken back while it was read
                        continue
                    raise
                filled += (request(head, size, body) + PAGE_BYTES - 1) & -PAGE_BYTES
                if filled > last:
                    break
        except (OSError, ProtocolError) as error:
            self._end(error)
            return
        self._memory.filled(filled)
        self._dispatch(chunk)

    def _end(self, error: Exception) -> None:
        """The connection failed, or the kernel ended it (ENODEV, ECONNABORTED)."""
        if not self.closed:
            self.close()
            self._lost(error)

    def _dispatch(self, chunk: Chunk) -> None:
        batch, reads, flushes, replies = self._session.take()
        if batch is not None:
            if batch.size_bytes:
                chunk.hold()
                batch.chunk = chunk
            if self._volume.submit(batch):
                self._batch_done(batch)
        for read in reads:
            self._read(read)
        for unique in flushes:
            self._flush(unique)
        for reply in replies:
            self._reply(reply)

    def _batch_done(self, batch: WriteBatch) -> None:
        write = os.write
        for reply in protocol.batch_replies(batch):
            if self._fd < 0:
                return
            try:
                write(self._fd, reply)
            except OSError as error:
                self._reply_failed(error)

    def _read(self, read: ReadRequest) -> None:
        chunk = self._memory.take_answer()
        view = chunk.view[: read.length_bytes]

        def done(error: BlockError | None) -> None:
            if error is None:
                self._reply(protocol.read_header(read), view)
            else:
                self._reply(protocol.failure_reply(read.unique, error))
            chunk.release()

        try:
            if self._volume.read(read.offset_bytes, view, done):
                done(None)
        except BlockError as error:
            done(error)

    def _flush(self, unique: int) -> None:
        self._volume.flush(lambda error: self._reply(protocol.flush_reply(unique, error)))

    def _reply(self, *buffers: bytes | memoryview) -> None:
        if self._fd >= 0:
            try:
                os.writev(self._fd, buffers)
            except OSError as error:
                self._reply_failed(error)

    def _reply_failed(self, error: OSError) -> None:
        if error.errno != errno.ENOENT:  # ENOENT: nobody waits for it any more
            self._end(error)
