"""The FUSE conversation without a kernel: bytes in, batches and replies out."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.block import Op, WriteBatch, WriteFlag
from blockrepl.errors import BlockError, ProtocolError
from blockrepl.formats import fuse
from blockrepl.frontends.loop import protocol
from blockrepl.frontends.loop.protocol import MAX_IO_BYTES, Arrived, Geometry, ReadRequest, Session

SIZE = 8 << 20
BLOCK = 4096
KERNEL_FLAGS = 0x73FFFFFB  # what Linux 6.x offers


def nothing(batch: WriteBatch) -> None:
    raise AssertionError("not called by a session")


def session(*, read_only: bool = False) -> Session:
    return Session(Geometry(SIZE, BLOCK, read_only), nothing)


def send(to: Session, opcode: int, body: bytes = b"", payload: bytes = b"", unique: int = 2, lie_bytes: int = 0) -> int:
    """One request as the kernel lays it out, cut where the server cuts it."""
    message = bytearray(fuse.HEADER_BYTES) + body + payload
    message[: fuse.HEADER_BYTES] = fuse.IN_HEADER.pack(len(message) + lie_bytes, opcode, unique, 1, 0, 0, 0, 0, 0)
    head = memoryview(bytearray(message[: fuse.IO_HEADER_BYTES].ljust(fuse.IO_HEADER_BYTES, b"\xee")))
    return to.request(head, len(message), memoryview(bytes(message[fuse.IO_HEADER_BYTES :])))


def io(offset: int, length: int) -> bytes:
    fields = {"handle": 0, "io_flags": 0, "lock_owner": 0, "flags": 0, "padding": 0}
    return bytes(fuse.fuse_io_in.build({**fields, "offset_bytes": offset, "length_bytes": length}))


def fallocate(mode: int, offset: int, length: int) -> bytes:
    fields = {"handle": 0, "mode": mode, "padding": 0}
    return bytes(fuse.fuse_fallocate_in.build({**fields, "offset_bytes": offset, "length_bytes": length}))


def init(major: int = 7, minor: int = 45, flags: int = KERNEL_FLAGS) -> bytes:
    fixed = fuse.fuse_init_in.build({"major": major, "minor": minor, "max_readahead_bytes": 1 << 17, "flags": flags})
    return bytes(fixed + bytes(48))


def only_error(arrived: Arrived) -> int:
    assert arrived.batch is None
    assert not arrived.reads
    assert not arrived.flushes
    (reply,) = arrived.replies
    length, error, unique = fuse.OUT_HEADER.unpack(reply)
    assert (length, unique) == (16, 2)
    return -int(error)


def test_init_asks_for_parallel_direct_requests_of_one_mebibyte() -> None:
    s = session()
    send(s, fuse.Opcode.INIT, init())
    (reply,) = s.take().replies
    out = fuse.fuse_init_out.parse(reply[16:])
    assert len(reply) == 16 + 64
    assert (out.major, out.minor) == (7, 31)
    assert out.max_write_bytes == MAX_IO_BYTES
    assert out.max_pages == 256
    assert out.flags & fuse.InitFlag.ASYNC_DIO
    assert out.flags & fuse.InitFlag.MAX_PAGES
    assert s.kernel_minor == 45


@pytest.mark.parametrize("body", [init(minor=27), init(major=8), init(flags=KERNEL_FLAGS & ~(1 << 15))])
def test_a_kernel_that_cannot_do_what_is_needed_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        send(session(), fuse.Opcode.INIT, body)


def test_writes_that_came_together_are_one_batch_whose_payloads_look_into_the_buffer() -> None:
    s = session()
    for index in range(3):
        assert send(s, fuse.Opcode.WRITE, io(index * BLOCK, BLOCK), bytes([index]) * BLOCK, unique=index * 2) == BLOCK
    batch = s.take().batch
    assert batch is not None
    assert batch.ops == [Op.WRITE] * 3
    assert batch.offsets == [0, BLOCK, 2 * BLOCK]
    assert batch.lengths == [BLOCK] * 3
    assert batch.cookies == [0, 2, 4]
    assert batch.size_bytes == 3 * BLOCK
    assert [bytes(view) for view in batch.payloads if view is not None] == [bytes([i]) * BLOCK for i in range(3)]
    assert s.take() == Arrived(None, [], [], [])


def test_replies_of_a_batch_carry_length_or_error_in_order() -> None:
    s = session()
    send(s, fuse.Opcode.WRITE, io(0, BLOCK), bytes(BLOCK), unique=10)
    send(s, fuse.Opcode.FALLOCATE, fallocate(3, BLOCK, BLOCK), unique=12)
    send(s, fuse.Opcode.WRITE, io(0, 2 * BLOCK), bytes(2 * BLOCK), unique=14)
    batch = s.take().batch
    assert batch is not None
    good = [fuse.WRITE_REPLY.pack(24, 0, 10, BLOCK, 0), fuse.OUT_HEADER.pack(16, 0, 12)]
    assert protocol.batch_replies(batch) == [*good, fuse.WRITE_REPLY.pack(24, 0, 14, 2 * BLOCK, 0)]
    batch.errors = [None, None, BlockError(errno.ENOSPC)]
    assert protocol.batch_replies(batch) == [*good, fuse.OUT_HEADER.pack(16, -errno.ENOSPC, 14)]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EAGAIN, errno.EINTR, 512, 100000])
def test_an_error_that_the_kernel_would_misread_becomes_eio(code: int) -> None:
    assert protocol.failure_reply(4, BlockError(code)) == fuse.OUT_HEADER.pack(16, -errno.EIO, 4)


@pytest.mark.parametrize(
    ("offset", "length", "code"),
    [
        (SIZE, BLOCK, errno.ENOSPC),
        (SIZE - BLOCK, 2 * BLOCK, errno.ENOSPC),
        (1 << 63, BLOCK, errno.ENOSPC),
        (512, BLOCK, errno.EINVAL),
        (0, 512, errno.EINVAL),
    ],
)
def test_writes_outside_of_the_volume_or_its_blocks_never_reach_it(offset: int, length: int, code: int) -> None:
    s = session()
    assert send(s, fuse.Opcode.WRITE, io(offset, length), bytes(length)) == 0
    assert only_error(s.take()) == code


def test_a_read_only_volume_refuses_every_change() -> None:
    s = session(read_only=True)
    send(s, fuse.Opcode.WRITE, io(0, BLOCK), bytes(BLOCK))
    assert only_error(s.take()) == errno.EROFS
    send(s, fuse.Opcode.FALLOCATE, fallocate(3, 0, BLOCK))
    assert only_error(s.take()) == errno.EROFS
    send(s, fuse.Opcode.OPEN, fuse.fuse_open_in.build({"flags": 2, "open_flags": 0}))
    assert only_error(s.take()) == errno.EROFS


def test_reads_are_cut_at_the_end_of_the_volume() -> None:
    s = session()
    send(s, fuse.Opcode.READ, io(SIZE - BLOCK, 4 * BLOCK))
    send(s, fuse.Opcode.READ, io(SIZE, BLOCK), unique=4)
    send(s, fuse.Opcode.READ, io(100, BLOCK), unique=6)
    arrived = s.take()
    assert arrived.reads == [ReadRequest(2, SIZE - BLOCK, BLOCK)]
    assert arrived.replies == [fuse.OUT_HEADER.pack(16, 0, 4), fuse.OUT_HEADER.pack(16, -errno.EINVAL, 6)]
    assert protocol.read_header(arrived.reads[0]) == fuse.OUT_HEADER.pack(16 + BLOCK, 0, 2)


def test_holes_are_trims_and_zero_ranges_stay_allocated() -> None:
    s = session()
    send(s, fuse.Opcode.FALLOCATE, fallocate(0x02 | 0x01, 0, BLOCK))
    send(s, fuse.Opcode.FALLOCATE, fallocate(0x10 | 0x01, BLOCK, 5 << 20))
    batch = s.take().batch
    assert batch is not None
    assert batch.ops == [Op.TRIM, Op.ZERO]
    assert batch.flags == [WriteFlag.NONE, WriteFlag.NO_HOLE]
    assert batch.lengths == [BLOCK, 5 << 20]
    assert batch.payloads == [None, None]
    assert batch.size_bytes == 0


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (fallocate(0, 0, BLOCK), errno.EOPNOTSUPP),
        (fallocate(0x10, 0, BLOCK), errno.EOPNOTSUPP),
        (fallocate(3, 0, 0), errno.EINVAL),
        (fallocate(3, 0, 2 * SIZE), errno.EINVAL),
        (fallocate(3, 12, BLOCK), errno.EINVAL),
    ],
)
def test_other_fallocates_are_refused(body: bytes, code: int) -> None:
    s = session()
    send(s, fuse.Opcode.FALLOCATE, body)
    assert only_error(s.take()) == code


def test_attributes_and_file_system_tell_size_and_block_size() -> None:
    s = session()
    send(s, fuse.Opcode.GETATTR, bytes(16))
    send(s, fuse.Opcode.STATFS)
    attributes, file_system = (reply[16:] for reply in s.take().replies)
    attr = fuse.fuse_attr_out.parse(attributes)
    assert attr.attr.size_bytes == SIZE
    assert attr.attr.mode == 0o100600
    assert fuse.fuse_statfs_out.parse(file_system).block_size_bytes == BLOCK


def test_unknown_requests_are_answered_and_forgets_are_not() -> None:
    s = session()
    send(s, 1, b"name\0")
    assert only_error(s.take()) == errno.ENOSYS
    send(s, fuse.Opcode.FORGET, bytes(8))
    send(s, fuse.Opcode.INTERRUPT, bytes(8))
    assert s.take() == Arrived(None, [], [], [])
    send(s, fuse.Opcode.RELEASE, bytes(24))
    assert s.take().replies == [fuse.OUT_HEADER.pack(16, 0, 2)]


def test_fsync_becomes_a_flush() -> None:
    s = session()
    send(s, fuse.Opcode.FSYNC, bytes(16), unique=8)
    assert s.take().flushes == [8]
    assert protocol.flush_reply(8, None) == fuse.OUT_HEADER.pack(16, 0, 8)
    assert protocol.flush_reply(8, BlockError(errno.EIO)) == fuse.OUT_HEADER.pack(16, -errno.EIO, 8)


def test_a_length_that_does_not_fit_the_request_ends_the_connection() -> None:
    with pytest.raises(ProtocolError):
        send(session(), fuse.Opcode.WRITE, io(0, BLOCK), bytes(BLOCK), lie_bytes=8)
    with pytest.raises(ProtocolError):
        send(session(), fuse.Opcode.WRITE, io(0, 2 * BLOCK), bytes(BLOCK))
    with pytest.raises(ProtocolError):
        send(session(), fuse.Opcode.READ, io(0, 2 * MAX_IO_BYTES))


@given(opcode=st.integers(0, 60), body=st.binary(max_size=120))
def test_whatever_arrives_is_answered_once_collected_or_ends_the_connection(opcode: int, body: bytes) -> None:
    s = session()
    try:
        send(s, opcode, body)
    except ProtocolError:
        return
    arrived = s.take()
    count = (
        len(arrived.replies) + len(arrived.reads) + len(arrived.flushes) + (len(arrived.batch) if arrived.batch else 0)
    )
    assert count == (0 if opcode in (2, 36, 42) else 1)
