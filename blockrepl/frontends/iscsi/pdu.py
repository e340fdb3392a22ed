"""Cutting a stream into PDUs, and sealing those that leave.

What is cut is complete and has right digests; what a PDU means is for others. Sources: RFC 7143, 11.2 (segments,
padding, AHS), 13.1 (digests), 7.6 to 7.8 (which faults end a connection).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from crc32c import crc32c

from blockrepl.block import Buffer
from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError
from blockrepl.formats.iscsi import BHS_BYTES, DIGEST_BYTES, LENGTHS, MAX_SEGMENT_BYTES, AhsType, ahs_header, padded

LOGIN_SEGMENT_BYTES = 8192  # the default of MaxRecvDataSegmentLength (RFC 7143, 13.12)
_DIGEST = struct.Struct("<I")  # CRC32C goes out with its lowest byte first (RFC 7143, 13.1)
PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


class FramingError(ProtocolError):
    """The stream cannot be cut any further: the connection has to end."""


class Pdu(NamedTuple):
    """Where a PDU lies in a chunk. ``end`` of its data is without padding."""

    at: int
    data_at: int
    data_end: int
    intact: bool  # its data digest is right, or there is none


class Framing:
    """How PDUs lie in one direction of a connection. Digests begin with the full feature phase."""

    def __init__(self) -> None:
        self.header_digest = False
        self.data_digest = False
        self.max_data_bytes = LOGIN_SEGMENT_BYTES
        self.need = 0  # whole size of the PDU cut off at the end of the last `cut`, 0 when unknown

    def cut(self, chunk: Chunk, start: int, end: int, pdus: list[Pdu]) -> int:
        """Append every complete PDU in ``chunk.view[start:end]`` to ``pdus``; return where the first incomplete one
        begins. Raises FramingError."""
        buffer = chunk.buffer
        lengths_of = LENGTHS.unpack_from
        plain_limit = -1 if self.header_digest or self.data_digest else self.max_data_bytes
        self.need = 0
        at = start
        append = pdus.append
        while end - at >= BHS_BYTES:
            (lengths,) = lengths_of(buffer, at)
            if lengths <= plain_limit:
                data_at = at + BHS_BYTES
                after = data_at + (lengths + 3 & ~3)
                if after > end:
                    self.need = after - at
                    break
                append(Pdu(at, data_at, data_at + lengths, True))
                at = after
                continue
            size = self._size(lengths)
            if size > end - at:
                self.need = size
                break
            append(self._checked(chunk.view, at, lengths))
            at += size
        return at

    def _size(self, lengths: int) -> int:
        data_bytes = lengths & MAX_SEGMENT_BYTES
        if data_bytes > self.max_data_bytes:
            raise FramingError(f"a data segment of {data_bytes} bytes, at most {self.max_data_bytes} were agreed")
        size = BHS_BYTES + (lengths >> 24) * 4 + padded(data_bytes)
        return size + DIGEST_BYTES * (self.header_digest + (self.data_digest and data_bytes > 0))

    def _checked(self, view: memoryview, at: int, lengths: int) -> Pdu:
        data_at = at + BHS_BYTES + (lengths >> 24) * 4
        if self.header_digest:
            if crc32c(view[at:data_at]) != _DIGEST.unpack_from(view, data_at)[0]:
                raise FramingError("a header digest is wrong")
            data_at += DIGEST_BYTES
        data_bytes = lengths & MAX_SEGMENT_BYTES
        intact = True
        if self.data_digest and data_bytes:
            digest_at = data_at + padded(data_bytes)
            intact = crc32c(view[data_at:digest_at]) == _DIGEST.unpack_from(view, digest_at)[0]
        return Pdu(at, data_at, data_at + data_bytes, intact)

    def seal(self, header: Buffer, data: Sequence[Buffer] = ()) -> list[Buffer]:
        """The buffers of one PDU: header (with AHS), data, padding, and digests as agreed. The header says how long
        the data is."""
        out: list[Buffer] = [header]
        if self.header_digest:
            out.append(_DIGEST.pack(crc32c(header)))
        if not data:
            return out
        size = sum(map(len, data))
        out += data
        if padding := PADDING[size & 3]:
            out.append(padding)
        if self.data_digest and size:
            crc = 0
            for buffer in data:
                crc = crc32c(buffer, crc)
            out.append(_DIGEST.pack(crc32c(padding, crc) if padding else crc))
        return out


def additional_segments(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and content of each AHS in ``view`` (RFC 7143, 11.2.2). Raises ProtocolError."""
    at = 0
    while at < len(view):
        head = ahs_header.parse(view[at : at + 3].tobytes().ljust(3, b"\0"))
        if not head.length_bytes or at + 3 + head.length_bytes > len(view):
            raise ProtocolError(f"an additional header segment of {head.length_bytes} bytes does not fit")
        yield head.type, view[at + 3 : at + 3 + head.length_bytes]
        at += padded(3 + head.length_bytes)


def extended(cdb: bytes, segments: memoryview) -> tuple[bytes, int]:
    """A whole CDB, and the read length of a bidirectional command (0 without), from what the header and its AHS say.

    Raises ProtocolError.
    """
    read_bytes = 0
    seen = set()
    for kind, content in additional_segments(segments):
        if kind in seen:
            raise ProtocolError("an additional header segment stands there twice")
        seen.add(kind)
        if kind == AhsType.EXTENDED_CDB:
            cdb += bytes(content[1:])
        elif kind == AhsType.READ_LENGTH:
            if len(content) != 5:
                raise ProtocolError("a bidirectional read length has 4 bytes")
            read_bytes = int.from_bytes(content[1:], "big")
        else:
            raise ProtocolError(f"an additional header segment of unknown type {kind}")
    return cdb, read_bytes
