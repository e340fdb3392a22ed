"""The intermediate: one counter that orders all writes of a consistency group, and their way into the journal and on.

It performs no I/O. Host writes come in as batches (`batch`), are numbered and appended; `durable` says that the journal
is synced up to a number: only then are they acknowledged and sent to the secondaries. Epochs are opened here when
production starts or goes on (`opening.py`); a takeover freezes it (PROTOCOL, rules 1, 9, 10, 12, 22 to 25).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from blockrepl.bitmap import Bitmap
from blockrepl.block import Op
from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError, SequenceGapError, UsageError
from blockrepl.formats.journal import frame_bytes
from blockrepl.formats.link import (
    Epoch,
    LinkRole,
    Message,
    Pair,
    Refusal,
    encode,
)
from blockrepl.formats.record import (
    MAX_MARKER_BYTES,
    RecordFlag,
    RecordHead,
    RecordKind,
    control_record,
    decode_batch,
    encode_record,
    marker_record,
    number_record,
)
from blockrepl.formats.state import IntermediateState
from blockrepl.replication.actions import (
    Action,
    Append,
    Close,
    Counts,
    DropSpill,
    Event,
    Replay,
    SaveState,
    Send,
    Spill,
)
from blockrepl.replication.comparing import Comparing
from blockrepl.replication.configuring import Configuring
from blockrepl.replication.greeting import Introduction, Problem, refused
from blockrepl.replication.hop1 import Sender, Senders
from blockrepl.replication.opening import Opening, Phase
from blockrepl.replication.pairing import Pairing
from blockrepl.replication.policy import Policy
from blockrepl.replication.streams import Stream, Streams

MARKERS_MAX = 1024  # remembered


class Intermediate:
    """The intermediate of a group.

    Invariant: validated <= min prepared <= sent <= durable <= numbered; nothing undurable is acknowledged or sent.
    """

    def __init__(
        self,
        *,
        group: bytes,
        node: int,
        name: str,
        primaries: list[int],
        secondaries: list[int],
        state: IntermediateState,
        policy: Policy,
        new_id: Callable[[], bytes],
        alone: bool = False,
        bitmaps: Mapping[int, Bitmap] | None = None,
        owners: Mapping[int, int] | None = None,
        homes: Mapping[int, int] | None = None,
        local_source: bool = False,
        names: Mapping[int, str] | None = None,
    ) -> None:
        """``state.incarnation`` was raised durably by this process. ``new_id`` gives 16 random bytes.

        ``bitmaps``: volume → its hop-2 bitmap; ``owners``: volume → its primary; ``homes``: volume → its secondary.
        ``local_source``: volumes mode: hop 2 is resynchronised from the intermediate's own volumes.
        ``names``: of all nodes, for what people read.
        """
        self.group = group
        self.node = node
        self.name = name
        self._me = Introduction(group, node, name, LinkRole.INTERMEDIATE)
        self.policy = policy
        self.state = state
        self.numbered = self.durable_number = state.durable
        self.senders = Senders(primaries, state.primaries, policy.window_bytes)
        self.streams = Streams(secondaries, state.epoch.number, policy.round_s, policy.round_bytes)
        self.streams.validated = state.validated
        for stream_node, last in state.streams:
            stream = self.streams.by_node[stream_node]
            stream.last = stream.durable = last
        for sender_node, last in state.spilled:
            if sender_node in self.senders.by_node:
                self.senders.by_node[sender_node].spilled = last
        self._spilling = False
        self.opening = Opening(self, new_id, alone=alone)
        self.markers: dict[str, int] = {}  # name → number, of the newest; for those who wait for them
        self.pairing = Pairing(self, bitmaps or {}, owners or {}, local_source=local_source)
        self.comparing = Comparing(local=local_source)
        self.configuring = Configuring(self)
        self._homes = homes or {}
        self._names = names or {}
        self._here = Stream(node)  # records that are for the intermediate volumes only: sent to nobody
        self.undurable_bytes = 0  # of its own records
        self._own = Sender(node)  # of the records that the intermediate makes itself
        self._waiting: deque[tuple[int, RecordHead, Chunk, int, int, int]] = deque()  # batches not numbered yet
        self._fresh_s: float | None = None  # when every primary's lease was last known to be fresh
        self._boot_ns = 0
        self._wall_ns = 0  # when the newest batch came
        self._appended: deque[tuple[int, Sender, int, int, int, int]] = deque()
        self._beat_s = 0.0
        self._token = 0
        self._on_saved: dict[int, Callable[[float], list[Action]]] = {}
        self._on_counted: dict[int, Callable[[Counts], list[Action]]] = {}
        self._hello_links: dict[int, int] = {}  # links to secondaries on which HELLO went out, and their node
        self._heard_s: dict[int, float] = {}
        self._nonces: dict[int, bytes] = {}
        self.opener_link = 0
        self.opener_reforms = False

    def called(self, node: int) -> str:
        """A node, for people."""
        return self._names.get(node, f"node {node}")

    # start

    def recovered(self, head: RecordHead) -> None:
        """A record found in the journal at start, in order. All of them are synced again before `start`."""
        if head.last <= self.numbered:
            return
        self.numbered = self.durable_number = head.last
        if head.sender == self.node:
            self.pairing.recovered(head)
        else:
            self.senders.recovered(head.sender, head.incarnation, head.batch, head.last)
        stream = self._here if head.stream == self.node else self.streams.by_node[head.stream]
        stream.last = stream.durable = head.last

    def start(self) -> None:
        """All records were told of."""
        self.pairing.start()

    @property
    def phase(self) -> Phase:
        """Where it is; it numbers only in SERVING."""
        return self.opening.phase

    def durable_state(self) -> IntermediateState:
        """What the superblock keeps; durable watermarks only."""
        state = self.state
        state.durable = self.durable_number
        state.validated = self.streams.validated
        state.primaries = [sender.row() for sender in self.senders.by_node.values()]
        state.streams = [(stream.node, stream.durable) for stream in self.streams.by_node.values()]
        state.starts = self.pairing.durable_starts()
        return state

    def expect(self, then: Callable[[float], list[Action]]) -> int:
        """A token for an action that is answered later; ``then`` runs at its `done`."""
        self._token += 1
        self._on_saved[self._token] = then
        return self._token

    def expect_counts(self, then: Callable[[Counts], list[Action]]) -> int:
        """A token for `CountAbove`; ``then`` runs at its `counted`."""
        self._token += 1
        self._on_counted[self._token] = then
        return self._token

    def counted(self, token: int, counts: Counts) -> list[Action]:
        """`CountAbove` with this token is done. Nothing in the role depends on it: it is for a report."""
        return self._on_counted.pop(token)(counts)

    def save(self, then: Callable[[float], list[Action]]) -> SaveState:
        """Ask for the state to be stored; ``then`` runs when it is durable."""
        return SaveState(self.expect(then))

    def saved(self, token: int, now_s: float) -> list[Action]:
        """`SaveState`, `SaveBits`, `MarkJournal` or `Forget` with this token is done."""
        then = self._on_saved.pop(token)
        return [] if self.opening.phase is Phase.FAILED else then(now_s)

    def begin_anew(self, number: int, members: list[int]) -> None:
        """A reform: nobody's batches and records count any more; the next number is ``number`` + 1.

        ``members``: the nodes that are targets from now on. The node then builds this role anew.
        """
        self.numbered = self.durable_number = self.streams.validated = number
        self.senders.by_node = {}
        self.state.spilled = []
        self.state.configured = False  # those who were not there when it took effect hear of it
        self.streams.by_node = {node: Stream(node, last=number, durable=number) for node in members}

    # hop 1: links

    def accepted(self, link: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """A HELLO arrived on an incoming link."""
        problem = self._check_hello(fields)
        if problem is not None:
            return [self._refuse(link, *problem)]
        if fields["role"] in (LinkRole.OPENER, LinkRole.REFORMER):
            return self._greet_opener(link, fields)
        return self._greet_primary(link, fields, now_s)

    def _check_hello(self, fields: dict[str, Any]) -> Problem | None:
        problem = self._me.check(fields)
        if problem is not None:
            return problem
        if fields["role"] == LinkRole.PRIMARY:
            if fields["node"] not in self.senders.by_node:
                return Refusal.NODE, f"node {fields['node']} is no primary of this group"
            if fields["node"] in self.state.excluded:
                return (
                    Refusal.STATE,
                    f"{self.called(fields['node'])} is excluded: `blockrepl node include` lets it back in",
                )
            theirs, ours = fields["epoch"], self.state.epoch
            if ours.number and theirs.number == ours.number and theirs.id != ours.id:
                return Refusal.EPOCH, f"split brain: epoch {theirs} there, {ours} here"
        elif fields["role"] not in (LinkRole.OPENER, LinkRole.REFORMER):
            return Refusal.ROLE, "an intermediate takes links of primaries and of openers"
        return None

    def _refuse(self, link: int, code: Refusal, text: str) -> Close:
        return Close(link, text, self.refusal(code, text))

    def refusal(self, code: Refusal, text: str) -> bytes:
        """A REFUSED message that names our epochs."""
        state = self.state
        promised = max(state.promised, self.opening.higher)
        return refused(code, text, epoch=state.epoch, promised=promised)

    def _greet_primary(self, link: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        sender = self.senders.by_node[fields["node"]]
        if self.opening.phase in (Phase.FENCED, Phase.FAILED):
            code = Refusal.EPOCH if self.opening.phase is Phase.FENCED else Refusal.STATE
            return [self._refuse(link, code, self.opening.reason)]
        if fields["incarnation"] < sender.incarnation:
            text = f"incarnation {fields['incarnation']} is dead, {sender.incarnation} lives"
            return [self._refuse(link, Refusal.STALE, text)]
        known: Epoch = max(fields["epoch"], fields["promised"])
        stranger = self.opening.stranger(fields)
        if stranger:
            return self._refuse_stranger(link, stranger)
        if fields["highest"] > self.numbered:
            text = f"saw number {fields['highest']} acknowledged, the journal ends at {self.numbered}"
            return [*self.opening.behind(text), self._refuse(link, Refusal.BEHIND, text)]
        actions: list[Action] = []
        if sender.link:  # the older connection, and what of it was not read yet
            actions.append(Close(sender.link, "the primary connected again"))
            self.senders.detach(sender.link)
        sender.checkpoint = max(sender.checkpoint, fields["checkpoint"])
        self.senders.attach(sender, link, fields, now_s)
        if known.number > max(self.state.epoch.number, self.state.promised.number):
            actions += self.opening.met(known, now_s)
        if fields["incarnation"] == sender.incarnation:
            return actions + self._welcome(sender)
        self.senders.incarnate(sender, fields["incarnation"])
        # Durable before WELCOME: a stale HELLO must be known as such after our own restart too (rule 1).
        sender.hello = None
        actions.append(self.save(lambda _: self._ready_to_welcome(sender, link, fields)))
        return actions

    def _refuse_stranger(self, link: int, text: str) -> list[Action]:
        """A primary that has worked with another: this one is in the place of a lost one, and has not said so."""
        fenced = [] if self.state.epoch.number else self.opening.behind(text)
        if not fenced:
            text += f", which {self.name} never opened: if it was put in another's place: blockrepl replace"
        return [*fenced, self._refuse(link, Refusal.STATE, self.opening.reason if fenced else text)]

    def _ready_to_welcome(self, sender: Sender, link: int, fields: dict[str, Any]) -> list[Action]:
        if sender.link != link:
            return []
        sender.hello = fields
        return self._welcome(sender)

    def _welcome(self, sender: Sender) -> list[Action]:
        """WELCOME waits until all that was numbered from this primary is durable, and names it (rule 7)."""
        if sender.hello is None or self.opening.phase is not Phase.SERVING or sender.durable_last != sender.last:
            return []
        hello, sender.hello, sender.live = sender.hello, None, True
        self.senders.grant(sender)
        message = self._me.welcome(
            hello, epoch=self.state.epoch, promised=self.state.promised, through=sender.durable_last,
            batch=sender.durable_batch, credit=sender.credit, validated=self.streams.validated,
            direction=self.state.direction, pair=self.pairing.pair, numbering=self.state.numbering,
            resync=self.pairing.resync_id, resynced=self.state.resynced,
        )  # fmt: skip
        told = self.configuring.tell(sender)
        return [Send(sender.link, [message]), *told, *self.pairing.primary_greeted(sender)]

    def welcome_all(self) -> list[Action]:
        """Production goes on: answer every HELLO that waits."""
        actions: list[Action] = []
        for sender in self.senders.by_node.values():
            if sender.link:
                actions += self._welcome(sender)
        return actions

    def dismiss_primaries(self, code: Refusal, text: str) -> list[Action]:
        """Close every primary's link, saying why; they then know of the higher epoch."""
        actions: list[Action] = [self._refuse(link, code, text) for link in self.senders.by_link]
        for link in list(self.senders.by_link):
            self.senders.detach(link)
        return actions

    def dismiss_opener(self, code: Refusal, text: str) -> list[Action]:
        """Close the link of a takeover's opener, saying why; it then goes on without us. A reform's opener needs us."""
        if self.opener_reforms:
            return []
        link, self.opener_link = self.opener_link, 0
        return [self._refuse(link, code, text)] if link else []

    # hop 1: batches

    def batch(
        self, link: int, head: RecordHead, chunk: Chunk, start: int, end: int, now_s: float, time_ns: int,
        boot_ns: int = 0,
    ) -> list[Action]:  # fmt: skip
        """Number the batch that lies in ``chunk.view[start:end]``, in place, and append it.

        Raises SequenceGapError or ProtocolError: the host closes the link. `Append` carries one use of the chunk.
        ``boot_ns``: CLOCK_BOOTTIME, read after the batch arrived (rule 16); needed with fence level never only.
        """
        sender = self.senders.by_link.get(link)
        if sender is None or not sender.live:
            return []  # a link that was closed, or not welcomed: its writes are nobody's (rule 1)
        sender.heard_s = now_s
        self._wall_ns = time_ns
        if self._waiting or self.pairing.holds or (self.policy.fence_never and not self._leases_fresh(boot_ns)):
            chunk.hold()
            self._waiting.append((link, head, chunk, start, end, time_ns))
            return []
        return self._number(sender, link, head, chunk, start, end, time_ns)

    def _number(
        self, sender: Sender, link: int, head: RecordHead, chunk: Chunk, start: int, end: int, time_ns: int
    ) -> list[Action]:
        if head.sender != sender.node or head.group != self.group or head.incarnation != sender.incarnation:
            raise ProtocolError(f"batch of node {head.sender}, incarnation {head.incarnation}, on another's link")
        stream = self.streams.by_node.get(head.stream)
        if stream is None:
            if head.stream != self.node or not head.flags & RecordFlag.COPY:
                raise ProtocolError(f"node {head.stream} is no secondary of this group")
            stream = self._here
        if self.opening.phase is not Phase.SERVING:
            # It would never be sent again on this link. The next one is welcomed when production goes on.
            return [Close(link, f"nothing is numbered now: {self.opening.reason or self.opening.phase.value}")]
        size = end - start
        sender.credit_used += frame_bytes(size)  # the primary has spent it, whatever becomes of the batch
        if sender.credit_used > sender.credit:
            raise ProtocolError("batch beyond the credit")
        if not self.state.numbering:
            return []  # hop 1 is suspended: after a resync its primary sends it again
        if head.batch <= sender.batch:
            return self._acknowledge(sender)  # from the durable watermark only
        if head.batch != sender.batch + 1:
            raise SequenceGapError(f"batch {head.batch} after {sender.batch}")
        self.senders.free_bytes -= frame_bytes(size)  # until `ring` says how it really is
        head.epoch, head.first, head.previous, head.time_ns = (
            self.state.epoch.number, self.numbered + 1, stream.last, time_ns,
        )  # fmt: skip
        head.header_crc = number_record(chunk.view, start, head.epoch, head.first, head.previous, time_ns)
        self.numbered += head.count
        stream.last = sender.last = self.numbered
        sender.batch = head.batch
        stream.total_writes += head.count
        stream.total_bytes += size
        self._appended.append((self.numbered, sender, head.incarnation, head.batch, head.stream, size))
        chunk.hold()
        return [Append(head, chunk.view[start:end], chunk)]

    def _leases_fresh(self, boot_ns: int) -> bool:
        """Every primary has echoed a stamp younger than T: none can have gone on alone (rule 16)."""
        oldest = boot_ns - int(self.policy.lease_s * 1e9)
        excluded = self.state.excluded
        return all(
            sender.live and sender.echo_ns > max(0, oldest)
            for sender in self.senders.by_node.values() if sender.node not in excluded
        )  # fmt: skip

    @property
    def uncertain(self) -> list[int]:
        """Primaries that may have gone on alone, or say so: what they completed then, nobody else has (rule 16)."""
        if not self.policy.fence_never:
            return []
        oldest = max(0, self._boot_ns - int(self.policy.lease_s * 1e9))
        senders = [each for node, each in self.senders.by_node.items() if node not in self.state.excluded]
        # One that was welcomed has been taken into account: the pair is in PSUE until a resync has taken it back.
        said = [each for each in senders if each.suspended and not each.live]
        return [each.node for each in senders if not each.link or each.echo_ns <= oldest or each in said]

    def _number_waiting(self, now_s: float) -> list[Action]:
        """Batches that waited for leases, or for a resync to begin."""
        actions: list[Action] = []
        waiting = self._waiting
        if self.policy.fence_never and not self._leases_fresh(self._boot_ns):
            return actions
        while waiting and not self.pairing.holds:
            link, head, chunk, start, end, time_ns = waiting.popleft()
            sender = self.senders.by_link.get(link)
            if sender is not None and sender.live:
                try:
                    actions += self._number(sender, link, head, chunk, start, end, time_ns)
                except ProtocolError as error:
                    actions.append(Close(link, str(error)))
            chunk.release()
        return actions

    def control(self, kind: RecordKind, stream: Stream, number: int, flags: int) -> Append:
        """A record of the intermediate's own: START or END of one stream, numbered."""
        record = control_record(
            kind, self.group, self.node, stream.node, self.state.incarnation & 0xFFFFFFFF, number, flags
        )  # fmt: skip
        return self._number_own(record, stream)

    def put_marker(self, name: str) -> list[Action]:
        """`marker put`: a name in the order, one record in each stream, nothing between them. Raises UsageError."""
        raw = name.encode()
        if not raw or len(raw) > MAX_MARKER_BYTES or not name.isprintable():
            raise UsageError(f"a marker's name has 1 to {MAX_MARKER_BYTES} bytes of printable text", hint="shorten it")
        fit = self.pairing.shown in (Pair.PAIR, Pair.PFUL)
        if self.opening.phase is not Phase.SERVING or not self.state.numbering or not fit:
            raise UsageError(
                f"no marker can be put in state {self.pairing.shown.name}: it would not reach the secondaries in order",
                hint="blockrepl pair wait -s PAIR -t 60",
            )
        streams = list(self.streams.by_node.values())
        number = self.numbered + len(streams)
        self.markers.pop(name, None)
        self.markers[name] = number
        while len(self.markers) > MARKERS_MAX:
            del self.markers[next(iter(self.markers))]
        incarnation = self.state.incarnation
        return [
            self._number_own(marker_record(self.group, self.node, stream.node, incarnation, number, raw), stream)
            for stream in streams
        ]

    def own_copy(self, volume: int, offset_bytes: int, data: bytearray) -> list[Action]:
        """Volumes mode: a block of an intermediate volume as a COPY record, at this very number (rule 19)."""
        stream = self.streams.by_node[self._homes[volume]]
        zero = data.count(0) == len(data)
        payload = None if zero else data
        record, size = encode_record(
            RecordKind.UPDATE, self.group, self.node, stream.node, self.state.incarnation, 0, volume,
            [Op.ZERO if zero else Op.WRITE], [0], [offset_bytes], [len(data)], [payload], 0 if zero else len(data),
            RecordFlag.COPY,
        )  # fmt: skip
        whole = record if payload is None else record + payload
        assert len(whole) == size
        return [self._number_own(whole, stream)]

    def _number_own(self, record: bytearray, stream: Stream) -> Append:
        chunk = Chunk(len(record), None)
        chunk.view[: len(record)] = record
        view = chunk.view[: len(record)]
        self.senders.free_bytes -= frame_bytes(len(record))
        self.undurable_bytes += len(record)
        head = decode_batch(view)
        head.epoch, head.first, head.previous = self.state.epoch.number, self.numbered + 1, stream.last
        head.time_ns = self._wall_ns
        head.header_crc = number_record(view, 0, head.epoch, head.first, head.previous, head.time_ns)
        self.numbered += 1
        stream.last = self.numbered
        self._appended.append((self.numbered, self._own, head.incarnation, 0, stream.node, len(record)))
        return Append(head, view, chunk)

    def durable(self, number: int, now_s: float) -> list[Action]:
        """The journal is synced up to ``number``: acknowledge, and send on."""
        assert self.durable_number <= number <= self.numbered
        self.durable_number = number
        appended, streams = self._appended, self.streams
        touched: dict[int, Sender] = {}
        fed: set[int] = set()
        while appended and appended[0][0] <= number:
            last, sender, incarnation, batch, stream_node, size = appended.popleft()
            if sender is self._own:
                self.undurable_bytes -= size
            sender.durable_last = last
            if incarnation == sender.incarnation:
                sender.durable_batch = batch
            touched[sender.node] = sender
            if stream_node != self.node:
                streams.durable(stream_node, last, size)
                fed.add(stream_node)
        actions: list[Action] = []
        for sender in touched.values():
            actions += self._acknowledge(sender)
            if sender.hello is not None:
                actions += self._welcome(sender)
        for stream_node in fed:
            actions += streams.feed(stream_node)
        actions += self._rounds(now_s)
        if self.opening.waits:
            actions += self.opening.drained(now_s)
        return actions

    def _acknowledge(self, sender: Sender) -> list[Action]:
        if not sender.live or not sender.durable_batch:
            return []
        self.senders.grant(sender)
        message = encode(
            Message.ACK, self.state.epoch.number, incarnation=sender.incarnation, batch=sender.durable_batch,
            number=sender.durable_last,
            validated=self.streams.validated, credit=sender.credit,
        )  # fmt: skip
        return [Send(sender.link, [message])]

    def ring(self, free_bytes: int, ring_bytes: int = 0) -> list[Action]:
        """The ring's free bytes, less the reserve, have changed: primaries that wait for credit get it."""
        self.senders.free_bytes = free_bytes
        self.pairing.room(free_bytes, ring_bytes)
        actions: list[Action] = []
        for sender in self.senders.by_link.values():
            if sender.live and self.senders.grant(sender):
                actions += [Send(sender.link, [self._beat(0, sender.stamp_ns, sender.credit)])]
        return actions

    def grant_anew(self) -> list[Action]:
        """The ring was made smaller: credit is absolute, so what an idle primary holds of the old one would starve the
        others. With new links it begins anew."""
        why = "the journal was made smaller: credit is granted anew"
        return [Close(link, why) for link in list(self.senders.by_link)]

    @property
    def releasable(self) -> int:
        """Every record up to it may leave the journal (rule 12)."""
        number = self.senders.releasable
        validated = self.pairing.releasable
        if validated is None:
            validated = min(self.streams.validated, self.streams.valid_counter)
        return validated if number is None else min(number, validated)

    # hop 2

    def connected(self, link: int, node: int, nonce: bytes, now_s: float) -> list[Action]:
        """A connection to a secondary is up: greet."""
        self._hello_links[link] = node
        self._heard_s[link] = now_s
        self._nonces[link] = nonce
        state = self.state
        hello = self._me.hello(
            node, nonce, epoch=state.epoch, promised=state.promised, incarnation=state.incarnation,
            highest=self.durable_number,
        )  # fmt: skip
        return [Send(link, [hello])]

    def transmitted(self, node: int, link: int, last: int, sent_frame_bytes: int, now_s: float) -> list[Action]:
        """A helping of records went to a secondary's link."""
        return self.streams.transmitted(node, link, last, sent_frame_bytes)

    def received(self, link: int, kind: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """A control message on any link. Raises ProtocolError: the host closes the link and calls `lost`."""
        if link in self._hello_links:
            self._heard_s[link] = now_s
            return self._from_secondary(link, kind, fields, now_s)
        if link == self.opener_link:
            if kind == Message.PROMISE:
                return self.opening.asked_to_promise(link, fields, now_s)
            if kind == Message.STORE:
                return self.opening.asked_to_store(link, fields, now_s)
            if kind == Message.HEARTBEAT:
                return []
            raise ProtocolError(f"{Message(kind).name} does not belong on an opener's link")
        sender = self.senders.by_link.get(link)
        if sender is None:
            return []
        sender.heard_s = now_s
        if kind == Message.HEARTBEAT:
            sender.stamp_ns = fields["stamp_ns"]
            sender.echo_ns = max(sender.echo_ns, fields["echo_ns"])
            sender.wants_bytes = fields["credit"]
            return []
        if not sender.live:
            raise ProtocolError(f"{Message(kind).name} before WELCOME")
        if kind == Message.CONFIG:
            sender.config = fields["digest"]
            return []
        if kind == Message.CHECKPOINT:
            if fields["number"] > sender.durable_last:
                raise ProtocolError(f"checkpoint {fields['number']} is beyond {sender.durable_last}")
            sender.checkpoint = max(sender.checkpoint, fields["number"])
            return self._spill_is_done_with(sender)
        if kind == Message.COPIED:
            return self.pairing.copied(sender, fields["id"])
        if kind == Message.REPLAY:
            end = encode(Message.REPLAYED, self.state.epoch.number, through=sender.durable_last)
            return [Replay(link, sender.node, fields["after"], sender.durable_last, end)]
        raise ProtocolError(f"{Message(kind).name} does not belong on a primary's link")

    def _from_secondary(self, link: int, kind: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        node = self._hello_links[link]
        if kind == Message.WELCOME:
            if fields["nonce"] != self._nonces.pop(link, None):
                raise ProtocolError("WELCOME answers another HELLO")
            if fields["role"] != LinkRole.SECONDARY or fields["node"] != node:
                raise ProtocolError(f"node {fields['node']} answered for {node}")
            return self.opening.greeted(node, link, fields, now_s)
        if kind == Message.REFUSED:
            return [*self.opening.refused(node, fields, now_s), Close(link, fields["text"])]
        if kind == Message.HEARTBEAT:
            return self._secondary_beat(link, fields)
        if kind == Message.PREPARED:
            if link not in self.streams.by_link or fields["epoch_number"] != self.state.epoch.number:
                return []
            actions = self.streams.prepared(
                link, fields["number"], fields["applied"], fields["credit"], self.durable_number
            )
            actions += self._rounds(now_s) + self.opening.drained(now_s) + self.pairing.progressed(now_s)
            return actions + self.configuring.tick(now_s)
        if kind in (Message.PROMISED, Message.STORED):
            return self.opening.answered(node, link, kind, fields, now_s)
        if kind == Message.BITMAP:
            return self.pairing.bits(fields)
        if kind == Message.REJOINED:
            return self.pairing.rejoined(node, now_s)
        if kind == Message.CONFIG:
            self.streams.by_node[node].config = fields["digest"]
            return []
        if kind == Message.DIGESTED:
            return self._digested(self.comparing.answered(fields))
        raise ProtocolError(f"{Message(kind).name} does not belong on a secondary's link")

    def compared(self, number: int, different: list[int] | None) -> list[Action]:
        """Volumes mode: a digest record was compared with the intermediate volume; None: nobody knows."""
        return self._digested(self.comparing.compared(number, different))

    def _digested(self, answer: dict[str, Any] | None) -> list[Action]:
        """On to the primary that asked."""
        sender = self.senders.by_node.get(answer["sender"]) if answer is not None else None
        if answer is None or sender is None or not sender.live:
            return []
        return [Send(sender.link, [encode(Message.DIGESTED, self.state.epoch.number, **answer)])]

    def _secondary_beat(self, link: int, fields: dict[str, Any]) -> list[Action]:
        stream = self.streams.by_link.get(link)
        if stream is None:
            return []
        stream.applied = max(stream.applied, fields["applied"])
        stream.credit = max(stream.credit, fields["credit"])
        return self.streams.pump(stream)

    def _rounds(self, now_s: float) -> list[Action]:
        phase = self.opening.phase
        if phase is Phase.SERVING or phase is Phase.FROZEN:
            return self.streams.tick(self.durable_number, now_s)
        return []

    # openers

    def _greet_opener(self, link: int, fields: dict[str, Any]) -> list[Action]:
        phase = self.opening.phase
        if phase is Phase.FAILED or (phase is Phase.FENCED and fields["role"] == LinkRole.OPENER):
            return [self._refuse(link, Refusal.STATE, self.opening.reason)]
        actions: list[Action] = []
        if self.opener_link:
            actions.append(Close(self.opener_link, "another opener came"))
        self.opener_link = link
        self.opener_reforms = fields["role"] == LinkRole.REFORMER
        message = self._me.welcome(
            fields, epoch=self.state.epoch, promised=self.state.promised, through=self.durable_number,
            validated=self.streams.validated, prepared=self.streams.valid_counter,
        )  # fmt: skip
        return [*actions, Send(link, [message])]

    # ends and time

    def lost(self, link: int, now_s: float) -> list[Action]:
        """A link is gone."""
        self.senders.detach(link)
        self.streams.detach(link)
        self._heard_s.pop(link, None)
        self._nonces.pop(link, None)
        for item in self._waiting:
            if item[0] == link:
                item[2].release()
        self._waiting = deque(item for item in self._waiting if item[0] != link)
        node = self._hello_links.pop(link, None)
        if link == self.opener_link:
            self.opener_link = 0
        return [] if node is None else self.opening.parted(node, link, now_s)

    def fail(self, reason: str) -> list[Action]:
        """Stop for good: a disk error, or a history that does not fit. Nothing is numbered or acknowledged any more."""
        if self.opening.phase is Phase.FAILED:
            return []
        self.opening.fail(reason)
        return [Event(f"stopped: {reason}"), *self.dismiss_primaries(Refusal.STATE, reason)]

    def round(self, now_s: float) -> list[Action]:
        """Called at `due_s`: open a prepare round."""
        return self._rounds(now_s)

    def due_s(self) -> float:
        """When the next prepare round is due, for the host's timer."""
        phase = self.opening.phase
        if phase is not Phase.SERVING and phase is not Phase.FROZEN:
            return float("inf")
        return self.streams.due_s(self.durable_number)

    def tick(self, now_s: float, boot_ns: int) -> list[Action]:
        """Called at least every few tens of milliseconds, and at `due_s`."""
        self._boot_ns = boot_ns
        actions = self._rounds(now_s) + self.opening.tick(now_s) + self.pairing.tick(now_s)
        actions += self.configuring.tick(now_s)
        if self._waiting:
            actions += self._number_waiting(now_s)
        if self.policy.fence_never:
            actions += self._watch_leases(now_s, boot_ns)
        for sender in self.senders.by_node.values():
            if sender.live:
                sender.live_s = now_s
        if (self.senders.starving or self.senders.free_bytes <= 0) and not self._spilling:
            actions += self._spill(now_s)
        silent = now_s - self.policy.link_timeout_s
        for link, heard_s in self._heard_s.items():
            if heard_s < silent:
                actions.append(Close(link, f"nothing heard for {self.policy.link_timeout_s} s"))
        for sender in self.senders.by_node.values():
            if sender.link and sender.heard_s < silent:
                actions.append(Close(sender.link, f"nothing heard for {self.policy.link_timeout_s} s"))
        every_s = self.policy.heartbeat_s
        if self.policy.fence_never:
            every_s = min(every_s, self.policy.lease_s / 6)
        if now_s - self._beat_s >= every_s:
            self._beat_s = now_s
            actions += self._beats(boot_ns)
        return actions

    def _spill(self, now_s: float) -> list[Action]:
        """The ring is full, and a primary that is away holds its head back: keep that primary's records beside it."""
        by_checkpoint = self.senders.releasable
        if by_checkpoint is None or by_checkpoint >= self.streams.validated:
            return []
        for sender in self.senders.by_node.values():
            kept = max(sender.checkpoint, sender.spilled)
            away = not sender.live and now_s - sender.live_s > self.policy.link_timeout_s
            if away and kept == by_checkpoint and sender.durable_last > kept:
                through = sender.durable_last
                self._spilling = True

                def stored(now_s: float, sender: Sender = sender, through: int = through) -> list[Action]:
                    self._spilling = False
                    sender.spilled = through
                    return [Event(f"records of {self.called(sender.node)} up to {through} are kept beside the ring")]

                def spilled(now_s: float, sender: Sender = sender, through: int = through) -> list[Action]:
                    rest = [row for row in self.state.spilled if row[0] != sender.node]
                    self.state.spilled = [*rest, (sender.node, through)]
                    return [self.save(stored)]

                return [Spill(sender.node, kept, through, self.expect(spilled))]
        return []

    def _spill_is_done_with(self, sender: Sender) -> list[Action]:
        if not sender.spilled or sender.checkpoint < sender.spilled:
            return []
        sender.spilled = 0
        self.state.spilled = [row for row in self.state.spilled if row[0] != sender.node]
        return [self.save(lambda _: [DropSpill(sender.node)])]

    def _watch_leases(self, now_s: float, boot_ns: int) -> list[Action]:
        """A primary that is silent for too long may have gone on alone: suspend the group, at one number (rule 16)."""
        if self.opening.phase is not Phase.SERVING or not self.state.numbering:
            self._fresh_s = None
        elif self._leases_fresh(boot_ns):
            self._fresh_s = now_s
        elif self._fresh_s is not None and now_s - self._fresh_s > self.policy.link_timeout_s:
            self._fresh_s = None
            return self.pairing.stop_numbering("a primary is silent, and may have gone on alone")
        return []

    def exclude(self, node: int) -> list[Action]:
        """`node exclude`: a primary is known to be dead; the others go on without it. Raises UsageError."""
        sender = self.senders.by_node.get(node)
        if sender is None:
            raise UsageError(f"{self.called(node)} is no primary of this group now", hint="see: blockrepl status")
        if sender.link:
            raise UsageError(
                f"{self.called(node)} is connected: it is not dead", hint="stop it first: blockrepl down --node"
            )
        if node not in self.state.excluded:
            self.state.excluded.append(node)
        return [self.save(lambda _: [Event(f"{self.called(node)} is excluded")])]

    def include(self, node: int) -> list[Action]:
        """`node include`. Raises UsageError."""
        if node not in self.state.excluded:
            raise UsageError(f"{self.called(node)} is not excluded", hint="see: blockrepl status")
        self.state.excluded.remove(node)
        return [self.save(lambda _: [Event(f"{self.called(node)} is included")])]

    def _beats(self, boot_ns: int) -> list[Action]:
        actions: list[Action] = []
        for sender in self.senders.by_node.values():
            if sender.link:
                if sender.live:
                    self.senders.grant(sender, whole=True)
                actions.append(Send(sender.link, [self._beat(boot_ns, sender.stamp_ns, sender.credit)]))
        for link in self._hello_links:
            if link not in self._nonces:
                actions.append(Send(link, [self._beat(boot_ns, 0, 0)]))
        return actions

    def _beat(self, boot_ns: int, echo_ns: int, credit: int) -> bytes:
        return encode(
            Message.HEARTBEAT, self.state.epoch.number, stamp_ns=boot_ns, echo_ns=echo_ns, numbered=self.numbered,
            validated=self.streams.validated, applied=0, credit=credit, pair=self.pairing.pair,
        )  # fmt: skip
