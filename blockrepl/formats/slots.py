"""Layout of state that is written twice: two slots of 16 KiB, each a header and a payload.

Own format, version 1. Big-endian; sizes in bytes. Generation g stands in slot g % 2, so the slot being written is never
the newest one.
"""

from __future__ import annotations

from enum import IntEnum

from construct import Bytes, Int16ub, Int32ub, Int64ub, Struct

SLOT_MAGIC = 0x626C7331  # "bls1"
SLOT_VERSION = 1
SLOT_BYTES = 16384
SLOTS_BYTES = 2 * SLOT_BYTES


class SlotKind(IntEnum):
    """What a pair of slots belongs to. The values are on disk: never renumber them."""

    JOURNAL = 1  # the superblock of a journal volume
    STATE = 2  # a primary's state file


slot_header = Struct(
    "magic" / Int32ub,
    "version" / Int16ub,
    "kind" / Int16ub,  # SlotKind
    "generation" / Int64ub,  # from 1; the newest valid one wins
    "group" / Bytes(16),  # UUID of the consistency group
    "node" / Int16ub,  # the node's number in the definition
    "reserved" / Int16ub,
    "payload_bytes" / Int32ub,
    "crc" / Int32ub,  # CRC32C of the 40 bytes before it, then of the payload
)
SLOT_HEADER_BYTES = 44
SLOT_PAYLOAD_BYTES = SLOT_BYTES - SLOT_HEADER_BYTES  # the most that a payload may have
assert slot_header.sizeof() == SLOT_HEADER_BYTES
