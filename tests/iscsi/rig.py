"""Connections, sessions and a device server without sockets: bytes go in, PDUs come out, nothing happens by itself."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from blockrepl.block import Buffer
from blockrepl.chunks import Chunk, ChunkPool
from blockrepl.formats.iscsi import LoginStatus
from blockrepl.frontends.iscsi.connection import Connection
from blockrepl.frontends.iscsi.login import CHANCE_BYTES, Access, Login, LoginError, Request, TargetDescription
from blockrepl.frontends.iscsi.session import Session, Surroundings
from tests.iscsi.device import BLOCK_BYTES, Device

TARGET = "iqn.2026-11.org.blockrepl:fuzz"
__all__ = ["BLOCK_BYTES", "TARGET", "CountingPool", "Link", "Rig", "Wire"]

MESSAGE_LIMIT_BYTES = 48 + 1020 + (1 << 20) + 12  # a consumer bounds what it waits for before it says so
QUEUE_LIMIT_BYTES = 64 << 20


class CountingPool(ChunkPool):
    """Knows what is lent."""

    def __init__(self) -> None:
        super().__init__()
        self.lent_bytes = 0
        self.peak_bytes = 0

    def take(self, min_bytes: int = 0) -> Chunk:
        chunk = super().take(min_bytes)
        self.lent_bytes += len(chunk.buffer)
        self.peak_bytes = max(self.peak_bytes, self.lent_bytes)
        return chunk

    def give_back(self, chunk: Chunk) -> None:
        self.lent_bytes -= len(chunk.buffer)
        super().give_back(chunk)


class Wire:
    """What a session sends, kept. ``stuck``: the initiator does not read, so bytes queue up until `flush`."""

    def __init__(self) -> None:
        self.queued_bytes = 0
        self.closed = False
        self.paused = False
        self.stuck = False
        self._out: list[bytes] = []
        self._finishing = False

    def send(self, buffers: Sequence[Buffer], chunk: Chunk | None = None) -> None:
        if not self.closed and not self._finishing:
            self._out += [bytes(buffer) for buffer in buffers]
            if self.stuck:
                self.queued_bytes += sum(map(len, buffers))
                assert self.queued_bytes < QUEUE_LIMIT_BYTES, "answers pile up for an initiator that does not read"
        if chunk is not None:
            chunk.release()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def finish(self) -> None:
        self._finishing = True

    def close(self) -> None:
        self.closed = True

    @property
    def ended(self) -> bool:
        return self.closed or self._finishing

    def taken(self) -> bytes:
        content, self._out = b"".join(self._out), []
        self.queued_bytes = 0
        return content


class Link:
    """One connection and its wire: feeds it as `blockrepl.stream.Stream` does, and holds it to what that expects."""

    def __init__(self, rig: Rig) -> None:
        self.wire = Wire()
        self.losses = 0
        self._pool = rig.pool
        self._rest = b""
        self._need = 0
        login = Login(rig.description, rig.admit, rig.random.randbytes(CHANCE_BYTES), loopback=True)
        self.connection = Connection(login, rig.begin, "fuzz", self._ended)
        self.connection.start(self.wire)

    def _ended(self, connection: Connection) -> None:
        self.losses += 1
        assert self.losses == 1, "a connection ended twice"

    def deliver(self, content: bytes) -> None:
        """Bytes arrive. What is not consumed waits for more, as in a stream."""
        self._rest += content
        if self.wire.ended or len(self._rest) < self._need:
            return
        size = len(self._rest)
        chunk = self._pool.take(size)
        chunk.view[:size] = self._rest
        consumed, self._need = self.connection.received(chunk, 0, size)
        assert 0 <= consumed <= size
        assert self._need <= MESSAGE_LIMIT_BYTES, f"waits for {self._need} bytes"
        self._rest = self._rest[consumed:]
        chunk.release()

    def lose(self) -> None:
        """The initiator is gone."""
        if not self.wire.closed:
            self.connection.lost(None)
        self.wire.close()


class Rig:
    """One target. Links come and go; its device and its pool stay."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.pool = CountingPool()
        self.device = Device(random, self.pool)
        self.description = TargetDescription(TARGET, "fuzz", 1, Access())
        self.sessions: dict[int, Session] = {}
        self._next_tsih = 1

    def admit(self, request: Request) -> int:
        """As the server does, as far as one initiator port has one session."""
        if request.tsih:
            raise LoginError(LoginStatus.NO_SESSION, "no such session")
        for session in list(self.sessions.values()):
            if (session.request.initiator_name, session.request.isid) == (request.initiator_name, request.isid):
                session.dropped("reinstated")
        self._next_tsih = self._next_tsih % 0xFFFF + 1
        return self._next_tsih

    def begin(self, connection: Connection, login: Login) -> Session:
        surroundings = Surroundings(
            device=self.device.server,
            pool=self.pool,
            portals=lambda: [("127.0.0.1:3260", 1)],
            target_name=TARGET,
            portal_group=1,
            reset_all=self._reset_all,
        )
        tsih = login.request.tsih

        def ended(session: Session) -> None:
            self.sessions.pop(tsih, None)
            connection.session_ended(session)

        session = Session(surroundings, login.request, connection.stream, "fuzz", ended)
        self.sessions[tsih] = session
        return session

    def _reset_all(self) -> None:
        for session in list(self.sessions.values()):
            session.dropped("cold reset")
