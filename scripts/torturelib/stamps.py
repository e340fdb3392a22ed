"""Blocks that say who wrote them: each holds the number of its write, its place, and a checksum over all of it.

No stamped block is all zeroes, so a block that was never written, or was zeroed, is told from every stamped one.
"""

from __future__ import annotations

import struct

from crc32c import crc32c

BLOCK_BYTES = 4096
ZEROES = bytes(BLOCK_BYTES)
FOREIGN = -1
_HEAD = struct.Struct(">8sQQQI")  # magic, volume, block, write (from 1), CRC32C of what precedes and of the body
_MAGIC = b"brtortur"
_BODY_BYTES = BLOCK_BYTES - _HEAD.size
_CRC_AT = _HEAD.size - 4


def stamp(volume: int, block: int, write: int) -> bytes:
    """The content of ``block`` (in blocks) of ``volume`` as ``write`` left it."""
    body = struct.pack(">Q", (write * 0x9E3779B97F4A7C15 + block) & 0xFFFFFFFFFFFFFFFF) * (_BODY_BYTES // 8)
    body += b"." * (_BODY_BYTES - len(body))
    head = _HEAD.pack(_MAGIC, volume, block, write, 0)[:_CRC_AT]
    return head + struct.pack(">I", crc32c(body, crc32c(head))) + body


def read_stamp(volume: int, block: int, content: bytes) -> int:
    """The write that left it; 0: zeroes; FOREIGN: neither, so torn, or another block's."""
    if content == ZEROES:
        return 0
    magic, found_volume, found_block, write, crc = _HEAD.unpack_from(content)
    if (magic, found_volume, found_block) != (_MAGIC, volume, block) or len(content) != BLOCK_BYTES:
        return FOREIGN
    view = memoryview(content)
    return int(write) if crc32c(view[_HEAD.size :], crc32c(view[:_CRC_AT])) == crc else FOREIGN
