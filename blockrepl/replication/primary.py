"""The primary of a group: host writes out to the intermediate, acknowledged writes into the P-VOLs. No I/O.

The order of a write: submit → numbered, journaled and synced by the intermediate → acknowledged → stored in the P-VOL
→ complete to the host. So a P-VOL never holds what the journal does not, and a primary that crashed is repaired by
replaying its own records above its checkpoint (PROTOCOL, rules 1 to 8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from blockrepl.bitmap import Bitmap
from blockrepl.block import Buffer, Op, WriteBatch
from blockrepl.errors import ProtocolError
from blockrepl.formats.journal import frame_bytes
from blockrepl.formats.link import (
    Epoch,
    LinkRole,
    Message,
    Pair,
    bulk_header,
    encode,
)
from blockrepl.formats.record import (
    DIGEST_BYTES,
    OP_DIGEST,
    RecordFlag,
    RecordHead,
    RecordKind,
    encode_record,
    iterate_entries,
)
from blockrepl.formats.state import PrimaryState
from blockrepl.replication.actions import (
    Action,
    Close,
    DigestBlocks,
    Digested,
    Event,
    FailBatch,
    ReadBlocks,
    ReadMetadata,
    SaveState,
    Send,
    StoreBatch,
    StoreRecord,
    SyncVolumes,
)
from blockrepl.replication.alone import SoloWrites, Unconfirmed
from blockrepl.replication.greeting import Introduction
from blockrepl.replication.locks import COPIES, Purpose, RangeLocks
from blockrepl.replication.machine import Machine
from blockrepl.replication.pending import PendingQueue, PendingRecord
from blockrepl.replication.policy import Policy
from blockrepl.replication.resyncing import Resyncing
from blockrepl.replication.suspension import Suspension

Then = Callable[[float], list[Action]]
NEVER = 1 << 64


class Phase(Enum):
    """Where a primary is. It serves reads from DETACHED on, and completes writes only in LIVE."""

    FRESH = "fresh"  # started; must replay before anyone may read
    FRESH_GREETING = "greeting"  # HELLO sent, not recovered
    REPLAYING = "replaying"
    SETTLING = "settling"  # replayed; making the P-VOLs and the checkpoint durable
    DETACHED = "detached"  # recovered, no intermediate: fence `data` holds the writes
    GREETING = "reconnecting"
    LIVE = "live"
    SUSPENDING = "suspending"  # about to go on alone: making that durable
    ALONE = "suspended"  # suspended, no link; writes complete alone where that is allowed
    ALONE_GREETING = "suspended, greeting"
    JOINED = "suspended, joined"  # linked; a resync is the way back
    FAILED = "failed"  # a disk error: nothing is completed any more


TABLE: dict[tuple[Phase, str], Phase] = {
    (Phase.FRESH, "connected"): Phase.FRESH_GREETING,
    (Phase.FRESH_GREETING, "welcome"): Phase.REPLAYING,
    (Phase.FRESH_GREETING, "lost"): Phase.FRESH,
    (Phase.REPLAYING, "replayed"): Phase.SETTLING,
    (Phase.REPLAYING, "lost"): Phase.FRESH,
    (Phase.SETTLING, "settled"): Phase.LIVE,
    (Phase.SETTLING, "settled, link lost"): Phase.DETACHED,
    (Phase.SETTLING, "lost"): Phase.SETTLING,
    (Phase.DETACHED, "connected"): Phase.GREETING,
    (Phase.GREETING, "welcome"): Phase.LIVE,
    (Phase.GREETING, "lost"): Phase.DETACHED,
    (Phase.LIVE, "lost"): Phase.DETACHED,
    (Phase.DETACHED, "suspend"): Phase.SUSPENDING,
    (Phase.GREETING, "suspend"): Phase.SUSPENDING,
    (Phase.LIVE, "suspend"): Phase.SUSPENDING,
    (Phase.SUSPENDING, "lost"): Phase.SUSPENDING,
    (Phase.SUSPENDING, "suspended"): Phase.ALONE,
    (Phase.ALONE, "lost"): Phase.ALONE,  # the link that it went alone with
    (Phase.ALONE, "connected"): Phase.ALONE_GREETING,
    (Phase.ALONE_GREETING, "welcome"): Phase.JOINED,
    (Phase.ALONE_GREETING, "lost"): Phase.ALONE,
    (Phase.JOINED, "lost"): Phase.ALONE,
    (Phase.JOINED, "resync"): Phase.LIVE,
    (Phase.JOINED, "suspend"): Phase.SUSPENDING,  # suspended again while it was made ready for a resync
    **{(phase, "reform"): Phase.ALONE for phase in Phase if phase is not Phase.FAILED},
    **{(phase, "failed"): Phase.FAILED for phase in Phase},
    (Phase.FAILED, "lost"): Phase.FAILED,
}
SUSPENDED = frozenset({Phase.ALONE, Phase.ALONE_GREETING, Phase.JOINED})
SERVING = frozenset({Phase.DETACHED, Phase.GREETING, Phase.LIVE, Phase.SUSPENDING}) | SUSPENDED


class Primary:
    """One primary of a group.

    Invariants: checkpoint <= stored = acked <= numbered at the intermediate; batch numbers rise by one; a batch is
    completed to its host at most once, and with success only after it is stored in the P-VOL.
    """

    def __init__(
        self,
        *,
        group: bytes,
        node: int,
        name: str,
        intermediate: int,
        streams: dict[int, int],
        state: PrimaryState,
        policy: Policy,
        bitmaps: Mapping[int, Bitmap] | None = None,
        clean: bool = True,
    ) -> None:
        """``streams``: volume id → secondary id. ``state.incarnation`` was raised durably by this process.

        ``bitmaps``: volume id → bits. ``clean``: the process before this one stopped with its bits stored.
        """
        self.group = group
        self.node = node
        self._me = Introduction(group, node, name, LinkRole.PRIMARY)
        self.intermediate = intermediate
        self.streams = streams
        self.policy = policy
        self.state = state
        self.bitmaps = bitmaps or {}
        # A primary that has stored PSUE never replays: its P-VOLs are the truth (rule 7).
        self.machine: Machine[Phase] = Machine(TABLE, Phase.ALONE if state.suspended else Phase.FRESH)
        self.queue = PendingQueue()
        self.next_batch = 1
        self.acked = state.checkpoint  # highest number known acknowledged; all of it is stored (page cache)
        self.checkpoint = state.checkpoint  # stored durably: others may be told (rule 7)
        self.validated = 0
        self.refusal = ""  # why the intermediate last refused, or why we stopped
        self._link = 0
        self._nonce = b""
        self._credit = 0
        self._credit_used = 0
        self._welcome: dict[str, Any] = {}
        self._replayed = 0
        self._heard_s = 0.0
        self._beat_s = 0.0
        self._stamp_ns = 0
        self.stamp_received_s: float | None = None  # when the newest of the intermediate's stamps came, ever
        self._token = 0
        self._tokens: dict[int, tuple[str, int]] = {}
        self._then: dict[int, Then] = {}
        self._checkpointing = False
        self._checkpoint_s = 0.0
        self._uncheckpointed_bytes = 0
        self.numbering = True  # the intermediate numbers batches
        self.pair = Pair.PAIR  # of the group, as the intermediate says
        self.welcomed_through = 0
        self._trusted_from = 0 if clean else NEVER  # ranges at or below it are not known
        self.locks = RangeLocks(self.queue)
        self.unconfirmed = Unconfirmed(self.bitmaps)
        self.solo = SoloWrites(self.bitmaps)
        self.suspension = Suspension(self)
        self.resyncing = Resyncing(self)

    # what the host of this role asks

    @property
    def phase(self) -> Phase:
        """Where it is."""
        return self.machine.state

    @property
    def serving(self) -> bool:
        """Whether reads are served (rule 7: never before the replay is done)."""
        return self.machine.state in SERVING

    @property
    def link(self) -> int:
        """The link to the intermediate, 0 for none."""
        return self._link

    @property
    def congested(self) -> bool:
        """Front ends must stop reading from their hosts."""
        waiting = self.queue.size_bytes + self.locks.deferred_bytes + self.solo.size_bytes
        return waiting >= self.policy.pending_bytes

    @property
    def fenced(self) -> bool:
        """A higher epoch than the one it works in is known: no write completes until a WELCOME names it (rule 24)."""
        return self.state.promised.number > self.state.epoch.number

    @property
    def live(self) -> bool:
        """Linked, and working with the intermediate."""
        return self.machine.state is Phase.LIVE

    @property
    def suspending(self) -> bool:
        """About to go on alone."""
        return self.machine.state is Phase.SUSPENDING

    @property
    def trusted(self) -> bool:
        """The ranges in memory, with the bitmaps, say all that the group may lack (rule 8)."""
        return self.validated >= self._trusted_from

    @property
    def dirty_bytes(self) -> int:
        """What the bitmaps say, in bytes of blocks."""
        return sum(bitmap.dirty_bytes for bitmap in self.bitmaps.values())

    def readable(self, volume: int, offset_bytes: int, length_bytes: int) -> bool:
        """Whether the P-VOL may be read there now: not while the fate of a failed write is open (rule 15)."""
        if not self.serving or self.fenced:
            return False
        return not self.queue.failed or not self.queue.overlaps(volume, offset_bytes, length_bytes, failed_only=True)

    # writes

    def submit(self, volume: int, batch: WriteBatch, now_s: float) -> list[Action]:
        """Take a batch of one volume. It is completed by `StoreBatch` or, held too long, by `FailBatch`."""
        if self.machine.state is Phase.FAILED:
            return [FailBatch(volume, batch, "the primary stopped after a disk error")]
        if self.state.alone and self.machine.state in SUSPENDED and not self.fenced and not self.resyncing.begins:
            return self.suspension.write(volume, batch)
        if len(self.locks) and self.locks.must_wait(volume, batch):
            self.locks.defer(volume, batch, now_s)
            return []
        self._enqueue(volume, batch, now_s)
        return self._send_more()

    def _enqueue(self, volume: int, batch: WriteBatch, now_s: float, *, failed: bool = False) -> None:
        head, size = encode_record(
            RecordKind.UPDATE, self.group, self.node, self.streams[volume], self.state.incarnation, self.next_batch,
            volume, batch.ops, batch.flags, batch.offsets, batch.lengths, batch.payloads, batch.size_bytes,
        )  # fmt: skip
        buffers: list[Buffer] = [head, *(view for view in batch.payloads if view is not None)]
        record = PendingRecord(self.next_batch, volume, batch, buffers, size, frame_bytes(size), now_s)
        if failed:
            record.failed = True
            self.queue.failed += 1
        self.queue.add(record)
        self.next_batch += 1

    def mark_pending(self, record: PendingRecord) -> None:
        """Set the bits of a write whose fate is open."""
        if record.batch is not None:
            bitmap = self.bitmaps[record.volume]
            for offset, length in zip(record.batch.offsets, record.batch.lengths, strict=True):
                bitmap.mark(offset, length)

    def begin_anew(self) -> None:
        """The group was formed anew: nothing that was acknowledged or validated counts any more."""
        self.machine.go("reform")
        self._link, self._welcome = 0, {}
        self.acked = self.checkpoint = self.validated = self.welcomed_through = 0
        self.numbering = False
        self.unconfirmed.clear()
        self.queue.rewind()

    def _send_more(self) -> list[Action]:
        if self.machine.state is not Phase.LIVE or not self.numbering:
            return []
        actions: list[Action] = []
        unsent, sent = self.queue.unsent, self.queue.sent
        while unsent and self._credit_used + unsent[0].frame_bytes <= self._credit:
            record = unsent.popleft()
            self._credit_used += record.frame_bytes
            sent.append(record)
            header = bulk_header(Message.BATCH, self.state.epoch.number, record.size_bytes)
            actions.append(Send(self._link, [header, *record.buffers]))
        return actions

    def acknowledged(self, batch: int, number: int, now_s: float) -> list[Action]:
        """Every batch up to ``batch`` is durable in the journal; the last of them has ``number``."""
        actions: list[Action] = []
        add = self.unconfirmed.add
        for record in self.queue.acknowledged(batch):
            self._uncheckpointed_bytes += record.size_bytes
            written = record.batch
            if written is not None:
                actions.append(StoreBatch(record.volume, written, not record.failed))
                add(number, record.volume, written.offsets, written.lengths)
            elif record.copy is not None and self.resyncing.copier is not None:
                self.resyncing.copier.acknowledged(*record.copy)
            elif record.metadata is not None and self.resyncing.copier is not None:
                self.resyncing.copier.metadata_done(record.metadata)
        self.acked = max(self.acked, number)
        self.unconfirmed.confirmed(min(self.validated, self.checkpoint))
        if len(self.locks):
            actions += self.read_ready()
        if self.resyncing.copier is not None:
            actions += self.resyncing.copy_more(now_s)
        if self._uncheckpointed_bytes >= self.policy.checkpoint_bytes:
            actions += self._checkpoint(now_s)
        return actions

    # the link

    def connected(self, link: int, nonce: bytes, now_s: float) -> list[Action]:
        """A connection to the intermediate is up: greet. ``nonce``: 16 random bytes."""
        if not self.machine.may("connected"):
            return [Close(link, "not now")]
        self.machine.go("connected")
        self._link, self._nonce, self._heard_s, self._welcome = link, nonce, now_s, {}
        state = self.state
        hello = self._me.hello(
            self.intermediate, nonce, epoch=state.epoch, promised=state.promised, incarnation=state.incarnation,
            highest=self.acked, checkpoint=self.checkpoint, fresh=not self.serving,
            suspended=bool(state.suspended), trusted=state.trusted or not state.suspended, direction=state.direction,
        )  # fmt: skip
        return [Send(link, [hello])]

    def lost(self, link: int, now_s: float) -> list[Action]:
        """A link is gone. Writes in flight are kept and will be sent again."""
        if link != self._link:
            return []
        self._link = 0
        self._credit = self._credit_used = 0
        self._stamp_ns = 0
        self.queue.rewind()
        if self.machine.may("lost"):
            self.machine.go("lost")
        aborted = self._abort_locks(now_s)
        self.resyncing.lost()
        return aborted

    def received(self, link: int, kind: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """A control message. Raises ProtocolError: the host then closes the link and calls `lost`."""
        if link != self._link:
            return []
        self._heard_s = now_s
        if kind == Message.ACK:
            return self._ack(fields, now_s)
        if kind == Message.HEARTBEAT:
            return self._heartbeat(fields, now_s)
        if kind == Message.WELCOME:
            return self._take_welcome(fields, now_s)
        if kind == Message.REFUSED:
            return self._refused(fields)
        if kind == Message.REPLAYED:
            return self._take_replayed(fields)
        if kind == Message.DIGESTED:
            if self.resyncing.compared(fields, now_s):
                return self.resyncing.copy_more(now_s)
            return [Digested(fields)]
        if kind == Message.SUSPEND:
            return self.suspension.told(fields["pair"], fields["number"])
        if kind == Message.BITMAP:
            return self.resyncing.bits(fields)
        if kind == Message.RESYNC:
            return self.resyncing.begin(fields, now_s)
        if kind == Message.RESYNCED:
            return self.resyncing.ended(fields["id"])
        raise ProtocolError(f"{Message(kind).name} does not belong on a primary's link")

    def _ack(self, fields: dict[str, Any], now_s: float) -> list[Action]:
        if self.machine.state is not Phase.LIVE:
            raise ProtocolError("ACK before WELCOME")
        if fields["incarnation"] != self.state.incarnation:
            return []  # for batches of a process that is dead: ours have the same numbers
        if self.queue.sent and fields["batch"] > self.queue.sent[-1].number:
            raise ProtocolError(f"ACK of batch {fields['batch']}, which was not sent")
        self._credit = max(self._credit, fields["credit"])
        self.validated = max(self.validated, fields["validated"])
        return self.acknowledged(fields["batch"], fields["number"], now_s) + self._send_more()

    def _heartbeat(self, fields: dict[str, Any], now_s: float) -> list[Action]:
        if fields["stamp_ns"] > self._stamp_ns:  # an answer to an older one says no more than it did
            self._stamp_ns = fields["stamp_ns"]
            self.stamp_received_s = now_s
            if self.policy.fence_never:
                self._beat_s = float("-inf")  # echo it at once: others wait for it (rule 16)
        self.pair = Pair(fields["pair"])
        self.validated = max(self.validated, fields["validated"])
        self.unconfirmed.confirmed(min(self.validated, self.checkpoint))
        if self.machine.state is not Phase.LIVE:
            return []
        self._credit = max(self._credit, fields["credit"])
        return self._send_more()

    def _refused(self, fields: dict[str, Any]) -> list[Action]:
        self.refusal = fields["text"]
        actions: list[Action] = [Event(f"the intermediate refused: {fields['text']}", {"code": fields["code"]})]
        higher: Epoch = max(fields["epoch"], fields["promised"])
        if higher.number > self.state.promised.number:  # whatever it was refused for (rule 24)
            self.state.promised = higher
            actions.append(self._save("fence"))
        return [*actions, Close(self._link, "refused")]

    def _take_welcome(self, fields: dict[str, Any], now_s: float) -> list[Action]:
        if not self.machine.may("welcome") or self._welcome:
            raise ProtocolError("WELCOME was not asked for")
        if fields["nonce"] != self._nonce:
            raise ProtocolError("WELCOME answers another HELLO")
        if fields["role"] != LinkRole.INTERMEDIATE or fields["node"] != self.intermediate:
            raise ProtocolError(f"node {fields['node']} is not the intermediate")
        known = max(self.state.epoch.number, self.state.promised.number)
        epoch: Epoch = fields["epoch"]
        if epoch.number < known:
            raise ProtocolError(f"WELCOME of epoch {epoch.number}, but epoch {known} exists")
        if fields["through"] < self.state.checkpoint and not self.state.suspended:
            raise ProtocolError("the intermediate holds less than this primary's checkpoint")
        self._welcome = fields
        self.refusal = ""
        if epoch == self.state.epoch:
            return self._enter(now_s)
        self.state.epoch = epoch
        self.state.promised = max(self.state.promised, epoch)
        return [self._save("welcome")]

    def _enter(self, now_s: float) -> list[Action]:
        """The epoch is stored: replay, or send on where the intermediate is."""
        welcome = self._welcome
        phase = self.machine.go("welcome")
        self._credit = welcome["credit"]
        self.validated = max(self.validated, welcome["validated"])
        self.numbering, self.pair = welcome["numbering"], Pair(welcome["pair"])
        self.welcomed_through = welcome["through"]
        if phase is Phase.REPLAYING:
            if not self.trusted:
                self._trusted_from = welcome["through"]
            self._replayed = self.state.checkpoint
            return [Send(self._link, [encode(Message.REPLAY, self.state.epoch.number, after=self.state.checkpoint)])]
        if phase is Phase.JOINED:  # what it sent before is not the journal's any more: it has completed alone
            return [Event("joined; suspended: a resync is the way back")]
        # What was sent on the older connection is in `unsent` again; what of it is durable counts as acknowledged.
        unsent, sent = self.queue.unsent, self.queue.sent
        while unsent and unsent[0].number <= welcome["batch"]:
            sent.append(unsent.popleft())
        actions = self.acknowledged(welcome["batch"], welcome["through"], now_s)
        # One that was stored after our HELLO went out; an idle primary would never tell it otherwise.
        return actions + self._tell_checkpoint() + self._send_more() + self.resyncing.ended(welcome["resynced"])

    def numbered_again(self, now_s: float) -> list[Action]:
        """A resync has begun: the journal takes writes again, from where the intermediate says."""
        self.numbering = True
        if self.machine.state is Phase.JOINED:
            self.machine.go("resync")
            self.stamp_received_s = now_s  # it was alone on what it heard before: twice the lease begins anew
            self.checkpoint = max(self.checkpoint, self.state.checkpoint)
            self._trusted_from = 0
            self._renumber(self._welcome["batch"])
        return [*self._tell_checkpoint(), *self._send_more()]

    def _renumber(self, last: int) -> None:
        """What waits was numbered for another journal, or counts batches that were never sent."""
        self.next_batch = last + 1
        for record in self.queue.take_all():
            if record.batch is not None:
                self._enqueue(record.volume, record.batch, record.since_s, failed=record.failed)

    def record(self, link: int, head: RecordHead, record: memoryview, now_s: float) -> list[Action]:
        """A record of this primary's own comes back while replaying."""
        if link != self._link:
            return []
        self._heard_s = now_s
        if self.machine.state is not Phase.REPLAYING or head.sender != self.node or head.first <= self._replayed:
            raise ProtocolError(f"record {head.first} was not asked for")
        self._replayed = head.last
        if head.kind != RecordKind.UPDATE:
            return []
        for volume, _, _, offset, length, _ in iterate_entries(head, record):
            self.unconfirmed.add(head.last, volume, [offset], [length])
        return [StoreRecord(head, record)]

    def _take_replayed(self, fields: dict[str, Any]) -> list[Action]:
        if self.machine.state is not Phase.REPLAYING or fields["through"] != self._welcome["through"]:
            raise ProtocolError("REPLAYED does not fit WELCOME")
        self.machine.go("replayed")
        self.acked = fields["through"]
        return [self._sync_volumes("settle")]

    # durability

    def _next_token(self, purpose: str, number: int) -> int:
        self._token += 1
        self._tokens[self._token] = (purpose, number)
        return self._token

    def next_token(self) -> int:
        """A new one."""
        self._token += 1
        return self._token

    def expect(self, then: Then) -> int:
        """The token of an action whose answer is ``then``."""
        token = self.next_token()
        self._then[token] = then
        return token

    def save_state(self, then: Then) -> SaveState:
        """Store the state; then ``then``."""
        return SaveState(self.expect(then))

    def sync_volumes(self, then: Then) -> SyncVolumes:
        """Make the P-VOLs durable as they are now; then ``then``."""
        return SyncVolumes(self.expect(then))

    def done(self, token: int, now_s: float) -> list[Action]:
        """An action of `expect` is done."""
        then = self._then.pop(token)
        return [] if self.machine.state is Phase.FAILED else then(now_s)

    def _save(self, purpose: str) -> SaveState:
        return SaveState(self._next_token(purpose, self._link))

    def _sync_volumes(self, purpose: str) -> SyncVolumes:
        # The number is taken before the sync (rule 4): what is stored while it runs may miss it.
        return SyncVolumes(self._next_token(purpose, self.acked))

    def _checkpoint(self, now_s: float) -> list[Action]:
        if self._checkpointing or self.acked <= self.state.checkpoint or self.state.suspended or self.suspending:
            return []
        self._checkpointing = True
        self._checkpoint_s = now_s
        self._uncheckpointed_bytes = 0
        return [self._sync_volumes("checkpoint")]

    def volumes_synced(self, token: int, now_s: float) -> list[Action]:
        """The images are durable as they were when `SyncVolumes` was performed."""
        if token in self._then:
            return self.done(token, now_s)
        purpose, number = self._tokens.pop(token)
        if self.machine.state is Phase.FAILED:
            return []
        self.state.checkpoint = max(self.state.checkpoint, number)
        if self.resyncing.copier is not None:
            self.state.cursor_volume, self.state.cursor_block = self.resyncing.copier.cursor
        return [SaveState(self._next_token(purpose, self.state.checkpoint))]

    def saved(self, token: int, now_s: float) -> list[Action]:
        """The state file is durable."""
        if token in self._then:
            return self.done(token, now_s)
        purpose, number = self._tokens.pop(token)
        if purpose == "welcome":
            return self._enter(now_s) if number == self._link and self._welcome and self.machine.may("welcome") else []
        if purpose == "fence":
            return []
        self.checkpoint = max(self.checkpoint, number)
        if purpose == "settle":
            return self._settled(now_s)
        self._checkpointing = False
        self.unconfirmed.confirmed(min(self.validated, self.checkpoint))
        return self._tell_checkpoint()

    def _settled(self, now_s: float) -> list[Action]:
        if self.machine.state is not Phase.SETTLING:
            return []
        self._checkpoint_s = now_s
        if not self._link:
            self.machine.go("settled, link lost")
            return [Event("serving; the intermediate is away")]
        self.machine.go("settled")
        return [Event("serving"), *self._tell_checkpoint(), *self._send_more()]

    def _tell_checkpoint(self) -> list[Action]:
        if self.machine.state is not Phase.LIVE:
            return []
        message = encode(Message.CHECKPOINT, self.state.epoch.number, number=self.checkpoint)
        return [Send(self._link, [message])]

    def failed(self, reason: str) -> list[Action]:
        """A disk error: no acknowledgement and no checkpoint covers those bytes (rule 11)."""
        if self.machine.state is Phase.FAILED:
            return []
        self.machine.go("failed")
        self.refusal = f"stopped after a disk error: {reason}; see to the disk, then start this node again"
        actions: list[Action] = [Event(f"stopped: {reason}")]
        for record in self.queue.expire(float("inf")):
            if record.batch is not None:
                actions.append(FailBatch(record.volume, record.batch, reason))
        actions += [FailBatch(volume, batch, reason) for volume, batch, _ in self.locks.give_up()]
        actions += [FailBatch(solo.volume, solo.batch, reason) for solo in self.solo.give_up() if solo.report]
        if self._link:
            actions.append(Close(self._link, reason))
        return actions

    # digests and copies under the overlap lock (rule 19)

    def digest(self, volume: int, offset_bytes: int, length_bytes: int) -> list[Action]:
        """Compare a range of a volume with its S-VOL at one number; answered by `Digested`."""
        self.locks.lock(self.next_token(), Purpose.VERIFY, volume, offset_bytes, offset_bytes + length_bytes)
        return self.read_ready()

    def read_ready(self) -> list[Action]:
        """Ranges that no write in flight touches are read now; later writes to them wait."""
        actions: list[Action] = []
        for token, (purpose, volume, start, end) in self.locks.ready():
            if purpose in COPIES:
                actions.append(ReadBlocks(volume, start, end - start, token))
            elif purpose is Purpose.METADATA:
                actions.append(ReadMetadata(volume, token))
            else:
                actions.append(DigestBlocks(volume, start, end - start, token))
        return actions

    def _abort_locks(self, now_s: float) -> list[Action]:
        """Ranges that still wait for writes in flight are given up: nobody knows when those come through."""
        actions: list[Action] = [
            Digested({"volume": volume, "offset_bytes": start, "length_bytes": end - start, "aborted": True})
            for purpose, volume, start, end in self.locks.abort()
            if purpose is Purpose.VERIFY
        ]
        self._release_deferred()
        return actions

    def _release_deferred(self) -> None:
        for volume, batch, since_s in self.locks.let_go():
            self._enqueue(volume, batch, since_s)

    def digest_ready(self, token: int, block_bytes: int, digests: list[bytes], now_s: float) -> list[Action]:
        """The blocks of a locked range are read and digested: send them, and let the waiting writes go."""
        purpose, volume, start, end = self.locks.release(token)
        offsets = list(range(start, end, block_bytes))
        lengths = [min(block_bytes, end - offset) for offset in offsets]
        payload = b"".join(digests)
        assert len(payload) == DIGEST_BYTES * len(offsets)
        head, size = encode_record(
            RecordKind.DIGEST, self.group, self.node, self.streams[volume], self.state.incarnation, self.next_batch,
            volume, [OP_DIGEST] * len(offsets), [0] * len(offsets), offsets, lengths, [payload], len(payload),
        )  # fmt: skip
        digest = (volume, start) if purpose is Purpose.DIGEST else None
        return self._queue_read(volume, [head, payload], size, now_s, digest=digest)

    def blocks_read(self, token: int, data: bytes | bytearray, now_s: float) -> list[Action]:
        """A locked range is read: it travels as a COPY record; zeroes travel as such."""
        purpose, volume, start, _ = self.locks.release(token)
        stream = self.intermediate if purpose is Purpose.COPY_HERE else self.streams[volume]
        zero = data.count(0) == len(data)
        head, size = encode_record(
            RecordKind.UPDATE, self.group, self.node, stream, self.state.incarnation, self.next_batch,
            volume, [Op.ZERO if zero else Op.WRITE], [0], [start], [len(data)], [None if zero else data],
            0 if zero else len(data), RecordFlag.COPY,
        )  # fmt: skip
        return self._queue_read(volume, [head] if zero else [head, data], size, now_s, copy=(volume, start))

    def metadata_read(self, token: int, data: bytes, now_s: float) -> list[Action]:
        """What front ends keep with a volume, at one number: it travels as a METADATA write."""
        _, volume, _, _ = self.locks.release(token)
        if not data:
            if self.resyncing.copier is not None:
                self.resyncing.copier.metadata_done(volume)
            self._release_deferred()
            return self._send_more()
        head, size = encode_record(
            RecordKind.UPDATE, self.group, self.node, self.streams[volume], self.state.incarnation, self.next_batch,
            volume, [Op.METADATA], [0], [0], [len(data)], [data], len(data), RecordFlag.COPY,
        )  # fmt: skip
        return self._queue_read(volume, [head, data], size, now_s, metadata=volume)

    def _queue_read(
        self, volume: int, buffers: list[Buffer], size: int, now_s: float, *, copy: tuple[int, int] | None = None,
        digest: tuple[int, int] | None = None, metadata: int | None = None,
    ) -> list[Action]:  # fmt: skip
        """A record of what was read; then the writes that waited for it. Suspended meanwhile: it is nobody's."""
        if self.machine.state not in SUSPENDED and not self.suspending:
            self.queue.add(
                PendingRecord(
                    self.next_batch,
                    volume,
                    None,
                    buffers,
                    size,
                    frame_bytes(size),
                    now_s,
                    copy=copy,
                    digest=digest,
                    metadata=metadata,
                )
            )
            self.next_batch += 1
        self._release_deferred()
        return self._send_more()

    # time

    def tick(self, now_s: float, boot_ns: int) -> list[Action]:
        """Called every few tens of milliseconds: heartbeats, checkpoints, held writes, dead links."""
        actions: list[Action] = []
        if now_s - self._checkpoint_s >= self.policy.checkpoint_s and self.machine.state in SERVING:
            actions += self._checkpoint(now_s)
        actions += self.suspension.tick(now_s)
        if self.live:
            actions += self.resyncing.forget_old_bits()
        if self.resyncing.under_way:
            actions += self.resyncing.proceed(now_s) + self.resyncing.copy_more(now_s)
        for record in self.queue.expire(now_s - self.policy.hold_s):
            if record.batch is not None:
                actions.append(FailBatch(record.volume, record.batch, self.why_held()))
        if self._link and now_s - self._heard_s > self.policy.link_timeout_s:
            actions.append(Close(self._link, f"nothing heard for {self.policy.link_timeout_s} s"))
        elif self._link and now_s - self._beat_s >= self.policy.heartbeat_s:
            self._beat_s = now_s
            actions.append(Send(self._link, [self._beat(boot_ns)]))
        return actions

    def _beat(self, boot_ns: int) -> bytes:
        return encode(
            Message.HEARTBEAT, self.state.epoch.number, stamp_ns=boot_ns, echo_ns=self._stamp_ns, numbered=self.acked,
            validated=self.validated, applied=self.state.checkpoint, credit=self._wanted(), pair=self.pair,
        )  # fmt: skip

    def _wanted(self) -> int:
        """Frame bytes of the next record, when it waits for credit."""
        if not self.live or not self.queue.unsent or not self.numbering:
            return 0
        wanted = self.queue.unsent[0].frame_bytes
        return wanted if self._credit_used + wanted > self._credit else 0

    def why_held(self) -> str:
        """For people: why no write completes now; empty when they do."""
        if self.machine.state is Phase.LIVE:
            if not self.numbering:
                return f"the group is suspended ({self.pair.name}): blockrepl pair resync"
            return "" if self._credit_used < self._credit else "journal full: waiting for the secondaries"
        if self.machine.state in SUSPENDED and not self.fenced:
            return "" if self.state.alone else f"suspended ({Pair(self.state.suspended).name}): blockrepl pair resync"
        if self.fenced and self.machine.state is not Phase.FAILED:
            return f"fenced: epoch {self.state.promised.number} exists, this side works in {self.state.epoch.number}"
        return self.refusal or "the intermediate cannot be reached (fence data)"
