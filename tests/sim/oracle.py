"""The oracle: the history that the intermediate's numbers give, and what PROTOCOL.md's table demands of everybody."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from blockrepl.block import Op
from blockrepl.errors import DamagedError
from blockrepl.formats.journal import FrameKind
from blockrepl.formats.link import Message, Pair, decode_body, decode_header
from blockrepl.formats.record import RecordHead, RecordKind, check_record, iterate_entries
from blockrepl.formats.slots import SlotKind
from blockrepl.formats.state import decode_intermediate
from blockrepl.replication.actions import Send
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.opening import Phase
from blockrepl.replication.secondary import Phase as SecondaryPhase
from blockrepl.replication.secondary import Secondary
from blockrepl.replication.takeover import Takeover
from blockrepl.storage.recovery import recover
from blockrepl.storage.slots import Identity
from tests.sim.disk import SimFile
from tests.sim.history import SNAPSHOT_EVERY, Numbered
from tests.sim.pairs import PairTruth
from tests.sim.process import (
    IntermediateProcess,
    Layout,
    PrimaryProcess,
    Process,
    SecondaryProcess,
    Watcher,
)
from tests.sim.world import GROUP, Violation, World
from tests.sim.write import Write


def demand(truth: bool, text: str) -> None:
    """An invariant."""
    if not truth:
        raise Violation(text)


class Oracle(Watcher):
    """Knows every record ever numbered, every promise made, and checks each against the other."""

    def __init__(self, world: World, layout: Layout) -> None:
        self.world = world
        self.layout = layout
        self.records: list[Numbered] = []
        self._lasts: list[int] = []
        self._keys: set[tuple[int, int, int]] = set()  # (sender, incarnation, batch) of the records
        self._writes: dict[tuple[int, int, int], Write | None] = {}
        self._snapshots: dict[tuple[int, int], bytearray] = {}
        self.submitting: dict[int, Write] = {}  # id(batch) → write
        self.acked = 0  # highest number in an ACK
        self.durable = 0  # highest that the intermediate called durable
        self.validate_sent = 0
        self.completed = 0  # highest number of a write that a host was told of
        self.completed_of: dict[str, int] = {}
        self.prepared: dict[str, int] = {}  # reported by each secondary
        self.validated_at: dict[str, int] = {}
        self.applied_at: dict[str, int] = {}
        self.known_epoch: dict[str, int] = {}  # the highest that each node received
        self.welcomed: dict[str, int] = {}
        self.taken_over_at: int | None = None
        self.taken_over_drained = False
        self.in_pair = True  # hop 2 was never suspended since all that was numbered was validated
        self.goes_back_to: dict[str, int] = {}  # secondaries that are copying: the number that they can go back to
        self.excused: set[str] = set()  # nodes whose disks were made to fail
        self.completions = 0
        self.pairs = PairTruth(layout)

    # history

    @property
    def numbered(self) -> int:
        """The highest number given."""
        return self._lasts[-1] if self._lasts else 0

    def host_submits(self, process: PrimaryProcess, batch: Any, write: Write) -> None:
        """A host's write is about to be taken."""
        self.submitting[id(batch)] = write
        self.pairs.submitted(write)

    def submitted(self, process: PrimaryProcess, batch: Any, incarnation: int, number: int) -> None:
        write = self.submitting.get(id(batch)) if batch is not None else None
        self._writes[process.node_id, incarnation, number] = write

    def appended(self, process: IntermediateProcess, head: RecordHead, record: memoryview) -> None:
        demand(head.first == self.numbered + 1, f"numbered {head.first} after {self.numbered}")
        if head.sender == process.node_id:
            self.pairs.numbered(head, None)
            self.records.append(Numbered(head, bytes(record), None))
            self._lasts.append(head.last)
            return
        key = head.sender, head.incarnation, head.batch
        demand(key in self._writes, f"a batch that nobody submitted: {key}")
        write = self._writes[key]
        known = self.known_epoch.get(process.name, 0)
        demand(head.epoch >= known, f"numbered {head.first} in epoch {head.epoch}, but had received epoch {known}")
        demand(key not in self._keys, f"batch {key} numbered twice")
        self._keys.add(key)
        later = [
            each.head.batch for each in self.records[-40:]
            if (each.head.sender, each.head.incarnation) == key[:2] and each.head.batch > head.batch
        ]  # fmt: skip
        demand(not later, f"batch {key} numbered after {later}")
        newer = [e for e in self.records[-40:] if e.head.sender == head.sender and e.head.incarnation > key[1]]
        demand(not newer, f"a write of dead incarnation {key} numbered after one of the living")
        if write is not None:
            demand(head.first > write.after, f"{head.first} was submitted after {write.after} had completed")
            write.number = head.last
            self.pairs.numbered(head, write)
            self._compare(write, head, record)
        self.records.append(Numbered(head, bytes(record), write))
        self._lasts.append(head.last)

    def _compare(self, write: Write, head: RecordHead, record: memoryview) -> None:
        entries = list(iterate_entries(head, record))
        found = [(volume, op, offset, length, bytes(p) if p is not None else b"") for volume, op, _, offset, length, p
                 in entries]  # fmt: skip
        columns = zip(write.ops, write.offsets, write.lengths, write.payloads, strict=True)
        expected = [(write.volume, *column) for column in columns]
        demand(found == expected, f"record {head.first} is not what the host wrote")

    def image(self, volume: int, number: int) -> bytes:
        """What a volume holds when all up to ``number`` is stored."""
        count = bisect_right(self._lasts, number)
        start = count // SNAPSHOT_EVERY
        while start and (volume, start) not in self._snapshots:
            start -= 1
        empty = self.layout.volumes[volume][2]
        image = bytearray(self._snapshots[volume, start]) if start else bytearray(empty)
        for index in range(start * SNAPSHOT_EVERY, count):
            if index and index % SNAPSHOT_EVERY == 0:
                self._snapshots.setdefault((volume, index // SNAPSHOT_EVERY), bytearray(image))
            self._apply(self.records[index], volume, image)
        return bytes(image)

    @staticmethod
    def _apply(each: Numbered, volume: int, image: bytearray) -> None:
        if each.head.kind != RecordKind.UPDATE:
            return
        for at, op, _, offset, length, payload in iterate_entries(each.head, memoryview(each.record)):
            if at == volume:
                image[offset : offset + length] = payload if op == Op.WRITE and payload else bytes(length)

    def touched_after(self, volume: int, number: int) -> list[tuple[int, int]]:
        """Ranges that records above ``number`` touch."""
        return [
            (offset, offset + length)
            for each in self.records[bisect_right(self._lasts, number) :]
            for at, _, _, offset, length, _ in iterate_entries(each.head, memoryview(each.record))
            if at == volume
        ]

    def _find(self, first: int) -> Numbered | None:
        index = bisect_right(self._lasts, first - 1)
        if index < len(self.records) and self.records[index].head.first == first:
            return self.records[index]
        return None

    # messages

    def sent(self, process: Process, kind: int, link: int, action: Send) -> None:
        if kind not in (Message.ACK, Message.VALIDATE, Message.PREPARED, Message.WELCOME):
            return
        view = memoryview(bytes(action.buffers[0]))
        fields = decode_body(decode_header(view), view)
        if kind == Message.ACK:
            durable = process.host.role.durable_number
            demand(fields["number"] <= durable, f"acknowledged {fields['number']}, durable is {durable}")
            self.acked = max(self.acked, fields["number"])
        elif kind == Message.WELCOME and isinstance(process, IntermediateProcess):
            self.acked = max(self.acked, fields["through"])
        elif kind == Message.WELCOME:
            self.prepared[process.name] = max(self.prepared.get(process.name, 0), fields["prepared"])
        elif kind == Message.VALIDATE:
            number = fields["number"]
            self.validate_sent = max(self.validate_sent, number)
            low = {name: self.prepared.get(name, 0) for name in self.layout.secondaries}
            demand(number <= min(low.values()), f"VALIDATE {number}, but prepared are {low}")
        else:
            self.prepared[process.name] = max(self.prepared.get(process.name, 0), fields["number"])

    def received(self, process: Process, kind: int, fields: dict[str, Any]) -> None:
        epochs = [fields[name].number for name in ("epoch", "promised") if name in fields]
        if kind in (Message.REFUSED, Message.WELCOME) or (kind == Message.PROMISE and not fields["dry_run"]):
            self.known_epoch[process.name] = max(self.known_epoch.get(process.name, 0), *epochs)
        if kind == Message.WELCOME:
            epoch = fields["epoch"].number
            self.welcomed[process.name] = max(self.welcomed.get(process.name, 0), epoch)

    def power_lost(self, process: Process) -> None:
        for volume in process.volume_ids if isinstance(process, PrimaryProcess) else ():
            self.pairs.volumes[volume].power_lost()

    def event(self, process: Process, text: str) -> None:
        if text.startswith("stopped:") and process.name not in self.excused:
            raise Violation(f"{process.name} stopped without a disk error: {text}")

    # recoveries

    def recovered(self, process: Process, heads: list[RecordHead], role: Any) -> None:
        # What it had received and not stored, it has answered to nobody.
        self.known_epoch[process.name] = max(role.state.epoch.number, role.state.promised.number)
        for head in heads:
            if isinstance(role, Secondary) and head.epoch < role.state.epoch.number and head.last > role.state.number:
                continue
            known = self._find(head.first)
            if known is None or known.head.header_crc != head.header_crc:
                raise Violation(f"{process.name} recovered record {head.first}, which is not of the history")
        if isinstance(role, Intermediate):
            promised = max(self.acked, self.durable, self.completed, *self.prepared.values(), 0)
            demand(role.numbered >= promised, f"recovered {role.numbered}, but {promised} was promised")
            keep = bisect_right(self._lasts, role.numbered)
            demand(self._lasts[keep - 1] == role.numbered if keep else role.numbered == 0, "cut within a record")
            for each in self.records[keep:]:
                self._keys.discard((each.head.sender, each.head.incarnation, each.head.batch))
            del self.records[keep:], self._lasts[keep:]
            for key in [key for key in self._snapshots if key[1] * SNAPSHOT_EVERY >= keep]:
                del self._snapshots[key]
        if isinstance(role, Secondary):
            self._forget_what_a_takeover_discarded(process.name, role)
            self._check_prepared(process.name, role)
            if process.host is not None:  # how far its S-VOLs are ahead of what it knows
                self.applied_at[process.name] = max(self.applied_at.get(process.name, 0), process.host.role.validated)

    def _check_prepared(self, name: str, role: Secondary) -> None:
        reported = self.prepared.get(name, 0)
        if role.state.rolling:  # a takeover was stored: it may have discarded what another does not hold
            reported = min(reported, role.state.number)
        demand(role.held >= reported, f"{name} had reported prepared {reported}, holds {role.held}")

    # hosts

    def taken_alone(self, batch: Any) -> None:
        if id(batch) in self.submitting:
            self.submitting[id(batch)].solo = True

    def storing(self, process: PrimaryProcess, batch: Any, volume: int) -> None:
        write = self.submitting.get(id(batch))
        if write is not None and write.solo:
            self.pairs.storing_alone(process, batch, volume)

    def complete(self, process: PrimaryProcess, write: Write) -> None:
        """A host was told that its write succeeded."""
        self.completions += 1
        number = write.number
        known, welcomed = self.known_epoch.get(process.name, 0), self.welcomed.get(process.name, 0)
        demand(welcomed >= known, f"{process.name} completed {number} in epoch {welcomed}, had received {known}")
        if self.pairs.completed(process, write):
            return
        demand(number > 0, "completed a write that was never numbered")
        index = bisect_right(self._lasts, number - 1)
        demand(index < len(self._lasts) and self.records[index].write is write, f"completed {number}, lost since")
        demand(number <= self.acked, f"completed {number}, acknowledged is {self.acked}")
        if self.taken_over_at is not None and self.taken_over_drained:
            demand(
                number <= self.taken_over_at or not self.in_pair,
                f"completed {number} after a drained takeover at {self.taken_over_at}",
            )
        self.completed = max(self.completed, number)
        self.completed_of[process.name] = max(self.completed_of.get(process.name, 0), number)

    def check_on_platter(self, process: Process, number: int) -> None:
        """Invariant 1: cut the intermediate's power now; the record is there."""
        file = process.machine.files["journal"].copy()
        file.power_cut(self.world.random, self.world.random.choice([512, 4096]))
        found = recovered_number(file, process.node_id, self.layout.ring_bytes)
        demand(found >= number, f"{number} was acknowledged; after a power cut the journal ends at {found}")

    def check_flushed(self, process: PrimaryProcess, volume: int, number: int) -> None:
        """Rule 4: what completed before the flush is on the platter, or a later write is."""
        if process.name in self.pairs.alone_ever:
            return  # what it took alone has no number
        file = process.machine.files[f"volume {volume}"]
        expected = self.image(volume, number)
        later = self.touched_after(volume, number)
        for start in range(0, len(expected), 512):
            same = file.platter[start : start + 512] == expected[start : start + 512]
            excused = same or any(a < start + 512 and start < b for a, b in later)
            demand(excused, f"flushed volume {volume} at {number}: block at {start} is not on the platter")

    # takeover

    def taken_over(self, role: Takeover, expect_ever: bool) -> None:
        """A takeover is done."""
        report = role.report
        if report.dry_run:
            return
        if not report.missing:
            low = min([self.validate_sent, *self.goes_back_to.values()])
            demand(report.number >= low, f"took over at {report.number}, validated {self.validate_sent}")
        if report.drained:
            demand(
                report.number >= self.completed or not self.in_pair,
                f"drained takeover at {report.number} lost {self.completed}",
            )
        if self.taken_over_at is not None and self.taken_over_at != report.number:
            raise Violation(f"taken over at {self.taken_over_at} and at {report.number}")
        self.taken_over_at = report.number
        self.taken_over_drained = self.taken_over_drained or (report.drained and not report.completed)

    def activated(self, process: SecondaryProcess) -> None:
        self.check_active(process)

    def check_active(self, process: SecondaryProcess) -> None:
        """Invariant 3: the S-VOLs hold exactly image(n)."""
        number = process.host.role.state.number
        for volume in process.volume_ids:
            found = bytes(process.machine.files[f"volume {volume}"].cache)
            if found != self.image(volume, number):
                raise Violation(f"{process.name}: volume {volume} is not image({number})" + self._guess(volume, found))

    def _guess(self, volume: int, found: bytes) -> str:
        for number in [0, *self._lasts]:
            if self.image(volume, number) == found:
                return f" but image({number})"
        return ""

    # watermarks and images, while it runs

    def check_watermarks(self, processes: dict[str, Process]) -> None:
        """The order of PROTOCOL.md, and that nothing goes back."""
        for process in processes.values():
            if not process.alive or process.host is None:
                continue
            if isinstance(process, IntermediateProcess):
                self._check_intermediate(process.host.role)
            elif isinstance(process, SecondaryProcess):
                self._check_secondary(process.name, process.host.role)
            elif isinstance(process, PrimaryProcess):
                role = process.host.role
                demand(
                    role.state.checkpoint <= max(role.acked, role.joining.through),
                    "checkpoint beyond what is acknowledged",
                )

    def _check_intermediate(self, role: Intermediate) -> None:
        streams = role.streams
        self.in_pair = role.state.pair in (Pair.PAIR, Pair.PFUL) and not role.state.limited and role.state.numbering
        self.durable = max(self.durable, role.durable_number)
        demand(streams.validated <= role.durable_number <= role.numbered, "validated <= durable <= numbered")
        demand(streams.sent <= role.durable_number, f"sent {streams.sent} undurable, {role.durable_number} is")
        if role.phase is Phase.SERVING and all(stream.ready for stream in streams.by_node.values()):
            low = streams.valid_counter
            demand(streams.validated <= low, f"validated {streams.validated} > min prepared {low}")
        demand(role.releasable <= streams.validated or role.state.limited, "releases what is not validated")

    def _check_secondary(self, name: str, role: Secondary) -> None:
        if role.phase is SecondaryPhase.FAILED:
            return
        self._forget_what_a_takeover_discarded(name, role)
        if not role.state.rolling:  # a takeover that goes back has gone there before it is done
            self.goes_back_to.pop(name, None)
        if role.copying.newest is not None:
            self.goes_back_to[name] = role.copying.newest.copy_from
        demand(role.applied <= role.validated <= role.held, f"{name}: applied <= validated <= held")
        self.applied_at[name] = max(self.applied_at.get(name, 0), role.applied)

    def _forget_what_a_takeover_discarded(self, name: str, role: Secondary) -> None:
        if role.state.rolling:
            for marks in (self.prepared, self.validated_at, self.applied_at):
                marks[name] = min(marks.get(name, 0), role.state.number)

    def check_images(self, processes: dict[str, Process]) -> None:
        """P-VOLs equal the writes in order; S-VOLs equal image(applied)."""
        for process in processes.values():
            if not process.alive or process.host is None:
                continue
            if isinstance(process, IntermediateProcess):
                self._check_own(process)
            elif isinstance(process, PrimaryProcess) and process.host.role.serving:
                number = max(process.host.role.acked, self.completed_of.get(process.name, 0))
                for volume in process.volume_ids:
                    self._check_pvol(process, volume, number)
            elif isinstance(process, SecondaryProcess) and not process.host._applying:
                role = process.host.role
                if role.state.copying or role.copying.newest is not None:
                    continue  # at no number of its own
                if role.phase is SecondaryPhase.FOLLOWING and role.applied >= self.applied_at.get(process.name, 0):
                    for volume in process.volume_ids:
                        found = bytes(process.machine.files[f"volume {volume}"].cache)
                        if found != self.image(volume, role.applied):
                            guess = self._guess(volume, found)
                            raise Violation(f"{process.name}: S-VOL {volume} is not image({role.applied}){guess}")

    def _check_own(self, process: IntermediateProcess) -> None:
        """Intermediate volumes that are whole equal image(durable), and so they do after a power cut, with the ring."""
        role, volumes = process.host.role, process.host.volumes
        if volumes is None or not role.state.filled or role.phase is Phase.FAILED:
            return
        for volume in self.layout.volumes:
            file = process.machine.files[f"volume {volume}"]
            expected = self.image(volume, role.durable_number)
            demand(bytes(file.cache) == expected, f"intermediate volume {volume} is not image({role.durable_number})")
            demand(
                self._touched_since(volumes.stored_through, volume, file.platter, expected),
                f"intermediate volume {volume} is not durable up to {volumes.stored_through}",
            )

    def _touched_since(self, number: int, volume: int, found: bytearray, expected: bytes) -> bool:
        """Whether what differs was touched by records above ``number``."""
        later = [
            (offset, offset + length)
            for each in self.records[bisect_right(self._lasts, number) :] if each.head.kind == RecordKind.UPDATE
            for at, _, _, offset, length, _ in iterate_entries(each.head, memoryview(each.record)) if at == volume
        ]  # fmt: skip
        return all(
            found[at : at + 512] == expected[at : at + 512] or any(a < at + 512 and at < b for a, b in later)
            for at in range(0, len(expected), 512)
        )

    def _check_pvol(self, process: PrimaryProcess, volume: int, number: int) -> None:
        self.pairs.check_volume(process, volume)
        found = bytes(process.machine.files[f"volume {volume}"].cache)
        if process.name not in self.pairs.alone_ever and found != self.image(volume, number):
            raise Violation(
                f"{process.name}: P-VOL {volume} is not the writes up to {number}{self._guess(volume, found)}"
            )


def recovered_number(file: SimFile, node_id: int, ring_bytes: int) -> int:
    """Where the journal of an intermediate ends."""
    last = 0

    def check(header: Any, body: memoryview) -> bool:
        nonlocal last
        if header.kind == FrameKind.RECORD:
            try:
                last = check_record(body).last
            except DamagedError:
                return False
        return True

    recovered = recover(file.read, check, Identity(GROUP, node_id, SlotKind.JOURNAL), ring_bytes)
    return max(last, decode_intermediate(recovered.state).durable)


__all__ = ["Oracle", "Write"]
