"""The control command `bitmap`: what a node's dirty bitmaps say, and what a source would add to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockrepl.bitmap import Bitmap
from blockrepl.replication.primary import Primary

MAX_RUNS = 10_000


def bitmap_report(bitmaps: Mapping[int, Bitmap], names: Mapping[int, str]) -> list[dict[str, Any]]:
    """One object per volume; runs of dirty blocks as ranges in bytes, at most `MAX_RUNS` of them."""
    return [
        {
            "volume": names[volume], "block_bytes": bitmap.block_bytes, "size_bytes": bitmap.size_bytes,
            "dirty_bytes": bitmap.dirty_bytes, "ranges": _ranges(bitmap),
        }
        for volume, bitmap in sorted(bitmaps.items())
    ]  # fmt: skip


def _ranges(bitmap: Bitmap) -> list[dict[str, int]]:
    ranges: list[dict[str, int]] = []
    for block, count in bitmap.runs():
        if len(ranges) == MAX_RUNS:
            break
        start = block * bitmap.block_bytes
        end = min(start + count * bitmap.block_bytes, bitmap.size_bytes)
        ranges.append({"offset_bytes": start, "length_bytes": end - start})
    return ranges


def open_writes(role: Primary, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Writes of this source that its group may not have: acknowledged ones that are not known validated everywhere,
    with the number that acknowledged them, and pending ones (number null). The newest `MAX_RUNS`.
    """
    found = [
        {"volume": names[volume], "number": number, "offset_bytes": offset, "length_bytes": length}
        for number, volume, offsets, lengths in role.unconfirmed.columns()
        for offset, length in zip(offsets, lengths, strict=True)
    ]
    found += [
        {"volume": names[record.volume], "number": None, "offset_bytes": offset, "length_bytes": length}
        for record in role.queue
        if record.batch is not None
        for offset, length in zip(record.batch.offsets, record.batch.lengths, strict=True)
    ]
    return found[-MAX_RUNS:]
