"""The pair state of a group, as the intermediate keeps it: suspension, split, resync (PROTOCOL, rules 15 to 21).

Hop 2 is suspended by a limit on the streams: what the journal then gives up is kept as bits. Hop 1 is suspended by not
numbering: primaries go on alone, with bits of their own. A resync joins both: bits from the secondaries (split --rw),
bits of the journal, bits of the primaries; between START and END the primaries copy what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from blockrepl.bitmap import Bitmap
from blockrepl.errors import UsageError
from blockrepl.formats.link import Message, Pair, encode
from blockrepl.formats.record import RecordFlag, RecordHead, RecordKind
from blockrepl.replication.actions import Action, CopyOwn, Event, MarkJournal, SaveBits, Send
from blockrepl.replication.bits import bit_messages, merge_bits
from blockrepl.replication.hop1 import Sender
from blockrepl.replication.machine import Machine
from blockrepl.replication.opening import Phase
from blockrepl.replication.streams import Round, Stream

if TYPE_CHECKING:
    from blockrepl.replication.intermediate import Intermediate

Then = Callable[[float], list[Action]]
FULL_S = 1.0  # how long a ring must have been full before hop 2 is suspended
MARK_S = 1.0  # between START and END the journal waits for its bits: how often they are made
RETRY_S = 2.0  # between attempts at a resync that nobody asked for
COMES_FIRST = {
    Pair.SMPL: "there is no pair: blockrepl pair create",
    Pair.COPY: "wait for the copy to end: blockrepl pair wait -s PAIR",
    Pair.PAIR: "split it first: blockrepl pair split",
    Pair.PFUL: "split it first: blockrepl pair split",
    Pair.PSUS: "it is split: blockrepl pair resync",
    Pair.PSUE: "it is suspended: blockrepl pair resync",
    Pair.PFUS: "it comes back by itself, or at once: blockrepl pair resync",
}  # what is typed before a command that a state forbids


class Step(Enum):
    """What is being done to the pair."""

    IDLE = "nothing"
    DRAINING = "draining for a split"
    REJOINING = "asking the secondaries what was written there"
    MARKING = "turning the journal into bits"
    STARTING = "storing the start"
    COPYING = "copying"
    ENDING = "waiting for the end to be validated"
    CLOSING = "clearing the bits"


TABLE: dict[tuple[Step, str], Step] = {
    (Step.IDLE, "split"): Step.DRAINING,
    (Step.DRAINING, "drained"): Step.IDLE,
    (Step.DRAINING, "fall back"): Step.IDLE,
    (Step.IDLE, "resync"): Step.REJOINING,
    (Step.REJOINING, "rejoined"): Step.MARKING,
    (Step.MARKING, "marked"): Step.STARTING,
    (Step.STARTING, "started"): Step.COPYING,
    (Step.REJOINING, "fall back"): Step.IDLE,
    (Step.MARKING, "fall back"): Step.IDLE,
    (Step.MARKING, "lift"): Step.IDLE,  # nothing was missed: no resync is needed
    (Step.COPYING, "copied"): Step.ENDING,
    (Step.COPYING, "fall back"): Step.IDLE,  # suspended again
    (Step.ENDING, "fall back"): Step.IDLE,
    (Step.ENDING, "ended"): Step.CLOSING,
    (Step.IDLE, "ended"): Step.CLOSING,  # suspended again, after END was numbered
    (Step.CLOSING, "closed"): Step.IDLE,
}
BEFORE_START = frozenset({Step.REJOINING, Step.MARKING})
UNDER_WAY = frozenset({Step.COPYING, Step.ENDING})


class Pairing:
    """The pair of one group.

    Invariants: a record leaves the journal only when it is validated or its blocks are in ``bitmaps``, durably;
    nothing is numbered while ``state.numbering`` is False; ``bitmaps`` are cleared only after an END was validated.
    """

    def __init__(
        self, owner: Intermediate, bitmaps: Mapping[int, Bitmap], owners: Mapping[int, int], *, local_source: bool
    ) -> None:
        """``bitmaps``: volume → its hop-2 bitmap; ``owners``: volume → the primary that serves it."""
        self._owner = owner
        self.bitmaps = bitmaps
        self.owners = owners
        self.local_source = local_source
        state = owner.state
        self.machine: Machine[Step] = Machine(TABLE, Step.STARTING if state.pair == Pair.COPY else Step.IDLE)
        self._starts: list[tuple[int, int]] = []  # (secondary, number before its START that is skipped to, or 0)
        self._starts_through = 0  # the number of the last START given
        self._first = 0  # the first START since the last copy ended; 0: none, or numbered by an earlier process
        # Every record up to it is in the bitmaps, or never needed there; a START may say more than all have got.
        self.marked = min(state.at, state.validated) if state.start else state.at
        self.high_water = False
        self.reason = ""
        self._copied: set[int] = set()  # primaries that have sent everything
        self._rejoined: set[int] = set()
        self._own_copied = False
        self.rate_bytes = 0
        self._forget = False
        self._marking = 0  # token under way
        self._full_since_s: float | None = None
        self._retry_s = 0.0
        self._split_writable = False
        self._copy_again = False
        self._marked_s = 0.0
        self._free_bytes = self._ring_bytes = 1
        if state.limited:
            owner.streams.limit = Round(state.at, dict.fromkeys(owner.streams.by_node, 0))

    # start

    def recovered(self, head: RecordHead) -> None:
        """A START or END found in the journal at start."""
        state = self._owner.state
        if head.kind == RecordKind.START and head.epoch == state.epoch.number:
            skip = head.previous if head.flags & RecordFlag.JUMP else 0
            self._starts = [each for each in self._starts if each[0] != head.stream] + [(head.stream, skip)]
            self._starts_through = head.last
            state.end = 0
        elif head.kind == RecordKind.END:
            state.end = head.last

    def start(self) -> None:
        """The journal is recovered: where a resync under way stands."""
        owner, state = self._owner, self._owner.state
        self._starts = self._starts or state.starts
        if state.pair == Pair.COPY and len(self._starts) == len(owner.streams.by_node):
            state.limited, owner.streams.limit = False, None
            self.machine.go("started")
            self._copy_again = True
            if state.end:
                self.machine.go("copied")
        if state.start:
            owner.streams.skips = dict(self._starts)
            if any(skip for _, skip in self._starts) or (state.pair == Pair.COPY and state.limited):
                self._raise_floor()

    def durable_starts(self) -> list[tuple[int, int]]:
        """For the state: the STARTs, once they are durable."""
        return self._starts if self._owner.durable_number >= self._starts_through else []

    # what others ask

    @property
    def step(self) -> Step:
        """What is being done."""
        return self.machine.state

    @property
    def pair(self) -> Pair:
        """The state that people are told."""
        pair = Pair(self._owner.state.pair)
        return Pair.PFUL if pair is Pair.PAIR and self.high_water else pair

    @property
    def shown(self) -> Pair:
        """The state that an operator acts on: PSUE also while a primary may have gone on alone, and has not said so.

        An intermediate that was just started does not know; the roles go by ``pair`` until they are told.
        """
        whole = self.pair in (Pair.PAIR, Pair.PFUL, Pair.COPY)
        return Pair.PSUE if whole and self._owner.uncertain else self.pair

    @property
    def shown_reason(self) -> str:
        """Why it is in that state."""
        return self.reason if self.shown is self.pair else f"{self._uncertain()} may have gone on alone"

    def _uncertain(self) -> str:
        return ", ".join(f"primary {node}" for node in self._owner.uncertain)

    @property
    def holds(self) -> bool:
        """Batches wait: the STARTs are to be numbered first."""
        return self.machine.state is Step.STARTING

    @property
    def copies_here(self) -> bool:
        """Volumes mode, and hop 2 was suspended: what it missed is copied from the intermediate's own volumes.

        Not before those are whole; and after a reform they are history: then the sources copy, as in journal mode.
        """
        return self.local_source and self._owner.state.filled and any(skip for _, skip in self._starts)

    @property
    def copying(self) -> bool:
        """Between START and END, nothing else."""
        return self.machine.state is Step.COPYING

    @property
    def draining(self) -> bool:
        """About to be split: nothing that is numbered now is sent before the resync."""
        return self.machine.state is Step.DRAINING

    @property
    def ring_bytes(self) -> int:
        """Of the journal, less the reserve."""
        return self._ring_bytes

    @property
    def undrainable(self) -> bool:
        """The secondaries cannot be brought to what is numbered."""
        state = self._owner.state
        return state.limited or (state.start > 0 and not state.end)

    @property
    def resync_id(self) -> int:
        """Of the resync that primaries are to work on now; 0 for none."""
        return self._owner.state.start if self.step in UNDER_WAY else 0

    @property
    def suspended_at(self) -> int:
        """The number that the secondaries are at while hop 2 is suspended."""
        return max(self._owner.state.at, self._owner.streams.validated)

    @property
    def releasable(self) -> int | None:
        """What the journal may give up because it is in the bitmaps, or was never missed; None in PAIR.

        Between START and END even what is validated must be in the bitmaps: a takeover would undo it there.
        """
        state = self._owner.state
        if state.start:
            return self.marked if state.limited else min(self.marked, self._owner.streams.validated)
        return max(self.marked, self._owner.streams.validated) if state.limited else None

    def out_of_sync_bytes(self) -> int:
        """By the hop-2 bitmaps; what only the journal holds comes on top."""
        return sum(bitmap.dirty_bytes for bitmap in self.bitmaps.values())

    # operators

    def forbid(self, command: str, allowed: set[Pair], first: str = "") -> None:
        """Raises UsageError that names the state, and which command comes first."""
        pair, opening = self.pair, self._owner.opening
        if opening.phase is Phase.FENCED and opening.taken_over:
            raise UsageError(
                f"{command} is not possible in state SSWS: {opening.reason}",
                hint="make the other site the copy first: blockrepl pair resync --swap; see also blockrepl explain",
            )
        if opening.phase is not Phase.SERVING:
            why = f": {opening.reason}" if opening.reason else ""
            raise UsageError(
                f"{command} is not possible while the intermediate is {opening.phase.value}{why}",
                hint="see: blockrepl explain",
            )
        if self.shown is not pair and pair is not Pair.COPY:
            raise UsageError(
                f"{command} is not possible in state {self.shown.name}: {self.shown_reason}",
                hint="it must be heard of first: start it; one that is dead for good: blockrepl node exclude",
            )
        if pair not in allowed:
            raise UsageError(f"{command} is not possible in state {pair.name}", hint=first or COMES_FIRST[pair])
        if self.step is not Step.IDLE and command != "pair split":
            raise UsageError(f"{command} is not possible while {self.step.value}", hint="see: blockrepl status")

    def split(self, *, writable: bool, now_s: float) -> list[Action]:
        """`pair split`: stop hop 2 at one number. Raises UsageError."""
        self.forbid("pair split", {Pair.PAIR, Pair.PFUL, Pair.COPY})
        owner = self._owner
        if self.step in UNDER_WAY or self.step in BEFORE_START:
            if writable:
                raise UsageError(
                    "pair split --rw is not possible in state COPY: the secondaries are at no number of their own",
                    hint="wait for PAIR first: blockrepl pair wait -s PAIR -t 600",
                )
            return self._suspend_hop2(Pair.PSUS, "split while copying")
        if self.step is not Step.IDLE:
            raise UsageError(f"pair split is not possible while {self.step.value}", hint="see: blockrepl status")
        if not owner.streams.all_ready:
            if writable:
                raise UsageError(
                    "pair split --rw needs every secondary: one is away", hint="see: blockrepl status"
                )  # fmt: skip
            return self._suspend_hop2(Pair.PSUS, "split; a secondary was away")
        self.machine.go("split")
        self._split_writable = writable
        owner.streams.limit = Round(owner.numbered, {s.node: s.last for s in owner.streams.by_node.values()})
        return [Event(f"splitting at {owner.numbered}"), *self.progressed(now_s)]

    def resync(
        self, *, verify: bool = False, initial: bool = False, rate_bytes: int = 0, forget: bool = False, now_s: float
    ) -> list[Action]:
        """`pair resync` and `pair create`. Raises UsageError."""
        allowed = {Pair.PSUS, Pair.PSUE, Pair.PFUS} | ({Pair.SMPL} if initial else set())
        if verify:
            allowed |= {Pair.PAIR, Pair.PFUL}
        name = "pair create" if initial else "pair resync"
        exists = initial and self.pair in (Pair.PAIR, Pair.PFUL)
        first = "the pair is there already; to copy all of it again: blockrepl pair delete" if exists else ""
        self.forbid(name, allowed, first)
        missing = self.missing()
        if missing:
            raise UsageError(f"{name} needs every node: {missing}", hint="see: blockrepl status")
        if not verify and any(s.live and not s.trusted for s in self._owner.senders.by_node.values()):
            raise UsageError(
                f"{name}: a primary's bitmap cannot be trusted: it stopped uncleanly and the journal was lost",
                hint="compare everything, copy what differs: blockrepl pair resync --verify",
            )
        state = self._owner.state
        state.verify = verify or (state.start > 0 and state.verify)  # one that has not ended is not done
        state.initial = initial or state.initial or (not state.at and state.pair == Pair.PSUE)
        self.rate_bytes, self._forget = rate_bytes, forget
        return self._begin(now_s)

    def delete(self, now_s: float) -> list[Action]:
        """`pair delete`: the secondaries are let go at the number they are at; everything counts as different."""
        allowed = {Pair.PAIR, Pair.PFUL, Pair.PSUS, Pair.PSUE, Pair.PFUS, Pair.COPY}
        self.forbid("pair delete", allowed)
        for bitmap in self.bitmaps.values():
            bitmap.fill()
        return self._suspend_hop2(Pair.SMPL, "the pair is deleted")

    def missing(self) -> str:
        """Who is not there for a resync, in words."""
        owner = self._owner
        away = [owner.called(s.node) for s in owner.streams.by_node.values() if not s.ready]
        away += [owner.called(s.node) for s in owner.senders.by_node.values() if not s.live]
        return f"{', '.join(away)} {'is' if len(away) == 1 else 'are'} away" if away else ""

    # suspension

    def _suspend_hop2(self, pair: Pair, why: str) -> list[Action]:
        """At what is validated: nothing more is sent. What is in flight may still be prepared and validated."""
        owner, state, streams = self._owner, self._owner.state, self._owner.streams
        if self.machine.may("fall back"):
            self.machine.go("fall back")
        if not state.start:
            state.at = max(state.at, streams.validated)
        state.limited, state.pair, state.auto = True, int(pair), pair is Pair.PFUS
        if not state.start:
            self.marked = streams.validated
        elif streams.validated < state.start:  # some were to be sent what lies before the START: it may be bits now
            self.marked = min(self.marked, streams.validated)
        streams.stop()
        self.reason = why
        actions: list[Action] = [Event(f"{pair.name}: {why}", {"at": self.suspended_at})]
        if pair is Pair.SMPL:
            return [*actions, self._save_bits(lambda _: [owner.save(self._tell_split)])]
        return [*actions, owner.save(self._tell_split)]

    def _tell_split(self, now_s: float) -> list[Action]:
        """It is durable: let the secondaries go, where their state is one that can be looked at."""
        owner, state = self._owner, self._owner.state
        if state.start or self.step is not Step.IDLE or state.pair not in (Pair.PSUS, Pair.SMPL):
            return []
        writable = self._split_writable or state.pair == Pair.SMPL
        message = encode(Message.SPLIT, state.epoch.number, number=self.suspended_at, writable=writable)
        return [Send(stream.link, [message]) for stream in owner.streams.by_node.values() if stream.ready]

    def stop_numbering(self, why: str) -> list[Action]:
        """Hop 1 is suspended: stored, then said to every primary; a resync is the way back (rule 16)."""
        owner, state = self._owner, self._owner.state
        if not state.numbering and state.pair == Pair.PSUE:
            return []
        if self.machine.may("fall back"):
            self.machine.go("fall back")
        state.numbering, state.pair = False, int(Pair.PSUE)
        self.reason = why
        if not state.start and not state.limited:
            state.at = owner.numbered
        return [Event(f"PSUE: {why}", {"at": owner.numbered}), owner.save(self._tell_suspended)]

    def _tell_suspended(self, now_s: float) -> list[Action]:
        owner = self._owner
        if owner.state.numbering:
            return []
        message = encode(Message.SUSPEND, owner.state.epoch.number, pair=owner.state.pair, number=owner.numbered)
        return [Send(sender.link, [message]) for sender in owner.senders.by_node.values() if sender.live]

    # a resync

    def _begin(self, now_s: float) -> list[Action]:
        owner = self._owner
        self.machine.go("resync")
        self._rejoined.clear()
        message = encode(Message.REJOIN, owner.state.epoch.number, number=self.suspended_at)
        return [
            Event("resync: asking the secondaries what was written there"),
            *(Send(stream.link, [message]) for stream in owner.streams.by_node.values()),
        ]

    def bits(self, fields: dict[str, Any]) -> list[Action]:
        """BITMAP from a secondary. Raises ProtocolError."""
        merge_bits(self.bitmaps, fields)
        return []

    def rejoined(self, node: int, now_s: float) -> list[Action]:
        """A secondary has said everything that its hosts wrote."""
        if self.step is not Step.REJOINING:
            return []
        self._rejoined.add(node)
        if len(self._rejoined) < len(self._owner.streams.by_node):
            return []
        self.machine.go("rejoined")
        if self._owner.state.limited and self._nothing_missed():
            self.machine.go("lift")
            return self._lift(now_s)
        if self._forget:
            for bitmap in self.bitmaps.values():
                bitmap.clear()
        return [self._save_bits(self._marked)]

    def _nothing_missed(self) -> bool:
        """Hop 2 was suspended and the ring still holds all: what every secondary lacks is simply sent."""
        state = self._owner.state
        whole = self.marked <= max(state.at, self._owner.streams.validated) and not self.out_of_sync_bytes()
        return whole and state.numbering and not (state.start or state.verify or state.initial or self._forget)

    def _lift(self, now_s: float) -> list[Action]:
        owner, state = self._owner, self._owner.state
        state.pair, state.limited, state.auto, state.at = int(Pair.PAIR), False, False, 0
        self.reason, self.marked = "", 0

        def stored(now_s: float) -> list[Action]:
            if owner.state.limited:
                return []
            owner.streams.limit = None
            return owner.streams.pump_all()

        return [Event("PAIR: the journal holds all that was missed"), owner.save(stored)]

    def _mark(self, after: int, through: int, then: Then) -> Action:
        """Turn records into bits."""

        def marked(now_s: float) -> list[Action]:
            self._marking = 0
            self.marked = max(self.marked, through)
            return then(now_s)

        self._marking = self._owner.expect(marked)
        return MarkJournal(after, through, {}, self._marking)

    def _save_bits(self, then: Then) -> Action:
        return SaveBits(self._owner.expect(then))

    def _marked(self, now_s: float) -> list[Action]:
        """The bits of this side are durable: store that a resync begins. From here on batches wait."""
        if self.step is not Step.MARKING:
            return []
        owner, state = self._owner, self._owner.state
        missing = self.missing()
        if missing or owner.phase is not Phase.SERVING:
            self.machine.go("fall back")
            return [Event(f"no resync: {missing or owner.phase.value}")]
        self.machine.go("marked")
        if not state.start:
            state.at = self.suspended_at if state.limited else owner.numbered
            self._first = owner.numbered + 1
        elif state.limited and owner.streams.validated < self._first:
            state.at = owner.streams.validated  # no secondary has begun to copy, and not all come as far as that START
        state.start = owner.numbered + 1
        if state.limited:
            self._raise_floor()
        state.pair, state.numbering, state.auto, state.end, state.starts = int(Pair.COPY), True, False, 0, []
        if state.verify:  # whole again at its end, when all of them were compared
            state.filled, state.filling = False, self.local_source
        self._starts = []
        self._copied.clear()
        self._own_copied = False
        return [owner.save(self._stored)]

    def _raise_floor(self) -> None:
        """``at`` is decided: what lies between it and the last of the STARTs that jump is validated only with that one.

        Else a late PREPARED would make a secondary begin the copy of an older START, which may go back to more.
        """
        streams = self._owner.streams
        streams.floor = self._owner.state.start + len(streams.by_node) - 1

    def _stored(self, now_s: float) -> list[Action]:
        """COPY is stored: number one START per stream, all at once; nothing comes between the bits and them."""
        owner, state, streams = self._owner, self._owner.state, self._owner.streams
        if self.step is not Step.STARTING or owner.phase is not Phase.SERVING:
            return []
        if owner.durable_number < owner.numbered or self._marking:
            return []  # `tick` comes back
        if state.limited and self.marked < owner.numbered:
            return [self._mark(self.marked, owner.numbered, self._stored)]
        flags = int(RecordFlag.INITIAL) if state.initial else 0
        flags |= int(RecordFlag.JUMP) if state.limited else 0
        if not state.limited:
            state.at = owner.numbered
        actions: list[Action] = [Event(f"resync {state.start} begins; it goes back to {state.at} if it fails")]
        self._starts = [(s.node, s.last if state.limited else 0) for s in streams.by_node.values()]
        if state.limited:
            streams.jump(self._starts, owner.numbered)
        else:
            streams.skips = dict(self._starts)
        for stream in streams.by_node.values():
            actions.append(owner.control(RecordKind.START, stream, state.at, flags))
        self._starts_through = self.marked = owner.numbered
        state.limited, streams.limit = False, None
        self.machine.go("started")
        actions += streams.pump_all()
        for sender in owner.senders.by_node.values():
            if sender.live:
                actions += self.tell_resync(sender)
        return actions + self._copy_own()

    def _copy_own(self) -> list[Action]:
        return [CopyOwn(self._owner.state.start)] if self.copies_here else []

    def tell_resync(self, sender: Sender) -> list[Action]:
        """A primary, now or when it is back: the bits, and what to do with them."""
        state = self._owner.state
        if self.step not in UNDER_WAY:
            return []
        # In volumes mode hop 2's own bits are copied from here.
        bitmaps = {} if self._forget or self.copies_here else self.bitmaps
        epoch = state.epoch.number
        messages = bit_messages(epoch, [each for each in bitmaps.items() if self.owners.get(each[0]) == sender.node])
        messages.append(
            encode(
                Message.RESYNC, epoch, id=state.start, verify=state.verify, rate_bytes=self.rate_bytes,
                forget=self._forget,
            )
        )  # fmt: skip
        return [Send(sender.link, [message]) for message in messages]

    def copied(self, sender: Sender, resync: int) -> list[Action]:
        """A primary has sent everything."""
        if self.step is not Step.COPYING or resync != self._owner.state.start:
            return []
        self._copied.add(sender.node)
        return self._all_copied()

    def own_copied(self, resync: int) -> list[Action]:
        """Volumes mode: what the hop-2 bitmaps say is copied from here."""
        if self.step is not Step.COPYING or resync != self._owner.state.start:
            return []
        self._own_copied = True
        return self._all_copied()

    def _all_copied(self) -> list[Action]:
        owner, state = self._owner, self._owner.state
        # An excluded one too: at an END without its volumes the secondaries would be at no number, and bits would go.
        away = set(owner.senders.by_node) - self._copied
        if away or (self.copies_here and not self._own_copied):
            return []
        self.machine.go("copied")
        actions: list[Action] = [
            owner.control(RecordKind.END, stream, state.start, 0) for stream in owner.streams.by_node.values()
        ]
        state.end = owner.numbered
        return [Event(f"resync {state.start}: all is copied, ends at {state.end}"), *actions]

    def progressed(self, now_s: float) -> list[Action]:
        """The valid counter rose, or something else did."""
        owner, state = self._owner, self._owner.state
        if self.step is Step.DRAINING and owner.streams.limit is not None:
            limit = owner.streams.limit.number
            if owner.streams.drained(limit):
                self.machine.go("drained")
                state.pair, state.limited, state.at = int(Pair.PSUS), True, limit
                self.marked = limit
                self.reason = "split"
                return [Event(f"PSUS: split at {limit}"), owner.save(self._tell_split)]
        if state.end and owner.streams.validated >= state.end and self.step in (Step.ENDING, Step.IDLE):
            self.machine.go("ended")
            return self._close()
        return []

    def _close(self) -> list[Action]:
        """END is validated everywhere: the bits may go, after the state says so."""
        owner, state = self._owner, self._owner.state
        resync = state.resynced = state.start
        keep = state.limited or state.pair == Pair.SMPL  # suspended again: new bits are among them
        state.start = state.end = 0
        state.initial = state.verify = False
        if state.filling:
            state.filled, state.filling = True, False
        self._starts, owner.streams.skips = [], {}
        if state.pair == Pair.COPY:
            state.pair, state.at, self.reason = int(Pair.PAIR), 0, ""
        elif not state.numbering:
            state.at = owner.numbered

        def closed(now_s: float) -> list[Action]:
            self.machine.go("closed")
            message = encode(Message.RESYNCED, state.epoch.number, id=resync)
            # A split that was asked for meanwhile was not told: there was no number yet to split at.
            split = [owner.save(self._tell_split)] if state.limited else []
            return [*(Send(s.link, [message]) for s in owner.senders.by_node.values() if s.live), *split]

        def stored(now_s: float) -> list[Action]:
            if keep:
                return closed(now_s)
            for bitmap in self.bitmaps.values():
                bitmap.clear()
            return [self._save_bits(closed)]

        return [Event(f"{Pair(state.pair).name}: resync {resync} has ended"), owner.save(stored)]

    # links and time

    def primary_greeted(self, sender: Sender) -> list[Action]:
        """A primary was welcomed; one that is suspended has gone on alone, and declares it (rule 16)."""
        if sender.suspended:
            self._copied.discard(sender.node)
            if self._owner.state.numbering and self.step not in (Step.STARTING, Step.COPYING):
                return self.stop_numbering(f"{self._owner.called(sender.node)} has gone on alone")
        return self.tell_resync(sender)

    def secondary_joined(self, stream: Stream) -> list[Action]:
        """A secondary has come back: one that missed its SPLIT hears it again."""
        state = self._owner.state
        if state.limited and self.step is Step.IDLE and stream.ready:
            # Stored (again) first: else a crash leaves a secondary that is split, and an intermediate in PAIR.
            return [self._owner.save(self._tell_split)]
        return []

    def room(self, free_bytes: int, ring_bytes: int) -> None:
        """The ring has this much free, less the reserve."""
        self._free_bytes, self._ring_bytes = free_bytes, ring_bytes
        self.high_water = free_bytes * 4 < ring_bytes

    def tick(self, now_s: float) -> list[Action]:
        """Time passes."""
        owner, state = self._owner, self._owner.state
        if owner.phase is not Phase.SERVING:
            self._full_since_s = None
            if self.step in BEFORE_START or self.step is Step.DRAINING:
                return self._fall_back(f"the intermediate is {owner.phase.value}")
            return []
        actions = self.progressed(now_s)
        if self._copy_again:
            self._copy_again = False
            actions += self._copy_own()
        if self.step is Step.DRAINING and not owner.streams.all_ready:
            actions += self._suspend_hop2(Pair.PSUS, "split; a secondary went away")
        elif self.step in BEFORE_START and self.missing():
            actions += self._fall_back(self.missing())
        elif self.step is Step.STARTING:
            actions += self._stored(now_s)
        elif self.step is Step.IDLE and state.auto and now_s >= self._retry_s and not self.missing():
            self._retry_s = now_s + RETRY_S
            actions += self._begin(now_s)
        return actions + self._watch_ring(now_s)

    def _fall_back(self, why: str) -> list[Action]:
        self.machine.go("fall back")
        if not self._owner.state.limited:
            self._owner.streams.limit = None
        return [Event(f"given up: {why}")]

    def _watch_ring(self, now_s: float) -> list[Action]:
        """A full ring that waits for the secondaries: suspend hop 2, or go on giving up what is in the bitmaps."""
        owner, state = self._owner, self._owner.state
        if (state.limited or state.start) and not self._marking and owner.durable_number > self.marked:
            waited = state.start > 0 and now_s - self._marked_s >= MARK_S
            if self.high_water or owner.senders.starving or waited:
                self._marked_s = now_s
                if state.pair == Pair.SMPL:
                    self.marked = owner.durable_number
                    return []
                return [self._mark(self.marked, owner.durable_number, lambda _: [])]
        if state.limited:
            return []
        by_checkpoint = owner.senders.releasable
        held_by_hop2 = owner.streams.validated < (owner.durable_number if by_checkpoint is None else by_checkpoint)
        full = owner.senders.starving or self._free_bytes * 16 <= self._ring_bytes
        if not owner.policy.suspend_when_full or not full or not held_by_hop2:
            self._full_since_s = None
            return []
        if self._full_since_s is None:
            self._full_since_s = now_s
        if now_s - self._full_since_s < FULL_S or self.step in BEFORE_START or self.step is Step.STARTING:
            return []
        self._full_since_s = None
        return self._suspend_hop2(Pair.PFUS, "the journal is full")
