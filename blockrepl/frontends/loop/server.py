"""Serves one FUSE connection on the event loop: requests are read as batches, volumes take them, replies go out.

Why all of it is on the thread of the loop: a thread that reads hands over once per batch, and on a machine of
few cores that hand-over costs more than the reading (measured; see ARCHITECTURE.md).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
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

log = logging.getLogger(__name__)


class Memory:
    """Page-aligned memory for payloads, shared by all connections of a front end.

    A request is read straight to where it stays: its header into ``head``, its payload to the next page of the
    current chunk. The kernel fills pages one at a time, so a payload that straddles pages costs it twice the work.
    """

    def __init__(self) -> None:
        self.head = memoryview(bytearray(fuse.IO_HEADER_BYTES))
        self._chunks = ChunkPool(CHUNK_BYTES + PAGE_BYTES, KEEP_BYTES)
        self._scratch = ChunkPool(MAX_IO_BYTES + PAGE_BYTES, KEEP_BYTES)
        self._chunk: Chunk | None = None
        self._filled = 0

    def room(self) -> tuple[Chunk, memoryview, int]:
        """The current chunk, its aligned view, and the first byte there that nobody looks into."""
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
        return chunk, _aligned(chunk, CHUNK_BYTES), self._filled

    def filled(self, end: int) -> None:
        """Bytes of the current chunk before ``end`` may be in use."""
        self._filled = end

    def take_scratch(self) -> tuple[Chunk, memoryview]:
        """A buffer for the answer to a READ."""
        chunk = self._scratch.take()
        return chunk, _aligned(chunk, MAX_IO_BYTES)


def _aligned(chunk: Chunk, size: int) -> memoryview:
    address = ctypes.addressof(ctypes.c_char.from_buffer(chunk.buffer))
    start = -address % PAGE_BYTES
    return chunk.view[start : start + size]


class FuseServer:
    """One connection, from mount to the end. All methods run on the event loop."""

    def __init__(self, fd: int, volume: Volume, memory: Memory, *, read_only: bool, lost: Callable[[], None]) -> None:
        """Takes over ``fd``, an open, non-blocking /dev/fuse. ``lost``: the kernel ended the connection."""
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
        chunk, view, filled = self._memory.room()
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
        if not isinstance(error, OSError) or error.errno not in (errno.ENODEV, errno.ECONNABORTED):
            log.error("loop front end: volume %s: %s", self._volume.name, error)
        if not self.closed:
            self.close()
            self._lost()

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
        write, fd = os.write, self._fd
        if fd < 0:
            return
        for reply in protocol.batch_replies(batch):
            try:
                write(fd, reply)
            except OSError as error:
                self._reply_failed(error)

    def _read(self, read: ReadRequest) -> None:
        chunk, view = self._memory.take_scratch()
        view = view[: read.length_bytes]

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
