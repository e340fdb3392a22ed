"""The sidecar identity of an image file: ``NAME.img.id`` says whose bytes ``NAME.img`` holds.

A raw image carries no header, so that it can be read by anything. Source: this project. Big-endian.
"""

from __future__ import annotations

from enum import IntEnum

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct

MAGIC = b"BRIMAGE\x00"
VERSION = 1


class Side(IntEnum):
    """Which end of a pair the image is. The values stand on disk: never renumber them."""

    PRIMARY = 1
    SECONDARY = 2
    INTERMEDIATE = 3  # volumes mode


image_identity = Struct(
    "magic" / Const(MAGIC),
    "version" / Const(VERSION, Int16ub),
    "side" / Int8ub,  # Side
    Padding(1),
    "volume_id" / Int32ub,
    "node_id" / Int32ub,
    "block_size_bytes" / Int32ub,
    "group_id" / Bytes(16),  # UUID
    "size_bytes" / Int64ub,
    Padding(8),
    "crc" / Int32ub,  # CRC32C of all before it
)
IDENTITY_BYTES = 60
CRC_BYTES = 4
assert image_identity.sizeof() == IDENTITY_BYTES
