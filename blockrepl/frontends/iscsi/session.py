"""One session in its full feature phase: joins the cut PDUs, the device server and the stream.

The hot path is per chunk of input: all its commands become tasks, one `execute`, and one gathered send of what
completed at once. Sources: RFC 7143, 4.2.2 (CmdSN window), 4.2.5 (data), 11.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockrepl.block import Buffer
from blockrepl.chunks import Chunk, ChunkPool
from blockrepl.errors import ProtocolError
from blockrepl.formats import iscsi
from blockrepl.formats.iscsi import (
    BHS_BYTES,
    DATA_OUT,
    FINAL,
    IMMEDIATE,
    LUNS,
    NO_LUN,
    NO_TAG,
    OPCODE_MASK,
    SCSI_COMMAND,
    AsyncEvent,
    CommandFlag,
    Opcode,
    RejectReason,
)
from blockrepl.frontends.iscsi.answers import MASK, Answers
from blockrepl.frontends.iscsi.discovery import Portals, TextExchange
from blockrepl.frontends.iscsi.execution import Execution, Output
from blockrepl.frontends.iscsi.login import Request
from blockrepl.frontends.iscsi.management import Management
from blockrepl.frontends.iscsi.pdu import Framing, FramingError, Pdu, extended
from blockrepl.frontends.iscsi.task import DeviceServer, Event, EventKind, Nexus, Task
from blockrepl.frontends.iscsi.transfers import CHECK_CONDITION, Transfers

MAX_IMMEDIATE = 32  # immediate commands at a time
SILENT_TICKS = 7  # without input, then we ask; as many again, then the connection is dead: a client may sleep a minute
_COMMAND, _DATA_OUT = int(Opcode.SCSI_COMMAND), int(Opcode.DATA_OUT)
_ATTRIBUTE = int(CommandFlag.ATTRIBUTE)
_KIND = 0xFF & ~_ATTRIBUTE
_PLAIN_READ, _PLAIN_WRITE, _PLAIN = FINAL | CommandFlag.READ, FINAL | CommandFlag.WRITE, FINAL

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the server gives each session. ``reset_all`` ends every session (target cold reset)."""

    device: DeviceServer
    pool: ChunkPool
    portals: Portals
    target_name: str
    portal_group: int
    reset_all: Callable[[], None]


class Session:
    """``ended`` is called once. ``nexus`` is None in a discovery session, which has no SCSI.

    It takes PDUs in their order and makes tasks of them; `Execution` has the tasks from then on.
    """

    def __init__(
        self, surroundings: Surroundings, request: Request, stream: Output, peer: str, ended: Callable[[Session], None]
    ) -> None:
        self.peer = peer
        self.request = request
        self.stream = stream
        self.violation = ""
        self.target_name = surroundings.target_name
        parameters = request.parameters
        self.nexus: Nexus | None = None
        if not request.discovery:
            self.nexus = Nexus(
                request.initiator_name, request.isid, surroundings.target_name, surroundings.portal_group
            )  # fmt: skip
        self._device = surroundings.device
        self._pool = surroundings.pool
        self._ended = ended
        self._framing = Framing()
        self._framing.header_digest, self._framing.data_digest = parameters.header_digest, parameters.data_digest
        self._framing.max_data_bytes = parameters.max_recv_bytes
        self._parameters = parameters
        self._answers = Answers(parameters, self._framing, request.cmd_sn, request.stat_sn)
        self._execution = Execution(surroundings.device, self._answers, stream)
        self._transfers = Transfers(
            parameters, self._answers, self._execution.add, self._refuse, self._execution.queue
        )  # fmt: skip
        text = TextExchange(
            surroundings.target_name, surroundings.portals, parameters, discovery=request.discovery
        )  # fmt: skip
        self._management = Management(self, self._answers, text, surroundings.reset_all)
        self._early: dict[int, tuple[Chunk, Pdu] | None] = {}  # by CmdSN; None: considered received
        self._heard = True
        self._silent_ticks = 0
        if self.nexus is not None:
            self._device.nexus_begun(self.nexus)

    @property
    def in_flight(self) -> int:
        """Commands received and not answered."""
        return len(self._execution.active)

    @property
    def commands(self) -> int:
        """Commands handed to the device server so far."""
        return self._execution.commands

    @property
    def over(self) -> bool:
        """The connection is gone, or about to be."""
        return self._execution.over

    # input

    def received(self, chunk: Chunk, start: int, end: int) -> tuple[int, int]:
        """See `blockrepl.stream.Consumer`."""
        pdus: list[Pdu] = []
        self._heard = True
        try:
            at = self._framing.cut(chunk, start, end, pdus)
        except FramingError as error:
            self.violate(str(error))
            return end - start, 0
        self._execution.inside = True
        self._take(chunk, pdus)
        self._execution.inside = False
        self._execution.settle()
        return at - start, self._framing.need

    def _take(self, chunk: Chunk, pdus: Sequence[Pdu]) -> None:
        """The hot loop: long on purpose. Commands that came in order, alone or with all their data, are tasks at
        once; whatever is unusual has a method."""
        buffer, view = chunk.buffer, chunk.view
        execution, answers, nexus = self._execution, self._answers, self.nexus
        unpack, active, ready = SCSI_COMMAND.unpack_from, execution.active, execution.ready
        begins, done, luns, immediate_limit = self._transfers.begins, execution.done, LUNS, self._immediate_limit
        closed = answers.max_cmd_sn + 1 & MASK
        for pdu in pdus:
            at, data_at, data_end, intact = pdu
            if buffer[at] == _COMMAND and intact and nexus is not None:
                _, flags, _, lengths, lun, tag, expected, cmd_sn, _, cdb = unpack(buffer, at)
                kind = flags & _KIND
                if cmd_sn == answers.exp_cmd_sn != closed and tag not in active and tag != NO_TAG and lengths < 1 << 24:
                    task = None
                    if kind == _PLAIN_READ:
                        if not lengths:
                            task = Task(nexus, luns.get(lun, NO_LUN), cdb, flags & _ATTRIBUTE, tag, expected, 0, done)
                            execution.ready_in_bytes += expected
                    elif kind == _PLAIN_WRITE:
                        if lengths == expected <= immediate_limit:
                            task = Task(nexus, luns.get(lun, NO_LUN), cdb, flags & _ATTRIBUTE, tag, 0, expected, done)
                            if expected:
                                task.data_out.append(view[data_at:data_end])
                                task.chunks.append(chunk)
                                chunk.users += 1
                    elif kind == _PLAIN and not lengths and not expected:
                        task = Task(nexus, luns.get(lun, NO_LUN), cdb, flags & _ATTRIBUTE, tag, 0, 0, done)
                    if task is not None:
                        begins(tag)
                        answers.exp_cmd_sn = cmd_sn + 1 & MASK
                        active[tag] = task
                        ready.append(task)
                        continue
            self._unusual(chunk, pdu)
            if self.over:
                return
            if self._early:
                self._take_early()
        if self._early:
            self._take_early()

    @property
    def _immediate_limit(self) -> int:
        return self._parameters.first_burst_bytes if self._parameters.immediate_data else 0

    def _take_early(self) -> None:
        """Commands that came before their turn, now that it may have come."""
        while not self.over and self._answers.exp_cmd_sn in self._early:
            held = self._early.pop(self._answers.exp_cmd_sn)
            if held is None:
                self._answers.exp_cmd_sn = self._answers.exp_cmd_sn + 1 & MASK
                self._answers.max_cmd_sn = self._answers.max_cmd_sn + 1 & MASK
            else:
                self._unusual(*held)

    def _unusual(self, chunk: Chunk, pdu: Pdu) -> None:
        """Any PDU but a plain command in its turn."""
        opcode = chunk.buffer[pdu.at]
        kind = opcode & OPCODE_MASK
        header = bytes(chunk.view[pdu.at : pdu.at + BHS_BYTES])
        if kind == _DATA_OUT and self.nexus is not None:
            self._data_out(chunk, pdu, header)
            return
        if kind not in _REQUESTS or (self.nexus is None and kind in _NEEDS_NEXUS):
            self.reject(RejectReason.NOT_SUPPORTED if kind not in _REQUESTS else RejectReason.PROTOCOL_ERROR, header)
            return
        if not pdu.intact:
            self.reject(RejectReason.DATA_DIGEST, header)  # its turn stays: the initiator may send it again (7.8)
            return
        immediate = bool(opcode & IMMEDIATE)
        if not immediate and not (kind == Opcode.NOP_OUT and header[16:20] == b"\xff\xff\xff\xff"):
            cmd_sn = int.from_bytes(header[24:28], "big")
            if cmd_sn != self._answers.exp_cmd_sn or self._answers.window_closed:
                self._out_of_turn(cmd_sn, chunk, pdu)
                return
            self._answers.exp_cmd_sn = cmd_sn + 1 & MASK
        if kind == _COMMAND:
            self._command(chunk, pdu, header, immediate=immediate)
        else:
            if not immediate:
                self._answers.max_cmd_sn = self._answers.max_cmd_sn + 1 & MASK  # answered at once
            self._management.receive(kind, header, chunk.view[pdu.data_at : pdu.data_end])

    def _out_of_turn(self, cmd_sn: int, chunk: Chunk, pdu: Pdu) -> None:
        """Outside the window, or there already: ignored (4.2.2.1). Else it waits."""
        answers = self._answers
        ahead = cmd_sn - answers.exp_cmd_sn & MASK
        if answers.window_closed or ahead > answers.max_cmd_sn - answers.exp_cmd_sn & MASK or cmd_sn in self._early:
            return
        own = Chunk(pdu.data_end - pdu.at, None)
        own.view[:] = chunk.view[pdu.at : pdu.data_end]
        self._early[cmd_sn] = own, Pdu(0, pdu.data_at - pdu.at, pdu.data_end - pdu.at, True)

    def skip(self, cmd_sn: int) -> bool:
        """Consider a command that is on its way received (11.6.1); False when it cannot be."""
        answers = self._answers
        ahead = cmd_sn - answers.exp_cmd_sn & MASK
        if answers.window_closed or ahead > answers.max_cmd_sn - answers.exp_cmd_sn & MASK:
            return False
        self._early[cmd_sn] = None
        return True

    # commands

    def _command(self, chunk: Chunk, pdu: Pdu, header: bytes, *, immediate: bool) -> None:
        assert self.nexus is not None
        _, flags, _, lengths, lun, tag, expected, _, _, cdb = SCSI_COMMAND.unpack(header)
        reason = self._command_fault(flags, tag, expected, pdu, immediate=immediate)
        read_bytes = 0
        if reason is None and lengths >> 24:
            segments_at = pdu.at + BHS_BYTES
            try:
                segments = chunk.view[segments_at : segments_at + (lengths >> 24) * 4]
                cdb, read_bytes = extended(cdb, segments)
            except ProtocolError:
                reason = RejectReason.INVALID_FIELD
        if reason is not None:
            if not immediate:
                self._answers.max_cmd_sn = self._answers.max_cmd_sn + 1 & MASK
            self.reject(reason, header)
            return
        writes, reads = bool(flags & CommandFlag.WRITE), bool(flags & CommandFlag.READ)
        expected_in = (read_bytes if writes else expected) if reads else 0
        expected_out = expected if writes else 0
        lun, attribute, done = LUNS.get(lun, NO_LUN), flags & _ATTRIBUTE, self._execution.done
        task = Task(self.nexus, lun, cdb, attribute, tag, expected_in, expected_out, done)
        self._execution.active[tag] = task
        if immediate:
            self._execution.immediate.add(tag)
        self._transfers.begins(tag)
        final = bool(flags & FINAL)
        needed = min(expected_out, self._device.data_out_bytes(task.lun, cdb)) if writes else 0
        if needed:
            data = chunk.view[pdu.data_at : pdu.data_end]
            self._transfers.begin(task, needed, chunk, data, final=final)
        else:
            if not final:
                self._transfers.ignore(tag)
            self._execution.add(task)

    def _command_fault(
        self, flags: int, tag: int, expected: int, pdu: Pdu, *, immediate: bool
    ) -> RejectReason | None:  # fmt: skip
        data_bytes = pdu.data_end - pdu.data_at
        writes = bool(flags & CommandFlag.WRITE)
        if tag == NO_TAG:
            return RejectReason.INVALID_FIELD
        if tag in self._execution.active:
            return RejectReason.TASK_IN_PROGRESS
        if immediate and len(self._execution.immediate) >= MAX_IMMEDIATE:
            return RejectReason.IMMEDIATE
        if data_bytes and (not writes or not self._parameters.immediate_data or data_bytes > expected):
            return RejectReason.PROTOCOL_ERROR
        if not flags & FINAL and not writes:
            return RejectReason.INVALID_FIELD
        return None

    def _data_out(self, chunk: Chunk, pdu: Pdu, header: bytes) -> None:
        _, flags, _, _, _, tag, target_tag, _, _, _, data_sn, offset, _ = DATA_OUT.unpack(header)
        if not pdu.intact:
            self.reject(RejectReason.DATA_DIGEST, header)
        view = chunk.view[pdu.data_at : pdu.data_end]
        known = self._transfers.data(
            tag, target_tag, data_sn, offset, bool(flags & FINAL), chunk, view, intact=pdu.intact
        )
        if not known:
            self.reject(RejectReason.INVALID_FIELD, header)

    def _refuse(self, task: Task, sense: bytes) -> None:
        """Not for the device server: its data came wrong."""
        task.release_out()
        task.status = CHECK_CONDITION
        task.sense = sense
        self._execution.done_without([task])

    # output

    def send(self, buffers: list[Buffer]) -> None:
        """PDUs built just now."""
        if not self.over:
            self._execution.queue(buffers)

    def reject(self, reason: RejectReason, header: bytes) -> None:
        """Say that a PDU was not taken (11.17)."""
        logger.debug("iscsi %s: opcode %#x rejected: %s", self.peer, header[0], reason.name)
        self.send(self._answers.numbered(iscsi.reject, header, reason=reason))

    def drained(self) -> None:
        """The stream has sent everything."""
        self._execution.settle()

    # task management

    def execute_before(self) -> None:
        """What came before a management function goes first."""
        self._execution.run()

    def drop(self, wanted: Callable[[Task], bool]) -> int:
        """Forget tasks that the device server does not know yet; their number."""
        dropped = self._transfers.drop(wanted) + self._execution.drop_ready(wanted)
        for task in dropped:
            task.aborted = True
        if dropped:
            self._execution.done_without(dropped)
        return len(dropped)

    def is_active(self, tag: int) -> bool:
        """A task with this tag is in the device server, or about to be."""
        return tag in self._execution.active

    @property
    def device(self) -> DeviceServer:
        return self._device

    def event(self, event: Event) -> None:
        """Of the device server."""
        if event.kind is EventKind.TASKS_CLEARED:
            self.drop(lambda task: event.lun is None or task.lun == event.lun)
        elif event.sense and event.lun is not None:
            self._management.tell(AsyncEvent.SCSI, event.lun, event.sense)

    # life

    def tick(self) -> None:
        """Time has passed: is the initiator still there?"""
        if self.over:
            return
        if self._heard or self._execution.paused:
            self._heard = False
            self._silent_ticks = 0
            return
        self._silent_ticks += 1
        if self._silent_ticks == SILENT_TICKS:
            self._management.ping()
        elif self._silent_ticks >= 2 * SILENT_TICKS:
            self.violate("silent for too long, and no answer to our ping")

    def stop(self) -> None:
        """The server is going to close: ask for a logout."""
        if not self.over:
            self._management.tell(AsyncEvent.LOGOUT_REQUESTED)

    def violate(self, violation: str) -> None:
        """End the connection at once."""
        self.violation = violation
        logger.info("iscsi %s: closed: %s", self.peer, violation)
        self.stream.close()
        self.end()

    def leave(self) -> None:
        """End the connection when what is queued has been sent."""
        self._execution.flush()
        self.stream.finish()
        self.end()

    def dropped(self, reason: str) -> None:
        """The target ends this session: say so, then close."""
        if not self.over:
            logger.info("iscsi %s: session dropped: %s", self.peer, reason)
            self._management.tell(AsyncEvent.SESSION_DROPPED)
            self.leave()

    def end(self) -> None:
        """The connection is gone. What the device server still has comes back later, and is let go."""
        if self.over:
            return
        self._execution.over = True
        self._early.clear()
        self.drop(lambda task: True)
        if self.nexus is not None:
            self._device.nexus_lost(self.nexus)
        self._ended(self)


_NEEDS_NEXUS = frozenset({int(Opcode.SCSI_COMMAND), int(Opcode.TASK_REQUEST)})
_REQUESTS = _NEEDS_NEXUS | {
    int(Opcode.NOP_OUT), int(Opcode.TEXT_REQUEST), int(Opcode.LOGOUT_REQUEST), int(Opcode.LOGIN_REQUEST),
    int(Opcode.SNACK_REQUEST),
}  # fmt: skip
