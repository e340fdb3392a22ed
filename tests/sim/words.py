"""What a message on a link says, in words; for transcripts and stories."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from blockrepl.block import Op
from blockrepl.formats.link import (
    DEFAULTS,
    HEADER_BYTES,
    Epoch,
    LinkRole,
    Message,
    Pair,
    Refusal,
    decode_body,
    decode_header,
)
from blockrepl.formats.record import OP_DIGEST, RecordFlag, RecordKind, decode_batch, decode_record, iterate_entries

# What says nothing about the conversation: sizes, what is the same in every message, what is drawn.
DULL = {"version", "version_min", "version_max", "features", "group", "nonce", "credit", "name", "incarnation"}


def sentences(sender: str, receiver: str, data: bytes) -> Iterator[str]:
    """One line per message in ``data``; heartbeats are left out."""
    view = memoryview(data)
    while view:
        head = decode_header(view)
        whole = view[: HEADER_BYTES + head.length_bytes]
        view = view[len(whole) :]
        if head.type != Message.HEARTBEAT:
            yield f"{sender} → {receiver}  {Message(head.type).name} {_words(head, whole)}".rstrip()


def _words(head: Any, whole: memoryview) -> str:
    if head.type == Message.BATCH:
        record = decode_batch(whole[HEADER_BYTES:])
        return f"batch {record.batch}, {_entries(record, whole)}"
    if head.type == Message.RECORD:
        record = decode_record(whole[HEADER_BYTES:])
        return f"number {record.first} after {record.previous}, epoch {record.epoch}, {_entries(record, whole)}"
    fields = decode_body(head, whole)
    usual = DEFAULTS.get(head.type, {})
    told = [name for name in fields if name not in DULL and (name not in usual or fields[name] != usual[name])]
    return ", ".join(f"{name} {_value(name, fields[name])}" for name in told)


def _entries(record: Any, whole: memoryview) -> str:
    kind = RecordKind(record.kind).name.lower()
    if record.kind in (RecordKind.START, RecordKind.END):
        return kind
    if record.flags & RecordFlag.COPY:
        kind = "copy"
    entries = iterate_entries(record, whole[HEADER_BYTES:])
    return f"{kind} of " + ", ".join(
        f"{'digest' if op == OP_DIGEST else Op(op).name.lower()} {length} bytes at {offset} of volume {volume}"
        for volume, op, _, offset, length, _ in entries
    )


def _value(name: str, value: Any) -> str:
    if isinstance(value, Epoch):
        return str(value.number)
    if name == "role":
        return LinkRole(value).name.lower()
    if name == "pair":
        return Pair(value).name
    if name == "bits":
        return bytes(value).hex()
    if name == "code":
        return Refusal(value).name
    return str(value).lower() if isinstance(value, bool) else str(value)
