"""A plain initiator over a blocking socket: one session, one command at a time. For tests and the bench."""

from __future__ import annotations

import socket
import struct
from collections import deque
from dataclasses import dataclass

from tests.iscsi import pdu
from tests.iscsi.pdu import FINAL, NO_TAG, READ, WRITE, Op, Pdu, Reader
from tests.patience import patient

NAME = "iqn.2026-11.org.blockrepl.test:initiator"
TIMEOUT_S = patient(60.0)
_CHUNK = 1 << 18


class LoginRefusedError(AssertionError):
    """``status``: class << 8 | detail (RFC 7143, 11.13.5)."""

    def __init__(self, status: int) -> None:
        super().__init__(f"login refused with {status:#06x}")
        self.status = status


class ConnectionEndedError(AssertionError):
    """The target closed the connection."""


@dataclass(frozen=True)
class Answer:
    """How a SCSI command ended. ``sense``: key << 16 | asc << 8 | ascq, 0 without sense data."""

    status: int
    data: bytes = b""
    sense: int = 0
    residual: int = 0

    @property
    def good(self) -> bool:
        return self.status == 0


class Initiator:
    """Connected, not yet logged in. Use as a context."""

    def __init__(self, address: tuple[str, int], *, name: str = NAME, isid: bytes = b"\x80\0\0\0\0\1") -> None:
        self.socket = socket.create_connection(address, TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.name, self.isid = name, isid
        self.reader = Reader()
        self.digests = (False, False)
        self.command_number, self.status_number, self.max_command_number = 1, 0, 1
        self.agreed: dict[str, str] = {}
        self.tsih = 0
        self._tag = 1
        self._received: deque[Pdu] = deque()

    def __enter__(self) -> Initiator:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    # login

    def login(self, target: str | None, **more: str | int) -> Initiator:
        """Straight into operational negotiation, without authentication; None is a discovery session."""
        wanted: dict[str, str | int] = {"InitiatorName": self.name}
        wanted |= {"SessionType": "Discovery"} if target is None else {"TargetName": target}
        wanted |= {"MaxRecvDataSegmentLength": _CHUNK, **more}
        self.login_step(pdu.keys(**wanted), stage=1, following=3)
        self.digests = (self.agreed.get("HeaderDigest") == "CRC32C", self.agreed.get("DataDigest") == "CRC32C")
        self.reader.digests = self.digests
        return self

    def login_step(self, text: bytes, *, stage: int, following: int | None) -> Pdu:
        """One Login Request and its answer. Raises LoginRefusedError."""
        self.socket.sendall(
            pdu.login(
                text, stage=stage, following=following, isid=self.isid, command_number=self.command_number,
                status_number=self.status_number,
            )
        )  # fmt: skip
        answer = self.receive()
        assert answer.opcode == Op.LOGIN_RESPONSE, hex(answer.opcode)
        status = answer.word(36) >> 16
        if status:
            raise LoginRefusedError(status)
        self.tsih = answer.word(12) & 0xFFFF
        for pair in answer.data.split(b"\0"):
            key, _, value = pair.decode().partition("=")
            if key:
                self.agreed[key] = value
        return answer

    # the full feature phase

    def next_tag(self) -> int:
        self._tag += 1
        return self._tag

    def command(
        self, cdb: bytes, *, lun: int = 0, expected_in: int = 0, data: bytes = b"", immediate_bytes: int = 0,
        timeout_s: float = TIMEOUT_S,
    ) -> Answer:  # fmt: skip
        """Send one command and see it through to its status."""
        tag, number = self.next_tag(), self.command_number
        self.command_number = number + 1 & NO_TAG
        flags = FINAL | 1 | (WRITE if data else 0) | (READ if expected_in else 0)
        self.socket.sendall(
            pdu.command(
                cdb, number=number, tag=tag, lun=lun, expected=len(data) or expected_in, flags=flags,
                status_number=self.status_number, data=data[:immediate_bytes], digests=self.digests,
            )
        )  # fmt: skip
        return self._finish(tag, lun, data, timeout_s)

    def _finish(self, tag: int, lun: int, data: bytes, timeout_s: float) -> Answer:
        read = bytearray()
        while True:
            answer = self.receive(timeout_s)
            if answer.tag != tag:
                assert answer.opcode in (Op.ASYNC, Op.NOP_IN), f"unasked: {answer}"
            elif answer.opcode == Op.R2T:
                self._send_data(answer, tag, lun, data)
            elif answer.opcode == Op.DATA_IN:
                start = answer.word(40)
                read[start : start + len(answer.data)] = answer.data
                if answer.flags & 1:
                    return Answer(answer.header[3], bytes(read), 0, answer.word(44))
            else:
                assert answer.opcode == Op.RESPONSE, f"{answer.opcode:#x} for a command"
                assert answer.header[2] == 0, f"response {answer.header[2]}"
                return Answer(answer.header[3], bytes(read), sense_of(answer.data), answer.word(44))

    def _send_data(self, asked: Pdu, tag: int, lun: int, data: bytes) -> None:
        offset, length = asked.word(40), asked.word(44)
        assert offset + length <= len(data), "more is asked for than there is"
        part = int(self.agreed.get("MaxRecvDataSegmentLength", 8192))
        for number, start in enumerate(range(offset, offset + length, part)):
            end = min(start + part, offset + length)
            self.socket.sendall(
                pdu.data_out(
                    data[start:end], tag=tag, transfer_tag=asked.word(20), number=number, offset=start, lun=lun,
                    final=end == offset + length, status_number=self.status_number, digests=self.digests,
                )
            )  # fmt: skip

    def send_text(self, text: bytes, *, transfer_tag: int = NO_TAG) -> Pdu:
        """A Text Request that is complete, and its answer."""
        number, tag = self.command_number, self.next_tag()
        self.command_number = number + 1 & NO_TAG
        words = {20: transfer_tag, 24: number, 28: self.status_number}
        self.socket.sendall(pdu.make(Op.TEXT, tag=tag, words=words, data=text, digests=self.digests))
        return self.receive()

    def manage(self, function: int, *, lun: int = 0, referenced: int = NO_TAG) -> int:
        """Task management, immediate; the response code."""
        words = {20: referenced, 24: self.command_number, 28: self.status_number}
        self.socket.sendall(
            pdu.make(
                Op.TASK_MANAGEMENT | pdu.IMMEDIATE, flags=FINAL | function, tag=self.next_tag(), lun=lun, words=words,
                digests=self.digests,
            )
        )  # fmt: skip
        answer = self.receive()
        assert answer.opcode == Op.TASK_MANAGEMENT_RESPONSE, hex(answer.opcode)
        return answer.header[2]

    def logout(self) -> Pdu:
        words = {24: self.command_number, 28: self.status_number}
        self.socket.sendall(pdu.make(Op.LOGOUT | pdu.IMMEDIATE, tag=self.next_tag(), words=words, digests=self.digests))
        return self.receive()

    def receive(self, timeout_s: float = TIMEOUT_S) -> Pdu:
        """The next PDU. Raises ConnectionEndedError, TimeoutError."""
        self.socket.settimeout(timeout_s)
        while not self._received:
            try:
                content = self.socket.recv(_CHUNK)
            except ConnectionError as error:
                raise ConnectionEndedError(str(error)) from error
            if not content:
                raise ConnectionEndedError("the target closed the connection")
            self._received.extend(self.reader.feed(content))
        found = self._received.popleft()
        self.max_command_number = found.word(32)
        if found.opcode != Op.R2T and (found.opcode != Op.DATA_IN or found.flags & 1):
            self.status_number = found.word(24) + 1 & NO_TAG
        return found

    # commands by name

    def ready(self, lun: int = 0, *, tries: int = 8) -> Answer:
        """TEST UNIT READY until no unit attention is left."""
        for _ in range(tries):
            answer = self.command(bytes(6), lun=lun)
            if answer.sense >> 16 != 6:
                break
        return answer

    def capacity(self, lun: int = 0) -> tuple[int, int]:
        """(blocks, bytes of a block), by READ CAPACITY (16)."""
        answer = self.command(b"\x9e\x10" + bytes(8) + struct.pack(">IH", 32, 0), lun=lun, expected_in=32)
        assert answer.good, answer
        last, block_bytes = struct.unpack_from(">QI", answer.data)
        return last + 1, block_bytes

    def read(self, block: int, count: int, block_bytes: int, *, lun: int = 0) -> Answer:
        return self.command(read_10(block, count), lun=lun, expected_in=count * block_bytes)

    def write(self, block: int, data: bytes, block_bytes: int, *, lun: int = 0) -> Answer:
        return self.command(write_10(block, len(data) // block_bytes), lun=lun, data=data)


def read_10(block: int, count: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, block, 0, count, 0)


def write_10(block: int, count: int) -> bytes:
    return struct.pack(">BBIBHB", 0x2A, 0, block, 0, count, 0)


def sense_of(segment: bytes) -> int:
    """Of the data segment of a SCSI Response: length, then sense data of fixed or descriptor format (SPC-4, 4.5)."""
    sense = segment[2:]
    if len(sense) < 4:
        return 0
    if sense[0] & 0x7F in (0x72, 0x73):
        return (sense[1] & 0xF) << 16 | sense[2] << 8 | sense[3]
    return (sense[2] & 0xF) << 16 | (sense[12] << 8 | sense[13] if len(sense) >= 14 else 0)
