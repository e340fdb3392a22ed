"""EXTENDED COPY between block devices of this target, and RECEIVE COPY RESULTS (SPC-4, 6.4, 6.18, 6.19)."""

from __future__ import annotations

from construct import ConstructError

from blockrepl.errors import BlockError
from blockrepl.formats import scsi_copy as layout
from blockrepl.formats.scsi import Asc, SenseKey
from blockrepl.formats.scsi_copy import CopyStatus, ListIdUsage, SegmentType
from blockrepl.formats.scsi_inquiry import VENDOR, DesignatorType
from blockrepl.frontends.iscsi.scsi.commands import Access
from blockrepl.frontends.iscsi.scsi.nexus_state import NexusState
from blockrepl.frontends.iscsi.scsi.ranges import Claim
from blockrepl.frontends.iscsi.scsi.refusal import Refusal, bad_cdb, bad_parameter, illegal
from blockrepl.frontends.iscsi.scsi.transfer import Write, read_range
from blockrepl.frontends.iscsi.scsi.unit import MAX_COPY_LISTS, PENDING, Answer, LogicalUnit
from blockrepl.frontends.iscsi.scsi.work import joined
from blockrepl.frontends.iscsi.task import Task

_PIECE_BYTES = 1 << 20
_FUA_OFF = 0


class Segment:
    """One extent to be copied. Offsets and length in bytes."""

    __slots__ = ("destination", "destination_offset", "length", "source", "source_offset")

    def __init__(
        self, source: LogicalUnit, source_offset: int, destination: LogicalUnit, destination_offset: int, length: int
    ) -> None:  # fmt: skip
        self.source = source
        self.source_offset = source_offset
        self.destination = destination
        self.destination_offset = destination_offset
        self.length = length


class CopyList:
    """One copy operation, and afterwards its result."""

    def __init__(self, unit: LogicalUnit, task: Task, segments: list[Segment]) -> None:
        self.status = CopyStatus.IN_PROGRESS
        self.segments_done = 0
        self.done_bytes = 0
        self._unit = unit
        self._task = task
        self._segments = segments
        self._at = 0  # within the segment
        self._claim: Claim | None = None

    def run(self) -> None:
        """The next piece: its destination is locked while it is read and written."""
        if self._task.aborted:
            self._end(None)
            return
        while self.segments_done < len(self._segments) and self._at >= self._segments[self.segments_done].length:
            self.segments_done += 1
            self._at = 0
        if self.segments_done == len(self._segments):
            self._end(None)
            return
        segment = self._segments[self.segments_done]
        length = min(_PIECE_BYTES, segment.length - self._at)
        start = segment.destination_offset + self._at
        self._claim = Claim([(start, start + length)], True, lambda: self._read(segment, length))
        segment.destination.claim(self._claim)

    def _read(self, segment: Segment, length: int) -> None:
        def have(view: memoryview, error: BlockError | None) -> None:
            if error is not None:
                self._written(segment, 0, error)
                return
            data = memoryview(bytes(view))  # a batch may need it after its error was told
            Write(
                segment.destination, segment.destination_offset + self._at, [data], _FUA_OFF,
                lambda error: self._written(segment, length, error),
            ).start(segment.destination, [])  # fmt: skip

        read_range(segment.source, segment.source_offset + self._at, length, have)

    def _written(self, segment: Segment, length: int, error: BlockError | None) -> None:
        assert self._claim is not None
        segment.destination.ranges.release(self._claim)
        if error is not None:
            self._end(Refusal(SenseKey.COPY_ABORTED, Asc.NONE))
            return
        self._at += length
        self.done_bytes += length
        self._unit.target.later(0.0, self.run)

    def _end(self, refusal: Refusal | None) -> None:
        self.status = CopyStatus.FAILED if refusal is not None else CopyStatus.COMPLETED
        if refusal is not None:
            self._unit.refuse(self._task, refusal)
        else:
            self._unit.finish(self._task)


def extended_copy(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """EXTENDED COPY (LID1): everything is checked before anything is copied."""
    size = int.from_bytes(task.cdb[10:14], "big")
    if not size:
        return None
    if size < layout.LIST_HEAD_BYTES or task.out_bytes < size:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    data = bytes(joined(task.data_out))[:size]
    task.release_out()
    head = layout.list_head.parse(data)
    usage = head.flags >> 3 & 3
    key = (state.nexus, head.list_id)
    if usage == 1 or (usage == ListIdUsage.NONE and head.list_id):
        raise bad_parameter(1, 4)
    if usage != ListIdUsage.NONE and key in unit.copies and unit.copies[key].status is CopyStatus.IN_PROGRESS:
        raise bad_parameter(0)
    segments = _parse(unit, data, head.target_bytes, head.segment_bytes, head.inline_bytes, state)
    copy = CopyList(unit, task, segments)
    if usage == ListIdUsage.HOLD:
        unit.copies.pop(key, None)
        while len(unit.copies) >= MAX_COPY_LISTS:
            del unit.copies[next(iter(unit.copies))]
        unit.copies[key] = copy
    copy.run()
    return PENDING


def _parse(
    unit: LogicalUnit, data: bytes, target_bytes: int, segment_bytes: int, inline_bytes: int, state: NexusState
) -> list[Segment]:
    """Raises Refusal."""
    listed = target_bytes + segment_bytes
    start = layout.LIST_HEAD_BYTES
    if listed > layout.MAX_LIST_BYTES or start + listed + inline_bytes > len(data):
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if inline_bytes:
        raise bad_parameter(12)
    if target_bytes % layout.TARGET_BYTES:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if target_bytes // layout.TARGET_BYTES > layout.MAX_TARGETS:
        raise illegal(Asc.TOO_MANY_TARGET_DESCRIPTORS)
    targets = [_target(unit, data[at : at + layout.TARGET_BYTES], at) for at in range(start, start + target_bytes, 32)]
    segments: list[Segment] = []
    at, end = start + target_bytes, start + listed
    while at < end:
        if len(segments) >= layout.MAX_SEGMENTS:
            raise illegal(Asc.TOO_MANY_SEGMENT_DESCRIPTORS)
        segment, length = _segment(targets, data[at:end], at, state)
        segments.append(segment)
        at += length
    return segments


def _target(unit: LogicalUnit, data: bytes, at: int) -> LogicalUnit | None:
    """The unit that an identification descriptor names; None when there is none (which matters only if it is used)."""
    if data[0] != layout.IDENTIFICATION_TARGET:
        raise illegal(Asc.UNSUPPORTED_TARGET_DESCRIPTOR_TYPE)
    fields = layout.target.parse(data)
    if fields.unit & layout.NUL:
        return None
    if fields.unit & 0x1F:
        raise bad_parameter(at + 1, 4)
    designator = fields.designator[: fields.designator_bytes]
    kind = fields.kind & 0x0F
    for other in unit.target.units.values():
        names = {
            int(DesignatorType.NAA): other.identity.naa,
            int(DesignatorType.T10_VENDOR): (VENDOR + other.identity.serial)[: len(fields.designator)],
        }
        if names.get(kind) == designator:
            return other
    return None


def _segment(targets: list[LogicalUnit | None], data: bytes, at: int, state: NexusState) -> tuple[Segment, int]:
    kind = data[0]
    if kind not in tuple(SegmentType):
        raise illegal(Asc.UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE)
    try:
        if kind == SegmentType.BLOCK_TO_BLOCK:
            fields = layout.block_segment.parse(data)
        else:
            fields = layout.offset_segment.parse(data)
    except ConstructError:
        raise bad_parameter(at + 2) from None
    source, destination = _reach(targets, fields.source), _reach(targets, fields.destination)
    source_offset, destination_offset = fields.source_lba, fields.destination_lba
    source_offset *= source.block_bytes
    destination_offset *= destination.block_bytes
    if kind == SegmentType.BLOCK_TO_BLOCK:
        length = fields.blocks * (destination if fields.flags & layout.DC else source).block_bytes
        size = layout.BLOCK_SEGMENT_BYTES
    else:
        source_offset += fields.source_offset_bytes
        destination_offset += fields.destination_offset_bytes
        length = fields.size_bytes
        size = layout.OFFSET_SEGMENT_BYTES
        if (source_offset | destination_offset | length) % (1 << layout.GRANULARITY_LOG2):
            raise bad_parameter(at + 8)
    if length > layout.MAX_SEGMENT_BYTES:
        raise bad_parameter(at + 8)
    _check(source, source_offset, length, Access.READ, state)
    _check(destination, destination_offset, length, Access.WRITE, state)
    return Segment(source, source_offset, destination, destination_offset, length), size


def _reach(targets: list[LogicalUnit | None], index: int) -> LogicalUnit:
    found = targets[index] if index < len(targets) else None
    if found is None or found.volume is None or found.sanitize is not None or found.stopped:
        raise Refusal(SenseKey.COPY_ABORTED, Asc.COPY_TARGET_DEVICE_NOT_REACHABLE)
    return found


def _check(unit: LogicalUnit, offset: int, length: int, access: int, state: NexusState) -> None:
    """Whether the copy manager may do there what it was told, on behalf of this nexus."""
    size_bytes = unit.blocks * unit.block_bytes
    unaligned = access == Access.WRITE and (offset | length) % unit.block_bytes
    reserved = unit.reserver not in (None, state.nexus) or unit.reservations.forbids(state.nexus.transport_id, access)
    protected = access == Access.WRITE and (unit.mode.software_write_protect or not unit.served().writable)
    if offset + length > size_bytes or unaligned or reserved or protected:
        raise Refusal(SenseKey.COPY_ABORTED, Asc.NONE)


def copy_status(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """RECEIVE COPY STATUS (LID1): also of a copy that is done, until another one takes its identifier."""
    copy = unit.copies.get((state.nexus, task.cdb[2]))
    if copy is None:
        raise bad_cdb(2)
    data: bytes = layout.copy_status.build(
        {"status": copy.status, "segments": copy.segments_done, "transferred": copy.done_bytes >> 10}
    )
    return data[: int.from_bytes(task.cdb[10:14], "big")]


def operating_parameters(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """RECEIVE COPY OPERATING PARAMETERS."""
    data: bytes = layout.operating_parameters.build(
        {
            "snlid": 1,
            "max_inline_bytes": 0,
            "held_bytes": 0,
            "stream_bytes": 0,
            "total_concurrent": 1,
            "max_concurrent": 1,
            "inline_granularity_log2": 0,
            "held_granularity_log2": 0,
        }
    )
    return data[: int.from_bytes(task.cdb[10:14], "big")]
