"""The primary of a group: host writes out to the intermediate, acknowledged writes into the P-VOLs. No I/O.

The order of a write: submit → numbered, journaled and synced by the intermediate → acknowledged → stored in the P-VOL
→ complete to the host. So a P-VOL never holds what the journal does not, and a primary that crashed is repaired by
replaying its own records above its checkpoint (PROTOCOL, rules 1 to 8).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from blockrepl.bitmap import Bitmap
from blockrepl.block import Buffer, WriteBatch
from blockrepl.errors import ProtocolError
from blockrepl.formats.journal import frame_bytes
from blockrepl.formats.link import Message, Pair, bulk_header, encode
from blockrepl.formats.record import RecordHead, RecordKind, encode_record
from blockrepl.formats.state import PrimaryState
from blockrepl.replication.actions import (
    Action,
    Close,
    Digested,
    Event,
    FailBatch,
    SaveBits,
    SaveState,
    Send,
    StoreBatch,
    SyncVolumes,
    TakeConfig,
)
from blockrepl.replication.alone import SoloWrites, Unconfirmed, mark
from blockrepl.replication.checkpoints import Checkpoints, Then
from blockrepl.replication.joining import Joining
from blockrepl.replication.locks import RangeLocks
from blockrepl.replication.machine import Machine
from blockrepl.replication.pending import PendingQueue, PendingRecord
from blockrepl.replication.policy import Policy
from blockrepl.replication.reading import Reading
from blockrepl.replication.resyncing import Resyncing
from blockrepl.replication.suspension import Suspension

NEVER = 1 << 64


class Phase(Enum):
    """Where a primary is. It serves reads from DETACHED on, and completes writes in LIVE and, alone, when suspended."""

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
    REJOINING = "rejoining"  # a resync begins: making that durable; no write completes
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
    (Phase.FRESH, "suspend"): Phase.SUSPENDING,  # only when an operator lets it
    (Phase.DETACHED, "suspend"): Phase.SUSPENDING,
    (Phase.SUSPENDING, "suspended"): Phase.ALONE,
    (Phase.ALONE, "connected"): Phase.ALONE_GREETING,
    (Phase.ALONE_GREETING, "welcome"): Phase.JOINED,
    (Phase.ALONE_GREETING, "lost"): Phase.ALONE,
    (Phase.JOINED, "lost"): Phase.ALONE,
    (Phase.JOINED, "resync"): Phase.REJOINING,
    (Phase.REJOINING, "lost"): Phase.ALONE,
    (Phase.REJOINING, "lost, following"): Phase.DETACHED,  # it is being stored that the journal counts again
    (Phase.REJOINING, "rejoined"): Phase.LIVE,
    **{(phase, "reform"): Phase.ALONE for phase in Phase if phase is not Phase.FAILED},
    **{(phase, "failed"): Phase.FAILED for phase in Phase},
    (Phase.FAILED, "lost"): Phase.FAILED,
}
SUSPENDED = frozenset({Phase.ALONE, Phase.ALONE_GREETING, Phase.JOINED})
FOLLOWING = frozenset({Phase.FRESH, Phase.FRESH_GREETING, Phase.DETACHED, Phase.GREETING, Phase.LIVE})
JOINED = frozenset({Phase.LIVE, Phase.JOINED, Phase.REJOINING})
SERVING = frozenset({Phase.DETACHED, Phase.GREETING, Phase.SUSPENDING}) | SUSPENDED | JOINED


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
        alone: bool = False,
    ) -> None:
        """``streams``: volume id → secondary id. ``state.incarnation`` was raised durably by this process.

        ``bitmaps``: volume id → bits. ``clean``: the process before this one stopped with its bits stored. ``alone``:
        it may go alone (with fence never), or be it again, though it never met the intermediate (rule 24).
        """
        self.group = group
        self.node = node
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
        self.validated = 0
        self.refusal = ""  # why the intermediate last refused, or why we stopped
        self.parted = ""  # split brain, in words
        self.link = 0  # to the intermediate; 0 for none
        self._credit = 0
        self._credit_used = 0
        self._heard_s = 0.0
        self._beat_s = 0.0
        self._stamp_ns = 0
        self.stamp_received_s: float | None = None  # when the newest of the intermediate's stamps came, at the latest
        self._token = 0
        self._then: dict[int, tuple[int, Then]] = {}  # token → (era, what follows)
        self._era = 1
        self.numbering = True  # the intermediate numbers batches
        self.config = 0  # digest of the newest configuration that this node has files for
        self._config_told = 0  # the link on which it was told
        self.pair = Pair.PAIR  # of the group, as the intermediate says
        self._foreign_batches = False  # what waits has numbers of another journal, or counts what was never sent
        self._trusted_from = 0 if clean else NEVER  # ranges at or below it are not known
        self.locks = RangeLocks(self.queue)
        self.unconfirmed = Unconfirmed(self.bitmaps)
        self.solo = SoloWrites(self.bitmaps)
        self.checkpoints = Checkpoints(self)
        self.joining = Joining(self, name)
        self.reading = Reading(self)
        self.resyncing = Resyncing(self)
        self.suspension = Suspension(self, asked=alone)

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
    def congested(self) -> bool:
        """Front ends must stop reading from their hosts."""
        waiting = self.queue.size_bytes + self.locks.waiting_bytes + self.solo.size_bytes
        return waiting >= self.policy.pending_bytes

    @property
    def fenced(self) -> bool:
        """A higher epoch than the one it works in is known: no write completes until a WELCOME names it (rule 24).

        Nor when the intermediate works in another epoch of the same number (rule 22).
        """
        return self.state.promised.number > self.state.epoch.number or bool(self.parted)

    @property
    def live(self) -> bool:
        """Linked, and working with the intermediate."""
        return self.machine.state is Phase.LIVE

    @property
    def joined(self) -> bool:
        """Welcomed, with nothing to replay."""
        return self.machine.state in JOINED

    @property
    def replaying(self) -> bool:
        """Its own records come back."""
        return self.machine.state is Phase.REPLAYING

    @property
    def rejoining(self) -> bool:
        """A resync begins, and no write completes."""
        return self.machine.state is Phase.REJOINING

    @property
    def suspended(self) -> bool:
        """Without the group; whether writes complete is another question."""
        return self.machine.state in SUSPENDED

    @property
    def suspending(self) -> bool:
        """About to go on alone."""
        return self.machine.state is Phase.SUSPENDING

    @property
    def may_go_alone(self) -> bool:
        """Where "suspend" leads on from, once the link is gone."""
        return self.machine.state in FOLLOWING and not (self.suspension.reforming or self.suspension.promised)

    @property
    def failing(self) -> bool:
        """Stopped after a disk error."""
        return self.machine.state is Phase.FAILED

    @property
    def copying(self) -> bool:
        """Between START and END, as far as it knows: a takeover goes back to where the copy began (rule 20)."""
        return bool(self.state.resync) or self.resyncing.begins or self.pair is Pair.COPY

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
        if len(self.locks) and self.locks.must_wait(volume, batch):
            self.locks.defer(volume, batch, now_s)
            return []
        if self.suspension.completes and not self.queue:  # what waits since a fence goes first
            return self.suspension.write(volume, batch)
        self.enqueue(volume, batch, now_s)
        return self.send_more()

    def enqueue(self, volume: int, batch: WriteBatch, now_s: float, *, failed: bool = False) -> None:
        """Make a record of a batch, behind all that waits."""
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
            mark(self.bitmaps[record.volume], record.batch.offsets, record.batch.lengths)

    def send_more(self) -> list[Action]:
        """What the credit allows."""
        if self.machine.state is not Phase.LIVE or not self.numbering:
            return []
        actions: list[Action] = []
        unsent, sent = self.queue.unsent, self.queue.sent
        while unsent and self._credit_used + unsent[0].frame_bytes <= self._credit:
            record = unsent.popleft()
            self._credit_used += record.frame_bytes
            sent.append(record)
            header = bulk_header(Message.BATCH, self.state.epoch.number, record.size_bytes)
            actions.append(Send(self.link, [header, *record.buffers]))
        return actions

    def acknowledged(self, batch: int, number: int, now_s: float) -> list[Action]:
        """Every batch up to ``batch`` is durable in the journal; the last of them has ``number``."""
        actions: list[Action] = []
        add, size_bytes = self.unconfirmed.add, 0
        for record in self.queue.acknowledged(batch):
            size_bytes += record.size_bytes
            written = record.batch
            if written is not None:
                actions.append(StoreBatch(record.volume, written, not record.failed))
                add(number, record.volume, written.offsets, written.lengths)
            else:
                self.resyncing.acknowledged(record, now_s)
        self.acked = max(self.acked, number)
        self.confirm()
        if len(self.locks):
            actions += self.reading.ready()
        if self.resyncing.copier is not None:
            actions += self.resyncing.copy_more(now_s)
        return actions + self.checkpoints.stored(size_bytes, now_s)

    def confirm(self) -> None:
        """What is validated, and durable in the P-VOLs, need not be remembered."""
        self.unconfirmed.confirmed(min(self.validated, self.checkpoints.told), copying=self.copying)

    def know_all(self) -> None:
        """Both ends are the same, but for what is remembered."""
        self._trusted_from = 0

    # the link

    def connected(self, link: int, nonce: bytes, now_s: float) -> list[Action]:
        """A connection to the intermediate is up: greet. ``nonce``: 16 random bytes."""
        if self.suspension.reforming or not self.machine.may("connected"):
            return [Close(link, "not now")]
        self.machine.go("connected")
        self.link, self._heard_s = link, now_s
        return self.joining.hello(link, nonce)

    def lost(self, link: int, now_s: float) -> list[Action]:
        """A link is gone. Writes in flight are kept and will be sent again."""
        return self._unlink() if link == self.link else []

    def drop_link(self, reason: str) -> list[Action]:
        """Close the link, if there is one: what comes on it is not heard any more."""
        return [Close(self.link, reason), *self._unlink()] if self.link else []

    def _unlink(self) -> list[Action]:
        self.link = 0
        self._credit = self._credit_used = 0
        self._stamp_ns = 0
        self.queue.rewind()
        following = self.machine.state is Phase.REJOINING and not self.state.suspended
        event = "lost, following" if following else "lost"
        if self.machine.may(event):
            self.machine.go(event)
        aborted = self.reading.abort()
        self.resyncing.lost()
        return [*aborted, *self.suspension.complete_waiting()]

    def received(self, link: int, kind: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """A control message. Raises ProtocolError: the host then closes the link and calls `lost`."""
        if link != self.link:
            return []
        self._heard_s = now_s
        if kind == Message.ACK:
            return self._ack(fields, now_s)
        if kind == Message.HEARTBEAT:
            return self._heartbeat(fields, now_s)
        if kind == Message.WELCOME:
            return self.joining.welcome(fields, now_s)
        if kind == Message.REFUSED:
            return self.joining.refused(fields)
        if kind == Message.REPLAYED:
            return self.joining.replayed(fields)
        if kind == Message.DIGESTED:
            return self.resyncing.copy_more(now_s) if self.resyncing.compared(fields) else [Digested(fields)]
        if kind == Message.SUSPEND:
            self.pair = Pair(fields["pair"])
            return self.suspension.told(fields["number"])
        if kind == Message.BITMAP:
            return self.resyncing.bits(fields)
        if kind == Message.RESYNC:
            return self.resyncing.begin(fields, now_s)
        if kind == Message.RESYNCED:
            return self.resyncing.ended(fields["id"])
        if kind == Message.CONFIG:
            return [TakeConfig(fields["digest"], fields["number"])]
        raise ProtocolError(f"{Message(kind).name} does not belong on a primary's link")

    def record(self, link: int, head: RecordHead, record: memoryview, now_s: float) -> list[Action]:
        """A record of this primary's own comes back while replaying. Raises ProtocolError."""
        if link != self.link:
            return []
        self._heard_s = now_s
        return self.joining.record(head, record)

    def _ack(self, fields: dict[str, Any], now_s: float) -> list[Action]:
        if self.machine.state is not Phase.LIVE:
            raise ProtocolError("ACK before WELCOME")
        if fields["incarnation"] != self.state.incarnation:
            return []  # for batches of a process that is dead: ours have the same numbers
        if self.queue.sent and fields["batch"] > self.queue.sent[-1].number:
            raise ProtocolError(f"ACK of batch {fields['batch']}, which was not sent")
        self._credit = max(self._credit, fields["credit"])
        self.validated = max(self.validated, fields["validated"])
        return self.acknowledged(fields["batch"], fields["number"], now_s) + self.send_more()

    def _heartbeat(self, fields: dict[str, Any], now_s: float) -> list[Action]:
        if fields["stamp_ns"] > self._stamp_ns:  # an answer to an older one says no more than it did
            self._stamp_ns = fields["stamp_ns"]
            self.stamp_received_s = now_s
            if self.policy.fence_never:
                self._beat_s = float("-inf")  # echo it at once: others wait for it (rule 16)
        self.pair = Pair(fields["pair"])
        self.validated = max(self.validated, fields["validated"])
        self.confirm()
        if self.machine.state is not Phase.LIVE:
            return []
        self._credit = max(self._credit, fields["credit"])
        return self.send_more()

    # steps of joining

    def welcomed(self, welcome: dict[str, Any], now_s: float) -> None:
        """WELCOME counts now. Before its first stamp comes the lease is reckoned from here: that is later."""
        self._credit = welcome["credit"]
        self.numbering, self.pair = welcome["numbering"], Pair(welcome["pair"])
        self.validated = max(self.validated, welcome["validated"])
        self.suspension.confirmed = True
        if self.stamp_received_s is None:
            self.stamp_received_s = now_s
        if self.replaying and not self.trusted:
            # Between START and END nobody knows what is below until the resync has ended.
            self._trusted_from = NEVER if self.state.resync else welcome["through"]

    def catch_up(self, batch: int) -> None:
        """The intermediate has everything up to ``batch``: of what waits, that counts as sent."""
        if self._foreign_batches:
            self._renumber()
            return
        unsent, sent = self.queue.unsent, self.queue.sent
        while unsent and unsent[0].number <= batch:
            sent.append(unsent.popleft())

    def settled(self, now_s: float) -> list[Action]:
        """What was replayed is durable: serve."""
        if self.machine.state is not Phase.SETTLING:
            return []
        if not self.link:
            self.machine.go("settled, link lost")
            return [Event("serving; the intermediate is away")]
        self.machine.go("settled")
        return [Event("serving"), *self.checkpoints.tell(), *self.joining.joined(now_s)]

    def numbered_again(self, now_s: float) -> list[Action]:
        """A resync has begun: the journal takes writes again, from where the intermediate says."""
        self.numbering = True
        if self.machine.state is Phase.REJOINING:
            self.machine.go("rejoined")
            self.stamp_received_s = now_s  # it was alone on what it heard before: twice the lease begins anew
            self.checkpoints.told = self.state.checkpoint
            self.know_all()
            self._renumber()
        return [*self.checkpoints.tell(), *self.send_more()]

    def _renumber(self) -> None:
        self._foreign_batches = False
        self.next_batch = self.joining.batch + 1
        for record in self.queue.take_all():
            if record.batch is not None:
                self.enqueue(record.volume, record.batch, record.since_s, failed=record.failed)

    def begin_era(self) -> None:
        """What was asked of the disk for the journal's sake has no sequel."""
        self._era += 1
        self._foreign_batches = True
        self.checkpoints.begin_anew()
        self.resyncing.begin_anew()

    def begin_anew(self) -> None:
        """The group was formed anew: nothing that was acknowledged or validated counts any more."""
        self.machine.go("reform")
        self.acked = self.checkpoints.told = self.validated = 0
        self.numbering = False
        self.unconfirmed.clear()

    # durability

    def next_token(self) -> int:
        """A new one."""
        self._token += 1
        return self._token

    def _expect(self, then: Then, *, lasting: bool = False) -> int:
        token = self.next_token()
        self._then[token] = 0 if lasting else self._era, then
        return token

    def save_state(self, then: Then) -> SaveState:
        """Store the state; then ``then``, unless another era has begun."""
        return SaveState(self._expect(then))

    def sync_volumes(self, then: Then) -> SyncVolumes:
        """Make the P-VOLs durable as they are now; then ``then``, unless another era has begun."""
        return SyncVolumes(self._expect(then))

    def save_bits(self, then: Then, *, lasting: bool = False) -> SaveBits:
        """Make the bitmaps durable as they are now; then ``then``, unless another era has begun (or ``lasting``)."""
        self.solo.saves += 1
        return SaveBits(self._expect(then, lasting=lasting))

    def volumes_synced(self, token: int, now_s: float) -> list[Action]:
        """The images are durable as they were when `SyncVolumes` was performed."""
        return self._done(token, now_s)

    def saved(self, token: int, now_s: float) -> list[Action]:
        """The state file is durable."""
        return self._done(token, now_s)

    def bits_saved(self, token: int, now_s: float) -> list[Action]:
        """The bitmaps are durable as they were when `SaveBits` was performed."""
        self.solo.saves -= 1
        return self._done(token, now_s)

    def _done(self, token: int, now_s: float) -> list[Action]:
        era, then = self._then.pop(token)
        return then(now_s) if era in (0, self._era) and not self.failing else []

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
        actions += [FailBatch(volume, batch, reason) for volume, batch, _ in self.locks.void()]
        actions += [FailBatch(solo.volume, solo.batch, reason) for solo in self.solo.give_up() if solo.report]
        if self.link:
            actions.append(Close(self.link, reason))
        return actions

    # digests and copies

    def digest(self, volume: int, offset_bytes: int, length_bytes: int) -> list[Action]:
        """Compare a range of a volume with its S-VOL at one number; answered by `Digested`."""
        return self.reading.digest(volume, offset_bytes, length_bytes)

    def digest_ready(self, token: int, block_bytes: int, digests: list[bytes], now_s: float) -> list[Action]:
        """The blocks of a range are read and digested."""
        return self.reading.digested(token, block_bytes, digests, now_s)

    def blocks_read(self, token: int, data: bytes | bytearray, now_s: float) -> list[Action]:
        """The blocks of a range are read."""
        return self.reading.read(token, data, now_s)

    def metadata_read(self, token: int, data: bytes, now_s: float) -> list[Action]:
        """What front ends keep with a volume is read; empty when there is nothing."""
        return self.reading.metadata(token, data, now_s)

    # time

    def tick(self, now_s: float, boot_ns: int) -> list[Action]:
        """Called every few tens of milliseconds: heartbeats, checkpoints, held writes, dead links."""
        actions = self.checkpoints.tick(now_s) + self.suspension.tick(now_s)
        if self.live:
            actions += self.resyncing.forget_old_bits()
        if self.resyncing.under_way:
            actions += self.resyncing.proceed(now_s) + self.resyncing.copy_more(now_s)
        for record in self.queue.expire(now_s - self.policy.hold_s):
            if record.batch is not None:
                actions.append(FailBatch(record.volume, record.batch, self.why_held()))
        if self.link and now_s - self._heard_s > self.policy.link_timeout_s:
            actions.append(Close(self.link, f"nothing heard for {self.policy.link_timeout_s} s"))
        elif self.link and now_s - self._beat_s >= self.policy.heartbeat_s:
            self._beat_s = now_s
            actions.append(Send(self.link, [self._beat(boot_ns)]))
        if self.config and self.joined and self._config_told != self.link:
            actions += self._tell_config()
        return actions

    def prepared_for(self, config: int) -> None:
        """This node has files for a configuration: the intermediate hears of it at the next tick."""
        self.config, self._config_told = config, 0

    def _tell_config(self) -> list[Action]:
        self._config_told = self.link
        return [Send(self.link, [encode(Message.CONFIG, self.state.epoch.number, digest=self.config, number=0)])]

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
        if self.parted and not self.failing:
            return self.parted
        if self.machine.state is Phase.LIVE:
            if not self.numbering:
                return f"the group is suspended ({self.pair.name}): blockrepl pair resync"
            return "" if self._credit_used < self._credit else "journal full: waiting for the secondaries"
        if self.suspended and not self.fenced and self.state.alone and not self.suspension.confirmed:
            return (
                "started while suspended: it completes nothing before it has met the intermediate; "
                "started by `blockrepl up --alone` it would"
            )
        if self.suspended and not self.fenced:
            return "" if self.state.alone else f"suspended ({Pair(self.state.suspended).name}): blockrepl pair resync"
        if self.fenced and self.machine.state is not Phase.FAILED:
            return f"fenced: epoch {self.state.promised.number} exists, this side works in {self.state.epoch.number}"
        if self.suspension.promised:
            return f"epoch {self.suspension.bound().number} was promised to a swap or replacement: it has not ended"
        return self.refusal or "the intermediate cannot be reached (fence data)"
