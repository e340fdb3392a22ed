"""iSCSI: the headers of all PDUs.

Source: RFC 7143, section 11; each layout names its part. All fields are big-endian. A PDU is a basic header segment of
48 bytes, additional header segments in words of 4 bytes, a header digest of 4 if agreed, a data segment padded to 4
bytes, and a data digest of 4 if agreed and there is data. Bit 0 of the RFC's drawings is the highest bit of a byte.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from construct import Bytes, BytesInteger, Const, Int8ub, Int16ub, Int32ub, Int64ub, Struct
from construct import Default as Fallback

BHS_BYTES = 48
DIGEST_BYTES = 4
NO_TAG = 0xFFFFFFFF  # "reserved value" of ITT and TTT (11.2.1.8)
MAX_SEGMENT_BYTES = (1 << 24) - 1
MAX_AHS_BYTES = 255 * 4


class Opcode(IntEnum):
    """11.2.1.2: without the immediate bit."""

    NOP_OUT = 0x00
    SCSI_COMMAND = 0x01
    TASK_REQUEST = 0x02
    LOGIN_REQUEST = 0x03
    TEXT_REQUEST = 0x04
    DATA_OUT = 0x05
    LOGOUT_REQUEST = 0x06
    SNACK_REQUEST = 0x10
    NOP_IN = 0x20
    SCSI_RESPONSE = 0x21
    TASK_RESPONSE = 0x22
    LOGIN_RESPONSE = 0x23
    TEXT_RESPONSE = 0x24
    DATA_IN = 0x25
    LOGOUT_RESPONSE = 0x26
    R2T = 0x31
    ASYNC = 0x32
    REJECT = 0x3F


IMMEDIATE = 0x40  # in the opcode byte (11.2.1.1)
OPCODE_MASK = 0x3F
FINAL = 0x80  # in the second byte of most PDUs (11.2.1.3)


class CommandFlag(IntFlag):
    """SCSI Command, 11.3.1; the lowest three bits are the task attribute."""

    FINAL = 0x80
    READ = 0x40
    WRITE = 0x20
    ATTRIBUTE = 0x07


class ResponseFlag(IntFlag):
    """SCSI Response, 11.4.1. UNDERFLOW and OVERFLOW stand in Data-In with STATUS too (11.7.1)."""

    FINAL = 0x80
    BIDI_OVERFLOW = 0x10
    BIDI_UNDERFLOW = 0x08
    OVERFLOW = 0x04
    UNDERFLOW = 0x02


class DataInFlag(IntFlag):
    """11.7.1."""

    FINAL = 0x80
    ACKNOWLEDGE = 0x40
    OVERFLOW = 0x04
    UNDERFLOW = 0x02
    STATUS = 0x01


class LoginFlag(IntFlag):
    """11.12.1 to 11.12.3; current and next stage are in the lower four bits."""

    TRANSIT = 0x80
    CONTINUE = 0x40
    CURRENT = 0x0C
    NEXT = 0x03


class Stage(IntEnum):
    """11.12.3."""

    SECURITY = 0
    OPERATIONAL = 1
    FULL_FEATURE = 3


class TextFlag(IntFlag):
    """11.10.1 and 11.10.2."""

    FINAL = 0x80
    CONTINUE = 0x40


class LoginStatus(IntEnum):
    """11.13.5: class and detail as one number."""

    SUCCESS = 0x0000
    INITIATOR_ERROR = 0x0200
    AUTHENTICATION_FAILED = 0x0201
    NOT_AUTHORIZED = 0x0202
    NOT_FOUND = 0x0203
    TARGET_REMOVED = 0x0204
    UNSUPPORTED_VERSION = 0x0205
    TOO_MANY_CONNECTIONS = 0x0206
    MISSING_PARAMETER = 0x0207
    CANNOT_INCLUDE = 0x0208
    SESSION_TYPE = 0x0209
    NO_SESSION = 0x020A
    INVALID_REQUEST = 0x020B
    TARGET_ERROR = 0x0300
    UNAVAILABLE = 0x0301
    OUT_OF_RESOURCES = 0x0302


class RejectReason(IntEnum):
    """11.17.1."""

    DATA_DIGEST = 0x02
    SNACK = 0x03
    PROTOCOL_ERROR = 0x04
    NOT_SUPPORTED = 0x05
    IMMEDIATE = 0x06  # too many immediate commands
    TASK_IN_PROGRESS = 0x07
    INVALID_DATA_ACK = 0x08
    INVALID_FIELD = 0x09
    OUT_OF_RESOURCES = 0x0A  # for long operations
    WAITING_FOR_LOGOUT = 0x0C


class LogoutReason(IntEnum):
    """11.14.1."""

    CLOSE_SESSION = 0
    CLOSE_CONNECTION = 1
    RECOVERY = 2


class LogoutResponse(IntEnum):
    """11.15.1."""

    SUCCESS = 0
    NO_CONNECTION = 1
    NO_RECOVERY = 2
    CLEANUP_FAILED = 3


class AsyncEvent(IntEnum):
    """11.9.1."""

    SCSI = 0
    LOGOUT_REQUESTED = 1
    CONNECTION_DROPPED = 2
    SESSION_DROPPED = 3
    NEGOTIATION_REQUESTED = 4


class AhsType(IntEnum):
    """11.2.2.1."""

    EXTENDED_CDB = 1
    READ_LENGTH = 2


Int24ub = BytesInteger(3)

# 11.2.2: length counts the bytes after the type, less the padding; 11.2.2.3 and 11.2.2.4 have a reserved byte first.
ahs_header = Struct("length_bytes" / Int16ub, "type" / Int8ub)
assert ahs_header.sizeof() == 3


def _zero(size_bytes: int) -> Fallback:
    """A reserved field."""
    return Fallback(Bytes(size_bytes), bytes(size_bytes))


def _header(opcode: int, **fields: object) -> Struct:
    """A basic header segment whose opcode byte is read as it is (it has the immediate bit), and checked for length."""
    layout = Struct("opcode" / Fallback(Int8ub, opcode), **fields)
    assert layout.sizeof() == BHS_BYTES, (opcode, layout.sizeof())
    return layout


def _lengths() -> dict[str, object]:
    return {"ahs_words": Fallback(Int8ub, 0), "data_bytes": Fallback(Int24ub, 0)}


def _numbers() -> dict[str, object]:
    """What every PDU of a target carries about order."""
    return {"stat_sn": Int32ub, "exp_cmd_sn": Int32ub, "max_cmd_sn": Int32ub}


# 11.3. `expected_bytes` is the Expected Data Transfer Length.
scsi_command = _header(
    Opcode.SCSI_COMMAND, flags=Int8ub, reserved=_zero(2), **_lengths(), lun=Int64ub, tag=Int32ub,
    expected_bytes=Int32ub, cmd_sn=Int32ub, exp_stat_sn=Int32ub, cdb=Bytes(16),
)  # fmt: skip

# 11.4. `snack_tag` is of use only with error recovery.
scsi_response = _header(
    Opcode.SCSI_RESPONSE, flags=Int8ub, response=Int8ub, status=Int8ub, **_lengths(), reserved=_zero(8), tag=Int32ub,
    snack_tag=Fallback(Int32ub, 0), **_numbers(), exp_data_sn=Int32ub, bidi_residual_bytes=Fallback(Int32ub, 0),
    residual_bytes=Int32ub,
)  # fmt: skip

# 11.5.
task_request = _header(
    Opcode.TASK_REQUEST, function=Int8ub, reserved=_zero(2), **_lengths(), lun=Int64ub, tag=Int32ub,
    referenced_tag=Int32ub, cmd_sn=Int32ub, exp_stat_sn=Int32ub, ref_cmd_sn=Int32ub, exp_data_sn=Int32ub,
    reserved_2=_zero(8),
)  # fmt: skip

# 11.6.
task_response = _header(
    Opcode.TASK_RESPONSE, flags=Const(FINAL, Int8ub), response=Int8ub, reserved=_zero(1), **_lengths(),
    reserved_2=_zero(8), tag=Int32ub, reserved_3=_zero(4), **_numbers(), reserved_4=_zero(12),
)  # fmt: skip

# 11.7, Data-Out.
data_out = _header(
    Opcode.DATA_OUT, flags=Int8ub, reserved=_zero(2), **_lengths(), lun=Int64ub, tag=Int32ub, target_tag=Int32ub,
    reserved_2=_zero(4), exp_stat_sn=Int32ub, reserved_3=_zero(4), data_sn=Int32ub, offset_bytes=Int32ub,
    reserved_4=_zero(4),
)  # fmt: skip

# 11.7, Data-In. Status, StatSN and residual count only with the flag STATUS.
data_in = _header(
    Opcode.DATA_IN, flags=Int8ub, reserved=_zero(1), status=Int8ub, **_lengths(), lun=Fallback(Int64ub, 0),
    tag=Int32ub, target_tag=Int32ub, **_numbers(), data_sn=Int32ub, offset_bytes=Int32ub, residual_bytes=Int32ub,
)  # fmt: skip

# 11.8.
r2t = _header(
    Opcode.R2T, flags=Const(FINAL, Int8ub), reserved=_zero(2), **_lengths(), lun=Int64ub, tag=Int32ub,
    target_tag=Int32ub, **_numbers(), r2t_sn=Int32ub, offset_bytes=Int32ub, desired_bytes=Int32ub,
)  # fmt: skip

# 11.9.
async_message = _header(
    Opcode.ASYNC, flags=Const(FINAL, Int8ub), reserved=_zero(2), **_lengths(), lun=Int64ub, tag=Const(NO_TAG, Int32ub),
    reserved_2=_zero(4), **_numbers(), event=Int8ub, vendor=Fallback(Int8ub, 0), parameter_1=Fallback(Int16ub, 0),
    parameter_2=Fallback(Int16ub, 0), parameter_3=Fallback(Int16ub, 0), reserved_3=_zero(4),
)  # fmt: skip

# 11.10.
text_request = _header(
    Opcode.TEXT_REQUEST, flags=Int8ub, reserved=_zero(2), **_lengths(), lun=Int64ub, tag=Int32ub, target_tag=Int32ub,
    cmd_sn=Int32ub, exp_stat_sn=Int32ub, reserved_2=_zero(16),
)  # fmt: skip

# 11.11.
text_response = _header(
    Opcode.TEXT_RESPONSE, flags=Int8ub, reserved=_zero(2), **_lengths(), lun=Fallback(Int64ub, 0), tag=Int32ub,
    target_tag=Int32ub, **_numbers(), reserved_2=_zero(12),
)  # fmt: skip

# 11.12.
login_request = _header(
    Opcode.LOGIN_REQUEST, flags=Int8ub, version_max=Int8ub, version_min=Int8ub, **_lengths(), isid=Bytes(6),
    tsih=Int16ub, tag=Int32ub, cid=Int16ub, reserved=_zero(2), cmd_sn=Int32ub, exp_stat_sn=Int32ub,
    reserved_2=_zero(16),
)  # fmt: skip

# 11.13. `status` is class and detail.
login_response = _header(
    Opcode.LOGIN_RESPONSE, flags=Int8ub, version_max=Fallback(Int8ub, 0), version_active=Fallback(Int8ub, 0),
    **_lengths(), isid=Bytes(6), tsih=Int16ub, tag=Int32ub, reserved=_zero(4), **_numbers(), status=Int16ub,
    reserved_2=_zero(10),
)  # fmt: skip

# 11.14. `reason` has the final bit.
logout_request = _header(
    Opcode.LOGOUT_REQUEST, reason=Int8ub, reserved=_zero(2), **_lengths(), reserved_2=_zero(8), tag=Int32ub,
    cid=Int16ub, reserved_3=_zero(2), cmd_sn=Int32ub, exp_stat_sn=Int32ub, reserved_4=_zero(16),
)  # fmt: skip

# 11.15.
logout_response = _header(
    Opcode.LOGOUT_RESPONSE, flags=Const(FINAL, Int8ub), response=Int8ub, reserved=_zero(1), **_lengths(),
    reserved_2=_zero(8), tag=Int32ub, reserved_3=_zero(4), **_numbers(), reserved_4=_zero(4), time2wait_s=Int16ub,
    time2retain_s=Int16ub, reserved_5=_zero(4),
)  # fmt: skip

# 11.17. The header of what was rejected follows as data.
reject = _header(
    Opcode.REJECT, flags=Const(FINAL, Int8ub), reason=Int8ub, reserved=_zero(1), **_lengths(), reserved_2=_zero(8),
    tag=Const(NO_TAG, Int32ub), reserved_3=_zero(4), **_numbers(), data_sn=Fallback(Int32ub, 0), reserved_4=_zero(8),
)  # fmt: skip

# 11.18.
nop_out = _header(
    Opcode.NOP_OUT, flags=Fallback(Int8ub, FINAL), reserved=_zero(2), **_lengths(), lun=Int64ub, tag=Int32ub,
    target_tag=Int32ub, cmd_sn=Int32ub, exp_stat_sn=Int32ub, reserved_2=_zero(16),
)  # fmt: skip

# 11.19.
nop_in = _header(
    Opcode.NOP_IN, flags=Const(FINAL, Int8ub), reserved=_zero(2), **_lengths(), lun=Int64ub, tag=Int32ub,
    target_tag=Int32ub, **_numbers(), reserved_2=_zero(12),
)  # fmt: skip

# The headers of the hot path as struct reads and writes them. `lengths` is AHS words (8 bits) and data bytes (24).
SCSI_COMMAND = struct.Struct(">BBHIQIIII16s")  # opcode, flags, -, lengths, lun, tag, expected, cmd_sn, exp_stat_sn, cdb
DATA_OUT = struct.Struct(">BBHIQ8I")  # opcode, flags, -, lengths, lun, tag, ttt, -, exp_stat_sn, -, data_sn, offset, -
LENGTHS = struct.Struct(">4xI")
# SCSI Response, Data-In and R2T: words. The first is opcode, flags, response (or reserved) and status; then lengths,
# lun (two words), tag, target tag (snack tag), stat_sn, exp_cmd_sn, max_cmd_sn, data_sn (r2t_sn), offset (bidi
# residual), residual (desired length).
WORDS = struct.Struct(">12I")
WORD_COUNT = 12
SENSE_LENGTH = struct.Struct(">H")  # before sense data in a SCSI Response (11.4.7)


def first_word(opcode: int, flags: int, response: int = 0, status: int = 0) -> int:
    """The first word of a header in `WORDS`."""
    return opcode << 24 | flags << 16 | response << 8 | status


RESPONSE_GOOD = first_word(Opcode.SCSI_RESPONSE, ResponseFlag.FINAL)
DATA_IN_GOOD = first_word(Opcode.DATA_IN, DataInFlag.FINAL | DataInFlag.STATUS)
R2T_WORD = first_word(Opcode.R2T, FINAL)

_header_structs: dict[int, struct.Struct] = {}


def pack_headers(count: int, words: list[int]) -> bytes:
    """``count`` headers of twelve words in one call to struct."""
    packer = _header_structs.get(count)
    if packer is None:
        packer = struct.Struct(f">{WORD_COUNT * count}I")
        if len(_header_structs) < 1024:
            _header_structs[count] = packer
    return packer.pack(*words)


def _luns() -> dict[int, int]:
    """SAM-5, 4.7: single-level addresses of the first bus (peripheral method) and flat ones."""
    table = {lun << 48: lun for lun in range(256)}
    table.update({(0x4000 | lun) << 48: lun for lun in range(1 << 8)})
    table[0xC101 << 48] = REPORT_LUNS_LUN
    return table


REPORT_LUNS_LUN = 0xC101  # the well known logical unit (SPC-4, 8.3)
NO_LUN = -1
LUNS = _luns()  # 8-byte address to number


def lun_address(lun: int) -> int:
    """A LUN as 8 bytes: peripheral method to 255."""
    return lun << 48


def padded(size_bytes: int) -> int:
    """Data segments and AHS are padded to words of 4 bytes (11.2.3)."""
    return size_bytes + 3 & ~3
