"""Hop 2 as the intermediate sees it: one sparse stream per secondary, and the rounds of prepare and validate over all.

Each record names the number before it in its stream, so a stream is whole up to any number or says so. PREPARE(n) goes
to every secondary behind the last of its records that is ≤ n; when all have answered PREPARED, n is validated
(PROTOCOL, rules 13 and 14; claims 5 and 21).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Message, encode
from blockrepl.replication.actions import Action, Send, Transmit
from blockrepl.replication.policy import HELPING_BYTES, MAX_OPEN_ROUNDS


@dataclass(slots=True)
class Stream:
    """One secondary's stream.

    Invariants: sent <= durable <= last (numbers of this stream's records); prepared never goes back within an epoch.
    """

    node: int
    last: int = 0  # its last numbered record
    durable: int = 0  # its last durable record
    sent: int = 0  # its last record handed to the link
    prepared: int = 0  # it answered PREPARED up to here (numbers of the group)
    validated: int = 0  # VALIDATE sent to it
    applied: int = 0
    link: int = 0
    ready: bool = False  # greeted, and in our epoch
    credit: int = 0
    credit_used: int = 0
    waiting_bytes: int = 0  # durable and not handed to the link yet
    total_writes: int = 0  # numbered since the start, for the lag
    total_bytes: int = 0
    config: int = 0  # digest of the newest configuration that it has files for
    busy: bool = False  # a Transmit is being performed
    asked: deque[int] = field(default_factory=deque)  # rounds whose PREPARE went out on this link
    asked_through: int = 0


@dataclass(slots=True)
class Round:
    """PREPARE(number): for each stream, the last of its records that is ≤ number."""

    number: int
    lasts: dict[int, int]
    again: bool = True  # who comes back gets what it lacks up to there; False: the journal may not have it any more


class Streams:
    """All streams of a group, and the valid counter.

    Invariant: validated <= min(prepared) and validated <= durable of the group.
    """

    def __init__(self, nodes: Iterable[int], epoch: int, round_s: float, round_bytes: int) -> None:
        self.by_node = {node: Stream(node) for node in nodes}
        self.by_link: dict[int, Stream] = {}
        self.epoch = epoch
        self.validated = 0
        self.confirmed = 0  # the highest valid counter of this process: nobody can hold less than it
        self._round_s = round_s
        self._round_bytes = round_bytes
        self._rounds: deque[Round] = deque()
        self._last_round_s = float("-inf")
        self._bytes_since_round = 0
        self.rounds_number = 0  # the number of the newest round
        self.limit: Round | None = None  # hop 2 is suspended, or about to be: nothing above it is sent or prepared
        self.floor = 0  # what lies below is validated only together with it
        self.skips: dict[int, int] = {}  # secondary → the number before its START: what lies below is never sent

    @property
    def valid_counter(self) -> int:
        """The highest number that may be validated next: every secondary holds all up to it (claim 5)."""
        return min((stream.prepared for stream in self.by_node.values()), default=0)

    @property
    def sent(self) -> int:
        """The highest number sent to any secondary."""
        return max((stream.sent for stream in self.by_node.values()), default=0)

    @property
    def all_ready(self) -> bool:
        """Every secondary is here."""
        return all(stream.ready for stream in self.by_node.values())

    # links

    def attach(self, node: int, link: int, credit: int, held: int, prepared: int) -> None:
        """A secondary greeted in our epoch; what it holds is taken from what it says. Raises ProtocolError."""
        stream = self.by_node[node]
        known = max(stream.prepared, self.confirmed)
        if max(prepared, held) < known:
            raise ProtocolError(f"secondary {node} has prepared {prepared} only, but had said {known}: it lost data")
        stream.link, stream.ready = link, True
        stream.credit, stream.credit_used = credit, 0
        stream.sent, stream.prepared, stream.validated = max(held, self.skips.get(node, 0)), prepared, 0
        stream.busy = False
        stream.asked.clear()
        stream.asked_through = prepared
        self.by_link[link] = stream
        if self.limit is not None and not self.limit.again:
            self.limit.lasts[node] = min(self.limit.lasts[node], stream.sent)

    def detach(self, link: int) -> None:
        """The link is gone."""
        stream = self.by_link.pop(link, None)
        if stream is not None:
            stream.link, stream.ready, stream.busy, stream.config = 0, False, False, 0
            stream.asked.clear()

    def stop(self) -> None:
        """Hop 2 is suspended where it is: nothing more is sent, or asked about.

        A round that is open may name records that a secondary, when it returns, does not get any more. What is on its
        way may arrive. Who comes back without it gets a resync, or all of it once the suspension is lifted: what lies
        between may be bits by now, and the next record that the journal holds would be a gap.
        """
        self._rounds.clear()
        self.rounds_number = self.validated  # once it is lifted, who was away is asked about the rest as well
        self.limit = Round(self.validated, {node: s.sent for node, s in self.by_node.items()}, again=False)

    def jump(self, starts: list[tuple[int, int]], numbered: int) -> None:
        """Each (secondary, number): nothing of its stream up to there is sent any more; its START comes next.

        No round may name records which now never come: the first one is that of the STARTs, above ``numbered``.
        """
        self.skips = dict(starts)
        self._rounds.clear()
        self.rounds_number = max(self.rounds_number, numbered)
        for stream in self.by_node.values():
            stream.sent = max(stream.sent, self.skips[stream.node])

    # sending

    def pump(self, stream: Stream) -> list[Action]:
        """Ask for the next helping of a stream, when it may be sent."""
        through = stream.durable if self.limit is None else min(stream.durable, self.limit.lasts[stream.node])
        if not stream.ready or stream.busy or stream.sent >= through:
            return []
        room = stream.credit - stream.credit_used
        if room <= 0:
            return []
        stream.busy = True
        return [Transmit(stream.node, stream.link, stream.sent, through, room)]

    def pump_all(self) -> list[Action]:
        """Ask for the next helping of every stream."""
        return [action for stream in self.by_node.values() for action in self.pump(stream)]

    def transmitted(self, node: int, link: int, last: int, frame_bytes: int) -> list[Action]:
        """A helping was handed to the link: records up to ``last`` (unchanged when no record fits the credit)."""
        stream = self.by_node[node]
        if stream.link != link:
            return []
        stream.busy = False
        progress = last > stream.sent
        if last >= stream.durable:
            stream.waiting_bytes = 0
        stream.sent = max(stream.sent, last)
        stream.credit_used += frame_bytes
        actions = self._ask(stream)
        return actions + self.pump(stream) if progress else actions

    def durable(self, node: int, number: int, size_bytes: int) -> None:
        """A record of this stream became durable."""
        stream = self.by_node[node]
        stream.durable = number
        stream.waiting_bytes += size_bytes
        self._bytes_since_round += size_bytes

    def feed(self, node: int) -> list[Action]:
        """Records of a stream became durable: send them, if they are a helping; else they go with the next round.

        A takeover without the intermediate lands on a round, so a record that travels before its round gains nothing,
        and each journey wakes two processes.
        """
        stream = self.by_node[node]
        return self.pump(stream) if stream.waiting_bytes >= HELPING_BYTES else []

    # rounds

    def tick(self, durable: int, now_s: float) -> list[Action]:
        """Open a round when it is due: at most one in ``round_s`` or ``round_bytes``."""
        limit = self.limit
        if limit is not None and durable >= limit.number:
            durable = limit.number
        if durable <= self.rounds_number or len(self._rounds) >= MAX_OPEN_ROUNDS:
            return []
        if now_s - self._last_round_s < self._round_s and self._bytes_since_round < self._round_bytes:
            return []
        self._last_round_s = now_s
        self._bytes_since_round = 0
        self.rounds_number = durable
        at_limit = limit is not None and durable == limit.number
        lasts = limit.lasts if limit is not None and at_limit else {n: s.durable for n, s in self.by_node.items()}
        self._rounds.append(Round(durable, lasts))
        actions = self._tell_validated()
        for stream in self.by_node.values():
            actions += self.pump(stream) + self._ask(stream)
        return actions

    def due_s(self, durable: int) -> float:
        """When the next round is due; infinity when nothing waits for one."""
        if self.limit is not None:
            durable = min(durable, self.limit.number)
        if durable <= self.rounds_number or len(self._rounds) >= MAX_OPEN_ROUNDS:
            return float("inf")
        return self._last_round_s + self._round_s

    def _ask(self, stream: Stream) -> list[Action]:
        """PREPARE for every round whose records this stream has been sent."""
        if not stream.ready:
            return []
        actions: list[Action] = []
        for turn in self._rounds:
            if turn.number <= stream.asked_through:
                continue
            stream_last = turn.lasts[stream.node]
            if stream.sent < stream_last:
                break
            stream.asked_through = turn.number
            stream.asked.append(turn.number)
            message = encode(Message.PREPARE, self.epoch, number=turn.number, stream_last=stream_last)
            actions.append(Send(stream.link, [message]))
        return actions

    def prepared(self, link: int, number: int, applied: int, credit: int, durable: int) -> list[Action]:
        """A secondary holds everything of its own up to ``number``, durably, with the note of it.

        While more is ``durable`` than the last round asked about, VALIDATE goes out with the next PREPARE: half the
        wake-ups of every secondary.
        """
        stream = self.by_link[link]
        if number > stream.asked_through:
            raise ProtocolError(f"PREPARED {number} was not asked for")
        stream.prepared = max(stream.prepared, number)
        stream.applied = max(stream.applied, applied)
        stream.credit = max(stream.credit, credit)
        while stream.asked and stream.asked[0] <= number:
            stream.asked.popleft()
        if self.due_s(durable) == float("inf"):
            return self.validate() + self.pump(stream)
        self._raise_validated()
        return self.pump(stream)

    def resume(self, stream: Stream) -> list[Action]:
        """A secondary has come (back): what it is to hear and to get."""
        return self.validate() + self._ask(stream) + self.pump(stream)

    def validate(self) -> list[Action]:
        """Raise the validated number to the valid counter, and tell every secondary that does not know it."""
        self._raise_validated()
        return self._tell_validated()

    def _raise_validated(self) -> None:
        counter = self.valid_counter
        self.confirmed = max(self.confirmed, counter)
        if counter < self.floor:
            return
        self.validated = max(self.validated, counter)
        while self._rounds and self._rounds[0].number <= counter:
            self._rounds.popleft()

    def _tell_validated(self) -> list[Action]:
        actions: list[Action] = []
        for stream in self.by_node.values():
            if stream.ready and stream.validated < self.validated <= stream.prepared:
                stream.validated = self.validated
                actions.append(Send(stream.link, [encode(Message.VALIDATE, self.epoch, number=self.validated)]))
        return actions

    # epochs

    def restart(self, epoch: int) -> None:
        """An epoch opens: sent and prepared are taken anew from what each secondary reports (rule 23)."""
        self.epoch = epoch
        self._rounds.clear()
        self.rounds_number = 0  # who rolled forward in a takeover may know of a higher one than another has noted
        for stream in self.by_node.values():
            stream.sent = stream.prepared = stream.asked_through = 0
            stream.asked.clear()

    def drained(self, number: int) -> bool:
        """Everything up to ``number`` is validated, and every secondary was told."""
        return self.validated >= number and all(s.validated >= number for s in self.by_node.values())
