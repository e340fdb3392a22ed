"""A non-blocking socket with chunked receive and gathered send: the byte pump under links and front ends.

Why not asyncio transports: a chunk must be given back when the kernel has taken it, and transports do not say when
that is (uvloop keeps memoryviews, asyncio joins them). ``sendmsg`` says how many bytes it took.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from blockrepl.block import Buffer
from blockrepl.chunks import Chunk, ChunkPool

IOV_MAX = 1000  # below Linux' UIO_MAXIOV of 1024
EXACT_BYTES = 1 << 16  # a message at least this long is received exactly to its end, so that its tail is never copied
HEAD_BYTES = 512  # what is received first after such a message: little to copy when another one follows


class Consumer(Protocol):
    """What a stream feeds."""

    def received(self, chunk: Chunk, start: int, end: int) -> tuple[int, int]:
        """Parse every complete message in ``chunk.view[start:end]``.

        Return (bytes consumed, whole size of the message that is incomplete at the end, or 0 when not known yet).
        The consumer bounds that size before it returns it. Views that are kept need a `Chunk.hold`. An exception must
        not leave this method: the consumer calls `Stream.close`.
        """

    def lost(self, error: OSError | None) -> None:
        """The peer closed (None) or the socket failed. Called once, never after `Stream.close`."""


class Stream:
    """One connected socket, served on the running loop."""

    def __init__(self, sock: socket.socket, consumer: Consumer, pool: ChunkPool) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._fd = sock.fileno()
        self._consumer = consumer
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._chunk: Chunk | None = None
        self._start = 0
        self._end = 0
        self._after_large = False  # the next message is likely large too: receive only its head
        self._need = 0  # whole size of the message at _start, when known
        self._out: deque[tuple[Buffer, Chunk | None]] = deque()
        self.queued_bytes = 0
        self.closed = False
        self._reading = False
        self._writing = False
        self._closing = False
        self.resume()

    # receive

    def pause(self) -> None:
        """Stop reading; what was received stays."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def resume(self) -> None:
        """Read again."""
        if not self._reading and not self.closed and not self._closing:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        chunk = self._chunk
        if chunk is None:
            chunk, self._start = self._pool.borrow()
            self._end = self._start
        elif self._end == len(chunk.buffer) or self._start + self._need > len(chunk.buffer):
            chunk = self._move(chunk)
        if self._need >= EXACT_BYTES:
            limit = self._start + self._need
        elif self._after_large:
            limit = self._end + HEAD_BYTES
        else:
            limit = len(chunk.buffer)
        try:
            count = self._sock.recv_into(chunk.view[self._end : limit])
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(error)
            return
        if not count:
            self._fail(None)
            return
        self._end += count
        if self._chunk is None or self._end - self._start >= self._need:
            self._parse(chunk)

    def _move(self, chunk: Chunk) -> Chunk:
        """Carry the incomplete message at the end of a full chunk into one that fits it."""
        kept = self._end - self._start
        fresh = self._pool.take(max(self._need, kept + 1))
        fresh.view[:kept] = chunk.view[self._start : self._end]
        chunk.release()
        self._chunk = fresh
        self._start, self._end = 0, kept
        return fresh

    def _parse(self, chunk: Chunk) -> None:
        """Let the consumer parse; keep the chunk only for a rest."""
        borrowed = self._chunk is None
        consumed, need = self._consumer.received(chunk, self._start, self._end)
        if self.closed:
            if borrowed:
                self._pool.put(chunk, self._end)
            return
        self._start += consumed
        self._after_large = self._need >= EXACT_BYTES
        if self._start == self._end:
            if not borrowed:
                self._chunk = None
                self._pool.adopt(chunk, self._end)
            else:
                self._pool.put(chunk, self._end)
            self._need = 0
            return
        self._need = need
        if not borrowed:
            return
        rest = self._end - self._start
        if need <= HEAD_BYTES and rest < HEAD_BYTES:  # cut in a header: may wait for ever, and shall hold little
            small = Chunk(HEAD_BYTES, None)
            small.view[:rest] = chunk.view[self._start : self._end]
            self._pool.put(chunk, self._start)
            self._chunk, self._start, self._end = small, 0, rest
        else:
            self._pool.part_with(chunk)
            self._chunk = chunk

    # send

    def send(self, buffers: Sequence[Buffer], chunk: Chunk | None = None) -> None:
        """Send ``buffers`` in order. One use of ``chunk`` passes to the stream, which releases it when all is sent."""
        if self.closed or self._closing:
            if chunk is not None:
                chunk.release()
            return
        out = self._out
        if not out and 0 < len(buffers) <= IOV_MAX:
            # Nearly always the socket takes all of it: nothing is queued, buffer by buffer, only to be taken out.
            rest = self._send_now(buffers)
            if rest is None:
                if chunk is not None:
                    chunk.release()
                return
            buffers = rest
        total = 0
        for buffer in buffers:
            total += len(buffer)
            out.append((buffer, None))
        if chunk is not None:
            if buffers:
                out[-1] = (out[-1][0], chunk)
            else:
                chunk.release()
        self.queued_bytes += total
        if not self._writing:
            self._flush()

    def _send_now(self, buffers: Sequence[Buffer]) -> list[Buffer] | None:
        """Offer everything to the socket; what it did not take, or None when nothing is left to do."""
        try:
            sent = self._sock.sendmsg(buffers) if len(buffers) > 1 else self._sock.send(buffers[0])
        except (BlockingIOError, InterruptedError):
            return list(buffers)
        except OSError as error:
            self._fail(error)
            return None
        if sent == sum(map(len, buffers)):
            return None
        for index, buffer in enumerate(buffers):
            if sent < len(buffer):
                return [memoryview(buffer)[sent:], *buffers[index + 1 :]]
            sent -= len(buffer)
        return None

    def _flush(self) -> None:
        out = self._out
        while out:
            many = len(out) > 1
            try:
                if many:
                    buffers = [item[0] for item in out] if len(out) <= IOV_MAX else [out[i][0] for i in range(IOV_MAX)]
                    sent = self._sock.sendmsg(buffers)
                else:
                    sent = self._sock.send(out[0][0])
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._fail(error)
                return
            self.queued_bytes -= sent
            while sent:
                buffer, chunk = out[0]
                size = len(buffer)
                if sent < size:
                    out[0] = (memoryview(buffer)[sent:], chunk)
                    break
                sent -= size
                out.popleft()
                if chunk is not None:
                    chunk.release()
            while out and not len(out[0][0]):
                chunk = out.popleft()[1]
                if chunk is not None:
                    chunk.release()
        if out:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._fd, self._writable)
        elif self._closing:
            self.close()

    def _writable(self) -> None:
        self._writing = False
        self._loop.remove_writer(self._fd)
        self._flush()
        if not self.closed and not self._writing:
            drained = getattr(self._consumer, "drained", None)
            if drained is not None:
                drained()

    # end

    def finish(self) -> None:
        """Send what is queued, then close. Nothing more is read or accepted."""
        if self.closed:
            return
        self.pause()
        self._closing = True
        if not self._out:
            self.close()

    def close(self) -> None:
        """Close at once; queued output and unread input are dropped. The consumer is not told."""
        if self.closed:
            return
        self.pause()
        self.closed = True
        if self._writing:
            self._loop.remove_writer(self._fd)
        for _, chunk in self._out:
            if chunk is not None:
                chunk.release()
        self._out.clear()
        self.queued_bytes = 0
        if self._chunk is not None:
            self._chunk.release()
            self._chunk = None
        with contextlib.suppress(OSError):
            self._sock.close()

    def _fail(self, error: OSError | None) -> None:
        if not self.closed:
            self.close()
            self._consumer.lost(error)
