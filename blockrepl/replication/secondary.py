"""A secondary: keeps what it is sent in a journal of its own, prepares, validates, applies in order. No I/O.

PREPARED(n) is answered when every record of its own up to n, and the note "prepared n" itself, are durable. What is
validated is applied to the S-VOLs in the order of the numbers. A promise ends the old epoch here: nothing of it is
taken any more (PROTOCOL, rules 13, 14, 20 to 24; claims 8, 18, 20, 21).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from blockrepl.bitmap import Bitmap
from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError, SequenceGapError
from blockrepl.formats.journal import frame_bytes
from blockrepl.formats.link import LinkRole, Message, Refusal, encode
from blockrepl.formats.record import RecordFlag, RecordHead, RecordKind, control_number, marker_name
from blockrepl.formats.state import SecondaryState
from blockrepl.replication.actions import (
    Action,
    Append,
    AppendNote,
    Close,
    Event,
    Publish,
    SaveState,
    Send,
    SyncVolumes,
)
from blockrepl.replication.copying import Copying
from blockrepl.replication.greeting import Introduction, refused
from blockrepl.replication.policy import Policy
from blockrepl.replication.secondary_epochs import Epochs
from blockrepl.replication.secondary_epochs import Phase as Phase
from blockrepl.replication.secondary_greeting import OPENERS, problem_with
from blockrepl.replication.splitting import Splitting

_CONTROL = (int(RecordKind.START), int(RecordKind.END))
_MARKER = int(RecordKind.MARKER)
_NOTE_BYTES = frame_bytes(0)
MARKERS_MAX = 1024  # remembered


class Secondary:
    """One secondary of a group.

    Invariant: applied <= validated <= prepared (noted) and every record up to the greatest note is durable.
    """

    def __init__(
        self, *, group: bytes, node: int, name: str, intermediate: int, peers: list[int], state: SecondaryState,
        policy: Policy, bitmaps: Mapping[int, Bitmap] | None = None,
    ) -> None:  # fmt: skip
        """``peers``: the nodes that may open epochs. ``bitmaps``: volume id → what hosts here wrote by themselves."""
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
        self.bitmaps = bitmaps or {}
        self.trusted: Callable[[], bool] = lambda: True  # whether those say all
        self.replayed: Callable[[], bool] = lambda: True  # whether the P-VOLs of a source hold all that they should
        self.alone: Callable[[], bool] = lambda: False  # a source: whether it completed writes that nobody numbered
        self.epochs = Epochs(self)
        self.copying = Copying(self)
        self.splitting = Splitting(self)
        self.markers: dict[str, int] = {}
        self.link = 0  # hop 2
        self.reason = ""
        self._openers: set[int] = set()
        self.incarnation = 0  # of the intermediate, as it greeted last
        self.greeted_epoch = 0  # and the number of its epoch then
        self._credit = 0
        self._credit_used = 0
        self.free_bytes = 0  # of the ring, less the reserve; the host says how it is, we count what we append since
        self.notes: deque[tuple[int, int]] = deque()  # (number, link)
        self._token = 0
        self._then: dict[int, Callable[[float], list[Action]]] = {}
        self._syncing = False
        self._sync_s = 0.0
        self._unsynced_bytes = 0
        self._heard_s = 0.0
        self._beat_s = 0.0
        self._told_applied = 0
        self.config = 0  # digest of the newest configuration that this node has files for
        self._config_told = 0  # the link on which it was told
        self._stamp_ns = 0

    # start

    def recovered(self, head: RecordHead, control: int = 0) -> bool:
        """A record found in the journal at start, in order; ``control`` is the number in a START or END.

        False: a takeover discarded it and all that follows.
        """
        if head.epoch < self.state.epoch.number and head.last > self.state.number:
            return False
        if head.last > self.received:
            self.received = self.state.held = head.last
        if head.kind in _CONTROL:
            self.copying.heard(head, control)
        return True

    def recovered_note(self, number: int, epoch: int) -> None:
        """A note found in the journal at start."""
        if epoch >= self.state.epoch.number:
            self.state.prepared = max(self.state.prepared, number)

    def start(self) -> list[Action]:
        """The journal is recovered and synced: finish what a takeover had begun here, or apply what is validated."""
        if self.phase is Phase.STORING:
            return self.epochs.roll_on()
        if self.phase is Phase.ACTIVE:
            return [Publish()]
        return [*self.copying.advance(0.0), *([Publish()] if self.state.split else [])]

    @property
    def phase(self) -> Phase:
        """Where it is."""
        return self.epochs.machine.state

    @property
    def following(self) -> bool:
        """It takes records of its epoch."""
        return self.phase is Phase.FOLLOWING

    @property
    def dirty_bytes(self) -> int:
        """What its hosts wrote by themselves, in whole blocks."""
        return sum(bitmap.dirty_bytes for bitmap in self.bitmaps.values())

    @property
    def releasable(self) -> int:
        """Every record up to it is durable in the S-VOLs, and may leave the journal (rule 14); 0 where none may now."""
        return 0 if self.phase in (Phase.STORING, Phase.FAILED) else self.state.applied

    @property
    def held(self) -> int:
        """It holds everything of its own up to here (durably, once the journal is synced)."""
        return max(self.received, self.state.prepared, self.validated)

    def durable_state(self) -> SecondaryState:
        """What the superblock keeps."""
        self.state.validated = min(self.validated, self.state.prepared)
        return self.state

    def token(self) -> int:
        """A new one."""
        self._token += 1
        return self._token

    def later(self, then: Callable[[float], list[Action]]) -> int:
        """The token of an action whose answer is ``then``."""
        token = self.token()
        self._then[token] = then
        return token

    def save(self, then: Callable[[float], list[Action]]) -> SaveState:
        """Make the state durable as it is when this is performed, then ``then``."""
        return SaveState(self.later(then))

    def done(self, token: int, now_s: float) -> list[Action]:
        """The action with this token is done."""
        then = self._then.pop(token)
        return [] if self.phase is Phase.FAILED else then(now_s)

    # links

    def accepted(self, link: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """A HELLO arrived."""
        problem = self._me.check(fields) or problem_with(self, fields)
        if problem is not None:
            return [self._refuse(link, *problem)]
        actions: list[Action] = []
        if fields["role"] in OPENERS:
            self._openers.add(link)
        else:
            if self.link:
                actions.append(Close(self.link, "the intermediate connected again"))
            self.link, self._heard_s, self._stamp_ns = link, now_s, 0
            self.incarnation, self.greeted_epoch = fields["incarnation"], fields["epoch"].number
            self._credit_used = self._credit = 0
            self.notes.clear()
            self._raise_credit()
        return [*actions, Send(link, [self._welcome(fields)])]

    def _welcome(self, hello: dict[str, Any]) -> bytes:
        state = self.state
        return self._me.welcome(
            hello, epoch=state.epoch, promised=state.promised, through=self.received, credit=self._credit,
            validated=self.validated, prepared=state.prepared, applied=self.applied, active=state.active,
            direction=state.direction, pair=state.pair, copying=state.copying, copy_from=state.copy_from,
            split=state.split, rolling=state.rolling, recovered=self.replayed(),
        )  # fmt: skip

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
        if head.kind in _CONTROL:
            self._take_control(head, record)
        elif head.previous != self.received:
            raise SequenceGapError(f"record {head.first} follows {head.previous}, the last one here is {self.received}")
        if head.kind == _MARKER:
            self.hear_marker(marker_name(record).decode(errors="replace"), control_number(record))
        self.received = head.last
        self.numbered_seen = max(self.numbered_seen, head.last)
        self._unsynced_bytes += size
        self.free_bytes -= size
        chunk.hold()
        return [Append(head, record, chunk)]

    def hear_marker(self, name: str, number: int) -> None:
        """A marker is held: until more than it is validated, a takeover can stop there."""
        if number >= self.validated:
            self.markers.pop(name, None)
            self.markers[name] = number
            while len(self.markers) > MARKERS_MAX:
                del self.markers[next(iter(self.markers))]

    def _take_control(self, head: RecordHead, record: memoryview) -> None:
        """A START may jump over what was never sent here; what it skips is in bitmaps (rule 19)."""
        number = control_number(record)
        jump = bool(head.flags & RecordFlag.JUMP) and head.previous > self.received
        if head.previous != self.received and not jump:
            raise SequenceGapError(f"record {head.first} follows {head.previous}, the last one here is {self.received}")
        if head.kind == RecordKind.START:
            self.copying.check_start(head, number, jump=jump)
        self.copying.heard(head, number)

    def received_message(self, link: int, kind: int, fields: dict[str, Any], epoch: int, now_s: float) -> list[Action]:
        """A control message on any link. Raises ProtocolError: the host closes the link and calls `lost`."""
        if self.phase is Phase.FAILED:
            return [Close(link, self.reason)]
        if kind == Message.PROMISE:
            return self.epochs.promise(link, fields)
        if kind == Message.STORE:
            return self.epochs.store(link, fields, now_s)
        if kind == Message.ACTIVATE:
            return self.epochs.activate(link, fields)
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
            self.state.pair = fields["pair"]
            return []
        if kind not in (Message.PREPARE, Message.VALIDATE, Message.SPLIT, Message.REJOIN):
            raise ProtocolError(f"{Message(kind).name} does not belong on hop 2")
        if self.phase is not Phase.FOLLOWING:
            return []
        if epoch != self.state.epoch.number:
            raise ProtocolError(f"{Message(kind).name} in epoch {epoch}, this is {self.state.epoch.number}")
        if kind == Message.PREPARE:
            return self._prepare(link, fields["number"], fields["stream_last"])
        if kind == Message.VALIDATE:
            return self._validate(fields["number"], now_s)
        if kind == Message.SPLIT:
            return self.splitting.split(fields["number"], writable=fields["writable"], now_s=now_s)
        return self.splitting.rejoin(link, fields["number"])

    def _prepare(self, link: int, number: int, stream_last: int) -> list[Action]:
        if stream_last > self.received:
            raise SequenceGapError(f"PREPARE {number} names record {stream_last}, the last one here is {self.received}")
        self.numbered_seen = max(self.numbered_seen, number)
        if number <= self.state.prepared:
            return [self._prepared(link, number)]
        self.notes.append((number, link))
        self.free_bytes -= _NOTE_BYTES
        return [AppendNote(number, self.state.epoch.number, self.received)]

    def noted(self, number: int, epoch: int, now_s: float, received: int = 0) -> list[Action]:
        """The note and all records before it, ``received`` the last of them, are durable (one sync).

        It may be a note that an older link asked for: what has come since is not spoken for.
        """
        notes = self.notes
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

    def _validate(self, number: int, now_s: float) -> list[Action]:
        if number > self.state.prepared:
            raise ProtocolError(f"VALIDATE {number}, but only {self.state.prepared} is prepared here")
        if number <= self.validated:
            return []
        self.validated = number
        return self.copying.advance(now_s)

    def was_applied(self, number: int, now_s: float) -> list[Action]:
        """Records up to ``number`` are in the S-VOLs (page cache)."""
        self.applied = max(self.applied, number)
        return self.copying.was_applied(now_s)

    def go_back(self, number: int) -> None:
        """A takeover goes to ``number``, which may lie below what is validated and applied."""
        self.validated, self.applied = min(self.validated, number), min(self.applied, number)
        self.state.applied = min(self.state.applied, number)

    def truncated(
        self, token: int, writes: int, size_bytes: int, last: int, now_s: float, kept_ns: int = 0, newest_ns: int = 0
    ) -> list[Action]:
        """Records above the number are gone, with our state stored in the same write; or they were only counted.

        ``last`` is the last record of ours that is not above it. Times: when it was numbered, and when the newest one
        above it; 0 where not known.
        """
        return self.epochs.truncated(token, writes, size_bytes, last, now_s, kept_ns, newest_ns)

    def digested(self, fields: dict[str, Any]) -> list[Action]:
        """The host of this role has compared a digest record while applying."""
        if not self.link:
            return []
        return [Send(self.link, [encode(Message.DIGESTED, self.state.epoch.number, **fields)])]

    # durability and time

    def _sync_volumes(self, now_s: float) -> list[Action]:
        if self._syncing or self.applied <= self.state.applied or self.phase in (Phase.FAILED, Phase.ACTIVE):
            return []
        self._syncing, self._sync_s, self._unsynced_bytes = True, now_s, 0
        number = self.applied  # taken before the sync

        def synced(_: float) -> list[Action]:
            self._syncing = False
            self.state.applied = max(self.state.applied, min(number, self.applied))  # it may have gone back meanwhile
            return []

        return [SyncVolumes(self.later(synced))]

    def _beat_every_s(self) -> float:
        """Sooner when the intermediate does not know yet what is applied: people watch the lag fall."""
        return self.policy.heartbeat_s / (1 if self._told_applied == self.applied else 10)

    def prepared_for(self, config: int) -> None:
        """This node has files for a configuration: the intermediate hears of it at the next tick."""
        self.config, self._config_told = config, 0

    def _tell_config(self) -> list[Action]:
        self._config_told = self.link
        return [Send(self.link, [encode(Message.CONFIG, self.state.epoch.number, digest=self.config, number=0)])]

    def fail(self, reason: str) -> list[Action]:
        """A disk error: nothing more is prepared or applied (rule 11)."""
        if self.phase is Phase.FAILED:
            return []
        self.epochs.fail()
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
        if self.config and self.link and self._config_told != self.link:
            actions += self._tell_config()
        return actions
