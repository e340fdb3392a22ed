"""Hosts a secondary: its journal, and the S-VOLs that validated records are stored in, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.errors import StorageError
from blockrepl.formats.journal import FRAME_HEADER_BYTES, RING_OFFSET, FrameKind, frame_bytes
from blockrepl.formats.record import ENTRY_BYTES, RecordFlag, RecordHead, RecordKind, decode_record
from blockrepl.formats.state import encode_secondary
from blockrepl.node.applying import Applier, Held
from blockrepl.node.host import Host
from blockrepl.node.ports import Clock, Disk, Image, Links, Log, UndoStore, Workers
from blockrepl.node.trimmer import Trimmer
from blockrepl.node.volume_sync import VolumeSync
from blockrepl.replication.actions import (
    Append,
    AppendNote,
    Apply,
    BecomeSource,
    Close,
    DropUndo,
    Forget,
    HaltApply,
    OpenUndo,
    Publish,
    Reformed,
    RestoreUndo,
    SaveBits,
    SaveState,
    SyncJournal,
    SyncVolumes,
    Truncate,
    Withdraw,
)
from blockrepl.replication.secondary import Secondary
from blockrepl.storage.journal_file import JournalFile
from blockrepl.storage.undo_file import NO_SPACE

CACHE_BYTES = 48 << 20  # records kept in memory until they are applied; the rest is read back from the journal
COMMIT_BYTES = 16 << 20  # synced early when no PREPARE asks for it
RETRY_S = 1.0  # between two looks for space


class SecondaryHost(Host):
    """Performs a secondary's actions. ``images``: volume id → its S-VOL."""

    def __init__(
        self,
        role: Secondary,
        journal: JournalFile,
        held: list[tuple[RecordHead, int]],
        images: Mapping[int, Image],
        undo: UndoStore,
        disk: Disk,
        links: Links,
        clock: Clock,
        workers: Workers,
        log: Log,
        save_bits: Callable[[Callable[[], None]], None] = lambda done: done(),
    ) -> None:
        """``held``: the recovered records not known to be applied, with the file offset of each.

        The hooks below are the node's: it publishes volumes, and withdraws them, as the role's state says.
        """
        super().__init__(links, clock, workers, log)
        self.role = role
        self.journal = journal
        self.images = images
        self.disk = disk
        self.undo = undo
        self.on_active: Callable[[], None] = lambda: None  # durably a source: serve hosts
        self.on_split: Callable[[bool], None] = lambda _writable: None  # durably split: serve the S-VOLs
        self.on_withdraw: Callable[[Callable[[], None]], None] = lambda done: done()  # stop serving, then ``done``
        self.on_source: Callable[[BecomeSource, Callable[[], None]], None] = lambda _, done: done()
        self.on_target: Callable[[], None] = lambda: None  # durably a target now
        self._sync = VolumeSync(images, disk, workers)
        self.applier = Applier(journal, held, images, self._sync, undo, workers)
        self.applier.on_applied = self._was_applied
        self.applier.on_digested = lambda fields: self.perform(self.role.digested(fields))
        self.applier.on_failed = self.fail
        self.applier.on_paused = self._pause
        self.applier.settle = self.settle
        self._save_bits = save_bits
        self.paused = ""  # why a copy pauses, in words
        self._retry_undo: OpenUndo | None = None
        self._retried_s = 0.0
        self._commit = False
        self._notes: deque[tuple[int, int, int, int]] = deque()  # (position, number, epoch, received)
        self._syncs: deque[tuple[int, int]] = deque()  # (position, token)
        self._unfit: deque[Append | AppendNote | SyncJournal] = deque()
        self._trimmer = Trimmer(journal, self._state, self._trimmed)
        # For PADs. It is half of the intermediate's: what that one keeps fits here, with the notes of open rounds.
        self._reserve_bytes = journal.journal.ring_bytes // 8
        self._performers |= {
            Append: self._append,
            AppendNote: self._append,
            SyncJournal: self._sync_journal,
            SaveState: self._save,
            Apply: self._apply,
            SyncVolumes: self._sync_volumes,
            Truncate: self._truncate,
            Forget: self._forget,
            HaltApply: self._halt,
            OpenUndo: self._open_undo,
            RestoreUndo: self._restore,
            DropUndo: self._drop_undo,
            Publish: self._publish,
            Withdraw: self._withdraw,
            BecomeSource: self._become_source,
            Reformed: self._reformed,
            SaveBits: self._save_bitmaps,
        }
        journal.on_durable = self._durable
        journal.on_failed = lambda error: self.fail(str(error))
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
        self._guarded(lambda: self._trimmer.trim(self.role.releasable, now_s))
        self._retry(now_s)
        self.settle()

    def lost(self, link: int) -> None:
        """A link is gone."""
        self.perform(self.role.lost(link, self.clock.now_s()))

    def settle(self) -> None:
        if self._commit or self.journal.journal.unsynced_bytes > COMMIT_BYTES:
            self._commit = False
            self._guarded(self.journal.commit)
        super().settle()

    def _guarded(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except StorageError as error:
            self.fail(str(error))

    def fail(self, reason: str) -> None:
        """A disk error: nothing more is prepared or applied."""
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
        self.applier.add(Held(head, action.record, action.chunk, body_offset))

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
        applier = self.applier
        if applier.cached_bytes <= CACHE_BYTES:
            return
        for held in reversed(applier.held):
            if applier.cached_bytes <= CACHE_BYTES:
                return
            if held.chunk is not None and held.head.last <= self.role.state.held:
                applier.forget(held)

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

    def _trimmed(self) -> None:
        self._put_unfit()
        self._tell_room()
        self.settle()

    def moved(self) -> None:
        """The journal is another one now, with all that it held. A smaller ring has less to grant than was granted:
        the link is made again."""
        journal = self.journal.journal
        before, self._reserve_bytes = self._reserve_bytes, journal.ring_bytes // 4
        self.applier.relocate({ref.first: ref.body_offset for ref in journal.frames() if ref.kind == FrameKind.RECORD})
        self._tell_room()
        self._put_unfit()
        if self._reserve_bytes < before and self.role.link:
            self.perform([Close(self.role.link, "the journal was made smaller: credit is granted anew")])
        self.settle()

    def _tell_room(self) -> None:
        """What waits for room takes some of it."""
        waiting = sum(
            frame_bytes(each.head.size_bytes if isinstance(each, Append) else 0)
            for each in self._unfit if not isinstance(each, SyncJournal)
        )  # fmt: skip
        self.role.free_bytes = self.journal.journal.free_bytes - self._reserve_bytes - waiting

    def _truncate(self, action: Truncate) -> None:
        heads = [item.head for item in self.applier.held]
        gone = [head for head in heads if head.last > action.number]
        last_ns = self.applier.last_ns if self.role.applied <= action.number else 0
        kept_ns = heads[-len(gone) - 1].time_ns if len(heads) > len(gone) else last_ns
        last = gone[0].previous if gone else self.role.received
        writes = [head for head in gone if head.kind == RecordKind.UPDATE and not head.flags & RecordFlag.COPY]
        count = sum(head.count for head in writes)
        size_bytes = sum(head.body_bytes for head in writes) - count * ENTRY_BYTES
        newest_ns = gone[-1].time_ns if gone else 0

        def truncated(_writes: int = 0, _bytes: int = 0) -> None:
            now_s = self.clock.now_s()
            self.perform(self.role.truncated(action.token, count, size_bytes, last, now_s, kept_ns, newest_ns))

        def durably(_writes: int, _bytes: int) -> None:
            truncated()
            self.settle()

        if action.dry_run:
            truncated()
            return
        assert not self._unfit, "a promise waits until everything is in the journal"
        self.applier.discard_above(action.number)
        position = self.journal.journal.position_after(action.number)
        state = self._state()
        self._guarded(lambda: self.journal.truncate(position, state, durably))

    def _forget(self, action: Forget) -> None:
        journal = self.journal.journal
        if journal.durable < journal.tail:
            self._guarded(self.journal.commit)
            self.workers.later(lambda: self._forget(action))
            return
        self.applier.discard_above(-1)
        state = self._state()
        self._guarded(lambda: self.journal.save(state, journal.tail, lambda: self._done(action.token)))

    # S-VOLs

    def _apply(self, action: Apply) -> None:
        self.applier.apply(action.number, undo=action.undo)

    def _was_applied(self, number: int) -> None:
        self.perform(self.role.was_applied(number, self.clock.now_s()))

    @property
    def _applying(self) -> bool:
        return self.applier.applying

    def _halt(self, action: HaltApply) -> None:
        self.applier.halt(lambda: self._done(action.token))

    def _open_undo(self, action: OpenUndo) -> None:
        def opened(error: OSError | None) -> None:
            if error is None:
                self._done(action.token)
            elif error.errno in NO_SPACE:
                self._pause(f"no space for the undo file: {error.strerror}")
                self._retry_undo = action
            else:
                self.fail(f"cannot write the undo file: {error}")

        self._retry_undo = None
        self.undo.begin(action.copy, opened)

    def _restore(self, action: RestoreUndo) -> None:
        self.applier.restore(lambda: self._done(action.token))

    def _drop_undo(self, _: DropUndo) -> None:
        try:
            self.undo.drop()
        except OSError as error:
            self.fail(f"cannot truncate the undo file: {error}")

    def _pause(self, why: str) -> None:
        if why != self.paused:
            self.log(f"the copy pauses: {why}", {})
        self.paused = why

    def _retry(self, now_s: float) -> None:
        if now_s - self._retried_s < RETRY_S:
            return
        self._retried_s = now_s
        if self.applier.paused:
            self.applier.retry()
        elif self._retry_undo is None:
            self.paused = ""
        if self._retry_undo is not None:
            self._open_undo(self._retry_undo)

    # hosts of its own

    def _publish(self, _: Publish) -> None:
        if self.role.state.active:
            self.on_active()
        else:
            self.on_split(self.role.state.split_writable)

    def _withdraw(self, action: Withdraw) -> None:
        self.on_withdraw(lambda: self._done(action.token))

    def _become_source(self, action: BecomeSource) -> None:
        self.on_source(action, lambda: self._done(action.token))

    def _reformed(self, _: Reformed) -> None:
        self.on_target()

    def _save_bitmaps(self, action: SaveBits) -> None:
        self._guarded(lambda: self._save_bits(lambda: self._done(action.token)))

    def _sync_volumes(self, action: SyncVolumes) -> None:
        def synced(error: OSError | None) -> None:
            if error is not None:
                self.fail(f"sync failed: {error}")
            else:
                self._done(action.token)

        self._sync.sync(synced)
