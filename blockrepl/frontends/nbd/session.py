"""One NBD connection: joins the decoder, the volume and the stream.

Replies leave as one gathered send per chunk of input. Read data goes from the page cache into a reply buffer, header
and data together, and from there to the socket: never joined, never copied again. Reads wait as numbers while the
client does not take what is queued, so a slow client holds one reply buffer and no more.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from blockrepl.block import Buffer, Volume, WriteBatch
from blockrepl.chunks import Chunk, ChunkPool
from blockrepl.errors import BlockError
from blockrepl.formats import nbd
from blockrepl.formats.nbd import REPLY_BYTES
from blockrepl.frontends.nbd.handshake import GREETING, Exports, Handshake, State
from blockrepl.frontends.nbd.protocol import Transmission, batch_replies, error_reply, nbd_error

MAX_IN_FLIGHT = 4096  # commands of one connection that wait for the volume, or reads for the socket
MAX_COLD = 32  # reads of one connection that wait for the disk: each may hold a reply buffer
REPLY_LIMIT_BYTES = 1 << 18  # reply bytes the client did not take yet: above, no read is begun and none received

logger = logging.getLogger(__name__)


class Output(Protocol):
    """What a session needs of `blockrepl.stream.Stream`."""

    queued_bytes: int
    closed: bool

    def send(self, buffers: list[Buffer], chunk: Chunk | None = None) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class Session:
    """A `blockrepl.stream.Consumer`. ``ended`` is called once, when the connection is over or about to be.

    Invariant: ``in_flight`` counts the commands handed to the volume whose replies are not queued yet.
    """

    def __init__(self, exports: Exports, pool: ChunkPool, peer: str, ended: Callable[[Session], None]) -> None:
        self.peer = peer
        self.in_flight = 0
        self.requests = 0
        self.violation = ""
        self.stream: Output
        self.volume: Volume | None = None
        self._handshake: Handshake | None = Handshake(exports)
        self._transmission: Transmission
        self._pool = pool
        self._ended = ended
        self._over = False
        self._reads: deque[tuple[int, int, int]] = deque()
        self._cold = 0
        self._paused = False
        self._awaits_relief = False

    def start(self, stream: Output) -> None:
        """Greet the client."""
        self.stream = stream
        stream.send([GREETING])

    @property
    def transmitting(self) -> bool:
        return self._handshake is None

    # input

    def received(self, chunk: Chunk, start: int, end: int) -> tuple[int, int]:
        try:
            if self._handshake is not None:
                return self._greet(self._handshake, chunk, start, end)
            return self._serve(chunk, start, end)
        except Exception:  # a mistake of ours must not take the other sessions along
            logger.exception("nbd %s: session ended by a mistake of ours", self.peer)
            self.stream.close()
            self._end()
            return end - start, 0

    def lost(self, error: OSError | None) -> None:
        if error is not None:
            logger.info("nbd %s: connection lost: %s", self.peer, error)
        self._end()

    def drained(self) -> None:
        if self._reads:
            self._send_reads([])
        if self._paused:
            self._regulate()

    def _greet(self, handshake: Handshake, chunk: Chunk, start: int, end: int) -> tuple[int, int]:
        consumed, need, out = handshake.receive(chunk.view[start:end])
        if out:
            self.stream.send([out])
        if handshake.state is State.CLOSED:
            self._finish(handshake.reason)
        elif handshake.state is State.TRANSMISSION and not self.stream.closed:
            assert handshake.volume is not None
            self.volume = handshake.volume
            self._transmission = Transmission(handshake.volume, self._batch_done)
            self._handshake = None
            if consumed < end - start:
                more, need = self._serve(chunk, start + consumed, end)
                consumed += more
        return consumed, need

    def _serve(self, chunk: Chunk, start: int, end: int) -> tuple[int, int]:
        """The hot path, once per chunk."""
        requests, volume, stream = self._transmission, self.volume, self.stream
        assert volume is not None
        consumed, need = requests.decode(chunk, start, end)
        out: list[Buffer] = []
        if requests.refused:
            out += requests.refused
            requests.refused.clear()
        batch = requests.batch
        if batch is not None:
            requests.batch = None
            self.requests += len(batch.cookies)
            self.in_flight += len(batch.cookies)
            if volume.submit(batch):
                self.in_flight -= len(batch.cookies)
                out.append(batch_replies(batch))
        if requests.flushes:
            self._flush(volume)
        if requests.reads:
            self.requests += len(requests.reads)
            self._reads += requests.reads
            requests.reads.clear()
            self._send_reads(out)
        elif out:
            stream.send(out)
        if requests.ended:
            self._wind_up()
        else:
            self._regulate()
        return consumed, need

    def _flush(self, volume: Volume) -> None:
        flushes = self._transmission.flushes
        self.requests += len(flushes)
        self.in_flight += len(flushes)
        for cookie in flushes:
            volume.flush(partial(self._flushed, cookie))
        flushes.clear()

    # output

    def _send_reads(self, out: list[Buffer]) -> None:
        """Send ``out``, and read replies as long as the client takes them."""
        assert self.volume is not None
        read, stream, reads = self.volume.read, self.stream, self._reads
        pack_into, ok = nbd.REPLY.pack_into, nbd.REPLY_OK
        while reads and self._cold < MAX_COLD and stream.queued_bytes < REPLY_LIMIT_BYTES:
            chunk = self._pool.take(REPLY_BYTES + reads[0][2])
            buffer, view, room = chunk.buffer, chunk.view, len(chunk.buffer)
            start = at = 0
            while reads:
                cookie, offset, length = reads[0]
                after = at + REPLY_BYTES + length
                if after > room or self._cold >= MAX_COLD:
                    break
                reads.popleft()
                try:
                    filled = read(
                        offset, view[at + REPLY_BYTES : after], partial(self._read_done, cookie, chunk, at, after)
                    )
                except BlockError as error:
                    out.append(view[start:at])
                    out.append(error_reply(cookie, nbd_error(error)))
                    start = at
                    continue
                if filled:
                    pack_into(buffer, at, ok, cookie)
                    at = after
                else:
                    self._cold += 1
                    self.in_flight += 1
                    chunk.hold()
                    out.append(view[start:at])
                    start = at = after
            if at > start:
                out.append(view[start:at])
            stream.send(out, chunk)
            out = []
        if out:
            stream.send(out)

    def _read_done(self, cookie: int, chunk: Chunk, start: int, end: int, error: BlockError | None) -> None:
        self._cold -= 1
        self.in_flight -= 1
        if error is None:
            nbd.REPLY.pack_into(chunk.buffer, start, nbd.REPLY_OK, cookie)
            self.stream.send([chunk.view[start:end]], chunk)
        else:
            chunk.release()
            self.stream.send([error_reply(cookie, nbd_error(error))])
        if self._reads and not self._over:
            self._send_reads([])
        self._completed()

    def _batch_done(self, batch: WriteBatch) -> None:
        self.in_flight -= len(batch.cookies)
        self.stream.send([batch_replies(batch)])
        self._completed()

    def _flushed(self, cookie: int, error: BlockError | None) -> None:
        self.in_flight -= 1
        self.stream.send([error_reply(cookie, 0 if error is None else nbd_error(error))])
        self._completed()

    def _completed(self) -> None:
        if self._paused:
            self._regulate()

    # flow

    def _regulate(self) -> None:
        """Read from the client only while there is room for what it may ask."""
        assert self.volume is not None
        if self._over:
            return
        if self._transmission.ended:
            self._wind_up()
            return
        congested = self.volume.congested
        if congested and not self._awaits_relief:
            self._awaits_relief = True
            self.volume.when_relieved(self._relieved)
        full = (
            congested
            or self.in_flight + len(self._reads) > MAX_IN_FLIGHT
            or self.stream.queued_bytes >= REPLY_LIMIT_BYTES
        )
        if full != self._paused:
            self._paused = full
            if full:
                self.stream.pause()
            else:
                self.stream.resume()

    def _relieved(self) -> None:
        self._awaits_relief = False
        if self._paused:
            self._regulate()

    # end

    def stop(self) -> None:
        """The server is closing: answer what is outstanding, take nothing more."""
        if self._handshake is not None:
            self._finish("the server is closing")
        else:
            self._transmission.ended = True
            self._wind_up()

    def abort(self) -> None:
        """Close at once."""
        self.stream.close()
        self._end()

    def expire(self) -> None:
        """The time for the handshake is over."""
        if self._handshake is not None and not self._over:
            self._finish("the handshake took too long")

    def _wind_up(self) -> None:
        """DISC: answer everything outstanding first. A violation: do not wait for anything."""
        if self._transmission.violation:
            self._finish(self._transmission.violation)
        elif self.in_flight or self._reads:
            self._paused = True
            self.stream.pause()
        else:
            self._finish("")

    def _finish(self, violation: str) -> None:
        self.violation = violation
        if violation:
            logger.info("nbd %s: closed: %s", self.peer, violation)
        self.stream.finish()
        self._end()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._reads.clear()
            self._ended(self)
