"""INQUIRY data and the vital product data (VPD) pages. Big-endian, lengths in bytes unless said otherwise.

Sources: SPC-4 sections 6.6.2 (standard data) and 7.8 (VPD pages); SBC-3 section 6.6 (pages B0h to B2h).
"""

from __future__ import annotations

from enum import IntEnum

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct

VENDOR = b"BLKREPL "
REVISION = b"0001"
SPC_4 = 0x06
DIRECT_ACCESS = 0x00
NO_DEVICE = 0x7F  # peripheral qualifier 011b, type 1Fh: no logical unit can be there
VERSION_DESCRIPTORS = (0x00A0, 0x0960, 0x0460, 0x04C0)  # SAM-5, iSCSI, SPC-4, SBC-3


class Page(IntEnum):
    """VPD page codes."""

    SUPPORTED = 0x00
    SERIAL_NUMBER = 0x80
    IDENTIFICATION = 0x83
    EXTENDED_INQUIRY = 0x86
    MODE_POLICY = 0x87
    THIRD_PARTY_COPY = 0x8F
    BLOCK_LIMITS = 0xB0
    BLOCK_CHARACTERISTICS = 0xB1
    PROVISIONING = 0xB2


standard = Struct(  # SPC-4, 6.6.2
    "peripheral" / Int8ub,
    Padding(1),  # not removable
    "version" / Const(SPC_4, Int8ub),
    "format" / Const(0x12, Int8ub),  # HISUP, response data format 2
    "additional_bytes" / Const(96 - 5, Int8ub),
    "access" / Int8ub,  # TPGS, 3PC
    "multi_port" / Int8ub,  # MULTIP
    "queueing" / Const(0x02, Int8ub),  # CMDQUE
    "vendor" / Const(VENDOR),
    "product" / Bytes(16),
    "revision" / Const(REVISION),
    Padding(22),
    "version_descriptors" / Int16ub[8],
    Padding(22),
)
TPGS_IMPLICIT, THIRD_PARTY = 0x10, 0x08
MULTI_PORT = 0x10
assert standard.sizeof() == 96

page_head = Struct("peripheral" / Int8ub, "page" / Int8ub, "length" / Int16ub)


class CodeSet(IntEnum):
    """Of a designator."""

    BINARY = 1
    ASCII = 2
    UTF_8 = 3


class DesignatorType(IntEnum):
    """SPC-4, table 589."""

    T10_VENDOR = 1
    NAA = 3
    RELATIVE_PORT = 4
    PORT_GROUP = 5
    SCSI_NAME = 8


class Association(IntEnum):
    """What a designator names."""

    LOGICAL_UNIT = 0
    PORT = 1
    TARGET_DEVICE = 2


designator_head = Struct(
    "code_set" / Int8ub,  # protocol identifier in bits 7-4
    "kind" / Int8ub,  # PIV, association, type
    Padding(1),
    "length" / Int8ub,
)
ISCSI_PROTOCOL = 0x50
PIV = 0x80
NAA_LOCALLY_ASSIGNED = 0x3  # SPC-4, 7.8.6.6.4: 60 bits that the administrator gives; an IEEE company has an OUI instead

extended_inquiry = Struct(  # SPC-4, 7.8.7; what follows the page header
    "checks" / Int8ub,
    "queueing" / Int8ub,  # HEADSUP, ORDSUP, SIMPSUP in bits 2-0
    "cache" / Int8ub,  # V_SUP in bit 0
    Padding(57),
)
TASK_ATTRIBUTES, VOLATILE_CACHE = 0x07, 0x01
assert extended_inquiry.sizeof() == 60

MODE_POLICY_SHARED = b"\x3f\xff\x00\x00"  # all pages and subpages: one copy for all nexuses (SPC-4, 7.8.9)

block_limits = Struct(  # SBC-3, 6.6.4; lengths in blocks
    "write_same_needs_length" / Int8ub,  # WSNZ in bit 0
    "compare_and_write" / Int8ub,
    "transfer_granularity" / Int16ub,
    "max_transfer" / Int32ub,
    "optimal_transfer" / Int32ub,
    "max_prefetch" / Int32ub,
    "max_unmap" / Int32ub,
    "max_unmap_descriptors" / Int32ub,
    "unmap_granularity" / Int32ub,
    "unmap_alignment" / Int32ub,  # UGAVALID in bit 31
    "max_write_same" / Int64ub,
    "max_atomic" / Int32ub,
    "atomic_alignment" / Int32ub,
    "atomic_granularity" / Int32ub,
    "max_atomic_with_boundary" / Int32ub,
    "max_atomic_boundary" / Int32ub,
)
UGAVALID = 0x80000000
assert block_limits.sizeof() == 0x3C

block_characteristics = Struct(  # SBC-3, 6.6.3
    "rotation_rate" / Const(1, Int16ub),  # does not rotate
    Padding(1),
    "after_erase" / Int8ub,  # WABEREQ in bits 7-6, WACEREQ in bits 5-4
    "flags" / Int8ub,
    Padding(55),
)
READ_AFTER_BLOCK_ERASE_WORKS = 0x40
assert block_characteristics.sizeof() == 0x3C

provisioning = Struct(  # SBC-3, 6.6.5
    "threshold_exponent" / Int8ub,
    "flags" / Int8ub,
    "type" / Int8ub,
    Padding(1),
)
LBPU, LBPWS, LBPWS10, LBPRZ = 0x80, 0x40, 0x20, 0x04
THIN = 0x02
assert provisioning.sizeof() == 4

third_party_descriptor = Struct("type" / Int16ub, "length" / Int16ub)  # SPC-4, 7.8.17
THIRD_PARTY_COMMANDS, THIRD_PARTY_PARAMETERS = 0x0001, 0x0004
THIRD_PARTY_DESCRIPTORS, THIRD_PARTY_GENERAL_COPY = 0x0008, 0x8001
third_party_parameters = Struct(
    Padding(4),
    "max_targets" / Int16ub,
    "max_segments" / Int16ub,
    "max_list_bytes" / Int32ub,
    "max_inline_bytes" / Int32ub,
    Padding(4),
)
third_party_general = Struct(
    "total_concurrent" / Int32ub,
    "max_identified_concurrent" / Int32ub,
    "max_segment_bytes" / Int32ub,
    "granularity" / Int8ub,
    "inline_granularity" / Int8ub,
    Padding(18),
)
assert third_party_parameters.sizeof() == 0x14
assert third_party_general.sizeof() == 0x20
