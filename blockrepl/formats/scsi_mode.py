"""Mode parameter headers, the block descriptor and mode pages. Big-endian, bytes.

Sources: SPC-4 section 7.5 (headers, 0Ah, 1Ch, 02h), SBC-3 section 6.5 (block descriptors, 01h, 08h).
"""

from __future__ import annotations

from enum import IntEnum

from construct import Const, Int8ub, Int16ub, Int24ub, Int32ub, Int64ub, Padding, Struct

WRITE_PROTECT, DPOFUA = 0x80, 0x10  # device specific parameter (SBC-3, 6.5.1)

header_6 = Struct("data_bytes" / Int8ub, "medium" / Int8ub, "device_specific" / Int8ub, "descriptor_bytes" / Int8ub)
header_10 = Struct(
    "data_bytes" / Int16ub,
    "medium" / Int8ub,
    "device_specific" / Int8ub,
    "long_lba" / Int8ub,
    Padding(1),
    "descriptor_bytes" / Int16ub,
)
HEADER_6_BYTES, HEADER_10_BYTES = 4, 8
assert (header_6.sizeof(), header_10.sizeof()) == (HEADER_6_BYTES, HEADER_10_BYTES)

short_descriptor = Struct("blocks" / Int32ub, Padding(1), "block_bytes" / Int24ub)
long_descriptor = Struct("blocks" / Int64ub, Padding(4), "block_bytes" / Int32ub)
SHORT_DESCRIPTOR_BYTES, LONG_DESCRIPTOR_BYTES = 8, 16
assert (short_descriptor.sizeof(), long_descriptor.sizeof()) == (SHORT_DESCRIPTOR_BYTES, LONG_DESCRIPTOR_BYTES)


class PageCode(IntEnum):
    """Mode pages that this target has."""

    ERROR_RECOVERY = 0x01
    DISCONNECT = 0x02
    CACHING = 0x08
    CONTROL = 0x0A
    EXCEPTIONS = 0x1C
    ALL = 0x3F


ALL_SUBPAGES = 0xFF
SUBPAGE_FORMAT, PARAMETERS_SAVEABLE = 0x40, 0x80

error_recovery = Struct(Const(b"\x01\x0a"), "flags" / Int8ub, "retries" / Int8ub, Padding(8))
disconnect = Struct(Const(b"\x02\x0e"), Padding(14))
caching = Struct(
    Const(b"\x08\x12"),
    "flags" / Int8ub,  # WCE in bit 2, RCD in bit 0
    Padding(17),
)
WCE = 0x04
control = Struct(
    Const(b"\x0a\x0a"),
    "sense" / Int8ub,  # TST in bits 7-5, D_SENSE in bit 2
    "queueing" / Int8ub,  # queue algorithm modifier in bits 7-4, QERR in bits 2-1
    "protect" / Int8ub,  # SWP in bit 3
    "aborts" / Int8ub,  # TAS in bit 6
    Padding(2),
    "busy_timeout" / Const(0xFFFF, Int16ub),  # not limited
    "self_test_s" / Int16ub,
)
D_SENSE, UNRESTRICTED_REORDERING, SWP, TAS = 0x04, 0x10, 0x08, 0x40
exceptions = Struct(Const(b"\x1c\x0a"), "flags" / Int8ub, "report" / Int8ub, Padding(8))
assert (error_recovery.sizeof(), disconnect.sizeof(), caching.sizeof()) == (12, 16, 20)
assert (control.sizeof(), exceptions.sizeof()) == (12, 12)
