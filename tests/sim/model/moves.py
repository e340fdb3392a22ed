"""Everything that can happen next in a state of the group, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from blockrepl.replication.opening import Phase
from tests.sim.model.links import END, INCIDENT, INDEX, ORDER, PAIRS, S1, I, Links, O, first_of
from tests.sim.model.machines import NODES, VOLUMES
from tests.sim.model.rules import Facts
from tests.sim.model.scope import Scope
from tests.sim.model.steps import Event, Machines
from tests.sim.world import Violation

State = tuple[int, ...]
"""Numbers of the six machines in `ORDER`, of the seven pairs' links, then the fields below."""
PAIR = 6
WRITES, CRASHES, TAKEOVERS, STALE, IMPATIENT = range(13, 18)  # WRITES: bit k is set while write k is not submitted
NODE = {INDEX[name]: node for name, node in NODES.items()}
Words = tuple[Any, ...]
Move = tuple[Words, State]
"""What happened: (kind, machine, …), to be put into words when somebody asks; and the state after it."""


class Moves:
    """What can happen in a scope."""

    def __init__(self, machines: Machines, links: Links) -> None:
        self.machines = machines
        self.links = links
        self.scope = Scope("")

    def fact(self, state: State, who: int) -> Facts:
        """Of a machine."""
        return self.machines.facts[state[who]]

    def apply(self, state: State, who: int, event: Event, pair: int = -1, left: int = 0) -> State:
        """An event at a machine, and what it sends; ``left``: what the pair's links are when it was read."""
        step = self.machines.step(state[who], event)
        if step.error:
            raise Violation(step.error)
        new = list(state)
        new[who] = step.after
        if pair >= 0:
            new[PAIR + pair] = left
        for each in step.outputs:
            at = PAIR + each.pair
            if each.message != END:
                new[at] = self.links.put(new[at], each.link, each.message, dialler=each.dialler)
            if each.last:
                new[at] = self.links.close(new[at], each.link, dialler=each.dialler)
        return self._renumbered(new, who)

    def _renumbered(self, new: list[int], who: int) -> State:
        """Once an older connection is forgotten, the one that is left takes its number."""
        for pair in INCIDENT[who]:
            link = self.links.odd[new[PAIR + pair]]
            if link:
                first = first_of(link)
                ends = PAIRS[pair]
                if not any(first in self.machines.facts[new[end]].links for end in ends):
                    for end in ends:
                        new[end] = self.machines.renamed(new[end], link, first)
                    new[PAIR + pair] = self.links.renamed(new[PAIR + pair])
        return tuple(new)

    # by machine

    def reads(self, state: State, who: int, pairs: tuple[int, ...] | None = None) -> Iterator[Move]:
        """Messages, and ends of links."""
        for pair in INCIDENT[who] if pairs is None else pairs:
            dialler, listener = PAIRS[pair]
            for link, first, left in self.links.arrivals(state[PAIR + pair], dialler=dialler == who):
                sender = listener if dialler == who else dialler
                event = ("lost", link) if first == END else ("message", link, first)
                yield ("reads", who, sender, first), self.apply(state, who, event, pair, left)

    def local(self, state: State, who: int) -> Iterator[Move]:
        """What needs nobody else."""
        for event in self.fact(state, who).local:
            if event[0] == "backoff" or (event[0] == "tick" and who != I and not self.scope.housekeeping):
                continue
            yield (event[0], who), self.apply(state, who, event)

    def dial(self, state: State, pair: int) -> Iterator[Move]:
        """A new connection."""
        dialler, listener = PAIRS[pair]
        number = state[PAIR + pair]
        mine = self.fact(state, dialler)
        if not mine.alive or (dialler == O and (not mine.open or NODE[listener] in mine.dialled)):
            return
        if self._in_vain(state, dialler, listener):
            return
        found = self.links.dial(number, pair, mine.links | self.fact(state, listener).links)
        if found is None:
            return
        if self.fact(state, listener).alive:
            link, after = found
            yield (
                ("dials", dialler, listener),
                self.apply(state, dialler, ("dialled", link, ORDER[listener]), pair, after),
            )
        elif dialler == O:
            yield ("cannot reach", O, listener), self.apply(state, O, ("unreachable", ORDER[listener]))

    def _in_vain(self, state: State, dialler: int, listener: int) -> bool:
        """It would be refused, and that for ever."""
        if dialler == O or self.fact(state, I).phase is not Phase.FENCED:
            return False
        return self.fact(state, listener).active if dialler == I else self.fact(state, dialler).fenced

    def dials(self, state: State, who: int) -> Iterator[Move]:
        """All that one machine can dial."""
        for pair in INCIDENT[who]:
            if PAIRS[pair][0] == who:
                yield from self.dial(state, pair)

    def hosts(self, state: State, who: int) -> Iterator[Move]:
        """Writes to its volumes."""
        if state[WRITES] and self.fact(state, who).serving:
            for bit, (write, volume) in enumerate(self.scope.writes):
                if state[WRITES] >> bit & 1 and VOLUMES[volume][0] == ORDER[who]:
                    after = list(self.apply(state, who, ("submit", write, volume)))
                    after[WRITES] &= ~(1 << bit)
                    yield ("writes", who, write, volume), tuple(after)

    def boot(self, state: State, who: int) -> Iterator[Move]:
        """It starts again."""
        if who != O and not self.fact(state, who).alive:
            yield ("starts", who), self.apply(state, who, ("boot",))

    def begin(self, state: State) -> Iterator[Move]:
        """An operator types `takeover`."""
        if state[TAKEOVERS] and self.fact(state, S1).alive:
            if self.scope.crashes and S1 in self.scope.victims and not self.scope.early and state[CRASHES] \
                    and self.scope.reduced:  # fmt: skip
                return  # this part's takeover begins after the crash
            after = list(self.apply(state, O, ("boot",)))
            after[TAKEOVERS] -= 1
            yield ("begins", O), tuple(after)

    def of(self, state: State, who: int) -> Iterator[Move]:
        """All that one machine can do, faults aside."""
        yield from self.reads(state, who)
        yield from self.local(state, who)
        yield from self.dials(state, who)
        yield from self.boot(state, who)
        if who < I:
            yield from self.hosts(state, who)

    # all

    def eager(self, state: State) -> Iterator[Move]:
        """What can happen at once, faults aside."""
        for who in range(6):
            yield from self.of(state, who)
        yield from self.begin(state)

    def faults(self, state: State) -> Iterator[Move]:
        """What may happen, or may not."""
        if state[CRASHES]:
            for who in self.scope.victims:
                yield from self.crash(state, who)
        if state[STALE]:
            for pair, end in self.scope.cuts:
                yield from self.cut(state, pair, end)
        if state[IMPATIENT] and ("backoff",) in self.fact(state, I).local and self.fact(state, O).open:
            after = list(self.apply(state, I, ("backoff",)))
            after[IMPATIENT] -= 1
            yield ("backoff", I), tuple(after)

    def crash(self, state: State, who: int) -> Iterator[Move]:
        """Its links end behind what it sent, any rest of which may be lost; its disk keeps what a crash can leave."""
        events = self.fact(state, who).crashes
        if not events:
            return
        left = list(state)
        left[CRASHES] -= 1
        dying = (S1, O) if who == S1 else (who,)
        for machine in dying:
            for pair in INCIDENT[machine]:
                if machine != O or self.fact(state, O).alive:
                    left[PAIR + pair] = self.links.crash(left[PAIR + pair], dialler=PAIRS[pair][0] == machine)
        for event in events:
            after = self.apply(tuple(left), who, event)
            if who == S1 and self.fact(after, O).alive:
                after = self.apply(after, O, ("crash",))
            yield (*event[:1], who, *event[1:]), after

    def cut(self, state: State, pair: int, end: int) -> Iterator[Move]:
        """A connection breaks, and one end sees it."""
        dialler = PAIRS[pair][0] == end
        for each in self.links.of[state[PAIR + pair]]:
            if each.dialler_open and each.listener_open:
                left = list(state)
                left[STALE] -= 1
                after = self.links.close(state[PAIR + pair], each.link, dialler=dialler)
                yield ("loses", end, each.link), self.apply(tuple(left), end, ("lost", each.link), pair, after)

    def late(self, state: State) -> Iterator[Move]:
        """What only time-outs bring: when nothing else can happen."""
        if ("backoff",) in self.fact(state, I).local:
            yield ("backoff", I), self.apply(state, I, ("backoff",))
        if self.fact(state, O).open:
            yield ("deadline", O), self.apply(state, O, ("deadline",))
        active = [self.fact(state, who).active for who in (S1, S1 + 1)]
        idle = self.fact(state, S1).alive and not self.fact(state, O).open
        if any(active) and not all(active) and idle:
            yield ("begins again", O), self.apply(state, O, ("boot",))
