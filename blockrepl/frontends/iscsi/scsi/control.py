"""Commands about the unit itself: readiness, capacity, modes, power, RESERVE(6), and what it can report of itself."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from blockrepl.errors import BlockError
from blockrepl.formats import scsi as layout
from blockrepl.formats.scsi import Asc, Opcode, SenseKey, sense_data
from blockrepl.frontends.iscsi.scsi.commands import (
    BY_KEY,
    COMMANDS,
    OPCODES,
    WITH_SERVICE_ACTIONS,
    Access,
    Command,
)
from blockrepl.frontends.iscsi.scsi.nexus_state import NexusState
from blockrepl.frontends.iscsi.scsi.refusal import bad_cdb, conflict, illegal, write_refusal
from blockrepl.frontends.iscsi.scsi.unit import PENDING, Answer, LogicalUnit
from blockrepl.frontends.iscsi.scsi.work import joined
from blockrepl.frontends.iscsi.task import Task

_LAST_LBA_10 = 0xFFFFFFFF
_ALL, _ONE_OPCODE, _ONE_ACTION, _ONE_EITHER = range(4)
_SUPPORTED_FUNCTIONS = bytes([0xDA, 0x00])  # abort task and task set, clear task set, LUN reset, target reset


def test_unit_ready(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """What keeps it from being ready has been refused already."""
    return None


def request_sense(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """REQUEST SENSE (SPC-4, 6.39): a unit attention, or how a background operation is getting on."""
    descriptor, room = bool(task.cdb[1] & 0x01), task.cdb[4]
    key, asc, specific = SenseKey.NO_SENSE, int(Asc.NONE), b""
    if state.attentions:
        key, asc = SenseKey.UNIT_ATTENTION, state.attentions.popleft()
        unit.regulate()
    elif unit.path_asc:
        key, asc = SenseKey.NOT_READY, unit.path_asc
    elif unit.sanitize is not None:
        key, asc, specific = unit.sanitize.sense()
    elif unit.stopped:
        key, asc = SenseKey.NOT_READY, int(Asc.INITIALIZING_COMMAND_REQUIRED)
    return sense_data(key, asc, specific=specific, descriptor=descriptor)[:room]


def read_capacity_10(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """READ CAPACITY (10) (SBC-3, 5.15)."""
    last = min(unit.blocks - 1, _LAST_LBA_10)
    data: bytes = layout.read_capacity_10.build({"last_lba": last, "block_bytes": unit.block_bytes})
    return data


def read_capacity_16(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """READ CAPACITY (16) (SBC-3, 5.16): thin, unmapped blocks read as zeroes."""
    data: bytes = layout.read_capacity_16.build(
        {
            "last_lba": unit.blocks - 1,
            "block_bytes": unit.block_bytes,
            "protection": 0,
            "exponents": unit.physical_blocks.bit_length() - 1,
            "provisioning": layout.LBPME | layout.LBPRZ,
        }
    )
    return data[: int.from_bytes(task.cdb[10:14], "big")]


def mode_sense(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """MODE SENSE (6), (10)."""
    cdb = task.cdb
    long_header = cdb[0] == Opcode.MODE_SENSE_10
    protected = unit.mode.software_write_protect or (unit.volume is not None and not unit.volume.writable)
    data = unit.mode.sense(
        cdb, unit.blocks, unit.block_bytes, long_header=long_header, write_protected=protected
    )  # fmt: skip
    return data[: int.from_bytes(cdb[7:9], "big") if long_header else cdb[4]]


def mode_select(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """MODE SELECT (6), (10): a change is a unit attention for everybody else (SPC-4, 6.11)."""
    cdb = task.cdb
    long_header = cdb[0] == Opcode.MODE_SELECT_10
    size = int.from_bytes(cdb[7:9], "big") if long_header else cdb[4]
    if task.out_bytes < size:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    data = bytes(joined(task.data_out))[:size] if size else b""
    if unit.mode.select(cdb, data, long_header=long_header):
        unit.attend_all(Asc.MODE_PARAMETERS_CHANGED, but=state.nexus)
    return None


def start_stop_unit(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """START STOP UNIT (SBC-3, 5.25): a stopped unit refuses media access until it is started."""
    cdb = task.cdb
    start, eject, no_flush, condition = cdb[4] & 0x01, cdb[4] & 0x02, cdb[4] & 0x04, cdb[4] >> 4
    if eject:
        raise bad_cdb(4, 1)
    if condition:
        raise bad_cdb(4, 7)
    if start:
        unit.stopped = False
        unit.regulate()
        return None
    if unit.reservations.forbids(state.nexus.transport_id, Access.WRITE):
        raise conflict()
    unit.stopped = True
    unit.regulate()
    if no_flush or unit.volume is None:
        return None
    unit.volume.flush(partial(_stopped, unit, task, bool(cdb[1] & 0x01)))
    return None if cdb[1] & 0x01 else PENDING


def _stopped(unit: LogicalUnit, task: Task, immediate: bool, error: BlockError | None) -> None:
    if immediate:
        return
    if error is not None:
        unit.refuse(task, write_refusal(error))
    else:
        unit.finish(task)


def prevent_allow_medium_removal(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """The medium is fixed: there is nothing that could be removed, and whoever wants it locked has his wish."""
    if task.cdb[4] > 1:
        raise bad_cdb(4, 1)
    state.prevents_removal = bool(task.cdb[4])
    return None


def reserve_6(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """RESERVE (6) (SPC-2, 7.21): the whole unit, for this nexus."""
    unit.reserver = state.nexus
    unit.regulate()
    return None


def release_6(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """RELEASE (6) (SPC-2, 7.17): of somebody else's reservation, it does nothing."""
    if unit.reserver is state.nexus:
        unit.reserver = None
        unit.regulate()
    return None


def read_defect_data_10(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """READ DEFECT DATA (10) (SBC-3, 5.17): a file has no defects that it could list."""
    data: bytes = layout.defect_list_10.build({"format": task.cdb[2] & 0x1F, "list_bytes": 0})
    return data[: int.from_bytes(task.cdb[7:9], "big")]


def read_defect_data_12(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """READ DEFECT DATA (12) (SBC-3, 5.18)."""
    data: bytes = layout.defect_list_12.build({"format": task.cdb[1] & 0x1F, "generation": 0, "list_bytes": 0})
    return data[: int.from_bytes(task.cdb[6:10], "big")]


def report_luns(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """REPORT LUNS, asked of a unit that exists."""
    return lun_inventory(unit.target.units, task.cdb)


def lun_inventory(luns: Iterable[int], cdb: bytes) -> bytes:
    """REPORT LUNS (SPC-4, 6.33). Raises Refusal."""
    select = cdb[2]
    if select not in (0, 1, 2):
        raise bad_cdb(2)
    listed = b"" if select == 1 else b"".join(encode_lun(lun) for lun in sorted(luns))  # 1: well known units
    head: bytes = layout.report_luns_head.build({"list_bytes": len(listed)})
    return (head + listed)[: int.from_bytes(cdb[6:10], "big")]


def encode_lun(lun: int) -> bytes:
    """Peripheral addressing up to 255, flat space above (SAM-5, 4.7.7)."""
    first = lun if lun < 256 else 0x4000 | lun
    return first.to_bytes(2, "big") + bytes(6)


# what is supported


def report_supported_operation_codes(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """REPORT SUPPORTED OPERATION CODES (SPC-4, 6.35)."""
    cdb = task.cdb
    timeouts, options = bool(cdb[2] & 0x80), cdb[2] & 0x07
    opcode, action = cdb[3], int.from_bytes(cdb[4:6], "big")
    room = int.from_bytes(cdb[6:10], "big")
    if options == _ALL:
        listed = b"".join(_describe(command, timeouts) for command in COMMANDS if _supports(unit, command))
        return (len(listed).to_bytes(4, "big") + listed)[:room]
    if options > _ONE_EITHER:
        raise bad_cdb(2, 2)
    with_actions = opcode in WITH_SERVICE_ACTIONS
    if opcode in OPCODES and (
        (options == _ONE_OPCODE and with_actions) or (options == _ONE_ACTION and not with_actions)
    ):
        raise bad_cdb(2, 2)
    command = BY_KEY.get((opcode, action if with_actions else None))
    return _one(command if command is not None and _supports(unit, command) else None, timeouts)[:room]


def _supports(unit: LogicalUnit, command: Command) -> bool:
    return command.opcode != Opcode.WRITE_ATOMIC_16 or unit.has_atomic_writes


def _describe(command: Command, timeouts: bool) -> bytes:
    flags = (layout.CTDP if timeouts else 0) | (layout.SERVACTV if command.service_action is not None else 0)
    data: bytes = layout.command_descriptor.build(
        {
            "opcode": command.opcode,
            "service_action": command.service_action or 0,
            "flags": flags,
            "cdb_bytes": len(command.usage),
        }
    )
    return data + (_timeouts(command) if timeouts else b"")


def _timeouts(command: Command) -> bytes:
    data: bytes = layout.timeouts_descriptor.build(
        {"command_specific": 0, "nominal_s": 0, "recommended_s": command.timeout_s}
    )
    return data


def _one(command: Command | None, timeouts: bool) -> bytes:
    if command is None:
        data: bytes = layout.one_command_head.build({"support": layout.NOT_SUPPORTED, "cdb_bytes": 0})
        return data
    support = layout.SUPPORTED | (layout.ONE_COMMAND_CTDP if timeouts else 0)
    head: bytes = layout.one_command_head.build({"support": support, "cdb_bytes": len(command.usage)})
    return head + command.usage + (_timeouts(command) if timeouts else b"")


def report_supported_functions(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4, 6.36)."""
    room = int.from_bytes(task.cdb[6:10], "big")
    if room < 4:
        raise bad_cdb(6)
    extended = bool(task.cdb[2] & 0x80)
    data = _SUPPORTED_FUNCTIONS + bytes([0, 12 if extended else 0]) + (bytes(12) if extended else b"")
    return data[:room]


def report_target_port_groups(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """REPORT TARGET PORT GROUPS (SPC-4, 6.37): one group with one port for each node that can serve the volume."""
    cdb = task.cdb
    form = cdb[1] >> 5
    if form > 1:
        raise bad_cdb(1, 7)
    groups = b"".join(
        layout.port_group.build(
            {
                "state": path,
                "supported": layout.SUPPORTED_PATH_STATES,
                "tag": tag,
                "status": layout.ALTERED_IMPLICITLY,
                "port": {"relative_id": tag},
            }
        )
        for tag, path in sorted(unit.path_states.items())
    )
    if form == 1:
        groups = bytes([layout.EXTENDED_HEADER_FORMAT, 0, 0, 0]) + groups
    return (len(groups).to_bytes(4, "big") + groups)[: int.from_bytes(cdb[6:10], "big")]
