"""Partial orders: moves that may be tried first, alone, since nothing that others do before them makes a difference.

`Reductions.first` gives a persistent set: moves of which it holds that whatever can happen while none of them happens
neither enables, nor disables, nor changes any of them. Then every end, and every state of a single machine, is reached
also by the paths that begin with one of them. docs/model.md has the argument for each, by its number here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from blockrepl.formats.link import Message
from blockrepl.replication import takeover
from blockrepl.replication.opening import Phase
from tests.sim.model.links import CALL, END, HOP1, HOP2, INCIDENT, P1, P2, PAIRS, S1, S2, I, Links, O
from tests.sim.model.moves import CRASHES, IMPATIENT, NODE, PAIR, STALE, TAKEOVERS, Move, Moves, State
from tests.sim.model.rules import Facts, Toward
from tests.sim.model.scope import Scope
from tests.sim.model.steps import Machines

STEADY = frozenset({Phase.SERVING, Phase.FROZEN})
ASKING = frozenset({takeover.Phase.PROMISING, takeover.Phase.STORING, takeover.Phase.ACTIVATING})


class Reductions:
    """Finds what may be tried first."""

    def __init__(self, moves: Moves) -> None:
        self.moves = moves
        self.machines: Machines = moves.machines
        self.links: Links = moves.links
        self.kinds: list[Callable[[State], Iterator[list[Move]]]] = [
            self.opener_begins, self.opener_goes_on, self.opener_greets, self.greeted_by_opener, self.restart,
            self.write, self.primary, self.opener_has_left, self.intermediate_dials,
            self.greeted_while_starting, self.fenced, self.drained, self.secondary,
        ]  # fmt: skip

    @property
    def scope(self) -> Scope:
        """What is explored."""
        return self.moves.scope

    def first(self, state: State) -> list[Move] | None:
        """A persistent set; None: everything is to be tried."""
        kinds = [self.opener_begins, self.write, self.primary] if state[IMPATIENT] else self.kinds
        for kind in kinds:
            for found in kind(state):
                changing = [move for move in found if move[1] != state]
                if changing:
                    return changing
        return None

    # what may still happen

    def may_crash(self, state: State, *machines: int) -> bool:
        """Whether one of these can still be struck."""
        return bool(state[CRASHES]) and any(who in self.scope.victims for who in machines)

    def may_break(self, state: State, pair: int, end: int | None = None) -> bool:
        """Whether a connection of this pair can still break, seen at once by this end (or either)."""
        return bool(state[STALE]) and any(each[0] == pair and end in (None, each[1]) for each in self.scope.cuts)

    def fact(self, state: State, who: int) -> Facts:
        """Of a machine."""
        return self.machines.facts[state[who]]

    def waits(self, state: State, pair: int, who: int) -> bool:
        """Whether something waits to be read by this end."""
        return bool(self.links.arrivals(state[PAIR + pair], dialler=PAIRS[pair][0] == who))

    def calm(self, state: State) -> bool:
        """Nobody knows of an epoch above the first one, and no opener has asked for one."""
        opener = self.fact(state, O)
        asked = opener.alive and opener.phase is not takeover.Phase.GREETING
        return not asked and all(self.fact(state, who).promised <= 1 for who in (I, S1, S2))

    # 1 to 3: the opener

    def opener_begins(self, state: State) -> Iterator[list[Move]]:
        """1. The command is typed at once."""
        if state[TAKEOVERS] and (self.scope.early or not state[CRASHES]):
            yield list(self.moves.begin(state))

    def opener_goes_on(self, state: State) -> Iterator[list[Move]]:
        """2. Nothing can surprise the opener: it hears from machines that live, over links that hold."""
        mine = self.fact(state, O)
        if not mine.alive or self.may_crash(state, I, S1, S2) or any(self.may_break(state, at) for at in CALL.values()):
            return
        if mine.phase in ASKING and any(self.fact(state, who).promised > mine.epoch for who in (I, S1, S2)):
            return
        found = list(self.moves.of(state, O))
        for who in CALL:
            if mine.open and NODE[who] not in mine.dialled:  # it has yet to dial, and may fail to
                found += self.moves.boot(state, who)
        if any(move[0][1] == O for move in found):
            yield found

    def opener_greets(self, state: State) -> Iterator[list[Move]]:
        """3. While it greets, who answers when makes no difference, but for the answer that is the last."""
        mine = self.fact(state, O)
        if not mine.alive or mine.phase is not takeover.Phase.GREETING or self.may_crash(state, S1):
            return
        for who, pair in CALL.items():
            if self.may_crash(state, who) or not self.fact(state, who).alive:
                continue
            yield list(self.moves.dial(state, pair))
            if who != I and NODE[I] not in mine.heard and not self.may_break(state, pair):
                yield list(self.moves.reads(state, O, (pair,)))

    def greeted_by_opener(self, state: State) -> Iterator[list[Move]]:
        """4. An opener's HELLO tells nothing, and the answer is the same whenever it is read."""
        if not self.calm(state) or not self.fact(state, O).alive:
            return
        for who, pair in CALL.items():
            if self.may_crash(state, who) or self.may_break(state, pair, who) or self.fact(state, I).opener_link:
                continue
            arrivals = self.links.arrivals(state[PAIR + pair], dialler=False)
            if len(arrivals) == 1 and self.machines.letters[arrivals[0].first].opens:
                yield list(self.moves.reads(state, who, (pair,)))

    # 5: a machine that was struck

    def restart(self, state: State) -> Iterator[list[Move]]:
        """5. Who is down starts at once; only an opener that has yet to dial it can tell the difference."""
        opener = self.fact(state, O)
        for who in (P1, P2, I, S1, S2):
            if self.fact(state, who).alive:
                continue
            found = list(self.moves.boot(state, who))
            if who in CALL:
                if state[TAKEOVERS] and who != S1:
                    continue  # it may begin, and dial it, before
                if opener.alive and opener.open and NODE[who] not in opener.dialled:
                    if opener.phase is not takeover.Phase.GREETING or self.may_crash(state, S1):
                        continue
                    found += self.moves.dial(state, CALL[who])
            yield found

    # 6 and 7: primaries

    def write(self, state: State) -> Iterator[list[Move]]:
        """6. Hosts write at once: a batch that is under way is as good as one that waits."""
        for who, pair in HOP1.items():
            if not self.may_crash(state, who) and not self.may_break(state, pair, who) and self.fact(state, who).alive:
                yield list(self.moves.hosts(state, who))

    def primary(self, state: State) -> Iterator[list[Move]]:
        """7. A primary hears from the intermediate only, on one link, that it has dialled itself."""
        boss = self.fact(state, I)
        for who, pair in HOP1.items():
            if self.may_crash(state, who, I) or self.may_break(state, pair, who) or not self.fact(state, who).alive:
                continue
            linked = any(each.dialler_open for each in self.links.of[state[PAIR + pair]])
            if linked and not self.waits(state, pair, who):
                continue
            if not linked and not boss.alive:
                continue
            yield list(self.moves.of(state, who))

    # 8: the intermediate

    def intermediate_dials(self, state: State) -> Iterator[list[Move]]:
        """8. A HELLO to a secondary says the same whenever it is sent in an epoch."""
        mine = self.fact(state, I)
        if not mine.alive or mine.phase not in (*STEADY, Phase.STARTING, Phase.FENCED) or self.may_crash(state, I):
            return
        for who, pair in HOP2.items():
            if self.fact(state, who).alive and not self.may_crash(state, who):
                yield list(self.moves.dial(state, pair))

    def greeted_while_starting(self, state: State) -> Iterator[list[Move]]:
        """13. Before an intermediate serves, it collects greetings in any order; the last WELCOME makes it serve."""
        mine = self.fact(state, I)
        if mine.phase is not Phase.STARTING or not self._holds(state):
            return
        alone = not state[TAKEOVERS] and not self.fact(state, O).open
        for who, pair in HOP2.items():
            last = all(each.reported or each.node == NODE[who] for each in mine.toward)
            if (last and not alone) or self.may_crash(state, who):
                continue
            for link, first, _ in self.links.arrivals(state[PAIR + pair], dialler=True):
                letter = self.machines.letters[first]
                if letter.follows and letter.epoch <= 1 and mine.promised <= 1 and self._only(state, pair, link):
                    yield list(self.moves.reads(state, I, (pair,)))
        for who, pair in HOP1.items():
            for link, first, _ in self.links.arrivals(state[PAIR + pair], dialler=False):
                known = self.machines.letters[first].incarnation == mine.incarnations[who]
                if known and not self.may_crash(state, who) and self._only(state, pair, link):
                    yield list(self.moves.reads(state, I, (pair,)))

    def _only(self, state: State, pair: int, link: int) -> bool:
        """The pair has no other connection."""
        connections = self.links.of[state[PAIR + pair]]
        return len(connections) == 1 and connections[0].link == link

    def fenced(self, state: State) -> Iterator[list[Move]]:
        """10. A fenced intermediate does nothing any more: what it hears, it hears in any order."""
        if self.fact(state, I).phase is Phase.FENCED and self._holds(state):
            yield list(self.moves.of(state, I))

    def drained(self, state: State) -> Iterator[list[Move]]:
        """11. Nothing depends on whether a drained intermediate has a link to a secondary, as long as that follows."""
        mine = self.fact(state, I)
        if mine.phase is not Phase.FROZEN or not mine.drained or not self._holds(state):
            return
        for pair in HOP2.values():
            for arrival in self.links.arrivals(state[PAIR + pair], dialler=True):
                letter = self.machines.letters[arrival.first]
                if arrival.first == END or (letter.follows and letter.epoch <= mine.promised):
                    yield [move for move in self.moves.reads(state, I, (pair,)) if move[0][3] == arrival.first]

    def _holds(self, state: State) -> bool:
        """Nothing can strike the intermediate."""
        return not self.may_crash(state, I) and not any(self.may_break(state, pair, I) for pair in INCIDENT[I])

    def opener_has_left(self, state: State) -> Iterator[list[Move]]:
        """12. That an opener has hung up makes no difference to anybody."""
        for who, pair in CALL.items():
            arrivals = self.links.arrivals(state[PAIR + pair], dialler=False)
            if self.may_crash(state, who) or self.may_break(state, pair, who):
                continue
            if len(arrivals) == 1 and arrivals[0].first == END:
                yield list(self.moves.reads(state, who, (pair,)))

    # 9: secondaries

    def secondary(self, state: State) -> Iterator[list[Move]]:
        """9. A secondary hears from the intermediate and the opener: neither can say anything new before it moves."""
        for who, pair in HOP2.items():
            mine = self.fact(state, who)
            if not mine.alive or self.may_crash(state, who, I):
                continue
            if self.may_break(state, pair, who) or self.may_break(state, CALL[who], who):
                continue
            if self._intermediate_is_awaited(state, who, pair) and self._opener_is_awaited(state, who):
                yield list(self.moves.of(state, who))

    def _intermediate_is_awaited(self, state: State, who: int, pair: int) -> bool:
        """What it says next is at the head of the link already, or comes only after this secondary has moved."""
        boss = self.fact(state, I)
        connections = self.links.of[state[PAIR + pair]]
        if not boss.alive:
            return False
        if boss.phase is Phase.FENCED:
            return not any(each.dialler_open for each in connections)
        only = next((each for each in connections if each.dialler_open), None)
        if only is None or not only.listener_open or END in only.to_dialler:
            return False  # it will dial again
        toward = self._toward(boss, who)
        if only.to_listener:
            greets = boss.phase is Phase.STARTING and not toward.reported and not only.to_dialler
            return boss.phase in STEADY or greets
        done = boss.phase is Phase.FROZEN or (
            boss.phase is Phase.SERVING and boss.records == len(self.scope.writes)
        )  # fmt: skip
        return done and toward.quiet and not only.to_dialler and not self.may_break(state, pair)

    def _toward(self, boss: Facts, who: int) -> Toward:
        return next(each for each in boss.toward if each.node == NODE[who])

    def _opener_is_awaited(self, state: State, who: int) -> bool:
        """Likewise."""
        opener = self.fact(state, O)
        if not opener.alive or not opener.open:
            return not state[TAKEOVERS]
        pair = CALL[who]
        if self.waits(state, pair, who):
            return True
        if opener.phase in ASKING:
            others = (I, S1, S2)
            answers = self.waits(state, pair, O)
            higher = any(self.fact(state, each).promised > opener.epoch for each in others)
            return NODE[who] not in opener.answered and not answers and not higher
        return self._drain_needs(state, who)

    def _drain_needs(self, state: State, who: int) -> bool:
        """The opener asks the intermediate first, and that cannot answer before this secondary has prepared more."""
        boss, pair = self.fact(state, I), HOP2[who]
        if not boss.alive or self.may_crash(state, I) or self.may_break(state, CALL[I]):
            return False
        opener = self.fact(state, O)
        call = self.links.of[state[PAIR + CALL[I]]]
        holds = any(each.dialler_open and each.listener_open for each in call)
        if not (holds or (opener.phase is takeover.Phase.GREETING and NODE[I] not in opener.dialled)):
            return False
        if any(self.machines.letters[each.first].kind in (END, Message.REFUSED, Message.PROMISED)
               for each in self.links.arrivals(state[PAIR + CALL[I]], dialler=True)):  # fmt: skip
            return False
        known = self._toward(boss, who).prepared
        for each in self.links.of[state[PAIR + pair]]:
            for message in each.to_dialler:
                letter = self.machines.letters[message]
                if letter.kind != Message.PREPARED:
                    return False
                known = max(known, letter.number)
        return boss.phase in STEADY and boss.numbered > known
