"""Layout of a journal volume: superblock and frame header.

Own format, version 1. Big-endian; sizes and offsets in bytes. The file is two slots (`formats.slots`) and then the
ring. A *position* counts ring bytes ever appended; it stands at `RING_OFFSET + position % ring_bytes`. Frames start at
multiples of 4096 and never wrap: where the next one would, a PAD fills the rest of the lap.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub, PrefixedArray, Struct, this

from blockrepl.formats.slots import SLOT_PAYLOAD_BYTES, SLOTS_BYTES

FRAME_MAGIC = 0x626C6A66  # "bljf"
FRAME_VERSION = 1
FRAME_ALIGN_BYTES = 4096
FRAME_HEADER_BYTES = 64
RING_OFFSET = SLOTS_BYTES


class FrameKind(IntEnum):
    """What a frame holds. The values are on disk: never renumber them."""

    RECORD = 1  # one record: its bytes follow the header
    NOTE = 2  # a number that the owner noted ("prepared n"); a body is the owner's business
    PAD = 3  # nothing: fills the end of a lap


# The payload of a superblock slot.
superblock = Struct(
    "ring_bytes" / Int64ub,
    "head" / Int64ub,  # position of the oldest frame that is kept
    "durable_through" / Int64ub,  # position below which everything was synced when this was written
    "head_chain" / Int32ub,  # the chain that the frame at `head` carries
    # From each of these positions on, up to the next, frames carry this tag; ascending, the first is at or below
    # `head`. The first tag is drawn when the journal is made; truncating at a position adds one there, so that one
    # slot write voids every frame beyond (PROTOCOL, rule 23: discard beyond n).
    "tags" / PrefixedArray(Int8ub, Struct("position" / Int64ub, "tag" / Int32ub)),
    "state_bytes" / Int32ub,
    "state" / Bytes(this.state_bytes),  # the owner's, opaque here
)
TAGS_MAX = 64
STATE_BYTES = SLOT_PAYLOAD_BYTES - 33 - 12 * TAGS_MAX  # the most that an owner's state may have

frame_header = Struct(
    "magic" / Int32ub,
    "version" / Int8ub,
    "kind" / Int8ub,  # FrameKind
    "flags" / Int16ub,  # none yet: 0
    "position" / Int64ub,  # where this frame belongs, and so its lap
    "size_bytes" / Int32ub,  # the whole frame: a multiple of 4096
    "body_bytes" / Int32ub,  # follows the header; zeros fill the frame
    "chain" / Int32ub,  # `crc` of the frame before it
    "body_crc" / Int32ub,  # the record header's own CRC: ties the chain to the content
    "durable_through" / Int64ub,  # position below which everything was synced when this was appended
    "first" / Int64ub,  # first sequence number; of a NOTE the number noted
    "count" / Int32ub,  # how many numbers; 0 for NOTE and PAD
    "stream" / Int16ub,  # which secondary the record goes to; 0 for none
    "sender" / Int16ub,  # which primary it came from; 0 for none
    # As the superblock says for this position: a payload may hold frames of another journal, on a replicated volume.
    "tag" / Int32ub,
    "crc" / Int32ub,  # CRC32C of the 60 bytes before it
)
assert frame_header.sizeof() == FRAME_HEADER_BYTES


def _codes(declaration: Struct) -> str:
    """The struct module's format of a construct of integers: the declaration stays the one source."""
    return ">" + "".join(field.subcon.fmtstr[1:] for field in declaration.subcons)


FRAME_STRUCT = struct.Struct(_codes(frame_header))
FRAME_UNSIGNED_STRUCT = struct.Struct(_codes(frame_header)[:-1])  # all but the CRC at its end
assert FRAME_STRUCT.size == FRAME_HEADER_BYTES


class FrameHeader(NamedTuple):
    """A frame header, unpacked; fields as in `frame_header`."""

    magic: int
    version: int
    kind: int
    flags: int
    position: int
    size_bytes: int
    body_bytes: int
    chain: int
    body_crc: int
    durable_through: int
    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    stream: int
    sender: int
    tag: int
    crc: int


assert FrameHeader._fields == tuple(field.name for field in frame_header.subcons)


def frame_bytes(body_bytes: int) -> int:
    """Bytes of the ring that a frame with this body takes (a PAD before it not counted)."""
    return (FRAME_HEADER_BYTES + body_bytes + FRAME_ALIGN_BYTES - 1) & -FRAME_ALIGN_BYTES
