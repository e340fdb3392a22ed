"""READ, WRITE and their kin on the slow path, whole commands that only move data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from blockrepl.block import Op, WriteBatch, WriteFlag
from blockrepl.chunks import Chunk
from blockrepl.errors import BlockError
from blockrepl.formats.scsi import Asc, SenseKey
from blockrepl.frontends.iscsi.scsi.geometry import address, check_range
from blockrepl.frontends.iscsi.scsi.limits import MAX_PREFETCH_BYTES, MAX_TRANSFER_BYTES
from blockrepl.frontends.iscsi.scsi.nexus_state import NexusState
from blockrepl.frontends.iscsi.scsi.ranges import Claim
from blockrepl.frontends.iscsi.scsi.refusal import Refusal, bad_cdb, illegal, read_refusal, write_refusal
from blockrepl.frontends.iscsi.scsi.unit import PENDING, Answer, LogicalUnit
from blockrepl.frontends.iscsi.scsi.work import Chunks, cut, joined
from blockrepl.frontends.iscsi.task import Task

_FUA_BIT = 0x08
_PIECE_BYTES = 1 << 20

ReadDone = Callable[[memoryview, BlockError | None], None]
WriteDone = Callable[[BlockError | None], None]


# pieces that other commands use too


def read_range(unit: LogicalUnit, offset: int, length: int, done: ReadDone) -> None:
    """Read into a buffer of its own, which is given back when ``done`` returns."""
    chunk = unit.target.pool.take(length)
    view = chunk.view[:length]

    def finished(error: BlockError | None) -> None:
        try:
            done(view, error)
        finally:
            chunk.release()

    if unit.volume is None:
        finished(BlockError(5, "the volume is no longer served here"))
        return
    try:
        filled = unit.volume.read(offset, view, finished)
    except BlockError as error:
        finished(error)
        return
    if filled:
        finished(None)


def submit(unit: LogicalUnit, batch: WriteBatch) -> None:
    """Hand a batch over; its ``done`` is called in any case."""
    if unit.submit(batch):
        batch.done(batch)


def first_error(batch: WriteBatch) -> BlockError | None:
    """Of a completed batch."""
    return next((error for error in batch.errors or () if error is not None), None)


def add(batch: WriteBatch, op: int, offset: int, length: int, payload: memoryview | None, flags: int) -> None:
    """One more command in a batch."""
    batch.ops.append(op)
    batch.offsets.append(offset)
    batch.lengths.append(length)
    batch.payloads.append(payload)
    batch.flags.append(flags)
    batch.cookies.append(0)
    batch.fua = batch.fua or bool(flags & WriteFlag.FUA)
    if payload is not None:
        batch.size_bytes += length


class Write:
    """Data for one range: as many batches as the volume's limit needs, under one claim that it is given."""

    def __init__(self, unit: LogicalUnit, offset: int, views: list[memoryview], flags: int, done: WriteDone) -> None:
        self._done = done
        self._error: BlockError | None = None
        limit = unit.volume.max_write_bytes if unit.volume is not None else MAX_TRANSFER_BYTES
        limit -= limit % unit.block_bytes
        batches = [WriteBatch(self._written)]
        for view in views:
            for start in range(0, len(view), limit):
                piece = view[start : start + limit]
                if batches[-1].size_bytes + len(piece) > limit:
                    batches.append(WriteBatch(self._written))
                add(batches[-1], Op.WRITE, offset, len(piece), piece, flags)
                offset += len(piece)
        self._left = len(batches)
        self.batches = batches

    def start(self, unit: LogicalUnit, chunks: list[Chunk]) -> None:
        """The chunks are released when all batches have been."""
        shared = Chunks(chunks, uses=len(self.batches))
        for batch in self.batches:
            batch.chunk = shared
        for batch in self.batches:
            submit(unit, batch)

    def _written(self, batch: WriteBatch) -> None:
        self._error = self._error or first_error(batch)
        self._left -= 1
        if not self._left:
            self._done(self._error)


def give_chunks(task: Task) -> list[Chunk]:
    """The task's Data-Out passes to a batch."""
    chunks, task.chunks, task.data_out = task.chunks, [], []
    return chunks


def end_write(unit: LogicalUnit, task: Task, claim: Claim | None, error: BlockError | None) -> None:
    """A write is complete."""
    if error is not None:
        unit.refuse(task, write_refusal(error))
    else:
        unit.finish(task)
    if claim is not None:
        unit.ranges.release(claim)


def write_flags(unit: LogicalUnit, cdb: bytes, fua_bit: int = _FUA_BIT) -> int:
    """FUA as the CDB says, or for every write while the write cache is off."""
    return int(WriteFlag.FUA) if cdb[1] & fua_bit or not unit.mode.write_cache else 0


def checked_address(unit: LogicalUnit, cdb: bytes, length_byte: int) -> tuple[int, int]:
    """(offset, length) in bytes of a transfer. Raises Refusal."""
    lba, count = address(cdb)
    check_range(lba, count, unit.blocks)
    if count * unit.block_bytes > MAX_TRANSFER_BYTES:
        raise bad_cdb(length_byte)
    return lba * unit.block_bytes, count * unit.block_bytes


def length_byte(cdb: bytes) -> int:
    """Where a block command's CDB has its length."""
    return {0: 4, 1: 7, 2: 7, 4: 10, 5: 6}[cdb[0] >> 5]


def data_for(unit: LogicalUnit, task: Task, length: int) -> list[memoryview]:
    """The Data-Out of a write of ``length`` bytes: whole blocks, fewer than asked for when the initiator announced
    fewer. Raises Refusal when it announced a part of a block: nothing is written then."""
    size = min(length, task.out_bytes)
    if size % unit.block_bytes:
        raise illegal(Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT)
    return cut(task.data_out, size, unit.block_bytes)


# commands


def read(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """READ (6), (10), (12), (16)."""
    cdb = task.cdb
    offset, length = checked_address(unit, cdb, length_byte(cdb))
    if not length:
        return None
    if cdb[0] >= 0x20 and cdb[1] & _FUA_BIT:
        unit.served().flush(partial(_flushed_before_read, unit, task, offset, length))
    else:
        _read(unit, task, offset, length)
    return PENDING


def _flushed_before_read(unit: LogicalUnit, task: Task, offset: int, length: int, error: BlockError | None) -> None:
    """FUA: what is read is on the medium (SBC-3, 4.14)."""
    if error is not None:
        unit.refuse(task, read_refusal(error))
    else:
        _read(unit, task, offset, length)


def _read(unit: LogicalUnit, task: Task, offset: int, length: int) -> None:
    chunk = unit.target.pool.take(length)
    task.in_chunk = chunk
    view = chunk.view[:length]
    task.data_in = (view,)

    def done(error: BlockError | None) -> None:
        if error is not None:
            unit.drop_data_in(task)
            unit.refuse(task, read_refusal(error))
        else:
            unit.finish(task)

    try:
        if unit.volume is None:
            raise BlockError(5, "the volume is no longer served here")
        filled = unit.volume.read(offset, view, done)
    except BlockError as error:
        done(error)
        return
    if filled:
        done(None)


def write_blocks(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """WRITE (6), (10), (12), (16) of whole blocks, WRITE ATOMIC (16) behind its own checks."""
    cdb = task.cdb
    offset, length = checked_address(unit, cdb, length_byte(cdb))
    views = data_for(unit, task, length)
    if not views:
        return None
    flags = write_flags(unit, cdb) if cdb[0] >= 0x20 else write_flags(unit, cdb, 0)
    start_write(unit, task, offset, views, flags)
    return PENDING


def start_write(unit: LogicalUnit, task: Task, offset: int, views: list[memoryview], flags: int) -> None:
    """Write and end the task."""
    size = sum(map(len, views))
    claim = Claim([(offset, offset + size)], False, lambda: whole.start(unit, chunks))
    whole = Write(unit, offset, views, flags, lambda error: end_write(unit, task, claim, error))
    chunks = give_chunks(task)
    unit.claim(claim)


def write_atomic(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """WRITE ATOMIC (16) (SBC-4, 5.46): one batch, so one record of the journal; all of it survives or nothing."""
    cdb = task.cdb
    lba, count = address(cdb)
    check_range(lba, count, unit.blocks)
    if int.from_bytes(cdb[10:12], "big"):
        raise bad_cdb(10)
    if count * unit.block_bytes > unit.served().atomic_bytes:
        raise bad_cdb(12)
    if task.out_bytes < count * unit.block_bytes:
        raise illegal(Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT)
    return write_blocks(unit, task, state)


def synchronize_cache(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """SYNCHRONIZE CACHE (10), (16): the whole cache, whatever range was asked for."""
    lba, count = address(task.cdb)
    check_range(lba, count, unit.blocks)
    immediate = task.cdb[1] & 0x02

    def flushed(error: BlockError | None) -> None:
        if not immediate:
            end_write(unit, task, None, error)

    unit.served().flush(flushed)
    return None if immediate else PENDING


def pre_fetch(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """PRE-FETCH (10), (16): into the page cache. GOOD, not CONDITION MET: the page cache promises to keep nothing."""
    lba, count = address(task.cdb)
    check_range(lba, count, unit.blocks)
    count = count or unit.blocks - lba
    length = min(count * unit.block_bytes, MAX_PREFETCH_BYTES)
    if length:
        read_range(unit, lba * unit.block_bytes, length, lambda _view, _error: None)
    return None


class Verify:
    """Read a range, piece by piece, and compare it with what was sent, if anything was."""

    def __init__(
        self, unit: LogicalUnit, task: Task, offset: int, length: int, expected: memoryview | None,
        done: Callable[[Refusal | None], None],
    ) -> None:  # fmt: skip
        self._unit = unit
        self._task = task
        self._start = offset
        self._offset = offset
        self._end = offset + length
        self._expected = expected  # as long as the range, or one block for each block of it
        self._done = done

    def run(self) -> None:
        """Pieces that are in the page cache follow each other at once, up to a limit; then the loop gets its turn."""
        if self._offset >= self._end or self._task.aborted:
            self._done(None)
            return
        length = min(_PIECE_BYTES, self._end - self._offset)
        read_range(self._unit, self._offset, length, self._have)

    def _have(self, view: memoryview, error: BlockError | None) -> None:
        if error is not None:
            self._done(read_refusal(error))
            return
        if self._differs(view):
            self._done(Refusal(SenseKey.MISCOMPARE, Asc.MISCOMPARE_DURING_VERIFY))
            return
        self._offset += len(view)
        if self._offset >= self._end:
            self._done(None)
        else:
            self._unit.target.later(0.0, self.run)

    def _differs(self, view: memoryview) -> bool:
        expected, block = self._expected, self._unit.block_bytes
        if expected is None:
            return False
        if len(expected) == block:
            return any(view[at : at + block] != expected for at in range(0, len(view), block))
        at = self._offset - self._start
        return view != expected[at : at + len(view)]


def verify(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """VERIFY (10), (12), (16)."""
    cdb = task.cdb
    lba, count = address(cdb)
    check_range(lba, count, unit.blocks)
    length = count * unit.block_bytes
    expected = _expected(unit, task, length)

    def done(refusal: Refusal | None) -> None:
        if refusal is not None:
            unit.refuse(task, refusal)
        else:
            unit.finish(task)

    Verify(unit, task, lba * unit.block_bytes, length, expected, done).run()
    return PENDING


def _expected(unit: LogicalUnit, task: Task, length: int) -> memoryview | None:
    """What BYTCHK says is to be compared. Raises Refusal."""
    check = task.cdb[1] >> 1 & 3
    if check == 2:
        raise bad_cdb(1, 2)
    if check == 0 or not length:
        return None
    needed = length if check == 1 else unit.block_bytes
    if needed > MAX_TRANSFER_BYTES:
        raise bad_cdb(length_byte(task.cdb))
    if task.out_bytes < needed:
        raise illegal(Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT)
    return joined(task.data_out)[:needed]


def write_and_verify(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """WRITE AND VERIFY (10), (12), (16): durable, then read back, and compared if BYTCHK says so."""
    cdb = task.cdb
    check = cdb[1] >> 1 & 3
    if check > 1:
        raise bad_cdb(1, 2)
    offset, length = checked_address(unit, cdb, length_byte(cdb))
    views = data_for(unit, task, length)
    if not views:
        return None
    size = sum(map(len, views))
    expected = memoryview(bytes(joined(views))) if check else None

    def verified(refusal: Refusal | None) -> None:
        if refusal is not None:
            unit.refuse(task, refusal)
        else:
            unit.finish(task)
        unit.ranges.release(claim)

    def written(error: BlockError | None) -> None:
        if error is not None:
            end_write(unit, task, claim, error)
        else:
            Verify(unit, task, offset, size, expected, verified).run()

    whole = Write(unit, offset, views, int(WriteFlag.FUA), written)
    chunks = give_chunks(task)
    claim = Claim([(offset, offset + size)], True, lambda: whole.start(unit, chunks))
    unit.claim(claim)
    return PENDING
