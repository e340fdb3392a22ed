"""The search: every interleaving of a scope, depth first, each state of the group once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.sim.model.links import END, ORDER, Links
from tests.sim.model.machines import (
    IntermediateMachine,
    Machine,
    OpenerMachine,
    PrimaryMachine,
    SecondaryMachine,
)
from tests.sim.model.moves import CRASHES, IMPATIENT, PAIR, STALE, Move, Moves, State, Words
from tests.sim.model.reductions import Reductions
from tests.sim.model.rules import check, check_end, verdict_of
from tests.sim.model.scope import Scope
from tests.sim.model.steps import Machines
from tests.sim.words import sentences
from tests.sim.world import Violation


@dataclass
class Report:
    """What a search did."""

    scope: str
    states: int = 0
    transitions: int = 0
    ends: int = 0  # states with nothing left to happen
    deepest: int = 0
    machine_states: int = 0
    parts: int = 0
    exhausted: bool = False
    took_s: float = 0.0
    verdicts: set[Any] = field(default_factory=set)  # what can be seen of ends, when asked for

    def __str__(self) -> str:
        verdict = "exhausted" if self.exhausted else "NOT exhausted"
        return (
            f"{self.scope}: {self.states:,} states, {self.transitions:,} transitions, {self.ends:,} ends, depth "
            f"{self.deepest}, {self.parts} parts, {self.machine_states:,} states of single machines, "
            f"{self.took_s:.1f} s: {verdict}"
        )


class Explorer:
    """Searches scopes; what machines do is remembered from one to the next."""

    def __init__(self, *, canonical: bool = True) -> None:
        self.machines = Machines(canonical=canonical)
        self.links = Links()
        self.moves = Moves(self.machines, self.links)
        self.reductions = Reductions(self.moves)

    def start(self, scope: Scope) -> State:
        """A group that serves, epoch 1, nothing ever written."""
        made: list[Machine] = [
            PrimaryMachine("p1"), PrimaryMachine("p2"), IntermediateMachine("i"), SecondaryMachine("s1"),
            SecondaryMachine("s2"), OpenerMachine("o"),
        ]  # fmt: skip
        state: State = (*map(self.machines.number, made), *[self.links.none] * 7, 0, 0, 0, 0, 0)
        self.moves.scope = Scope("start", writes=(), housekeeping=True)
        while True:
            following = next((after for _, after in self.moves.eager(state) if after != state), None)
            if following is None:
                break
            state = following
        self.moves.scope = scope
        writes = (1 << len(scope.writes)) - 1
        return (*state[:13], writes, scope.crashes, scope.takeovers, scope.stale, scope.impatient)

    def following(self, state: State) -> tuple[list[Move], bool]:
        """What is to be tried next, and whether the state is an end."""
        found = self.reductions.first(state) if self.moves.scope.reduced else None
        if found is not None:
            return found, False
        return self.all(state)

    def all(self, state: State) -> tuple[list[Move], bool]:
        """Everything that can happen, and whether only faults can."""
        found = [move for move in self.moves.eager(state) if move[1] != state]
        if not found:
            found = [move for move in self.moves.late(state) if move[1] != state]
        end = not found
        found += self.moves.faults(state)
        return found, end

    def explore(
        self, scope: Scope, *, max_states: int = 0, max_s: float = 0.0, chance: Random | None = None,
        verdicts: bool = False,
    ) -> Report:  # fmt: skip
        """All parts of a scope. Raises Violation, with the way there.

        With ``chance`` not in order: a part that is cut off is a sample. ``verdicts``: collect them.
        """
        began_s = time.monotonic()
        report = Report(scope.name)
        report.exhausted = True
        for part in scope.parts():
            search = _Search(self, part, report, chance, verdicts)
            report.exhausted &= search.run(max_states, began_s + max_s if max_s else float("inf"))
            report.parts += 1
            if not report.exhausted:
                break
        report.machine_states = len(self.machines.blobs)
        report.took_s = time.monotonic() - began_s
        return report

    def story(self, path: list[Words], text: str) -> str:
        """How it came to that."""
        return "\n".join([text, "the way there:", *map(self.words, path)])

    def words(self, words: Words) -> str:
        """Of one move."""
        kind, who, *rest = words
        name = ORDER[who]
        if kind == "reads":
            sender, first = ORDER[rest[0]], rest[1]
            if first == END:
                return f"{name} sees the end of its link to {sender}"
            return " ".join(sentences(sender, name, self.machines.letters[first].data))
        if kind in ("dials", "cannot reach"):
            return f"{name} {kind} {ORDER[rest[0]]}"
        return " ".join([name, kind, *map(str, rest)])


@dataclass(slots=True)
class _Frame:
    """A state on the path. ``low``: the lowest place on the path that it leads back to (Tarjan's components)."""

    words: Words
    state: State
    moves: Iterator[Move]
    place: int
    low: int
    leads_on: bool = False  # an end can be reached from here, without a fault


class _Search:
    """One part, depth first."""

    def __init__(self, explorer: Explorer, part: Scope, report: Report, chance: Random | None, verdicts: bool) -> None:
        self.explorer = explorer
        self.report = report
        self.chance = chance
        self.verdicts = verdicts
        self.state = explorer.start(part)
        self.seen: set[int] = set()
        self.path: list[_Frame] = []
        self.open: dict[int, int] = {}  # states that may lead back to the path → their places
        self.waiting: list[int] = []  # the same, in the order in which they were met
        self._judged: set[int] = set()

    def run(self, max_states: int, until_s: float) -> bool:
        """Whether it came to its end."""
        report, seen, path = self.report, self.seen, self.path
        self._enter((), self.state)
        while path:
            top = path[-1]
            move = next(top.moves, None)
            if move is None:
                self._leave(path.pop())
                continue
            report.transitions += 1
            mark = hash(move[1])
            if mark in seen:
                if mark in self.open:
                    top.low = min(top.low, self.open[mark])
                elif not struck(top.state, move[1]):
                    top.leads_on = True
                continue
            self._enter(*move)
            over = len(seen) & 1023 == 0 and time.monotonic() > until_s
            if over or (max_states and report.states >= max_states):
                return False
        return True

    def _enter(self, words: Words, state: State) -> None:
        mark = hash(state)
        place = len(self.waiting)
        frame = _Frame(words, state, iter(()), place, place)
        self.seen.add(mark)
        self.path.append(frame)
        self.open[mark] = place
        self.waiting.append(mark)
        self.report.states += 1
        self.report.deepest = max(self.report.deepest, len(self.path))
        try:
            self._judge(state)
            found, end = self._following(state)
        except Violation as violation:
            raise Violation(self._story(self.path, str(violation))) from None
        if self.chance is not None:
            self.chance.shuffle(found)
        frame.moves = iter(found)
        frame.leads_on = end
        self.report.ends += end

    def _leave(self, frame: _Frame) -> None:
        """All that follows from it was tried."""
        whole = frame.low == frame.place
        if whole:
            if not frame.leads_on:
                raise Violation(self._story([*self.path, frame], "[12] it goes on for ever, and never comes to an end"))
            for mark in self.waiting[frame.place :]:
                del self.open[mark]
            del self.waiting[frame.place :]
        if self.path and not struck(self.path[-1].state, frame.state):
            above = self.path[-1]
            above.low = min(above.low, frame.low)
            above.leads_on |= frame.leads_on

    def _story(self, path: list[_Frame], text: str) -> str:
        return self.explorer.story([frame.words for frame in path[1:]], text)

    def _following(self, state: State) -> tuple[list[Move], bool]:
        explorer = self.explorer
        found, end = explorer.following(state)
        if explorer.moves.scope.reduced and any(hash(after) in self.open for _, after in found):
            found, end = explorer.all(state)  # a cycle: nothing may be put off for ever
        if end:
            facts = [explorer.machines.facts[number] for number in state[:PAIR]]
            check_end(facts)
            if self.verdicts:
                self.report.verdicts.add(verdict_of(facts))
        return found, end

    def _judge(self, state: State) -> None:
        machines = state[:PAIR]
        mark = hash(machines)
        if mark not in self._judged:
            check([self.explorer.machines.facts[number] for number in machines])
            self._judged.add(mark)


def struck(before: State, after: State) -> bool:
    """Whether a fault lies between two states."""
    return after[CRASHES] < before[CRASHES] or after[STALE] < before[STALE] or after[IMPATIENT] < before[IMPATIENT]
