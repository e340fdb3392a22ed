"""Persistent reservations: parameter data on the wire, and how they are kept with a volume. Big-endian.

Sources: SPC-4 sections 6.15 (PERSISTENT RESERVE IN) and 6.16 (OUT). The kept form is this project's: it travels as
`block.Op.METADATA` in the order of the writes, so that every copy of the volume has it.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct

MAX_REGISTRATIONS = 128
TRANSPORT_ID_BYTES = 264  # the longest: 223 bytes of name, 18 of ISID


class InAction(IntEnum):
    """Service actions of PERSISTENT RESERVE IN."""

    READ_KEYS = 0
    READ_RESERVATION = 1
    REPORT_CAPABILITIES = 2
    READ_FULL_STATUS = 3


class OutAction(IntEnum):
    """Service actions of PERSISTENT RESERVE OUT."""

    REGISTER = 0
    RESERVE = 1
    RELEASE = 2
    CLEAR = 3
    PREEMPT = 4
    PREEMPT_AND_ABORT = 5
    REGISTER_AND_IGNORE_EXISTING_KEY = 6
    REGISTER_AND_MOVE = 7


class Type(IntEnum):
    """Of a persistent reservation (SPC-4, table 217)."""

    NONE = 0
    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 3
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 5
    EXCLUSIVE_ACCESS_REGISTRANTS_ONLY = 6
    WRITE_EXCLUSIVE_ALL_REGISTRANTS = 7
    EXCLUSIVE_ACCESS_ALL_REGISTRANTS = 8


ALL_REGISTRANTS = frozenset((Type.WRITE_EXCLUSIVE_ALL_REGISTRANTS, Type.EXCLUSIVE_ACCESS_ALL_REGISTRANTS))
REGISTRANTS = ALL_REGISTRANTS | {Type.WRITE_EXCLUSIVE_REGISTRANTS_ONLY, Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY}
EXCLUSIVE_ACCESS = frozenset(
    (Type.EXCLUSIVE_ACCESS, Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY, Type.EXCLUSIVE_ACCESS_ALL_REGISTRANTS)
)


class OutFlag(IntFlag):
    """In the parameter list."""

    SPEC_I_PT = 0x08
    ALL_TG_PT = 0x04
    APTPL = 0x01


out_list = Struct(  # SPC-4, 6.16.3
    "key" / Int64ub,
    "action_key" / Int64ub,
    Padding(4),
    "flags" / Int8ub,  # OutFlag
    Padding(3),
)
OUT_LIST_BYTES = 24
assert out_list.sizeof() == OUT_LIST_BYTES

move_list = Struct(  # REGISTER AND MOVE (SPC-4, 6.16.4)
    "key" / Int64ub,
    "action_key" / Int64ub,
    Padding(1),
    "flags" / Int8ub,  # UNREG in bit 1, APTPL in bit 0
    "relative_port" / Int16ub,
    "transport_id_bytes" / Int32ub,
)
UNREG = 0x02
assert move_list.sizeof() == OUT_LIST_BYTES

in_head = Struct("generation" / Int32ub, "additional_bytes" / Int32ub)
reservation_descriptor = Struct("key" / Int64ub, Padding(5), "type" / Int8ub, Padding(2))
assert reservation_descriptor.sizeof() == 16
capabilities = Struct(  # SPC-4, 6.15.4
    "length" / Const(8, Int16ub),
    "can" / Int8ub,  # CRH, SIP_C, ATP_C, PTPL_C
    "state" / Int8ub,  # TMV, ALLOW COMMANDS, PTPL_A
    "types" / Int16ub,
    Padding(2),
)
SIP_C, ATP_C, PTPL_C = 0x08, 0x04, 0x01
TMV, PTPL_A = 0x80, 0x01
ALLOW_COMMANDS = 0x10  # 001b: TEST UNIT READY passes exclusive access reservations
ALL_TYPES = 0xEA01
assert capabilities.sizeof() == 8
full_status = Struct(  # SPC-4, 6.15.5; a TransportID follows
    "key" / Int64ub,
    Padding(4),
    "flags" / Int8ub,  # ALL_TG_PT in bit 1, R_HOLDER in bit 0
    "scope_type" / Int8ub,
    Padding(4),
    "relative_port" / Int16ub,
    "transport_id_bytes" / Int32ub,
)
FULL_ALL_TG_PT, R_HOLDER = 0x02, 0x01
assert full_status.sizeof() == 24

kept_head = Struct(
    "magic" / Const(b"BRPR"),
    "version" / Const(1, Int16ub),
    "flags" / Int8ub,  # KeptFlag
    "type" / Int8ub,  # Type
    "generation" / Int32ub,
    "holder" / Int16ub,  # index of the registration that holds; NOBODY for none or all
    "count" / Int16ub,
)
NOBODY = 0xFFFF
KEPT_APTPL = 0x01
kept_registration = Struct(
    "key" / Int64ub,
    "relative_port" / Int16ub,
    "flags" / Int8ub,  # FULL_ALL_TG_PT
    Padding(1),
    "transport_id_bytes" / Int16ub,
    "transport_id" / Bytes(lambda this: this.transport_id_bytes),
)
assert kept_head.sizeof() == 16
