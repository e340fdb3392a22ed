"""A logical unit: one volume as initiators see it.

The hot path is `LogicalUnit.execute`: plain READs are answered from the page cache into one reply chunk, plain WRITEs
become one batch. Everything else goes through `_perform`: the checks that every command passes (unit attention,
reservations, state, CDB, write protection), then its handler.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING

from blockrepl.block import Op, Volume, WriteBatch, WriteFlag
from blockrepl.chunks import Chunk
from blockrepl.errors import BlockError, DamagedError
from blockrepl.formats.scsi import CDB_10, CDB_16, Asc, Opcode, SenseKey
from blockrepl.frontends.iscsi.scsi.commands import BY_KEY, OPCODES, Access, Command, key_of, wrong_bits
from blockrepl.frontends.iscsi.scsi.geometry import data_out_bytes
from blockrepl.frontends.iscsi.scsi.identity import UnitIdentity
from blockrepl.frontends.iscsi.scsi.limits import MAX_TRANSFER_BYTES
from blockrepl.frontends.iscsi.scsi.mode import ModePages
from blockrepl.frontends.iscsi.scsi.nexus_state import NexusState
from blockrepl.frontends.iscsi.scsi.ranges import Claim, Ranges
from blockrepl.frontends.iscsi.scsi.refusal import (
    Refusal,
    bad_cdb,
    conflict,
    illegal,
    not_ready,
    read_refusal,
    write_refusal,
)
from blockrepl.frontends.iscsi.scsi.reservations import Reservations
from blockrepl.frontends.iscsi.scsi.task_set import TaskSet
from blockrepl.frontends.iscsi.scsi.work import Chunks, TaskBatch
from blockrepl.frontends.iscsi.task import Attribute, Nexus, Task

if TYPE_CHECKING:
    from blockrepl.frontends.iscsi.scsi.copy import CopyList
    from blockrepl.frontends.iscsi.scsi.sanitize import Sanitize
    from blockrepl.frontends.iscsi.scsi.target import Target

RUN_BYTES = 1 << 20  # a run of writes is cut here, so that none waits for many megabytes of others
MAX_COPY_LISTS = 16  # whose results are held for RECEIVE COPY RESULTS

_READ_10, _READ_16, _WRITE_10, _WRITE_16 = (
    int(op) for op in (Opcode.READ_10, Opcode.READ_16, Opcode.WRITE_10, Opcode.WRITE_16)
)
_PLAIN_READS, _PLAIN_WRITES = (_READ_10, _READ_16), (_WRITE_10, _WRITE_16)
_ORDERED = int(Attribute.ORDERED)
_OP_WRITE, _FUA, _DPO_BIT, _FUA_BIT, _NACA = int(Op.WRITE), int(WriteFlag.FUA), 0x10, 0x08, 0x04
_NOT_WRITE_FLAGS, _NOT_READ_FLAGS = 0xFF ^ (_DPO_BIT | _FUA_BIT), 0xFF ^ _DPO_BIT
_WITHOUT_ATTENTION = frozenset((int(Opcode.INQUIRY), int(Opcode.REPORT_LUNS), int(Opcode.REQUEST_SENSE)))


logger = logging.getLogger(__name__)


class PathState(IntEnum):
    """Asymmetric access states that occur here (SPC-4, 5.15.2.4)."""

    ACTIVE_OPTIMIZED = 0x0
    STANDBY = 0x2
    UNAVAILABLE = 0x3


_STATE_ASC = {
    PathState.STANDBY: Asc.TARGET_PORT_IN_STANDBY_STATE,
    PathState.UNAVAILABLE: Asc.TARGET_PORT_IN_UNAVAILABLE_STATE,
}


class Pending:
    """What a handler returns that completes its task later."""


PENDING = Pending()
Answer = bytes | None | Pending
Handler = Callable[["LogicalUnit", Task, NexusState], Answer]


class LogicalUnit(TaskSet):
    """Owned by a `Target`. ``volume`` is there while ``state`` is ACTIVE_OPTIMIZED."""

    def __init__(self, target: Target, lun: int, identity: UnitIdentity, state: PathState) -> None:
        super().__init__(target.deliver)
        self.target = target
        self.lun = lun
        self.other_paths: dict[int, int] = {}  # target port group of another node → its state, as far as known
        self.identity = identity
        self.state = state
        self.volume: Volume | None = None
        self.problem = ""  # why a volume that could be served is not
        self.block_bytes = identity.block_bytes
        self.blocks = identity.size_bytes // identity.block_bytes
        self.physical_blocks = identity.physical_bytes // identity.block_bytes
        self.reservations = Reservations()
        self.reserver: Nexus | None = None  # RESERVE(6)
        self.stopped = False
        self.sanitize: Sanitize | None = None
        self.copies: dict[tuple[Nexus, int], CopyList] = {}
        self.ranges = Ranges()
        self._changing: deque[Callable[[], None]] = deque()  # changes of reservations, one at a time

    # the path

    def serve(self, volume: Volume) -> None:
        """The volume is served through this port from now on; not if its reservations cannot be read."""
        try:
            self.reservations = Reservations.unpack(volume.metadata())
        except (DamagedError, OSError) as error:
            if self.problem != str(error):
                self.problem = str(error)
                logger.error("iscsi: %s is not served: %s", volume.name, error)
            self.withdraw(PathState.UNAVAILABLE)
            return
        self.problem = ""
        grown = volume.size_bytes // self.block_bytes != self.blocks
        self.blocks = volume.size_bytes // self.block_bytes
        self.volume = volume
        if self.state is not PathState.ACTIVE_OPTIMIZED:
            self.state = PathState.ACTIVE_OPTIMIZED
            self.attend_all(Asc.ASYMMETRIC_ACCESS_STATE_CHANGED)
        if grown:
            self.attend_all(Asc.CAPACITY_DATA_HAS_CHANGED)
        self.regulate()

    def withdraw(self, state: PathState) -> None:
        """The volume is not served here: by another node (STANDBY), or by nobody (UNAVAILABLE)."""
        self.volume = None
        if self.state is not state:
            self.state = state
            self.attend_all(Asc.ASYMMETRIC_ACCESS_STATE_CHANGED)
        self.regulate()

    def check_size(self) -> None:
        """The volume may have grown."""
        if self.volume is not None:
            self.resized(self.volume.size_bytes)

    def resized(self, size_bytes: int) -> None:
        """The volume has this size, served here or not."""
        if size_bytes // self.block_bytes != self.blocks:
            self.blocks = size_bytes // self.block_bytes
            self.attend_all(Asc.CAPACITY_DATA_HAS_CHANGED)

    @property
    def path_asc(self) -> int:
        """Why this port does not give access; 0 when it does."""
        return int(_STATE_ASC.get(self.state, 0))

    @property
    def path_states(self) -> dict[int, int]:
        """Every target port group and its state."""
        return {**self.other_paths, self.target.port_group: int(self.state)}

    @property
    def has_atomic_writes(self) -> bool:
        """WRITE ATOMIC is there only if the volume keeps its promise; where it is not served, nobody knows."""
        return self.volume is None or self.volume.atomic_bytes > 0

    # nexuses

    def begin(self, nexus: Nexus) -> None:
        """A session begins."""
        state = self.nexuses[nexus] = NexusState(nexus)
        state.attend(Asc.POWER_ON_OR_RESET)

    def lose(self, nexus: Nexus) -> None:
        """A session ended; its tasks have been aborted."""
        self.nexuses.pop(nexus, None)
        if self.reserver is nexus:
            self.reserver = None
            self.regulate()
        for key in [key for key in self.copies if key[0] is nexus]:
            del self.copies[key]

    def attend(self, ports: dict[bytes, int]) -> None:
        """Unit attentions for initiator ports, by TransportID."""
        for state in self.nexuses.values():
            asc = ports.get(state.nexus.transport_id)
            if asc is not None:
                state.attend(asc)
        self.regulate()

    def attend_all(self, asc: int, but: Nexus | None = None) -> None:
        """A unit attention for every nexus, but one."""
        for nexus, state in self.nexuses.items():
            if nexus is not but:
                state.attend(asc)
        self.regulate()

    def regulate(self) -> None:
        """Work out again who may use the hot path. After every change of what it depends on."""
        volume, mode, reservations = self.volume, self.mode, self.reservations
        open_ = volume is not None and not self.stopped and self.sanitize is None
        writable = volume is not None and volume.writable and mode.write_cache and not mode.software_write_protect
        for nexus, state in self.nexuses.items():
            plain = open_ and not state.attentions and self.reserver in (None, nexus)
            state.plain_reads = plain and not reservations.forbids(nexus.transport_id, Access.READ)
            state.plain_writes = plain and writable and not reservations.forbids(nexus.transport_id, Access.WRITE)

    # the hot path

    def execute(self, tasks: Sequence[Task], state: NexusState) -> None:
        """Take tasks of one nexus, in order. Long on purpose: 2 µs a command here, twice that over method calls."""
        block, blocks = self.block_bytes, self.blocks
        unpack_10, unpack_16 = CDB_10.unpack_from, CDB_16.unpack_from
        volume = self.volume
        finished: list[Task] = []
        batch: TaskBatch | None = None
        chunk: Chunk | None = None
        at = room = 0
        for task in tasks:
            cdb = task.cdb
            opcode = cdb[0]
            plain = task.attribute < _ORDERED and not self._held and self._ordered is None
            if plain and opcode in _PLAIN_WRITES and state.plain_writes:
                if opcode == _WRITE_10:
                    _, flags, lba, _, count, control = unpack_10(cdb)
                else:
                    _, flags, lba, count, _, control = unpack_16(cdb)
                length = count * block
                views = task.data_out
                assert volume is not None
                if (
                    len(views) == 1
                    and 0 < length == len(views[0]) == task.expected_out_bytes <= volume.max_write_bytes
                    and lba + count <= blocks
                    and not (flags & _NOT_WRITE_FLAGS or control & _NACA)
                ):
                    if batch is None:
                        batch = TaskBatch(self._written)
                    elif batch.size_bytes + length > RUN_BYTES:
                        self._submit(batch)
                        batch = TaskBatch(self._written)
                    batch.ops.append(_OP_WRITE)
                    batch.offsets.append(lba * block)
                    batch.lengths.append(length)
                    batch.cookies.append(len(batch.tasks))
                    batch.payloads.append(views[0])
                    if flags & _FUA_BIT:
                        batch.flags.append(_FUA)
                        batch.fua = True
                    else:
                        batch.flags.append(0)
                    batch.size_bytes += length
                    batch.tasks.append(task)
                    continue
            elif plain and opcode in _PLAIN_READS and state.plain_reads:
                if opcode == _READ_10:
                    _, flags, lba, _, count, control = unpack_10(cdb)
                else:
                    _, flags, lba, count, _, control = unpack_16(cdb)
                length = count * block
                if (
                    0 < length == task.expected_in_bytes <= MAX_TRANSFER_BYTES
                    and lba + count <= blocks
                    and not (flags & _NOT_READ_FLAGS or control & _NACA)
                ):
                    assert volume is not None
                    if chunk is None or at + length > room:
                        if chunk is not None:
                            chunk.release()
                        chunk = self.target.pool.take(length)
                        at, room = 0, len(chunk.buffer)
                    view = chunk.view[at : at + length]
                    at += length
                    try:
                        filled = volume.read(lba * block, view, partial(self._read_done, task))
                    except BlockError as error:
                        self.refuse(task, read_refusal(error))
                        continue
                    chunk.hold()
                    task.in_chunk = chunk
                    task.data_in = (view,)
                    if filled:
                        finished.append(task)
                    else:
                        self._pending[task] = None
                    continue
            if batch is not None:
                self._submit(batch)
                batch = None
            self._take(task, state)
            volume = self.volume
        if chunk is not None:
            chunk.release()
        if finished:
            self._deliver(finished)
        if batch is not None:
            self._submit(batch)

    def _submit(self, batch: TaskBatch) -> None:
        """Hand a run of writes to the volume, unless an exclusive range stands in its way."""
        chunks: list[Chunk] = []
        for task in batch.tasks:
            chunks += task.chunks
            task.chunks = []
            task.data_out = []
        batch.chunk = Chunks(chunks)
        self._in_flight[batch] = None
        if self.ranges.exclusive:
            self.ranges.claim(self._claim(batch))
        else:
            self._submit_now(batch)

    def _claim(self, batch: TaskBatch) -> Claim:
        spans = [(offset, offset + length) for offset, length in zip(batch.offsets, batch.lengths, strict=True)]
        batch.claim = Claim(spans, False, partial(self._submit_now, batch))
        return batch.claim

    def _submit_now(self, batch: TaskBatch) -> None:
        if self.submit(batch):
            self._written(batch)

    def submit(self, batch: WriteBatch) -> bool:
        """As `Volume.submit`; fails when the volume has been withdrawn meanwhile."""
        if self.volume is None:
            batch.fail(BlockError(5, "the volume is no longer served here"))
            batch.release()
            return True
        return self.volume.submit(batch)

    def _written(self, batch: WriteBatch) -> None:
        assert isinstance(batch, TaskBatch)
        del self._in_flight[batch]
        if batch.errors is not None:
            for place, error in batch.first_errors().items():
                self.set_sense(batch.tasks[place], write_refusal(error))
        self._deliver(batch.tasks)
        if batch.claim is not None:
            self.ranges.release(batch.claim)
        if self._watchers or self._held or self._ordered is not None:
            self._ended(batch.tasks)

    def _read_done(self, task: Task, error: BlockError | None) -> None:
        if error is not None:
            self.drop_data_in(task)
            self.refuse(task, read_refusal(error))
        else:
            self.finish(task)

    @staticmethod
    def drop_data_in(task: Task) -> None:
        """The reply buffer of a read that failed."""
        if task.in_chunk is not None:
            task.in_chunk.release()
            task.in_chunk = None
        task.data_in = ()

    # every other command

    def _dispatch(self, task: Task, state: NexusState) -> None:
        self._pending[task] = None
        try:
            answer = self._perform(task, state)
        except Refusal as refusal:
            self.refuse(task, refusal)
            return
        if not isinstance(answer, Pending):
            if answer:
                task.data_in = (answer,)
            self.finish(task)

    def _perform(self, task: Task, state: NexusState) -> Answer:
        cdb = task.cdb
        opcode = cdb[0]
        task.needed_out_bytes = data_out_bytes(cdb, self.block_bytes)
        if state.attentions and opcode not in _WITHOUT_ATTENTION:
            asc = state.attentions.popleft()
            self.regulate()
            raise Refusal(SenseKey.UNIT_ATTENTION, asc)
        if opcode not in OPCODES or (opcode == Opcode.WRITE_ATOMIC_16 and not self.has_atomic_writes):
            raise illegal(Asc.INVALID_COMMAND_OPERATION_CODE)
        command = BY_KEY.get(key_of(cdb))
        if command is None:
            raise bad_cdb(1, 4)
        self._check_reservations(command, state.nexus)
        self._check_state(command)
        wrong = wrong_bits(command, cdb)
        if wrong is not None:
            raise bad_cdb(*wrong)
        if command.writes:
            if self.mode.software_write_protect:
                raise Refusal(SenseKey.DATA_PROTECT, Asc.SOFTWARE_WRITE_PROTECTED)
            if self.volume is not None and not self.volume.writable:
                raise Refusal(SenseKey.DATA_PROTECT, Asc.WRITE_PROTECTED)
        return self.target.handlers[command.opcode, command.service_action](self, task, state)

    def _check_reservations(self, command: Command, nexus: Nexus) -> None:
        if command.access != Access.FREE and self.reserver not in (None, nexus):
            raise conflict()
        if self.reservations.forbids(nexus.transport_id, command.access):
            raise conflict()

    def _check_state(self, command: Command) -> None:
        if command.anywhere:
            return
        if self.path_asc:
            raise not_ready(self.path_asc)
        if self.sanitize is not None:
            self.sanitize.check(command)
        if self.stopped and command.medium:
            raise not_ready(Asc.INITIALIZING_COMMAND_REQUIRED)

    def reset(self) -> None:
        """LOGICAL UNIT RESET, after its tasks have ended (SAM-5, 6.3.3)."""
        self.reserver = None
        for state in self.nexuses.values():
            state.prevents_removal = False
        self.mode = ModePages()
        self.attend_all(Asc.POWER_ON_OR_RESET)

    def _forget(self, tasks: Collection[Task]) -> None:
        if self.sanitize is not None:
            self.sanitize.forget(tasks)

    # reservations

    def change_reservations(self, change: Callable[[], None]) -> None:
        """Changes follow one another: each sees what the one before made durable. `reservations_changed` ends one."""
        self._changing.append(change)
        if len(self._changing) == 1:
            change()

    def reservations_changed(self) -> None:
        """The change under way is over."""
        self._changing.popleft()
        self.regulate()
        if self._changing:
            self._changing[0]()

    # for handlers

    def claim(self, claim: Claim) -> None:
        """Wait for a range: see `Ranges.claim`. Writes of the hot path become claims while exclusive ones exist."""
        if claim.exclusive and not self.ranges.exclusive:
            for batch in self._in_flight:
                if batch.claim is None:
                    self.ranges.granted[self._claim(batch)] = None
        self.ranges.claim(claim)

    def served(self) -> Volume:
        """The volume, for a handler that has just been called."""
        assert self.volume is not None
        return self.volume
