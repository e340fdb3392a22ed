"""One connection: the login first, byte by byte in a buffer of its own, then the session on the shared chunks.

A connection that has not logged in holds no more than the bytes it sent, at most one login request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from blockrepl.chunks import Chunk
from blockrepl.formats.iscsi import BHS_BYTES, LENGTHS, MAX_AHS_BYTES, MAX_SEGMENT_BYTES, padded
from blockrepl.frontends.iscsi.execution import Output
from blockrepl.frontends.iscsi.login import Login, State
from blockrepl.frontends.iscsi.pdu import LOGIN_SEGMENT_BYTES
from blockrepl.frontends.iscsi.session import Session

MAX_LOGIN_BYTES = BHS_BYTES + MAX_AHS_BYTES + LOGIN_SEGMENT_BYTES

logger = logging.getLogger(__name__)


class Connection:
    """A `blockrepl.stream.Consumer`. ``ended`` is called once, when the connection is over or about to be.

    ``begin`` makes the session of a login that succeeded.
    """

    def __init__(
        self,
        login: Login,
        begin: Callable[[Connection, Login], Session],
        peer: str,
        ended: Callable[[Connection], None],
    ) -> None:
        self.peer = peer
        self.stream: Output
        self.session: Session | None = None
        self.over = False
        self._login = login
        self._begin = begin
        self._ended = ended
        self._buffer = bytearray()

    def start(self, stream: Output) -> None:
        self.stream = stream

    # input

    def received(self, chunk: Chunk, start: int, end: int) -> tuple[int, int]:
        try:
            if self.session is not None:
                return self.session.received(chunk, start, end)
            self._buffer += chunk.view[start:end]
            self._log_in()
        except Exception:  # a mistake of ours must not take the other sessions along
            logger.exception("iscsi %s: connection ended by a mistake of ours", self.peer)
            self.abort()
        return end - start, 0

    def lost(self, error: OSError | None) -> None:
        if error is not None:
            logger.info("iscsi %s: connection lost: %s", self.peer, error)
        self._end()

    def drained(self) -> None:
        if self.session is not None:
            self.session.drained()

    def _log_in(self) -> None:
        buffer = self._buffer
        while len(buffer) >= BHS_BYTES and not self.over:
            (lengths,) = LENGTHS.unpack_from(buffer, 0)
            data_bytes = lengths & MAX_SEGMENT_BYTES
            if data_bytes > LOGIN_SEGMENT_BYTES:
                self._refuse(f"a data segment of {data_bytes} bytes in the login")
                return
            data_at = BHS_BYTES + (lengths >> 24) * 4
            if len(buffer) < data_at + padded(data_bytes):
                return
            header, data = bytes(buffer[:BHS_BYTES]), bytes(buffer[data_at : data_at + data_bytes])
            del buffer[: data_at + padded(data_bytes)]
            self.stream.send([self._login.receive(header, data)])
            if self._login.state is State.FAILED:
                self._refuse(self._login.reason)
            elif self._login.state is State.DONE:
                self._buffer = bytearray()
                if buffer:
                    self._refuse("more came before the login was answered")
                    return
                if not self.stream.closed:
                    self.session = self._begin(self, self._login)
                return

    def _refuse(self, reason: str) -> None:
        name = self._login.request.initiator_name
        logger.info("iscsi %s: login failed: %s%s", self.peer, f"{name}: " if name else "", reason)
        self._buffer = bytearray()
        self.stream.finish()
        self._end()

    # end

    def expire(self) -> None:
        """The time for the login is over."""
        if self.session is None and not self.over:
            self._refuse("the login took too long")

    def abort(self) -> None:
        """Close at once."""
        self.stream.close()
        self._end()

    def session_ended(self, session: Session) -> None:
        """The session says that it is over."""
        self._end()

    def _end(self) -> None:
        if not self.over:
            self.over = True
            if self.session is not None:
                self.session.end()
            self._ended(self)
