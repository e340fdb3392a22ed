"""The way back from a copy: old blocks of S-VOLs, saved durably before they are first overwritten.

Pure layout and recovery: it emits (offset, buffers) and is told what is durable, as `storage.journal` does. The file is
in `storage.undo_file`. Append-only; a block is saved once; zeroes and holes take a mark only (PROTOCOL, rule 20).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from crc32c import crc32c

from blockrepl.bitmap import BLOCK_BYTES, Bitmap
from blockrepl.block import Buffer
from blockrepl.errors import DamagedError, IdentityError, MissingError
from blockrepl.formats.undo import (
    ENTRY,
    FRAME,
    FRAME_MAGIC,
    HEADER,
    MAX_ENTRIES,
    PAGE_BYTES,
    UNDO_MAGIC,
    VERSION,
    Kind,
)

FRAME_DATA_BYTES = 8 << 20  # of old blocks that go into one frame, at most: what is read and synced at a time
_CRC_BYTES = 4

Read = Callable[[int, int], bytes]
"""(offset, length) → exactly so many bytes of the file"""
Write = tuple[int, list[Buffer]]


class Block(NamedTuple):
    """A range of a volume that is to be saved: a whole block, but for the last one of a volume."""

    volume: int
    offset_bytes: int
    length_bytes: int


class Saved(NamedTuple):
    """What a block held; ``data`` is None for zeroes."""

    block: Block
    data: Buffer | None


class Undo:
    """Which blocks are saved, and where the next frame goes.

    Invariants: everything below `tail` is durable. A block counts as saved only when its frame is (`synced`). At most
    one frame is in the air.
    """

    def __init__(
        self, group: bytes, node: int, sizes: Mapping[int, int], copy: int, tag: int, block_bytes: int = BLOCK_BYTES
    ) -> None:
        """``sizes``: volume id → bytes. ``copy``: the number of the START that this is the way back from."""
        self.group = group
        self.node = node
        self.copy = copy
        self.tag = tag
        self.block_bytes = block_bytes
        self.tail = PAGE_BYTES
        self.saved = {volume: Bitmap(size, block_bytes) for volume, size in sizes.items()}
        self._flying: list[Block] = []
        self._flying_end = 0

    def header(self) -> Write:
        """The write that begins the file. Durable before the copy is."""
        unsigned = HEADER.pack(UNDO_MAGIC, VERSION, self.node, self.group, self.copy, self.tag, self.block_bytes, 0)
        unsigned = unsigned[:-_CRC_BYTES]
        raw = unsigned + crc32c(unsigned).to_bytes(_CRC_BYTES, "big")
        return 0, [raw + bytes(PAGE_BYTES - len(raw))]

    def missing(self, volume: int, offset_bytes: int, length_bytes: int) -> Iterator[Block]:
        """The blocks that a range touches and that are not saved yet."""
        saved = self.saved.get(volume)
        if saved is None or saved.covers(offset_bytes, length_bytes):
            return
        size = self.block_bytes
        for start in range(offset_bytes // size * size, offset_bytes + length_bytes, size):
            if not saved.covers(start, 1):
                yield Block(volume, start, min(size, saved.size_bytes - start))

    def append(self, blocks: list[Saved]) -> Write:
        """A frame of blocks that are not saved yet. `synced` or `failed` ends it; the buffers stay as they are."""
        assert not self._flying, "one frame at a time"
        assert 0 < len(blocks) <= MAX_ENTRIES
        table = b"".join(
            ENTRY.pack(
                block.volume, Kind.ZERO if data is None else Kind.DATA, block.length_bytes, block.offset_bytes,
                0 if data is None else crc32c(data),
            )
            for block, data in blocks
        )  # fmt: skip
        payload = [data for _, data in blocks if data is not None]
        size = FRAME.size + len(table) + sum(map(len, payload))
        padding = -size % PAGE_BYTES
        size += padding
        head = FRAME.pack(FRAME_MAGIC, VERSION, len(blocks), self.tag, self.tail, size, 0)[:-_CRC_BYTES]
        crc = crc32c(table, crc32c(head)).to_bytes(_CRC_BYTES, "big")
        self._flying = [block for block, _ in blocks]
        self._flying_end = self.tail + size
        return self.tail, [head, crc, table, *payload, bytes(padding)]

    def synced(self) -> None:
        """The frame is durable: its blocks may be overwritten."""
        for block in self._flying:
            self._mark(block)
        self.tail = self._flying_end
        self._flying = []

    def failed(self) -> None:
        """The frame was not written, for want of space: it does not count, and its place is written again."""
        self._flying = []

    def _mark(self, block: Block) -> None:
        self.saved[block.volume].mark(block.offset_bytes, block.length_bytes)

    @property
    def used_bytes(self) -> int:
        """Size of what is in the file."""
        return self.tail

    # recovery

    @classmethod
    def recover(
        cls, read: Read, file_bytes: int, group: bytes, node: int, sizes: Mapping[int, int], copy: int
    ) -> tuple[Undo, list[Write]]:
        """Read the file of the copy under way. A torn last frame is cut: nothing was overwritten on its account.

        Returns the undo and the writes that repeat what may be in the page cache only; sync them before anything is
        overwritten (PROTOCOL, rule 11). Raises MissingError, IdentityError, DamagedError.
        """
        if file_bytes < PAGE_BYTES:
            raise MissingError(
                f"the undo file of the copy that began at {copy} is missing or empty",
                hint="was it removed? without it this secondary has no way back: replace it, or let the copy end",
            )
        undo = cls._parse_header(read(0, PAGE_BYTES), group, node, sizes, copy)
        writes: list[Write] = [undo.header()]
        last = 0
        while (size := undo._adopt(read, undo.tail, file_bytes)) is not None:
            last, undo.tail = undo.tail, undo.tail + size
        undo._look_beyond(read, file_bytes)
        if last:
            writes.append((last, [read(last, undo.tail - last)]))
        return undo, writes

    @classmethod
    def _parse_header(cls, page: bytes, group: bytes, node: int, sizes: Mapping[int, int], copy: int) -> Undo:
        magic, version, owner, owner_group, found, tag, block_bytes, crc = HEADER.unpack_from(page)
        if magic != UNDO_MAGIC or crc32c(page[: HEADER.size - _CRC_BYTES]) != crc:
            raise DamagedError("the undo file's header is damaged", hint="keep a copy of it; see `blockrepl explain`")
        if version != VERSION:
            raise IdentityError(f"the undo file has version {version}, this program knows {VERSION}")
        if (owner, owner_group, found) != (node, group, copy):
            raise IdentityError(
                f"the undo file is of node {owner} for the copy that began at {found}, not of node {node} for {copy}"
            )
        return cls(group, node, sizes, copy, tag, block_bytes)

    def _adopt(self, read: Read, position: int, file_bytes: int) -> int | None:
        """Size of the whole frame at ``position``, its blocks marked; None when there is none."""
        frame = self._frame(read, position, file_bytes)
        if frame is None:
            return None
        blocks = list(self._entries(read, position, *frame))
        if any(saved is None for saved in blocks):
            return None
        for saved in blocks:
            assert saved is not None
            self._mark(saved.block)
        return frame[0]

    def _frame(self, read: Read, position: int, file_bytes: int) -> tuple[int, bytes] | None:
        """(size, table) of the frame whose header and table at ``position`` are right."""
        if position + PAGE_BYTES > file_bytes:
            return None
        head = read(position, FRAME.size)
        magic, version, count, tag, where, size, crc = FRAME.unpack(head)
        if (magic, version, tag, where) != (FRAME_MAGIC, VERSION, self.tag, position):
            return None
        end = FRAME.size + count * ENTRY.size
        if end > size or size % PAGE_BYTES or position + size > file_bytes:
            return None
        table = read(position + FRAME.size, count * ENTRY.size)
        return (size, table) if crc32c(table, crc32c(head[:-_CRC_BYTES])) == crc else None

    def _entries(self, read: Read, position: int, size: int, table: bytes) -> Iterator[Saved | None]:
        """The blocks of a frame; None for one whose data is not what it was, or that cannot be."""
        at = position + FRAME.size + len(table)
        for volume, kind, length, offset, crc in ENTRY.iter_unpack(table):
            block = Block(volume, offset, length)
            known = self.saved.get(volume)
            if (
                known is None
                or offset % self.block_bytes
                or not 0 < length <= min(self.block_bytes, known.size_bytes - offset)
            ):
                yield None
            elif kind == Kind.ZERO:
                yield Saved(block, None)
            elif at + length > position + size:
                yield None
            else:
                data = read(at, length)
                at += length
                yield Saved(block, data) if crc32c(data) == crc else None

    def _look_beyond(self, read: Read, file_bytes: int) -> None:
        """A frame beyond the cut was written only when all before it was durable. Raises DamagedError."""
        for position in range(self.tail + PAGE_BYTES, file_bytes, PAGE_BYTES):
            if self._frame(read, position, file_bytes) is not None:
                raise DamagedError(
                    f"the undo file is damaged at {self.tail}: the frame at {position} shows that it was durable",
                    hint="nothing was changed; keep a copy of the file. Without it there is no way back from the copy: "
                    "let the copy end, or replace this secondary",
                )

    def entries(self, read: Read) -> Iterator[Saved]:
        """Every saved block, frame by frame, checked again. Raises DamagedError."""
        position = PAGE_BYTES
        while position < self.tail:
            frame = self._frame(read, position, self.tail)
            blocks: Iterable[Saved | None] = [None] if frame is None else self._entries(read, position, *frame)
            for saved in blocks:
                if saved is None:
                    raise DamagedError(f"the undo file is damaged at {position}", hint="keep a copy of the file")
                yield saved
            assert frame is not None
            position += frame[0]
