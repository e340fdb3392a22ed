"""Simulated connections under the real `LinkTable`: ordered, with delays; they drop, stall and come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from blockrepl.block import Buffer
from blockrepl.chunks import Chunk, ChunkPool
from blockrepl.errors import BlockreplError
from blockrepl.node.links import Connection, LinkTable
from tests.sim.world import Violation

if TYPE_CHECKING:
    from tests.sim.process import Process
    from tests.sim.world import World

DIAL_TIMEOUT_S = 0.5
END = b""  # an orderly end; bytes of length 0 mark it


class PoisonPool(ChunkPool):
    """Chunks that nobody uses any more are overwritten at once: a view kept too long shows."""

    def give_back(self, chunk: Chunk) -> None:
        chunk.buffer[:] = b"\xdb" * len(chunk.buffer)


class SimSocket:
    """What `LinkTable.add` wants of a socket."""

    def __init__(self, connection: SimConnection, side: int) -> None:
        self.connection = connection
        self.side = side

    def setsockopt(self, *_: Any) -> None:
        """Nothing to set."""

    def getpeername(self) -> tuple[str, int]:
        """For log lines."""
        return self.connection.processes[1 - self.side].name, 0


class SimStream:
    """`stream.Stream` over a simulated connection."""

    def __init__(self, sock: SimSocket, consumer: Any, pool: ChunkPool) -> None:
        self.closed = False
        self._connection = sock.connection
        self._side = sock.side
        self._consumer = consumer
        self._pool = pool
        self._rest = b""
        self._closing = False
        sock.connection.streams[sock.side] = self

    @property
    def queued_bytes(self) -> int:
        """What the peer has not read."""
        return sum(map(len, self._connection.flying[self._side]))

    def send(self, buffers: Sequence[Buffer], chunk: Chunk | None = None) -> None:
        """As `Stream.send`: the kernel takes a copy."""
        if not self.closed and not self._closing:
            process, peer = self._connection.processes[self._side], self._connection.processes[1 - self._side]
            process.effect()
            data = b"".join(buffers)
            if process.world.on_message is not None:
                process.world.on_message(process, peer.name, data)
            self._connection.send(self._side, data)
        if chunk is not None:
            chunk.release()

    def deliver(self, data: bytes) -> None:
        """Bytes arrived."""
        if self.closed or self._closing:
            return
        data = self._rest + data
        chunk = self._pool.take(len(data))
        chunk.view[: len(data)] = data
        consumed, _ = self._consumer.received(chunk, 0, len(data))
        self._rest = data[consumed:]
        chunk.release()

    def ended(self) -> None:
        """The peer is gone."""
        if not self.closed:
            self.closed = True
            self._connection.gone(self._side)
            if not self._closing:
                self._consumer.lost(None)

    def pause(self) -> None:
        """Never used on links."""

    def finish(self) -> None:
        """Send what is queued, then close."""
        if not self.closed:
            self._closing = self.closed = True
            self._connection.finish(self._side)

    def close(self) -> None:
        """Drop what is queued, close."""
        if not self.closed:
            self.closed = True
            self._connection.close(self._side)


class SimConnection:
    """Two directions; ``flying[side]`` was sent by that side."""

    def __init__(self, network: Network, dialler: Process, listener: Process) -> None:
        self.network = network
        self.world = network.world
        self.processes = (dialler, listener)
        self.lives = (dialler.life, listener.life)
        self.streams: list[SimStream | None] = [None, None]
        self.flying: tuple[deque[bytes], deque[bytes]] = (deque(), deque())
        self._due_s = [0.0, 0.0]
        self._stalled = [False, False]  # by a cut
        self.held_until_s = [0.0, 0.0]  # this connection alone: a segment was lost, and is sent again much later

    def send(self, side: int, data: bytes) -> None:
        """Some pieces, in order."""
        random = self.world.random
        pieces = [data]
        if len(data) > 1 and random.random() < 0.15:
            cut = random.randrange(1, len(data))
            pieces = [data[:cut], data[cut:]]
        pieces += self.network.late(self.processes[side].name, self.processes[1 - side].name, data)
        for piece in pieces:
            self._put(side, piece)

    def _put(self, side: int, piece: bytes) -> None:
        self.flying[side].append(piece)
        self._schedule(side)

    def _schedule(self, side: int) -> None:
        random = self.world.random
        delay = random.choice([0.0002, 0.001, 0.004]) if random.random() < 0.97 else random.uniform(0, 0.1)
        due_s = max(self._due_s[side], self.world.now_s + delay, self.held_until_s[side])
        self._due_s[side] = due_s
        self.world.after(due_s - self.world.now_s, lambda: self._arrive(side))

    def _alive(self, side: int) -> bool:
        return self.processes[side].life == self.lives[side] and self.processes[side].alive

    def _arrive(self, side: int) -> None:
        """The first of what ``side`` sent is there."""
        flying = self.flying[side]
        if not flying:
            return
        if self.held_until_s[side] > self.world.now_s:
            self.world.after(self.held_until_s[side] - self.world.now_s, lambda: self._arrive(side))
            return
        sender, receiver = self.processes[side], self.processes[1 - side]
        if self.network.is_cut(sender.name, receiver.name):
            self._stalled[side] = True
            return
        if receiver.paused_until_s > self.world.now_s:
            self.world.after(receiver.paused_until_s - self.world.now_s, lambda: self._arrive(side))
            return
        piece = flying.popleft()
        stream = self.streams[1 - side]
        if not self._alive(1 - side) or stream is None or stream.closed:
            if receiver.machine.powered and piece:
                self.world.after(0.001, lambda: self._reset(side))
            return
        self.world.enter(receiver, lambda: stream.deliver(piece) if piece else stream.ended())

    def _reset(self, side: int) -> None:
        stream, process = self.streams[side], self.processes[side]
        if self._alive(side) and stream is not None and not stream.closed:
            if process.paused_until_s > self.world.now_s:
                self.world.after(process.paused_until_s - self.world.now_s, lambda: self._reset(side))
            else:
                self.world.enter(process, stream.ended)

    def healed(self) -> None:
        """The network works again: what was sent is sent again."""
        for side in (0, 1):
            if self._stalled[side]:
                self._stalled[side] = False
                for _ in range(len(self.flying[side])):
                    self._schedule(side)

    def finish(self, side: int) -> None:
        """This side closes after what it sent."""
        self.flying[1 - side].clear()
        self._put(side, END)

    def close(self, side: int) -> None:
        """This side closes: what is under way may arrive or not; what it did not read is gone."""
        self.flying[1 - side].clear()
        flying = self.flying[side]
        keep = self.world.random.choice([0, len(flying), self.world.random.randint(0, len(flying))])
        keep = len(flying) if self.held_until_s[side] > self.world.now_s else keep
        while len(flying) > keep:
            flying.pop()
        self._put(side, END)

    def gone(self, side: int) -> None:
        """This side saw the end."""
        self.flying[side].clear()
        self.flying[1 - side].clear()

    def vanish(self, side: int) -> None:
        """The machine of this side lost power: silence."""
        self.flying[side].clear()
        self.flying[1 - side].clear()
        stream = self.streams[side]
        if stream is not None:
            stream.closed = True

    def drop(self) -> None:
        """Both ends see the connection break."""
        for side in (0, 1):
            stream = self.streams[side]
            if self._alive(side) and stream is not None and not stream.closed:
                self.flying[side].clear()
                self.world.after(
                    self.world.random.uniform(0, 0.02),
                    lambda side=side: self._reset(side),  # type: ignore[misc]
                )


class SimLinkTable(LinkTable):
    """The real table of links over simulated sockets."""

    def __init__(self, process: Process) -> None:
        super().__init__(PoisonPool(1 << 12))
        self.process = process
        self.make_stream = SimStream

    def break_off(self, connection: Connection, error: BlockreplError) -> None:
        """Where the run is strict, whoever finds its peer at fault has found a bug, unless messages came twice."""
        process = self.process
        if process.network.strict and not process.network.repeated:
            raise Violation(f"{process.name} finds its peer {connection.peer} at fault: {error}")
        super().break_off(connection, error)


class Network:
    """Who may talk to whom. ``duplicate``: how often a message comes again, on its connection or a later one."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.processes: dict[str, Process] = {}
        self.connections: list[SimConnection] = []
        self.duplicate = 0.0
        self.repeated = False  # a message came twice
        self.strict = False  # what closes a link and heals itself is a violation too
        self.late_dials: dict[str, float] = {}  # by process: what it sends on its next connection comes so late
        self._cuts: dict[tuple[str, str], int] = {}  # from, to
        self._old: dict[tuple[str, str], list[bytes]] = {}

    def late(self, sender: str, receiver: str, data: bytes) -> list[bytes]:
        """What comes a second time behind a message (invariant 9)."""
        random, old = self.world.random, self._old.setdefault((sender, receiver), [])
        if random.random() < self.duplicate:
            old.append(data)
        if not old or random.random() >= self.duplicate:
            return []
        self.repeated = True
        return [random.choice(old)]

    def is_cut(self, sender: str, receiver: str) -> bool:
        """Whether nothing passes from one machine to another."""
        return sender != receiver and bool(self._cuts.get((sender, receiver)))

    def cut(self, one: str, other: str, *, both: bool = True) -> None:
        """Nothing passes any more; with ``both`` False only what ``one`` sends is lost."""
        for key in self._ways(one, other, both):
            self._cuts[key] = self._cuts.get(key, 0) + 1

    def heal(self, one: str, other: str, *, both: bool = True) -> None:
        """One cut less."""
        for key in self._ways(one, other, both):
            self._cuts[key] = max(0, self._cuts.get(key, 0) - 1)
        self._wake()

    @staticmethod
    def _ways(one: str, other: str, both: bool) -> list[tuple[str, str]]:
        return [(one, other), (other, one)] if both else [(one, other)]

    def heal_all(self) -> None:
        """Everything passes, once."""
        self._cuts.clear()
        self._old.clear()
        self.late_dials.clear()
        self.duplicate = 0.0
        self._wake()

    def _wake(self) -> None:
        for connection in self.connections:
            connection.healed()

    def dial(self, dialler: Process, name: str, done: Callable[[SimSocket | None], None]) -> None:
        """Connect to a process; ``done(None)`` when that fails."""
        random = self.world.random
        self.world.after(random.uniform(0.0002, 0.005), lambda: self._dialled(dialler, dialler.life, name, done))

    def _dialled(self, dialler: Process, life: int, name: str, done: Callable[[SimSocket | None], None]) -> None:
        if dialler.life != life or not dialler.alive:
            return
        listener = self.processes.get(name)
        silent = self.is_cut(dialler.name, name) or self.is_cut(name, dialler.name)
        if listener is None or silent or not listener.machine.powered:
            self.world.after(DIAL_TIMEOUT_S, lambda: done(None), dialler)
        elif not listener.listening:
            self.world.after(0.001, lambda: done(None), dialler)
        else:
            self.connections = [each for each in self.connections if not self._over(each)]
            connection = SimConnection(self, dialler, listener)
            self.connections.append(connection)
            connection.held_until_s[0] = self.world.now_s + self.late_dials.pop(dialler.name, 0.0)
            wait_s = max(0.0, listener.paused_until_s - self.world.now_s)  # the kernel takes it in the meantime
            self.world.after(wait_s, lambda: listener.take(SimSocket(connection, 1)), listener)
            self.world.after(0.001, lambda: done(SimSocket(connection, 0)), dialler)

    @staticmethod
    def _over(connection: SimConnection) -> bool:
        return all(stream is not None and stream.closed for stream in connection.streams)
