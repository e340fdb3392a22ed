"""SCSI in general: operation codes, status, sense data, the layouts of CDBs. Big-endian.

Sources: SAM-5; SPC-4 (INCITS 513) sections 4.3 (CDBs), 4.5 (sense data), Annex D (operation codes and additional sense
codes); SBC-3 (INCITS 514) section 5.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from construct import BitsInteger, BitStruct, Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct


class Status(IntEnum):
    """SAM-5, 5.3.1."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    CONDITION_MET = 0x04
    BUSY = 0x08
    RESERVATION_CONFLICT = 0x18
    TASK_SET_FULL = 0x28
    ACA_ACTIVE = 0x30
    TASK_ABORTED = 0x40


class Opcode(IntEnum):
    """Operation codes that this target knows (SPC-4, Annex D.3)."""

    TEST_UNIT_READY = 0x00
    REQUEST_SENSE = 0x03
    READ_6 = 0x08
    WRITE_6 = 0x0A
    INQUIRY = 0x12
    MODE_SELECT_6 = 0x15
    RESERVE_6 = 0x16
    RELEASE_6 = 0x17
    MODE_SENSE_6 = 0x1A
    START_STOP_UNIT = 0x1B
    PREVENT_ALLOW_MEDIUM_REMOVAL = 0x1E
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    WRITE_AND_VERIFY_10 = 0x2E
    VERIFY_10 = 0x2F
    PRE_FETCH_10 = 0x34
    SYNCHRONIZE_CACHE_10 = 0x35
    READ_DEFECT_DATA_10 = 0x37
    WRITE_SAME_10 = 0x41
    UNMAP = 0x42
    SANITIZE = 0x48
    MODE_SELECT_10 = 0x55
    MODE_SENSE_10 = 0x5A
    PERSISTENT_RESERVE_IN = 0x5E
    PERSISTENT_RESERVE_OUT = 0x5F
    EXTENDED_COPY = 0x83
    RECEIVE_COPY_RESULTS = 0x84
    READ_16 = 0x88
    COMPARE_AND_WRITE = 0x89
    WRITE_16 = 0x8A
    ORWRITE_16 = 0x8B
    WRITE_AND_VERIFY_16 = 0x8E
    VERIFY_16 = 0x8F
    PRE_FETCH_16 = 0x90
    SYNCHRONIZE_CACHE_16 = 0x91
    WRITE_SAME_16 = 0x93
    WRITE_ATOMIC_16 = 0x9C
    SERVICE_ACTION_IN_16 = 0x9E
    REPORT_LUNS = 0xA0
    MAINTENANCE_IN = 0xA3
    READ_12 = 0xA8
    WRITE_12 = 0xAA
    WRITE_AND_VERIFY_12 = 0xAE
    VERIFY_12 = 0xAF
    READ_DEFECT_DATA_12 = 0xB7


class ServiceAction(IntEnum):
    """Service actions of SERVICE ACTION IN(16), MAINTENANCE IN, SANITIZE and the copy commands."""

    READ_CAPACITY_16 = 0x10
    GET_LBA_STATUS = 0x12
    REPORT_TARGET_PORT_GROUPS = 0x0A
    REPORT_SUPPORTED_OPERATION_CODES = 0x0C
    REPORT_SUPPORTED_TASK_MANAGEMENT_FUNCTIONS = 0x0D
    SANITIZE_OVERWRITE = 0x01
    SANITIZE_BLOCK_ERASE = 0x02
    SANITIZE_EXIT_FAILURE_MODE = 0x1F
    EXTENDED_COPY_LID1 = 0x00
    COPY_STATUS_LID1 = 0x00
    OPERATING_PARAMETERS = 0x03


class SenseKey(IntEnum):
    """SPC-4, table 53."""

    NO_SENSE = 0x0
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    COPY_ABORTED = 0xA
    ABORTED_COMMAND = 0xB
    MISCOMPARE = 0xE


class Asc(IntEnum):
    """Additional sense code and its qualifier in 16 bits (SPC-4, Annex D.2)."""

    NONE = 0x0000
    IN_PROGRESS_OF_BECOMING_READY = 0x0401
    INITIALIZING_COMMAND_REQUIRED = 0x0402
    TARGET_PORT_IN_STANDBY_STATE = 0x040B
    TARGET_PORT_IN_UNAVAILABLE_STATE = 0x040C
    SANITIZE_IN_PROGRESS = 0x041B
    WRITE_ERROR = 0x0C00
    COPY_TARGET_DEVICE_NOT_REACHABLE = 0x0D02
    INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT = 0x0E03
    UNRECOVERED_READ_ERROR = 0x1100
    PARAMETER_LIST_LENGTH_ERROR = 0x1A00
    MISCOMPARE_DURING_VERIFY = 0x1D00
    INVALID_COMMAND_OPERATION_CODE = 0x2000
    LBA_OUT_OF_RANGE = 0x2100
    INVALID_FIELD_IN_CDB = 0x2400
    LOGICAL_UNIT_NOT_SUPPORTED = 0x2500
    INVALID_FIELD_IN_PARAMETER_LIST = 0x2600
    INVALID_RELEASE_OF_PERSISTENT_RESERVATION = 0x2604
    TOO_MANY_TARGET_DESCRIPTORS = 0x2606
    UNSUPPORTED_TARGET_DESCRIPTOR_TYPE = 0x2607
    TOO_MANY_SEGMENT_DESCRIPTORS = 0x2608
    UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE = 0x2609
    WRITE_PROTECTED = 0x2700
    SOFTWARE_WRITE_PROTECTED = 0x2702
    SPACE_ALLOCATION_FAILED = 0x2707
    POWER_ON_OR_RESET = 0x2900
    BUS_DEVICE_RESET_FUNCTION = 0x2903
    I_T_NEXUS_LOSS = 0x2907
    MODE_PARAMETERS_CHANGED = 0x2A01
    RESERVATIONS_PREEMPTED = 0x2A03
    RESERVATIONS_RELEASED = 0x2A04
    REGISTRATIONS_PREEMPTED = 0x2A05
    ASYMMETRIC_ACCESS_STATE_CHANGED = 0x2A06
    CAPACITY_DATA_HAS_CHANGED = 0x2A09
    COMMANDS_CLEARED_BY_ANOTHER_INITIATOR = 0x2F00
    SANITIZE_COMMAND_FAILED = 0x3103
    MEDIUM_NOT_PRESENT = 0x3A00
    REPORTED_LUNS_DATA_HAS_CHANGED = 0x3F0E
    INTERNAL_TARGET_FAILURE = 0x4400
    INSUFFICIENT_REGISTRATION_RESOURCES = 0x5504


# Sense data

FIXED_SENSE_BYTES = 18
_CURRENT_FIXED, _CURRENT_DESCRIPTOR, _VALID = 0x70, 0x72, 0x80
_SKSV, _IN_CDB = 0x80, 0x40

fixed_sense = Struct(  # SPC-4, 4.5.3
    "response_code" / Int8ub,  # 70h, with VALID in bit 7
    Padding(1),
    "sense_key" / Int8ub,
    "information" / Int32ub,
    "additional_bytes" / Const(FIXED_SENSE_BYTES - 8, Int8ub),
    "command_specific" / Int32ub,
    "asc" / Int16ub,
    "unit_code" / Int8ub,
    "sense_key_specific" / Bytes(3),
)
assert fixed_sense.sizeof() == FIXED_SENSE_BYTES

descriptor_sense_head = Struct(  # SPC-4, 4.5.2
    "response_code" / Const(_CURRENT_DESCRIPTOR, Int8ub),
    "sense_key" / Int8ub,
    "asc" / Int16ub,
    Padding(3),
    "additional_bytes" / Int8ub,
)
information_descriptor = Struct(
    Const(b"\x00\x0a\x80\x00"),  # type, length, VALID
    "information" / Int64ub,
)
specific_descriptor = Struct(
    Const(b"\x02\x06\x00\x00"),
    "sense_key_specific" / Bytes(3),
    Padding(1),
)


def field_pointer(byte: int, bit: int | None, *, in_cdb: bool) -> bytes:
    """Sense key specific data that point at the field in error (SPC-4, 4.5.2.4.2)."""
    head = _SKSV | (_IN_CDB if in_cdb else 0) | (0x08 | bit if bit is not None else 0)
    return bytes([head]) + byte.to_bytes(2, "big")


def progress(done: int, total: int) -> bytes:
    """Sense key specific data that tell progress (SPC-4, 4.5.2.4.4)."""
    return bytes([_SKSV]) + min(0xFFFF, (done << 16) // max(total, 1)).to_bytes(2, "big")


def sense_data(key: int, asc: int, *, information: int | None = None, specific: bytes = b"", descriptor: bool) -> bytes:
    """Current sense data, fixed or as descriptors. Fixed information is VALID only if it fits into 32 bits."""
    specific = specific or bytes(3)
    if not descriptor:
        fits = information is not None and information < 1 << 32
        data: bytes = fixed_sense.build(
            {
                "response_code": _CURRENT_FIXED | (_VALID if fits else 0),
                "sense_key": key,
                "information": information if fits else 0,
                "command_specific": 0,
                "asc": asc,
                "unit_code": 0,
                "sense_key_specific": specific,
            }
        )
        return data
    body = b""
    if information is not None:
        body += information_descriptor.build({"information": information})
    if any(specific):
        body += specific_descriptor.build({"sense_key_specific": specific})
    head: bytes = descriptor_sense_head.build({"sense_key": key, "asc": asc, "additional_bytes": len(body)})
    return head + body


# CDBs of the block commands (SBC-3, section 5). `flags` is byte 1: protection, DPO, FUA and such.

cdb_6 = BitStruct(  # READ(6), WRITE(6)
    "opcode" / BitsInteger(8),
    Padding(3),
    "lba" / BitsInteger(21),
    "blocks" / BitsInteger(8),  # 0 is 256
    "control" / BitsInteger(8),
)
cdb_10 = Struct(
    "opcode" / Int8ub,
    "flags" / Int8ub,
    "lba" / Int32ub,
    "group" / Int8ub,
    "blocks" / Int16ub,
    "control" / Int8ub,
)
cdb_12 = Struct(
    "opcode" / Int8ub,
    "flags" / Int8ub,
    "lba" / Int32ub,
    "blocks" / Int32ub,
    "group" / Int8ub,
    "control" / Int8ub,
)
cdb_16 = Struct(
    "opcode" / Int8ub,
    "flags" / Int8ub,
    "lba" / Int64ub,
    "blocks" / Int32ub,
    "group" / Int8ub,
    "control" / Int8ub,
)
cdb_compare_and_write = Struct(
    "opcode" / Int8ub, "flags" / Int8ub, "lba" / Int64ub, Padding(3), "blocks" / Int8ub, "group" / Int8ub,
    "control" / Int8ub,
)  # fmt: skip
cdb_write_atomic = Struct(
    "opcode" / Int8ub, "flags" / Int8ub, "lba" / Int64ub, "boundary" / Int16ub, "blocks" / Int16ub, "group" / Int8ub,
    "control" / Int8ub,
)  # fmt: skip
CDB_10 = struct.Struct(">BBIBHB")
CDB_12 = struct.Struct(">BBIIBB")
CDB_16 = struct.Struct(">BBQIBB")
assert (cdb_6.sizeof(), cdb_10.sizeof(), cdb_12.sizeof(), cdb_16.sizeof()) == (6, 10, 12, 16)
assert (CDB_10.size, CDB_12.size, CDB_16.size) == (10, 12, 16)
assert cdb_compare_and_write.sizeof() == cdb_write_atomic.sizeof() == 16

# Parameter data of block commands

read_capacity_10 = Struct("last_lba" / Int32ub, "block_bytes" / Int32ub)  # SBC-3, 5.15.2
read_capacity_16 = Struct(  # SBC-3, 5.16.2
    "last_lba" / Int64ub,
    "block_bytes" / Int32ub,
    "protection" / Int8ub,
    "exponents" / Int8ub,  # logical blocks per physical block, as a power of two, in bits 3-0
    "provisioning" / Int16ub,  # LBPME, LBPRZ, lowest aligned LBA
    Padding(16),
)
LBPME, LBPRZ = 0x8000, 0x4000
assert read_capacity_16.sizeof() == 32

lba_status_head = Struct("data_bytes" / Int32ub, Padding(4))  # SBC-3, 5.5.2: bytes after this field
lba_status_descriptor = Struct(
    "lba" / Int64ub,
    "blocks" / Int32ub,
    "provisioning" / Int8ub,  # Provisioning
    Padding(3),
)
LBA_STATUS_HEAD_BYTES, LBA_STATUS_DESCRIPTOR_BYTES = 8, 16
assert lba_status_head.sizeof() == LBA_STATUS_HEAD_BYTES
assert lba_status_descriptor.sizeof() == LBA_STATUS_DESCRIPTOR_BYTES


class Provisioning(IntEnum):
    """Of an extent, in GET LBA STATUS."""

    MAPPED = 0
    DEALLOCATED = 1


unmap_head = Struct("data_bytes" / Int16ub, "descriptor_bytes" / Int16ub, Padding(4))  # SBC-3, 5.28.2
unmap_descriptor = Struct("lba" / Int64ub, "blocks" / Int32ub, Padding(4))
UNMAP_HEAD_BYTES, UNMAP_DESCRIPTOR_BYTES = 8, 16
UNMAP_DESCRIPTOR = struct.Struct(">QI4x")
assert unmap_descriptor.sizeof() == UNMAP_DESCRIPTOR.size == UNMAP_DESCRIPTOR_BYTES

sanitize_overwrite = Struct(  # SBC-3, 5.24.2
    "how" / Int8ub,  # INVERT, TEST, OVERWRITE COUNT
    Padding(1),
    "pattern_bytes" / Int16ub,
)
SANITIZE_HEAD_BYTES = 4

defect_list_10 = Struct(Padding(1), "format" / Int8ub, "list_bytes" / Int16ub)  # SBC-3, 5.17.2
defect_list_12 = Struct(Padding(1), "format" / Int8ub, "generation" / Int16ub, "list_bytes" / Int32ub)

# REPORT LUNS, REPORT SUPPORTED …, REPORT TARGET PORT GROUPS (SPC-4, 6.33, 6.35, 6.36, 6.37)

report_luns_head = Struct("list_bytes" / Int32ub, Padding(4))
command_descriptor = Struct(
    "opcode" / Int8ub,
    Padding(1),
    "service_action" / Int16ub,
    Padding(1),
    "flags" / Int8ub,  # CTDP in bit 1, SERVACTV in bit 0
    "cdb_bytes" / Int16ub,
)
CTDP, SERVACTV = 0x02, 0x01
timeouts_descriptor = Struct(
    "descriptor_bytes" / Const(0x0A, Int16ub),
    Padding(1),
    "command_specific" / Int8ub,
    "nominal_s" / Int32ub,
    "recommended_s" / Int32ub,
)
one_command_head = Struct(
    Padding(1),
    "support" / Int8ub,  # CTDP in bit 7; 1 not supported, 3 supported
    "cdb_bytes" / Int16ub,
)
ONE_COMMAND_CTDP, NOT_SUPPORTED, SUPPORTED = 0x80, 1, 3

port_group = Struct(
    "state" / Int8ub,  # PREF in bit 7, asymmetric access state
    "supported" / Int8ub,
    "tag" / Int16ub,
    Padding(1),
    "status" / Int8ub,  # why it is in this state
    Padding(1),
    "ports" / Const(1, Int8ub),
    "port" / Struct(Padding(2), "relative_id" / Int16ub),
)
SUPPORTED_PATH_STATES = 0x0D  # unavailable, standby, active/optimized
ALTERED_IMPLICITLY = 0x02
EXTENDED_HEADER_FORMAT = 0x10  # in the byte after the length, with the implicit transition time behind it
