"""The journal volume: a preallocated ring of frames. Pure layout: it emits (file offset, buffers) and is told
what is durable.

Why pure: the same code runs over a disk thread, and over the simulator's disk that loses power (ARCHITECTURE, "Journal
volume"; PROTOCOL, rules 9 and 11). Recovery is in `storage.recovery`, the file in `storage.journal_file`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from crc32c import crc32c

from blockrepl.block import Buffer
from blockrepl.errors import UsageError
from blockrepl.formats.journal import (
    FRAME_ALIGN_BYTES,
    FRAME_HEADER_BYTES,
    FRAME_MAGIC,
    FRAME_UNSIGNED_STRUCT,
    FRAME_VERSION,
    RING_OFFSET,
    STATE_BYTES,
    TAGS_MAX,
    FrameKind,
    superblock,
)
from blockrepl.formats.journal import frame_bytes as frame_bytes
from blockrepl.storage.frame_index import FrameIndex, FrameRef
from blockrepl.storage.slots import Identity, Slots

RING_MIN_BYTES = 1 << 20
# Between durable and tail, PADs included, so that recovery knows how far a torn tail can reach. Room for two frames of
# 32 MiB (NBD's largest usual write) with their headers, since a PAD can be nearly as large as the frame after it.
UNSYNCED_BYTES = 66 << 20
_ZEROS = memoryview(bytes(FRAME_ALIGN_BYTES))
_pack = FRAME_UNSIGNED_STRUCT.pack

Write = tuple[int, list[Buffer]]
"""(file offset, buffers to write there one after the other)"""
Tags = list[tuple[int, int]]
"""(position from which, tag), as in the superblock"""


def unsynced_limit(ring_bytes: int) -> int:
    """The most that may be between durable and tail; never more than half of a small ring."""
    return min(UNSYNCED_BYTES, ring_bytes // 2 // FRAME_ALIGN_BYTES * FRAME_ALIGN_BYTES)


class Journal:
    """Frames from `head` to `tail`; positions count ring bytes ever appended.

    Invariant: head_on_disk <= head <= durable <= tail <= head_on_disk + ring_bytes; tail <= durable + unsynced_limit.
    head_on_disk is the head in the newest superblock that is durable: until then a power cut brings the old one
    back, and with it the frames that were given up.

    A journal that was recovered takes nothing before `synced(tail)`: its frames may be in the page cache only.
    """

    def __init__(self, slots: Slots, ring_bytes: int, head: int, head_chain: int, durable: int, tags: Tags) -> None:
        self.slots = slots
        self.ring_bytes = ring_bytes
        self.head = head
        self.durable = durable  # <= tail; everything below is synced. Goes back in `truncate` only
        self.tail = head
        self.tags = tags
        self.index = FrameIndex(ring_bytes)
        self.unsynced_limit_bytes = unsynced_limit(ring_bytes)
        self._head_chain = head_chain
        self._chain = head_chain  # that the next frame carries
        self._head_on_disk = head
        self._head_in_flight = head
        self._settled = False  # a recovered tail is synced
        self._truncating = False  # until a superblock says so
        self._held = False  # nothing fits: it is about to be moved
        self._limit = 0  # the next frame must end here or before
        self._update_limit()

    @classmethod
    def format(cls, identity: Identity, ring_bytes: int, tag: int = 0) -> Journal:
        """A new, empty journal for a file of zeros. Usable when its first `superblock` is synced.

        ``tag`` should be drawn at random: who does not know it cannot put frames into a payload. Raises UsageError.
        """
        if ring_bytes < RING_MIN_BYTES or ring_bytes % FRAME_ALIGN_BYTES:
            raise UsageError(
                f"a journal of {ring_bytes} bytes: at least {RING_MIN_BYTES}, in blocks of {FRAME_ALIGN_BYTES}"
            )
        chain = crc32c(identity.group + identity.node_id.to_bytes(2, "big"))
        journal = cls(Slots(identity), ring_bytes, 0, chain, 0, [(0, tag)])
        journal._settled = True
        return journal

    @property
    def file_bytes(self) -> int:
        """Size of the journal's file."""
        return RING_OFFSET + self.ring_bytes

    @property
    def free_bytes(self) -> int:
        """Ring bytes that may be appended before a trim is needed; what was given up counts once that is durable."""
        return self._head_on_disk + self.ring_bytes - self.tail

    @property
    def used_bytes(self) -> int:
        """Ring bytes between head and tail."""
        return self.tail - self.head

    @property
    def unsynced_bytes(self) -> int:
        """Ring bytes appended and not known to be durable."""
        return self.tail - self.durable

    @property
    def max_body_bytes(self) -> int:
        """The largest body that fits once the journal is synced and trimmed, wherever the tail stands."""
        return self.unsynced_limit_bytes // 2 // FRAME_ALIGN_BYTES * FRAME_ALIGN_BYTES - FRAME_HEADER_BYTES

    @property
    def next_chain(self) -> int:
        """The chain that the next frame carries: the CRC of the last frame's header."""
        return self._chain

    def fits(self, body_bytes: int) -> bool:
        """Whether a frame may be appended now, with the PAD that it may need."""
        size = frame_bytes(body_bytes)
        room = self.ring_bytes - self.tail % self.ring_bytes
        return self.tail + (size if size <= room else room + size) <= self._limit

    def hold(self, *, held: bool) -> None:
        """While held nothing fits."""
        self._held = held
        self._update_limit()

    def append(
        self,
        kind: int,
        first: int,
        count: int,
        stream: int,
        sender: int,
        body_crc: int,
        buffers: Iterable[Buffer],
        body_bytes: int,
    ) -> list[Write]:
        """Add a frame; return the writes to perform, in order, at contiguous positions.

        ``buffers`` are ``body_bytes`` long together, go into the writes as they are, and stay unchanged until the
        frame is durable. Numbers of one stream's records ascend. The caller has asked `fits`.

        Hot: 2.5 µs, a third of it the index.
        """
        writes: list[Write] = []
        size = (body_bytes + FRAME_HEADER_BYTES + FRAME_ALIGN_BYTES - 1) & -FRAME_ALIGN_BYTES
        ring_bytes = self.ring_bytes
        position = self.tail
        place = position % ring_bytes
        if place + size > ring_bytes:
            writes.append(self._pad(ring_bytes - place))
            position = self.tail
            place = 0
        end = position + size
        assert end <= self._limit, "appended what does not fit"
        chain = self._chain
        unsigned = _pack(
            FRAME_MAGIC, FRAME_VERSION, kind, 0, position, size, body_bytes, chain, body_crc, self.durable, first,
            count, stream, sender, self.tags[-1][1],
        )  # fmt: skip
        self._chain = crc = crc32c(unsigned)
        self.index.add(position, body_bytes, chain, first, count, stream, sender, kind)
        self.tail = end
        padding = size - FRAME_HEADER_BYTES - body_bytes
        header = unsigned + crc.to_bytes(4, "big")
        writes.append((RING_OFFSET + place, [header, *buffers, _ZEROS[:padding]] if padding else [header, *buffers]))
        return writes

    def append_note(self, number: int) -> list[Write]:
        """Add the note ``number`` ("prepared ``number``")."""
        return self.append(FrameKind.NOTE, number, 0, 0, 0, 0, (), 0)

    def adopt(self, position: int, size_bytes: int, crc: int) -> None:
        """Recovery took a frame at the tail, and put it into `index`."""
        assert position == self.tail
        assert not self._settled
        self.tail = position + size_bytes
        self._chain = crc

    def synced(self, position: int) -> None:
        """Everything below ``position`` is durable. Reports may come late: a lower one than before says nothing."""
        assert position <= self.tail or self._truncating
        position = min(position, self.tail)
        if position > self.durable:
            self.durable = position
        if position == self.tail:
            self._settled = True
        self._update_limit()

    def trim(self, position: int) -> None:
        """Give up the frames below ``position``, a frame's start or the tail. The space is free after `superblock`."""
        assert self.head <= position <= self.durable, "gave up what is not durable"
        if position == self.head:
            return
        chain = self._chain if position == self.tail else self.index.chain_at(position)
        assert chain is not None, "not the start of a frame"
        self._head_chain = chain
        self.head = position
        self.index.trim(position)
        while len(self.tags) > 1 and self.tags[1][0] <= position:
            del self.tags[0]

    def truncate(self, position: int) -> tuple[int, int]:
        """Discard the frames from ``position`` on; return (sequence numbers, body bytes) of the records discarded.

        What stays is durable (asserted): else a power cut could take a part of that, and the new tag would begin beyond
        the tail.

        It is done when the next `superblock` is durable, not before; until then nothing is appended. One slot write
        decides it: no power cut leaves a part of what is discarded (see `formats.journal.superblock`, tags).
        """
        assert self._settled
        assert not self.slots.in_flight
        assert self.head <= position <= self.durable, "what stays must be durable"
        chain = self._chain if position == self.tail else self.index.chain_at(position)
        assert chain is not None, "not the start of a frame"
        dropped = self.index.truncate(position)
        tag = (self.tags[-1][1] + 1) & 0xFFFFFFFF
        self.tags = [each for each in self.tags if each[0] < position] + [(position, tag)]
        assert len(self.tags) <= TAGS_MAX
        self.tail = position
        self.durable = position
        self._chain = chain
        self._truncating = True
        self._update_limit()
        return dropped

    def superblock(self, state: bytes) -> Write:
        """The slot write that makes head, truncation and the owner's ``state`` durable; `superblock_synced` ends it.

        Only one may be in the air (asserted). ``state`` must speak of durable frames only, and must say of the frames
        that were given up all that a restart needs.
        """
        assert self._settled, "a recovered tail is not synced yet"
        assert len(state) <= STATE_BYTES, f"state of {len(state)} bytes"
        payload = superblock.build(
            {
                "ring_bytes": self.ring_bytes,
                "head": self.head,
                "durable_through": self.durable,
                "head_chain": self._head_chain,
                "tags": [{"position": position, "tag": tag} for position, tag in self.tags],
                "state_bytes": len(state),
                "state": state,
            }
        )
        offset, raw = self.slots.encode(payload)
        self._head_in_flight = self.head
        return offset, [raw]

    def superblock_synced(self) -> None:
        """The last `superblock` is durable: what was given up before it is free."""
        self.slots.stored()
        self._head_on_disk = self._head_in_flight
        self._truncating = False
        self._update_limit()

    def frames(self) -> Iterator[FrameRef]:
        """Records and notes from head to tail."""
        return iter(self.index)

    def frames_after(self, stream: int, number: int, limit_bytes: int) -> list[FrameRef]:
        """Durable records of ``stream`` above ``number``, until their bodies reach ``limit_bytes`` (at least one)."""
        return self._take(self.index.of_stream(stream, number), limit_bytes)

    def frames_of_sender(self, sender: int, number: int, limit_bytes: int) -> list[FrameRef]:
        """Durable records from ``sender`` above ``number``, until their bodies reach ``limit_bytes`` (at least one)."""
        return self._take(self.index.of_sender(sender, number), limit_bytes)

    def position_after(self, number: int) -> int:
        """Where the frames end that hold and note nothing above ``number``; `trim` takes it up to `durable`."""
        position = self.index.position_after(number)
        return self.tail if position is None else position

    def _take(self, refs: Iterable[FrameRef], limit_bytes: int) -> list[FrameRef]:
        # Nothing undurable is ever sent (PROTOCOL, "Watermarks"). Frames start and end where durable can stand, so a
        # frame that starts below it is whole.
        taken: list[FrameRef] = []
        for ref in refs:
            if limit_bytes <= 0 or ref.position >= self.durable:
                break
            taken.append(ref)
            limit_bytes -= ref.body_bytes
        return taken

    def _pad(self, size: int) -> Write:
        unsigned = _pack(
            FRAME_MAGIC, FRAME_VERSION, FrameKind.PAD, 0, self.tail, size, 0, self._chain, 0, self.durable, 0, 0, 0, 0,
            self.tags[-1][1],
        )  # fmt: skip
        self.index.add(self.tail, 0, self._chain, 0, 0, 0, 0, FrameKind.PAD)
        self._chain = crc32c(unsigned)
        place = self.tail % self.ring_bytes
        self.tail += size
        return RING_OFFSET + place, [unsigned, self._chain.to_bytes(4, "big"), _ZEROS[FRAME_HEADER_BYTES:]]

    def _update_limit(self) -> None:
        if self._settled and not self._truncating and self.slots.generation and not self._held:
            self._limit = min(self._head_on_disk + self.ring_bytes, self.durable + self.unsynced_limit_bytes)
        else:
            self._limit = 0
