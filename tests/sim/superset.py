"""Invariant 7, looked at directly: what would differ if every machine stopped now is in somebody's durable bits.

Each machine stops in one of the ways that are possible at this instant: killed (the page cache stays), or without power
(it is lost, or some of it). What recovery makes of what is left is reckoned here, from the records that survive; the
roles are not asked. Blocks in which a P-VOL and its S-VOL then differ must be in the bits of one of them, of the
intermediate, or of the records in its ring that the next START turns into bits (PROTOCOL, rules 8, 17 and 18).
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from blockrepl.bitmap import Bitmap
from blockrepl.block import Op
from blockrepl.errors import DamagedError
from blockrepl.formats.link import Pair
from blockrepl.formats.record import RecordFlag, RecordHead, RecordKind, check_record, iterate_entries
from blockrepl.formats.slots import SlotKind
from blockrepl.formats.state import (
    IntermediateState,
    PrimaryState,
    SecondaryState,
    decode_intermediate,
    decode_primary,
    decode_secondary,
)
from blockrepl.storage.recovery import recover
from blockrepl.storage.slots import Identity, Slots
from tests.sim.bits import BITMAP_BLOCK
from tests.sim.disk import SimFile
from tests.sim.process import Process
from tests.sim.world import GROUP, Violation

if TYPE_CHECKING:
    from tests.sim.group import Group

ENDS = ("cache", "platter", "torn")  # how a machine stops
BITS = ("bits", "hop2", "split")


class Record(NamedTuple):
    """One that survives in a journal."""

    head: RecordHead
    body: memoryview

    def entries(self) -> Iterator[tuple[int, int, int, int, Any]]:
        """(volume, op, offset, length, payload) of an UPDATE; nothing for other kinds."""
        if self.head.kind == RecordKind.UPDATE:
            for volume, op, _, offset, length, payload in iterate_entries(self.head, self.body):
                if op != Op.METADATA:
                    yield volume, op, offset, length, payload


class Remains:
    """What is left of a machine that stops now."""

    def __init__(self, process: Process, random: Random) -> None:
        self._process = process
        self._end = random.choice(ENDS)
        self._random = random
        self._unit = random.choice([512, 4096])

    def content(self, name: str) -> bytes:
        """Of a file."""
        file = self._process.machine.files[name]
        if self._end == "torn" and file.pending:
            torn: SimFile = file.copy()
            torn.power_cut(self._random, self._unit)
            return bytes(torn.platter)
        return bytes(file.cache if self._end == "cache" else file.platter)

    def bits(self, kind: str, volume: int, size_bytes: int) -> Bitmap:
        """A bitmap."""
        return Bitmap(size_bytes, BITMAP_BLOCK, self.content(f"{kind} {volume}"))

    def journal(self) -> tuple[bytes, list[Record]]:
        """(the owner's state, the records)."""
        raw = self.content("journal")
        records: list[Record] = []

        def check(header: Any, body: memoryview) -> bool:
            try:
                if header.body_bytes:
                    records.append(Record(check_record(body), body))
            except DamagedError:
                return False
            return True

        identity = Identity(GROUP, self._process.node_id, SlotKind.JOURNAL)
        found = recover(lambda offset, length: raw[offset : offset + length], check, identity)
        return found.state, records

    def state(self) -> PrimaryState:
        """A primary's."""
        _, payload = Slots.load(self.content("state"), Identity(GROUP, self._process.node_id, SlotKind.STATE))
        return decode_primary(payload)


class Superset:
    """The check, and when it is due: whenever bits, states or superblocks of anybody changed durably."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._random = Random(f"{group.seed} superset")
        self._seen: tuple[int, ...] = ()
        self.count = 0

    def due(self) -> bool:
        """Something that it speaks of has changed. In an undisturbed PAIR it is looked at now and then only."""
        changes = tuple(
            file.head_changes for process in self._group.processes.values() for file in process.heads.values()
        )
        if changes == self._seen:
            return False
        self._seen = changes
        return self._disturbed() or self._random.random() < 1 / 16

    def _disturbed(self) -> bool:
        for process in self._group.processes.values():
            if any(any(file.platter) for name, file in process.heads.items() if name.split()[0] in BITS):
                return True
        host = self._group.intermediate.host
        return host is not None and host.role.state.pair != Pair.PAIR

    def check(self) -> None:
        """Raises Violation."""
        group = self._group
        remains = {name: Remains(process, self._random) for name, process in group.processes.items()}
        state, ring = remains["i"].journal()
        secondaries = {name: remains[name].journal() for name in group.layout.secondaries}
        targets = {name: (decode_secondary(raw), records) for name, (raw, records) in secondaries.items()}
        middle = Middle(decode_intermediate(state), ring, len(targets))
        epochs = {each.epoch for each, _ in targets.values()} | {middle.state.epoch}
        if len(epochs) > 1 or any(each.active or each.rolling for each, _ in targets.values()):
            return  # a takeover, or an epoch is being opened
        if middle.state.verify or middle.state.initial:
            return
        self.count += 1
        for volume, (owner, home, size) in group.layout.volumes.items():
            primary = remains[owner].state()
            if primary.suspended and not primary.trusted:
                continue
            mine = self._primary(remains[owner], primary, volume, middle)
            said = self._said(remains, volume, size, middle)
            for theirs in self._secondary(remains[home], *targets[home], volume, middle):
                self._compare(volume, mine, theirs, said)

    def _primary(self, remains: Remains, state: PrimaryState, volume: int, middle: Middle) -> bytearray:
        """The P-VOL after its replay, which a suspended primary does not make."""
        image = bytearray(remains.content(f"volume {volume}"))
        if state.suspended:
            return image
        node = remains._process.node_id
        spilled = self._group.intermediate.machine.spills.after(node, state.checkpoint, 1 << 62)
        beside = [memoryview(each.record) for each in spilled]
        own = {each.head.last: each for each in (Record(check_record(body), body) for body in beside)}
        own |= {each.head.last: each for each in middle.ring if each.head.sender == node}
        store(image, volume, [own[last] for last in sorted(own) if last > state.checkpoint])
        return image

    @staticmethod
    def _secondary(
        remains: Remains, state: SecondaryState, records: list[Record], volume: int, middle: Middle
    ) -> Iterator[bytearray]:
        """What the S-VOL can come to be before a resync begins, or goes on."""
        node = remains._process.node_id
        held = [each for each in records if each.head.last > state.applied]
        last = max([state.held, state.prepared, *(each.head.last for each in held)])
        if middle.limited:
            reach = max(state.validated, state.applied, min(last, middle.suspended_at))
            for through in {reach, last}:
                image = bytearray(remains.content(f"volume {volume}"))
                store(image, volume, [each for each in held if each.head.last <= through])
                yield image
            return
        image = bytearray(remains.content(f"volume {volume}"))
        last = max(last, middle.skips.get(node, 0))
        rest = [each for each in middle.ring if each.head.stream == node and each.head.last > last]
        store(image, volume, held + rest)
        yield image

    @staticmethod
    def _said(remains: dict[str, Remains], volume: int, size_bytes: int, middle: Middle) -> Bitmap:
        """All bits that a resync would go by."""
        said = Bitmap(size_bytes, BITMAP_BLOCK)
        for each in remains.values():
            for kind in BITS:
                if f"{kind} {volume}" in each._process.machine.files:
                    said.merge(0, bytes(each.bits(kind, volume, size_bytes).bits))
        if middle.limited:
            for record in middle.ring:
                if record.head.last > middle.state.at:
                    for at, _, offset, length, _ in record.entries():
                        if at == volume:
                            said.mark(offset, length)
        return said

    @staticmethod
    def _compare(volume: int, mine: bytearray, theirs: bytearray, said: Bitmap) -> None:
        if mine == theirs:
            return
        for at in range(0, len(mine), BITMAP_BLOCK):
            if not said.covers(at, 1) and mine[at : at + BITMAP_BLOCK] != theirs[at : at + BITMAP_BLOCK]:
                block = at // BITMAP_BLOCK
                raise Violation(f"7: block {block} of volume {volume} would differ, and nobody's bit says so")


class Middle:
    """The intermediate, as a restart would find it."""

    def __init__(self, state: IntermediateState, ring: list[Record], streams: int) -> None:
        self.state = state
        self.ring = ring
        starts = dict(state.starts)
        for each in ring:
            if each.head.kind == RecordKind.START and each.head.first >= state.start > 0:
                starts[each.head.stream] = each.head.previous if each.head.flags & RecordFlag.JUMP else 0
        begun = state.pair == Pair.COPY and len(starts) == streams
        self.limited = state.limited and not begun
        self.skips = starts if state.start and not self.limited else {}
        self.suspended_at = max(state.at, state.validated)


def store(image: bytearray, volume: int, records: list[Record]) -> None:
    """In order."""
    for record in records:
        for at, op, offset, length, payload in record.entries():
            if at == volume:
                image[offset : offset + length] = payload if op == Op.WRITE and payload is not None else bytes(length)
