"""The batch record: round trips, what is checked, and that nothing of it changes between primary and secondary."""

from __future__ import annotations

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.block import Op
from blockrepl.errors import DamagedError, ProtocolError
from blockrepl.formats import record as layout
from blockrepl.formats.journal import frame_bytes
from blockrepl.formats.record import (
    ENTRY_BYTES,
    HEADER_BYTES,
    OP_DIGEST,
    RecordKind,
    check_record,
    decode_batch,
    decode_record,
    encode_record,
    iterate_entries,
    number_record,
    peek,
    peek_head,
)

GROUP = bytes(range(16))
Command = tuple[int, int, int, bytes | None]  # op, flags, offset, payload


def batch_of(commands: list[Command], volume: int = 3) -> bytearray:
    payloads = [payload for _, _, _, payload in commands]
    head, size = encode_record(
        RecordKind.UPDATE, GROUP, 1, 4, 2, 9, volume,
        [op for op, _, _, _ in commands],
        [flags for _, flags, _, _ in commands],
        [offset for _, _, offset, _ in commands],
        [8192 if payload is None else len(payload) for payload in payloads],
        payloads,
        sum(len(payload) for payload in payloads if payload is not None),
    )  # fmt: skip
    whole = head + b"".join(payload for payload in payloads if payload is not None)
    assert len(whole) == size
    return whole


def numbered(commands: list[Command]) -> bytearray:
    whole = batch_of(commands)
    number_record(memoryview(whole), 0, 7, 101, 88, 1234567)
    return whole


WRITES: list[Command] = [
    (Op.WRITE, 1, 4096, b"a" * 4096),
    (Op.ZERO, 2, 0, None),
    (Op.TRIM, 0, 1 << 40, None),
    (Op.WRITE, 0, 512, b"b" * 512),
]
commands = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from([int(Op.WRITE), int(Op.METADATA)]),
            st.integers(0, 3),
            st.integers(0, 1 << 62),
            st.binary(min_size=1, max_size=99),
        ),
        st.tuples(st.sampled_from([int(Op.ZERO), int(Op.TRIM)]), st.integers(0, 3), st.integers(0, 1 << 62), st.none()),
    ),
    min_size=1,
    max_size=20,
)


def test_the_hand_packed_header_is_the_declared_one() -> None:
    whole = numbered(WRITES)
    parsed = layout.record_header.parse(bytes(whole[:HEADER_BYTES]))
    head = decode_record(memoryview(whole))
    for name in ("kind", "flags", "group", "sender", "stream", "incarnation", "batch", "count", "body_bytes",
                 "body_crc", "epoch", "first", "previous", "time_ns", "header_crc"):  # fmt: skip
        assert getattr(head, name) == parsed[name], name
    assert layout.record_header.build(parsed) == bytes(whole[:HEADER_BYTES])
    entry = layout.record_entry.parse(bytes(whole[HEADER_BYTES : HEADER_BYTES + ENTRY_BYTES]))
    assert (entry.volume, entry.op, entry.flags, entry.offset_bytes, entry.length_bytes) == (3, Op.WRITE, 1, 4096, 4096)


@given(commands)
def test_what_goes_in_comes_out(given_commands: list[Command]) -> None:
    whole = numbered(given_commands)
    head = decode_record(memoryview(whole))
    assert (head.first, head.last, head.previous, head.epoch) == (101, 100 + len(given_commands), 88, 7)
    entries = [
        (op, flags, offset, None if payload is None else bytes(payload))
        for _, op, flags, offset, _, payload in iterate_entries(head, memoryview(whole))
    ]
    assert entries == given_commands
    assert peek_head(memoryview(whole)[:HEADER_BYTES]) == head
    assert peek(bytes(whole[:HEADER_BYTES])) == (head.kind, head.count * ENTRY_BYTES)


@given(commands)
def test_numbering_changes_only_the_intermediates_part(given_commands: list[Command]) -> None:
    before, after = batch_of(given_commands), numbered(given_commands)
    assert before[:64] == after[:64]
    assert before[HEADER_BYTES:] == after[HEADER_BYTES:]


@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_in_the_header_is_noticed(bit: int) -> None:
    whole = numbered(WRITES)
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        decode_record(memoryview(whole))
    with pytest.raises(DamagedError):
        check_record(memoryview(whole))


@given(st.integers(HEADER_BYTES * 8, (HEADER_BYTES + 4 * ENTRY_BYTES + 4608) * 8 - 1))
def test_any_flipped_bit_in_the_body_is_noticed(bit: int) -> None:
    whole = numbered(WRITES)
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError, match="body"):
        decode_record(memoryview(whole))


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 23])
def test_a_record_cut_short_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError):
        decode_record(memoryview(numbered(WRITES))[:size])


def test_a_batch_that_carries_numbers_already_is_refused() -> None:
    """A primary gives none; a record of an older life must not be taken for a batch."""
    with pytest.raises(ProtocolError, match="numbers already"):
        decode_batch(memoryview(numbered(WRITES)))
    assert decode_batch(memoryview(batch_of(WRITES))).first == 0


def test_a_record_without_a_number_is_refused() -> None:
    whole = batch_of(WRITES)
    number_record(memoryview(whole), 0, 7, 0, 0, 0)
    with pytest.raises(ProtocolError, match="previous"):
        decode_record(memoryview(whole))


def resealed(whole: bytearray) -> memoryview:
    """A primary's checksum over whatever the body now says."""
    crc = crc32c(bytes(whole[HEADER_BYTES:]), crc32c(bytes(whole[:60])))
    whole[60:64] = crc.to_bytes(4, "big")
    return memoryview(whole)


def test_an_entry_with_an_unknown_operation_is_refused_though_its_checksum_is_right() -> None:
    whole = batch_of(WRITES)
    whole[HEADER_BYTES + 2] = 77
    with pytest.raises(ProtocolError, match="unknown operation 77"):
        decode_batch(resealed(whole))


def test_entries_that_want_more_payload_than_there_is_are_refused() -> None:
    whole = batch_of([(Op.WRITE, 0, 0, b"x" * 512)])
    whole[HEADER_BYTES + 16 : HEADER_BYTES + 24] = (1 << 40).to_bytes(8, "big")
    with pytest.raises(ProtocolError, match="payload"):
        decode_batch(resealed(whole))


@pytest.mark.parametrize(("at", "value"), [(40, 0), (40, 1 << 31), (44, 1 << 30), (44, 3)])
def test_counts_and_sizes_that_do_not_fit_the_record_are_refused(at: int, value: int) -> None:
    whole = batch_of(WRITES)
    whole[at : at + 4] = value.to_bytes(4, "big")
    with pytest.raises(ProtocolError, match="claims"):
        decode_batch(memoryview(whole))


def test_digest_entries_carry_a_digest_each_whatever_length_they_cover() -> None:
    digests = b"".join(bytes([n]) * 16 for n in range(3))
    head, size = encode_record(
        RecordKind.DIGEST, GROUP, 1, 4, 2, 9, 3, [OP_DIGEST] * 3, [0] * 3, [0, 65536, 131072], [65536, 65536, 4096],
        [digests], len(digests),
    )  # fmt: skip
    whole = memoryview(head + digests)
    assert len(whole) == size
    entries = list(iterate_entries(decode_batch(whole), whole))
    assert [bytes(entry[5] or b"") for entry in entries] == [bytes([n]) * 16 for n in range(3)]
    assert [entry[4] for entry in entries] == [65536, 65536, 4096]


@given(st.integers(1, 1 << 26))
def test_a_frame_is_the_record_its_header_and_padding(record_bytes: int) -> None:
    size = frame_bytes(record_bytes)
    assert size % 4096 == 0
    assert 64 + record_bytes <= size < 64 + record_bytes + 4096


def test_a_frame_is_as_large_for_credit_as_it_is_in_the_ring() -> None:
    from blockrepl.formats.journal import frame_bytes as ring_frame_bytes

    for size in (1, 4031, 4032, 4033, 132000):
        assert frame_bytes(size) == ring_frame_bytes(size)


def test_what_is_peeked_at_is_what_is_decoded() -> None:
    from blockrepl.formats.record import ENTRY_BYTES, peek, peek_size

    head, size = encode_record(
        RecordKind.UPDATE, bytes(16), 1, 2, 3, 77, 5, [Op.WRITE, Op.ZERO, Op.WRITE], [0] * 3, [0, 512, 4096],
        [512, 512, 512], [bytes(512), None, bytes(512)], 1024,
    )  # fmt: skip
    assert peek(bytes(head)) == (RecordKind.UPDATE, 3 * ENTRY_BYTES)
    assert peek_size(bytes(head)) == size
