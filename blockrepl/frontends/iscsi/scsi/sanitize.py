"""SANITIZE (SBC-3, 4.11 and 5.24): overwrite or erase everything. Goes on whatever becomes of the command.

An overwrite keeps to a rate: it passes through the journal like any other write, and must leave room in it for the
hosts of the group's other volumes.
"""

from __future__ import annotations

from collections.abc import Collection

from blockrepl.block import Op, WriteBatch, WriteFlag
from blockrepl.errors import BlockError
from blockrepl.formats import scsi as layout
from blockrepl.formats.scsi import SANITIZE_HEAD_BYTES, Asc, SenseKey, ServiceAction, progress
from blockrepl.frontends.iscsi.scsi.commands import Command
from blockrepl.frontends.iscsi.scsi.nexus_state import NexusState
from blockrepl.frontends.iscsi.scsi.refusal import Refusal, bad_cdb, bad_parameter, illegal, not_ready
from blockrepl.frontends.iscsi.scsi.transfer import add, first_error, submit
from blockrepl.frontends.iscsi.scsi.unit import PENDING, Answer, LogicalUnit
from blockrepl.frontends.iscsi.scsi.work import joined
from blockrepl.frontends.iscsi.task import Task

PIECE_BYTES = 1 << 20
RATE_BYTES_PER_S = 64 << 20
ERASE_BYTES = 256 << 20  # at a time
_IMMED, _AUSE, _INVERT = 0x80, 0x20, 0x80


class Sanitize:
    """An operation, running or failed. It is the unit's ``sanitize`` until it has succeeded."""

    def __init__(self, unit: LogicalUnit, task: Task | None, patterns: list[bytes], leave_on_failure: bool) -> None:
        self.unit = unit
        self.failed = False
        self.leave_on_failure = leave_on_failure  # AUSE: EXIT FAILURE MODE may end a failure
        self._task = task
        self._patterns = patterns  # one for each pass over the volume; none: erase
        self._offset = 0
        self._done_bytes = 0
        self._size_bytes = unit.served().size_bytes
        self._total_bytes = self._size_bytes * max(1, len(patterns))

    def check(self, command: Command) -> None:
        """Raises Refusal for what has to wait. After a failure only another SANITIZE is heard."""
        if self.failed and command.opcode == layout.Opcode.SANITIZE:
            return
        key, asc, specific = self.sense()
        raise Refusal(key, asc, specific=specific)

    def sense(self) -> tuple[SenseKey, int, bytes]:
        """Sense key, additional code and progress."""
        if self.failed:
            return SenseKey.MEDIUM_ERROR, Asc.SANITIZE_COMMAND_FAILED, b""
        return SenseKey.NOT_READY, Asc.SANITIZE_IN_PROGRESS, progress(self._done_bytes, self._total_bytes)

    def run(self) -> None:
        """The next piece."""
        if self._offset >= self._size_bytes:
            self._patterns = self._patterns[1:]
            self._offset = 0
            if not self._patterns:
                if self.unit.volume is None:
                    self._end(True)
                else:
                    self.unit.volume.flush(self._flushed)
                return
        batch = WriteBatch(self._written)
        left = self._size_bytes - self._offset
        if self._patterns:
            view = memoryview(self._patterns[0])[:left]
            add(batch, Op.WRITE, self._offset, len(view), view, int(WriteFlag.NONE))
        else:
            add(batch, Op.TRIM, self._offset, min(ERASE_BYTES, left), None, int(WriteFlag.NONE))
        submit(self.unit, batch)

    def _written(self, batch: WriteBatch) -> None:
        if first_error(batch) is not None:
            self._end(True)
            return
        length = batch.lengths[0]
        self._offset += length
        self._done_bytes += length
        self.unit.target.later(length / RATE_BYTES_PER_S if self._patterns else 0.0, self.run)

    def _flushed(self, error: BlockError | None) -> None:
        self._end(error is not None)

    def _end(self, failed: bool) -> None:
        unit, task, self._task = self.unit, self._task, None
        self.failed = failed
        if not failed:
            unit.sanitize = None
            unit.regulate()
        if task is None:
            return
        if failed:
            unit.refuse(task, Refusal(SenseKey.MEDIUM_ERROR, Asc.SANITIZE_COMMAND_FAILED))
        else:
            unit.finish(task)

    def forget(self, aborted: Collection[Task]) -> None:
        """If the command is among these: it is aborted, and the operation goes on."""
        task = self._task
        if task is not None and task in aborted:
            self._task = None
            self.unit.finish(task)


def sanitize(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """SANITIZE, by its service action."""
    cdb = task.cdb
    action = cdb[1] & 0x1F
    size = int.from_bytes(cdb[7:9], "big")
    if action == ServiceAction.SANITIZE_EXIT_FAILURE_MODE:
        return _exit_failure_mode(unit, size)
    patterns: list[bytes] = []
    if action == ServiceAction.SANITIZE_OVERWRITE:
        patterns = _patterns(unit, task, size)
    elif size:
        raise bad_cdb(7)
    task.release_out()
    immediate = bool(cdb[1] & _IMMED)
    operation = Sanitize(unit, None if immediate else task, patterns, bool(cdb[1] & _AUSE))
    unit.sanitize = operation
    unit.regulate()
    operation.run()
    return None if immediate else PENDING


def _patterns(unit: LogicalUnit, task: Task, size: int) -> list[bytes]:
    """What each pass writes, a piece of it. Raises Refusal."""
    if not SANITIZE_HEAD_BYTES < size <= SANITIZE_HEAD_BYTES + unit.block_bytes:
        raise bad_cdb(7)
    if task.out_bytes < size:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    data = bytes(joined(task.data_out))[:size]
    head = layout.sanitize_overwrite.parse(data)
    count = head.how & 0x1F
    if not count or head.how & 0x60:  # TEST: vendor specific, and there is none
        raise bad_parameter(0)
    if head.pattern_bytes != size - SANITIZE_HEAD_BYTES:
        raise bad_parameter(2)
    pattern = data[SANITIZE_HEAD_BYTES:]
    block = (pattern * (unit.block_bytes // len(pattern) + 1))[: unit.block_bytes]  # each block begins anew
    limit = unit.served().max_write_bytes // unit.block_bytes * unit.block_bytes
    piece = block * (min(PIECE_BYTES, limit) // unit.block_bytes)
    if not head.how & _INVERT:
        return [piece] * count
    inverted = bytes(byte ^ 0xFF for byte in block) * (len(piece) // len(block))
    return [inverted if number % 2 else piece for number in range(count)]


def _exit_failure_mode(unit: LogicalUnit, size: int) -> Answer:
    if size:
        raise bad_cdb(7)
    if unit.sanitize is not None:
        if not unit.sanitize.failed:
            raise not_ready(Asc.SANITIZE_IN_PROGRESS)
        if not unit.sanitize.leave_on_failure:
            raise bad_cdb(1, 4)
        unit.sanitize = None
        unit.regulate()
    return None
