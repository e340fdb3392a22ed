"""EXTENDED COPY (LID1) parameter lists and RECEIVE COPY RESULTS data. Big-endian.

Sources: SPC-4 sections 6.4 (EXTENDED COPY), 6.18 and 6.19 (RECEIVE COPY …).
"""

from __future__ import annotations

from enum import IntEnum

from construct import Bytes, Const, Int8ub, Int16ub, Int24ub, Int32ub, Int64ub, Padding, Struct

MAX_TARGETS = 16
MAX_SEGMENTS = 64
MAX_SEGMENT_BYTES = 64 << 20
GRANULARITY_LOG2 = 9


class ListIdUsage(IntEnum):
    """SPC-4, table 108."""

    HOLD = 0
    DISCARD = 2
    NONE = 3


list_head = Struct(
    "list_id" / Int8ub,
    "flags" / Int8ub,  # STR, LIST ID USAGE in bits 4-3, priority
    "target_bytes" / Int16ub,
    Padding(4),
    "segment_bytes" / Int32ub,
    "inline_bytes" / Int32ub,
)
LIST_HEAD_BYTES = 16
assert list_head.sizeof() == LIST_HEAD_BYTES

IDENTIFICATION_TARGET = 0xE4
target = Struct(  # SPC-4, 6.4.5.3
    "type" / Int8ub,
    "unit" / Int8ub,  # LU ID TYPE, NUL, peripheral device type
    "initiator_port" / Int16ub,
    "code_set" / Int8ub,
    "kind" / Int8ub,
    Padding(1),
    "designator_bytes" / Int8ub,
    "designator" / Bytes(20),
    "flags" / Int8ub,
    "block_bytes" / Int24ub,
)
TARGET_BYTES = 32
NUL = 0x20
assert target.sizeof() == TARGET_BYTES


class SegmentType(IntEnum):
    """Segment descriptors that this copy manager has."""

    BLOCK_TO_BLOCK = 0x02
    BLOCK_TO_BLOCK_OFFSET = 0x0A


segment_head = Struct("type" / Int8ub, "flags" / Int8ub, "length" / Int16ub)
SEGMENT_HEAD_BYTES = 4
block_segment = Struct(  # SPC-4, 6.4.6.3
    Const(bytes([SegmentType.BLOCK_TO_BLOCK])),
    "flags" / Int8ub,  # DC in bit 1
    "length" / Const(0x18, Int16ub),
    "source" / Int16ub,
    "destination" / Int16ub,
    Padding(2),
    "blocks" / Int16ub,
    "source_lba" / Int64ub,
    "destination_lba" / Int64ub,
)
DC = 0x02
offset_segment = Struct(  # SPC-4, 6.4.6.7
    Const(bytes([SegmentType.BLOCK_TO_BLOCK_OFFSET])),
    "flags" / Int8ub,
    "length" / Const(0x1C, Int16ub),
    "source" / Int16ub,
    "destination" / Int16ub,
    "size_bytes" / Int32ub,
    "source_lba" / Int64ub,
    "destination_lba" / Int64ub,
    "source_offset_bytes" / Int16ub,
    "destination_offset_bytes" / Int16ub,
)
BLOCK_SEGMENT_BYTES, OFFSET_SEGMENT_BYTES = 28, 32
assert (block_segment.sizeof(), offset_segment.sizeof()) == (BLOCK_SEGMENT_BYTES, OFFSET_SEGMENT_BYTES)
MAX_LIST_BYTES = MAX_TARGETS * TARGET_BYTES + MAX_SEGMENTS * OFFSET_SEGMENT_BYTES

copy_status = Struct(  # SPC-4, 6.18.2
    "available_bytes" / Const(8, Int32ub),
    "status" / Int8ub,  # HDD in bit 7
    "segments" / Int16ub,
    "units" / Const(1, Int8ub),  # KiB
    "transferred" / Int32ub,
)


class CopyStatus(IntEnum):
    """Copy manager status."""

    IN_PROGRESS = 0
    COMPLETED = 1
    FAILED = 2


operating_parameters = Struct(  # SPC-4, 6.19.4
    "available_bytes" / Const(43, Int32ub),
    "snlid" / Int8ub,
    Padding(3),
    "max_targets" / Const(MAX_TARGETS, Int16ub),
    "max_segments" / Const(MAX_SEGMENTS, Int16ub),
    "max_list_bytes" / Const(MAX_LIST_BYTES, Int32ub),
    "max_segment_bytes" / Const(MAX_SEGMENT_BYTES, Int32ub),
    "max_inline_bytes" / Int32ub,
    "held_bytes" / Int32ub,
    "stream_bytes" / Int32ub,
    Padding(2),
    "total_concurrent" / Int16ub,
    "max_concurrent" / Int8ub,
    "granularity_log2" / Const(GRANULARITY_LOG2, Int8ub),
    "inline_granularity_log2" / Int8ub,
    "held_granularity_log2" / Int8ub,
    Padding(3),
    "types_bytes" / Const(3, Int8ub),
    "types" / Const(bytes([SegmentType.BLOCK_TO_BLOCK, SegmentType.BLOCK_TO_BLOCK_OFFSET, IDENTIFICATION_TARGET])),
)
assert operating_parameters.sizeof() == 47
