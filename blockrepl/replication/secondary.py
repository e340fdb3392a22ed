"""A secondary: keeps what it is sent in a journal of its own, prepares, validates, applies in order. No I/O.

PREPARED(n) is answered when every record of its own up to n, and the note "prepared n" itself, are durable. What is
validated is applied to the S-VOLs in the order of the numbers. A promise ends the old epoch here: nothing of it is
taken any more (PROTOCOL, rules 13, 14, 20 to 24; claims 8, 18, 20, 21).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError, SequenceGapError
from blockrepl.formats.journal import frame_bytes
from blockrepl.formats.link import (
    Epoch,
    LinkRole,
    Message,
    Refusal,
    encode,
)
from blockrepl.formats.record import RecordHead
from blockrepl.formats.state import SecondaryState
from blockrepl.replication.actions import (
    Action,
    Append,
    AppendNote,
    Apply,
    Close,
    Event,
    SaveState,
    Send,
    SyncJournal,
    SyncVolumes,
    Trim,
    Truncate,
)
from blockrepl.replication.greeting import Introduction, Problem, refused
from blockrepl.replication.machine import Machine
from blockrepl.replication.policy import Policy


class Phase(Enum):
    """Where a secondary is."""

    FOLLOWING = "following"  # takes records of its epoch
    PROMISED = "promised"  # a higher epoch is being opened
    STORING = "rolling forward"  # an epoch was stored; going to its number
    STORED = "stored"  # at the epoch's number, not yet writable
    ACTIVE = "taken over"
    FAILED = "failed"


TABLE: dict[tuple[Phase, str], Phase] = {
    (Phase.FOLLOWING, "promise"): Phase.PROMISED,
    (Phase.PROMISED, "promise"): Phase.PROMISED,
    (Phase.STORING, "promise"): Phase.PROMISED,
    (Phase.STORED, "promise"): Phase.PROMISED,
    (Phase.PROMISED, "go on"): Phase.FOLLOWING,
    (Phase.PROMISED, "store"): Phase.STORING,
    (Phase.STORING, "stored"): Phase.STORED,
    (Phase.STORED, "activate"): Phase.ACTIVE,
    **{(phase, "fail"): Phase.FAILED for phase in Phase},
}


class Secondary:
    """One secondary of a group.

    Invariant: applied <= validated <= prepared (noted) and every record up to the greatest note is durable.
    """

    def __init__(
        self, *, group: bytes, node: int, name: str, intermediate: int, peers: list[int], state: SecondaryState,
        policy: Policy,
    ) -> None:  # fmt: skip
        """``peers``: the node ids of all secondaries of the group."""
        self.group = group
        self.node = node
        self.name = name
        self._me = Introduction(group, node, name, LinkRole.SECONDARY)
        self.intermediate = intermediate
        self.peers = peers
        self.state = state
        self.policy = policy
        self.received = state.held  # last record appended
        self.validated = state.validated
        self.applied = state.applied  # in the S-VOLs' page cache
        self.numbered_seen = state.prepared
        if state.active:
            start = Phase.ACTIVE
        elif state.rolling:
            start = Phase.STORING
        else:
            start = Phase.PROMISED if state.promised.number > state.epoch.number else Phase.FOLLOWING
        self.machine: Machine[Phase] = Machine(TABLE, start)
        self.link = 0  # hop 2
        self._store_link = 0
        self._discarded = (0, 0)
        self.reason = ""
        self._openers: set[int] = set()
        self._incarnation = 0
        self._credit = 0
        self._credit_used = 0
        self.free_bytes = 0
        self._notes: deque[tuple[int, int]] = deque()  # (number, link)
        self._token = 0
        self._then: dict[int, Callable[[float], list[Action]]] = {}
        self._truncating: dict[int, Callable[[int, int, float], list[Action]]] = {}
        self._waiting_applied: list[tuple[int, Callable[[float], list[Action]]]] = []
        self._syncing = False
        self._sync_s = 0.0
        self._unsynced_bytes = 0
        self._heard_s = 0.0
        self._beat_s = 0.0
        self._told_applied = 0
        self._stamp_ns = 0

    # start

    def recovered(self, head: RecordHead) -> bool:
        """A record found in the journal at start, in order. False: a takeover discarded it and all that follows."""
        if head.epoch < self.state.epoch.number and head.last > self.state.number:
            return False
        if head.last > self.received:
            self.received = self.state.held = head.last
        return True

    def recovered_note(self, number: int, epoch: int) -> None:
        """A note found in the journal at start."""
        if epoch >= self.state.epoch.number:
            self.state.prepared = max(self.state.prepared, number)

    def start(self) -> list[Action]:
        """The journal is recovered and synced: finish what a takeover had begun here, or apply what is validated."""
        if self.phase is Phase.STORING:
            return self._roll_forward()
        return [Apply(self.validated)] if self.validated > self.applied else []

    @property
    def phase(self) -> Phase:
        """Where it is."""
        return self.machine.state

    @property
    def held(self) -> int:
        """It holds everything of its own up to here (durably, once the journal is synced)."""
        return max(self.received, self.state.prepared, self.validated)

    def durable_state(self) -> SecondaryState:
        """What the superblock keeps."""
        self.state.validated = min(self.validated, self.state.prepared)
        return self.state

    def _later(self, then: Callable[[float], list[Action]]) -> int:
        self._token += 1
        self._then[self._token] = then
        return self._token

    def done(self, token: int, now_s: float) -> list[Action]:
        """`SaveState`, `SyncJournal` or `SyncVolumes` with this token is done."""
        then = self._then.pop(token)
        return [] if self.phase is Phase.FAILED else then(now_s)

    # links

    def accepted(self, link: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """A HELLO arrived."""
        problem = self._check_hello(fields)
        if problem is not None:
            return [self._refuse(link, *problem)]
        actions: list[Action] = []
        if fields["role"] == LinkRole.OPENER:
            self._openers.add(link)
        else:
            if self.link:
                actions.append(Close(self.link, "the intermediate connected again"))
            self.link, self._heard_s, self._stamp_ns = link, now_s, 0
            self._incarnation = fields["incarnation"]
            self._credit_used = self._credit = 0
            self._notes.clear()
            self._raise_credit()
        state = self.state
        message = self._me.welcome(
            fields, epoch=state.epoch, promised=state.promised, through=self.received, credit=self._credit,
            validated=self.validated, prepared=state.prepared, applied=self.applied, active=state.active,
        )  # fmt: skip
        return [*actions, Send(link, [message])]

    def _check_hello(self, fields: dict[str, Any]) -> Problem | None:
        problem = self._me.check(fields)
        if problem is not None:
            return problem
        if self.phase is Phase.FAILED:
            return Refusal.STATE, self.reason
        if fields["role"] == LinkRole.OPENER:
            if fields["node"] not in self.peers:
                return Refusal.NODE, f"node {fields['node']} is no secondary of this group"
            return None
        return self._check_intermediate(fields)

    def _check_intermediate(self, fields: dict[str, Any]) -> Problem | None:
        epoch, ours = fields["epoch"], self.state.epoch
        if fields["role"] != LinkRole.INTERMEDIATE or fields["node"] != self.intermediate:
            return Refusal.ROLE, f"node {fields['node']} is not this group's intermediate"
        if self.state.active:
            return Refusal.ACTIVE, f"{self.name} has taken over in epoch {ours.number}"
        if epoch.number == ours.number and epoch.id != ours.id:
            return Refusal.EPOCH, f"split brain: epoch {epoch} there, {ours} here"
        if fields["incarnation"] < self._incarnation:
            return Refusal.STALE, f"incarnation {fields['incarnation']} is dead, {self._incarnation} lives"
        return None

    def _refuse(self, link: int, code: Refusal, text: str) -> Close:
        return Close(link, text, refused(code, text, epoch=self.state.epoch, promised=self.state.promised))

    def lost(self, link: int, now_s: float) -> list[Action]:
        """A link is gone."""
        if link == self.link:
            self.link = 0
        self._openers.discard(link)
        return []

    # hop 2

    def record(self, link: int, head: RecordHead, epoch: int, record: memoryview, chunk: Chunk) -> list[Action]:
        """A record on hop 2. Raises SequenceGapError or ProtocolError: the host closes the link."""
        if link != self.link or self.phase is not Phase.FOLLOWING:
            return []
        if epoch != self.state.epoch.number:
            raise ProtocolError(f"record in epoch {epoch}, this is {self.state.epoch.number}")
        if head.group != self.group or head.stream != self.node:
            raise ProtocolError(f"record {head.first} is of stream {head.stream}")
        size = frame_bytes(head.size_bytes)
        self._credit_used += size
        if self._credit_used > self._credit:
            raise ProtocolError("record beyond the credit")
        if head.last <= self.received:
            return []
        if head.previous != self.received:
            raise SequenceGapError(f"record {head.first} follows {head.previous}, the last one here is {self.received}")
        self.received = head.last
        self.numbered_seen = max(self.numbered_seen, head.last)
        self._unsynced_bytes += size
        chunk.hold()
        return [Append(head, record, chunk)]

    def received_message(self, link: int, kind: int, fields: dict[str, Any], epoch: int, now_s: float) -> list[Action]:
        """A control message on any link. Raises ProtocolError: the host closes the link and calls `lost`."""
        if self.phase is Phase.FAILED:
            return [Close(link, self.reason)]
        if kind == Message.PROMISE:
            return self._promise(link, fields, now_s)
        if kind == Message.STORE:
            return self._store(link, fields, now_s)
        if kind == Message.ACTIVATE:
            return self._activate(link, fields)
        if link in self._openers:
            if kind != Message.HEARTBEAT:
                raise ProtocolError(f"{Message(kind).name} does not belong on an opener's link")
            return []
        if link != self.link:
            return []
        self._heard_s = now_s
        if kind == Message.HEARTBEAT:
            self._stamp_ns = fields["stamp_ns"]
            self.numbered_seen = max(self.numbered_seen, fields["numbered"])
            return []
        if kind not in (Message.PREPARE, Message.VALIDATE):
            raise ProtocolError(f"{Message(kind).name} does not belong on hop 2")
        if self.phase is not Phase.FOLLOWING:
            return []
        if epoch != self.state.epoch.number:
            raise ProtocolError(f"{Message(kind).name} in epoch {epoch}, this is {self.state.epoch.number}")
        if kind == Message.PREPARE:
            return self._prepare(link, fields["number"], fields["stream_last"])
        return self._validate(fields["number"])

    def _prepare(self, link: int, number: int, stream_last: int) -> list[Action]:
        if stream_last > self.received:
            raise SequenceGapError(f"PREPARE {number} names record {stream_last}, the last one here is {self.received}")
        self.numbered_seen = max(self.numbered_seen, number)
        if number <= self.state.prepared:
            return [self._prepared(link, number)]
        self._notes.append((number, link))
        return [AppendNote(number, self.state.epoch.number, self.received)]

    def noted(self, number: int, epoch: int, now_s: float, received: int = 0) -> list[Action]:
        """The note and all records before it, ``received`` the last of them, are durable (one sync).

        It may be a note that an older link asked for: what has come since is not spoken for.
        """
        notes = self._notes
        link = 0
        while notes and notes[0][0] <= number:
            _, link = notes.popleft()
        if epoch != self.state.epoch.number or self.phase is Phase.FAILED:
            return []
        self.state.prepared = max(self.state.prepared, number)
        self.state.held = max(self.state.held, received)
        if link != self.link or self.phase is not Phase.FOLLOWING:
            return []  # an answer to a PREPARE that a promise dropped would speak for the old epoch
        return [self._prepared(link, number)]

    def _prepared(self, link: int, number: int) -> Send:
        self._raise_credit()
        self._told_applied = self.applied
        message = encode(
            Message.PREPARED,
            self.state.epoch.number,
            epoch_number=self.state.epoch.number,
            number=number,
            applied=self.applied,
            credit=self._credit,
        )
        return Send(link, [message])

    def _raise_credit(self) -> None:
        window = min(self.policy.window_bytes, max(0, self.free_bytes))
        self._credit = max(self._credit, self._credit_used + window)

    def _validate(self, number: int) -> list[Action]:
        if number > self.state.prepared:
            raise ProtocolError(f"VALIDATE {number}, but only {self.state.prepared} is prepared here")
        if number <= self.validated:
            return []
        self.validated = number
        return [Apply(number)]

    def was_applied(self, number: int, now_s: float) -> list[Action]:
        """Records up to ``number`` are in the S-VOLs (page cache)."""
        self.applied = max(self.applied, number)
        actions: list[Action] = []
        ready = [then for target, then in self._waiting_applied if target <= self.applied]
        self._waiting_applied = [item for item in self._waiting_applied if item[0] > self.applied]
        for then in ready:
            actions += then(now_s)
        return actions

    def digested(self, fields: dict[str, Any]) -> list[Action]:
        """The host of this role has compared a digest record while applying."""
        if not self.link:
            return []
        return [Send(self.link, [encode(Message.DIGESTED, self.state.epoch.number, **fields)])]

    # epochs

    def _promise(self, link: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        epoch: Epoch = fields["epoch"]
        state = self.state
        if fields["dry_run"] or state.active or epoch.number <= max(state.promised.number, state.epoch.number):
            token = self._later(lambda _: [Send(link, [self._promised()])])
            return [SyncJournal(token)]
        self.machine.go("promise")
        state.promised = epoch
        actions: list[Action] = []
        if self.link and link != self.link:
            actions.append(Close(self.link, f"promised epoch {epoch}"))
            self.link = 0
        self._notes.clear()
        return [*actions, SyncJournal(self._later(lambda _: self._save_promise(link, epoch)))]

    def _save_promise(self, link: int, epoch: Epoch) -> list[Action]:
        self.state.held = self.received
        return [SaveState(self._later(lambda _: self._tell_promise(link, epoch)))]

    def _tell_promise(self, link: int, epoch: Epoch) -> list[Action]:
        return [Send(link, [self._promised()])] if self.state.promised == epoch else []

    def _promised(self) -> bytes:
        state = self.state
        return encode(
            Message.PROMISED, state.epoch.number, epoch=max(state.promised, state.epoch), stored=state.epoch,
            held=self.held, validated=self.validated, applied=self.applied, active=state.active,
            number=state.number, members=state.members, numbered=max(self.numbered_seen, self.held),
        )  # fmt: skip

    def _store(self, link: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        state = self.state
        number: int = fields["number"]
        if fields["dry_run"]:
            return [self._truncate(number, lambda w, b, _: [self._would_store(link, w, b)], dry_run=True)]
        if fields["epoch"] == state.epoch and self.phase in (Phase.STORING, Phase.STORED, Phase.ACTIVE):
            self._store_link = link
            return [] if self.phase is Phase.STORING else [self._stored()]
        if fields["promise"] != state.promised or self.phase is not Phase.PROMISED:
            return [self._would_store(link, 0, 0)]
        if fields["truncate"] and not self.validated <= number <= self.held:
            raise ProtocolError(f"takeover at {number}: validated {self.validated}, held {self.held} here")
        if not fields["truncate"]:
            self._adopt_epoch(link, fields, self.held)
            self.machine.go("go on")
            return [SaveState(self._later(lambda _: [self._stored()]))]

        def counted(writes: int, size_bytes: int, now_s: float) -> list[Action]:
            if fields["promise"] != state.promised or self.phase is not Phase.PROMISED:
                return [self._would_store(link, 0, 0)]
            self._adopt_epoch(link, fields, number)
            self._discarded = (writes, size_bytes)
            # With the epoch the note stands for "all of mine up to number".
            state.prepared = number
            self.received = state.held = self._last_kept
            self.machine.go("store")
            closed: list[Action] = []
            if self.link and self.link != link:  # what we told the intermediate on it is no longer so
                closed.append(Close(self.link, f"rolled to {number} by a takeover"))
                self.link = 0
            return closed + self._roll_forward()

        return [self._truncate(number, counted, dry_run=True)]

    def _adopt_epoch(self, link: int, fields: dict[str, Any], last: int) -> None:
        state = self.state
        if state.epoch.number and state.epoch != fields["epoch"]:
            state.history.append((state.epoch, last))
        state.epoch = fields["epoch"]
        state.number, state.members, state.rolling = fields["number"], fields["members"], fields["truncate"]
        self._store_link, self._discarded = link, (0, 0)

    def _truncate(
        self, number: int, then: Callable[[int, int, float], list[Action]], *, dry_run: bool = False
    ) -> Truncate:
        self._token += 1
        self._truncating[self._token] = then
        return Truncate(number, self._token, dry_run)

    def truncated(self, token: int, writes: int, size_bytes: int, last: int, now_s: float) -> list[Action]:
        """Records above the number are gone, with our state stored in the same write; or they were only counted.

        ``last`` is the last record of ours that is not above it.
        """
        self._last_kept = last
        return self._truncating.pop(token)(writes, size_bytes, now_s)

    def _roll_forward(self) -> list[Action]:
        """Discard what lies beyond the epoch's number, apply what lies before it, make it durable, say so."""
        number = self.state.number

        def discarded(writes: int, size_bytes: int, now_s: float) -> list[Action]:
            self.validated = max(self.validated, number)
            self._waiting_applied.append((number, lambda _: self._settle(number)))
            return [Apply(number)]

        return [self._truncate(number, discarded)]

    def _settle(self, number: int) -> list[Action]:
        """All is applied: make the S-VOLs durable, so that nothing is ever redone over a host's new writes."""

        def saved(_: float) -> list[Action]:
            if self.phase is not Phase.STORING:
                return []
            self.machine.go("stored")
            return [self._stored()]

        def synced(_: float) -> list[Action]:
            self.state.applied = max(self.state.applied, number)
            return [SaveState(self._later(saved))]

        return [SyncVolumes(self._later(synced))]

    def _stored(self) -> Send:
        return self._say_stored(self._store_link, self.state.epoch, *self._discarded)

    def _would_store(self, link: int, writes: int, size_bytes: int) -> Send:
        """The answer to a dry run, or to an opener without our promise: names the epoch that we stand by."""
        return self._say_stored(link, max(self.state.promised, self.state.epoch), writes, size_bytes)

    def _say_stored(self, link: int, epoch: Epoch, writes: int, size_bytes: int) -> Send:
        message = encode(
            Message.STORED, self.state.epoch.number, epoch=epoch, applied=self.applied,
            discarded_writes=writes, discarded_bytes=size_bytes,
        )  # fmt: skip
        return Send(link, [message])

    def _activate(self, link: int, fields: dict[str, Any]) -> list[Action]:
        state = self.state
        answer = Send(link, [encode(Message.ACTIVATED, state.epoch.number, epoch=state.epoch)])
        if fields["epoch"] != state.epoch or self.phase not in (Phase.STORED, Phase.ACTIVE):
            return [answer] if fields["epoch"] != state.epoch else []
        if self.phase is Phase.STORED:
            self.machine.go("activate")
        state.active = True
        state.writable = fields["writable"]
        text = f"taken over in epoch {state.epoch} at number {state.number}"
        return [SaveState(self._later(lambda _: [Event(text), answer]))]

    # durability and time

    def _sync_volumes(self, now_s: float) -> list[Action]:
        if self._syncing or self.applied <= self.state.applied or self.phase in (Phase.FAILED, Phase.ACTIVE):
            return []
        self._syncing, self._sync_s, self._unsynced_bytes = True, now_s, 0
        number = self.applied  # taken before the sync

        def synced(_: float) -> list[Action]:
            self._syncing = False
            self.state.applied = max(self.state.applied, number)
            return [Trim(self.state.applied)]

        return [SyncVolumes(self._later(synced))]

    def _beat_every_s(self) -> float:
        """Sooner when the intermediate does not know yet what is applied: people watch the lag fall."""
        return self.policy.heartbeat_s / (1 if self._told_applied == self.applied else 10)

    def fail(self, reason: str) -> list[Action]:
        """A disk error: nothing more is prepared or applied (rule 11)."""
        if self.phase is Phase.FAILED:
            return []
        self.machine.go("fail")
        self.reason = reason
        actions: list[Action] = [Event(f"stopped: {reason}")]
        if self.link:
            actions.append(Close(self.link, reason))
        return actions

    def tick(self, now_s: float, boot_ns: int) -> list[Action]:
        """Called every few tens of milliseconds."""
        actions: list[Action] = []
        due = now_s - self._sync_s >= self.policy.checkpoint_s or self._unsynced_bytes >= self.policy.checkpoint_bytes
        if due:
            actions += self._sync_volumes(now_s)
        if self.link and now_s - self._heard_s > self.policy.link_timeout_s:
            actions.append(Close(self.link, f"nothing heard for {self.policy.link_timeout_s} s"))
        elif self.link and now_s - self._beat_s >= self._beat_every_s():
            self._beat_s = now_s
            self._told_applied = self.applied
            self._raise_credit()
            message = encode(
                Message.HEARTBEAT, self.state.epoch.number, stamp_ns=boot_ns, echo_ns=self._stamp_ns,
                numbered=self.numbered_seen, validated=self.validated, applied=self.applied, credit=self._credit,
            )  # fmt: skip
            actions.append(Send(self.link, [message]))
        return actions
