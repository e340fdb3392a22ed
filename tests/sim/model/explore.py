"""The search: every interleaving of a scope, depth first, each state of the group once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from blockrepl.errors import ProtocolError
from blockrepl.replication.opening import Phase
from tests.sim.model.clone import Copier
from tests.sim.model.machines import (
    CONSTANTS,
    VOLUMES,
    IntermediateMachine,
    Machine,
    OpenerMachine,
    PrimaryMachine,
    SecondaryMachine,
)
from tests.sim.model.rules import Facts, check, check_end, facts_of
from tests.sim.model.scope import Scope
from tests.sim.words import sentences
from tests.sim.world import Violation

ORDER = ("p1", "p2", "i", "s1", "s2", "o")
INDEX = {name: index for index, name in enumerate(ORDER)}
PAIRS = (("p1", "i"), ("p2", "i"), ("i", "s1"), ("i", "s2"), ("o", "i"), ("o", "s1"), ("o", "s2"))
LINKS = 8  # link = pair * LINKS + one of 1 to 4, in turn: who is refused dials for ever, and comes to the same states
ROUND = 4
END = 0  # an orderly end, behind what was sent
OPENER = 5

Event = tuple[Any, ...]


class Connection(NamedTuple):
    """Both ends, and what is under way: message numbers."""

    link: int
    dialler_open: bool
    listener_open: bool
    to_listener: tuple[int, ...]
    to_dialler: tuple[int, ...]


class State(NamedTuple):
    """The whole group; machines and messages are numbers."""

    machines: tuple[int, ...]
    connections: tuple[Connection, ...]
    dials: tuple[int, ...]  # the number of the next connection, by pair; from 1, since 0 is no link
    writes: tuple[int, ...]  # ids not submitted yet
    budgets: tuple[int, int, int, int]  # crashes, takeovers, stale, impatient


Words = tuple[Any, ...]
Move = tuple[Words, State]
"""What happened, to be put into words when somebody asks; and the state after it."""


@dataclass
class Report:
    """What a search did."""

    scope: str
    states: int = 0
    transitions: int = 0
    ends: int = 0  # states with nothing left to happen
    deepest: int = 0
    machine_states: int = 0
    exhausted: bool = False
    took_s: float = 0.0

    def __str__(self) -> str:
        verdict = "exhausted" if self.exhausted else "NOT exhausted"
        return (
            f"{self.scope}: {self.states:,} states, {self.transitions:,} transitions, {self.ends:,} ends, depth "
            f"{self.deepest}, {self.machine_states:,} states of single machines, {self.took_s:.1f} s: {verdict}"
        )


@dataclass
class Machines:
    """States of single machines by number, and what each does upon each event: the real code runs once for both."""

    copier: Copier = field(default_factory=lambda: Copier(CONSTANTS))
    blobs: list[bytes] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    _numbers: dict[bytes, int] = field(default_factory=dict)
    _steps: dict[tuple[int, Event], tuple[int, tuple[Event, ...]]] = field(default_factory=dict)

    def number(self, machine: Machine) -> int:
        """Its number; equal ones have the same."""
        key = machine.name.encode() + self.copier.key(machine)
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.blobs)
            self.blobs.append(self.copier.dump(machine))
            self.facts.append(facts_of(machine))
        return found

    def step(self, number: int, event: Event) -> tuple[int, tuple[Event, ...]]:
        """What comes of an event: the new number, and the outputs. Raises what the role raises."""
        key = number, event
        found = self._steps.get(key)
        if found is None:
            machine: Machine = self.copier.load(self.blobs[number])
            out = machine.step(event)
            found = self._steps[key] = self.number(machine), tuple(out)
        return found


class Explorer:
    """Searches scopes; what machines do is remembered from one to the next."""

    def __init__(self) -> None:
        self.machines = Machines()
        self._messages: dict[bytes, int] = {}
        self._bytes: list[bytes] = [b""]  # number 0 is END

    # single steps

    def _message(self, data: bytes) -> int:
        found = self._messages.get(data)
        if found is None:
            found = self._messages[data] = len(self._bytes)
            self._bytes.append(data)
        return found

    def apply(self, state: State, name: str, event: Event, connections: tuple[Connection, ...] | None = None) -> State:
        """An event at a machine, and what it sends."""
        index = INDEX[name]
        before = state.machines[index]
        after, outputs = self.machines.step(before, event)
        machines = state.machines if after == before else (
            *state.machines[:index], after, *state.machines[index + 1 :])  # fmt: skip
        found = state.connections if connections is None else connections
        for output in outputs:
            if output[0] == "send":
                found = self._put(found, name, output[1], (self._message(output[2]),))
            elif output[0] == "close":
                words = (self._message(output[2]),) if output[2] else ()
                found = self._put(found, name, output[1], (*words, END))
                found = shut(found, name, output[1])
        return state._replace(machines=machines, connections=found)

    @staticmethod
    def _put(
        connections: tuple[Connection, ...], name: str, link: int, messages: tuple[int, ...]
    ) -> tuple[Connection, ...]:
        for at, each in enumerate(connections):
            if each.link == link:
                dialler = PAIRS[link // LINKS][0] == name
                if not (each.dialler_open if dialler else each.listener_open):
                    return connections
                if dialler and each.listener_open:
                    each = each._replace(to_listener=each.to_listener + messages)
                elif not dialler and each.dialler_open:
                    each = each._replace(to_dialler=each.to_dialler + messages)
                return (*connections[:at], each, *connections[at + 1 :])
        return connections

    # everything that can happen

    def successors(self, state: State, scope: Scope) -> Iterator[Move]:
        """What can happen next, and what becomes of it. What only time-outs bring comes when nothing else can."""
        count = 0
        for each in self._alone(state, scope) or self._eager(state, scope):
            if each[1] != state:
                count += 1
                yield each
        if not count:
            for each in self._late(state):
                if each[1] != state:
                    yield each

    def _alone(self, state: State, scope: Scope) -> list[Move]:
        """Moves of one machine that commute with all that others can do before it moves: no others need be tried here.

        A primary hears from the intermediate only, on one link that it has dialled itself. So while something waits
        there, or while it has no link, nothing that others do adds to what it can do next or takes from it, once nobody
        can crash and no link can break any more. What it shows (hosts told, P-VOLs) never goes back, so whatever it
        breaks is still broken later.
        """
        crashes, _, stale, _ = state.budgets
        if crashes or stale or not scope.reduced:
            return []
        facts = [self.machines.facts[number] for number in state.machines]
        if not facts[INDEX["i"]].alive:
            return []
        for pair, name in enumerate(("p1", "p2")):
            mine = [each for each in state.connections if each.link // LINKS == pair and each.dialler_open]
            if not facts[INDEX[name]].alive or (mine and not mine[0].to_dialler):
                continue
            found = [*self._local(state, facts, scope, (name,)), *self._dials(state, facts, (pair,)),
                     *self._hosts(state, facts, scope, (name,))]  # fmt: skip
            if mine:
                at = state.connections.index(mine[0])
                left = mine[0]._replace(to_dialler=mine[0].to_dialler[1:])
                found.append(self._deliver(state, at, left, "i", name, mine[0].to_dialler[0]))
            found = [each for each in found if each[1] != state]
            if found:
                return found
        return []

    def _eager(self, state: State, scope: Scope) -> Iterator[Move]:
        facts = [self.machines.facts[number] for number in state.machines]
        yield from self._local(state, facts, scope)
        yield from self._deliveries(state)
        yield from self._dials(state, facts)
        yield from self._hosts(state, facts, scope)
        yield from self._faults(state, facts, scope)

    def _local(self, state: State, facts: list[Facts], scope: Scope, names: tuple[str, ...] = ORDER) -> Iterator[Move]:
        for name in names:
            fact = facts[INDEX[name]]
            for event in fact.local:
                if event == ("backoff",):
                    continue
                if name != "i" and event == ("tick",) and not scope.housekeeping:
                    continue
                yield (name, event[0]), self.apply(state, name, event)
            if fact.bootable:
                yield (name, "starts"), self.apply(state, name, ("boot",))

    def _deliveries(self, state: State) -> Iterator[Move]:
        for at, each in enumerate(state.connections):
            dialler, listener = PAIRS[each.link // LINKS]
            if each.listener_open and each.to_listener:
                first = each.to_listener[0]
                left = each._replace(to_listener=each.to_listener[1:])
                yield self._deliver(state, at, left, dialler, listener, first)
            if each.dialler_open and each.to_dialler:
                first = each.to_dialler[0]
                left = each._replace(to_dialler=each.to_dialler[1:])
                yield self._deliver(state, at, left, listener, dialler, first)

    def _deliver(self, state: State, at: int, left: Connection, sender: str, name: str, first: int) -> Move:
        connections = (*state.connections[:at], left, *state.connections[at + 1 :])
        if first == END:
            connections = shut(connections, name, left.link)
            return (name, "sees the end of its link to", sender), self.apply(
                state, name, ("lost", left.link), connections
            )
        data = self._bytes[first]
        try:
            after = self.apply(state, name, ("message", left.link, data), connections)
        except ProtocolError as error:
            after = self.apply(state, name, ("lost", left.link),
                               shut(self._put(connections, name, left.link, (END,)), name, left.link))  # fmt: skip
            return (name, "breaks off its link to", sender, error), after
        return (name, "reads", sender, first), after

    def _dials(
        self, state: State, facts: list[Facts], pairs: tuple[int, ...] = tuple(range(len(PAIRS)))
    ) -> Iterator[Move]:
        for pair in pairs:
            dialler, listener = PAIRS[pair]
            fact = facts[INDEX[dialler]]
            if facts[INDEX["i"]].phase is Phase.FENCED and dialler != "o":
                continue  # it is refused, and would be for ever
            if not fact.alive or (dialler == "o" and (state.dials[pair] > 1 or not fact.open)):
                continue
            link = pair * LINKS + state.dials[pair]
            dials = (*state.dials[:pair], state.dials[pair] % ROUND + 1, *state.dials[pair + 1 :])
            if any(each.link // LINKS == pair and (each.dialler_open or each.link == link)
                   for each in state.connections):  # fmt: skip
                continue
            if not facts[INDEX[listener]].alive:
                if dialler == "o":
                    after = self.apply(state, "o", ("unreachable", listener))
                    yield ("o", "cannot reach", listener), after._replace(dials=dials)
                continue
            connections = tuple(sorted((*state.connections, Connection(link, True, True, (), ()))))
            after = self.apply(state, dialler, ("dialled", link, listener), connections)
            yield (dialler, "connects to", listener), after._replace(dials=dials)

    def _hosts(self, state: State, facts: list[Facts], scope: Scope, names: tuple[str, ...] = ORDER) -> Iterator[Move]:
        for write, volume in scope.writes:
            owner = VOLUMES[volume][0]
            if owner in names and write in state.writes and facts[INDEX[owner]].serving:
                after = self.apply(state, owner, ("submit", write, volume))
                left = tuple(each for each in state.writes if each != write)
                yield ("a host writes", write, "to volume", volume), after._replace(writes=left)

    def _faults(self, state: State, facts: list[Facts], scope: Scope) -> Iterator[Move]:
        crashes, takeovers, stale, impatient = state.budgets
        if crashes:
            left = state._replace(budgets=(crashes - 1, takeovers, stale, impatient))
            for name in scope.victims:
                for event in facts[INDEX[name]].crashes:
                    yield from self._crash(left, name, event)
        if takeovers and facts[INDEX["s1"]].alive:
            after = self.apply(state, "o", ("boot",))
            yield ("an operator takes over at s1",), after._replace(budgets=(crashes, takeovers - 1, stale, impatient))
        if stale:
            left = state._replace(budgets=(crashes, takeovers, stale - 1, impatient))
            for each in state.connections:
                if each.dialler_open and each.listener_open:
                    for name in PAIRS[each.link // LINKS]:
                        cut = shut(self._put(state.connections, name, each.link, (END,)), name, each.link)
                        yield (name, "loses link", each.link), self.apply(left, name, ("lost", each.link), cut)
        if impatient and ("backoff",) in facts[INDEX["i"]].local and facts[OPENER].open:
            after = self.apply(state, "i", ("backoff",))
            yield ("i has waited long enough",), after._replace(budgets=(crashes, takeovers, stale, impatient - 1))

    def _crash(self, state: State, name: str, event: Event) -> Iterator[Move]:
        """Its links end, behind what it sent or without it."""
        names = [name, "o"] if name == "s1" else [name]
        kept = dropped = state.connections
        for each in state.connections:
            for end in set(PAIRS[each.link // LINKS]) & set(names):
                kept = shut(self._put(kept, end, each.link, (END,)), end, each.link)
                silent = empty(dropped, end, each.link)
                dropped = shut(self._put(silent, end, each.link, (END,)), end, each.link)
        for how, connections in (("", kept), (", nothing of what it sent arrives", dropped)):
            after = self.apply(state, name, event, connections)
            if name == "s1" and self.machines.facts[state.machines[OPENER]].alive:
                after = self.apply(after, "o", ("crash",))
            yield (name, event, how), after
            if kept == dropped:
                return

    def _late(self, state: State) -> Iterator[Move]:
        facts = [self.machines.facts[number] for number in state.machines]
        if ("backoff",) in facts[INDEX["i"]].local:
            yield ("i has waited long enough",), self.apply(state, "i", ("backoff",))
        if facts[OPENER].open:
            yield ("the takeover's patience ends",), self.apply(state, "o", ("deadline",))
        active = [facts[INDEX[name]].active for name in ("s1", "s2")]
        if any(active) and not all(active) and facts[INDEX["s1"]].alive:
            after = self.apply(state, "o", ("boot",))
            yield ("the operator takes over again",), after._replace(dials=(*state.dials[:4], 1, 1, 1))

    # the search

    def start(self, scope: Scope) -> State:
        """A group that serves, epoch 1, nothing ever written."""
        made: list[Machine] = [
            PrimaryMachine("p1"), PrimaryMachine("p2"), IntermediateMachine("i"), SecondaryMachine("s1"),
            SecondaryMachine("s2"), OpenerMachine("o"),
        ]  # fmt: skip
        state = State(tuple(map(self.machines.number, made)), (), (1,) * len(PAIRS), (), (0, 0, 0, 0))
        quiet = Scope("start", writes=(), housekeeping=True)
        while True:
            following = next(iter(self.successors(state, quiet)), None)
            if following is None:
                break
            state = following[1]
        ids = tuple(write for write, _ in scope.writes)
        return state._replace(writes=ids, budgets=(scope.crashes, scope.takeovers, scope.stale, scope.impatient))

    def explore(self, scope: Scope, *, max_states: int = 0, max_s: float = 0.0, chance: Random | None = None) -> Report:
        """Raises Violation, with the way there. With ``chance`` not in order: a part that is cut off is a sample."""

        def following(state: State) -> Iterator[Move]:
            if chance is None:
                return self.successors(state, scope)
            found = list(self.successors(state, scope))
            chance.shuffle(found)
            return iter(found)

        began_s = time.monotonic()
        report = Report(scope.name)
        state = self.start(scope)
        seen = {hash(state)}
        path: list[tuple[Words, State, Iterator[Move]]] = [((), state, following(state))]
        moved = [False]
        while path:
            try:
                words, state = next(path[-1][2])
            except StopIteration:
                if not moved.pop():
                    report.ends += 1
                    self._judge(lambda: check_end(self._facts(path[-1][1])), path)
                path.pop()
                continue
            except (AssertionError, Exception) as error:
                raise Violation(self._story(path, f"{type(error).__name__}: {error}")) from error
            moved[-1] = True
            report.transitions += 1
            mark = hash(state)
            if mark in seen:
                continue
            seen.add(mark)
            path.append((words, state, following(state)))
            moved.append(False)
            self._judge(lambda: check(self._facts(path[-1][1])), path)
            report.deepest = max(report.deepest, len(path))
            over = max_s and len(seen) % 4096 == 0 and time.monotonic() - began_s > max_s
            if over or (max_states and len(seen) >= max_states):
                break
        report.exhausted = not path
        report.states, report.machine_states = len(seen), len(self.machines.blobs)
        report.took_s = time.monotonic() - began_s
        return report

    def _facts(self, state: State) -> list[Facts]:
        return [self.machines.facts[number] for number in state.machines]

    def _judge(self, rule: Any, path: list[Any]) -> None:
        try:
            rule()
        except Violation as violation:
            raise Violation(self._story(path, str(violation))) from None

    def _story(self, path: list[Any], text: str) -> str:
        return "\n".join([text, "the way there:", *(self._words(words) for words, _, _ in path[1:])])

    def _words(self, words: Words) -> str:
        if words[1:2] == ("reads",):
            name, _, sender, number = words
            return " ".join(sentences(sender, name, self._bytes[number]))
        return " ".join(map(str, words))


def shut(connections: tuple[Connection, ...], name: str, link: int) -> tuple[Connection, ...]:
    """One end is closed: what comes for it is dropped. A connection without ends is gone."""
    found = []
    for each in connections:
        if each.link == link:
            if PAIRS[link // LINKS][0] == name:
                each = each._replace(dialler_open=False, to_dialler=())
            else:
                each = each._replace(listener_open=False, to_listener=())
            if not (each.dialler_open or each.listener_open):
                continue
        found.append(each)
    return tuple(found)


def empty(connections: tuple[Connection, ...], name: str, link: int) -> tuple[Connection, ...]:
    """What one end sent never arrives."""
    if PAIRS[link // LINKS][0] == name:
        return tuple(each._replace(to_listener=()) if each.link == link else each for each in connections)
    return tuple(each._replace(to_dialler=()) if each.link == link else each for each in connections)
