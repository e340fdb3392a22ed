"""A data node in the simulator: target, then source, then target again; as `node.data_node` and its two halves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Epoch, Message
from blockrepl.formats.record import decode_record
from blockrepl.formats.slots import SlotKind
from blockrepl.formats.state import (
    PrimaryState,
    SecondaryState,
    decode_primary,
    decode_secondary,
    encode_primary,
    encode_secondary,
)
from blockrepl.node.journal_reading import JournalReading
from blockrepl.node.primary_host import PrimaryHost, PrimaryVolume
from blockrepl.node.secondary_host import SecondaryHost
from blockrepl.node.source import after_takeover
from blockrepl.replication.actions import BecomeSource
from blockrepl.replication.primary import Phase as PrimaryPhase
from blockrepl.replication.primary import Primary
from blockrepl.replication.reform import Reform
from blockrepl.replication.reform_plan import Question
from blockrepl.replication.secondary import Phase, Secondary
from blockrepl.replication.takeover import Takeover
from blockrepl.storage.slots import Identity, Slots
from tests.sim.bits import SimBitmaps
from tests.sim.disk import SimFile, SimImage, SimSlotFile, SimUndoFile
from tests.sim.process import (
    BLOCK,
    TICK_S,
    UNDO_BLOCK,
    UNDO_FILE_BYTES,
    Opener,
    Process,
    SimDialler,
    WatchedPrimaryHost,
    WatchedSecondaryHost,
    takeover_of,
    watch_primary,
)
from tests.sim.world import GROUP


class DataProcess(Process):
    """Keeps one image of each of its volumes. ``host`` is that of its secondary role, which owns its epochs."""

    host: SecondaryHost
    source: SimSource | None = None
    opener: Opener | None = None

    @property
    def site(self) -> int:
        """0 for the definition's primaries."""
        return 0 if self.name in self.layout.primaries else 1

    @property
    def volume_ids(self) -> list[int]:
        """Volumes of which an image is here."""
        return [volume for volume, ends in self.layout.volumes.items() if ends[self.site] == self.name]

    @property
    def _sizes(self) -> dict[int, int]:
        return {volume: self.layout.volumes[volume][2] for volume in self.volume_ids}

    @property
    def primary(self) -> PrimaryHost | None:
        """What serves hosts, while it is a source."""
        return self.source.host if self.source is not None and not self.source.host.retired else None

    @property
    def volumes(self) -> dict[int, PrimaryVolume]:
        """As front ends see them."""
        return self.source.volumes if self.source is not None else {}

    @property
    def failed(self) -> bool:
        """It stopped: only a new process helps."""
        broken = self.source is not None and self.source.host.role.phase is PrimaryPhase.FAILED
        return self.alive and (broken or self.host.role.phase is Phase.FAILED)

    # files

    def format(self) -> None:
        source = self.site == 0
        state = SecondaryState(active=source, writable=source)
        self._format_journal(self.layout.secondary_ring_bytes, encode_secondary(state))
        slots = Slots(Identity(GROUP, self.node_id, SlotKind.STATE))
        file = self.machine.files["state"] = SimFile(32 << 10)
        file.write(*slots.encode(encode_primary(PrimaryState())))
        file.sync()
        for volume, size in self._sizes.items():
            self.machine.files[f"volume {volume}"] = SimFile(size)
        self.machine.files["undo"] = SimFile(UNDO_FILE_BYTES)
        SimBitmaps.make(self, "bits", self._sizes)

    def _open_state(self) -> SimSlotFile:
        file = self.machine.files["state"]
        slots, payload = Slots.load(file.read(0, 32 << 10), Identity(GROUP, self.node_id, SlotKind.STATE))
        file.write(*slots.again(payload))
        file.sync()
        state_file = SimSlotFile(Path("state"), file.fd, slots, payload)
        state_file.file = file
        return state_file

    def _open_undo(self, state: SecondaryState) -> SimUndoFile:
        file = self.machine.files["undo"]
        undo = SimUndoFile(Path("undo"), file.fd, self.disk, GROUP, self.node_id, self._sizes, UNDO_BLOCK)  # type: ignore[arg-type]
        undo.file, undo.process = file, self
        undo.recover(state.start if state.copying and not state.initial else None)
        return undo

    # life

    def open(self) -> SecondaryHost:
        self.opener = self.source = None
        self.state_file = self._open_state()
        self.bits = SimBitmaps(self, "bits", self._sizes)
        self.bits.on_failed = self._bits_failed
        self.images = {v: SimImage(self.machine.files[f"volume {v}"], self) for v in self.volume_ids}
        self.host = self._open_target()
        self.host.role.trusted = lambda: self.source is None or self.source.trusted
        self.host.role.replayed = lambda: self.source is None or self.source.host.role.serving
        self.host.role.alone = lambda: self.source is not None and self.source.host.role.suspension.was_alone
        if self.host.role.state.active:
            self.source = SimSource(self, self.host.role.state)
        return self.host

    def _open_target(self) -> SecondaryHost:
        reading = JournalReading()
        journal = self._open_journal(reading.check, self.layout.secondary_ring_bytes)
        layout = self.layout
        role = Secondary(
            group=GROUP, node=self.node_id, name=self.name, intermediate=layout.intermediate[1],
            peers=[*layout.primaries.values(), *layout.secondaries.values()],
            state=decode_secondary(journal.recovered.state), policy=layout.policy, bitmaps=self.bits.bitmaps,
        )  # fmt: skip
        held = reading.tell_secondary(role, journal.journal)
        host = WatchedSecondaryHost(
            role, journal, held, self.images, self._open_undo(role.state), self.disk, self.links, self.machine.clock,
            self.workers, self.log, self.bits.save,
        )  # fmt: skip
        host.process = self  # type: ignore[assignment]
        host.on_active, host.on_withdraw = self._activated, self._withdraw
        host.on_source, host.on_target = self._stay_source, self._become_target
        self.watcher.recovered(self, reading.heads, role)
        return host

    def start(self) -> None:
        self.listening = True
        self.host.start()
        if self.source is not None:
            self.source.start()

    def _tick(self) -> None:
        self.later(TICK_S, self._tick)
        self.host.tick()
        if self.source is not None:
            self.source.tick()
        self._follow()

    def _follow(self) -> None:
        """As `DataNode._follow` and `Target.follow`."""
        role = self.host.role
        if self.source is None or not role.state.active:
            return
        source = self.source.host.role
        role.numbered_seen = max(role.numbered_seen, source.acked)
        if source.state.epoch.number <= role.state.epoch.number or self.host.journal.failed:
            return
        role.epochs.follow(source.state.epoch, source.acked)
        self.host.journal.save(encode_secondary(role.durable_state()))

    # role changes: as `DataNode`

    def _activated(self) -> None:
        self.watcher.activated(self)
        if self.source is None or self.source.host.retired:
            try:
                self.source = SimSource(self, self.host.role.state)
            except OSError as error:
                self.host.fail(str(error))
                return
        self.source.start()

    def _stay_source(self, action: BecomeSource, done: Callable[[], None]) -> None:
        assert self.source is not None
        self.source.reform(action.epoch, action.direction, done)

    def _become_target(self) -> None:
        self.source = None
        self.watcher.became_target(self)

    def _withdraw(self, done: Callable[[], None]) -> None:
        if self.source is not None:
            self.source.retire("this site is to be the copy now", done)
        else:
            self.workers.later(done)

    def _bits_failed(self, error: OSError) -> None:
        self.host.fail(str(error))
        if self.source is not None:
            self.source.host.fail(str(error))

    # links

    def message(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> None:
        now_s = self.machine.clock.now_s()
        if self.opener is not None and link in self.opener.own:
            self.opener.perform(self.opener.role.received(link, kind, fields, now_s))
            return
        self.watcher.received(self, kind, fields)
        if self.source is not None and link in self.source.links:
            self.source.host.perform(self.source.host.role.received(link, kind, fields, now_s))
        else:
            self._follow()
            self.host.perform(self.host.role.received_message(link, kind, fields, epoch, now_s))

    def bulk(self, link: int, kind: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        if kind != Message.RECORD:
            raise ProtocolError("BATCH does not belong on a data node's link")
        if self.source is not None and link in self.source.links:
            view = chunk.view[start:end]
            self.source.host.record(link, decode_record(view), view)
        else:
            self.host.record(link, epoch, chunk, start, end)

    def lost(self, link: int) -> None:
        if self.source is not None and link in self.source.links:
            self.source.lost(link)
        elif self.opener is not None and link in self.opener.own:
            self.opener.own.discard(link)
            self.opener.perform(self.opener.role.lost(link, self.machine.clock.now_s()))
        else:
            self.host.lost(link)

    def settle(self) -> None:
        if self.source is not None:
            self.source.host.settle()
        self.host.settle()

    # the operator's commands

    def take_over(
        self, done: Callable[[Takeover], None], *, dry_run: bool = False, force: bool = False, planned: bool = False
    ) -> str:
        """Take over at this site; what forbids it, or nothing. ``done`` is not called when the process dies."""
        state = self.host.role.state
        if state.active and not state.rolling:
            return "its volumes are the source of the copy"
        if self.opener is not None:
            return "a takeover or a swap is under way here"
        members = self.layout.sources(self.site)
        role = takeover_of(self, members, dry_run=dry_run, force=force, planned=planned)
        self.opener = Opener(self, role, lambda: done(role))
        return ""

    def reform(
        self, done: Callable[[Reform], None], *, replaced: int = 0, force: bool = False, verify: bool = False,
        dry_run: bool = False, planned: bool = False,
    ) -> str:  # fmt: skip
        """Form the group anew with this site as its source; what forbids it, or nothing."""
        if not self.host.role.state.active:
            return "it is not the source of a copy: it has not taken over"
        if self.opener is not None:
            return "a takeover or a swap is under way here"
        layout, site, random = self.layout, self.site, self.world.random
        owners, homes = layout.owners(site), layout.homes(site)
        asked = Question(
            direction=site, sources=list(layout.sources(site).values()), targets=list(layout.targets(site).values()),
            pairs={volume: (owners[volume], homes[volume]) for volume in layout.volumes}, names=layout.names,
            replaced=replaced, force=force, verify=verify, planned=planned,
        )  # fmt: skip
        role = Reform(
            group=GROUP, node=self.node_id, name=self.name, intermediate=layout.intermediate[1], question=asked,
            new_id=lambda: random.randbytes(16), now_s=self.machine.clock.now_s(), dry_run=dry_run, patience_s=3.0,
        )  # fmt: skip
        self.opener = Opener(self, role, lambda: done(role))
        return ""


class SimSource:
    """As `node.source.Source`: the primary half of a data node."""

    def __init__(self, process: DataProcess, taken: SecondaryState) -> None:
        self.process = process
        self.links: set[int] = set()
        self._dialler: SimDialler | None = None
        self.host = self._make_host(taken)
        writable = taken.writable
        self.volumes = {
            v: PrimaryVolume(self.host, v, str(v), process.images[v], BLOCK, 1 << 16, writable=writable)
            for v in process.volume_ids
        }

    def _make_host(self, taken: SecondaryState) -> PrimaryHost:
        process, layout = self.process, self.process.layout
        state_file = process.state_file
        state = decode_primary(state_file.payload)
        if taken.rolling and state.epoch.number < taken.epoch.number:
            state = after_takeover(state, taken, process.site)
        state.incarnation += 1
        clean, state.clean = state.clean, False
        process.effect()
        state_file.save_now(encode_primary(state))
        homes = layout.homes(process.site)
        role = Primary(
            group=GROUP, node=process.node_id, name=process.name, intermediate=layout.intermediate[1],
            streams={v: homes[v] for v in process.volume_ids}, state=state, policy=layout.policy,
            bitmaps=process.bits.bitmaps, clean=clean,
        )  # fmt: skip
        beside = process.host.role
        role.suspension.bound = lambda: beside.state.promised
        watch_primary(process, role)
        process.watcher.recovered(process, [], role)
        host = WatchedPrimaryHost(
            role, process.images, partial(state_file.save, process.disk), process.bits.save, process.disk,  # type: ignore[arg-type]
            process.links, process.machine.clock, process.workers, process.log,
        )  # fmt: skip
        host.process = process
        state_file.on_failed = lambda error: host.fail(str(error))
        return host

    @property
    def trusted(self) -> bool:
        """As `Source.trusted`."""
        role = self.host.role
        return role.state.trusted and (bool(role.state.suspended) or role.trusted)

    def start(self) -> None:
        """Dial the intermediate; after a takeover only when the group was formed anew."""
        if self.host.role.state.detached or self._dialler is not None:
            return
        process = self.process
        self._dialler = SimDialler(process, process.layout.intermediate[0], self._connected)
        process.diallers.append(self._dialler)
        self._dialler.again()

    def _connected(self, link: int, nonce: bytes) -> None:
        self.links.add(link)
        self.host.perform(self.host.role.connected(link, nonce, self.process.machine.clock.now_s()))

    def lost(self, link: int) -> None:
        """Dial again."""
        self.links.discard(link)
        self.host.lost(link)
        if self._dialler is not None:
            self._dialler.lost(link)

    def tick(self) -> None:
        """Time passes."""
        if not self.host.retired:
            self.host.tick()

    def reform(self, epoch: Epoch, direction: int, done: Callable[[], None]) -> None:
        """The group is formed anew, and this is a source of it."""

        def reformed() -> None:
            self.process.watcher.stays_source(self.process, epoch.number)
            self.start()
            done()

        self.host.on_reformed = reformed
        self.host.perform(self.host.role.suspension.reform(epoch, direction))
        self.host.settle()

    def retire(self, reason: str, done: Callable[[], None]) -> None:
        """Its volumes become S-VOLs: ``done`` when bits and images are durable."""
        process = self.process
        if self.host.retired:
            process.workers.later(done)
            return
        self.host.retired = reason
        process.later(process.world.random.choice([0.0, 0.001, 0.01]), partial(self._retire, reason, done))

    def _retire(self, reason: str, done: Callable[[], None]) -> None:
        if self._dialler is not None:
            self._dialler.close()
        self.host.on_reformed = partial(self._sync, list(self.process.images.values()), done)
        self.host.perform(self.host.role.suspension.retire(reason))
        self.host.settle()

    def _sync(self, images: Iterable[SimImage], done: Callable[[], None]) -> None:
        waiting = list(images)

        def synced(error: OSError | None) -> None:
            if error is not None:
                self.host.fail(f"sync failed: {error}")
                return
            waiting.pop()
            if not waiting:
                done()

        for image in list(waiting):
            self.process.disk.sync(image.fd, synced)
