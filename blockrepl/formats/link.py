"""Messages of the replication links. Source: PROTOCOL.md. Big-endian; numbers are sequence numbers, sizes are bytes.

Every message is a header of 24 bytes and a body. The header's CRC32C covers the header before it and, for all but
BATCH and RECORD (which carry checksums of their own), the body.

Hop 1: the primary dials the intermediate. Hop 2: the intermediate dials the secondary. A takeover's opener dials
secondaries and intermediate. The dialler sends HELLO, the other end WELCOME or REFUSED; versions and features are
agreed there. A HELLO in mid-connection closes the link.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any, NamedTuple

from construct import (
    Bytes,
    Const,
    Construct,
    Flag,
    GreedyBytes,
    Int8ub,
    Int16ub,
    Int32ub,
    Int64ub,
    PascalString,
    Prefixed,
    PrefixedArray,
    Struct,
    Terminated,
)
from construct.core import ConstructError
from crc32c import crc32c

from blockrepl.errors import ProtocolError
from blockrepl.formats.record import HEADER_BYTES as RECORD_HEADER_BYTES
from blockrepl.formats.record import MAX_BODY_BYTES

LINK_MAGIC = 0x42524C4B  # "BRLK"
VERSION_MIN = 1
VERSION_MAX = 1
FEATURES = 0  # bits that both ends must know to use
HEADER_BYTES = 24
MAX_CONTROL_BYTES = 16 << 10
MAX_RECORD_BYTES = RECORD_HEADER_BYTES + MAX_BODY_BYTES


class Message(IntEnum):
    """Types of messages."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    HEARTBEAT = 4
    BATCH = 10  # P → I: a record without numbers
    ACK = 11  # I → P, cumulative
    CHECKPOINT = 12  # P → I
    REPLAY = 13  # P → I: send me my records above a number
    REPLAYED = 14  # I → P: that was all
    RECORD = 20  # I → S, and I → P while replaying
    PREPARE = 21
    PREPARED = 22
    VALIDATE = 23
    DIGESTED = 24  # S → I → P: what a digest record found
    SUSPEND = 25  # I → P: the group is suspended, nothing more is numbered
    RESYNC = 26  # I → P: copy what the bitmaps say; the BITMAPs before it are mine
    BITMAP = 27  # bits of one volume: before RESYNC (I → P) or REJOINED (S → I)
    COPIED = 28  # P → I: everything of the resync is sent
    RESYNCED = 29  # I → P: its end is validated, the bits may go
    PROMISE = 30  # opener → I, S
    PROMISED = 31
    STORE = 32
    STORED = 33
    ACTIVATE = 34
    ACTIVATED = 35
    SPLIT = 36  # I → S: the group is split at a number
    REJOIN = 37  # I → S: stop writing to S-VOLs, say what was written since the split
    REJOINED = 38  # S → I
    CONFIG = 39  # P, S → I: the newest one that it has files for; I → P: one is in effect, its record is validated


BULK = frozenset({Message.BATCH, Message.RECORD})


class LinkRole(IntEnum):
    """Who is at an end of a link."""

    PRIMARY = 1
    INTERMEDIATE = 2
    SECONDARY = 3
    OPENER = 4  # a secondary that runs a takeover, or asks what one would do
    REFORMER = 5  # a source that forms the group anew: swap, replacement


class Pair(IntEnum):
    """States of a pair, as Hitachi CCI names them."""

    SMPL = 0  # no pair
    COPY = 1  # initial copy or resync
    PAIR = 2
    PSUS = 3  # split on purpose
    PSUE = 4  # suspended by an error
    PFUL = 5  # journal above its high-water mark
    PFUS = 6  # suspended because it was full
    SSWS = 7  # secondary has taken over, writable


class Refusal(IntEnum):
    """Why a HELLO, or an established link, was refused."""

    VERSION = 1
    GROUP = 2
    NODE = 3
    ROLE = 4
    EPOCH = 5  # the refuser knows a higher epoch than the refused
    STALE = 6  # an older incarnation
    BEHIND = 7  # the refuser recovered less than the refused saw acknowledged
    ACTIVE = 8  # the refuser has taken over
    STATE = 9  # not now
    PROTOCOL = 10


link_header = Struct(
    "magic" / Const(LINK_MAGIC, Int32ub),
    "type" / Int8ub,
    "version" / Int8ub,
    "flags" / Int16ub,
    "length_bytes" / Int32ub,
    "epoch" / Int64ub,  # number of the sender's epoch
    "crc" / Int32ub,
)
assert link_header.sizeof() == HEADER_BYTES
HEADER = struct.Struct(">IBBHIQI")
assert HEADER.size == HEADER_BYTES

epoch_id = Struct("number" / Int64ub, "id" / Bytes(16))

_bodies: dict[int, Any] = {
    Message.HELLO: Struct(
        "version_min" / Int8ub,
        "version_max" / Int8ub,
        "role" / Int8ub,  # LinkRole of the sender
        "features" / Int64ub,
        "group" / Bytes(16),
        "node" / Int16ub,
        "peer" / Int16ub,  # whom the dialler means to talk to
        "incarnation" / Int32ub,
        "nonce" / Bytes(16),
        "epoch" / epoch_id,
        "promised" / epoch_id,
        "highest" / Int64ub,  # P: highest number it saw acknowledged. I: numbered
        "checkpoint" / Int64ub,  # P only
        "fresh" / Flag,  # P: must replay before it serves
        "suspended" / Flag,  # P: its P-VOLs are ahead of the journal by its bitmap; it never replays (rule 7)
        "trusted" / Flag,  # P: its bitmap says all; else only a verify finds what differs (rule 8)
        "direction" / Int8ub,  # 0: as the definition has it; 1: swapped
        "name" / PascalString(Int8ub, "utf8"),
    ),
    Message.WELCOME: Struct(
        "version" / Int8ub,
        "role" / Int8ub,
        "features" / Int64ub,
        "node" / Int16ub,
        "nonce" / Bytes(16),  # the HELLO's
        "epoch" / epoch_id,
        "promised" / epoch_id,
        "through" / Int64ub,  # I: all of this P up to it is durable. S: highest record number it holds durably
        "batch" / Int64ub,  # I: last durable batch of this incarnation
        "credit" / Int64ub,  # frame bytes the peer may send on this connection, in all
        "validated" / Int64ub,
        "prepared" / Int64ub,  # S: the greatest n it noted as prepared
        "applied" / Int64ub,
        "active" / Flag,  # S: it has taken over
        "direction" / Int8ub,
        "pair" / Int8ub,  # I: Pair of the group
        "numbering" / Flag,  # I: False while hop 1 is suspended
        "resync" / Int64ub,  # I: the resync under way, by its START; 0 for none
        "resynced" / Int64ub,  # I: the last one that ended well
        "copying" / Flag,  # S: between START and END
        "copy_from" / Int64ub,  # S: the number it would go back to
        "split" / Flag,  # S: split from the group, waits for REJOIN
        "rolling" / Flag,  # S: its stored epoch came from a takeover
        "recovered" / Flag,  # S: the primary beside it, if any, has read back what its P-VOLs lacked (rule 7)
    ),
    Message.REFUSED: Struct(
        "code" / Int16ub,
        "epoch" / epoch_id,  # the refuser's highest stored
        "promised" / epoch_id,
        "text" / PascalString(Int16ub, "utf8"),
    ),
    Message.HEARTBEAT: Struct(
        "stamp_ns" / Int64ub,  # sender's boot-time clock
        "echo_ns" / Int64ub,  # newest stamp received from the peer
        "numbered" / Int64ub,
        "validated" / Int64ub,
        "applied" / Int64ub,
        "credit" / Int64ub,  # P: frame bytes that it waits for credit for
        "pair" / Int8ub,  # I: Pair of the group
    ),
    Message.ACK: Struct(
        "incarnation" / Int64ub,  # of the primary whose batches are meant: those of each process count from 1
        "batch" / Int64ub,  # every batch up to it is durable
        "number" / Int64ub,  # the last number of that batch
        "validated" / Int64ub,
        "credit" / Int64ub,
    ),
    Message.CHECKPOINT: Struct("number" / Int64ub),
    Message.REPLAY: Struct("after" / Int64ub),
    Message.REPLAYED: Struct("through" / Int64ub),
    Message.PREPARE: Struct("number" / Int64ub, "stream_last" / Int64ub),
    Message.PREPARED: Struct(
        "epoch_number"
        / Int64ub,  # in which it was noted: an older one speaks of records that a takeover may have discarded
        "number" / Int64ub,
        "applied" / Int64ub,
        "credit" / Int64ub,
    ),
    Message.VALIDATE: Struct("number" / Int64ub),
    Message.DIGESTED: Struct(
        "number" / Int64ub,  # last number of the digest record
        "sender" / Int16ub,
        "volume" / Int16ub,
        "offset_bytes" / Int64ub,
        "length_bytes" / Int64ub,
        "blocks" / Int32ub,
        "different" / PrefixedArray(Int32ub, Int64ub),  # offsets of blocks that differ
        "here" / PrefixedArray(Int32ub, Int64ub),  # I → P: that differ in the intermediate volume only
    ),
    Message.SUSPEND: Struct("pair" / Int8ub, "number" / Int64ub),  # why; the last number given
    Message.RESYNC: Struct(
        "id" / Int64ub,  # the number of its START
        "verify" / Flag,  # trust no bitmap: compare digests, copy what differs
        "rate_bytes" / Int64ub,  # per second and primary; 0 for unlimited
        "forget" / Flag,  # both ends are the same already: P drops its own bits, nothing is copied
    ),
    Message.BITMAP: Struct(
        "volume" / Int16ub,
        "block_bytes" / Int32ub,
        "first_block" / Int64ub,  # a multiple of 8
        "bits" / Prefixed(Int16ub, GreedyBytes),  # bit i of byte k: block first_block + 8 k + i
    ),
    Message.COPIED: Struct("id" / Int64ub),
    Message.RESYNCED: Struct("id" / Int64ub),
    Message.CONFIG: Struct("digest" / Int64ub, "number" / Int64ub),
    Message.SPLIT: Struct("number" / Int64ub, "writable" / Flag),
    Message.REJOIN: Struct("number" / Int64ub),  # where the resync to come would go back to
    Message.REJOINED: Struct("number" / Int64ub),
    Message.PROMISE: Struct(
        "epoch" / epoch_id,
        "dry_run" / Flag,
        "reform" / Flag,  # for a swap or a replacement, not for a takeover: who is active promises too
        "marker" / PascalString(Int8ub, "utf8"),  # a takeover that is to stop there; "" for none
    ),
    Message.PROMISED: Struct(
        "epoch" / epoch_id,  # the epoch promised
        "stored" / epoch_id,
        "held" / Int64ub,  # I: numbered, all of it drained. S: it holds everything of its own up to here, durably
        "validated" / Int64ub,
        "applied" / Int64ub,
        "active" / Flag,
        "number" / Int64ub,  # where the stored epoch began
        "members" / PrefixedArray(Int8ub, Int16ub),
        "numbered" / Int64ub,  # S: the highest number it heard the intermediate give; for a report of what is lost
        "direction" / Int8ub,
        "pair" / Int8ub,
        "copying" / Flag,  # between START and END: not at a number of its own
        "copy_from" / Int64ub,  # a takeover would go back to it
        "initial" / Flag,  # an initial copy: there is nothing to go back to
        "end" / Int64ub,  # number of the END that it holds durably, for the copy under way; 0 for none
        "trusted" / Flag,  # its bitmaps say all
        "alone" / Flag,  # a source: it has completed writes that were never numbered. I: one may have
        "marker" / Int64ub,  # the number of the marker asked for, if it is known here; 0: it is not
        "dirty_bytes" / Int64ub,  # written here and not at the other site, in blocks
    ),
    Message.STORE: Struct(
        "promise" / epoch_id,  # the authority: must be the receiver's promised epoch
        "epoch" / epoch_id,
        "number" / Int64ub,  # the last number of the history before this epoch
        "truncate" / Flag,  # discard what is held beyond it (takeover); else keep (the intermediate goes on)
        "members" / PrefixedArray(Int8ub, Int16ub),
        "dry_run" / Flag,  # store nothing, only say what would be discarded
        "reform" / Flag,  # forget the journal: the group begins anew above ``number``, suspended
        "direction" / Int8ub,
        "source" / Flag,  # reform: the receiver's volumes are the truth; else it becomes a target
        "initial" / Flag,  # reform: the targets are at no number until a copy has ended
        "full" / PrefixedArray(Int16ub, Int16ub),  # reform, to I: volumes to be copied whole
        "verify" / Flag,  # reform, to I: no bitmap can be trusted
    ),
    Message.STORED: Struct(
        "epoch" / epoch_id,
        "applied" / Int64ub,
        "discarded_writes" / Int64ub,
        "discarded_bytes" / Int64ub,  # payload
        "kept_ns" / Int64ub,  # when the last record kept was numbered; 0 for unknown
        "newest_ns" / Int64ub,  # … and the newest one discarded
        "whole" / Flag,  # nothing beyond the number is missing in what was counted
    ),
    Message.ACTIVATE: Struct("epoch" / epoch_id, "writable" / Flag),
    Message.ACTIVATED: Struct("epoch" / epoch_id),
}
# What a message says when its sender has nothing else to say.
DEFAULTS: dict[int, dict[str, Any]] = {
    Message.HELLO: {"suspended": False, "trusted": True, "direction": 0},
    Message.WELCOME: {
        "direction": 0, "pair": Pair.PAIR, "numbering": True, "resync": 0, "resynced": 0, "copying": False,
        "copy_from": 0, "split": False, "rolling": False, "recovered": True,
    },
    Message.HEARTBEAT: {"pair": Pair.PAIR},
    Message.DIGESTED: {"here": []},
    Message.RESYNC: {"verify": False, "rate_bytes": 0, "forget": False},
    Message.PROMISE: {"reform": False, "marker": ""},
    Message.PROMISED: {
        "direction": 0, "pair": Pair.PAIR, "copying": False, "copy_from": 0, "initial": False, "end": 0,
        "trusted": True, "alone": False, "marker": 0, "dirty_bytes": 0,
    },
    Message.STORED: {"kept_ns": 0, "newest_ns": 0, "whole": False},
    Message.STORE: {
        "reform": False, "direction": 0, "source": False, "initial": False, "full": [], "verify": False,
    },
}  # fmt: skip
BODIES: dict[int, Construct] = {kind: Struct(*body.subcons, Terminated) for kind, body in _bodies.items()}


class Epoch(NamedTuple):
    """An epoch: its number, and the random id that tells two openings of one number apart (PROTOCOL, rule 22)."""

    number: int
    id: bytes

    def __str__(self) -> str:
        return f"{self.number} ({self.id.hex()[:8]})"


NO_EPOCH = Epoch(0, bytes(16))

# The messages of the hot path, packed by hand; a test proves them equal to the declarations above.
_FIVE = struct.Struct(">QQQQQ")
_FOUR = struct.Struct(">QQQQ")
_TWO = struct.Struct(">QQ")
_ONE = struct.Struct(">Q")
_CRC = struct.Struct(">I")
HOT: dict[int, tuple[struct.Struct, tuple[str, ...]]] = {
    Message.ACK: (_FIVE, ("incarnation", "batch", "number", "validated", "credit")),
    Message.PREPARE: (_TWO, ("number", "stream_last")),
    Message.PREPARED: (_FOUR, ("epoch_number", "number", "applied", "credit")),
    Message.VALIDATE: (_ONE, ("number",)),
}
_CRC_AT = HEADER_BYTES - 4


class Head(NamedTuple):
    """A decoded message header."""

    type: int
    length_bytes: int
    epoch: int
    crc: int


def bulk_header(kind: Message, epoch: int, length_bytes: int) -> bytes:
    """The header of a BATCH or RECORD whose record of ``length_bytes`` follows."""
    head = HEADER.pack(LINK_MAGIC, kind, VERSION_MAX, 0, length_bytes, epoch, 0)
    return head[:_CRC_AT] + _CRC.pack(crc32c(head[:_CRC_AT]))


def encode(kind: Message, epoch_number: int, /, **fields: Any) -> bytes:
    """A whole control message. Fields that are not given are as in `DEFAULTS`."""
    hot = HOT.get(kind)
    if hot:
        body = hot[0].pack(*[fields[name] for name in hot[1]])
    else:
        body = BODIES[kind].build(_plain({**DEFAULTS.get(kind, {}), **fields}))
    head = HEADER.pack(LINK_MAGIC, kind, VERSION_MAX, 0, len(body), epoch_number, 0)[:_CRC_AT]
    return b"".join((head, _CRC.pack(crc32c(body, crc32c(head))), body))


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value._asdict() if isinstance(value, Epoch) else value for name, value in fields.items()}


def decode_header(view: memoryview) -> Head:
    """Check and decode the 24 bytes at the start of ``view``. Raises ProtocolError before anything is allocated."""
    magic, kind, version, _, length, epoch, crc = HEADER.unpack_from(view)
    if magic != LINK_MAGIC:
        raise ProtocolError(f"not a replication link: magic {magic:#x}")
    if not VERSION_MIN <= version <= VERSION_MAX:
        raise ProtocolError(f"link version {version}; this end speaks {VERSION_MIN} to {VERSION_MAX}")
    if kind in BULK:
        if not RECORD_HEADER_BYTES < length <= MAX_RECORD_BYTES:
            raise ProtocolError(f"record of {length} bytes; at most {MAX_RECORD_BYTES}")
        if crc32c(view[:_CRC_AT]) != crc:
            raise ProtocolError("message header: wrong checksum")
    elif kind not in BODIES:
        raise ProtocolError(f"unknown message type {kind}")
    elif length > MAX_CONTROL_BYTES:
        raise ProtocolError(f"{Message(kind).name} of {length} bytes; at most {MAX_CONTROL_BYTES}")
    return Head(kind, length, epoch, crc)


def decode_body(head: Head, view: memoryview) -> dict[str, Any]:
    """The fields of the control message in ``view`` (header and body). Raises ProtocolError."""
    body = view[HEADER_BYTES : HEADER_BYTES + head.length_bytes]
    if crc32c(body, crc32c(view[:_CRC_AT])) != head.crc:
        raise ProtocolError(f"{Message(head.type).name}: wrong checksum")
    hot = HOT.get(head.type)
    if hot:
        if len(body) != hot[0].size:
            raise ProtocolError(f"{Message(head.type).name} of {len(body)} bytes")
        return dict(zip(hot[1], hot[0].unpack(body), strict=True))
    try:
        parsed = BODIES[head.type].parse(bytes(body))
    except (ConstructError, UnicodeDecodeError) as error:
        raise ProtocolError(f"{Message(head.type).name}: {str(error).splitlines()[-1]}") from error
    return {name: _value(value) for name, value in parsed.items() if not name.startswith("_")}


def _value(value: Any) -> Any:
    if hasattr(value, "items"):
        if set(value) - {"_io"} == {"number", "id"}:
            return Epoch(value["number"], value["id"])
        return {name: item for name, item in value.items() if name != "_io"}
    if isinstance(value, list):
        return [_value(item) for item in value]
    return value
