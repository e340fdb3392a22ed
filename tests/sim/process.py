"""The processes of a group in the simulator: as `node` has them, without asyncio. They recover, dial, listen, tick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Message, Pair
from blockrepl.formats.record import RecordHead, decode_record
from blockrepl.formats.slots import SlotKind
from blockrepl.formats.state import (
    IntermediateState,
    SecondaryState,
    decode_intermediate,
    decode_primary,
    decode_secondary,
    encode_intermediate,
    encode_primary,
)
from blockrepl.node.host import Host
from blockrepl.node.intermediate_host import IntermediateHost
from blockrepl.node.intermediate_volumes import IntermediateVolumes
from blockrepl.node.journal_reading import JournalReading
from blockrepl.node.opener_run import Opener as OpenerRole
from blockrepl.node.own_images import settle_mode
from blockrepl.node.primary_host import PrimaryHost, PrimaryVolume
from blockrepl.node.secondary_host import SecondaryHost
from blockrepl.replication.actions import Action, Close, Event, Send, SyncVolumes
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.policy import Policy
from blockrepl.replication.primary import Phase as PrimaryPhase
from blockrepl.replication.primary import Primary
from blockrepl.replication.secondary import Secondary
from blockrepl.replication.takeover import Takeover
from blockrepl.storage.journal import Journal
from blockrepl.storage.recovery import Recovered, recover
from blockrepl.storage.slots import Identity, Slots
from tests.sim.bits import SimBitmaps
from tests.sim.disk import SimDisk, SimFile, SimImage, SimJournalFile, SimSlotFile, SimUndoFile
from tests.sim.network import Network, SimLinkTable, SimSocket
from tests.sim.world import GROUP, Killed, Machine, Violation, World

BLOCK = 512
UNDO_BLOCK = 4096  # of the undo file
UNDO_FILE_BYTES = 1 << 20
TICK_S = 0.02
REFORM_GRACE_S = 2.0  # as `node.intermediate_node`
HELLO_TIMEOUT_S = 1.0
HEADS = frozenset({"state", "journal", "bits", "hop2", "split"})


@dataclass
class Layout:
    """A group: node ids by name, and for each volume its primary, secondary and size."""

    primaries: dict[str, int]
    intermediate: tuple[str, int]
    secondaries: dict[str, int]
    volumes: dict[int, tuple[str, str, int]]
    ring_bytes: int
    secondary_ring_bytes: int
    policy: Policy
    volumes_mode: bool = False  # at the beginning

    @property
    def names(self) -> dict[int, str]:
        """Node id → name."""
        name, number = self.intermediate
        return {number: name} | {n: each for each, n in (self.primaries | self.secondaries).items()}

    def sources(self, direction: int) -> dict[str, int]:
        """The nodes that are copied from; 1 for swapped sites. As `Definition.sources`."""
        return self.secondaries if direction else self.primaries

    def targets(self, direction: int) -> dict[str, int]:
        """The nodes that are copied to."""
        return self.sources(1 - direction)

    def owners(self, direction: int) -> dict[int, int]:
        """Volume → its source."""
        ids = self.primaries | self.secondaries
        return {volume: ids[ends[:2][direction]] for volume, ends in self.volumes.items()}

    def homes(self, direction: int) -> dict[int, int]:
        """Volume → its target."""
        return self.owners(1 - direction)


class Watcher:
    """What an oracle wants to hear; `tests.sim.oracle` is one."""

    def appended(self, process: IntermediateProcess, head: RecordHead, record: memoryview) -> None:
        """The intermediate gave numbers."""

    def submitted(self, process: Any, batch: Any, incarnation: int, number: int) -> None:
        """A primary gave a host's batch its batch number."""

    def sent(self, process: Process, kind: int, link: int, action: Send) -> None:
        """A control message goes out."""

    def received(self, process: Process, kind: int, fields: dict[str, Any]) -> None:
        """A control message came in."""

    def recovered(self, process: Process, heads: list[RecordHead], role: Any) -> None:
        """A process has read its journal, and its role knows."""

    def activated(self, process: Any) -> None:
        """A secondary became active."""

    def reformed(self, process: Process, number: int) -> None:
        """An intermediate has forgotten its journal: the group is formed anew above a number."""

    def taken_alone(self, batch: Any) -> None:
        """A primary completes a host's batch without the group."""

    def became_target(self, process: Any) -> None:
        """A data node is durably a target of the group that was formed anew, and has applied nothing of it."""

    def stays_source(self, process: Any, epoch: int) -> None:
        """A data node is durably a source of the group that was formed anew."""

    def rejoining(self, process: Any, resync: int) -> None:
        """A suspended primary takes part in a resync, and is about to sync its P-VOLs for it.

        What it took alone is stored in them by now; until its state says so nothing else is.
        """

    def storing(self, process: Any, batch: Any, volume: int) -> None:
        """A primary is about to store a host's batch in its P-VOL."""

    def event(self, process: Process, text: str) -> None:
        """A role's event."""

    def power_lost(self, process: Process) -> None:
        """A machine has lost what was not synced."""


class SimWorkers:
    """`ports.Workers` of one life of a process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._random = process.world.random

    def run(self, function: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        """The call and its answer, each some time later."""

        def work() -> None:
            result, error = None, None
            try:
                result = function()
            except Exception as caught:
                error = caught
            self._process.later(self._random.choice([0.0002, 0.003]), lambda: done(result, error))

        self._process.later(self._random.choice([0.0, 0.001, 0.008]), work)

    def later(self, function: Callable[[], None]) -> None:
        """After what waits."""
        self._process.later(0.0, function)


class Process:
    """One node, alive or not. ``life`` counts its processes: what was meant for an older one never happens."""

    settles = True  # what is recovered is written again and synced, as `JournalFile.open` does; a planted bug

    def __init__(self, world: World, network: Network, layout: Layout, name: str, node_id: int) -> None:
        self.world = world
        self.network = network
        self.layout = layout
        self.name = name
        self.node_id = node_id
        self.machine = Machine(world, name)
        self.watcher = Watcher()
        self.life = 0
        self.alive = False
        self.listening = False
        self.kill_in = 0  # effects until it dies; 0 for never
        self.paused_until_s = 0.0  # SIGSTOP: nothing happens in it until then
        self.links: SimLinkTable
        self.disk: SimDisk
        network.processes[name] = self
        self.host: Any = None
        self._heads: dict[str, SimFile] = {}

    # life

    def boot(self) -> None:
        """Start a process, unless one runs or there is no power."""
        if self.alive or not self.machine.powered:
            return
        self.life += 1
        self.alive = True
        self.kill_in, self.paused_until_s = 0, 0.0
        self.world.say(self.name, "starts")
        self.links = SimLinkTable(self)
        self.links.router = self
        self.disk = SimDisk(self)
        self.workers = SimWorkers(self)
        try:
            self.host = self.open()
            self.world.after(TICK_S, self._tick, self)
            self.start()
        except Killed:
            self.crash("while starting")
        except OSError as error:
            self.crash(f"cannot start: {error}")

    def open(self) -> Host:
        """Recover; return the host."""
        raise NotImplementedError

    def start(self) -> None:
        """Listen and dial."""
        raise NotImplementedError

    def crash(self, why: str = "killed") -> None:
        """kill -9: the page cache stays; the kernel closes the links."""
        if not self.alive:
            return
        self.world.say(self.name, f"dies, {why}")
        self.alive = self.listening = False
        for connection in self.network.connections:
            for side in (0, 1):
                if connection.processes[side] is self and connection.lives[side] == self.life:
                    stream = connection.streams[side]
                    if stream is None or not stream.closed:
                        connection.close(side)
                        if stream is not None:
                            stream.closed = True
        self.life += 1

    def cut_power(self) -> None:
        """The machine loses power; `power_on` and `boot` come later."""
        self.world.say(self.name, "loses power")
        for connection in self.network.connections:
            for side in (0, 1):
                if connection.processes[side] is self:
                    connection.vanish(side)
        self.alive = self.listening = False
        self.life += 1
        self.machine.powered = False
        self.machine.cut_power()
        self.watcher.power_lost(self)

    def power_on(self) -> None:
        """Power is back."""
        self.machine.powered = True

    def effect(self) -> None:
        """Something others can see happens next; the process may die before it."""
        if self.kill_in:
            self.kill_in -= 1
            if not self.kill_in:
                raise Killed

    def later(self, delay_s: float, what: Callable[[], None]) -> None:
        """Unless the process dies."""
        self.world.after(delay_s, what, self)

    def _tick(self) -> None:
        self.later(TICK_S, self._tick)
        self.host.tick()

    # port: log

    def log(self, text: str, fields: dict[str, object]) -> None:
        """See `ports.Log`."""
        self.world.say(self.name, text)
        self.watcher.event(self, text)

    # links

    def take(self, sock: SimSocket) -> None:
        """Accept a connection."""
        connection = self.links.add(sock, greeted=False)  # type: ignore[arg-type]

        def check() -> None:
            if not connection.greeted and connection.number in self.links:
                self.links.close(connection.number, "no HELLO")

        self.later(HELLO_TIMEOUT_S, check)

    def dial(self, peer: str, connected: Callable[[int, bytes], None]) -> None:
        """Connect and stay connected; see `links.Dialler`."""
        dialler = SimDialler(self, peer, connected)
        self.diallers.append(dialler)
        dialler.again()

    @property
    def diallers(self) -> list[SimDialler]:
        """Of this life."""
        if not hasattr(self.links, "diallers"):
            self.links.diallers = []  # type: ignore[attr-defined]
        found: list[SimDialler] = self.links.diallers  # type: ignore[attr-defined]
        return found

    def accepted(self, link: int, fields: dict[str, Any]) -> None:
        """See `links.Router`."""
        self.watcher.received(self, Message.HELLO, fields)
        self.host.perform(self.host.role.accepted(link, fields, self.machine.clock.now_s()))

    def message(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> None:
        """See `links.Router`."""
        self.watcher.received(self, kind, fields)
        self.host.perform(self.host.role.received(link, kind, fields, self.machine.clock.now_s()))

    def bulk(self, link: int, kind: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        """See `links.Router`."""
        raise NotImplementedError

    def lost(self, link: int) -> None:
        """See `links.Router`."""
        self.host.lost(link)
        for dialler in self.diallers:
            dialler.lost(link)

    def settle(self) -> None:
        """See `links.Router`."""
        self.host.settle()

    # files

    @property
    def heads(self) -> dict[str, SimFile]:
        """The files that say where it is: state, superblock and bits."""
        if not self._heads:
            self._heads = {name: file for name, file in self.machine.files.items() if name.split()[0] in HEADS}
        return self._heads

    def format(self) -> None:
        """`create`: make the machine's files."""
        raise NotImplementedError

    def _format_journal(self, ring_bytes: int, state: bytes) -> None:
        identity = Identity(GROUP, self.node_id, SlotKind.JOURNAL)
        journal = Journal.format(identity, ring_bytes, self.world.random.getrandbits(32))
        file = self.machine.files["journal"] = SimFile(journal.file_bytes)
        offset, buffers = journal.superblock(state)
        file.write(offset, b"".join(buffers))
        file.sync()

    def _open_journal(self, check: Callable[[Any, memoryview], bool], ring_bytes: int) -> SimJournalFile:
        file = self.machine.files["journal"]
        recovered = recover(file.read, check, Identity(GROUP, self.node_id, SlotKind.JOURNAL), ring_bytes)
        if self.settles:
            self.settle_journal(recovered, file)
        recovered.journal.synced(recovered.journal.tail)
        journal = SimJournalFile(Path("journal"), file.fd, self.disk, recovered)
        journal.file, journal.process = file, self
        if self.world.random.random() < 0.5:
            journal.inline_bytes = -1  # every commit goes through the thread
        return journal

    def settle_journal(self, recovered: Recovered, file: SimFile) -> None:
        """What was recovered is written again, what was cut is erased, all is synced; see `JournalFile.open`."""
        for offset, buffers in recovered.writes:
            self.effect()
            file.write(offset, b"".join(buffers))
        file.sync()


class SimDialler:
    """Keeps one outgoing link up, with back-off."""

    def __init__(self, process: Process, peer: str, connected: Callable[[int, bytes], None]) -> None:
        self._process = process
        self._peer = peer
        self._connected = connected
        self._link = 0
        self._closed = False

    def again(self) -> None:
        """Dial."""
        if not self._closed:
            self._process.network.dial(self._process, self._peer, self._dialled)

    def close(self) -> None:
        """Dial no more."""
        self._closed = True
        if self._link:
            link, self._link = self._link, 0
            self._process.links.close(link, "not dialled any more")

    def _dialled(self, sock: SimSocket | None) -> None:
        process = self._process
        if sock is not None and self._closed:
            sock.connection.close(sock.side)
            sock.connection.streams[sock.side] = None
            return
        if sock is None:
            process.later(process.world.random.uniform(0.01, 0.2), self.again)
            return
        self._link = process.links.add(sock, greeted=True).number  # type: ignore[arg-type]
        self._connected(self._link, process.world.random.randbytes(16))
        process.settle()

    def lost(self, link: int) -> None:
        """If it was ours, dial again."""
        if link == self._link:
            self._link = 0
            self._process.later(self._process.world.random.uniform(0.005, 0.1), self.again)


class WatchedPrimaryHost(PrimaryHost):
    """Tells the oracle of every store."""

    process: Process

    def _store_batch(self, action: Any) -> None:
        self.process.watcher.storing(self.process, action.batch, action.volume)
        super()._store_batch(action)


def watch_primary(process: Process, role: Primary) -> None:
    """Tell the oracle what becomes of hosts' batches."""
    add, write = role.queue.add, role.suspension.write

    def note(record: Any) -> None:
        process.watcher.submitted(process, record.batch, role.state.incarnation, record.number)
        add(record)

    def alone(volume: int, batch: Any, *, report: bool = True) -> list[Action]:
        if role.rejoining or role.resyncing.begins:
            raise Violation(f"17: {process.name} takes a write alone, and RESYNC has come")
        process.watcher.taken_alone(batch)
        return write(volume, batch, report=report)

    def sync_volumes(then: Callable[[float], list[Action]]) -> SyncVolumes:
        preparing = role.resyncing._preparing
        if role.rejoining and role.state.suspended and preparing is not None:  # else it is a checkpoint's
            process.watcher.rejoining(process, preparing["id"])
        return Primary.sync_volumes(role, then)

    role.queue.add = note  # type: ignore[method-assign]
    role.suspension.write = alone  # type: ignore[method-assign]
    role.sync_volumes = sync_volumes  # type: ignore[method-assign]


class PrimaryProcess(Process):
    """As `node.source`."""

    host: PrimaryHost

    def format(self) -> None:
        slots = Slots(Identity(GROUP, self.node_id, SlotKind.STATE))
        file = self.machine.files["state"] = SimFile(32 << 10)
        from blockrepl.formats.state import PrimaryState

        file.write(*slots.encode(encode_primary(PrimaryState())))
        file.sync()
        for volume, (primary, _, size) in self.layout.volumes.items():
            if primary == self.name:
                self.machine.files[f"volume {volume}"] = SimFile(size)
        SimBitmaps.make(self, "bits", self._sizes)

    @property
    def _sizes(self) -> dict[int, int]:
        return {volume: self.layout.volumes[volume][2] for volume in self.volume_ids}

    @property
    def volume_ids(self) -> list[int]:
        """Its P-VOLs."""
        return [volume for volume, (primary, _, _) in self.layout.volumes.items() if primary == self.name]

    def open(self) -> PrimaryHost:
        file = self.machine.files["state"]
        slots, payload = Slots.load(file.read(0, 32 << 10), Identity(GROUP, self.node_id, SlotKind.STATE))
        file.write(*slots.again(payload))
        file.sync()
        state_file = SimSlotFile(Path("state"), file.fd, slots, payload)
        state_file.file = file
        state = decode_primary(payload)
        state.incarnation += 1
        clean, state.clean = state.clean, False
        self.effect()
        state_file.save_now(encode_primary(state))
        layout = self.layout
        bits = SimBitmaps(self, "bits", self._sizes)
        role = Primary(
            group=GROUP, node=self.node_id, name=self.name, intermediate=layout.intermediate[1],
            streams={v: layout.secondaries[layout.volumes[v][1]] for v in self.volume_ids},
            state=state, policy=layout.policy, bitmaps=bits.bitmaps, clean=clean,
        )  # fmt: skip
        self.watcher.recovered(self, [], role)
        images = {v: SimImage(self.machine.files[f"volume {v}"], self) for v in self.volume_ids}
        watch_primary(self, role)
        save = partial(state_file.save, self.disk)  # type: ignore[arg-type]
        host = WatchedPrimaryHost(
            role, images, save, bits.save, self.disk, self.links, self.machine.clock, self.workers, self.log
        )  # fmt: skip
        host.process = self
        bits.on_failed = lambda error: host.fail(str(error))
        state_file.on_failed = lambda error: host.fail(str(error))
        self.volumes = {v: PrimaryVolume(host, v, str(v), images[v], BLOCK, 1 << 16) for v in self.volume_ids}
        return host

    def start(self) -> None:
        self.dial(self.layout.intermediate[0], self._connected)

    def _connected(self, link: int, nonce: bytes) -> None:
        self.host.perform(self.host.role.connected(link, nonce, self.machine.clock.now_s()))

    def bulk(self, link: int, kind: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        if kind != Message.RECORD:
            raise ProtocolError("BATCH does not belong on a primary's link")
        view = chunk.view[start:end]
        self.host.record(link, decode_record(view), view)

    @property
    def primary(self) -> PrimaryHost:
        """What serves hosts."""
        return self.host

    @property
    def failed(self) -> bool:
        """It stopped after a disk error."""
        return self.alive and self.host.role.phase is PrimaryPhase.FAILED


class WatchedIntermediateHost(IntermediateHost):
    """Tells the oracle of every record."""

    process: IntermediateProcess

    def _append(self, action: Any) -> None:
        self.process.watcher.appended(self.process, action.head, action.record)
        super()._append(action)

    def _send(self, action: Send) -> None:
        self.process.watcher.sent(self.process, bytes(action.buffers[0])[4], action.link, action)
        super()._send(action)


class IntermediateProcess(Process):
    """As `node.intermediate_node`."""

    host: IntermediateHost
    alone = False
    _reforms_at_s: float | None = None
    changes_mode = False  # the operator wants the other mode: when it starts, unless a resync is under way

    def format(self) -> None:
        mode = self.layout.volumes_mode
        state = IntermediateState(volumes=mode, filled=mode)
        self._format_journal(self.layout.ring_bytes, encode_intermediate(state))
        for volume, size in self._sizes.items():
            self.machine.files[f"volume {volume}"] = SimFile(size)
        SimBitmaps.make(self, "hop2", self._sizes)

    @property
    def _sizes(self) -> dict[int, int]:
        return {volume: size for volume, (_, _, size) in self.layout.volumes.items()}

    def open(self) -> IntermediateHost:
        reading = JournalReading()
        journal = self._open_journal(reading.check, self.layout.ring_bytes)
        state = decode_intermediate(journal.recovered.state)
        state.incarnation += 1
        if state.pair == Pair.COPY:
            self.changes_mode = False
        settle_mode(state, kept=state.volumes != self.changes_mode, younger=False)
        self.changes_mode = False
        self._reforms_at_s = None
        self._bits = SimBitmaps(self, "hop2", self._sizes)
        role = self._role(state, alone=self.alone)
        reading.tell_intermediate(role)
        self.watcher.recovered(self, reading.heads, role)
        host = self._host(role, journal)
        if host.volumes is not None:
            host.volumes.recover()
        return host

    def _role(self, state: IntermediateState, *, alone: bool = False) -> Intermediate:
        layout, random = self.layout, self.world.random
        return Intermediate(
            group=GROUP, node=self.node_id, name=self.name, primaries=list(layout.sources(state.direction).values()),
            secondaries=list(layout.targets(state.direction).values()), state=state, policy=layout.policy,
            new_id=lambda: random.randbytes(16), alone=alone, bitmaps=self._bits.bitmaps,
            owners=layout.owners(state.direction), homes=layout.homes(state.direction), local_source=state.volumes,
            names=layout.names,
        )  # fmt: skip

    def _host(self, role: Intermediate, journal: SimJournalFile) -> IntermediateHost:
        volumes = None
        if role.state.volumes:
            images = {v: SimImage(self.machine.files[f"volume {v}"], self) for v in self._sizes}
            volumes = IntermediateVolumes(role, journal, images, self.disk, self.machine.clock, self.workers)
        host = WatchedIntermediateHost(
            role, journal, self._bits.save, self.links, self.machine.clock, self.workers, self.log, volumes,
            spills=self.machine.spills,
        )  # fmt: skip
        self._bits.on_failed = lambda error: host.fail(str(error))
        host.process = self
        host.on_reformed = self._reformed
        return host

    def _reformed(self) -> None:
        """As the node: when the opener has hung up, or soon, other peers are dialled and let in."""
        self.watcher.reformed(self, self.host.role.numbered)
        self._reforms_at_s = self.machine.clock.now_s() + REFORM_GRACE_S

    def _tick(self) -> None:
        if self._reforms_at_s is None:
            super()._tick()
            return
        self.later(TICK_S, self._tick)
        if not self.host.role.opener_link or self.machine.clock.now_s() >= self._reforms_at_s:
            self._rebuild()

    def _rebuild(self) -> None:
        """Role and host anew, from the state that was stored; every link is made again."""
        self._reforms_at_s = None
        old = self.host
        for dialler in self.diallers:
            dialler.close()
        self.diallers.clear()
        self.links.close_all()
        role = self._role(decode_intermediate(encode_intermediate(old.role.durable_state())))
        role.start()
        self.host = self._host(role, old.journal)  # type: ignore[arg-type]
        self._dial()

    def start(self) -> None:
        self.host.journal.save(encode_intermediate(self.host.role.durable_state()), done=self._open_links)

    def _open_links(self) -> None:
        self.listening = True
        self._dial()

    def _dial(self) -> None:
        for name, number in self.layout.targets(self.host.role.state.direction).items():
            self.dial(name, partial(self._connected, number))

    def _connected(self, node: int, link: int, nonce: bytes) -> None:
        self.host.perform(self.host.role.connected(link, node, nonce, self.machine.clock.now_s()))

    def bulk(self, link: int, kind: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        if kind != Message.BATCH:
            raise ProtocolError("RECORD does not belong on a link to the intermediate")
        self.host.batch(link, chunk, start, end)


class WatchedSecondaryHost(SecondaryHost):
    """Tells the oracle what it answers."""

    process: SecondaryProcess

    def _send(self, action: Send) -> None:
        self.process.watcher.sent(self.process, bytes(action.buffers[0])[4], action.link, action)
        super()._send(action)


class SecondaryProcess(Process):
    """As `node.target`, with takeovers as `node.data_node` runs them."""

    host: SecondaryHost
    opener: Opener | None = None

    def format(self) -> None:
        from blockrepl.formats.state import encode_secondary

        self._format_journal(self.layout.secondary_ring_bytes, encode_secondary(SecondaryState()))
        for volume, (_, secondary, size) in self.layout.volumes.items():
            if secondary == self.name:
                self.machine.files[f"volume {volume}"] = SimFile(size)
        self.machine.files["undo"] = SimFile(UNDO_FILE_BYTES)
        SimBitmaps.make(self, "split", self._own_sizes)

    @property
    def _own_sizes(self) -> dict[int, int]:
        return {volume: self.layout.volumes[volume][2] for volume in self.volume_ids}

    def _open_undo(self, state: SecondaryState) -> SimUndoFile:
        sizes = self._own_sizes
        file = self.machine.files["undo"]
        undo = SimUndoFile(Path("undo"), file.fd, self.disk, GROUP, self.node_id, sizes, UNDO_BLOCK)  # type: ignore[arg-type]
        undo.file, undo.process = file, self
        undo.recover(state.start if state.copying and not state.initial else None)
        return undo

    @property
    def volume_ids(self) -> list[int]:
        """Its S-VOLs."""
        return [volume for volume, (_, secondary, _) in self.layout.volumes.items() if secondary == self.name]

    def open(self) -> SecondaryHost:
        self.opener = None
        reading = JournalReading()
        journal = self._open_journal(reading.check, self.layout.secondary_ring_bytes)
        bits = SimBitmaps(self, "split", self._own_sizes)
        role = Secondary(
            group=GROUP, node=self.node_id, name=self.name, intermediate=self.layout.intermediate[1],
            peers=list(self.layout.secondaries.values()), state=decode_secondary(journal.recovered.state),
            policy=self.layout.policy, bitmaps=bits.bitmaps,
        )  # fmt: skip
        held = reading.tell_secondary(role, journal.journal)
        images = {v: SimImage(self.machine.files[f"volume {v}"], self) for v in self.volume_ids}
        undo = self._open_undo(role.state)
        host = WatchedSecondaryHost(
            role, journal, held, images, undo, self.disk, self.links, self.machine.clock, self.workers, self.log,
            bits.save,
        )  # fmt: skip
        bits.on_failed = lambda error: host.fail(str(error))
        host.process = self
        host.on_active = lambda: self.watcher.activated(self)
        self.watcher.recovered(self, reading.heads, role)
        return host

    def start(self) -> None:
        self.listening = True
        self.host.start()

    def message(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> None:
        if self.opener is not None and link in self.opener.own:
            self.opener.perform(self.opener.role.received(link, kind, fields, self.machine.clock.now_s()))
            return
        self.watcher.received(self, kind, fields)
        self.host.perform(self.host.role.received_message(link, kind, fields, epoch, self.machine.clock.now_s()))

    def bulk(self, link: int, kind: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        if kind != Message.RECORD:
            raise ProtocolError("BATCH does not belong on hop 2")
        self.host.record(link, epoch, chunk, start, end)

    def lost(self, link: int) -> None:
        if self.opener is not None and link in self.opener.own:
            self.opener.own.discard(link)
            self.opener.perform(self.opener.role.lost(link, self.machine.clock.now_s()))
        else:
            self.host.lost(link)

    def take_over(
        self, done: Callable[[Takeover], None], *, dry_run: bool = False, force: bool = False, patience_s: float = 3.0
    ) -> None:
        """The operator's command. ``done`` is not called when the process dies."""
        if self.alive and self.opener is None:
            role = takeover_of(self, self.layout.secondaries, dry_run=dry_run, force=force, patience_s=patience_s)
            self.world.say(self.name, f"takeover begins, dry_run={dry_run}, force={force}")
            self.opener = Opener(self, role, lambda: done(role))


def takeover_of(
    process: Process,
    members: dict[str, int],
    *,
    dry_run: bool,
    force: bool,
    patience_s: float = 3.0,
    planned: bool = False,
) -> Takeover:
    """As `node.takeover_run`."""
    layout, random = process.layout, process.world.random
    return Takeover(
        group=GROUP, node=process.node_id, name=process.name, intermediate=layout.intermediate[1],
        secondaries=list(members.values()), names=layout.names, new_id=lambda: random.randbytes(16),
        now_s=process.machine.clock.now_s(), dry_run=dry_run, force=force, patience_s=patience_s,
        fence_never=layout.policy.fence_never, planned=planned,
    )  # fmt: skip


class Opener:
    """As `node.opener_run`: runs an opener of epochs. ``process.opener`` is it while it is open."""

    def __init__(self, process: Any, role: OpenerRole, done: Callable[[], None]) -> None:
        self._process = process
        self._done = done
        self.own: set[int] = set()
        self.role = role
        for node in role.peers:
            process.network.dial(process, process.layout.names[node], partial(self._dialled, node))
        process.later(TICK_S, self._tick)

    def _dialled(self, node: int, sock: SimSocket | None) -> None:
        process = self._process
        if process.opener is not self:
            if sock is not None:
                sock.connection.close(0)
                process.links.close(process.links.add(sock, greeted=True).number, "too late")
            return
        if sock is None:
            self.perform(self.role.unreachable(node, "no answer", process.machine.clock.now_s()))
            return
        link = process.links.add(sock, greeted=True).number
        self.own.add(link)
        self.perform(self.role.connected(link, node, process.world.random.randbytes(16)))

    def _tick(self) -> None:
        if self._process.opener is self:
            self._process.later(TICK_S, self._tick)
            self.perform(self.role.tick(self._process.machine.clock.now_s()))

    def perform(self, actions: list[Action]) -> None:
        """As `OpenerRun._perform`."""
        process = self._process
        for action in actions:
            if isinstance(action, Send):
                process.links.send(action.link, action.buffers, action.chunk)
            elif isinstance(action, Close):
                self.own.discard(action.link)
                process.links.close(action.link, action.reason, action.last_words)
            elif isinstance(action, Event):
                process.world.say(process.name, f"opener: {action.text}")
        process.links.settle()
        if not self.role.open and process.opener is self:
            process.opener = None
            for link in list(self.own):
                process.links.close(link, "the opener ended", b"")
            self._done()
