"""The primary of a group: host writes out to the intermediate, acknowledged writes into the P-VOLs. No I/O.

The order of a write: submit → numbered, journaled and synced by the intermediate → acknowledged → stored in the P-VOL
→ complete to the host. So a P-VOL never holds what the journal does not, and a primary that crashed is repaired by
replaying its own records above its checkpoint (PROTOCOL, rules 1 to 8).
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Any

from blockrepl.block import Buffer, WriteBatch
from blockrepl.errors import ProtocolError
from blockrepl.formats.journal import frame_bytes
from blockrepl.formats.link import (
    Epoch,
    LinkRole,
    Message,
    bulk_header,
    encode,
)
from blockrepl.formats.record import DIGEST_BYTES, OP_DIGEST, RecordHead, RecordKind, encode_record
from blockrepl.formats.state import PrimaryState
from blockrepl.replication.actions import (
    Action,
    Close,
    DigestBlocks,
    Digested,
    Event,
    FailBatch,
    SaveState,
    Send,
    StoreBatch,
    StoreRecord,
    SyncVolumes,
)
from blockrepl.replication.greeting import Introduction
from blockrepl.replication.machine import Machine
from blockrepl.replication.pending import PendingQueue, PendingRecord, touches
from blockrepl.replication.policy import Policy


class Phase(Enum):
    """Where a primary is. It serves reads from DETACHED on, and completes writes only in LIVE."""

    FRESH = "fresh"  # started; must replay before anyone may read
    FRESH_GREETING = "greeting"  # HELLO sent, not recovered
    REPLAYING = "replaying"
    SETTLING = "settling"  # replayed; making the P-VOLs and the checkpoint durable
    DETACHED = "detached"  # recovered, no intermediate: fence `data` holds the writes
    GREETING = "reconnecting"
    LIVE = "live"
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
    **{(phase, "failed"): Phase.FAILED for phase in Phase},
    (Phase.FAILED, "lost"): Phase.FAILED,
}
SERVING = frozenset({Phase.DETACHED, Phase.GREETING, Phase.LIVE})


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
    ) -> None:
        """``streams``: volume id → secondary id. ``state.incarnation`` was raised durably by this process."""
        self.group = group
        self.node = node
        self._me = Introduction(group, node, name, LinkRole.PRIMARY)
        self.intermediate = intermediate
        self.streams = streams
        self.policy = policy
        self.state = state
        self.machine: Machine[Phase] = Machine(TABLE, Phase.FRESH)
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
        self._token = 0
        self._tokens: dict[int, tuple[str, int]] = {}
        self._checkpointing = False
        self._checkpoint_s = 0.0
        self._uncheckpointed_bytes = 0
        self._locks: dict[int, tuple[int, int, int]] = {}  # token → (volume, start, end): ranges under digest
        self._reading: set[int] = set()
        self._deferred: deque[tuple[int, WriteBatch, float]] = deque()
        self._deferred_bytes = 0

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
        return self.queue.size_bytes + self._deferred_bytes >= self.policy.pending_bytes

    @property
    def fenced(self) -> bool:
        """A higher epoch than the one it works in is known: no write completes until a WELCOME names it (rule 24)."""
        return self.state.promised.number > self.state.epoch.number

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
        if self._locks and self._must_wait(volume, batch):
            self._deferred.append((volume, batch, now_s))
            self._deferred_bytes += batch.size_bytes
            return []
        self._enqueue(volume, batch, now_s)
        return self._send_more()

    def _must_wait(self, volume: int, batch: WriteBatch) -> bool:
        """Behind a range that is being digested, or behind a batch that waits for one (order)."""
        return bool(self._deferred) or self._locked(volume, batch)

    def _enqueue(self, volume: int, batch: WriteBatch, now_s: float) -> None:
        head, size = encode_record(
            RecordKind.UPDATE, self.group, self.node, self.streams[volume], self.state.incarnation, self.next_batch,
            volume, batch.ops, batch.flags, batch.offsets, batch.lengths, batch.payloads, batch.size_bytes,
        )  # fmt: skip
        buffers: list[Buffer] = [head, *(view for view in batch.payloads if view is not None)]
        self.queue.add(PendingRecord(self.next_batch, volume, batch, buffers, size, frame_bytes(size), now_s))
        self.next_batch += 1

    def _send_more(self) -> list[Action]:
        if self.machine.state is not Phase.LIVE:
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
        for record in self.queue.acknowledged(batch):
            self._uncheckpointed_bytes += record.size_bytes
            if record.batch is not None:
                actions.append(StoreBatch(record.volume, record.batch, not record.failed))
        self.acked = max(self.acked, number)
        if self._locks:
            actions += self._digest_ready_ranges()
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
        return self._abort_digests()

    def received(self, link: int, kind: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """A control message. Raises ProtocolError: the host then closes the link and calls `lost`."""
        if link != self._link:
            return []
        self._heard_s = now_s
        if kind == Message.ACK:
            return self._ack(fields, now_s)
        if kind == Message.HEARTBEAT:
            return self._heartbeat(fields)
        if kind == Message.WELCOME:
            return self._take_welcome(fields, now_s)
        if kind == Message.REFUSED:
            return self._refused(fields)
        if kind == Message.REPLAYED:
            return self._take_replayed(fields)
        if kind == Message.DIGESTED:
            return [Digested(fields)]
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

    def _heartbeat(self, fields: dict[str, Any]) -> list[Action]:
        self._stamp_ns = fields["stamp_ns"]
        self.validated = max(self.validated, fields["validated"])
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
        if fields["through"] < self.state.checkpoint:
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
        if phase is Phase.REPLAYING:
            self._replayed = self.state.checkpoint
            return [Send(self._link, [encode(Message.REPLAY, self.state.epoch.number, after=self.state.checkpoint)])]
        # What was sent on the older connection is in `unsent` again; what of it is durable counts as acknowledged.
        unsent, sent = self.queue.unsent, self.queue.sent
        while unsent and unsent[0].number <= welcome["batch"]:
            sent.append(unsent.popleft())
        actions = self.acknowledged(welcome["batch"], welcome["through"], now_s)
        # One that was stored after our HELLO went out; an idle primary would never tell it otherwise.
        return actions + self._tell_checkpoint() + self._send_more()

    def record(self, link: int, head: RecordHead, record: memoryview, now_s: float) -> list[Action]:
        """A record of this primary's own comes back while replaying."""
        if link != self._link:
            return []
        self._heard_s = now_s
        if self.machine.state is not Phase.REPLAYING or head.sender != self.node or head.first <= self._replayed:
            raise ProtocolError(f"record {head.first} was not asked for")
        self._replayed = head.last
        return [StoreRecord(head, record)] if head.kind == RecordKind.UPDATE else []

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

    def _save(self, purpose: str) -> SaveState:
        return SaveState(self._next_token(purpose, self._link))

    def _sync_volumes(self, purpose: str) -> SyncVolumes:
        # The number is taken before the sync (rule 4): what is stored while it runs may miss it.
        return SyncVolumes(self._next_token(purpose, self.acked))

    def _checkpoint(self, now_s: float) -> list[Action]:
        if self._checkpointing or self.acked <= self.state.checkpoint:
            return []
        self._checkpointing = True
        self._checkpoint_s = now_s
        self._uncheckpointed_bytes = 0
        return [self._sync_volumes("checkpoint")]

    def volumes_synced(self, token: int, now_s: float) -> list[Action]:
        """The images are durable as they were when `SyncVolumes` was performed."""
        purpose, number = self._tokens.pop(token)
        if self.machine.state is Phase.FAILED:
            return []
        self.state.checkpoint = max(self.state.checkpoint, number)
        return [SaveState(self._next_token(purpose, self.state.checkpoint))]

    def saved(self, token: int, now_s: float) -> list[Action]:
        """The state file is durable."""
        purpose, number = self._tokens.pop(token)
        if purpose == "welcome":
            return self._enter(now_s) if number == self._link and self._welcome and self.machine.may("welcome") else []
        if purpose == "fence":
            return []
        self.checkpoint = max(self.checkpoint, number)
        if purpose == "settle":
            return self._settled(now_s)
        self._checkpointing = False
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
        actions += [FailBatch(volume, batch, reason) for volume, batch, _ in self._deferred]
        self._deferred.clear()
        self._deferred_bytes = 0
        if self._link:
            actions.append(Close(self._link, reason))
        return actions

    # verify: digests under the overlap lock (rule 19)

    def digest(self, volume: int, offset_bytes: int, length_bytes: int) -> list[Action]:
        """Compare a range of a volume with its S-VOL at one number; answered by `Digested`."""
        self._token += 1
        self._locks[self._token] = (volume, offset_bytes, offset_bytes + length_bytes)
        return self._digest_ready_ranges()

    def _digest_ready_ranges(self) -> list[Action]:
        """Ranges that no write in flight touches are read now; later writes to them wait."""
        actions: list[Action] = []
        for token, (volume, start, end) in self._locks.items():
            if token not in self._reading and not self.queue.overlaps(volume, start, end - start):
                self._reading.add(token)
                actions.append(DigestBlocks(volume, start, end - start, token))
        return actions

    def _abort_digests(self) -> list[Action]:
        """Ranges that still wait for writes in flight are given up: nobody knows when those come through."""
        actions: list[Action] = []
        for token in [token for token in self._locks if token not in self._reading]:
            volume, start, end = self._locks.pop(token)
            fields = {"volume": volume, "offset_bytes": start, "length_bytes": end - start, "aborted": True}
            actions.append(Digested(fields))
        self._release_deferred()
        return actions

    def _release_deferred(self) -> None:
        while self._deferred and not self._locked(*self._deferred[0][:2]):
            volume, batch, since_s = self._deferred.popleft()
            self._deferred_bytes -= batch.size_bytes
            self._enqueue(volume, batch, since_s)

    def digest_ready(self, token: int, block_bytes: int, digests: list[bytes], now_s: float) -> list[Action]:
        """The blocks of a locked range are read and digested: send them, and let the waiting writes go."""
        volume, start, end = self._locks.pop(token)
        self._reading.discard(token)
        offsets = list(range(start, end, block_bytes))
        lengths = [min(block_bytes, end - offset) for offset in offsets]
        payload = b"".join(digests)
        assert len(payload) == DIGEST_BYTES * len(offsets)
        head, size = encode_record(
            RecordKind.DIGEST, self.group, self.node, self.streams[volume], self.state.incarnation, self.next_batch,
            volume, [OP_DIGEST] * len(offsets), [0] * len(offsets), offsets, lengths, [payload], len(payload),
        )  # fmt: skip
        self.queue.add(PendingRecord(self.next_batch, volume, None, [head, payload], size, frame_bytes(size), now_s))
        self.next_batch += 1
        self._release_deferred()
        return self._send_more()

    def _locked(self, volume: int, batch: WriteBatch) -> bool:
        return any(volume == v and touches(batch, start, end) for v, start, end in self._locks.values())

    # time

    def tick(self, now_s: float, boot_ns: int) -> list[Action]:
        """Called every few tens of milliseconds: heartbeats, checkpoints, held writes, dead links."""
        actions: list[Action] = []
        if now_s - self._checkpoint_s >= self.policy.checkpoint_s and self.machine.state in SERVING:
            actions += self._checkpoint(now_s)
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
            validated=self.validated, applied=self.state.checkpoint, credit=0,
        )  # fmt: skip

    def why_held(self) -> str:
        """For people: why no write completes now; empty when they do."""
        if self.machine.state is Phase.LIVE:
            return "" if self._credit_used < self._credit else "journal full: waiting for the secondaries"
        if self.fenced and self.machine.state is not Phase.FAILED:
            return f"fenced: epoch {self.state.promised.number} exists, this side works in {self.state.epoch.number}"
        return self.refusal or "the intermediate cannot be reached (fence data)"
