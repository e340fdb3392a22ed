"""An initiator of the tests, without sockets: builds requests, reads what the target sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from construct import Struct

from blockrepl.block import Buffer
from blockrepl.chunks import Chunk, ChunkPool
from blockrepl.formats import iscsi
from blockrepl.formats.iscsi import NO_TAG, Opcode, padded
from blockrepl.frontends.iscsi.login import Request
from blockrepl.frontends.iscsi.negotiate import Parameters
from blockrepl.frontends.iscsi.pdu import Framing
from blockrepl.frontends.iscsi.session import Session, Surroundings
from tests.frontends.iscsi.fake import FakeDevice

TARGET = "iqn.2026-11.org.blockrepl:test"
INITIATOR = "iqn.1993-08.org.debian:01:abc"
LAYOUTS: dict[int, Struct] = {
    Opcode.NOP_IN: iscsi.nop_in, Opcode.SCSI_RESPONSE: iscsi.scsi_response, Opcode.TASK_RESPONSE: iscsi.task_response,
    Opcode.LOGIN_RESPONSE: iscsi.login_response, Opcode.TEXT_RESPONSE: iscsi.text_response,
    Opcode.DATA_IN: iscsi.data_in, Opcode.LOGOUT_RESPONSE: iscsi.logout_response, Opcode.R2T: iscsi.r2t,
    Opcode.ASYNC: iscsi.async_message, Opcode.REJECT: iscsi.reject,
}  # fmt: skip


class Answer:
    """One PDU of the target: its fields as attributes, ``kind`` and ``data``."""

    def __init__(self, kind: int, fields: Any, data: bytes) -> None:
        self.kind = Opcode(kind)
        self.fields = fields
        self.data = data

    def __getattr__(self, name: str) -> Any:
        return self.fields[name]

    def __repr__(self) -> str:
        shown = {key: value for key, value in self.fields.items() if key != "_io" and "reserved" not in key}
        return f"{self.kind.name}({shown}, {self.data[:32]!r})"


def parse_answers(raw: bytes, *, header_digest: bool = False, data_digest: bool = False) -> list[Answer]:
    """Everything a target sent, digests checked by the framing of the code."""
    framing = Framing()
    framing.header_digest, framing.data_digest, framing.max_data_bytes = header_digest, data_digest, (1 << 24) - 1
    chunk = Chunk(max(1, len(raw)), None)
    chunk.view[: len(raw)] = raw
    pdus: list[Any] = []
    assert framing.cut(chunk, 0, len(raw), pdus) == len(raw)
    found = []
    for pdu in pdus:
        assert pdu.intact
        kind = chunk.buffer[pdu.at] & 0x3F
        fields = LAYOUTS[kind].parse(bytes(chunk.view[pdu.at : pdu.at + 48]))
        found.append(Answer(kind, fields, bytes(chunk.view[pdu.data_at : pdu.data_end])))
    return found


class FakeStream:
    """What a session sends to. ``stuck`` True: the initiator takes nothing."""

    def __init__(self) -> None:
        self.sent = b""
        self.sends = 0
        self.queued_bytes = 0
        self.closed = False
        self.finished = False
        self.paused = False
        self.stuck = False

    def send(self, buffers: Sequence[Buffer], chunk: Chunk | None = None) -> None:
        self.sends += 1
        if not self.closed and not self.finished:
            raw = b"".join(buffers)
            self.sent += raw
            if self.stuck:
                self.queued_bytes += len(raw)
        if chunk is not None:
            chunk.release()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def finish(self) -> None:
        self.finished = True

    def close(self) -> None:
        self.closed = True


class Initiator:
    """Drives one `Session` over a `FakeDevice`."""

    def __init__(self, parameters: Parameters | None = None, *, discovery: bool = False, cmd_sn: int = 100) -> None:
        self.device = FakeDevice()
        self.stream = FakeStream()
        self.ended = 0
        self.resets = 0
        self.cmd_sn = cmd_sn
        self.tag = 0
        self.parameters = parameters or Parameters(
            initial_r2t=False, max_recv_bytes=1 << 16, max_send_bytes=1 << 16, first_burst_bytes=1 << 16
        )
        request = Request(
            isid=b"\x80\0\0\0\0\1", tsih=1, cid=7, cmd_sn=cmd_sn, stat_sn=500, initiator_name=INITIATOR,
            discovery=discovery, parameters=self.parameters,
        )  # fmt: skip
        surroundings = Surroundings(
            self.device, ChunkPool(), lambda: [("127.0.0.1:3260", 1), ("[::1]:3260", 2)], TARGET, 1, self._reset
        )  # fmt: skip
        self.session = Session(surroundings, request, self.stream, "peer", self._ended)
        self._out = Framing()
        self._out.header_digest, self._out.data_digest = self.parameters.header_digest, self.parameters.data_digest
        self._read = 0
        self.chunks: list[Chunk] = []

    def _ended(self, session: Session) -> None:
        self.ended += 1

    def _reset(self) -> None:
        self.resets += 1

    # requests

    def pdu(self, layout: Struct, data: bytes = b"", segments: bytes = b"", **fields: Any) -> bytes:
        """One request; CmdSN and tag are filled in, unless given, where the layout has them."""
        names = {item.name for item in layout.subcons}
        immediate = fields.pop("immediate", False)
        if "cmd_sn" in names and "cmd_sn" not in fields:
            fields["cmd_sn"] = self.cmd_sn & 0xFFFFFFFF
            if not immediate and not (layout is iscsi.nop_out and fields.get("tag") == NO_TAG):
                self.cmd_sn += 1
        if "tag" not in fields:
            self.tag += 1
            fields["tag"] = self.tag
        fields.setdefault("lun", 0)
        fields.setdefault("exp_stat_sn", 0)
        header = bytearray(layout.build({"ahs_words": len(segments) // 4, "data_bytes": len(data), **fields}))
        if immediate:
            header[0] |= iscsi.IMMEDIATE
        return b"".join(self._out.seal(bytes(header) + segments, [data] if data else []))

    def command(self, cdb: bytes, *, flags: int = 0x80, expected: int = 0, data: bytes = b"", **fields: Any) -> bytes:
        cdb = cdb.ljust(16, b"\0")
        return self.pdu(iscsi.scsi_command, data, flags=flags, expected_bytes=expected, cdb=cdb, **fields)

    def read(self, lba: int, blocks: int, *, expected: int | None = None, **fields: Any) -> bytes:
        size = blocks * 512 if expected is None else expected
        return self.command(read10(lba, blocks), flags=0xC0, expected=size, **fields)

    def write(self, lba: int, blocks: int, data: bytes = b"", *, final: bool = True, **fields: Any) -> bytes:
        flags = 0xA0 if final else 0x20
        fields.setdefault("expected", blocks * 512)
        return self.command(write10(lba, blocks), flags=flags, data=data, **fields)

    def data_out(
        self, tag: int, target_tag: int, data_sn: int, offset: int, data: bytes, *, final: bool = False
    ) -> bytes:  # fmt: skip
        return self.pdu(
            iscsi.data_out, data, flags=0x80 if final else 0, tag=tag, target_tag=target_tag, data_sn=data_sn,
            offset_bytes=offset,
        )  # fmt: skip

    # exchange

    def give(self, raw: bytes) -> list[Answer]:
        """Give the session bytes, whole PDUs; what it answers."""
        chunk = Chunk(max(1, len(raw)), None)
        chunk.view[: len(raw)] = raw
        self.chunks.append(chunk)
        self.session.received(chunk, 0, len(raw))
        return self.answers()

    def answers(self) -> list[Answer]:
        """What was sent since the last time."""
        raw = self.stream.sent[self._read :]
        self._read = len(self.stream.sent)
        return parse_answers(
            raw, header_digest=self.parameters.header_digest, data_digest=self.parameters.data_digest
        )  # fmt: skip

    def users(self) -> int:
        """How many uses of input chunks nobody has given back."""
        return sum(chunk.users - 1 for chunk in self.chunks)


def read10(lba: int, blocks: int) -> bytes:
    return b"\x28\0" + lba.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big") + b"\0"


def write10(lba: int, blocks: int) -> bytes:
    return b"\x2a\0" + lba.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big") + b"\0"


def login_request(data: bytes = b"", **fields: Any) -> tuple[bytes, bytes]:
    """Header and data of a login request, from the security to the full feature phase unless told otherwise."""
    values = {
        "opcode": Opcode.LOGIN_REQUEST | iscsi.IMMEDIATE, "flags": 0x81, "version_max": 0, "version_min": 0,
        "data_bytes": len(data), "isid": b"\x80\0\0\0\0\1", "tsih": 0, "tag": 1, "cid": 7, "cmd_sn": 100,
        "exp_stat_sn": 500,
    }  # fmt: skip
    return iscsi.login_request.build({**values, **fields}), data


def login_bytes(data: bytes = b"", **fields: Any) -> bytes:
    """The same as it goes over the wire."""
    header, body = login_request(data, **fields)
    return header + body + bytes(padded(len(body)) - len(body))
