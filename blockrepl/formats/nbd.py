"""NBD: the messages of the fixed newstyle handshake and of transmission with simple replies.

Source of everything here: the NBD project's doc/proto.md; each layout names its section. All fields are big-endian;
offsets and lengths are in bytes. Strings are UTF-8, not terminated, at most 4096 bytes ("Conventions").
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from construct import (
    Bytes,
    Const,
    GreedyBytes,
    Int16ub,
    Int32ub,
    Int64ub,
    PrefixedArray,
    Rebuild,
    Struct,
    len_,
    this,
)

INIT_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698

MAX_NAME_BYTES = 4096  # "Conventions": strings MUST be no longer
MAX_PAYLOAD_BYTES = 1 << 25  # "Size constraints": every server should take this much


class HandshakeFlag(IntFlag):
    """ "Handshake flags", 16 bits from the server; the client answers with the same bits in 32 ("Client flags")."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class TransmissionFlag(IntFlag):
    """ "Transmission flags": what an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    ROTATIONAL = 16
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_RESIZE = 512
    SEND_CACHE = 1024
    SEND_FAST_ZERO = 2048


class Option(IntEnum):
    """ "Option types"."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """ "Option reply types". Errors have bit 31 set, and may carry a message for people."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


class Info(IntEnum):
    """Information types under `NBD_REP_INFO`, "Option reply types"."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """ "Request types"."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    """ "Command flags"."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16
    PAYLOAD_LEN = 32


class NbdError(IntEnum):
    """ "Error values"."""

    NONE = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# "Newstyle negotiation": the server speaks first.
greeting = Struct(
    "init_magic" / Const(INIT_MAGIC, Int64ub),
    "option_magic" / Const(OPTION_MAGIC, Int64ub),
    "flags" / Int16ub,  # HandshakeFlag
)
assert greeting.sizeof() == 18

# "Newstyle negotiation": the client's answer.
client_flags = Struct("flags" / Int32ub)  # HandshakeFlag
assert client_flags.sizeof() == 4

# "Newstyle negotiation": an option; `length_bytes` of data follow.
option_header = Struct(
    "magic" / Const(OPTION_MAGIC, Int64ub),
    "option" / Int32ub,  # Option, kept an int: unknown ones are answered
    "length_bytes" / Int32ub,
)
assert option_header.sizeof() == 16

# "Fixed newstyle negotiation": the answer to any option but EXPORT_NAME.
option_reply = Struct(
    "magic" / Const(OPTION_REPLY_MAGIC, Int64ub),
    "option" / Int32ub,
    "reply" / Int32ub,  # OptionReply
    "length_bytes" / Rebuild(Int32ub, len_(this.data)),
    "data" / Bytes(this.length_bytes),
)
assert len(option_reply.build({"option": 1, "reply": 1, "data": b""})) == 20

# "Newstyle negotiation": the answer to EXPORT_NAME; 124 zeroes follow unless NO_ZEROES was agreed.
export_name_reply = Struct(
    "size_bytes" / Int64ub,
    "flags" / Int16ub,  # TransmissionFlag
)
assert export_name_reply.sizeof() == 10
EXPORT_NAME_PADDING_BYTES = 124

# "Option types", NBD_OPT_INFO and NBD_OPT_GO: the data of the option.
info_request = Struct(
    "name_bytes" / Rebuild(Int32ub, len_(this.name)),
    "name" / Bytes(this.name_bytes),
    "requests" / PrefixedArray(Int16ub, Int16ub),  # Info, unknown ones are ignored
)
assert len(info_request.build({"name": b"", "requests": []})) == 6

# "Option reply types", NBD_REP_SERVER.
server_reply = Struct(
    "name_bytes" / Rebuild(Int32ub, len_(this.name)),
    "name" / Bytes(this.name_bytes),
    "description" / GreedyBytes,
)
assert len(server_reply.build({"name": b"", "description": b""})) == 4

# "Option reply types", NBD_REP_INFO with NBD_INFO_EXPORT.
info_export = Struct(
    "info" / Const(int(Info.EXPORT), Int16ub),
    "size_bytes" / Int64ub,
    "flags" / Int16ub,  # TransmissionFlag
)
assert info_export.sizeof() == 12

# "Option reply types", NBD_REP_INFO with NBD_INFO_NAME.
info_name = Struct(
    "info" / Const(int(Info.NAME), Int16ub),
    "name" / GreedyBytes,
)

# "Option reply types", NBD_REP_INFO with NBD_INFO_BLOCK_SIZE.
info_block_size = Struct(
    "info" / Const(int(Info.BLOCK_SIZE), Int16ub),
    "minimum_bytes" / Int32ub,
    "preferred_bytes" / Int32ub,
    "maximum_payload_bytes" / Int32ub,
)
assert info_block_size.sizeof() == 14

# "Request message". `length_bytes` of payload follow only WRITE.
request = Struct(
    "magic" / Const(REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,  # CommandFlag
    "type" / Int16ub,  # Command, kept an int: unknown ones are answered with EINVAL
    "cookie" / Int64ub,  # opaque, returned unchanged
    "offset_bytes" / Int64ub,
    "length_bytes" / Int32ub,
)
assert request.sizeof() == 28

# "Simple reply message". The data of a successful READ follows.
simple_reply = Struct(
    "magic" / Const(SIMPLE_REPLY_MAGIC, Int32ub),
    "error" / Int32ub,  # NbdError
    "cookie" / Int64ub,
)
assert simple_reply.sizeof() == 16

# The two headers of the hot path, as struct reads and writes them: magic, flags and type of a request are one number,
# so that one comparison finds the usual commands; magic and error of a reply are one number too.
REQUEST_BYTES = 28
REQUEST = struct.Struct(">QQQI")  # head, cookie, offset, length
REPLY_BYTES = 16
REPLY = struct.Struct(">QQ")  # head, cookie
REPLY_OK = SIMPLE_REPLY_MAGIC << 32


def request_head(command: int, flags: int = 0) -> int:
    """The first eight bytes of a request as a number."""
    return REQUEST_MAGIC << 32 | flags << 16 | command


_reply_structs: dict[int, struct.Struct] = {}


def pack_replies(cookies: list[int]) -> bytes:
    """Simple replies without error for all ``cookies``, in one call to struct: 30 ns each, 150 ns one by one."""
    count = len(cookies)
    if count == 1:
        return REPLY.pack(REPLY_OK, cookies[0])
    packer = _reply_structs.get(count)
    if packer is None:
        packer = struct.Struct(f">{2 * count}Q")
        if len(_reply_structs) < 1024:
            _reply_structs[count] = packer
    columns = [REPLY_OK] * (2 * count)
    columns[1::2] = cookies
    return packer.pack(*columns)
