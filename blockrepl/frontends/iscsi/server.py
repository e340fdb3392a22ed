"""The iSCSI server of a node: portals, connections, and the sessions of its one target."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from blockrepl.chunks import ChunkPool
from blockrepl.formats.iscsi import LoginStatus
from blockrepl.frontends.acceptor import Acceptor
from blockrepl.frontends.iscsi.connection import Connection
from blockrepl.frontends.iscsi.login import CHANCE_BYTES, Login, LoginError, Request, TargetDescription
from blockrepl.frontends.iscsi.session import Session, Surroundings
from blockrepl.frontends.iscsi.task import DeviceServer, Event, Nexus
from blockrepl.stream import Stream

LOGIN_TIMEOUT_S = 10.0
LINGER_S = 5.0  # how long an initiator may take to read its last responses
TICK_S = 5.0
MAX_SESSIONS = 1024

Portal = tuple[str, int, int]  # host, port, portal group tag

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """One session, for people to look at."""

    peer: str
    initiator: str
    user: str
    discovery: bool
    commands: int
    in_flight: int


class IscsiServer:
    """Serves one target on the running loop.

    ``portals`` are those of the whole group, for SendTargets. Invariant: of the normal sessions in ``_sessions`` no
    two have the same initiator name and ISID.
    """

    def __init__(
        self,
        target: TargetDescription,
        device: DeviceServer,
        pool: ChunkPool,
        *,
        portals: Sequence[Portal] = (),
        login_timeout_s: float = LOGIN_TIMEOUT_S,
        tick_s: float = TICK_S,
    ) -> None:
        self._target = target
        self._device = device
        self._pool = pool
        self._portals = list(portals)
        self._login_timeout_s = login_timeout_s
        self._tick_s = tick_s
        self._loop = asyncio.get_running_loop()
        self._acceptor = Acceptor("iscsi", self._begin)
        self._connections: set[Connection] = set()
        self._sessions: dict[int, Session] = {}  # by TSIH
        self._next_tsih = 1
        self._idle = asyncio.Event()
        self._ticker: asyncio.TimerHandle | None = None
        device.on_event = self._on_event

    # life

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Accept on an address; port 0 picks one. Returns the address bound. Raises UsageError."""
        bound = await self._acceptor.listen(host, port)
        if self._ticker is None:
            self._ticker = self._loop.call_later(self._tick_s, self._tick)
        return bound

    async def close(self, grace_s: float = 1.0) -> None:
        """Stop accepting; ask for logouts, and wait for at most ``grace_s``; close every connection."""
        self._acceptor.close()
        if self._ticker is not None:
            self._ticker.cancel()
        for connection in list(self._connections):
            if connection.session is None:
                connection.abort()
            else:
                connection.session.stop()
        if self._connections:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)
        for session in list(self._sessions.values()):
            session.dropped("the server is closing")
        for connection in list(self._connections):
            connection.abort()

    def sessions(self) -> list[SessionStatus]:
        """Every session."""
        return [
            SessionStatus(
                session.peer,
                session.request.initiator_name,
                session.request.user,
                session.request.discovery,
                session.commands,
                session.in_flight,
            )
            for session in self._sessions.values()
        ]

    def _tick(self) -> None:
        self._ticker = self._loop.call_later(self._tick_s, self._tick)
        for session in list(self._sessions.values()):
            session.tick()

    # connections

    def _begin(self, sock: socket.socket, address: tuple[str, int]) -> None:
        peer = f"{address[0]}:{address[1]}"
        local_host, local_port = sock.getsockname()[:2]
        loopback = _is_loopback(local_host)
        login = Login(self._target, self._admit, secrets.token_bytes(CHANCE_BYTES), loopback=loopback)
        connection = Connection(login, partial(self._session, local_host, local_port), peer, self._connection_ended)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream = Stream(sock, connection, self._pool)
        self._connections.add(connection)
        connection.start(stream)
        self._loop.call_later(self._login_timeout_s, connection.expire)

    def _connection_ended(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not connection.stream.closed:
            self._loop.call_later(LINGER_S, connection.stream.close)
        if not self._connections:
            self._idle.set()

    # sessions

    def _admit(self, request: Request) -> int:
        """Take a login in: a TSIH for it. One with the initiator name and ISID of a session replaces that session
        (RFC 7143, 6.3.5), and so does one that reinstates its connection, for at level 0 nothing of it goes on."""
        if request.tsih:
            old = self._sessions.get(request.tsih)
            if old is None or request.discovery or _identity(old.request) != _identity(request):
                raise LoginError(LoginStatus.NO_SESSION, f"there is no session {request.tsih}")
            if old.request.cid != request.cid:
                raise LoginError(LoginStatus.TOO_MANY_CONNECTIONS, "a session has one connection here")
            old.dropped("its connection is reinstated")
        elif not request.discovery:
            for session in list(self._sessions.values()):
                if not session.request.discovery and _identity(session.request) == _identity(request):
                    session.dropped("it is reinstated")
        if len(self._sessions) >= MAX_SESSIONS:
            raise LoginError(LoginStatus.OUT_OF_RESOURCES, f"there are {MAX_SESSIONS} sessions")
        if not request.tsih:
            while self._next_tsih in self._sessions:
                self._next_tsih = self._next_tsih % 0xFFFF + 1
        tsih = request.tsih or self._next_tsih
        if tsih == self._next_tsih:
            self._next_tsih = self._next_tsih % 0xFFFF + 1
        return tsih

    def _session(self, local_host: str, local_port: int, connection: Connection, login: Login) -> Session:
        request = login.request
        surroundings = Surroundings(
            device=self._device,
            pool=self._pool,
            portals=partial(self._addresses, local_host, local_port),
            target_name=self._target.name,
            portal_group=self._target.portal_group,
            reset_all=self._reset_all,
        )
        session = Session(
            surroundings, request, connection.stream, connection.peer, partial(self._session_ended, connection)
        )
        self._sessions[request.tsih] = session
        kind = "discovery" if request.discovery else "normal"
        logger.info("iscsi %s: %s session of %s", connection.peer, kind, request.initiator_name)
        return session

    def _session_ended(self, connection: Connection, session: Session) -> None:
        if self._sessions.get(session.request.tsih) is session:
            del self._sessions[session.request.tsih]
        connection.session_ended(session)

    def _reset_all(self) -> None:
        """A cold reset ends every session of the target (RFC 7143, 11.5.1)."""
        for session in list(self._sessions.values()):
            session.dropped("target cold reset")

    def _on_event(self, nexuses: Sequence[Nexus], event: Event) -> None:
        for session in list(self._sessions.values()):
            if session.nexus is not None and session.nexus in nexuses:
                session.event(event)

    def _addresses(self, local_host: str, local_port: int) -> list[tuple[str, int]]:
        """Where the target can be reached by someone who reached this address: that one last, for libiscsi
        takes them from the end."""
        own = (_address(local_host, local_port), self._target.portal_group)
        found = [own]
        for host, port, tag in self._portals:
            if _is_any(host) or (_is_loopback(host) and not _is_loopback(local_host)):
                continue
            entry = (_address(host, port), tag)
            if entry not in found:
                found.insert(-1, entry)
        return found


def _identity(request: Request) -> tuple[str, bytes]:
    """What makes two logins one session (RFC 7143, 4.4.3.2)."""
    return request.initiator_name, request.isid


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_loopback(host: str) -> bool:
    address = _ip(host)
    return address.is_loopback if address is not None else host == "localhost"


def _is_any(host: str) -> bool:
    address = _ip(host)
    return address is not None and address.is_unspecified
