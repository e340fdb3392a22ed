"""Digests of blocks, for verify: both ends digest the same block at the same sequence number (PROTOCOL, rule 19)."""

from __future__ import annotations

from hashlib import blake2b

from blockrepl.formats.record import DIGEST_BYTES
from blockrepl.node.ports import Image

VERIFY_BLOCK_BYTES = 64 << 10
VERIFY_RANGE_BYTES = 1 << 20  # one digest record
_ZEROES = bytes(VERIFY_BLOCK_BYTES)


def digest(block: memoryview | bytes) -> bytes:
    """BLAKE2b of 16 bytes (RFC 7693)."""
    return blake2b(block, digest_size=DIGEST_BYTES).digest()


_ZERO_DIGEST = digest(_ZEROES)


def digest_range(image: Image, offset_bytes: int, length_bytes: int, block_bytes: int) -> list[bytes]:
    """The digests of the blocks of a range; the last block may be short. Holes are not read. Raises OSError."""
    buffer = memoryview(bytearray(block_bytes))
    holes = [(at, at + size) for at, size, is_data in image.allocation(offset_bytes, length_bytes) if not is_data]
    digests = []
    end = offset_bytes + length_bytes
    for start in range(offset_bytes, end, block_bytes):
        stop = min(start + block_bytes, end)
        if stop - start == VERIFY_BLOCK_BYTES and any(a <= start and stop <= b for a, b in holes):
            digests.append(_ZERO_DIGEST)
            continue
        view = buffer[: stop - start]
        image.read(start, view)
        digests.append(digest(view))
    return digests
