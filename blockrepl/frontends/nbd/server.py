"""The NBD server: accepts connections and hands them to sessions."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass

from blockrepl.chunks import ChunkPool
from blockrepl.errors import UsageError
from blockrepl.frontends.acceptor import Acceptor
from blockrepl.frontends.nbd.handshake import Exports
from blockrepl.frontends.nbd.session import Session
from blockrepl.stream import Stream

HANDSHAKE_TIMEOUT_S = 10.0
LINGER_S = 5.0  # how long a client may take to read its last replies


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """One connection, for people to look at. ``export`` is None before transmission."""

    peer: str
    export: str | None
    requests: int
    in_flight: int


class NbdServer:
    """Serves ``exports()`` on the running loop. The mapping may change: new connections see what it then is."""

    def __init__(self, exports: Exports, pool: ChunkPool, *, handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S) -> None:
        self._exports = exports
        self._pool = pool
        self._handshake_timeout_s = handshake_timeout_s
        self._loop = asyncio.get_running_loop()
        self._acceptor = Acceptor("nbd", self._begin)
        self._unix_paths: list[str] = []
        self._sessions: set[Session] = set()
        self._idle = asyncio.Event()

    # life

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Accept on an address; port 0 picks one. Returns the address bound. Raises UsageError."""
        return await self._acceptor.listen(host, port)

    async def listen_unix(self, path: str) -> None:
        """Accept on a Unix socket, mode 0600; a socket that nobody serves any more is replaced. Raises UsageError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if _is_stale(path):
                os.unlink(path)
            mask = os.umask(0o177)
            try:
                listener.bind(path)
            finally:
                os.umask(mask)
            self._acceptor.accept_from(listener)
        except OSError as error:
            listener.close()
            raise UsageError(f"nbd: cannot listen on {path}: {error.strerror or error}") from error
        self._unix_paths.append(path)

    async def close(self, grace_s: float = 1.0) -> None:
        """Stop accepting; let commands in flight finish for at most ``grace_s``; close every connection."""
        self._acceptor.close()
        for path in self._unix_paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._unix_paths.clear()
        for session in list(self._sessions):
            session.stop()
        if self._sessions:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)
        for session in list(self._sessions):
            session.abort()

    def cut_off(self, export: str) -> None:
        """End every connection to an export: its volume is not served here any more."""
        for session in list(self._sessions):
            if session.volume is not None and session.volume.name == export:
                session.abort()

    def sessions(self) -> list[SessionStatus]:
        """Every open connection."""
        return [
            SessionStatus(
                session.peer,
                session.volume.name if session.volume is not None else None,
                session.requests,
                session.in_flight,
            )
            for session in self._sessions
        ]

    # connections

    def _begin(self, sock: socket.socket, address: object) -> None:
        session = Session(self._exports, self._pool, _peer_name(address), self._session_ended)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream = Stream(sock, session, self._pool)
        self._sessions.add(session)
        session.start(stream)
        self._loop.call_later(self._handshake_timeout_s, session.expire)

    def _session_ended(self, session: Session) -> None:
        self._sessions.discard(session)
        if not session.stream.closed:
            self._loop.call_later(LINGER_S, session.stream.close)
        if not self._sessions:
            self._idle.set()


def _is_stale(path: str) -> bool:
    """A Unix socket that nobody listens on."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    finally:
        probe.close()
    return False


def _peer_name(address: object) -> str:
    if isinstance(address, tuple):
        return f"{address[0]}:{address[1]}"
    return "unix"
