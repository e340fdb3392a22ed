"""What single machines do upon events: the real code runs once for each (state of a machine, event)."""

from __future__ import annotations

from typing import Any, NamedTuple

from blockrepl.formats.link import BULK, HEADER_BYTES, LinkRole, Message, decode_body, decode_header
from blockrepl.formats.record import decode_record
from tests.sim.model.canon import canonical, forget
from tests.sim.model.clone import Copier
from tests.sim.model.links import BASE, END, INDEX, LINKS, PAIRS, O, pair_of
from tests.sim.model.machines import CONSTANTS, Machine
from tests.sim.model.rules import Facts, facts_of, obey

Event = tuple[Any, ...]
# How a pickle says the number of a link. Other bytes that look like it do no harm: then a number is not used again yet.
_MARKS = [(link, b"J" + link.to_bytes(4, "little")) for link in range(BASE, BASE + len(PAIRS) * LINKS)]


class Letter(NamedTuple):
    """A message that was met."""

    data: bytes
    kind: int
    number: int  # what it says of the order: of a PREPARED; 0 for those of which nobody asks
    opens: bool = False  # HELLO of an opener
    follows: bool = False  # WELCOME of a secondary that has not taken over
    epoch: int = 0  # the highest that a WELCOME names
    incarnation: int = -1  # of a primary that greets, and names no epoch above the first


class Output(NamedTuple):
    """A message on a link, or its end."""

    pair: int
    link: int
    message: int
    dialler: bool
    last: bool  # the link is closed behind it


class Step(NamedTuple):
    """What comes of an event."""

    after: int
    outputs: tuple[Output, ...]
    error: str  # an invariant that is broken, an assertion that failed; "" for none


class Machines:
    """States of machines, and messages, by number."""

    def __init__(self, *, canonical: bool = True) -> None:
        self.copier = Copier(CONSTANTS)
        self.blobs: list[bytes] = []
        self.facts: list[Facts] = []
        self.letters: list[Letter] = [Letter(b"", 0, 0)]  # number 0 is END
        self._canonical = canonical
        self._numbers: dict[bytes, int] = {}
        self._messages: dict[bytes, int] = {b"": END}
        self._steps: dict[tuple[int, Event], Step] = {}

    def number(self, machine: Machine) -> int:
        """Its number; equal ones have the same."""
        if self._canonical:
            forget(machine)
        key = machine.name.encode() + self.copier.key(machine)
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.blobs)
            self.blobs.append(self.copier.dump(machine))
            facts = facts_of(machine)
            facts.links = frozenset(link for link, mark in _MARKS if mark in key)
            self.facts.append(facts)
        return found

    def step(self, number: int, event: Event) -> Step:
        """An event at a machine in this state."""
        key = number, event
        found = self._steps.get(key)
        if found is None:
            found = self._steps[key] = self._step(number, event)
        return found

    def _step(self, number: int, event: Event) -> Step:
        machine: Machine = self.copier.load(self.blobs[number])
        taken = (*event[:2], self.letters[event[2]].data) if event[0] == "message" else event
        try:
            raw = machine.step(taken)
        except Exception as error:  # whatever the role raises
            return Step(number, (), f"{type(error).__name__}: {error}")
        broken = obey(machine, raw)
        index = INDEX[machine.name]
        outputs = []
        for kind, link, data in raw:
            if not link:
                continue  # to whom asked before a crash: hosts drop that
            dialler, listener = PAIRS[pair_of(link)]
            other = listener if dialler == index else dialler
            message = self._message(data, other) if data else END
            outputs.append(Output(pair_of(link), link, message, dialler == index, kind == "close"))
        return Step(self.number(machine), tuple(outputs), broken)

    def renamed(self, number: int, link: int, to: int) -> int:
        """The machine that calls a link by another number."""
        if link not in self.facts[number].links:
            return number
        key = number, ("renamed", link)
        found = self._steps.get(key)
        if found is None:
            old, new = (b"J" + each.to_bytes(4, "little") for each in (link, to))
            machine: Machine = self.copier.load(self.blobs[number].replace(old, new))
            found = self._steps[key] = Step(self.number(machine), (), "")
        return found.after

    def _message(self, data: bytes, to: int) -> int:
        if self._canonical:
            data = canonical(data, to_opener=to == O)
        found = self._messages.get(data)
        if found is None:
            found = self._messages[data] = len(self.letters)
            self.letters.append(_letter(data))
        return found


def _letter(data: bytes) -> Letter:
    view = memoryview(data)
    head = decode_header(view)
    if head.type in BULK:
        return Letter(data, head.type, decode_record(view[HEADER_BYTES:]).last if head.type == Message.RECORD else 0)
    fields = decode_body(head, view)
    if head.type == Message.PREPARED:
        return Letter(data, head.type, fields["number"])
    if head.type == Message.HELLO:
        plain = fields["role"] == LinkRole.PRIMARY and max(fields["epoch"].number, fields["promised"].number) <= 1
        incarnation = fields["incarnation"] if plain else -1
        return Letter(data, head.type, 0, fields["role"] == LinkRole.OPENER, incarnation=incarnation)
    if head.type == Message.WELCOME:
        follows = fields["role"] == LinkRole.SECONDARY and not fields["active"]
        return Letter(data, head.type, 0, False, follows, max(fields["epoch"].number, fields["promised"].number))
    return Letter(data, head.type, 0)
