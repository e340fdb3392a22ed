"""Volumes mode: the intermediate keeps an image per replicated volume, the source of what hop 2 missed.

An intermediate volume holds every durable record, in the order of the numbers (claims 4 and 14). It survives the loss
of the primary site as a complete local copy, and a resync of hop 2 does not disturb the primaries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from blockrepl.formats.journal import FrameKind
from blockrepl.formats.record import RecordHead, RecordKind, iterate_entries, peek_head
from blockrepl.node.digests import digest_range
from blockrepl.node.ports import Clock, Disk, Image, Workers
from blockrepl.node.store import store_record
from blockrepl.node.volume_sync import VolumeSync
from blockrepl.replication.intermediate import Intermediate
from blockrepl.storage.journal_file import JournalFile

COPY_BYTES = 256 << 10  # one copy record
AHEAD_BYTES = 4 << 20  # copied and not durable yet, at most


class IntermediateVolumes:
    """The images of an intermediate. The owner sets the callbacks.

    Invariants: every record up to `stored_through` is durable in its image; a block is copied at a moment when every
    numbered record that touches it is in its image.
    """

    def __init__(
        self, role: Intermediate, journal: JournalFile, images: Mapping[int, Image], disk: Disk, clock: Clock,
        workers: Workers,
    ) -> None:  # fmt: skip
        """The role has been told of what the journal holds; `recover` comes before anything else."""
        self.images = images
        self.stored_through = 0
        self.copied_bytes = self.total_bytes = 0  # of the resync worked on, or the last one
        self.on_failed: Callable[[str], None] = lambda _reason: None
        self.perform: Callable[[list[Any]], None] = lambda _actions: None
        self.settle: Callable[[], None] = lambda: None
        self._role = role
        self._journal = journal
        self._clock = clock
        self._sync = VolumeSync(images, disk, workers)
        self._workers = workers
        self._seen = role.numbered  # every record up to it is stored or in `_undurable`
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

    def recover(self) -> None:
        """Store again what the ring holds: it holds everything that may not be durable in the images. Blocks.

        Raises OSError, StorageError.
        """
        for frame in self._journal.journal.frames():
            if frame.kind == FrameKind.RECORD:
                record = memoryview(self._journal.read(frame.body_offset, frame.body_bytes))
                self._store(peek_head(record), record)

    # following

    def appended(self, head: RecordHead, record: memoryview) -> None:
        """A record was numbered; it is in no image yet."""
        self._seen = head.last
        if head.kind == RecordKind.UPDATE:
            for volume, _, _, offset, length, _ in iterate_entries(head, record):
                self._undurable.append((head.last, volume, offset, offset + length))

    def durable(self, head: RecordHead, record: memoryview) -> None:
        """A record is durable in the journal: into the images with it, or compared with them."""
        try:
            self._store(head, record)
        except OSError as error:
            self.on_failed(f"cannot store record {head.first} in an intermediate volume: {error}")
            return
        while self._undurable and self._undurable[0][0] <= head.last:
            self._undurable.popleft()
        if head.kind == RecordKind.DIGEST:
            self._compare(head, record)

    def _store(self, head: RecordHead, record: memoryview) -> None:
        if head.kind == RecordKind.UPDATE:
            self._sync.touch(store_record(self.images, head, record))
            self._unsynced_bytes += head.size_bytes
        self._applied = head.last

    def _compare(self, head: RecordHead, record: memoryview) -> None:
        """By a worker, while later records are stored: a block that one of them touches may seem to differ and is
        copied for nothing, but none that differs can seem to be the same."""
        theirs = [(entry[3], bytes(entry[5] or b"")) for entry in iterate_entries(head, record)]
        volume, _, _, start, block_bytes, _ = next(iterate_entries(head, record))
        length = sum(entry[4] for entry in iterate_entries(head, record))
        self._role.comparing.asked(head.last)
        number, image = head.last, self.images[volume]

        def compared(ours: Any, error: Exception | None) -> None:
            if error is not None:
                self.on_failed(f"cannot read an intermediate volume: {error}")
                return
            different = [at for (at, wanted), own in zip(theirs, ours, strict=True) if wanted != own]
            self.perform(self._role.compared(number, different))
            self.settle()

        self._workers.run(lambda: digest_range(image, start, length, block_bytes), compared)

    def tick(self, now_s: float) -> None:
        """Make the images durable now and then; copy."""
        policy = self._role.policy
        due = now_s - self._synced_s >= policy.checkpoint_s or self._unsynced_bytes >= policy.checkpoint_bytes
        due = due or self._role.pairing.high_water
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
        """Copy what the hop-2 bitmaps say, for this resync; `copy_more` does it."""
        todo = [
            (volume, first * bitmap.block_bytes, min(bitmap.size_bytes, (first + count) * bitmap.block_bytes))
            for volume, bitmap in self._role.pairing.bitmaps.items()
            for first, count in bitmap.runs(most=max(1, COPY_BYTES // bitmap.block_bytes))
        ]
        self._copy, self.copied_bytes = resync, 0
        self.total_bytes = sum(end - start for _, start, end in todo)
        self._budget_s, self._budget_bytes = self._clock.now_s(), 0.0
        self._todo = iter(todo)
        self._next = next(self._todo, None)

    def copy_more(self) -> None:
        """As much as rate, journal and what is in flight allow. Called at each tick, and when records are durable."""
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
            if self._seen != role.numbered or self._in_flight(volume, start, end) or not self._may_copy(end - start):
                return
            data = bytearray(end - start)
            image = self.images[volume]
            try:
                if not image.read_cached(start, memoryview(data)):
                    self._fetch(image, start, data)
                    return
            except OSError as error:
                self.on_failed(f"cannot read an intermediate volume: {error}")
                return
            self._send(volume, start, data)

    def _send(self, volume: int, start: int, data: bytearray) -> None:
        assert self._todo is not None
        self._next = next(self._todo, None)
        self.copied_bytes += len(data)
        self._budget_bytes -= len(data)
        self.perform(self._role.own_copy(volume, start, data))

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
                return
            self._read_again(image, start, data)
            self.copy_more()
            self.settle()

        self._workers.run(lambda: image.read(start, memoryview(data)), fetched)

    def _read_again(self, image: Image, start: int, data: bytearray) -> None:
        """Just read: if it is gone from the page cache again, this blocks for one copy."""
        role = self._role
        if self._todo is None or self._next is None or role.pairing.resync_id != self._copy:
            return
        volume, first, end = self._next
        if first != start or self.images[volume] is not image or self._seen != role.numbered:
            return
        if self._in_flight(volume, first, end) or not role.pairing.copying:
            return
        try:
            image.read(start, memoryview(data))
        except OSError as error:
            self.on_failed(f"cannot read an intermediate volume: {error}")
            return
        self._send(volume, start, data)
