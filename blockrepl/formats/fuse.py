"""Layouts of the FUSE kernel interface: what /dev/fuse carries.

Source: linux/include/uapi/linux/fuse.h, protocol 7.31 to 7.45 (Linux 5.4 and later). Host byte order; offsets and
lengths in bytes; unused and padding fields are zero. A request is `fuse_in_header`, the body of its opcode, and for
WRITE the payload; a reply is `fuse_out_header` (its ``error`` is 0 or a negative errno) and, unless there was an
error, the body.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from construct import Array, Int16un, Int32sn, Int32un, Int64un, Struct

MAJOR = 7
MINOR = 31  # what this program speaks: the last change it needs is FUSE_MAX_PAGES (7.28)
ROOT_ID = 1
MIN_READ_BUFFER_BYTES = 8192  # FUSE_MIN_READ_BUFFER: a smaller read(2) fails with EINVAL


class Opcode(IntEnum):
    """enum fuse_opcode: those that a file which is also the root of its file system can meet."""

    FORGET = 2  # no reply
    GETATTR = 3
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36  # no reply needed
    DESTROY = 38
    BATCH_FORGET = 42  # no reply
    FALLOCATE = 43


class InitFlag(IntFlag):
    """INIT request and reply flags; bits from 32 on travel in ``flags2``."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5  # more than one page in a WRITE
    ASYNC_DIO = 1 << 15  # a direct request may be in flight while its caller goes on
    ABORT_ERROR = 1 << 21  # reading the device after an abort gives ECONNABORTED
    MAX_PAGES = 1 << 22  # ``max_pages`` of the reply counts
    INIT_EXT = 1 << 30  # ``flags2`` counts


class OpenFlag(IntFlag):
    """FOPEN_* in the OPEN reply."""

    DIRECT_IO = 1 << 0  # no page cache for this file
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6  # writes do not exclude each other (7.37)


class FallocateMode(IntFlag):
    """linux/include/uapi/linux/falloc.h."""

    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02
    ZERO_RANGE = 0x10


fuse_in_header = Struct(
    "length_bytes" / Int32un,  # of the whole request
    "opcode" / Int32un,  # kept an int: unknown ones are answered with ENOSYS
    "unique" / Int64un,  # returned in the reply
    "node_id" / Int64un,
    "uid" / Int32un,
    "gid" / Int32un,
    "pid" / Int32un,
    "total_extension_words" / Int16un,
    "padding" / Int16un,
)
assert fuse_in_header.sizeof() == 40

fuse_out_header = Struct(
    "length_bytes" / Int32un,
    "error" / Int32sn,
    "unique" / Int64un,
)
assert fuse_out_header.sizeof() == 16

fuse_init_in = Struct(
    "major" / Int32un,
    "minor" / Int32un,
    "max_readahead_bytes" / Int32un,
    "flags" / Int32un,  # a kernel before 7.36 ends here
)
assert fuse_init_in.sizeof() == 16

fuse_init_out = Struct(
    "major" / Int32un,
    "minor" / Int32un,
    "max_readahead_bytes" / Int32un,
    "flags" / Int32un,
    "max_background" / Int16un,  # requests in flight that nobody waits for
    "congestion_threshold" / Int16un,
    "max_write_bytes" / Int32un,
    "time_granularity_ns" / Int32un,
    "max_pages" / Int16un,
    "map_alignment" / Int16un,
    "flags2" / Int32un,
    "unused" / Array(7, Int32un),
)
assert fuse_init_out.sizeof() == 64

fuse_attr = Struct(
    "inode" / Int64un,
    "size_bytes" / Int64un,
    "blocks" / Int64un,  # of 512 bytes
    "atime_s" / Int64un,
    "mtime_s" / Int64un,
    "ctime_s" / Int64un,
    "atime_ns" / Int32un,
    "mtime_ns" / Int32un,
    "ctime_ns" / Int32un,
    "mode" / Int32un,
    "links" / Int32un,
    "uid" / Int32un,
    "gid" / Int32un,
    "rdev" / Int32un,
    "block_size_bytes" / Int32un,
    "flags" / Int32un,
)
assert fuse_attr.sizeof() == 88

fuse_attr_out = Struct(
    "valid_s" / Int64un,  # how long the kernel may keep the attributes
    "valid_ns" / Int32un,
    "dummy" / Int32un,
    "attr" / fuse_attr,
)
assert fuse_attr_out.sizeof() == 104

fuse_open_out = Struct(
    "handle" / Int64un,
    "open_flags" / Int32un,
    "padding" / Int32un,
)
assert fuse_open_out.sizeof() == 16

fuse_open_in = Struct(
    "flags" / Int32un,  # O_* of open(2)
    "open_flags" / Int32un,
)
assert fuse_open_in.sizeof() == 8

# READ and WRITE bodies have one shape.
fuse_io_in = Struct(
    "handle" / Int64un,
    "offset_bytes" / Int64un,
    "length_bytes" / Int32un,
    "io_flags" / Int32un,
    "lock_owner" / Int64un,
    "flags" / Int32un,
    "padding" / Int32un,
)
assert fuse_io_in.sizeof() == 40

fuse_write_out = Struct(
    "length_bytes" / Int32un,
    "padding" / Int32un,
)
assert fuse_write_out.sizeof() == 8

fuse_fallocate_in = Struct(
    "handle" / Int64un,
    "offset_bytes" / Int64un,
    "length_bytes" / Int64un,
    "mode" / Int32un,  # FallocateMode
    "padding" / Int32un,
)
assert fuse_fallocate_in.sizeof() == 32

fuse_statfs_out = Struct(
    "blocks" / Int64un,
    "blocks_free" / Int64un,
    "blocks_available" / Int64un,
    "files" / Int64un,
    "files_free" / Int64un,
    "block_size_bytes" / Int32un,  # the loop driver takes it for the granularity of discards
    "name_length_bytes" / Int32un,
    "fragment_size_bytes" / Int32un,
    "padding" / Int32un,
    "spare" / Array(6, Int32un),
)
assert fuse_statfs_out.sizeof() == 80

# The hot ones as struct formats; a test proves them equal to the declarations above.
IN_HEADER = struct.Struct("=IIQQIIIHH")
# Of fuse_in_header and fuse_io_in what a request is decided by: whole length, opcode, unique, offset, length.
IO_REQUEST = struct.Struct("=IIQ 24x 8xQI20x")
OUT_HEADER = struct.Struct("=IiQ")
WRITE_REPLY = struct.Struct("=IiQ" + "II")  # fuse_out_header and fuse_write_out

HEADER_BYTES = IN_HEADER.size
IO_HEADER_BYTES = IO_REQUEST.size
assert (HEADER_BYTES, IO_HEADER_BYTES, OUT_HEADER.size, WRITE_REPLY.size) == (40, 80, 16, 24)
