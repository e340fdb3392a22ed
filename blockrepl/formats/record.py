"""The batch record: what travels from a primary through the intermediate's journal to a secondary, never changed.

Source: PROTOCOL rule 9. Big-endian. Offsets and lengths in bytes, times in nanoseconds since 1970.

    0    primary's part of the header, 64 bytes; its CRC32C covers the 60 bytes before it, the entries and the payload
    64   intermediate's part, 64 bytes; its CRC32C covers the 124 bytes before it (and, through the CRC in it, the rest)
    128  entries, 24 bytes each
    …    payload of the entries that have one, in their order, without gaps

A primary leaves the intermediate's part zero. The intermediate fills it in place, in the buffer it received.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct
from crc32c import crc32c

from blockrepl.block import Buffer, Op
from blockrepl.errors import DamagedError, ProtocolError

RECORD_MAGIC = 0x42525243  # "BRRC"
RECORD_VERSION = 1
HEADER_BYTES = 128
PRIMARY_PART_BYTES = 64
ENTRY_BYTES = 24
MAX_ENTRIES = 65535
MAX_BODY_BYTES = (64 << 20) - HEADER_BYTES
DIGEST_BYTES = 16

record_header = Struct(
    "magic" / Const(RECORD_MAGIC, Int32ub),
    "version" / Const(RECORD_VERSION, Int8ub),
    "kind" / Int8ub,  # RecordKind
    "flags" / Int16ub,
    "group" / Bytes(16),  # UUID of the consistency group
    "sender" / Int16ub,  # node id of the primary
    "stream" / Int16ub,  # node id of the secondary
    "incarnation" / Int32ub,
    "batch" / Int64ub,
    "count" / Int32ub,  # entries, and numbers taken
    "body_bytes" / Int32ub,  # entries and payload
    Padding(12),
    "body_crc" / Int32ub,
    "epoch" / Int64ub,
    "first" / Int64ub,  # the sequence number of the first entry
    "previous" / Int64ub,  # last number before this record in its stream; 0 for none
    "time_ns" / Int64ub,  # when it was numbered; for people, orders nothing
    Padding(28),
    "header_crc" / Int32ub,
)
assert record_header.sizeof() == HEADER_BYTES

record_entry = Struct(
    "volume" / Int16ub,
    "op" / Int8ub,  # block.Op, or DIGEST
    "flags" / Int8ub,  # block.WriteFlag
    "reserved" / Const(0, Int32ub),
    "offset_bytes" / Int64ub,
    "length_bytes" / Int64ub,
)
assert record_entry.sizeof() == ENTRY_BYTES

PRIMARY_PART = struct.Struct(">IBBH16sHHIQII12xI")
INTERMEDIATE_PART = struct.Struct(">QQQQ28xI")
ENTRY = struct.Struct(">HBBIQQ")
assert PRIMARY_PART.size == PRIMARY_PART_BYTES
assert INTERMEDIATE_PART.size == HEADER_BYTES - PRIMARY_PART_BYTES
assert ENTRY.size == ENTRY_BYTES
_CRC = struct.Struct(">I")
_EMPTY_PART = bytes(HEADER_BYTES - PRIMARY_PART_BYTES)
OP_CONTROL = 6  # the one entry of a START, END or CONFIG
_WITH_PAYLOAD, _OTHERS = (int(Op.WRITE), int(Op.METADATA)), (int(Op.ZERO), int(Op.TRIM), OP_CONTROL)
OP_DIGEST = 4  # an entry whose payload is a digest of the block at this number (PROTOCOL, rule 19)


class RecordKind(IntEnum):
    """What a record carries."""

    UPDATE = 1  # host writes
    DIGEST = 2  # verify: digests, nothing to store
    START = 3  # a resync begins in this stream; made by the intermediate (PROTOCOL, rules 19 and 20)
    END = 4  # … and has ended
    CONFIG = 6  # a configuration takes effect (PROTOCOL, rule 26); made by the intermediate, one in each stream
    MARKER = 5  # a name that an application put into the order; made by the intermediate, one in each stream


class RecordFlag(IntFlag):
    """Of a record."""

    NONE = 0
    COPY = 1  # UPDATE: blocks copied by a resync, not written by a host (PROTOCOL, rule 19)
    JUMP = 4  # START: what its stream has between the last record held and it is never sent, it is copied
    INITIAL = 2  # START: the secondaries are at no number before END: nothing is saved, nothing to go back to


@dataclass(slots=True)
class RecordHead:
    """A decoded header. Numbers are 0 until the intermediate has given them."""

    kind: int
    flags: int
    group: bytes
    sender: int
    stream: int
    incarnation: int
    batch: int
    count: int
    body_bytes: int
    body_crc: int
    epoch: int = 0
    first: int = 0
    previous: int = 0
    time_ns: int = 0
    header_crc: int = 0

    @property
    def last(self) -> int:
        """The sequence number of the last entry."""
        return self.first + self.count - 1

    @property
    def size_bytes(self) -> int:
        """Header and body."""
        return HEADER_BYTES + self.body_bytes


Entry = tuple[int, int, int, int, int, "memoryview | None"]
"""(volume, op, flags, offset_bytes, length_bytes, payload)"""


def encode_record(
    kind: int,
    group: bytes,
    sender: int,
    stream: int,
    incarnation: int,
    batch: int,
    volume: int,
    ops: Sequence[int],
    flags: Sequence[int],
    offsets: Sequence[int],
    lengths: Sequence[int],
    payloads: Sequence[Buffer | None],
    payload_bytes: int,
    record_flags: int = 0,
) -> tuple[bytearray, int]:
    """Header and entries of a record of one volume, and the size of the whole record; the payloads follow as they are.

    Columns of equal length, as in `block.WriteBatch`.
    """
    count = len(offsets)
    head = bytearray(HEADER_BYTES + ENTRY_BYTES * count)
    position = HEADER_BYTES
    pack = ENTRY.pack_into
    for op, flag, offset, length in zip(ops, flags, offsets, lengths, strict=True):
        pack(head, position, volume, op, flag, 0, offset, length)
        position += ENTRY_BYTES
    body_bytes = ENTRY_BYTES * count + payload_bytes
    PRIMARY_PART.pack_into(
        head, 0, RECORD_MAGIC, RECORD_VERSION, kind, record_flags, group, sender, stream, incarnation, batch, count,
        body_bytes, 0,
    )  # fmt: skip
    view = memoryview(head)
    crc = crc32c(view[HEADER_BYTES:], crc32c(view[: PRIMARY_PART_BYTES - 4]))
    for payload in payloads:
        if payload is not None:
            crc = crc32c(payload, crc)
    _CRC.pack_into(head, PRIMARY_PART_BYTES - 4, crc)
    return head, HEADER_BYTES + body_bytes


def control_record(
    kind: RecordKind, group: bytes, sender: int, stream: int, incarnation: int, number: int, flags: int = 0
) -> bytearray:
    """A whole START, END or CONFIG, made by the intermediate ``sender``; ``number`` stands in its entry's offset.

    START: the number that the secondaries would go back to. END: the number of the START. CONFIG: the digest.
    """
    record, _ = encode_record(
        kind, group, sender, stream, incarnation, 0, 0, [OP_CONTROL], [0], [number], [0], [None], 0, flags
    )  # fmt: skip
    return record


MAX_MARKER_BYTES = 255


def marker_record(group: bytes, sender: int, stream: int, incarnation: int, number: int, name: bytes) -> bytearray:
    """A whole MARKER; ``number``: the last one of those that carry this name, where a takeover would stop."""
    record, _ = encode_record(
        RecordKind.MARKER, group, sender, stream, incarnation, 0, 0, [Op.WRITE], [0], [number], [len(name)], [name],
        len(name),
    )  # fmt: skip
    return record + name


def marker_name(record: memoryview) -> bytes:
    """What `marker_record` was given."""
    return bytes(record[HEADER_BYTES + ENTRY_BYTES :])


def control_number(record: memoryview) -> int:
    """What `control_record` was given."""
    number: int = ENTRY.unpack_from(record, HEADER_BYTES)[4]
    return number


def decode_batch(view: memoryview) -> RecordHead:
    """The primary's part of a record that has just arrived at the intermediate, checked with its whole body.

    Raises ProtocolError on anything a correct primary does not send.
    """
    head = _primary_part(view, ProtocolError)
    if bytes(view[PRIMARY_PART_BYTES:HEADER_BYTES]) != _EMPTY_PART:
        raise ProtocolError("batch carries numbers already")
    _check_body(head, view, ProtocolError)
    return head


def decode_record(view: memoryview) -> RecordHead:
    """A whole record, both checksums and the entries' shape checked. Raises ProtocolError."""
    return _decode(view, ProtocolError)


def check_record(view: memoryview) -> RecordHead:
    """As `decode_record`, for bytes read from a journal. Raises DamagedError."""
    return _decode(view, DamagedError)


def peek(header: memoryview | bytes) -> tuple[int, int]:
    """Kind of a record and bytes of its entry table, from its header alone: it was checked when it came in."""
    fields = PRIMARY_PART.unpack_from(header)
    kind, count = fields[2], fields[9]
    return kind, count * ENTRY_BYTES


def peek_head(header: memoryview | bytes) -> RecordHead:
    """A record's head from its header alone: it was checked when it came in."""
    _, _, kind, flags, group, sender, stream, incarnation, batch, count, body_bytes, crc = PRIMARY_PART.unpack_from(
        header
    )
    head = RecordHead(kind, flags, group, sender, stream, incarnation, batch, count, body_bytes, crc)
    part = INTERMEDIATE_PART.unpack_from(header, PRIMARY_PART_BYTES)
    head.epoch, head.first, head.previous, head.time_ns, head.header_crc = part
    return head


def peek_size(header: memoryview | bytes) -> int:
    """Bytes of the record that begins here. Raises DamagedError when none does."""
    fields = PRIMARY_PART.unpack_from(header)
    if fields[0] != RECORD_MAGIC or fields[10] > MAX_BODY_BYTES:
        raise DamagedError(f"not a record: magic {fields[0]:#x}")
    return HEADER_BYTES + int(fields[10])


def _decode(view: memoryview, error: type[ProtocolError] | type[DamagedError]) -> RecordHead:
    head = _primary_part(view, error)
    part = INTERMEDIATE_PART.unpack_from(view, PRIMARY_PART_BYTES)
    head.epoch, head.first, head.previous, head.time_ns, head.header_crc = part
    if crc32c(view[: HEADER_BYTES - 4]) != head.header_crc:
        raise error(f"record header of batch {head.batch}: wrong checksum")
    if head.first == 0 or head.previous >= head.first:
        raise error(f"record {head.first}: previous number {head.previous} is not below it")
    _check_body(head, view, error)
    return head


def _primary_part(view: memoryview, error: type[ProtocolError] | type[DamagedError]) -> RecordHead:
    if len(view) < HEADER_BYTES:
        raise error(f"record of {len(view)} bytes is shorter than its header")
    magic, version, kind, flags, group, sender, stream, incarnation, batch, count, body_bytes, crc = (
        PRIMARY_PART.unpack_from(view)
    )
    if magic != RECORD_MAGIC or version != RECORD_VERSION:
        raise error(f"not a record: magic {magic:#x}, version {version}")
    if body_bytes != len(view) - HEADER_BYTES or not 0 < count <= MAX_ENTRIES or count * ENTRY_BYTES > body_bytes:
        raise error(f"record of {len(view)} bytes claims {count} entries and {body_bytes} bytes")
    return RecordHead(kind, flags, group, sender, stream, incarnation, batch, count, body_bytes, crc)


def _check_body(head: RecordHead, view: memoryview, error: type[ProtocolError] | type[DamagedError]) -> None:
    if crc32c(view[HEADER_BYTES:], crc32c(view[: PRIMARY_PART_BYTES - 4])) != head.body_crc:
        raise error(f"record body of batch {head.batch} from node {head.sender}: wrong checksum")
    payload = 0
    with_payload, others = _WITH_PAYLOAD, _OTHERS
    for _, op, _, _, _, length in ENTRY.iter_unpack(view[HEADER_BYTES : HEADER_BYTES + head.count * ENTRY_BYTES]):
        if op in with_payload:
            payload += length
        elif op == OP_DIGEST:
            payload += DIGEST_BYTES
        elif op not in others:
            raise error(f"record of batch {head.batch}: unknown operation {op}")
    if payload + head.count * ENTRY_BYTES != head.body_bytes:
        raise error(f"record of batch {head.batch}: entries need {payload} payload bytes")


def number_record(
    buffer: bytearray | memoryview, offset: int, epoch: int, first: int, previous: int, time_ns: int
) -> int:
    """Fill in the intermediate's part of the record at ``offset`` of ``buffer``, in place; return the header's CRC."""
    part = offset + PRIMARY_PART_BYTES
    INTERMEDIATE_PART.pack_into(buffer, part, epoch, first, previous, time_ns, 0)
    crc = crc32c(memoryview(buffer)[offset : offset + HEADER_BYTES - 4])
    _CRC.pack_into(buffer, offset + HEADER_BYTES - 4, crc)
    return crc


def iterate_entries(head: RecordHead, view: memoryview) -> Iterator[Entry]:
    """The entries of a checked record with views of their payloads."""
    table_end = HEADER_BYTES + head.count * ENTRY_BYTES
    position = table_end
    for volume, op, flags, _, offset, length in ENTRY.iter_unpack(view[HEADER_BYTES:table_end]):
        if op in _WITH_PAYLOAD:
            end = position + length
        elif op == OP_DIGEST:
            end = position + DIGEST_BYTES
        else:
            yield volume, op, flags, offset, length, None
            continue
        yield volume, op, flags, offset, length, view[position:end]
        position = end
