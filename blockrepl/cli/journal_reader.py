"""Reads a journal volume beside the node that writes it: never locks, never writes, never judges.

Recovery (`storage.recovery`) decides what a node may go on from. Here a person looks: frames are followed from the head
by position and chain until the next one is not there, and a ring that moved on meanwhile is followed from its new head.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from construct.core import ConstructError
from crc32c import crc32c

from blockrepl.errors import DamagedError, MissingError, StorageError
from blockrepl.formats.journal import (
    FRAME_ALIGN_BYTES,
    FRAME_HEADER_BYTES,
    FRAME_MAGIC,
    FRAME_STRUCT,
    RING_OFFSET,
    FrameHeader,
    superblock,
)
from blockrepl.formats.slots import SLOTS_BYTES
from blockrepl.storage.slots import Identity, Slots


class JournalReader:
    """An open journal volume. ``head``, ``durable_through`` and ``ring_bytes`` are of the newest superblock seen."""

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path = path
        self._identity = identity
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MissingError(f"{path} is not there", hint="`blockrepl create` makes it, once") from None
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from None
        self.state = b""
        self.end = 0  # position behind the last frame that `frames` gave
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def frames(self) -> Iterator[FrameHeader]:
        """Headers from the head to the tail, PADs too."""
        position, chain = self.head, self._head_chain
        while True:
            header = self._frame(position, chain)
            if header is None:
                before = self.head
                self._load()
                if self.head <= position or self.head == before:
                    self.end = position
                    return
                position, chain = self.head, self._head_chain  # what we wanted to read was given up and overwritten
                continue
            yield header
            position, chain = position + header.size_bytes, header.crc

    def gave_up(self, header: FrameHeader) -> bool:
        """True when the node has given up the frame since it was read: what lies there now is no longer its body."""
        self._load()
        return header.position < self.head

    def body(self, header: FrameHeader) -> memoryview:
        """The bytes behind a frame's header."""
        offset = RING_OFFSET + header.position % self.ring_bytes + FRAME_HEADER_BYTES
        return memoryview(self._read(offset, header.body_bytes))

    def _load(self) -> None:
        _, payload = Slots.load(self._read(0, SLOTS_BYTES), self._identity)
        try:
            block: Any = superblock.parse(payload)
        except ConstructError as error:
            raise DamagedError(f"{self.path}: its superblock makes no sense: {error}") from None
        self.ring_bytes: int = block.ring_bytes
        self.head: int = block.head
        self.durable_through: int = block.durable_through
        self.state = block.state
        self._head_chain: int = block.head_chain
        self._tags: list[tuple[int, int]] = [(each.position, each.tag) for each in block.tags]
        if not self.ring_bytes or self.ring_bytes % FRAME_ALIGN_BYTES or not self._tags:
            raise DamagedError(f"{self.path}: its superblock makes no sense")

    def _frame(self, position: int, chain: int) -> FrameHeader | None:
        if position - self.head >= self.ring_bytes:
            return None
        raw = self._read(RING_OFFSET + position % self.ring_bytes, FRAME_HEADER_BYTES)
        header = FrameHeader._make(FRAME_STRUCT.unpack(raw))
        right = (
            header.magic == FRAME_MAGIC
            and header.crc == crc32c(raw[:-4])
            and header.position == position
            and header.chain == chain
            and header.tag == self._tag_at(position)
            and header.size_bytes >= FRAME_HEADER_BYTES + header.body_bytes
        )
        return header if right else None

    def _tag_at(self, position: int) -> int:
        """Truncation gives later frames another tag: those with the old one no longer count."""
        return next((tag for start, tag in reversed(self._tags) if start <= position), self._tags[0][1])

    def _read(self, offset: int, length: int) -> bytes:
        try:
            raw = os.pread(self._fd, length, offset)
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from None
        if len(raw) < length:
            raise DamagedError(f"{self.path}: ends at byte {offset + len(raw)}, more was expected")
        return raw
