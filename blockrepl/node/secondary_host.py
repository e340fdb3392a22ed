"""Hosts a secondary: its journal, and the S-VOLs that validated records are stored in, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.errors import StorageError
from blockrepl.formats.journal import FRAME_HEADER_BYTES, RING_OFFSET, FrameKind, frame_bytes
from blockrepl.formats.record import RecordHead, RecordKind, check_record, decode_record, iterate_entries
from blockrepl.formats.state import encode_secondary
from blockrepl.node.digests import digest_range
from blockrepl.node.host import Host
from blockrepl.node.ports import Clock, Disk, Image, Links, Log, Workers
from blockrepl.node.store import store_record
from blockrepl.node.trimmer import Trimmer
from blockrepl.node.volume_sync import VolumeSync
from blockrepl.replication.actions import (
    Append,
    AppendNote,
    Apply,
    SaveState,
    SyncJournal,
    SyncVolumes,
    Trim,
    Truncate,
)
from blockrepl.replication.secondary import Phase, Secondary
from blockrepl.storage.journal_file import JournalFile

CACHE_BYTES = 48 << 20  # records kept in memory until they are applied; the rest is read back from the journal
SLICE_BYTES = 8 << 20  # what is applied before the loop gets its turn
COMMIT_BYTES = 16 << 20  # synced early when no PREPARE asks for it
_DIGEST = int(RecordKind.DIGEST)


@dataclass(slots=True)
class Held:
    """A record that waits to be applied. ``record`` is None when it must be read from the journal."""

    head: RecordHead
    record: memoryview | None
    chunk: Chunk | None
    body_offset: int


class SecondaryHost(Host):
    """Performs a secondary's actions. ``images``: volume id → its S-VOL."""

    def __init__(
        self,
        role: Secondary,
        journal: JournalFile,
        held: list[tuple[RecordHead, int]],
        images: Mapping[int, Image],
        disk: Disk,
        links: Links,
        clock: Clock,
        workers: Workers,
        log: Log,
    ) -> None:
        """``held``: the recovered records not known to be applied, with the file offset of each."""
        super().__init__(links, clock, workers, log)
        self.role = role
        self.journal = journal
        self.images = images
        self.disk = disk
        self.on_active: Callable[[], None] = lambda: None
        self._active_told = False
        self._held: deque[Held] = deque(Held(head, None, None, offset) for head, offset in held)
        # Redoing these, the S-VOLs may hold later ones already: they are at one number again at the end of them.
        self._redone_through = held[-1][0].last if held else 0
        self._cached_bytes = 0
        self._target = 0
        self._applying = False
        self._sync = VolumeSync(images, disk, workers)
        self._commit = False
        self._notes: deque[tuple[int, int, int, int]] = deque()  # (position, number, epoch, received)
        self._syncs: deque[tuple[int, int]] = deque()  # (position, token)
        self._unfit: deque[Append | AppendNote | SyncJournal] = deque()
        self._trim_number = 0
        self._trimmer = Trimmer(journal, self._state, self._trimmed)
        self._reserve_bytes = journal.journal.ring_bytes // 4
        self._performers |= {
            Append: self._append,
            AppendNote: self._append,
            SyncJournal: self._sync_journal,
            SaveState: self._save,
            Apply: self._apply,
            SyncVolumes: self._sync_volumes,
            Trim: self._trim,
            Truncate: self._truncate,
        }
        journal.on_durable = self._durable
        journal.on_failed = lambda error: self._fail(str(error))
        self._tell_room()

    # entries from outside

    def start(self) -> None:
        """Finish what a takeover had begun."""
        self.perform(self.role.start())
        self.settle()

    def record(self, link: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        """A RECORD arrived. Raises ProtocolError."""
        view = chunk.view[start:end]
        head = decode_record(view)
        self.perform(self.role.record(link, head, epoch, view, chunk))

    def tick(self) -> None:
        """Time passes."""
        now_s = self.clock.now_s()
        self.perform(self.role.tick(now_s, self.clock.boot_ns()))
        if self.role.phase not in (Phase.STORING, Phase.FAILED):
            self._guarded(lambda: self._trimmer.trim(self._trim_number, now_s))
        self.settle()

    def lost(self, link: int) -> None:
        """A link is gone."""
        self.perform(self.role.lost(link, self.clock.now_s()))

    def settle(self) -> None:
        if self._commit or self.journal.journal.unsynced_bytes > COMMIT_BYTES:
            self._commit = False
            self._guarded(self.journal.commit)
        super().settle()
        if not self._active_told and self.role.phase is Phase.ACTIVE:
            self._active_told = True
            self.on_active()

    def _guarded(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except StorageError as error:
            self._fail(str(error))

    def _fail(self, reason: str) -> None:
        self.perform(self.role.fail(reason))
        self.links.settle()

    # journal

    def _append(self, action: Append | AppendNote) -> None:
        size = action.head.size_bytes if isinstance(action, Append) else 0
        if self._unfit or not self.journal.journal.fits(size):
            self._unfit.append(action)
            self._commit = True
            return
        self._guarded(lambda: self._put(action))

    def _put(self, action: Append | AppendNote) -> None:
        if isinstance(action, AppendNote):
            position = self.journal.append(
                FrameKind.NOTE, action.number, 0, 0, 0, action.epoch & 0xFFFFFFFF, (), 0
            )  # fmt: skip
            self._notes.append((position, action.number, action.epoch, action.received))
            self._commit = True
            return
        head = action.head
        position = self.journal.append(
            FrameKind.RECORD, head.first, head.count, head.stream, head.sender, head.header_crc,
            [action.record], head.size_bytes,
        )  # fmt: skip
        start = position - frame_bytes(head.size_bytes)
        body_offset = RING_OFFSET + start % self.journal.journal.ring_bytes + FRAME_HEADER_BYTES
        self._held.append(Held(head, action.record, action.chunk, body_offset))
        self._cached_bytes += head.size_bytes

    def _durable(self, position: int) -> None:
        now_s = self.clock.now_s()
        notes, syncs = self._notes, self._syncs
        number, epoch, received = 0, 0, 0
        while notes and notes[0][0] <= position:
            _, number, epoch, received = notes.popleft()
        if number:
            self.perform(self.role.noted(number, epoch, now_s, received))
        while syncs and syncs[0][0] <= position:
            self.perform(self.role.done(syncs.popleft()[1], now_s))
        self._put_unfit()
        self._evict()
        self.settle()

    def _put_unfit(self) -> None:
        while self._unfit:
            action = self._unfit[0]
            if isinstance(action, SyncJournal):
                self._unfit.popleft()
                self._sync_appended(action)
                continue
            if not self.journal.journal.fits(action.head.size_bytes if isinstance(action, Append) else 0):
                return
            self._unfit.popleft()
            self._guarded(lambda action=action: self._put(action))  # type: ignore[misc]

    def _evict(self) -> None:
        """Give back memory of records that are durable here and wait for a slow peer's validation."""
        if self._cached_bytes <= CACHE_BYTES:
            return
        for held in reversed(self._held):
            if self._cached_bytes <= CACHE_BYTES:
                return
            if held.chunk is not None and held.head.last <= self.role.state.held:
                self._forget(held)

    def _forget(self, held: Held) -> None:
        if held.chunk is not None:
            held.chunk.release()
            held.chunk = held.record = None
            self._cached_bytes -= held.head.size_bytes

    def _sync_journal(self, action: SyncJournal) -> None:
        if self._unfit:  # it speaks for these too, and they are not in the journal yet
            self._unfit.append(action)
            self._commit = True
        else:
            self._sync_appended(action)

    def _sync_appended(self, action: SyncJournal) -> None:
        journal = self.journal.journal
        if journal.durable >= journal.tail:
            self.workers.later(lambda: self._done(action.token))
            return
        self._syncs.append((journal.tail, action.token))
        self._commit = True

    def _done(self, token: int) -> None:
        self.perform(self.role.done(token, self.clock.now_s()))
        self.settle()

    def _state(self) -> bytes:
        return encode_secondary(self.role.durable_state())

    def _save(self, action: SaveState) -> None:
        self._guarded(lambda: self.journal.save(self._state(), done=lambda: self._done(action.token)))

    def _trim(self, action: Trim) -> None:
        self._trim_number = action.number

    def _trimmed(self) -> None:
        self._tell_room()
        self._put_unfit()
        self.settle()

    def _tell_room(self) -> None:
        self.role.free_bytes = max(0, self.journal.journal.free_bytes - self._reserve_bytes)

    def _truncate(self, action: Truncate) -> None:
        held = [item for item in self._held if item.head.last > action.number]
        writes = sum(item.head.count for item in held)
        size_bytes = sum(item.head.body_bytes for item in held)
        last = held[0].head.previous if held else self.role.received
        if action.dry_run:
            self.perform(self.role.truncated(action.token, writes, size_bytes, last, self.clock.now_s()))
            return
        for item in held:
            self._held.pop()
            self._forget(item)
        journal = self.journal.journal
        position = journal.position_after(action.number)
        state = encode_secondary(self.role.durable_state())

        def truncated(_writes: int, _bytes: int) -> None:
            self.perform(self.role.truncated(action.token, writes, size_bytes, last, self.clock.now_s()))
            self.settle()

        self._guarded(lambda: self.journal.truncate(position, state, truncated))

    # S-VOLs

    def _apply(self, action: Apply) -> None:
        self._target = max(self._target, action.number)
        if not self._applying:
            self._applying = True
            self._apply_some()

    def _apply_some(self) -> None:
        """Store validated records in order; a slice at a time."""
        held, target, done_bytes = self._held, self._target, 0
        while held and held[0].head.last <= target:
            if done_bytes > SLICE_BYTES:
                self.workers.later(self._apply_on)
                return
            item = held[0]
            if item.record is None:
                self._read_back(item)
                return
            held.popleft()
            done_bytes += item.head.size_bytes
            if not self._store(item.head, item.record):
                return
            self._forget(item)
        self._applying = False
        self.perform(self.role.was_applied(target, self.clock.now_s()))

    def _apply_on(self) -> None:
        self._apply_some()
        self.settle()

    def _read_back(self, item: Held) -> None:
        size = item.head.size_bytes

        def read_done(record: Any, error: Exception | None) -> None:
            if error is not None:
                self._fail(f"cannot read the journal: {error}")
                return
            try:
                check_record(memoryview(record))
            except StorageError as damage:
                self._fail(str(damage))
                return
            if self._held and self._held[0] is item:
                item.record = memoryview(record)
            self._apply_on()

        self.workers.run(lambda: self.journal.read(item.body_offset, size), read_done)

    def _store(self, head: RecordHead, record: memoryview) -> bool:
        try:
            if head.kind == _DIGEST:
                self._compare(head, record)
            else:
                self._sync.touch(store_record(self.images, head, record))
        except OSError as error:
            self._fail(f"cannot store record {head.first}: {error}")
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
            ours = digest_range(self.images[volume], start, length, block_bytes)
            different = [
                entry[3] for entry, own in zip(entries, ours, strict=True) if entry[5] is None or bytes(entry[5]) != own
            ]
        fields = {
            "number": head.last, "sender": head.sender, "volume": volume, "offset_bytes": start,
            "length_bytes": length, "blocks": len(entries), "different": different,
        }  # fmt: skip
        self.perform(self.role.digested(fields))

    def _sync_volumes(self, action: SyncVolumes) -> None:
        def synced(error: OSError | None) -> None:
            if error is not None:
                self._fail(f"sync failed: {error}")
            else:
                self._done(action.token)

        self._sync.sync(synced)
