"""The decoder of transmission without a socket."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.block import Op, WriteBatch, WriteFlag
from blockrepl.chunks import Chunk
from blockrepl.errors import BlockError
from blockrepl.formats import nbd
from blockrepl.formats.nbd import MAX_PAYLOAD_BYTES, Command, CommandFlag, NbdError
from blockrepl.frontends.nbd.protocol import Transmission, batch_replies, nbd_error
from tests.frontends.nbd.client import request, write
from tests.frontends.nbd.test_handshake import Fixed

SIZE = 1 << 20


def transmission(*, writable: bool = True) -> Transmission:
    return Transmission(Fixed(SIZE, writable=writable), lambda _: None)


Decoded = tuple[
    list[tuple[int, int, int, int, int, bytes | None]], list[tuple[int, int, int]], list[int], bytes, str, bool
]


def decoded(data: bytes, cuts: list[int] | None = None, *, writable: bool = True) -> Decoded:
    """What ``data`` amounts to when it comes cut at ``cuts``: writes, reads, flushes, refusals, violation, ended."""
    requests = transmission(writable=writable)
    chunk = Chunk(max(len(data), 1), None)
    chunk.view[: len(data)] = data
    writes: list[tuple[int, int, int, int, int, bytes | None]] = []
    start = 0
    for end in [*sorted(cut % (len(data) + 1) for cut in cuts or []), len(data)]:
        if requests.ended or end <= start:
            continue
        consumed, need = requests.decode(chunk, start, end)
        start += consumed
        assert need == 0 or need > end - start
        batch, requests.batch = requests.batch, None
        if batch is not None:
            assert batch.size_bytes == sum(len(p) for p in batch.payloads if p is not None)
            assert batch.fua == any(flag & WriteFlag.FUA for flag in batch.flags)
            writes += [
                (op, offset, length, flag, cookie, None if payload is None else bytes(payload))
                for op, offset, length, flag, cookie, payload in zip(
                    batch.ops, batch.offsets, batch.lengths, batch.flags, batch.cookies, batch.payloads, strict=True
                )
            ]
            batch.release()
    assert chunk.users == 1
    return writes, requests.reads, requests.flushes, b"".join(requests.refused), requests.violation, requests.ended


def refusal(cookie: int, error: int) -> bytes:
    reply: bytes = nbd.simple_reply.build({"error": error, "cookie": cookie})
    return reply


def test_a_chunk_of_commands_becomes_columns() -> None:
    data = (
        write(1, 0, b"a" * 512)
        + request(Command.READ, 2, 512, 1024)
        + request(Command.WRITE_ZEROES, 3, 1024, 512, flags=CommandFlag.NO_HOLE)
        + request(Command.TRIM, 4, 2048, 512)
        + write(5, 4096, b"b" * 1024, flags=CommandFlag.FUA)
        + request(Command.FLUSH, 6, 0, 0)
        + write(7, 512, b"c" * 512)
    )
    writes, reads, flushes, refused, violation, ended = decoded(data)
    assert writes == [
        (Op.WRITE, 0, 512, 0, 1, b"a" * 512),
        (Op.ZERO, 1024, 512, WriteFlag.NO_HOLE, 3, None),
        (Op.TRIM, 2048, 512, 0, 4, None),
        (Op.WRITE, 4096, 1024, WriteFlag.FUA, 5, b"b" * 1024),
        (Op.WRITE, 512, 512, 0, 7, b"c" * 512),
    ]
    assert reads == [(2, 512, 1024)]
    assert flushes == [6]
    assert (refused, violation, ended) == (b"", "", False)


BAD = [
    (request(Command.READ, 9, SIZE, 512), NbdError.EINVAL),
    (request(Command.READ, 9, SIZE - 512, 1024), NbdError.EINVAL),
    (request(Command.READ, 9, 2**64 - 512, 512), NbdError.EINVAL),
    (request(Command.READ, 9, 0, 0), NbdError.EINVAL),
    (request(Command.READ, 9, 1, 512), NbdError.EINVAL),
    (request(Command.READ, 9, 0, 513), NbdError.EINVAL),
    (request(Command.READ, 9, 0, 512, flags=CommandFlag.DF), NbdError.EINVAL),
    (write(9, SIZE, b"x" * 512), NbdError.ENOSPC),
    (write(9, SIZE - 512, b"x" * 1024), NbdError.ENOSPC),
    (write(9, 0, b""), NbdError.EINVAL),
    (write(9, 256, b"x" * 512), NbdError.EINVAL),
    (write(9, 0, b"x" * 512, flags=CommandFlag.NO_HOLE), NbdError.EINVAL),
    (request(Command.TRIM, 9, SIZE, 512), NbdError.EINVAL),
    (request(Command.TRIM, 9, 0, 0), NbdError.EINVAL),
    (request(Command.WRITE_ZEROES, 9, SIZE, 512), NbdError.ENOSPC),
    (request(Command.WRITE_ZEROES, 9, 0, 512, flags=CommandFlag.FAST_ZERO), NbdError.EINVAL),
    (request(Command.FLUSH, 9, 0, 512), NbdError.EINVAL),
    (request(Command.CACHE, 9, 0, 512), NbdError.EINVAL),
    (request(Command.BLOCK_STATUS, 9, 0, 512), NbdError.EINVAL),
    (request(65535, 9, 0, 512), NbdError.EINVAL),
]


@pytest.mark.parametrize(("message", "error"), BAD)
def test_a_bad_request_is_answered_and_the_next_one_served(message: bytes, error: int) -> None:
    writes, reads, _, refused, violation, ended = decoded(message + request(Command.READ, 10, 0, 512))
    assert writes == []
    assert reads == [(10, 0, 512)]
    assert refused == refusal(9, error)
    assert (violation, ended) == ("", False)


@pytest.mark.parametrize(
    "message",
    [
        write(9, 0, b"x" * 512),
        write(9, SIZE, b"x" * 512),
        request(Command.TRIM, 9, 0, 512),
        request(Command.WRITE_ZEROES, 9, 0, 512),
    ],
)
def test_a_read_only_export_refuses_to_be_changed(message: bytes) -> None:
    writes, reads, _, refused, _, ended = decoded(message + request(Command.READ, 10, 0, 512), writable=False)
    assert (writes, reads, ended) == ([], [(10, 0, 512)], False)
    assert refused == refusal(9, NbdError.EPERM)


def test_the_longest_read_is_taken_and_one_block_more_is_not() -> None:
    requests = Transmission(Fixed(1 << 40), lambda _: None)
    data = request(Command.READ, 1, 0, MAX_PAYLOAD_BYTES) + request(Command.READ, 2, 0, MAX_PAYLOAD_BYTES + 512)
    data += request(Command.TRIM, 3, 0, 2**32 - 512)
    chunk = Chunk(len(data), None)
    chunk.view[:] = data
    assert requests.decode(chunk, 0, len(data)) == (len(data), 0)
    assert requests.reads == [(1, 0, MAX_PAYLOAD_BYTES)]
    assert requests.refused == [refusal(2, NbdError.EINVAL)]
    assert requests.batch is not None
    assert requests.batch.lengths == [2**32 - 512]


@pytest.mark.parametrize(
    "message",
    [b"\x25\x60\x95\x12" + request(Command.READ, 1, 0, 512)[4:], request(Command.WRITE, 1, 0, MAX_PAYLOAD_BYTES + 1)],
)
def test_a_wrong_magic_or_a_monstrous_write_ends_the_session(message: bytes) -> None:
    before = write(1, 0, b"x" * 512)
    writes, reads, _, _, violation, ended = decoded(before + message + request(Command.READ, 10, 0, 512))
    assert len(writes) == 1
    assert reads == []
    assert violation
    assert ended


def test_nothing_is_read_after_a_disconnect_request() -> None:
    data = write(1, 0, b"x" * 512) + request(Command.DISC, 2, 0, 0) + request(Command.READ, 10, 0, 512)
    writes, reads, _, refused, violation, ended = decoded(data)
    assert len(writes) == 1
    assert (reads, refused, violation, ended) == ([], b"", "", True)


COMMANDS = st.one_of(
    st.builds(
        write,
        st.integers(0, 2**64 - 1),
        st.sampled_from((0, 512, 1000, SIZE)),
        st.binary(max_size=3).map(lambda b: b * 512),
    ),
    st.builds(
        request,
        st.sampled_from((0, 3, 4, 5, 6, 7, 99)),
        st.integers(0, 2**64 - 1),
        st.sampled_from((0, 512, SIZE)),
        st.sampled_from((0, 512, 4096)),
        flags=st.integers(0, 31),
    ),
)


@given(
    st.lists(COMMANDS, max_size=12), st.lists(st.integers(0, 10**6), max_size=20), st.booleans(), st.binary(max_size=50)
)
def test_the_commands_are_the_same_however_the_bytes_are_cut(
    commands: list[bytes], cuts: list[int], writable: bool, tail: bytes
) -> None:
    data = b"".join(commands) + tail
    assert decoded(data, cuts, writable=writable) == decoded(data, writable=writable)


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5))
def test_garbage_raises_nothing(data: bytes, cuts: list[int]) -> None:
    violation, ended = decoded(data, cuts)[4:]
    if len(data) >= 28 and data[:4] != b"\x25\x60\x95\x13":
        assert violation
        assert ended


def test_replies_tell_each_command_of_a_batch_its_own_fate() -> None:
    batch = WriteBatch(lambda _: None)
    batch.cookies = [1, 2, 3, 4]
    batch.errors = [None, BlockError(errno.ENOSPC), BlockError(errno.EIO), BlockError(errno.ENODEV)]
    assert batch_replies(batch) == refusal(1, 0) + refusal(2, 28) + refusal(3, 5) + refusal(4, 5)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.EROFS, 1),
        (errno.EACCES, 1),
        (errno.ESHUTDOWN, 108),
        (errno.ETIMEDOUT, 5),
    ],
)
def test_errnos_become_the_words_the_protocol_has(code: int, expected: int) -> None:
    assert nbd_error(BlockError(code)) == expected


def test_a_write_larger_than_the_volume_takes_is_refused_and_the_next_one_served() -> None:
    volume = Fixed(SIZE)
    volume.max_write_bytes = 4096
    requests = Transmission(volume, lambda _: None)
    data = write(9, 0, b"x" * 4608) + write(10, 0, b"y" * 4096)
    chunk = Chunk(len(data), None)
    chunk.view[:] = data
    assert requests.decode(chunk, 0, len(data)) == (len(data), 0)
    assert b"".join(requests.refused) == refusal(9, NbdError.EINVAL)
    assert requests.batch is not None
    assert requests.batch.cookies == [10]
