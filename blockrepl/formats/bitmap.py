"""A dirty bitmap on disk: one header page, then pages of bits, each with a checksum of its own. Big-endian.

Bits are only ever added between clearings, so a page that was torn, or whose checksum is wrong, counts as all ones: a
superset of what differs is always right (PROTOCOL, rules 8 and 17).

    0     header, 4096 bytes
    4096  pages: 4092 bytes of bits (bit i of byte k: block 8 k + i), CRC32C of the page's number and the bits
"""

from __future__ import annotations

import struct

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct
from crc32c import crc32c

BITMAP_MAGIC = 0x4252424D  # "BRBM"
BITMAP_VERSION = 1
PAGE_BYTES = 4096
PAGE_BITS_BYTES = PAGE_BYTES - 4

bitmap_header = Struct(
    "magic" / Const(BITMAP_MAGIC, Int32ub),
    "version" / Const(BITMAP_VERSION, Int8ub),
    Padding(3),
    "group" / Bytes(16),
    "volume" / Int16ub,
    "node" / Int16ub,
    "block_bytes" / Int32ub,
    "size_bytes" / Int64ub,
    "crc" / Int32ub,  # of the 40 bytes before it
)
HEADER_BYTES = bitmap_header.sizeof()
_CRC = struct.Struct(">I")
_NUMBER = struct.Struct(">I")


def encode_header(group: bytes, volume: int, node: int, size_bytes: int, block_bytes: int) -> bytes:
    """A whole header page."""
    fields = {"group": group, "volume": volume, "node": node, "size_bytes": size_bytes, "block_bytes": block_bytes}
    raw: bytes = bitmap_header.build({**fields, "crc": 0})
    body = raw[:-4]
    return (body + _CRC.pack(crc32c(body))).ljust(PAGE_BYTES, b"\0")


def header_is_whole(raw: bytes) -> bool:
    """Whether the checksum of a header page is right."""
    body = raw[: HEADER_BYTES - 4]
    return raw[HEADER_BYTES - 4 : HEADER_BYTES] == _CRC.pack(crc32c(body))


def encode_page(number: int, bits: bytes | bytearray) -> bytes:
    """Page ``number`` (from 0) of the bits; the last one may be short."""
    padded = bytes(bits).ljust(PAGE_BITS_BYTES, b"\0")
    return padded + _CRC.pack(crc32c(padded, crc32c(_NUMBER.pack(number))))


def decode_page(number: int, raw: bytes) -> bytes | None:
    """The bits of a page; None when its checksum is wrong."""
    bits = raw[:PAGE_BITS_BYTES]
    return bits if raw[PAGE_BITS_BYTES:] == _CRC.pack(crc32c(bits, crc32c(_NUMBER.pack(number)))) else None
