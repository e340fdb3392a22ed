"""Ill-meaning initiators against the sessions of a target, case by case from seeds; an honest one beside them.

After every case: no exception, every byte sent is a PDU that a target may send, every chunk is back, and the honest
initiator, whose session lives through all cases, is answered.
"""

from __future__ import annotations

import logging
from random import Random

from tests.iscsi import conversations, pdu
from tests.iscsi.pdu import Op, Reader
from tests.iscsi.rig import BLOCK_BYTES, TARGET, Link, Rig

HONEST = "iqn.2026-11.org.blockrepl.test:honest"
HONEST_LUN = 51
_PATTERN_BLOCK = 5000
_SETTLE_ROUNDS = 1000
_PEAK_BYTES = 32 << 20  # of receive buffers that one case may hold


class CaseError(AssertionError):
    """What a case did that must not happen; ``seed`` names it."""


class Complaints(logging.Handler):
    """What the code under test logs as a mistake of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(logging.Formatter().format(record))


class Honest:
    """A session that does all by the letter, and may not notice that others do not."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._contents = bytes(BLOCK_BYTES)
        self._log_in()
        self.write(b"honest" * 64)

    def _log_in(self) -> None:
        self._link, self._reader = Link(self._rig), Reader()
        self._number, self._status_number = 1, 0
        text = pdu.keys(InitiatorName=HONEST, TargetName=TARGET)
        self._link.deliver(pdu.login(text))
        (answer,) = self._reader.feed(self._link.wire.taken())
        assert answer.opcode == Op.LOGIN_RESPONSE
        assert not answer.word(36) >> 16, "the honest initiator may not log in"

    def check(self) -> None:
        """The disk is there, and what was written last is on it."""
        if self._link.wire.ended:  # a cold reset ends all sessions, his too
            self._log_in()
        read = b"\x28\0" + _PATTERN_BLOCK.to_bytes(4, "big") + b"\0\0\1\0"
        assert self._command(read, expected=BLOCK_BYTES) == self._contents, "the honest initiator's data changed"

    def write(self, content: bytes) -> None:
        self._contents = content.ljust(BLOCK_BYTES, b"!")[:BLOCK_BYTES]
        cdb = b"\x2a\0" + _PATTERN_BLOCK.to_bytes(4, "big") + b"\0\0\1\0"
        self._command(cdb, data=self._contents)

    def _command(self, cdb: bytes, *, expected: int = 0, data: bytes = b"") -> bytes:
        """A command again until no unit attention is in its way: others may reset what they like."""
        for _ in range(16):
            status, content = self._once(cdb, expected, data)
            if status == 0:
                return content
            assert status == 2, f"status {status:#x} for the honest initiator"
        raise AssertionError("only unit attentions for the honest initiator")

    def _once(self, cdb: bytes, expected: int, data: bytes) -> tuple[int, bytes]:
        flags = pdu.FINAL | 1 | (pdu.WRITE if data else pdu.READ)
        self._link.deliver(
            pdu.command(
                cdb, number=self._number, tag=self._number, lun=HONEST_LUN, expected=expected or len(data), flags=flags,
                status_number=self._status_number, data=data,
            )
        )  # fmt: skip
        self._number += 1
        content = b""
        for _ in range(_SETTLE_ROUNDS):
            for answer in self._reader.feed(self._link.wire.taken()):
                if answer.opcode == Op.DATA_IN:
                    content += answer.data
                    if answer.flags & 1:
                        return answer.header[3], content
                elif answer.opcode == Op.RESPONSE:
                    return answer.header[3], content
                else:
                    assert answer.opcode in (Op.ASYNC, Op.NOP_IN)
            if not self._rig.device.complete():
                break
        raise AssertionError("the honest initiator got no answer")


class Fuzzer:
    """One target that lives through many cases."""

    def __init__(self, seed: int = 0) -> None:
        self.complaints = Complaints()
        logging.getLogger("blockrepl").addHandler(self.complaints)
        self.rig = Rig(Random(seed))
        self.honest = Honest(self.rig)
        self.answers: dict[int, int] = {}  # PDUs received, by opcode: what the conversations reach

    def close(self) -> None:
        logging.getLogger("blockrepl").removeHandler(self.complaints)

    def case(self, random: Random) -> None:
        """One conversation. Raises CaseError."""
        try:
            link = Link(self.rig)
            self._converse(link, random)
            link.lose()
            self._quiet()
            self.honest.check()
            self._quiet()
            assert not self.rig.pool.lent_bytes, f"{self.rig.pool.lent_bytes} bytes of receive buffers are not back"
            assert self.rig.pool.peak_bytes <= _PEAK_BYTES, f"{self.rig.pool.peak_bytes} bytes were held"
            assert len(self.rig.sessions) == 1, f"{len(self.rig.sessions)} sessions are left, one is there"
            self.rig.pool.peak_bytes = 0
            assert not self.complaints.records, self.complaints.records.pop()
        except Exception as error:
            raise CaseError(f"{type(error).__name__}: {error}") from error

    def _converse(self, link: Link, random: Random) -> None:
        me = conversations.somebody(random, TARGET, BLOCK_BYTES)
        conversation = conversations.talk(me)
        reader = Reader()
        try:
            content = next(conversation)
            while not link.wire.ended:
                link.wire.stuck = random.random() < 0.1
                for piece in conversations.pieces(random, content):
                    link.deliver(piece)
                    if random.random() < 0.2:
                        self.rig.device.complete()
                if link.wire.stuck:
                    self._quiet()
                answers = self._answers(link, reader)
                content = conversation.send(answers)
                reader.digests = me.digests
        except StopIteration:
            pass
        self._answers(link, reader)

    def _answers(self, link: Link, reader: Reader) -> list[pdu.Pdu]:
        found = []
        for _ in range(_SETTLE_ROUNDS):
            content = link.wire.taken()
            for answer in reader.feed(content):
                self.answers[answer.opcode] = self.answers.get(answer.opcode, 0) + 1
                found.append(answer)
            if content and not link.wire.closed:
                link.connection.drained()
            if not self.rig.device.complete() and not content:
                return found
        raise AssertionError("it does not come to rest")

    def _quiet(self) -> None:
        for _ in range(_SETTLE_ROUNDS):
            if not self.rig.device.complete():
                return
        raise AssertionError("the device does not come to rest")


def campaign(first: int, count: int, *, seed: int = 0) -> Fuzzer:
    """Cases by number, all against one target. Raises CaseError that says which one, and how to run it again."""
    fuzzer = Fuzzer(seed)
    try:
        for number in range(first, first + count):
            try:
                fuzzer.case(Random(number))
            except CaseError as error:
                raise CaseError(f"case {number}: {error}  (scripts/fuzz --from {number} --cases 1)") from error
    finally:
        fuzzer.close()
    return fuzzer
