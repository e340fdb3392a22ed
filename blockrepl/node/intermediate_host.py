"""Hosts the intermediate: its journal, the records in memory for the secondaries, replay for primaries."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.errors import BlockreplError, StorageError
from blockrepl.formats.journal import FrameKind, frame_bytes
from blockrepl.formats.link import Message, bulk_header
from blockrepl.formats.record import (
    ENTRY,
    HEADER_BYTES,
    RecordFlag,
    RecordHead,
    RecordKind,
    decode_batch,
    peek,
    peek_head,
)
from blockrepl.formats.state import encode_intermediate
from blockrepl.node.host import Host
from blockrepl.node.intermediate_volumes import IntermediateVolumes
from blockrepl.node.ports import Clock, Links, Log, SaveBitmaps, Spills, Workers
from blockrepl.node.trimmer import Trimmer
from blockrepl.replication.actions import (
    Append,
    CopyOwn,
    CountAbove,
    Counts,
    DropSpill,
    Forget,
    MarkJournal,
    Reformed,
    Replay,
    SaveBits,
    SaveState,
    Spill,
    TakeConfig,
    Transmit,
)
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.policy import TRANSMIT_BYTES
from blockrepl.storage.frame_index import FrameRef
from blockrepl.storage.journal_file import JournalFile

CACHE_BYTES = 48 << 20  # newest records kept in memory for the secondaries; older ones are read from the ring
REPLAY_QUEUE_BYTES = 8 << 20  # a replay pauses while the primary has this much to read
INFINITY = float("inf")

Read = Callable[[int, int], bytes]
"""`JournalFile.reader`: bound to the file as it was when the frames were looked up"""


@dataclass(slots=True)
class Kept:
    """A record in memory."""

    head: RecordHead
    record: memoryview
    chunk: Chunk
    frame_bytes: int
    position: int  # journal position that is durable when it is


@dataclass(slots=True)
class ReplayJob:
    """A primary's own records on their way back to it."""

    action: Replay
    after: int


class IntermediateHost(Host):
    """Performs the intermediate's actions.

    ``journal`` is recovered and durable; the role has been told of its records.
    """

    def __init__(
        self,
        role: Intermediate,
        journal: JournalFile,
        save_bits: SaveBitmaps,
        links: Links,
        clock: Clock,
        workers: Workers,
        log: Log,
        volumes: IntermediateVolumes | None = None,
        spills: Spills | None = None,
    ) -> None:
        """``volumes``: in volumes mode. ``spills``: what is kept for primaries that are away, loaded."""
        super().__init__(links, clock, workers, log)
        self.role = role
        self.journal = journal
        self.on_reformed: Callable[[], None] = lambda: None  # the owner builds role and host anew
        self.on_config: Callable[[int, int], None] = lambda _digest, _number: None
        self._save_bits = save_bits
        self._spills = spills
        self.volumes = volumes
        if volumes is not None:
            volumes.on_failed = self.fail
            volumes.perform = self.perform
            volumes.settle = self.settle
        self._performers |= {
            Append: self._append,
            SaveState: self._save,
            Transmit: self._transmit,
            Replay: self._replay,
            SaveBits: self._save_bitmaps,
            MarkJournal: self._mark_journal,
            Forget: self._forget,
            CopyOwn: self._copy_own,
            CountAbove: self._count_above,
            Spill: self._spill,
            DropSpill: self._drop_spill,
            Reformed: lambda _action: self.on_reformed(),
            TakeConfig: lambda action: self.on_config(action.digest, action.number),
        }
        self._undurable: deque[Kept] = deque()
        self._unfit: deque[Append] = deque()  # appended when the ring has room again
        self._cache: dict[int, deque[Kept]] = {node: deque() for node in role.streams.by_node}
        self._cache_bytes = 0
        self._marks: list[MarkJournal] = []  # wait for records that are not durable yet
        self._dirty = False
        self._settling = False
        self._replays: dict[int, ReplayJob] = {}
        self._trimmer = Trimmer(journal, self._state, self._trimmed)
        self.on_round_due: Callable[[float], None] = lambda _due_s: None  # the owner calls `round` then
        self._reserve_bytes = journal.journal.ring_bytes // 4  # for PADs, and so that credit is never overdrawn
        journal.on_durable = self._durable
        journal.on_failed = self._failed
        self._tell_room()

    # entries from outside

    def batch(self, link: int, chunk: Chunk, start: int, end: int) -> None:
        """A BATCH's record arrived. Raises ProtocolError."""
        head = decode_batch(chunk.view[start:end])
        clock = self.clock
        boot_ns = clock.boot_ns() if self.role.policy.fence_never else 0
        self.perform(self.role.batch(link, head, chunk, start, end, clock.now_s(), clock.wall_ns(), boot_ns))

    def tick(self) -> None:
        """Time passes."""
        now_s = self.clock.now_s()
        self.perform(self.role.tick(now_s, self.clock.boot_ns()))
        for job in list(self._replays.values()):
            self._replay_more(job)
        releasable = self.role.releasable
        if self.volumes is not None:
            self.volumes.tick(now_s)
            releasable = min(releasable, self.volumes.stored_through)
        self._guarded(lambda: self._trimmer.trim(releasable, now_s))
        self.settle()

    def round(self) -> None:
        """A prepare round is due."""
        self.perform(self.role.round(self.clock.now_s()))
        self.settle()

    def lost(self, link: int) -> None:
        """A link is gone."""
        self._replays.pop(link, None)
        self.perform(self.role.lost(link, self.clock.now_s()))

    def settle(self) -> None:
        if self._settling:
            return  # a commit that ran here and now; the one under way goes on with what it brought about
        self._settling = True
        try:
            while self._dirty:
                self._dirty = False
                self._guarded(self.journal.commit)
        finally:
            self._settling = False
        self.links.settle()
        due_s = self.role.due_s()
        if due_s != INFINITY:
            self.on_round_due(due_s)

    def _guarded(self, call: Callable[[], Any]) -> None:
        """A journal that failed has told `_failed`; what comes later is dropped (rule 11)."""
        try:
            call()
        except StorageError as error:
            self._failed(error)

    # journal

    def _append(self, action: Append) -> None:
        if self.volumes is not None:
            self.volumes.appended(action.head, action.record)
        if self._unfit or not self.journal.journal.fits(action.head.size_bytes):
            self._unfit.append(action)
            self._tell_room()
            return
        self._put(action)

    def _put(self, action: Append) -> None:
        head = action.head
        try:
            position = self.journal.append(
                FrameKind.RECORD, head.first, head.count, head.stream, head.sender, head.header_crc,
                [action.record], head.size_bytes,
            )  # fmt: skip
        except StorageError as error:
            self._failed(error)
            return
        self._dirty = True
        self._undurable.append(Kept(head, action.record, action.chunk, frame_bytes(head.size_bytes), position))

    def _durable(self, position: int) -> None:
        undurable, cache = self._undurable, self._cache
        last = 0
        while undurable and undurable[0].position <= position:
            kept = undurable.popleft()
            last = kept.head.last
            if self.volumes is not None:
                self.volumes.durable(kept.head, kept.record)
            if kept.head.stream in cache:
                cache[kept.head.stream].append(kept)
                self._cache_bytes += kept.frame_bytes
            else:  # for the intermediate volumes only
                kept.chunk.release()
        if last:
            self.perform(self.role.durable(last, self.clock.now_s()))
            if self._cache_bytes > CACHE_BYTES:
                self._evict()
        if self._unfit:
            self._put_unfit()
        marks, self._marks = self._marks, []
        for action in marks:
            self._mark_journal(action)
        if self.volumes is not None:
            self.volumes.copy_more()
        self.settle()

    def _put_unfit(self) -> None:
        while self._unfit and self.journal.journal.fits(self._unfit[0].head.size_bytes):
            self._put(self._unfit.popleft())

    def _evict(self) -> None:
        """Memory holds only the newest: a slow secondary is served from the ring."""
        queues = sorted(self._cache.values(), key=lambda queue: queue[0].head.first if queue else float("inf"))
        for queue in queues:
            while queue and self._cache_bytes > CACHE_BYTES:
                self._drop(queue)

    def _drop(self, queue: deque[Kept]) -> None:
        kept = queue.popleft()
        self._cache_bytes -= kept.frame_bytes
        kept.chunk.release()

    def _failed(self, error: BlockreplError) -> None:
        self.fail(str(error))

    def fail(self, reason: str) -> None:
        """A disk error: stop (rule 11)."""
        self.perform(self.role.fail(reason))
        self.links.settle()

    def _state(self) -> bytes:
        return encode_intermediate(self.role.durable_state())

    def _save(self, action: SaveState) -> None:
        self._guarded(lambda: self.journal.save(self._state(), done=lambda: self._saved(action.token)))

    def _saved(self, token: int) -> None:
        self.perform(self.role.saved(token, self.clock.now_s()))
        self.settle()

    def _trimmed(self) -> None:
        self._tell_room()
        self._put_unfit()
        self.settle()

    def moved(self) -> None:
        """The journal is another one now, with all that it held. A smaller ring has less to grant than was granted:
        the links are made again, and with them the credit (rule 6)."""
        before, self._reserve_bytes = self._reserve_bytes, self.journal.journal.ring_bytes // 4
        self._tell_room()
        self._put_unfit()
        if self._reserve_bytes < before:
            self.perform(self.role.grant_anew())
        self.settle()

    def _tell_room(self) -> None:
        free = 0 if self._unfit else self.journal.journal.free_bytes - self._reserve_bytes
        self.perform(self.role.ring(max(0, free), self.journal.journal.ring_bytes - self._reserve_bytes))

    # bitmaps

    def _save_bitmaps(self, action: SaveBits) -> None:
        self._guarded(lambda: self._save_bits(lambda: self._saved(action.token)))

    def _mark_journal(self, action: MarkJournal) -> None:
        """Read the entries of the records asked for, by a worker; set their bits. What is not durable is waited for."""
        first = self._undurable[0] if self._undurable else self._unfit[0] if self._unfit else None
        if first is not None and first.head.first <= action.through:
            self._marks.append(action)
            return
        never = INFINITY
        journal, reader = self.journal.journal, self.journal.reader()
        frames = [
            frame for frame in journal.frames()
            if frame.kind == FrameKind.RECORD and frame.last <= action.through and frame.stream != self.role.node
            and (frame.last > action.after or frame.last > action.checkpoints.get(frame.sender, never))
        ]  # fmt: skip

        def read_done(found: Any, error: Exception | None) -> None:
            # A frame that was released meanwhile may have been overwritten: what it held is validated, or marked.
            head = journal.head
            in_ring, spilled = found or ((), set())
            kept = [(frame, ranges) for frame, ranges in in_ring if frame.position >= head]
            error = error or next((ranges for _, ranges in kept if isinstance(ranges, Exception)), None)
            if error is not None:
                self.perform(self.role.fail(f"cannot read the journal: {error}"))
                self.settle()
                return
            bitmaps = self.role.pairing.bitmaps
            for volume, offset, length in spilled.union(*(ranges for _, ranges in kept)):
                if volume in bitmaps:
                    bitmaps[volume].mark(offset, length)
            self._guarded(lambda: self._save_bits(lambda: self._saved(action.token)))

        def read() -> tuple[list[tuple[FrameRef, Any]], set[tuple[int, int, int]]]:
            return [(frame, self._read_ranges(reader, frame)) for frame in frames], self._spilled_ranges(
                action.checkpoints
            )

        self.workers.run(read, read_done)

    def _spilled_ranges(self, checkpoints: dict[int, int]) -> set[tuple[int, int, int]]:
        """What the records beside the ring wrote, above their senders' checkpoints."""
        found: set[tuple[int, int, int]] = set()
        if self._spills is None:
            return found
        for sender, checkpoint in checkpoints.items():
            wanted = self._spills.after(sender, checkpoint, 1 << 62)
            for record in self._spills.read(sender, wanted) if wanted else ():
                found.update(_ranges(record))
        return found

    def _read_ranges(self, read: Read, frame: FrameRef) -> list[tuple[int, int, int]] | BlockreplError:
        """What a record wrote, as (volume, offset, length); or why that cannot be read."""
        try:
            kind, table_bytes = peek(read(frame.body_offset, HEADER_BYTES))
            if kind != RecordKind.UPDATE:
                return []
            record = read(frame.body_offset, HEADER_BYTES + table_bytes)
        except BlockreplError as error:
            return error
        return list(_ranges(record))

    def _count_above(self, action: CountAbove) -> None:
        """By a worker: a header and a table of entries are read for each record, of which a ring may hold thousands."""
        journal, number = self.journal.journal, action.number
        records = [
            frame for frame in journal.frames() if frame.kind == FrameKind.RECORD and frame.position < journal.durable
        ]
        above = [frame for frame in records if frame.last > number]
        # Numbers are contiguous here: is the first one above it in the ring, then nothing above it was given up.
        whole = above[0].first <= number + 1 if above else self.role.durable_number <= number
        kept = max((frame for frame in records if frame.last <= number), key=lambda frame: frame.last, default=None)

        def counted(found: Counts | None, error: Exception | None) -> None:
            counts = found or Counts()
            given_up = above and journal.head > above[0].position  # while it was read: overwritten, perhaps
            counts.whole = whole and error is None and not given_up
            self.perform(self.role.counted(action.token, counts))
            self.settle()

        read = self.journal.reader()
        self.workers.run(lambda: self._count(read, kept, above), counted)

    def _count(self, read: Read, kept: FrameRef | None, above: list[FrameRef]) -> Counts:
        """Raises StorageError, DamagedError."""
        counts = Counts()
        if kept is not None:
            counts.kept_ns = peek_head(read(kept.body_offset, HEADER_BYTES)).time_ns
        for frame in above:
            head = peek_head(read(frame.body_offset, HEADER_BYTES))
            if head.kind != RecordKind.UPDATE or head.flags & RecordFlag.COPY:
                continue
            counts.newest_ns = max(counts.newest_ns, head.time_ns)
            counts.writes += head.count
            table = read(frame.body_offset + HEADER_BYTES, head.count * ENTRY.size)
            counts.size_bytes += sum(entry[-1] for entry in ENTRY.iter_unpack(table))
        return counts

    def _copy_own(self, action: CopyOwn) -> None:
        if self.volumes is not None:
            self.volumes.begin_copy(action.resync)

    def _forget(self, action: Forget) -> None:
        journal = self.journal.journal
        for queue in self._cache.values():
            while queue:
                self._drop(queue)

        def stored() -> None:
            self._guarded(
                lambda: self.journal.save(self._state(), trim_to=journal.tail, done=lambda: self._saved(action.token))
            )

        if self.volumes is None:
            stored()
        else:
            self.volumes.sync(stored)

    # hop 2

    def _transmit(self, action: Transmit) -> None:
        queue = self._cache[action.node]
        while queue and queue[0].head.last <= action.after:
            self._drop(queue)
        if not queue or queue[0].head.previous > action.after:
            self._transmit_from_ring(action)
            return
        limit = action.limit_bytes
        sent_bytes, last = 0, action.after
        epoch = self.role.state.epoch.number
        while queue and queue[0].head.last <= action.through:
            kept = queue[0]
            if sent_bytes + kept.frame_bytes > limit or (sent_bytes and sent_bytes >= TRANSMIT_BYTES):
                break
            queue.popleft()
            self._cache_bytes -= kept.frame_bytes
            self.links.send(
                action.link, [bulk_header(Message.RECORD, epoch, len(kept.record)), kept.record], kept.chunk
            )
            sent_bytes += kept.frame_bytes
            last = kept.head.last
        self._transmitted(action, last, sent_bytes)

    def _transmitted(self, action: Transmit, last: int, sent_bytes: int) -> None:
        now_s = self.clock.now_s()
        self.perform(self.role.transmitted(action.node, action.link, last, sent_bytes, now_s))

    def _transmit_from_ring(self, action: Transmit) -> None:
        """Catch-up: read a helping of the stream by a worker."""
        budget = min(action.limit_bytes, TRANSMIT_BYTES)
        frames: list[FrameRef] = []
        used = 0
        for frame in self.journal.journal.frames_after(action.node, action.after, budget):
            size = frame_bytes(frame.body_bytes)
            if frame.last > action.through or used + size > action.limit_bytes:
                break
            frames.append(frame)
            used += size
        if not frames:
            self._transmitted(action, action.after, 0)
            return

        def read_done(records: Any, error: Exception | None) -> None:
            if error is not None:
                self.perform(self.role.fail(f"cannot read the journal: {error}"))
            else:
                self._send_records(action.link, records)
                self._transmitted(action, frames[-1].last, used)
            self.settle()

        read = self.journal.reader()
        self.workers.run(lambda: self._read(read, frames), read_done)

    def _read(self, read: Read, frames: list[FrameRef]) -> list[bytes]:
        return [read(frame.body_offset, frame.body_bytes) for frame in frames]

    def _send_records(self, link: int, records: list[bytes]) -> None:
        epoch = self.role.state.epoch.number
        for record in records:
            self.links.send(link, [bulk_header(Message.RECORD, epoch, len(record)), record], None)

    # primaries that are away

    def _spill(self, action: Spill) -> None:
        spills = self._spills
        assert spills is not None
        frames = [
            frame for frame in self.journal.journal.frames_of_sender(action.sender, action.after, 1 << 62)
            if frame.last <= action.through
        ]  # fmt: skip

        read = self.journal.reader()

        def keep() -> None:
            spills.append(action.sender, list(zip([f.last for f in frames], self._read(read, frames), strict=True)))

        def kept(_: Any, error: Exception | None) -> None:
            if error is not None:
                self.fail(f"cannot keep what primary {action.sender} lacks: {error}")
            else:
                self._saved(action.token)

        self.workers.run(keep, kept)

    def _drop_spill(self, action: DropSpill) -> None:
        spills = self._spills
        assert spills is not None
        self.workers.run(lambda: spills.drop(action.sender), lambda _result, _error: None)

    # replay

    def _replay(self, action: Replay) -> None:
        job = ReplayJob(action, action.after)
        self._replays[action.link] = job
        self._replay_more(job)

    def _replay_more(self, job: ReplayJob) -> None:
        action = job.action
        if self._replays.get(action.link) is not job or self.links.queued_bytes(action.link) > REPLAY_QUEUE_BYTES:
            return
        del self._replays[action.link]
        if self._spills is not None and (beside := self._spills.after(action.sender, job.after, TRANSMIT_BYTES)):
            self._replay_from(job, beside[-1].last, partial(self._spills.read, action.sender, beside))
            return
        refs = self.journal.journal.frames_of_sender(action.sender, job.after, TRANSMIT_BYTES)
        frames = [frame for frame in refs if frame.last <= action.through]
        if not frames:
            self.links.send(action.link, [action.end], None)
            return

        self._replay_from(job, frames[-1].last, partial(self._read, self.journal.reader(), frames))

    def _replay_from(self, job: ReplayJob, last: int, read: Callable[[], list[bytes]]) -> None:
        """Read a helping by a worker, send it, go on."""
        action = job.action

        def read_done(records: Any, error: Exception | None) -> None:
            if error is not None:
                self.perform(self.role.fail(f"cannot read the journal: {error}"))
            elif action.link in self.role.senders.by_link:
                self._send_records(action.link, records)
                job.after = last
                self._replays[action.link] = job
                self._replay_more(job)
            self.settle()

        self.workers.run(read, read_done)


def _ranges(record: bytes) -> set[tuple[int, int, int]]:
    """(volume, offset, length) of every entry of a record; only its header and table are looked at."""
    kind, table_bytes = peek(record)
    if kind != RecordKind.UPDATE:
        return set()
    table = record[HEADER_BYTES : HEADER_BYTES + table_bytes]
    return {(volume, offset, length) for volume, _, _, _, offset, length in ENTRY.iter_unpack(table)}
