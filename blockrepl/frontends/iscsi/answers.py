"""PDUs that a target sends in the full feature phase, and the numbers they carry.

Responses to many tasks are built in one pass: words of all headers in one list, one call to struct. Source: RFC 7143,
4.2.2 (StatSN, CmdSN window), 11.4 and 11.7 (responses, Data-In), 11.4.5 (residuals).
"""

from __future__ import annotations

from collections.abc import Sequence

from construct import Struct

from blockrepl.block import Buffer
from blockrepl.formats import iscsi
from blockrepl.formats.iscsi import (
    BHS_BYTES,
    DATA_IN_GOOD,
    NO_TAG,
    R2T_WORD,
    RESPONSE_GOOD,
    SENSE_LENGTH,
    WORDS,
    DataInFlag,
    Opcode,
    ResponseFlag,
    first_word,
    pack_headers,
)
from blockrepl.frontends.iscsi.negotiate import Parameters
from blockrepl.frontends.iscsi.pdu import PADDING, Framing
from blockrepl.frontends.iscsi.task import Task

WINDOW = 128  # commands in flight that a session may have, immediate ones apart
MASK = 0xFFFFFFFF


class Answers:
    """Builds what leaves one connection. PDUs must be sent in the order in which they were built.

    Invariant: exp_cmd_sn <= max_cmd_sn + 1 <= exp_cmd_sn + WINDOW, in serial arithmetic of 32 bits.
    """

    def __init__(self, parameters: Parameters, framing: Framing, cmd_sn: int, stat_sn: int) -> None:
        self.exp_cmd_sn = cmd_sn
        self.max_cmd_sn = cmd_sn + WINDOW - 1 & MASK
        self.stat_sn = stat_sn
        self._parameters = parameters
        self._framing = framing
        self._plain = not (framing.header_digest or framing.data_digest)
        self._words: list[int] = []
        self._data: list[Sequence[Buffer]] = []  # of each header in _words

    @property
    def window_closed(self) -> bool:
        """No command may come but immediate ones."""
        return self.exp_cmd_sn == self.max_cmd_sn + 1 & MASK

    # one PDU of a rarer kind

    def numbered(
        self, layout: Struct, data: bytes = b"", *, advance: bool = True, **fields: int | bytes
    ) -> list[Buffer]:
        """A PDU with a StatSN of its own, or (``advance`` False) only naming the next."""
        header = layout.build(
            {
                **fields, "data_bytes": len(data), "stat_sn": self.stat_sn, "exp_cmd_sn": self.exp_cmd_sn,
                "max_cmd_sn": self.max_cmd_sn,
            }
        )  # fmt: skip
        if advance:
            self.stat_sn = self.stat_sn + 1 & MASK
        return self._framing.seal(header, [data] if data else ())

    def r2t(
        self, lun: int, tag: int, target_tag: int, r2t_sn: int, offset_bytes: int, length_bytes: int
    ) -> list[Buffer]:
        """A request for Data-Out."""
        address = iscsi.lun_address(lun) >> 32
        header = WORDS.pack(
            R2T_WORD, 0, address, 0, tag, target_tag, self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn, r2t_sn,
            offset_bytes, length_bytes,
        )  # fmt: skip
        return self._framing.seal(header)

    # tasks

    def task(self, task: Task) -> None:
        """Append the answer to a completed task; `take` gives it."""
        expected_in, data_in = task.expected_in_bytes, task.data_in
        if not task.status and not task.sense:
            if not expected_in and not data_in and task.needed_out_bytes == task.expected_out_bytes:
                self._words += (
                    RESPONSE_GOOD, 0, 0, 0, task.tag, 0, self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn, 0, 0, 0,
                )  # fmt: skip
                self._data.append(())
                self.stat_sn = self.stat_sn + 1 & MASK
                return
            if len(data_in) == 1 and not task.expected_out_bytes:
                size = len(data_in[0])
                if size == expected_in and size <= self._parameters.max_send_bytes and not size & 3 and size:
                    self._words += (
                        DATA_IN_GOOD, size, 0, 0, task.tag, NO_TAG, self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn,
                        0, 0, 0,
                    )  # fmt: skip
                    self._data.append(data_in)
                    self.stat_sn = self.stat_sn + 1 & MASK
                    return
        self._any_task(task)

    def take(self) -> list[Buffer]:
        """The buffers of every task appended since the last time."""
        data = self._data
        if not data:
            return []
        headers = pack_headers(len(data), self._words)
        self._words = []
        self._data = []
        out: list[Buffer] = []
        view = memoryview(headers)
        if not self._plain:
            for index, buffers in enumerate(data):
                out += self._framing.seal(view[index * BHS_BYTES : (index + 1) * BHS_BYTES], buffers)
            return out
        start = end = 0
        for buffers in data:
            end += BHS_BYTES
            if buffers:
                out.append(view[start:end])
                out += buffers
                start = end
                if (size := sum(map(len, buffers))) & 3:
                    out.append(PADDING[size & 3])
        if end > start:
            out.append(view[start:end] if start else headers)
        return out

    def _any_task(self, task: Task) -> None:
        """Data-In by segments and bursts, then status: in the last Data-In where it is good, else in a response."""
        total = sum(map(len, task.data_in))
        sent = min(total, task.expected_in_bytes)
        in_flag, in_residual = _residual(task.expected_in_bytes, total)
        bidirectional = task.expected_in_bytes and task.expected_out_bytes
        with_status = not task.status and not task.sense and sent > 0 and not bidirectional
        pdus = 0
        at = 0
        limits = self._parameters
        pieces = _Pieces(task.data_in)
        while at < sent:
            burst_left = limits.max_burst_bytes - at % limits.max_burst_bytes
            size = min(limits.max_send_bytes, burst_left, sent - at)
            last = at + size == sent
            flags = DataInFlag.FINAL if last or size == burst_left else 0
            residual = 0
            if last and with_status:
                flags |= DataInFlag.STATUS | in_flag
                residual = in_residual
            self._append(
                first_word(Opcode.DATA_IN, flags), task.tag, NO_TAG, pieces.take(size), size, pdus, at, residual
            )
            if last and with_status:
                self.stat_sn = self.stat_sn + 1 & MASK
            pdus += 1
            at += size
        if not with_status:
            self._response(task, pdus, total)

    def _response(self, task: Task, data_pdus: int, total_in: int) -> None:
        flags = int(ResponseFlag.FINAL)
        bidi_residual = residual = 0
        in_flag, in_residual = _residual(task.expected_in_bytes, total_in)
        if task.expected_out_bytes or task.needed_out_bytes:
            out_flag, residual = _residual(task.expected_out_bytes, task.needed_out_bytes)
            flags |= out_flag
            if task.expected_in_bytes:
                bidi_residual = in_residual
                flags |= in_flag << 2
        else:
            flags |= in_flag
            residual = in_residual
        data: list[Buffer] = []
        if task.sense:
            data.append(SENSE_LENGTH.pack(len(task.sense)) + task.sense)
        word = first_word(Opcode.SCSI_RESPONSE, flags, 0, task.status)
        size = len(data[0]) if data else 0
        self._append(word, task.tag, 0, data, size, data_pdus, bidi_residual, residual)
        self.stat_sn = self.stat_sn + 1 & MASK

    def _append(
        self,
        word: int,
        tag: int,
        target_tag: int,
        data: Sequence[Buffer],
        size: int,
        data_sn: int,
        offset: int,
        last: int,
    ) -> None:
        self._words += (
            word, size, 0, 0, tag, target_tag, self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn, data_sn, offset, last,
        )  # fmt: skip
        self._data.append(data)


class _Pieces:
    """Buffers, cut anew."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._views = [memoryview(buffer) for buffer in buffers]
        self._index = 0
        self._at = 0

    def take(self, size: int) -> list[Buffer]:
        """The next ``size`` bytes; there are as many."""
        out: list[Buffer] = []
        while size:
            view = self._views[self._index]
            piece = view[self._at : self._at + size]
            if piece:
                out.append(piece)
            size -= len(piece)
            self._at += len(piece)
            if self._at == len(view):
                self._index += 1
                self._at = 0
        return out


def _residual(expected: int, actual: int) -> tuple[int, int]:
    """Flag and count (RFC 7143, 11.4.5)."""
    if actual < expected:
        return ResponseFlag.UNDERFLOW, expected - actual
    if actual > expected:
        return ResponseFlag.OVERFLOW, min(actual - expected, MASK)
    return 0, 0
