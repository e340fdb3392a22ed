"""Bits of volumes on a link: both ways of message BITMAP, for every role that tells or hears them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from blockrepl.bitmap import Bitmap
from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Message, encode


def bit_messages(epoch_number: int, bitmaps: Iterable[tuple[int, Bitmap]]) -> list[bytes]:
    """BITMAP messages of everything set, for (volume, bitmap) pairs in their order."""
    return [
        encode(
            Message.BITMAP, epoch_number, volume=volume, block_bytes=bitmap.block_bytes, first_block=first, bits=bits
        )
        for volume, bitmap in bitmaps
        for first, bits in bitmap.pieces()
    ]


def merge_bits(bitmaps: Mapping[int, Bitmap], fields: dict[str, Any]) -> None:
    """Set what a BITMAP says. Raises ProtocolError when it is of another volume, granularity or size."""
    bitmap = bitmaps.get(fields["volume"])
    if bitmap is None or fields["block_bytes"] != bitmap.block_bytes:
        raise ProtocolError(f"bits of volume {fields['volume']} in blocks of {fields['block_bytes']} bytes")
    try:
        bitmap.merge(fields["first_block"], fields["bits"])
    except ValueError as error:
        raise ProtocolError(str(error)) from error
