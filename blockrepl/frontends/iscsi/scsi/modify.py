"""Commands that read before they write, and those that write without being sent everything: COMPARE AND WRITE, ORWRITE,
WRITE SAME, UNMAP; and GET LBA STATUS.

Whatever a command is called, what it makes of the volume is what it is to replication: a write, zeroes or a trim.
"""

from __future__ import annotations

from collections.abc import Callable

from blockrepl.block import Op, WriteBatch, WriteFlag
from blockrepl.errors import BlockError
from blockrepl.formats import scsi as layout
from blockrepl.formats.scsi import (
    LBA_STATUS_DESCRIPTOR_BYTES,
    LBA_STATUS_HEAD_BYTES,
    UNMAP_DESCRIPTOR,
    UNMAP_DESCRIPTOR_BYTES,
    UNMAP_HEAD_BYTES,
    Asc,
    Opcode,
    Provisioning,
    SenseKey,
)
from blockrepl.frontends.iscsi.scsi.geometry import address, check_range
from blockrepl.frontends.iscsi.scsi.limits import (
    MAX_TRANSFER_BYTES,
    MAX_UNMAP_BLOCKS,
    MAX_UNMAP_DESCRIPTORS,
    MAX_WRITE_SAME_BYTES,
)
from blockrepl.frontends.iscsi.scsi.nexus_state import NexusState
from blockrepl.frontends.iscsi.scsi.ranges import Claim
from blockrepl.frontends.iscsi.scsi.refusal import Refusal, bad_cdb, bad_parameter, illegal, read_refusal
from blockrepl.frontends.iscsi.scsi.transfer import (
    Write,
    add,
    checked_address,
    data_for,
    end_write,
    first_error,
    length_byte,
    read_range,
    submit,
    write_blocks,
    write_flags,
)
from blockrepl.frontends.iscsi.scsi.unit import PENDING, Answer, LogicalUnit
from blockrepl.frontends.iscsi.scsi.work import joined
from blockrepl.frontends.iscsi.task import Task

_PATTERN_BYTES = 1 << 20
_MAX_EXTENT_BLOCKS = 0xFFFFFFFF


def _modify(
    unit: LogicalUnit, task: Task, offset: int, length: int, change: Callable[[memoryview], bytes | memoryview]
) -> Answer:
    """Read a range, write what ``change`` makes of it. ``change`` raises Refusal to leave it as it is."""
    flags = write_flags(unit, task.cdb) if task.cdb[0] != Opcode.WRITE_6 else write_flags(unit, task.cdb, 0)

    def end(error: BlockError | None) -> None:
        end_write(unit, task, claim, error)

    def have(view: memoryview, error: BlockError | None) -> None:
        try:
            if error is not None:
                raise read_refusal(error)
            new = memoryview(change(view))
        except Refusal as refusal:
            unit.refuse(task, refusal)
            unit.ranges.release(claim)
            return
        Write(unit, offset, [new], flags, end).start(unit, [])

    def go() -> None:
        if task.aborted:
            unit.finish(task)
            unit.ranges.release(claim)
        else:
            read_range(unit, offset, length, have)

    claim = Claim([(offset, offset + length)], True, go)
    unit.claim(claim)
    return PENDING


def write(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """WRITE (6), (10), (12), (16). When the initiator announced a part of a block less than the CDB says, what it sent
    is written and the rest of that block stays; the residual count says so (RFC 7143, 11.4.5.2)."""
    size = min(address(task.cdb)[1] * unit.block_bytes, task.out_bytes)
    if not size % unit.block_bytes:
        return write_blocks(unit, task, state)
    offset, _ = checked_address(unit, task.cdb, length_byte(task.cdb))
    data = joined(task.data_out)[:size]

    def change(view: memoryview) -> bytes:
        return bytes(data) + bytes(view[size:])

    return _modify(unit, task, offset, -(-size // unit.block_bytes) * unit.block_bytes, change)


def compare_and_write(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """COMPARE AND WRITE (SBC-3, 5.2)."""
    lba, count = address(task.cdb)
    check_range(lba, count, unit.blocks)
    length = count * unit.block_bytes
    if task.out_bytes != 2 * length or task.expected_out_bytes != 2 * length:
        if not count:  # the initiator meant 256: the field has no room for it
            raise bad_cdb(13)
        raise illegal(Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT)
    if not length:
        return None
    data = joined(task.data_out)
    expected, new = data[:length], data[length:]

    def change(view: memoryview) -> memoryview:
        if view != expected:
            at = next(at for at, (a, b) in enumerate(zip(view, expected, strict=True)) if a != b)
            raise Refusal(SenseKey.MISCOMPARE, Asc.MISCOMPARE_DURING_VERIFY, information=at)
        return memoryview(bytes(new))

    return _modify(unit, task, lba * unit.block_bytes, length, change)


def orwrite(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """ORWRITE (16) (SBC-3, 5.11)."""
    lba, count = address(task.cdb)
    check_range(lba, count, unit.blocks)
    length = count * unit.block_bytes
    if length > MAX_TRANSFER_BYTES:
        raise bad_cdb(length_byte(task.cdb))
    views = data_for(unit, task, length)
    length = sum(map(len, views))
    if not length:
        return None
    data = joined(views)

    def change(view: memoryview) -> bytes:
        both = int.from_bytes(view, "little") | int.from_bytes(data, "little")
        return both.to_bytes(length, "little")

    return _modify(unit, task, lba * unit.block_bytes, length, change)


# many blocks of one content


def write_same(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """WRITE SAME (10), (16) (SBC-3, 5.46): zeroes and unmapping stay what they are; a pattern becomes writes."""
    cdb = task.cdb
    lba, count = address(cdb)
    unmap, anchor = cdb[1] & 0x08, cdb[1] & 0x10
    no_data = cdb[0] == Opcode.WRITE_SAME_16 and bool(cdb[1] & 0x01)  # NDOB
    check_range(lba, count, unit.blocks)
    if anchor:
        raise bad_cdb(1, 4)
    if not count:  # WSNZ: "to the end" is not for commands that came by mistake
        raise bad_cdb(length_byte(cdb))
    if count * unit.block_bytes > MAX_WRITE_SAME_BYTES:
        raise bad_cdb(length_byte(cdb))
    size = 0 if no_data or (unmap and not task.expected_out_bytes) else unit.block_bytes
    task.needed_out_bytes = size
    if task.expected_out_bytes != size or task.out_bytes != size:
        raise illegal(Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT)
    offset, length = lba * unit.block_bytes, count * unit.block_bytes
    pattern = bytes(joined(task.data_out)) if size else b""
    task.release_out()
    flags = write_flags(unit, cdb, 0)
    if not any(pattern):
        batch = WriteBatch(lambda _: None)
        add(batch, Op.TRIM if unmap else Op.ZERO, offset, length, None, flags | (0 if unmap else WriteFlag.NO_HOLE))
        _submit_claimed(unit, task, batch, [(offset, offset + length)])
    else:
        Pattern(unit, task, offset, length, pattern, flags).start()
    return PENDING


def _submit_claimed(unit: LogicalUnit, task: Task, batch: WriteBatch, spans: list[tuple[int, int]]) -> None:
    batch.done = lambda batch: end_write(unit, task, claim, first_error(batch))
    claim = Claim(spans, False, lambda: submit(unit, batch))
    unit.claim(claim)


class Pattern:
    """One block written over and over: batch after batch, so that it does not fill the queue of the volume."""

    def __init__(self, unit: LogicalUnit, task: Task, offset: int, length: int, pattern: bytes, flags: int) -> None:
        self._unit = unit
        self._task = task
        self._offset = offset
        self._end = offset + length
        self._flags = flags
        size = min(length, _PATTERN_BYTES, unit.served().max_write_bytes // unit.block_bytes * unit.block_bytes)
        self._view = memoryview(pattern * (size // len(pattern)))
        self._claim = Claim([(offset, offset + length)], False, self._go)

    def start(self) -> None:
        """Wait for the range, then write."""
        self._unit.claim(self._claim)

    def _go(self) -> None:
        if self._offset >= self._end or self._task.aborted:
            end_write(self._unit, self._task, self._claim, None)
            return
        length = min(len(self._view), self._end - self._offset)
        batch = WriteBatch(self._written)
        add(batch, Op.WRITE, self._offset, length, self._view[:length], self._flags)
        self._offset += length
        submit(self._unit, batch)

    def _written(self, batch: WriteBatch) -> None:
        error = first_error(batch)
        if error is not None:
            end_write(self._unit, self._task, self._claim, error)
        else:
            self._unit.target.later(0.0, self._go)


def unmap(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """UNMAP (SBC-3, 5.28): every extent in one batch."""
    cdb = task.cdb
    if cdb[1] & 0x01:  # ANCHOR
        raise bad_cdb(1, 0)
    size = int.from_bytes(cdb[7:9], "big")
    if not size:
        return None
    if size < UNMAP_HEAD_BYTES or task.out_bytes < size:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    data = bytes(joined(task.data_out))[:size]
    listed = layout.unmap_head.parse(data).descriptor_bytes
    listed = min(listed, size - UNMAP_HEAD_BYTES) // UNMAP_DESCRIPTOR_BYTES * UNMAP_DESCRIPTOR_BYTES
    extents = list(UNMAP_DESCRIPTOR.iter_unpack(data[UNMAP_HEAD_BYTES : UNMAP_HEAD_BYTES + listed]))
    if len(extents) > MAX_UNMAP_DESCRIPTORS:
        raise bad_parameter(2)
    for lba, count in extents:
        check_range(lba, count, unit.blocks)
    if sum(count for _, count in extents) > MAX_UNMAP_BLOCKS:
        raise bad_parameter(UNMAP_HEAD_BYTES + 8)
    batch = WriteBatch(lambda _: None)
    flags = write_flags(unit, cdb, 0)
    spans = []
    for lba, count in extents:
        if count:
            start, length = lba * unit.block_bytes, count * unit.block_bytes
            add(batch, Op.TRIM, start, length, None, flags)
            spans.append((start, start + length))
    if not spans:
        return None
    task.release_out()
    _submit_claimed(unit, task, batch, spans)
    return PENDING


def get_lba_status(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """GET LBA STATUS (SBC-3, 5.5): what the image has allocated."""
    lba = int.from_bytes(task.cdb[2:10], "big")
    room = int.from_bytes(task.cdb[10:14], "big")
    if lba >= unit.blocks:
        raise illegal(Asc.LBA_OUT_OF_RANGE)
    most = max(1, (room - LBA_STATUS_HEAD_BYTES) // LBA_STATUS_DESCRIPTOR_BYTES)
    descriptors = b"".join(
        layout.lba_status_descriptor.build({"lba": start, "blocks": count, "provisioning": status})
        for start, count, status in extents_from(unit, lba)[:most]
    )
    head: bytes = layout.lba_status_head.build({"data_bytes": LBA_STATUS_HEAD_BYTES - 4 + len(descriptors)})
    return (head + descriptors)[:room]


def extents_from(unit: LogicalUnit, lba: int) -> list[tuple[int, int, Provisioning]]:
    """(first block, number of blocks, status) from a block to the end. A block that holds any data is mapped."""
    block = unit.block_bytes
    start, end = lba * block, unit.blocks * block
    found = unit.served().allocation(start, end - start)
    if found is None:
        found = [(start, end - start, True)]
    extents: list[tuple[int, int, Provisioning]] = []
    at = lba
    for offset, length, is_data in found:
        after = offset + length
        last = -(-after // block) if is_data else after // block
        status = Provisioning.MAPPED if is_data else Provisioning.DEALLOCATED
        while at < last:
            count = min(last - at, _MAX_EXTENT_BLOCKS)
            if extents and extents[-1][2] is status and extents[-1][1] + count <= _MAX_EXTENT_BLOCKS:
                extents[-1] = (extents[-1][0], extents[-1][1] + count, status)
            else:
                extents.append((at, count, status))
            at += count
    if at < unit.blocks:
        extents.append((at, min(unit.blocks - at, _MAX_EXTENT_BLOCKS), Provisioning.MAPPED))
    return extents
