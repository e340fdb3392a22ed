"""Connections between two machines, by number: what is under way, who has closed; every change is made once.

A pair of machines may have several connections: one end may have dialled again before the other has read the end of the
older one. All that a pair has is one number (`Links.of` tells what it stands for), and so a part of a group's state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ORDER = ("p1", "p2", "i", "s1", "s2", "o")
INDEX = {name: index for index, name in enumerate(ORDER)}
P1, P2, I, S1, S2, O = range(6)  # noqa: E741
PAIRS = ((P1, I), (P2, I), (I, S1), (I, S2), (O, I), (O, S1), (O, S2))  # who dials, who listens
HOP1 = {P1: 0, P2: 1}
HOP2 = {S1: 2, S2: 3}
CALL = {I: 4, S1: 5, S2: 6}  # the opener's
INCIDENT = tuple(tuple(pair for pair, ends in enumerate(PAIRS) if index in ends) for index in range(6))
LINKS = 8  # so many links a pair can have
BASE = 0x5A5A0000  # link = BASE + pair * LINKS + one of 0 to 7: no other number in a machine looks like that
END = 0  # the number of an orderly end, behind what was sent


class Connection(NamedTuple):
    """Both ends, and what is under way: message numbers."""

    link: int
    dialler_open: bool = True
    listener_open: bool = True
    to_listener: tuple[int, ...] = ()
    to_dialler: tuple[int, ...] = ()
    listener_may_lose: bool = False  # the other machine has crashed: any rest of what it sent may never arrive
    dialler_may_lose: bool = False


Pair = tuple[Connection, ...]
"""All connections of a pair."""


def pair_of(link: int) -> int:
    """Whose link it is."""
    return (link - BASE) // LINKS


def first_of(link: int) -> int:
    """The first number of a link's pair."""
    return link - (link - BASE) % LINKS


class Arrival(NamedTuple):
    """Something that one end can read; ``first`` is END when the connection ends there."""

    link: int
    first: int
    left: int  # the pair then


class Links:
    """All pairs that were met, and what becomes of them."""

    def __init__(self) -> None:
        self.of: list[Pair] = []
        self._numbers: dict[Pair, int] = {}
        self._done: dict[Any, int] = {}
        self._arrivals: dict[tuple[int, bool], tuple[Arrival, ...]] = {}
        self.odd: list[int] = []  # the link of a pair's only connection, where that is not the pair's first number
        self.none = self._number(())

    def _number(self, pair: Pair) -> int:
        found = self._numbers.get(pair)
        if found is None:
            found = self._numbers[pair] = len(self.of)
            self.of.append(pair)
            link = pair[0].link if len(pair) == 1 else BASE
            self.odd.append(link if (link - BASE) % LINKS else 0)
        return found

    def put(self, number: int, link: int, message: int, *, dialler: bool) -> int:
        """One end sends; nothing happens when either end is closed."""
        key = number, link, message, dialler
        found = self._done.get(key)
        if found is None:
            found = self._done[key] = self._change(number, link, lambda each: _put(each, message, dialler))
        return found

    def close(self, number: int, link: int, *, dialler: bool) -> int:
        """One end closes: the other will read an end, what comes for this one is dropped."""
        key = number, link, dialler
        found = self._done.get(key)
        if found is None:
            found = self._done[key] = self._change(number, link, lambda each: _shut(_put(each, END, dialler), dialler))
        return found

    def crash(self, number: int, *, dialler: bool) -> int:
        """One end's machine dies: as if it closed, but that any rest of what it sent may be lost."""
        for each in self.of[number]:
            if each.dialler_open if dialler else each.listener_open:
                number = self._change(number, each.link, lambda each: _shut(_lossy(each, dialler), dialler))
        return number

    def dial(self, number: int, pair: int, taken: frozenset[int]) -> tuple[int, int] | None:
        """A new connection, unless there is one: its link, which nobody may remember (``taken``), and the pair then."""
        connections = self.of[number]
        if any(each.dialler_open for each in connections):
            return None
        used = taken | {each.link for each in connections}
        link = next(link for link in range(BASE + pair * LINKS, BASE + (pair + 1) * LINKS) if link not in used)
        return link, self._number(tuple(sorted((*connections, Connection(link)))))

    def renamed(self, number: int) -> int:
        """A pair's only connection gets the pair's first number: states must not differ by what links were once."""
        only = self.of[number][0]
        return self._number((only._replace(link=first_of(only.link)),))

    def arrivals(self, number: int, *, dialler: bool) -> tuple[Arrival, ...]:
        """What one end can read now."""
        key = number, dialler
        found = self._arrivals.get(key)
        if found is None:
            found = self._arrivals[key] = tuple(self._find_arrivals(number, dialler))
        return found

    def _find_arrivals(self, number: int, dialler: bool) -> list[Arrival]:
        found = []
        for each in self.of[number]:
            if each.dialler_open if dialler else each.listener_open:
                waiting = each.to_dialler if dialler else each.to_listener
                if waiting and waiting[0] != END:
                    left = self._change(number, each.link, lambda each: _take(each, dialler))
                    found.append(Arrival(each.link, waiting[0], left))
                if waiting and (waiting[0] == END or (each.dialler_may_lose if dialler else each.listener_may_lose)):
                    left = self._change(number, each.link, lambda each: _shut(each, dialler))
                    found.append(Arrival(each.link, END, left))
        return found

    def _change(self, number: int, link: int, change: Any) -> int:
        """A connection without ends is gone."""
        changed = [change(each) if each.link == link else each for each in self.of[number]]
        return self._number(tuple(each for each in changed if each.dialler_open or each.listener_open))


def _put(each: Connection, message: int, dialler: bool) -> Connection:
    if not (each.dialler_open and each.listener_open):
        return each
    if dialler:
        return each._replace(to_listener=(*each.to_listener, message))
    return each._replace(to_dialler=(*each.to_dialler, message))


def _take(each: Connection, dialler: bool) -> Connection:
    if dialler:
        left = each.to_dialler[1:]
        return each._replace(to_dialler=left, dialler_may_lose=each.dialler_may_lose and left != (END,))
    left = each.to_listener[1:]
    return each._replace(to_listener=left, listener_may_lose=each.listener_may_lose and left != (END,))


def _shut(each: Connection, dialler: bool) -> Connection:
    if dialler:
        return each._replace(dialler_open=False, to_dialler=(), dialler_may_lose=False)
    return each._replace(listener_open=False, to_listener=(), listener_may_lose=False)


def _lossy(each: Connection, dialler: bool) -> Connection:
    each = _put(each, END, dialler)
    if dialler:
        return each._replace(listener_may_lose=each.listener_open and each.to_listener not in ((), (END,)))
    return each._replace(dialler_may_lose=each.dialler_open and each.to_dialler not in ((), (END,)))
