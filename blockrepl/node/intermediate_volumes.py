"""Volumes mode: the intermediate keeps an image per replicated volume, the source of what hop 2 missed.

An intermediate volume holds every durable record, in the order of the numbers (claims 4 and 14). It survives the loss
of the primary site as a complete local copy, and a resync of hop 2 does not disturb the primaries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from blockrepl.formats.journal import FrameKind
from blockrepl.formats.record import RecordHead, RecordKind, decode_head, iterate_entries
from blockrepl.node.ports import Clock, Disk, Image, Workers
from blockrepl.node.store import store_record
from blockrepl.node.volume_sync import VolumeSync
from blockrepl.replication.intermediate import Intermediate
from blockrepl.storage.journal_file import JournalFile

COPY_BYTES = 256 << 10  # one copy record
AHEAD_BYTES = 4 << 20  # copied and not durable yet, at most


class IntermediateVolumes:
    """The images of an intermediate. ``images`` is empty in journal mode: then nothing is done here.

    Invariants: every record up to `stored_through` is durable in its image; a block is copied at a moment when every
    numbered record that touches it is in its image.
    """

    def __init__(
        self, role: Intermediate, journal: JournalFile, images: Mapping[int, Image], disk: Disk, clock: Clock,
        workers: Workers,
    ) -> None:  # fmt: skip
        self.images = images
        self.stored_through = 0
        self.on_failed: Callable[[str], None] = lambda _reason: None
        self.perform: Callable[[list[Any]], None] = lambda _actions: None
        self._role = role
        self._journal = journal
        self._clock = clock
        self._sync = VolumeSync(images, disk, workers)
        self._workers = workers
        self._applied = 0
        self._unsynced_bytes = 0
        self._syncing = False
        self._synced_s = 0.0
        self._undurable: deque[tuple[int, int, int, int]] = deque()  # (last number, volume, start, end)
        self._copy = 0  # the resync worked on
        self._todo: Iterator[tuple[int, int, int]] | None = None
        self._next: tuple[int, int, int] | None = None
        self._reading = False
        self._budget_bytes = 0.0
        self._budget_s = 0.0
        self.copied_bytes = 0

    def recover(self) -> None:
        """Store again what the ring holds: it holds everything that may not be durable in the images. Blocks."""
        if not self.images:
            return
        for frame in self._journal.journal.frames():
            if frame.kind == FrameKind.RECORD:
                record = memoryview(self._journal.read(frame.body_offset, frame.body_bytes))
                self._store(decode_head(record), record)

    # following

    def appended(self, head: RecordHead, record: memoryview) -> None:
        """A record was numbered; it is in no image yet."""
        if head.kind != RecordKind.UPDATE:
            return
        for volume, _, _, offset, length, _ in iterate_entries(head, record):
            self._undurable.append((head.last, volume, offset, offset + length))

    def durable(self, head: RecordHead, record: memoryview) -> None:
        """A record is durable in the journal: into the images with it."""
        self._store(head, record)
        while self._undurable and self._undurable[0][0] <= head.last:
            self._undurable.popleft()

    def _store(self, head: RecordHead, record: memoryview) -> None:
        self._applied = head.last
        if head.kind != RecordKind.UPDATE:
            return
        try:
            self._sync.touch(store_record(self.images, head, record))
        except OSError as error:
            self.on_failed(f"cannot store record {head.first} in an intermediate volume: {error}")
        self._unsynced_bytes += head.size_bytes

    def tick(self, now_s: float) -> None:
        """Make the images durable now and then; copy."""
        if not self.images:
            return
        policy = self._role.policy
        due = now_s - self._synced_s >= policy.checkpoint_s or self._unsynced_bytes >= policy.checkpoint_bytes
        if due and not self._syncing and self._applied > self.stored_through:
            self._syncing, self._synced_s, self._unsynced_bytes = True, now_s, 0
            self.sync(lambda: None)
        self.copy_more()

    def sync(self, done: Callable[[], None]) -> None:
        """Make all that is stored durable, then ``done``."""
        number = self._applied  # taken before the sync

        def synced(error: OSError | None) -> None:
            self._syncing = False
            if error is not None:
                self.on_failed(f"an intermediate volume: {error}")
            else:
                self.stored_through = max(self.stored_through, number)
                done()

        self._sync.sync(synced)

    # copying

    def begin_copy(self, resync: int) -> None:
        """Copy what the hop-2 bitmaps say, for this resync."""
        self._copy, self.copied_bytes = resync, 0
        self._budget_s, self._budget_bytes = self._clock.now_s(), 0.0
        self._todo = iter(
            [
                (volume, first * bitmap.block_bytes, min(bitmap.size_bytes, (first + count) * bitmap.block_bytes))
                for volume, bitmap in self._role.pairing.bitmaps.items()
                for first, count in bitmap.runs(most=max(1, COPY_BYTES // bitmap.block_bytes))
            ]
        )
        self._next = next(self._todo, None)
        self.copy_more()

    def copy_more(self) -> None:
        """As much as rate, journal and what is in flight allow."""
        role = self._role
        while self._todo is not None and not self._reading:
            if role.pairing.resync_id != self._copy or not role.pairing.copying:
                self._todo = None
                return
            if self._next is None:
                self._todo = None
                self.perform(role.pairing.own_copied(self._copy))
                return
            volume, start, end = self._next
            if not self._may_copy(end - start) or self._in_flight(volume, start, end):
                return  # the next tick, or the next record that is durable
            data = bytearray(end - start)
            image = self.images[volume]
            try:
                if not image.read_cached(start, memoryview(data)):
                    self._fetch(image, start, data)
                    return
            except OSError as error:
                self.on_failed(f"cannot read an intermediate volume: {error}")
                return
            self._next = next(self._todo, None)
            self.copied_bytes += len(data)
            self.perform(role.own_copy(volume, start, data))

    def _may_copy(self, size_bytes: int) -> bool:
        role = self._role
        if role.senders.free_bytes < 4 * AHEAD_BYTES and role.senders.free_bytes * 2 < role.pairing.ring_bytes:
            return False
        rate = role.pairing.rate_bytes
        if rate:
            now_s = self._clock.now_s()
            self._budget_bytes = min(rate, self._budget_bytes + (now_s - self._budget_s) * rate)
            self._budget_s = now_s
            if self._budget_bytes < min(size_bytes, rate):
                return False
            self._budget_bytes -= size_bytes
        return role.undurable_bytes < AHEAD_BYTES

    def _in_flight(self, volume: int, start: int, end: int) -> bool:
        """Whether a record that is numbered and not stored yet touches the range: its copy would be older than it."""
        return any(v == volume and a < end and start < b for _, v, a, b in self._undurable)

    def _fetch(self, image: Image, start: int, data: bytearray) -> None:
        """Into the page cache; the copy itself is read on the loop, at one number."""
        self._reading = True

        def fetched(_: Any, error: Exception | None) -> None:
            self._reading = False
            if error is not None:
                self.on_failed(f"cannot read an intermediate volume: {error}")
            else:
                self._force(image, start, data)

        self._workers.run(lambda: image.read(start, memoryview(data)), fetched)

    def _force(self, image: Image, start: int, data: bytearray) -> None:
        """Just read: if it is gone from the page cache again, this blocks for one block."""
        if self._todo is None or self._next is None:
            return
        volume, first, end = self._next
        if first != start or self._in_flight(volume, first, end):
            return
        try:
            image.read(start, memoryview(data))
        except OSError as error:
            self.on_failed(f"cannot read an intermediate volume: {error}")
            return
        self._next = next(self._todo, None)
        self.copied_bytes += len(data)
        self.perform(self._role.own_copy(volume, start, data))
        self.copy_more()
