"""The FUSE conversation of a volume that appears as one file: requests in, batches and replies out. No I/O here.

The root of the file system is the regular file itself, so there are no names and no directories: of the opcodes
only a dozen can arrive. Requests are checked here and nowhere else. What arrived together is collected as columns
(`Session.batch`, `reads`, `flushes`, `replies`); the server takes them with `Session.take` and answers with the
functions below.

Source: linux/include/uapi/linux/fuse.h; libfuse's doc/kernel.txt for who waits for whom.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from blockrepl.block import Op, WriteBatch, WriteFlag
from blockrepl.errors import BlockError, ProtocolError
from blockrepl.formats import fuse

MAX_IO_BYTES = 1 << 20  # 256 pages, the kernel's limit (fs.fuse.max_pages_limit) as it comes
PAGE_BYTES = 4096
MAX_BACKGROUND = 64  # requests that the kernel sends before it waits for replies: bounds the payload we hold
KEEP_S = 1 << 30  # how long the kernel may keep the attributes: who changes the size has it ask again
FILE_MODE = 0o100600

_unpack_request = fuse.IO_REQUEST.unpack_from
_WRITE = int(fuse.Opcode.WRITE)
_READ = int(fuse.Opcode.READ)
_NO_REPLY = frozenset({fuse.Opcode.FORGET, fuse.Opcode.BATCH_FORGET, fuse.Opcode.INTERRUPT})
_EMPTY_REPLY = frozenset({fuse.Opcode.RELEASE, fuse.Opcode.FLUSH, fuse.Opcode.DESTROY})
_WANTED = (
    fuse.InitFlag.ASYNC_READ
    | fuse.InitFlag.BIG_WRITES
    | fuse.InitFlag.ASYNC_DIO
    | fuse.InitFlag.ABORT_ERROR
    | fuse.InitFlag.MAX_PAGES
)
# What a host may see; anything else would be read by the kernel as its own business (ENOSYS: "never ask again").
_PASSED = frozenset({errno.EIO, errno.EINVAL, errno.ENOSPC, errno.EROFS, errno.EPERM, errno.EOPNOTSUPP, errno.ENODEV})


class ReadRequest(NamedTuple):
    """One READ: answer with `read_header` and exactly ``length_bytes`` bytes, or with `error_reply`."""

    unique: int
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the file looks like. Sizes in bytes; ``size_bytes`` is a multiple of ``block_size_bytes``."""

    size_bytes: int
    block_size_bytes: int
    read_only: bool
    uid: int = 0
    gid: int = 0


class Arrived(NamedTuple):
    """What came together. ``batch`` has no chunk yet: the server, which owns the memory, sets it."""

    batch: WriteBatch | None
    reads: list[ReadRequest]
    flushes: list[int]  # unique of each
    replies: list[bytes]  # ready to be written, each one message


class Session:
    """One FUSE connection, from INIT on."""

    def __init__(self, geometry: Geometry, done: Callable[[WriteBatch], None]) -> None:
        self.geometry = geometry
        self.kernel_minor = 0  # 0 until INIT
        self._done = done
        self._size = geometry.size_bytes
        self._mask = geometry.block_size_bytes - 1
        self._handlers: dict[int, tuple[int, Callable[[int, memoryview], None]]] = {  # least bytes of the body
            fuse.Opcode.INIT: (16, self._init),
            fuse.Opcode.GETATTR: (16, self._getattr),
            fuse.Opcode.OPEN: (8, self._open),
            fuse.Opcode.STATFS: (0, self._statfs),
            fuse.Opcode.FSYNC: (16, self._fsync),
            fuse.Opcode.FALLOCATE: (32, self._fallocate),
        }
        self._clear()

    def resize(self, size_bytes: int) -> None:
        """The volume is larger now: the kernel hears of it when it asks for the attributes again."""
        self.geometry = replace(self.geometry, size_bytes=size_bytes)
        self._size = size_bytes

    def _clear(self) -> None:
        self._batch: WriteBatch | None = None
        self._reads: list[ReadRequest] = []
        self._flushes: list[int] = []
        self._replies: list[bytes] = []

    def take(self) -> Arrived:
        """What came since the last call."""
        arrived = Arrived(self._batch, self._reads, self._flushes, self._replies)
        self._clear()
        return arrived

    def request(self, head: memoryview, size_bytes: int, body: memoryview) -> int:
        """Consume one request of ``size_bytes``: its first 80 bytes are in ``head``, the rest at the start of ``body``.

        Returns how many bytes of ``body`` are payload that the batch now looks into. Raises ProtocolError for what a
        kernel never sends: the connection is to be ended.
        """
        length, opcode, unique, offset, count = _unpack_request(head)
        if length != size_bytes or size_bytes < fuse.HEADER_BYTES:
            raise ProtocolError(f"FUSE: a request of {size_bytes} bytes says it has {length}")
        if opcode == _WRITE:
            if size_bytes != fuse.IO_HEADER_BYTES + count or not 0 < count <= MAX_IO_BYTES:
                raise ProtocolError(f"FUSE: WRITE of {count} bytes in a request of {size_bytes}")
            if (offset | count) & self._mask or offset + count > self._size or self.geometry.read_only:
                self._refuse_write(unique, offset, count)
                return 0
            batch = self._batch
            if batch is None:
                batch = self._batch = WriteBatch(self._done)
            batch.ops.append(Op.WRITE)
            batch.offsets.append(offset)
            batch.lengths.append(count)
            batch.flags.append(0)
            batch.cookies.append(unique)
            batch.payloads.append(body[:count])
            batch.size_bytes += count
            return int(count)
        if opcode == _READ:
            if size_bytes != fuse.IO_HEADER_BYTES or count > MAX_IO_BYTES:
                raise ProtocolError(f"FUSE: READ of {count} bytes in a request of {size_bytes}")
            self._read(unique, offset, count)
            return 0
        self._other(opcode, unique, size_bytes, head)
        return 0

    def _refuse_write(self, unique: int, offset: int, count: int) -> None:
        if self.geometry.read_only:
            code = errno.EROFS
        elif offset + count > self._size:
            code = errno.ENOSPC
        else:
            code = errno.EINVAL
        self._replies.append(error_reply(unique, code))

    def _read(self, unique: int, offset: int, count: int) -> None:
        if (offset | count) & self._mask:
            self._replies.append(error_reply(unique, errno.EINVAL))
            return
        count = max(0, min(count, self._size - offset))  # a read across the end is short, as of any file
        if count:
            self._reads.append(ReadRequest(unique, offset, count))
        else:
            self._replies.append(empty_reply(unique))

    def _other(self, opcode: int, unique: int, size_bytes: int, head: memoryview) -> None:
        found = self._handlers.get(opcode)
        if found is not None:
            least, handler = found
            if size_bytes < fuse.HEADER_BYTES + least:
                raise ProtocolError(f"FUSE: a request of {size_bytes} bytes is too short for opcode {opcode}")
            handler(unique, head[fuse.HEADER_BYTES :])
        elif opcode in _EMPTY_REPLY:
            self._replies.append(empty_reply(unique))
        elif opcode not in _NO_REPLY:
            self._replies.append(error_reply(unique, errno.ENOSYS))

    def _init(self, unique: int, body: memoryview) -> None:
        init = fuse.fuse_init_in.parse(body)
        if init.major != fuse.MAJOR or init.minor < fuse.MINOR:
            raise ProtocolError(
                f"FUSE: the kernel speaks {init.major}.{init.minor}, {fuse.MAJOR}.{fuse.MINOR} is needed"
            )
        missing = _WANTED & ~fuse.InitFlag(init.flags)
        if missing:
            raise ProtocolError(f"FUSE: the kernel lacks {missing!r}")
        self.kernel_minor = init.minor
        reply = fuse.fuse_init_out.build(
            {
                "major": fuse.MAJOR,
                "minor": fuse.MINOR,
                "max_readahead_bytes": 0,
                "flags": int(_WANTED),
                "max_background": MAX_BACKGROUND,
                "congestion_threshold": MAX_BACKGROUND,
                "max_write_bytes": MAX_IO_BYTES,
                "time_granularity_ns": 1,
                "max_pages": MAX_IO_BYTES // PAGE_BYTES,
                "map_alignment": 0,
                "flags2": 0,
                "unused": [0] * 7,
            }
        )
        self._replies.append(body_reply(unique, reply))

    def _getattr(self, unique: int, body: memoryview) -> None:
        geometry = self.geometry
        reply = fuse.fuse_attr_out.build(
            {
                "valid_s": KEEP_S,
                "valid_ns": 0,
                "dummy": 0,
                "attr": {
                    "inode": fuse.ROOT_ID,
                    "size_bytes": geometry.size_bytes,
                    "blocks": geometry.size_bytes // 512,
                    **dict.fromkeys(("atime_s", "mtime_s", "ctime_s", "atime_ns", "mtime_ns", "ctime_ns"), 0),
                    "mode": FILE_MODE,
                    "links": 1,
                    "uid": geometry.uid,
                    "gid": geometry.gid,
                    "rdev": 0,
                    "block_size_bytes": geometry.block_size_bytes,
                    "flags": 0,
                },
            }
        )
        self._replies.append(body_reply(unique, reply))

    def _open(self, unique: int, body: memoryview) -> None:
        flags = fuse.fuse_open_in.parse(body).flags
        if self.geometry.read_only and flags & 3:  # O_ACCMODE: anything but O_RDONLY
            self._replies.append(error_reply(unique, errno.EROFS))
            return
        how = fuse.OpenFlag.DIRECT_IO | fuse.OpenFlag.NOFLUSH | fuse.OpenFlag.PARALLEL_DIRECT_WRITES
        reply = fuse.fuse_open_out.build({"handle": 0, "open_flags": int(how), "padding": 0})
        self._replies.append(body_reply(unique, reply))

    def _statfs(self, unique: int, body: memoryview) -> None:
        block = self.geometry.block_size_bytes
        fields = dict.fromkeys(("blocks_free", "blocks_available", "files_free", "padding"), 0)
        reply = fuse.fuse_statfs_out.build(
            {
                **fields,
                "blocks": self._size // block,
                "files": 1,
                "block_size_bytes": block,
                "fragment_size_bytes": block,
                "name_length_bytes": 255,
                "spare": [0] * 6,
            }
        )
        self._replies.append(body_reply(unique, reply))

    def _fsync(self, unique: int, body: memoryview) -> None:
        if self.geometry.read_only:
            self._replies.append(empty_reply(unique))
        else:
            self._flushes.append(unique)

    def _fallocate(self, unique: int, body: memoryview) -> None:
        """The loop driver's discard and write-zeroes: PUNCH_HOLE or ZERO_RANGE, always with KEEP_SIZE."""
        fields = fuse.fuse_fallocate_in.parse(body)
        offset, count = int(fields.offset_bytes), int(fields.length_bytes)
        modes = fuse.FallocateMode
        code = 0
        if fields.mode not in (modes.PUNCH_HOLE | modes.KEEP_SIZE, modes.ZERO_RANGE | modes.KEEP_SIZE):
            code = errno.EOPNOTSUPP
        elif self.geometry.read_only:
            code = errno.EROFS
        elif count == 0 or (offset | count) & self._mask or offset + count > self._size:
            code = errno.EINVAL
        if code:
            self._replies.append(error_reply(unique, code))
            return
        batch = self._batch
        if batch is None:
            batch = self._batch = WriteBatch(self._done)
        trim = bool(fields.mode & modes.PUNCH_HOLE)
        batch.ops.append(Op.TRIM if trim else Op.ZERO)
        batch.offsets.append(offset)
        batch.lengths.append(count)
        batch.flags.append(WriteFlag.NONE if trim else WriteFlag.NO_HOLE)
        batch.cookies.append(unique)
        batch.payloads.append(None)


def batch_replies(batch: WriteBatch) -> list[bytes]:
    """One message per command of a completed batch."""
    pack = fuse.WRITE_REPLY.pack
    errors = batch.errors
    if errors is None:
        return [
            pack(24, 0, unique, length, 0) if op == Op.WRITE else empty_reply(unique)
            for unique, length, op in zip(batch.cookies, batch.lengths, batch.ops, strict=True)
        ]
    replies = []
    for unique, length, op, error in zip(batch.cookies, batch.lengths, batch.ops, errors, strict=True):
        if error is not None:
            replies.append(failure_reply(unique, error))
        elif op == Op.WRITE:
            replies.append(pack(24, 0, unique, length, 0))
        else:
            replies.append(empty_reply(unique))
    return replies


def read_header(request: ReadRequest) -> bytes:
    """What goes before the bytes read, in the same writev."""
    return fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + request.length_bytes, 0, request.unique)


def flush_reply(unique: int, error: BlockError | None) -> bytes:
    """The answer to an FSYNC."""
    return empty_reply(unique) if error is None else failure_reply(unique, error)


def empty_reply(unique: int) -> bytes:
    """All well, and nothing to say."""
    return fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size, 0, unique)


def body_reply(unique: int, body: bytes) -> bytes:
    """All well, with a body."""
    return fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + len(body), 0, unique) + body


def error_reply(unique: int, errno_code: int) -> bytes:
    """A refusal of ours."""
    return fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size, -errno_code, unique)


def failure_reply(unique: int, error: BlockError) -> bytes:
    """A failure of the volume: codes that a host may see as they are, EIO for the rest."""
    return error_reply(unique, error.errno_code if error.errno_code in _PASSED else errno.EIO)
