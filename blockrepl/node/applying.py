"""Stores validated records in the S-VOLs, in order; while a copy is under way, saves what they overwrite first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.errors import StorageError
from blockrepl.formats.record import RecordHead, RecordKind, check_record, control_number, iterate_entries
from blockrepl.node.digests import digest_range
from blockrepl.node.ports import Image, UndoStore, Workers
from blockrepl.node.store import store_record
from blockrepl.node.volume_sync import VolumeSync
from blockrepl.storage.journal_file import JournalFile
from blockrepl.storage.undo import FRAME_DATA_BYTES, Block, Saved
from blockrepl.storage.undo_file import NO_SPACE

SLICE_BYTES = 8 << 20  # what is applied before the loop gets its turn
FRAME_BLOCKS = 4096  # blocks that one frame of undo may name, at most
_UPDATE, _DIGEST, _CONFIG = int(RecordKind.UPDATE), int(RecordKind.DIGEST), int(RecordKind.CONFIG)
_ZEROES = bytes(64 << 10)


@dataclass(slots=True)
class Held:
    """A record that waits to be applied. ``record`` is None when it must be read from the journal."""

    head: RecordHead
    record: memoryview | None
    chunk: Chunk | None
    body_offset: int


class Applier:
    """Records held, oldest first, and how far they may be applied.

    Invariant: a record is stored whole before the next one; under ``undo`` only when every block that it touches is
    saved durably.
    """

    def __init__(
        self, journal: JournalFile, held: list[tuple[RecordHead, int]], images: Mapping[int, Image], sync: VolumeSync,
        undo: UndoStore, workers: Workers,
    ) -> None:  # fmt: skip
        self.held: deque[Held] = deque(Held(head, None, None, offset) for head, offset in held)
        self.cached_bytes = 0
        self.applying = False
        self.paused = ""  # why nothing is applied now, in words
        self.last_ns = 0  # when the last record applied was numbered
        self.on_applied: Callable[[int], None] = lambda _: None
        self.on_digested: Callable[[dict[str, Any]], None] = lambda _: None
        self.on_config: Callable[[int, int], None] = lambda _digest, _number: None  # raises StorageError
        self.on_failed: Callable[[str], None] = lambda _: None
        self.on_paused: Callable[[str], None] = lambda _: None
        self.settle: Callable[[], None] = lambda: None
        self._journal = journal
        self._images = images
        self._sync = sync
        self._undo = undo
        self._workers = workers
        # Redoing these, the S-VOLs may hold later ones already: they are at one number again at the end of them.
        self._redone_through = held[-1][0].last if held else 0
        self._target = 0
        self._with_undo = False
        self._halted: Callable[[], None] | None = None

    def add(self, held: Held) -> None:
        """A record was appended to the journal."""
        self.held.append(held)
        self.cached_bytes += held.head.size_bytes

    def forget(self, held: Held) -> None:
        """Give back its memory."""
        if held.chunk is not None:
            held.chunk.release()
            held.chunk = held.record = None
            self.cached_bytes -= held.head.size_bytes

    def relocate(self, offsets: Mapping[int, int]) -> None:
        """The journal was moved: first number → where its record stands now. What it lacks is in memory alone."""
        for item in self.held:
            item.body_offset = offsets.get(item.head.first, item.body_offset)

    def discard_above(self, number: int) -> None:
        """The journal gives up what lies above ``number``."""
        while self.held and self.held[-1].head.last > number:
            self.forget(self.held.pop())

    def apply(self, number: int, *, undo: bool) -> None:
        """Store everything held up to ``number``; `on_applied` when that is done."""
        self._target = max(self._target, number)
        self._with_undo = undo
        if not self.applying:
            self.applying = True
            self._some()

    def halt(self, done: Callable[[], None]) -> None:
        """Stop between two records and forget the target; ``done`` when that is so."""
        if self.applying:
            self._halted = done
            if self.paused:
                self._workers.later(self.retry)
        else:
            self._target = 0
            self._workers.later(done)

    def retry(self) -> None:
        """Time has passed: where there was no space for the undo file, there may be some now."""
        if self.paused:
            self.paused = ""
            self._on()

    def _on(self) -> None:
        self._some()
        self.settle()

    def _some(self) -> None:
        """A slice of what may be applied."""
        if self._halted is not None:
            done, self._halted = self._halted, None
            self.applying, self._target = False, 0
            done()
            return
        held, target, done_bytes, undo = self.held, self._target, 0, self._with_undo
        while held and held[0].head.last <= target:
            if done_bytes > SLICE_BYTES:
                self._workers.later(self._on)
                return
            item = held[0]
            if item.record is None:
                self._read_back(item)
                return
            if undo and self._save_first(target):
                return
            held.popleft()
            done_bytes += item.head.size_bytes
            if not self._store(item.head, item.record):
                return
            self.forget(item)
        self.applying = False
        self.on_applied(target)

    def _read_back(self, item: Held) -> None:
        size = item.head.size_bytes

        def read_done(record: Any, error: Exception | None) -> None:
            if error is not None:
                self.on_failed(f"cannot read the journal: {error}")
                return
            try:
                check_record(memoryview(record))
            except StorageError as damage:
                self.on_failed(str(damage))
                return
            if self.held and self.held[0] is item:
                item.record = memoryview(record)
            self._on()

        read, offset = self._journal.reader(), item.body_offset
        self._workers.run(lambda: read(offset, size), read_done)

    def _store(self, head: RecordHead, record: memoryview) -> bool:
        self.last_ns = head.time_ns
        try:
            if head.kind == _UPDATE:
                self._sync.touch(store_record(self._images, head, record))
            elif head.kind == _DIGEST:
                self._compare(head, record)
            elif head.kind == _CONFIG:
                self.on_config(control_number(record), head.last)
        except (OSError, StorageError) as error:
            self.on_failed(f"cannot store record {head.first}: {error}")
            return False
        return True

    def _compare(self, head: RecordHead, record: memoryview) -> None:
        """All entries of a digest record are consecutive blocks of one volume. Raises OSError."""
        entries = list(iterate_entries(head, record))
        volume, _, _, start, block_bytes, _ = entries[0]
        length = sum(entry[4] for entry in entries)
        if head.last <= self._redone_through:
            entries, different = [], []
        else:
            ours = digest_range(self._images[volume], start, length, block_bytes)
            different = [
                entry[3] for entry, own in zip(entries, ours, strict=True) if entry[5] is None or bytes(entry[5]) != own
            ]
        fields = {
            "number": head.last, "sender": head.sender, "volume": volume, "offset_bytes": start,
            "length_bytes": length, "blocks": len(entries), "different": different,
        }  # fmt: skip
        self.on_digested(fields)

    # the way back

    def _save_first(self, target: int) -> bool:
        """Whether blocks that the next record touches must be saved first; then so is what those behind it touch."""
        head = self.held[0]
        assert head.record is not None
        blocks = self._missing(head.head, head.record, {})
        if not blocks:
            return False
        for item in islice(self.held, 1, None):
            if item.record is None or item.head.last > target or len(blocks) >= FRAME_BLOCKS:
                break
            blocks = self._missing(item.head, item.record, blocks)
        wanted = list(blocks)
        self._workers.run(lambda: read_old(self._images, wanted), self._old_read)
        return True

    def _missing(self, head: RecordHead, record: memoryview, blocks: dict[Block, None]) -> dict[Block, None]:
        if head.kind != _UPDATE:
            return blocks
        undo = self._undo.undo
        assert undo is not None, "copying without an undo file"
        for volume, _, _, offset, length, _ in iterate_entries(head, record):
            for block in undo.missing(volume, offset, length):
                blocks[block] = None
                if len(blocks) >= FRAME_BLOCKS:
                    return blocks
        return blocks

    def _old_read(self, old: Any, error: Exception | None) -> None:
        if error is not None:
            self.on_failed(f"cannot read what is to be saved: {error}")
            return
        self._undo.save(old, self._saved)
        self.settle()

    def _saved(self, error: OSError | None) -> None:
        if error is None:
            self._on()
        elif error.errno in NO_SPACE and self._halted is None:
            self.paused = f"no space to save what the copy overwrites: {error.strerror}"
            self.on_paused(self.paused)
        elif error.errno in NO_SPACE:
            self._on()
        else:
            self.on_failed(f"cannot write the undo file: {error}")

    def restore(self, done: Callable[[], None]) -> None:
        """Put back every saved block, sync the images, then ``done``."""
        assert not self.applying

        def restored(volumes: Any, error: Exception | None) -> None:
            if error is not None:
                self.on_failed(f"cannot go back: {error}")
                return
            self._sync.touch(volumes)
            self._sync.sync(synced)

        def synced(error: OSError | None) -> None:
            if error is not None:
                self.on_failed(f"sync failed: {error}")
            else:
                done()

        self._workers.run(lambda: put_back(self._images, self._undo.entries()), restored)


def read_old(images: Mapping[int, Image], blocks: list[Block]) -> list[Saved]:
    """What blocks hold now, as many of them as make one frame. Holes are not read, zeroes not kept. Blocks.

    Raises OSError.
    """
    saved: list[Saved] = []
    size_bytes = 0
    for block in blocks:
        image = images[block.volume]
        extents = image.allocation(block.offset_bytes, block.length_bytes)
        data: bytearray | None = None
        if any(is_data for _, _, is_data in extents):
            data = bytearray(block.length_bytes)
            image.read(block.offset_bytes, memoryview(data))
            if data == _ZEROES[: len(data)]:
                data = None
        saved.append(Saved(block, data))
        size_bytes += len(data) if data is not None else 0
        if size_bytes >= FRAME_DATA_BYTES:
            break
    return saved


def put_back(images: Mapping[int, Image], entries: Iterable[Saved]) -> set[int]:
    """Write saved blocks; return the volumes. Blocks. Raises OSError, StorageError."""
    volumes = set()
    for (volume, offset, length), data in entries:
        if data is None:
            images[volume].zero(offset, length, allocate=False)
        else:
            images[volume].pwrite(offset, memoryview(data))
        volumes.add(volume)
    return volumes
