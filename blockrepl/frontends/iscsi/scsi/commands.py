"""The table of commands: what each may look like, what reservations and states it respects, how long it may take.

Everything that is asked of every command is read off this table: validity of the CDB, reservation conflicts, access in
asymmetric states, and the answers of REPORT SUPPORTED OPERATION CODES. Sources: SPC-4 (table 66: reservations;
5.15.2.4: asymmetric access states), SBC-3 (table 13; 4.11: sanitize), SPC-2 (table 9: RESERVE(6)).
"""

from __future__ import annotations

from enum import IntEnum

from blockrepl.formats.scsi import Opcode, ServiceAction
from blockrepl.formats.scsi_reservation import InAction, OutAction

DPO, FUA = 0x10, 0x08
DEFAULT_TIMEOUT_S = 60
LONG_TIMEOUT_S = 600


class Access(IntEnum):
    """How a command stands to reservations of others."""

    FREE = 0  # none matters, RESERVE(6) neither
    STATUS = 1  # persistent reservations do not matter
    READ = 2  # conflicts with EXCLUSIVE ACCESS
    WRITE = 3  # conflicts with every type
    RESERVATION = 4  # RESERVE(6): conflicts with any registration
    PERSISTENT = 5  # PERSISTENT RESERVE OUT: looks at registrations itself


class Command:
    """One row. ``usage`` has a bit for every bit of the CDB that is looked at, but for operation code and service
    action, which stand in it as they are."""

    __slots__ = ("access", "anywhere", "medium", "name", "opcode", "service_action", "timeout_s", "usage", "writes")

    def __init__(
        self,
        opcode: int,
        service_action: int | None,
        usage: str,
        access: Access,
        *,
        anywhere: bool = False,
        medium: bool = False,
        writes: bool = False,
        timeout_s: int = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.opcode = opcode
        self.service_action = service_action
        self.usage = bytes.fromhex(usage)
        self.access = access
        self.anywhere = anywhere  # also in standby, while unavailable, and while sanitize runs
        self.medium = medium  # needs a started unit
        self.writes = writes  # refused while write protected
        self.timeout_s = timeout_s
        self.name = Opcode(opcode).name + ("" if service_action is None else f"/{service_action:#04x}")

    def __repr__(self) -> str:
        return f"Command({self.name})"


_SA, _OP = ServiceAction, Opcode
_LBA4, _LBA8, _LEN4 = "ff" * 4, "ff" * 8, "ff" * 4


def _read(opcode: int, usage: str) -> Command:
    return Command(opcode, None, usage, Access.READ, medium=True)


def _write(opcode: int, usage: str, timeout_s: int = DEFAULT_TIMEOUT_S) -> Command:
    return Command(opcode, None, usage, Access.WRITE, medium=True, writes=True, timeout_s=timeout_s)


COMMANDS: tuple[Command, ...] = (
    Command(_OP.TEST_UNIT_READY, None, "00 00000000 00", Access.STATUS, medium=True),
    Command(_OP.REQUEST_SENSE, None, "03 01 0000 ff 00", Access.FREE, anywhere=True),
    _read(_OP.READ_6, "08 1fffff ff 00"),
    _write(_OP.WRITE_6, "0a 1fffff ff 00"),
    Command(_OP.INQUIRY, None, "12 01 ff ffff 00", Access.FREE, anywhere=True),
    Command(_OP.MODE_SELECT_6, None, "15 11 0000 ff 00", Access.WRITE),
    Command(_OP.RESERVE_6, None, "16 00000000 00", Access.RESERVATION),
    Command(_OP.RELEASE_6, None, "17 00000000 00", Access.FREE),
    Command(_OP.MODE_SENSE_6, None, "1a 08 ff ff ff 00", Access.READ),
    Command(_OP.START_STOP_UNIT, None, "1b 01 00 00 f7 00", Access.STATUS),
    Command(_OP.PREVENT_ALLOW_MEDIUM_REMOVAL, None, "1e 000000 03 00", Access.STATUS),
    Command(_OP.READ_CAPACITY_10, None, "25 00" + _LBA4 + "0000 00 00", Access.STATUS, medium=True),
    _read(_OP.READ_10, "28 1a" + _LBA4 + "3f ffff 00"),
    _write(_OP.WRITE_10, "2a 1a" + _LBA4 + "3f ffff 00"),
    _write(_OP.WRITE_AND_VERIFY_10, "2e 16" + _LBA4 + "3f ffff 00"),
    _read(_OP.VERIFY_10, "2f 16" + _LBA4 + "3f ffff 00"),
    _read(_OP.PRE_FETCH_10, "34 02" + _LBA4 + "3f ffff 00"),
    Command(_OP.SYNCHRONIZE_CACHE_10, None, "35 06" + _LBA4 + "3f ffff 00", Access.WRITE, medium=True),
    _read(_OP.READ_DEFECT_DATA_10, "37 00 1f 00000000 ffff 00"),
    _write(_OP.WRITE_SAME_10, "41 18" + _LBA4 + "3f ffff 00", timeout_s=LONG_TIMEOUT_S),
    _write(_OP.UNMAP, "42 01 00000000 3f ffff 00", timeout_s=LONG_TIMEOUT_S),
    Command(
        _OP.SANITIZE, _SA.SANITIZE_OVERWRITE, "48 a1 0000000000 ffff 00", Access.WRITE, medium=True, writes=True,
        timeout_s=86400,
    ),
    Command(
        _OP.SANITIZE, _SA.SANITIZE_BLOCK_ERASE, "48 a2 0000000000 ffff 00", Access.WRITE, medium=True, writes=True,
        timeout_s=LONG_TIMEOUT_S,
    ),
    Command(_OP.SANITIZE, _SA.SANITIZE_EXIT_FAILURE_MODE, "48 bf 0000000000 ffff 00", Access.WRITE, medium=True),
    Command(_OP.MODE_SELECT_10, None, "55 11 0000000000 ffff 00", Access.WRITE),
    Command(_OP.MODE_SENSE_10, None, "5a 18 ff ff 000000 ffff 00", Access.READ),
    *(
        Command(_OP.PERSISTENT_RESERVE_IN, action, f"5e {action:02x} 0000000000 ffff 00", Access.STATUS)
        for action in InAction
    ),
    *(
        Command(_OP.PERSISTENT_RESERVE_OUT, action, f"5f {action:02x} ff 0000 ffffffff 00", Access.PERSISTENT)
        for action in OutAction
    ),
    Command(
        _OP.EXTENDED_COPY, _SA.EXTENDED_COPY_LID1, "83 00 0000000000000000 ffffffff 00 00", Access.WRITE, medium=True,
        writes=True, timeout_s=LONG_TIMEOUT_S,
    ),
    Command(_OP.RECEIVE_COPY_RESULTS, _SA.COPY_STATUS_LID1, "84 00 ff 00000000000000 ffffffff 00 00", Access.READ),
    Command(_OP.RECEIVE_COPY_RESULTS, _SA.OPERATING_PARAMETERS, "84 03 0000000000000000 ffffffff 00 00", Access.READ),
    _read(_OP.READ_16, "88 1a" + _LBA8 + _LEN4 + "3f 00"),
    _write(_OP.COMPARE_AND_WRITE, "89 1a" + _LBA8 + "000000 ff 3f 00"),
    _write(_OP.WRITE_16, "8a 1a" + _LBA8 + _LEN4 + "3f 00"),
    _write(_OP.ORWRITE_16, "8b 1a" + _LBA8 + _LEN4 + "3f 00"),
    _write(_OP.WRITE_AND_VERIFY_16, "8e 16" + _LBA8 + _LEN4 + "3f 00"),
    _read(_OP.VERIFY_16, "8f 16" + _LBA8 + _LEN4 + "3f 00"),
    _read(_OP.PRE_FETCH_16, "90 02" + _LBA8 + _LEN4 + "3f 00"),
    Command(_OP.SYNCHRONIZE_CACHE_16, None, "91 06" + _LBA8 + _LEN4 + "3f 00", Access.WRITE, medium=True),
    _write(_OP.WRITE_SAME_16, "93 19" + _LBA8 + _LEN4 + "3f 00", timeout_s=LONG_TIMEOUT_S),
    _write(_OP.WRITE_ATOMIC_16, "9c 18" + _LBA8 + "ffff ffff 3f 00"),
    Command(
        _OP.SERVICE_ACTION_IN_16, _SA.READ_CAPACITY_16, "9e 10" + _LBA8 + _LEN4 + "01 00", Access.STATUS, medium=True
    ),
    Command(_OP.SERVICE_ACTION_IN_16, _SA.GET_LBA_STATUS, "9e 12" + _LBA8 + _LEN4 + "00 00", Access.READ, medium=True),
    Command(_OP.REPORT_LUNS, None, "a0 00 ff 000000 ffffffff 00 00", Access.FREE, anywhere=True),
    Command(
        _OP.MAINTENANCE_IN, _SA.REPORT_TARGET_PORT_GROUPS, "a3 ea 00000000 ffffffff 00 00", Access.FREE, anywhere=True
    ),
    Command(
        _OP.MAINTENANCE_IN, _SA.REPORT_SUPPORTED_OPERATION_CODES, "a3 0c 87 ff ffff ffffffff 00 00", Access.STATUS,
        anywhere=True,
    ),
    Command(
        _OP.MAINTENANCE_IN, _SA.REPORT_SUPPORTED_TASK_MANAGEMENT_FUNCTIONS, "a3 0d 80 000000 ffffffff 00 00",
        Access.STATUS, anywhere=True,
    ),
    _read(_OP.READ_12, "a8 1a" + _LBA4 + _LEN4 + "3f 00"),
    _write(_OP.WRITE_12, "aa 1a" + _LBA4 + _LEN4 + "3f 00"),
    _write(_OP.WRITE_AND_VERIFY_12, "ae 16" + _LBA4 + _LEN4 + "3f 00"),
    _read(_OP.VERIFY_12, "af 16" + _LBA4 + _LEN4 + "3f 00"),
    _read(_OP.READ_DEFECT_DATA_12, "b7 1f 00000000 ffffffff 00 00"),
)  # fmt: skip

SERVICE_ACTION_MASK = 0x1F
_NACA = 0x04
BY_KEY: dict[tuple[int, int | None], Command] = {(c.opcode, c.service_action): c for c in COMMANDS}
WITH_SERVICE_ACTIONS = frozenset(c.opcode for c in COMMANDS if c.service_action is not None)
OPCODES = frozenset(c.opcode for c in COMMANDS)


def cdb_bytes(opcode: int) -> int:
    """Length of a CDB by its group code (SPC-4, 4.2.5.1)."""
    return (6, 10, 10, 0, 16, 12, 0, 0)[opcode >> 5]


def key_of(cdb: bytes) -> tuple[int, int | None]:
    """Operation code and service action, None for commands without one."""
    opcode = cdb[0]
    return opcode, cdb[1] & SERVICE_ACTION_MASK if opcode in WITH_SERVICE_ACTIONS else None


def wrong_bits(command: Command, cdb: bytes) -> tuple[int, int] | None:
    """The first bit (byte, bit) that is set and should not be; None when the CDB is well formed.

    The control byte's vendor and obsolete bits are let pass; NACA is not.
    """
    last = len(command.usage) - 1
    for at in range(1, last):
        allowed = command.usage[at]
        if at == 1 and command.service_action is not None:
            allowed |= SERVICE_ACTION_MASK
        wrong = cdb[at] & ~allowed
        if wrong:
            return at, wrong.bit_length() - 1
    return (last, 2) if cdb[last] & _NACA else None
