"""Layout of a secondary's undo file: what blocks held before a copy first overwrote them (PROTOCOL, rule 20).

Own format, version 1. Big-endian; offsets and lengths in bytes.

    0     header, one page; says whose file this is and for which copy
    4096  frames, each a whole number of pages: header, table of entries, the data of those that have any, zeroes

A frame is written and synced as one, and the next one after it: what lies below a frame was durable when it was made.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct

UNDO_MAGIC = 0x62727531  # "bru1"
FRAME_MAGIC = 0x62727566  # "bruf"
VERSION = 1
PAGE_BYTES = 4096
MAX_ENTRIES = 0xFFFF


class Kind(IntEnum):
    """What a block held."""

    ZERO = 0  # zeroes, or a hole
    DATA = 1


undo_header = Struct(
    "magic" / Const(UNDO_MAGIC, Int32ub),
    "version" / Const(VERSION, Int16ub),
    "node" / Int16ub,
    "group" / Bytes(16),  # UUID of the consistency group
    "copy" / Int64ub,  # which copy this is the way back from: the number of its START
    "tag" / Int64ub,  # drawn for this copy; frames with another one are left over from an older copy
    "block_bytes" / Int32ub,
    "crc" / Int32ub,  # CRC32C of all before it
)
undo_frame = Struct(
    "magic" / Const(FRAME_MAGIC, Int32ub),
    "version" / Const(VERSION, Int16ub),
    "count" / Int16ub,  # entries
    "tag" / Int64ub,  # the header's
    "position" / Int64ub,  # of this frame in the file
    "size_bytes" / Int32ub,  # whole frame
    Padding(4),
    "crc" / Int32ub,  # CRC32C of all before it, then of the table
)
undo_entry = Struct(
    "volume" / Int16ub,
    "kind" / Int8ub,  # Kind
    Padding(1),
    "length_bytes" / Int32ub,
    "offset_bytes" / Int64ub,
    "crc" / Int32ub,  # CRC32C of the data; 0 for ZERO
    Padding(4),
)

HEADER = struct.Struct(">IHH16sQQII")
FRAME = struct.Struct(">IHHQQI4xI")
ENTRY = struct.Struct(">HBxIQI4x")
assert HEADER.size == undo_header.sizeof()
assert FRAME.size == undo_frame.sizeof()
assert ENTRY.size == undo_entry.sizeof()
