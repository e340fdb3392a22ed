"""Replication links over TCP: framing, the list of connections, dialling with back-off."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from blockrepl.block import Buffer
from blockrepl.chunks import Chunk, ChunkPool
from blockrepl.errors import BlockreplError, ProtocolError
from blockrepl.formats.link import BULK, HEADER_BYTES, Message, Refusal, decode_body, decode_header, encode
from blockrepl.formats.link import NO_EPOCH as NO_EPOCH
from blockrepl.stream import Stream

HELLO_TIMEOUT_S = 5.0
DIAL_TIMEOUT_S = 3.0
BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 1.0
SOCKET_BUFFER_BYTES = 4 << 20
BACKLOG = 128

log = logging.getLogger(__name__)


class Router(Protocol):
    """What a node does with what arrives."""

    def accepted(self, link: int, fields: dict[str, Any]) -> None:
        """HELLO on an incoming link."""

    def message(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> None:
        """A control message. Raises ProtocolError."""

    def bulk(self, link: int, kind: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        """A BATCH or RECORD; the record lies in ``chunk.view[start:end]``. Raises ProtocolError."""

    def lost(self, link: int) -> None:
        """The link is gone."""

    def settle(self) -> None:
        """Everything that had arrived is handled."""


class Connection:
    """One link: parses messages, queues what is sent until `settle`."""

    def __init__(self, owner: LinkTable, number: int, sock: socket.socket, *, greeted: bool) -> None:
        self.number = number
        self.greeted = greeted  # HELLO seen, or we dialled
        self.peer = _peer_name(sock)
        self._owner = owner
        self._queue: list[Buffer] = []
        self._chunks: list[Chunk] = []
        self.stream: Stream = owner.make_stream(sock, self, owner.pool)

    def received(self, chunk: Chunk, start: int, end: int) -> tuple[int, int]:
        """The hot loop of a node: parse every complete message."""
        view, router, at = chunk.view, self._owner.router, start
        need = 0
        try:
            while end - at >= HEADER_BYTES:
                head = decode_header(view[at : at + HEADER_BYTES])
                total = HEADER_BYTES + head.length_bytes
                if end - at < total:
                    need = total
                    break
                if head.type in BULK:
                    if not self.greeted:
                        raise ProtocolError(f"{Message(head.type).name} before HELLO")
                    router.bulk(self.number, head.type, head.epoch, chunk, at + HEADER_BYTES, at + total)
                else:
                    self._control(head.type, decode_body(head, view[at : at + total]), head.epoch)
                at += total
                if self.stream.closed:
                    break
        except BlockreplError as error:
            self._owner.break_off(self, error)
        router.settle()
        return at - start, need

    def _control(self, kind: int, fields: dict[str, Any], epoch: int) -> None:
        if kind == Message.HELLO:
            if self.greeted:
                raise ProtocolError("HELLO in mid-connection")
            self.greeted = True
            self._owner.router.accepted(self.number, fields)
        elif not self.greeted:
            raise ProtocolError(f"{Message(kind).name} before HELLO")
        else:
            self._owner.router.message(self.number, kind, fields, epoch)

    def lost(self, error: OSError | None) -> None:
        """The stream ended."""
        self._owner.gone(self, str(error or "the peer closed"))
        self._owner.router.settle()

    def drained(self) -> None:
        """All output was taken."""
        self._owner.router.settle()

    def queue(self, buffers: Sequence[Buffer], chunk: Chunk | None) -> None:
        """Send at the next `push`."""
        self._queue += buffers
        if chunk is not None:
            self._chunks.append(chunk)

    def push(self) -> None:
        """Hand over what is queued: one system call."""
        if self._queue:
            queue, chunks = self._queue, self._chunks
            self._queue, self._chunks = [], []
            self.stream.send(queue, None if not chunks else _Together(chunks))

    def drop(self) -> None:
        """Forget what is queued."""
        for chunk in self._chunks:
            chunk.release()
        self._queue, self._chunks = [], []


class _Together(Chunk):
    """Several chunks released as one, when the last byte of a gathered send is taken."""

    __slots__ = ("chunks",)

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks

    def release(self) -> None:
        for chunk in self.chunks:
            chunk.release()


class LinkTable:
    """All links of a node; implements `ports.Links`."""

    def __init__(self, pool: ChunkPool) -> None:
        self.pool = pool
        self.router: Router
        self.make_stream: Callable[[Any, Any, ChunkPool], Any] = Stream  # the simulator has its own
        self._connections: dict[int, Connection] = {}
        self._next = 1
        self._touched: dict[Connection, None] = {}  # in order: a run of the simulator can be repeated

    def add(self, sock: socket.socket, *, greeted: bool) -> Connection:
        """Take over a connected socket."""
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        number, self._next = self._next, self._next + 1
        connection = Connection(self, number, sock, greeted=greeted)
        self._connections[number] = connection
        return connection

    def __contains__(self, link: int) -> bool:
        return link in self._connections

    def send(self, link: int, buffers: Sequence[Buffer], chunk: Chunk | None) -> None:
        """See `ports.Links`."""
        connection = self._connections.get(link)
        if connection is None:
            if chunk is not None:
                chunk.release()
            return
        connection.queue(buffers, chunk)
        self._touched[connection] = None

    def close(self, link: int, reason: str, last_words: bytes = b"") -> None:
        """See `ports.Links`."""
        connection = self._connections.get(link)
        if connection is None:
            return
        log.info("link %d to %s closed: %s", link, connection.peer, reason)
        if last_words:
            connection.push()
            connection.stream.send([last_words])
            self._forget(connection)
            connection.stream.finish()
        else:
            self._forget(connection)
            connection.stream.close()
        self.router.lost(link)

    def queued_bytes(self, link: int) -> int:
        """See `ports.Links`."""
        connection = self._connections.get(link)
        return connection.stream.queued_bytes if connection else 0

    def settle(self) -> None:
        """See `ports.Links`."""
        while self._touched:
            self._touched.popitem()[0].push()

    def break_off(self, connection: Connection, error: BlockreplError) -> None:
        """The peer broke the protocol: say so, close."""
        log.warning("link %d from %s: %s", connection.number, connection.peer, error)
        words = encode(
            Message.REFUSED, 0, code=Refusal.PROTOCOL, epoch=NO_EPOCH, promised=NO_EPOCH, text=str(error)[:1000]
        )
        self.close(connection.number, str(error), words)

    def gone(self, connection: Connection, reason: str) -> None:
        """The stream closed by itself."""
        if self._connections.get(connection.number) is connection:
            log.info("link %d to %s lost: %s", connection.number, connection.peer, reason)
            self._forget(connection)
            self.router.lost(connection.number)

    def _forget(self, connection: Connection) -> None:
        self._connections.pop(connection.number, None)
        self._touched.pop(connection, None)
        connection.drop()

    def close_all(self) -> None:
        """The node ends."""
        for number in list(self._connections):
            self.close(number, "the node stops")


class Listener:
    """Accepts links."""

    def __init__(self, links: LinkTable) -> None:
        self._links = links
        self._sock: socket.socket | None = None
        self._loop = asyncio.get_running_loop()

    def listen(self, host: str, port: int) -> int:
        """Bind and accept. Returns the port. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        self._sock = sock
        self._loop.add_reader(sock.fileno(), self._acceptable)
        return int(sock.getsockname()[1])

    def _acceptable(self) -> None:
        assert self._sock is not None
        try:
            sock, _ = self._sock.accept()
        except OSError:
            return
        connection = self._links.add(sock, greeted=False)
        self._loop.call_later(HELLO_TIMEOUT_S, self._check_greeted, connection)

    def _check_greeted(self, connection: Connection) -> None:
        if not connection.greeted and connection.number in self._links:
            self._links.close(connection.number, "no HELLO")

    def close(self) -> None:
        """Stop accepting."""
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None


async def dial(host: str, port: int) -> socket.socket:
    """Connect. Raises OSError (TimeoutError among them)."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = await loop.getaddrinfo(host, port, family=0 if not host[:1].isdigit() else family, type=socket.SOCK_STREAM)
    sock = socket.socket(found[0][0], socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        # Not wait_for: until Python 3.12 it forgets that it was cancelled, if the connection comes up at that moment.
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            await loop.sock_connect(sock, found[0][4])
    except BaseException:
        sock.close()
        raise
    return sock


class Dialler:
    """Keeps one outgoing link to a peer up, with back-off."""

    def __init__(
        self, links: LinkTable, host: str, port: int, connected: Callable[[int, bytes], None], what: str
    ) -> None:
        """``connected(link, nonce)`` is called when a connection is up."""
        self._links = links
        self._address = host, port
        self._connected = connected
        self._what = what
        self._link = 0
        self._down = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"dial {what}")

    def lost(self, link: int) -> None:
        """A link is gone; if it was ours, dial again."""
        if link == self._link:
            self._link = 0
            self._down.set()

    async def _run(self) -> None:
        backoff_s = BACKOFF_MIN_S
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock = await dial(*self._address)
            except OSError:
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)
                continue
            started_s = loop.time()
            self._down.clear()
            connection = self._links.add(sock, greeted=True)
            self._link = connection.number
            self._connected(connection.number, os.urandom(16))
            self._links.router.settle()
            await self._down.wait()
            if loop.time() - started_s > BACKOFF_MAX_S:
                backoff_s = BACKOFF_MIN_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)

    async def close(self) -> None:
        """Stop dialling."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def _peer_name(sock: socket.socket) -> str:
    try:
        name = sock.getpeername()
    except OSError:
        return "?"
    return f"{name[0]}:{name[1]}"
