"""Link messages: round trips, hot messages packed by hand equal their declarations, bad bytes are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.errors import ProtocolError
from blockrepl.formats import link
from blockrepl.formats.link import (
    BODIES,
    BULK,
    HEADER_BYTES,
    HOT,
    MAX_CONTROL_BYTES,
    MAX_RECORD_BYTES,
    NO_EPOCH,
    Epoch,
    Message,
    bulk_header,
    decode_body,
    decode_header,
    encode,
)

number = st.integers(0, (1 << 64) - 1)
epochs = st.builds(Epoch, number, st.binary(min_size=16, max_size=16))
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "version_min": st.integers(0, 255), "version_max": st.integers(0, 255), "version": st.integers(0, 255),
    "role": st.integers(0, 255), "features": number, "group": st.binary(min_size=16, max_size=16),
    "node": st.integers(0, 65535), "peer": st.integers(0, 65535), "incarnation": st.integers(0, (1 << 32) - 1),
    "nonce": st.binary(min_size=16, max_size=16), "epoch": epochs, "promised": epochs, "stored": epochs,
    "promise": epochs, "fresh": st.booleans(), "name": st.text(max_size=40), "active": st.booleans(),
    "code": st.integers(0, 65535), "text": st.text(max_size=200), "sender": st.integers(0, 65535),
    "volume": st.integers(0, 65535), "blocks": st.integers(0, 1 << 20), "dry_run": st.booleans(),
    "marker": st.text(max_size=40), "different": st.lists(number, max_size=9), "here": st.lists(number, max_size=9),
    "members": st.lists(st.integers(0, 65535), max_size=9),
    "truncate": st.booleans(), "writable": st.booleans(), "suspended": st.booleans(), "trusted": st.booleans(),
    "direction": st.integers(0, 255), "pair": st.integers(0, 255), "numbering": st.booleans(),
    "copying": st.booleans(), "split": st.booleans(), "rolling": st.booleans(), "verify": st.booleans(),
    "reform": st.booleans(),
    "initial": st.booleans(), "source": st.booleans(), "full": st.lists(st.integers(0, 65535), max_size=9),
    "forget": st.booleans(), "whole": st.booleans(), "recovered": st.booleans(), "alone": st.booleans(),
    "bits": st.binary(max_size=99), "block_bytes": st.integers(0, (1 << 32) - 1),
}  # fmt: skip


def fields_of(kind: Message) -> st.SearchStrategy[dict[str, Any]]:
    names = [each.name for each in BODIES[kind].subcons if each.name]
    own = {"marker": number} if kind == Message.PROMISED else {}  # its number, not its name
    return st.fixed_dictionaries({name: {**FIELDS, **own}.get(name, number) for name in names})


@given(st.sampled_from(sorted(BODIES)).flatmap(lambda kind: st.tuples(st.just(kind), fields_of(Message(kind)))), number)
def test_every_message_comes_out_as_it_went_in(message: tuple[int, dict[str, Any]], epoch: int) -> None:
    kind, fields = message
    data = memoryview(encode(Message(kind), epoch, **fields))
    head = decode_header(data)
    assert (head.type, head.epoch, head.length_bytes) == (kind, epoch, len(data) - HEADER_BYTES)
    assert decode_body(head, data) == fields


@pytest.mark.parametrize("kind", sorted(HOT))
def test_hand_packed_messages_are_the_declared_ones(kind: int) -> None:
    packed, names = HOT[kind]
    values = range(1, 1 + len(names))
    assert packed.pack(*values) == BODIES[kind].build(dict(zip(names, values, strict=True)))


def test_every_type_is_declared_or_bulk() -> None:
    assert set(Message) == set(BODIES) | BULK


def test_the_header_is_the_declared_one() -> None:
    data = encode(Message.VALIDATE, 9, number=5)
    parsed = link.link_header.parse(data[:HEADER_BYTES])
    assert (parsed.type, parsed.length_bytes, parsed.epoch) == (Message.VALIDATE, 8, 9)
    parsed = link.link_header.parse(bulk_header(Message.RECORD, 3, 4321))
    assert (parsed.type, parsed.length_bytes, parsed.epoch) == (Message.RECORD, 4321, 3)


@given(st.integers(0, 8 * 60 - 1))
def test_any_flipped_bit_is_noticed(bit: int) -> None:
    data = bytearray(encode(Message.ACK, 4, incarnation=1, batch=1, number=2, validated=3, credit=4))
    bit %= len(data) * 8
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        decode_body(decode_header(memoryview(data)), memoryview(data))


@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_in_the_header_of_a_record_is_noticed(bit: int) -> None:
    data = bytearray(bulk_header(Message.BATCH, 4, 5000))
    data[bit // 8] ^= 1 << bit % 8
    try:
        head = decode_header(memoryview(data))
    except ProtocolError:
        return
    with pytest.raises(ProtocolError):  # the type became a control message's: then its body's checksum speaks
        decode_body(head, memoryview(data + bytes(5000)))


@pytest.mark.parametrize(
    ("kind", "length"),
    [(Message.BATCH, MAX_RECORD_BYTES + 1), (Message.RECORD, 1 << 31), (Message.BATCH, 128), (Message.BATCH, 0)],
)
def test_the_length_of_a_record_is_bounded_before_anything_is_allocated(kind: Message, length: int) -> None:
    with pytest.raises(ProtocolError, match="record of"):
        decode_header(memoryview(bulk_header(kind, 1, length)))


def test_the_length_of_a_control_message_is_bounded() -> None:
    data = bytearray(encode(Message.VALIDATE, 1, number=1))
    data[8:12] = (MAX_CONTROL_BYTES + 1).to_bytes(4, "big")
    with pytest.raises(ProtocolError, match="VALIDATE of"):
        decode_header(memoryview(data))


@pytest.mark.parametrize(
    ("at", "value", "words"), [(0, 0, "not a replication link"), (4, 99, "type 99"), (5, 9, "version 9")]
)
def test_a_wrong_magic_type_or_version_is_refused_in_words(at: int, value: int, words: str) -> None:
    data = bytearray(encode(Message.VALIDATE, 1, number=1))
    data[at] = value
    with pytest.raises(ProtocolError, match=words):
        decode_header(memoryview(data))


@given(st.sampled_from(sorted(BODIES)), st.binary(max_size=300))
def test_garbage_with_a_right_checksum_is_refused_or_well_formed(kind: int, body: bytes) -> None:
    from crc32c import crc32c

    head = link.HEADER.pack(link.LINK_MAGIC, kind, 1, 0, len(body), 1, 0)[:20]
    data = memoryview(head + crc32c(body, crc32c(head)).to_bytes(4, "big") + body)
    try:
        fields = decode_body(decode_header(data), data)
    except ProtocolError:
        return
    assert fields.keys() == {each.name for each in BODIES[kind].subcons if each.name}


def test_epochs_say_number_and_id() -> None:
    assert str(Epoch(3, bytes.fromhex("0123456789abcdef") * 2)) == "3 (01234567)"
    assert max(NO_EPOCH, Epoch(1, bytes(16))).number == 1
