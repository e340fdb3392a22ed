"""Recovery of a journal volume: from whatever the disk holds to a journal that goes on. A decision table, no I/O.

For the frame expected at a position (PROTOCOL, rule 9):

| what is there | its body | shown to have been durable | verdict |
| --- | --- | --- | --- |
| a frame, right position and chain | good | – | take it |
| a frame of a later lap or of a later history | – | – | damage: the superblock is older than the ring |
| anything else | – | yes, by the superblock or a later frame | damage |
| anything else | – | no | torn tail: cut here |

A frame shows by its `durable_through` what was synced when it was appended. The last frames before a crash have nobody
behind them to speak for them; what was acknowledged of those is for the peers to say (PROTOCOL, rule 10).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

from construct.core import ConstructError
from crc32c import crc32c

from blockrepl.errors import DamagedError, IdentityError
from blockrepl.formats.journal import (
    FRAME_ALIGN_BYTES,
    FRAME_HEADER_BYTES,
    FRAME_MAGIC,
    FRAME_STRUCT,
    FRAME_VERSION,
    RING_OFFSET,
    FrameHeader,
    FrameKind,
    frame_bytes,
    superblock,
)
from blockrepl.formats.slots import SLOTS_BYTES
from blockrepl.storage.journal import Journal, Write
from blockrepl.storage.slots import Identity, Slots

PIECE_BYTES = 1 << 20
_MAGIC = FRAME_MAGIC.to_bytes(4, "big")
_NEWER_TAGS = 256  # a tag this much above the expected one is of a later truncation

Read = Callable[[int, int], bytes]
"""(file offset, length) -> exactly so many bytes"""
CheckBody = Callable[[FrameHeader, memoryview], bool]
"""Whether a record's (or a note's) body is what was appended. True means that the frame is taken; called in order, for
notes without a body too: what they say is in the header."""


class Found(Enum):
    """What lies where a frame could start."""

    FRAME = "a frame in its place"
    REMNANT = "a frame for this place that continues another chain"
    STALE_LAP = "a frame of an earlier lap"
    LATER = "a frame of a later lap or history"
    NOTHING = "no frame of this journal"


class Verdict(Enum):
    """What recovery does about the frame it expects."""

    TAKE = "take"
    CUT = "cut"
    DAMAGED = "damaged"


def judge(found: Found, body_good: bool, shown_durable: bool) -> Verdict:
    """The decision table."""
    if found is Found.FRAME and body_good:
        return Verdict.TAKE
    if found is Found.LATER or shown_durable:
        return Verdict.DAMAGED
    return Verdict.CUT


class Recovered(NamedTuple):
    """A journal as the disk had it.

    The owner performs `writes`, in any order, syncs, and calls ``journal.synced(journal.tail)``; only then may the
    journal be used. `writes` reads what it repeats when iterated: once, before anything else is written.
    """

    journal: Journal
    state: bytes  # the owner's, from the superblock
    cut_position: int  # where the tail was cut; the journal's tail
    found_at_cut: Found
    remnants: int  # frames beyond the cut, never acknowledged, that `writes` erases
    stale_laps: int  # frames of earlier laps seen there
    writes: Iterator[Write]


def recover(read: Read, check_body: CheckBody, identity: Identity, ring_bytes: int | None = None) -> Recovered:
    """Read a journal volume and decide.

    Raises MissingError (never made), IdentityError (another's, or another size than ``ring_bytes``), DamagedError.
    """
    journal, payload = _load(read, identity, ring_bytes)
    state = superblock.parse(payload).state
    ring = _Ring(read, journal)
    superblock_durable = journal.durable
    found = Found.NOTHING
    while journal.tail < ring.limit:
        header, found, body_good = ring.expect(check_body)
        if judge(found, body_good, False) is not Verdict.TAKE:
            break
        assert header is not None
        _adopt(journal, header)
    cut = journal.tail
    beyond = ring.look_beyond(cut)
    witness = beyond.witness
    if witness is None and superblock_durable > cut:
        witness = "the superblock", superblock_durable, 0
    if cut < ring.limit and judge(found, False, witness is not None) is Verdict.DAMAGED:
        raise _damaged(identity, journal, found, witness)
    if witness is not None:  # a full ring cannot be continued by a later frame
        raise _damaged(identity, journal, Found.LATER, witness)
    floor = journal.durable
    writes = _writes(read, journal, payload, floor, beyond.remnants)
    return Recovered(journal, state, cut, found, len(beyond.remnants), beyond.stale_laps, writes)


def _load(read: Read, identity: Identity, ring_bytes: int | None) -> tuple[Journal, bytes]:
    slots, payload = Slots.load(read(0, SLOTS_BYTES), identity)
    try:
        block = superblock.parse(payload)
    except ConstructError as error:
        raise DamagedError(f"{identity}: its superblock makes no sense: {error}") from error
    if ring_bytes is not None and block.ring_bytes != ring_bytes:
        raise IdentityError(
            f"{identity}: has a ring of {block.ring_bytes} bytes, the definition says {ring_bytes}",
            hint="set the size in the definition back; a journal is not resized in place",
        )
    tags = [(each.position, each.tag) for each in block.tags]
    if not tags or block.durable_through < block.head:
        raise DamagedError(f"{identity}: its superblock makes no sense")
    journal = Journal(slots, block.ring_bytes, block.head, block.head_chain, block.durable_through, tags)
    return journal, payload


def _adopt(journal: Journal, header: FrameHeader) -> None:
    journal.index.add(
        header.position, header.body_bytes, header.chain, header.first, header.count, header.stream, header.sender,
        header.kind,
    )  # fmt: skip
    journal.adopt(header.position, header.size_bytes, header.crc)
    journal.durable = max(journal.durable, header.durable_through)


Witness = tuple[str, int, int]
"""(who says so, that everything was durable below this position, the first number in its frame)"""


class _Beyond(NamedTuple):
    """What lies beyond a cut."""

    witness: Witness | None
    remnants: list[int]  # positions of the frames that could be taken one day
    stale_laps: int


class _Ring:
    """Reads a ring by position, in large pieces.

    A torn tail ends less than two limits of unsynced bytes beyond the first frame that is not durable: whoever wrote
    a frame knew of a durable position at most one limit before, and that position is at most one limit beyond
    the cut, else a frame in between would have shown it.
    """

    def __init__(self, read: Read, journal: Journal) -> None:
        self._read = read
        self._journal = journal
        self._ring_bytes = journal.ring_bytes
        self.limit = journal.head + journal.ring_bytes  # where the next lap would overwrite the head
        self._start = self._end = 0  # of the piece in memory, positions
        self._piece = memoryview(b"")

    def expect(self, check_body: CheckBody) -> tuple[FrameHeader | None, Found, bool]:
        """(header, what was found, whether its body is good) at the journal's tail."""
        journal = self._journal
        position = journal.tail
        block = self._from(position, FRAME_ALIGN_BYTES)
        header, found = self._classify(block, position)
        if header is None or found is not Found.FRAME:
            return header, found, False
        if header.chain != journal.next_chain:
            return header, Found.REMNANT, False
        if header.kind == FrameKind.PAD:
            return header, found, True
        frame = self._from(position, header.size_bytes)
        return header, found, check_body(header, frame[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + header.body_bytes])

    def look_beyond(self, cut: int) -> _Beyond:
        """Look at every block that a frame after ``cut`` could start in."""
        end = min(self.limit, cut + 2 * self._journal.unsynced_limit_bytes + FRAME_ALIGN_BYTES)
        witness: Witness | None = None
        remnants: list[int] = []
        stale_laps = 0
        for position, block in self._marked(cut, end):
            header, found = self._classify(block, position)
            if found is Found.STALE_LAP:
                stale_laps += 1
            elif found is Found.FRAME:
                remnants.append(position)
            if header is None or found is Found.STALE_LAP or witness is not None:
                continue
            if found is Found.LATER or header.durable_through > cut:
                witness = f"the frame at position {header.position}", header.durable_through, header.first
        return _Beyond(witness, remnants, stale_laps)

    def _classify(self, block: memoryview, position: int) -> tuple[FrameHeader | None, Found]:
        """FRAME here means: in its place; the chain is not looked at."""
        if block[:4] != _MAGIC:
            return None, Found.NOTHING
        header = FrameHeader._make(FRAME_STRUCT.unpack_from(block))
        if header.crc != crc32c(block[: FRAME_HEADER_BYTES - 4]) or (header.position - position) % self._ring_bytes:
            return None, Found.NOTHING
        newer = (header.tag - self._tag_at(position)) & 0xFFFFFFFF
        if header.position < position:
            return header, Found.STALE_LAP
        if 0 < newer < _NEWER_TAGS or (newer == 0 and header.position > position):
            return header, Found.LATER
        if newer or not self._sane(header):
            return None, Found.NOTHING
        return header, Found.FRAME

    def _sane(self, header: FrameHeader) -> bool:
        size = header.size_bytes
        usual = frame_bytes(header.body_bytes)
        return (
            header.version == FRAME_VERSION
            and (size >= usual and not size % FRAME_ALIGN_BYTES if header.kind == FrameKind.PAD else size == usual)
            and header.kind in (FrameKind.RECORD, FrameKind.NOTE, FrameKind.PAD)
            and header.position % self._ring_bytes + size <= self._ring_bytes
            and header.position + size <= self.limit
            and header.durable_through <= header.position
        )

    def _tag_at(self, position: int) -> int:
        tags = self._journal.tags
        for start, tag in reversed(tags):
            if start <= position:
                return tag
        return tags[0][1]

    def _marked(self, start: int, end: int) -> Iterator[tuple[int, memoryview]]:
        """(position, block) for the blocks that begin with the magic."""
        position = start
        while position < end:
            piece = self._from(position, FRAME_ALIGN_BYTES)
            length = min(len(piece), end - position)
            for at in range(0, length, FRAME_ALIGN_BYTES):
                if piece[at : at + 4] == _MAGIC:
                    yield position + at, piece[at : at + FRAME_ALIGN_BYTES]
            position += length

    def _from(self, position: int, size: int) -> memoryview:
        """The ring from ``position`` on, ``size`` bytes at least, which do not cross the end of a lap."""
        if not (self._start <= position and position + size <= self._end):
            lap_end = position - position % self._ring_bytes + self._ring_bytes
            length = min(max(PIECE_BYTES, size), lap_end - position)
            self._piece = memoryview(self._read(RING_OFFSET + position % self._ring_bytes, length))
            assert len(self._piece) == length
            self._start, self._end = position, position + length
        return self._piece[position - self._start :]


def _writes(read: Read, journal: Journal, payload: bytes, floor: int, remnants: list[int]) -> Iterator[Write]:
    """Repeat what may be in the page cache only, and erase the frames beyond the cut that could be taken one day.

    Frames that a truncation voided are left alone. Their tag keeps them out for ever, and the superblock that says so
    may be in the page cache only: a power cut that kept the erasure and lost the superblock would lose durable frames.

    Repeat, not only sync: a page whose write-back failed is clean, so an fsync that succeeds after a restart proves
    nothing about it (PROTOCOL, rule 11). The bytes are the same, so a power cut in between harms nothing.
    """
    offset, raw = journal.slots.again(payload)
    yield offset, [raw]
    ring_bytes = journal.ring_bytes
    position = floor
    while position < journal.tail:
        place = position % ring_bytes
        length = min(PIECE_BYTES, journal.tail - position, ring_bytes - place)
        yield RING_OFFSET + place, [read(RING_OFFSET + place, length)]
        position += length
    for position in remnants:
        yield RING_OFFSET + position % ring_bytes, [bytes(FRAME_ALIGN_BYTES)]


def _damaged(identity: Identity, journal: Journal, found: Found, witness: Witness | None) -> DamagedError:
    position = journal.tail
    last = max((ref.last for ref in journal.frames()), default=0)
    after = f"after number {last}" if last else "at the head"
    if witness is None:
        why = "it is newer than the superblock"
    else:
        who, durable, first = witness
        why = f"{who}{f' (number {first})' if first else ''} shows that everything below {durable} was durable"
    return DamagedError(
        f"{identity}: damaged at position {position}, {after} (file offset "
        f"{RING_OFFSET + position % journal.ring_bytes}): found {found.value}, but {why}",
        hint="nothing was changed. Keep a copy of the file. The records are still on the group's other nodes: "
        "`blockrepl status` there shows what they hold; do not create this journal anew before you have looked",
    )
