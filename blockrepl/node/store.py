"""Storing the entries of a record in an image: one place for replay at a primary and for apply at a secondary."""

from __future__ import annotations

from blockrepl.block import Op, WriteFlag
from blockrepl.node.ports import Image


def store_entry(image: Image, op: int, flags: int, offset_bytes: int, length_bytes: int, payload: object) -> None:
    """Into the page cache. Raises OSError."""
    if op == Op.WRITE:
        assert isinstance(payload, memoryview)
        image.pwrite(offset_bytes, payload)
    elif op == Op.ZERO:
        image.zero(offset_bytes, length_bytes, allocate=bool(flags & WriteFlag.NO_HOLE))
    elif op == Op.TRIM:
        image.trim(offset_bytes, length_bytes)
