"""PDUs as an initiator makes and reads them, by hand: RFC 7143, section 11. Shares nothing with the code under test."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import crc32c

BHS_BYTES = 48
NO_TAG = 0xFFFFFFFF
IMMEDIATE, FINAL, READ, WRITE = 0x40, 0x80, 0x40, 0x20


class Op(IntEnum):
    """Opcodes (RFC 7143, 11.2.1.2)."""

    NOP_OUT = 0x00
    COMMAND = 0x01
    TASK_MANAGEMENT = 0x02
    LOGIN = 0x03
    TEXT = 0x04
    DATA_OUT = 0x05
    LOGOUT = 0x06
    SNACK = 0x10
    NOP_IN = 0x20
    RESPONSE = 0x21
    TASK_MANAGEMENT_RESPONSE = 0x22
    LOGIN_RESPONSE = 0x23
    TEXT_RESPONSE = 0x24
    DATA_IN = 0x25
    LOGOUT_RESPONSE = 0x26
    R2T = 0x31
    ASYNC = 0x32
    REJECT = 0x3F


TARGET_OPCODES = frozenset(op for op in Op if op >= Op.NOP_IN)


@dataclass(frozen=True)
class Pdu:
    """One PDU received. Fields by their offset in the header: many mean different things in different PDUs."""

    header: bytes
    data: bytes = b""

    @property
    def opcode(self) -> int:
        return self.header[0] & 0x3F

    @property
    def flags(self) -> int:
        return self.header[1]

    @property
    def tag(self) -> int:
        return self.word(16)

    @property
    def ends_login(self) -> bool:
        """A Login Response into the full feature phase (RFC 7143, 11.13)."""
        return self.opcode == Op.LOGIN_RESPONSE and self.flags & 0x83 == 0x83

    def word(self, at: int) -> int:
        value: int = struct.unpack_from(">I", self.header, at)[0]
        return value


def make(
    opcode: int, *, flags: int = FINAL, tag: int = 0, lun: int = 0, words: dict[int, int] | None = None,
    tail: bytes = b"", head: bytes = b"\0\0", ahs: bytes = b"", data: bytes = b"",
    digests: tuple[bool, bool] = (False, False),
) -> bytes:  # fmt: skip
    """A whole PDU. ``words`` are 32-bit fields by offset, ``tail`` the header's last bytes, ``head`` bytes 2, 3."""
    header = bytearray(BHS_BYTES)
    header[0], header[1], header[2:4] = opcode, flags, head
    header[4] = len(ahs) // 4
    header[5:8] = len(data).to_bytes(3, "big")
    header[8:16] = lun.to_bytes(2, "big") + bytes(6)
    struct.pack_into(">I", header, 16, tag & NO_TAG)
    for at, value in (words or {}).items():
        struct.pack_into(">I", header, at, value & NO_TAG)
    if tail:
        header[BHS_BYTES - len(tail) :] = tail
    return seal(bytes(header) + ahs, data, digests)


def seal(head: bytes, data: bytes, digests: tuple[bool, bool]) -> bytes:
    """Header (with its AHS) and data as they go out: padded, with the digests that were agreed (CRC32C)."""
    out = head + (digest(head) if digests[0] else b"")
    if not data:
        return out
    padded = data + bytes(-len(data) % 4)
    return out + padded + (digest(padded) if digests[1] else b"")


def digest(content: bytes) -> bytes:
    """CRC32C as it goes over the wire: RFC 7143, 13.1 and appendix A.4."""
    return int(crc32c.crc32c(content)).to_bytes(4, "little")


def login(
    text: bytes, *, stage: int = 1, following: int | None = 3, isid: bytes = b"\x80\0\0\0\0\1", tsih: int = 0,
    command_number: int = 1, status_number: int = 0, tag: int = 1, more: bool = False,
) -> bytes:  # fmt: skip
    """A Login Request; ``following`` None does not ask for the next stage."""
    flags = stage << 2 | (0x40 if more else 0) | (0 if following is None else 0x80 | following)
    lun_field = isid + tsih.to_bytes(2, "big")
    words = {
        8: int.from_bytes(lun_field[:4], "big"), 12: int.from_bytes(lun_field[4:], "big"),
        24: command_number, 28: status_number,
    }  # fmt: skip
    return make(Op.LOGIN | IMMEDIATE, flags=flags, tag=tag, words=words, data=text)


def command(
    cdb: bytes, *, number: int, tag: int, lun: int = 0, expected: int = 0, flags: int = FINAL | 1,
    status_number: int = 0, data: bytes = b"", immediate: bool = False, digests: tuple[bool, bool] = (False, False),
) -> bytes:  # fmt: skip
    """A SCSI Command: ``number`` is its CmdSN, ``status_number`` the ExpStatSN."""
    return make(
        Op.COMMAND | (IMMEDIATE if immediate else 0), flags=flags, tag=tag, lun=lun,
        words={20: expected, 24: number, 28: status_number}, tail=cdb.ljust(16, b"\0"), data=data, digests=digests,
    )  # fmt: skip


def data_out(
    data: bytes, *, tag: int, transfer_tag: int, number: int, offset: int, lun: int = 0, final: bool = True,
    status_number: int = 0, digests: tuple[bool, bool] = (False, False),
) -> bytes:  # fmt: skip
    """``number`` is the DataSN, ``transfer_tag`` the TTT of the R2T it answers."""
    words = {20: transfer_tag, 28: status_number, 36: number, 40: offset}
    return make(Op.DATA_OUT, flags=FINAL if final else 0, tag=tag, lun=lun, words=words, data=data, digests=digests)


def keys(**pairs: str | int) -> bytes:
    """Text of a login or text request."""
    return b"".join(f"{key}={value}\0".encode() for key, value in pairs.items())


class MalformedError(AssertionError):
    """What the target sent is no PDU."""


class Reader:
    """Bytes in, PDUs out. ``digests``: (header, data), set when agreed."""

    def __init__(self) -> None:
        self.digests = (False, False)
        self._rest = b""

    def feed(self, content: bytes) -> list[Pdu]:
        """Every PDU that is whole, but none behind a login's end: the caller sets the digests of what follows first.

        Raises MalformedError for a wrong digest or an opcode no target may send.
        """
        self._rest += content
        found: list[Pdu] = []
        while not (found and found[-1].ends_login) and (pdu := self._next()) is not None:
            found.append(pdu)
        return found

    def _next(self) -> Pdu | None:
        rest = self._rest
        if len(rest) < BHS_BYTES:
            return None
        if rest[0] not in TARGET_OPCODES:
            raise MalformedError(f"opcode {rest[0]:#x} from a target")
        head_bytes = BHS_BYTES + 4 * rest[4]
        data_bytes = int.from_bytes(rest[5:8], "big")
        padded = data_bytes + -data_bytes % 4
        start = head_bytes + (4 if self.digests[0] else 0)
        end = start + padded + (4 if padded and self.digests[1] else 0)
        if len(rest) < end:
            return None
        if self.digests[0] and rest[head_bytes:start] != digest(rest[:head_bytes]):
            raise MalformedError("wrong header digest")
        if padded and self.digests[1] and rest[end - 4 : end] != digest(rest[start : start + padded]):
            raise MalformedError("wrong data digest")
        self._rest = rest[end:]
        return Pdu(rest[:BHS_BYTES], rest[start : start + data_bytes])
