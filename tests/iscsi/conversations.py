"""Initiators that mean ill: conversations made of a seed. Each says what it sends next, knowing what it got so far.

A conversation is a generator: it yields bytes and is sent the PDUs that came in answer. Most log in properly first,
so that what follows reaches the depth of the session; then they lie in one field, or in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.iscsi import pdu
from tests.iscsi.pdu import FINAL, NO_TAG, READ, WRITE, Op, Pdu

Talk = Generator[bytes, list[Pdu], None]

CORPUS = Path(__file__).with_name("corpus.txt")
MAX_SEGMENT_BYTES = 0xFFFFFF
_BLOCKS = 16  # of a volume: what is written lies in these, so that conversations meet
_NUMBERS = (0, 1, 2, 3, 0x7F, 0xFF, 0x1000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_KEYS = (
    "HeaderDigest", "DataDigest", "MaxConnections", "SendTargets", "TargetName", "InitiatorName", "TargetAlias",
    "InitiatorAlias", "TargetAddress", "TargetPortalGroupTag", "InitialR2T", "ImmediateData",
    "MaxRecvDataSegmentLength", "MaxBurstLength", "FirstBurstLength", "DefaultTime2Wait", "DefaultTime2Retain",
    "MaxOutstandingR2T", "DataPDUInOrder", "DataSequenceInOrder", "ErrorRecoveryLevel", "SessionType", "AuthMethod",
    "CHAP_A", "CHAP_I", "CHAP_C", "CHAP_N", "CHAP_R", "OFMarker", "IFMarker", "OFMarkInt", "IFMarkInt", "TaskReporting",
    "X-org.blockrepl.test", "iSCSIProtocolLevel", "RDMAExtensions", "",
)  # fmt: skip
_VALUES = (
    "", "Yes", "No", "None", "CRC32C", "CRC32C,None", "None,CRC32C,CRC32C", "Discovery", "Normal", "All", "0", "1",
    "-1", "511", "512", "8192", "16777215", "16777216", "4294967296", "99999999999999999999", "0x10", "0x", "0b",
    "0bAAA", "0x" + "ab" * 600, "0b" + "QUJD" * 400, "1~2", "Reject", "Irrelevant", "NotUnderstood", "?", "CHAP",
    "CHAP,None", "5", "5,6,7,8", "7", "yes", "Yes,No", "iqn.2026-11.org.blockrepl:other",
    "a" * 255, "a" * 256, "a" * 4000, "\u00e4",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A PDU that a real initiator sent: header with AHS, and its data (or so many zeros)."""

    head: bytes
    data: bytes


def corpus() -> list[Sample]:
    """What libiscsi, QEMU and the kernel's initiator send: header, length of the data, data where it is short."""
    samples = []
    for line in CORPUS.read_text().splitlines():
        head, length, *data = line.split()
        content = bytes.fromhex(data[0]) if data else b""
        samples.append(Sample(bytes.fromhex(head), content.ljust(int(length), b"\0")))
    return samples


SAMPLES = corpus()


@dataclass
class Initiator:
    """What a conversation knows of its session."""

    random: Random
    target: str
    block_bytes: int
    lun: int = 0
    command_number: int = 1
    expected_number: int = 1  # the target's ExpCmdSN
    max_number: int = 1
    status_number: int = 0
    digests: tuple[bool, bool] = (False, False)
    tag: int = 0
    asked: list[Pdu] = field(default_factory=list)  # R2Ts not answered
    text_tag: int = NO_TAG
    logged_in: bool = False

    def note(self, answers: list[Pdu]) -> None:
        for answer in answers:
            if answer.opcode == Op.R2T:
                self.asked.append(answer)
            if answer.opcode not in (Op.R2T,):
                self.status_number = answer.word(24) + 1 & NO_TAG
            self.expected_number, self.max_number = answer.word(28), answer.word(32)
            if answer.opcode == Op.TEXT_RESPONSE:
                self.text_tag = answer.word(20)
            if answer.opcode == Op.LOGIN_RESPONSE and answer.flags & 0x83 == 0x83 and not answer.word(36) >> 16:
                self.logged_in = True

    def next_tag(self) -> int:
        self.tag += 1
        return self.tag

    def next_number(self) -> int:
        number = self.command_number
        self.command_number = number + 1 & NO_TAG
        return number

    def number(self, usual: int) -> int:
        """``usual`` most of the time; else beside it, or anything."""
        roll = self.random.random()
        if roll < 0.85:
            return usual
        if roll < 0.95:
            return usual + self.random.choice((-2, -1, 1, 2, 64, 128, 1 << 31)) & NO_TAG
        return self.random.choice(_NUMBERS)

    def bytes(self, length: int) -> bytes:
        return self.random.randbytes(length)


def somebody(random: Random, target: str, block_bytes: int) -> Initiator:
    return Initiator(random, target, block_bytes, lun=random.choice((0, 0, 0, 0, 1, 2, 255, 0x4001, 0xC101)))


def talk(me: Initiator) -> Talk:
    """One whole conversation."""
    random = me.random
    greet = random.choices((_proper_login, _strange_login, _noise, _no_login), (80, 14, 3, 3))[0]
    yield from greet(me)
    if me.logged_in or random.random() < 0.1:
        for _ in range(random.randint(1, 6)):
            yield from random.choices(_ACTS, _WEIGHTS)[0](me)
    if random.random() < 0.2:  # half a PDU, and then nothing more
        whole = _command(me)
        yield whole[: random.randrange(len(whole))]


def _say(me: Initiator, content: bytes) -> Talk:
    me.note((yield content))


# login


def _proper_login(me: Initiator) -> Talk:
    """In one or two stages, with parameters of every size."""
    random = me.random
    parameters: dict[str, str | int] = {
        "MaxRecvDataSegmentLength": random.choice((512, 8192, 262144)),
        "FirstBurstLength": random.choice((512, 4096, 65536, 262144)),
        "MaxBurstLength": random.choice((512, 8192, 262144, 16776192)),
        "InitialR2T": random.choice(("Yes", "No")),
        "ImmediateData": random.choice(("Yes", "No")),
        "MaxOutstandingR2T": random.choice((1, 1, 4, 65535)),
    }
    wanted = (random.random() < 0.2, random.random() < 0.2)
    for key, each in zip(("HeaderDigest", "DataDigest"), wanted, strict=True):
        if each:
            parameters[key] = random.choice(("CRC32C", "CRC32C,None"))
    names: dict[str, str | int] = {"InitiatorName": f"iqn.2026-11.org.blockrepl.test:ill{random.randint(0, 3)}"}
    names |= {"SessionType": "Discovery"} if random.random() < 0.05 else {"TargetName": me.target}
    isid = b"\x80\0\0\0\0" + bytes([random.randint(2, 9)])
    if random.random() < 0.3:
        text = pdu.keys(**names, AuthMethod=random.choice(("None", "CHAP,None")))
        yield from _say(me, pdu.login(text, stage=0, following=1, isid=isid))
        names = {}
    yield from _say(me, pdu.login(pdu.keys(**names, **parameters), isid=isid, status_number=me.status_number))
    if me.logged_in:
        me.digests = wanted


def _text(random: Random) -> bytes:
    """Keys that are right, wrong, twice there, contradict each other, or are no keys at all."""
    parts = []
    for _ in range(random.choice((0, 1, 2, 5, 40))):
        key, value = random.choice(_KEYS), random.choice(_VALUES)
        roll = random.random()
        if roll < 0.05:
            key = "k" * random.choice((63, 64, 65, 500, 8000))
        elif roll < 0.1:
            value = "v" * random.choice((255, 256, 8191, 16000))
        elif roll < 0.15:
            parts.append(random.randbytes(random.choice((1, 20, 300))))
            continue
        parts.append(f"{key}{random.choice(('=', '=', '=', '', '=='))}{value}".encode())
    text = b"\0".join(parts)
    return text + b"\0" * random.choice((1, 1, 1, 0, 4, 5000))


def _strange_login(me: Initiator) -> Talk:
    """Stages out of order, flags that exclude each other, text that never ends, keys of all kinds."""
    random = me.random
    first = pdu.keys(InitiatorName="iqn.2026-11.org.blockrepl.test:ill", TargetName=me.target)
    for turn in range(random.choice((1, 2, 3, 12, 40))):
        text = (first if turn == 0 and random.random() < 0.8 else b"") + _text(random)
        request = bytearray(
            pdu.login(
                text, stage=random.randrange(4), following=random.choice((None, 0, 1, 2, 3)),
                tsih=random.choice((0, 0, 0, 1, 0xFFFF)), command_number=me.number(1), status_number=me.number(0),
                tag=random.choice((1, 1, 1, NO_TAG)), more=random.random() < 0.3,
            )
        )  # fmt: skip
        if random.random() < 0.2:
            request[random.randrange(pdu.BHS_BYTES)] = random.randrange(256)
        yield from _say(me, bytes(request))


def _noise(me: Initiator) -> Talk:
    """Another protocol, or none."""
    words = (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(600), b"NBDMAGICIHAVEOPT" + bytes(200))
    yield from _say(me, me.random.choice((*words, me.bytes(me.random.choice((1, 47, 48, 49, 5000))))))


def _no_login(me: Initiator) -> Talk:
    """As if logged in already."""
    me.logged_in = me.random.random() < 0.5
    yield from _say(me, _command(me))


# the full feature phase


def _cdb(me: Initiator) -> tuple[bytes, int, int]:
    """(CDB, Data-Out bytes, Data-In bytes) that belong together."""
    random, block = me.random, me.block_bytes
    at, count = random.randrange(_BLOCKS), random.choice((1, 1, 2, 8))
    short, long = at.to_bytes(4, "big"), at.to_bytes(8, "big")
    size = count * block
    return random.choice(
        (
            (b"\x2a\0" + short + b"\0" + count.to_bytes(2, "big") + b"\0", size, 0),
            (b"\x8a\0" + long + count.to_bytes(4, "big") + b"\0\0", size, 0),
            (b"\x28\0" + short + b"\0" + count.to_bytes(2, "big") + b"\0", 0, size),
            (b"\x88\0" + long + count.to_bytes(4, "big") + b"\0\0", 0, size),
            (b"\x89\0" + long + b"\0\0\0\x01\0\0", 2 * block, 0),
            (b"\x41\0" + short + b"\0" + count.to_bytes(2, "big") + b"\0", block, 0),
            (b"\x42" + bytes(6) + b"\0\x18\0", 24, 0),
            (b"\x12\x01\x83\0\xff\0", 0, 255),
            (b"\xa0" + bytes(5) + b"\0\0\x10\0\0\0", 0, 4096),
            (b"\x5f\0\0\0\0\0\0\0\x18\0", 24, 0),
            (b"\x5e\x03\0\0\0\0\0\x20\0\0", 0, 8192),
            (b"\x83\0" + bytes(8) + b"\0\0\0\x40\0\0", 64, 0),
            (b"\x15\x10\0\0\x18\0", 24, 0),
            (b"\x35" + bytes(9), 0, 0),
            (bytes(6), 0, 0),
        )
    )


def _any_cdb(me: Initiator) -> tuple[bytes, int, int]:
    """A CDB that nobody means, but never one that writes far away or for long."""
    random = me.random
    cdb = bytearray(_cdb(me)[0].ljust(16, b"\0") if random.random() < 0.5 else me.bytes(16))
    for _ in range(random.randint(0, 3)):
        cdb[random.randrange(16)] = random.choice((0, 1, 0x7F, 0xFF, random.randrange(256)))
    return bytes(cdb), random.choice((0, 0, 8, 24, 512, 4096)), random.choice((0, 0, 36, 512))


def _command(me: Initiator, *, cdb: tuple[bytes, int, int] | None = None) -> bytes:
    """A command as it should be, nearly always."""
    random = me.random
    content, out_bytes, in_bytes = cdb or _cdb(me)
    immediate = random.choice((0, out_bytes, out_bytes // 2, 512))
    expected = out_bytes or in_bytes
    if random.random() < 0.1:
        expected = random.choice((0, 1, expected + 1, expected * 2, 1 << 24, 0xFFFFFFFF))
    flags = random.randrange(6) | (WRITE if out_bytes else 0) | (READ if in_bytes else 0)
    if random.random() < 0.1:
        flags = random.randrange(256)
    final = 0 if out_bytes > immediate and random.random() < 0.3 else FINAL
    return pdu.command(
        content, number=me.number(me.next_number()), tag=me.number(me.next_tag()), lun=me.lun, expected=expected,
        flags=flags | final, status_number=me.number(me.status_number), data=me.bytes(min(immediate, 1 << 16)),
        immediate=random.random() < 0.05, digests=me.digests,
    )  # fmt: skip


def _commands(me: Initiator) -> Talk:
    """Several at once, in order, out of it, or twice."""
    batch = [_command(me) for _ in range(me.random.randint(1, 6))]
    if me.random.random() < 0.3:
        me.random.shuffle(batch)
    if me.random.random() < 0.2:
        batch.append(batch[0])
    yield from _say(me, b"".join(batch))
    if me.asked:
        yield from _data(me)


def _strange_command(me: Initiator) -> Talk:
    yield from _say(me, _command(me, cdb=_any_cdb(me)))
    if me.asked and me.random.random() < 0.7:
        yield from _data(me)


def _data(me: Initiator) -> Talk:
    """Data-Out: for an R2T as it should be, or with a wrong number, place, length, tag or end; again; or for nobody."""
    random = me.random
    asked = me.asked.pop(0) if me.asked else None
    tag = asked.tag if asked else me.number(me.tag)
    transfer_tag = asked.word(20) if asked else random.choice((NO_TAG, 0, 1, 2, 77))
    offset, length = (asked.word(40), min(asked.word(44), 1 << 18)) if asked else (0, 4096)
    part = random.choice((512, 8192, 1 << 18))
    out = []
    for number, start in enumerate(range(0, length, part)):
        end = min(start + part, length)
        size = end - start if random.random() < 0.95 else random.choice((0, end - start + 1, end - start + 4096))
        out.append(
            pdu.data_out(
                me.bytes(size), tag=me.number(tag), transfer_tag=me.number(transfer_tag), number=me.number(number),
                offset=me.number(offset + start), lun=me.lun, final=(end == length) ^ (random.random() < 0.03),
                status_number=me.status_number, digests=me.digests,
            )
        )  # fmt: skip
    if out and random.random() < 0.1:
        out.append(random.choice(out))
    if random.random() < 0.05:
        random.shuffle(out)
    yield from _say(me, b"".join(out))


def _manage(me: Initiator) -> Talk:
    """Task management of every kind, for tasks that are there and others."""
    random = me.random
    words = {20: me.number(me.tag), 24: me.number(me.command_number), 28: me.status_number, 32: me.number(1)}
    yield from _say(
        me,
        pdu.make(
            Op.TASK_MANAGEMENT | random.choice((pdu.IMMEDIATE, 0)), flags=FINAL | random.choice((*range(10), 127)),
            tag=me.number(me.next_tag()), lun=random.choice((me.lun, 0, 1, 0xFFFF)), words=words, digests=me.digests,
        ),
    )  # fmt: skip


def _negotiate(me: Initiator) -> Talk:
    """Text requests: complete, never complete, with tags of nobody."""
    random = me.random
    for _ in range(random.choice((1, 1, 3, 30))):
        flags = random.choice((FINAL, FINAL, FINAL, 0x40, 0, 0xC0))
        words = {20: random.choice((NO_TAG, me.text_tag, 5)), 24: me.number(me.next_number()), 28: me.status_number}
        text = random.choice((b"SendTargets=All\0", b"SendTargets=\0", b"", _text(random)))
        tag = me.number(me.next_tag())
        yield from _say(me, pdu.make(Op.TEXT, flags=flags, tag=tag, words=words, data=text, digests=me.digests))


def _ping(me: Initiator) -> Talk:
    """NOP-Out: asking, answering what nobody asked, with much data."""
    random = me.random
    words = {20: random.choice((NO_TAG, NO_TAG, 0, 9)), 24: me.number(me.command_number), 28: me.status_number}
    tag = random.choice((me.next_tag(), NO_TAG))
    content = me.bytes(random.choice((0, 4, 100, 8192)))
    opcode = Op.NOP_OUT | random.choice((pdu.IMMEDIATE, pdu.IMMEDIATE, 0))
    yield from _say(me, pdu.make(opcode, tag=tag, words=words, data=content, digests=me.digests))


def _other(me: Initiator) -> Talk:
    """SNACK, logout, login in the middle, opcodes of targets and of nobody."""
    random = me.random
    opcode = random.choice(
        (Op.SNACK, Op.LOGOUT, Op.LOGOUT | pdu.IMMEDIATE, Op.LOGIN | pdu.IMMEDIATE, random.randrange(256))
    )
    words = {at: random.choice((*_NUMBERS, me.command_number)) for at in (20, 36, 40, 44)}
    words |= {24: me.number(me.command_number), 28: me.status_number}
    flags = random.choice((FINAL, FINAL | 1, FINAL | 2, 0, random.randrange(256)))
    content = me.bytes(random.choice((0, 0, 10, 512)))
    tag = me.number(me.next_tag())
    yield from _say(me, pdu.make(opcode, flags=flags, tag=tag, words=words, data=content, digests=me.digests))


def _extended(me: Initiator) -> Talk:
    """Additional header segments: long CDBs, bidirectional lengths, types of nobody, lengths that lie."""
    random = me.random
    kind = random.choice((1, 1, 2, 0, 0x7F))
    content = me.bytes(random.choice((1, 5, 17, 245, 1000)))
    length = random.choice((len(content), len(content), 0, 0xFFFF))
    ahs = length.to_bytes(2, "big") + bytes([kind]) + content
    ahs = (ahs + bytes(-len(ahs) % 4))[:1020]
    whole = pdu.make(
        Op.COMMAND, flags=FINAL | READ | 1, tag=me.next_tag(), lun=me.lun, ahs=ahs, tail=b"\x7f".ljust(16, b"\0"),
        words={20: 512, 24: me.next_number(), 28: me.status_number}, digests=me.digests,
    )  # fmt: skip
    yield from _say(me, whole)


def _length_that_lies(me: Initiator) -> Talk:
    """A header that announces more than may be sent, or than ever comes."""
    random = me.random
    whole = bytearray(_command(me))
    whole[5:8] = random.choice((1, 100, 1 << 18, (1 << 18) + 1, 1 << 20, MAX_SEGMENT_BYTES)).to_bytes(3, "big")
    if random.random() < 0.3:
        whole[4] = random.choice((1, 64, 255))
    yield from _say(me, bytes(whole))
    for _ in range(random.randrange(4)):
        yield from _say(me, me.bytes(random.choice((1, 1000, 65536))))


def _recorded(me: Initiator) -> Talk:
    """What a real initiator sent, with a few bytes or bits of it wrong."""
    random = me.random
    for _ in range(random.randint(1, 4)):
        sample = random.choice(SAMPLES)
        head = bytearray(sample.head)
        head[24:28] = me.number(me.next_number()).to_bytes(4, "big")
        head[28:32] = me.status_number.to_bytes(4, "big")
        head[16:20] = me.number(me.next_tag()).to_bytes(4, "big")
        head[8:10] = me.lun.to_bytes(2, "big")
        data = bytearray(sample.data[: 1 << 16])
        for _ in range(random.choice((0, 1, 1, 2, 8))):
            at = random.randrange(len(head) + min(len(data), 64))
            where, at = (head, at) if at < len(head) else (data, at - len(head))
            where[at] = random.choice((where[at] ^ 1 << random.randrange(8), 0, 0xFF, random.randrange(256)))
        yield from _say(me, pdu.seal(bytes(head), bytes(data), me.digests))
        if me.asked and random.random() < 0.8:
            yield from _data(me)


def _wrong_digest(me: Initiator) -> Talk:
    whole = bytearray(_command(me))
    whole[me.random.randrange(pdu.BHS_BYTES, len(whole)) if len(whole) > pdu.BHS_BYTES else 20] ^= 0x10
    yield from _say(me, bytes(whole))


_ACTS: tuple[Callable[[Initiator], Talk], ...] = (
    _commands, _strange_command, _data, _manage, _negotiate, _ping, _other, _extended, _length_that_lies, _recorded,
    _wrong_digest,
)  # fmt: skip
_WEIGHTS = (20, 12, 10, 7, 5, 5, 6, 5, 5, 20, 5)


def pieces(random: Random, content: bytes) -> Iterator[bytes]:
    """How the bytes arrive: at once, byte by byte (the first of a long message), or cut anywhere."""
    roll = random.random()
    if roll < 0.5:
        yield content
        return
    if roll < 0.7:
        head, rest = content[:200], content[200:]
        yield from (head[at : at + 1] for at in range(len(head)))
        if rest:
            yield rest
        return
    cuts = sorted(random.randrange(len(content) + 1) for _ in range(random.randint(1, 6)))
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        if start < end:
            yield content[start:end]
