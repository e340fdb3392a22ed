"""What must hold in every state of the model, and at its ends. In brackets: invariants of PROTOCOL.md's table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from blockrepl.formats.link import BULK, HEADER_BYTES, Message, decode_body, decode_header
from blockrepl.formats.record import decode_record, iterate_entries
from blockrepl.formats.state import decode_secondary
from blockrepl.replication import opening, secondary_epochs
from tests.sim.model.machines import (
    VOLUMES,
    IntermediateMachine,
    Machine,
    OpenerMachine,
    Output,
    PrimaryMachine,
    SecondaryMachine,
)
from tests.sim.world import Violation


@dataclass(frozen=True)
class Row:
    """A record of the history."""

    last: int
    stream: int
    volume: int
    write: int
    raw: bytes


@dataclass(slots=True)
class Toward:
    """What the intermediate has with one secondary."""

    node: int
    link: int  # 0: not in our epoch, or not here
    reported: bool  # its WELCOME counts
    prepared: int
    quiet: bool  # all is sent and asked, and told of what is prepared: it has nothing to say before it hears from it


@dataclass(slots=True)
class Facts:
    """What the search and the rules want to know of one state of a machine."""

    alive: bool
    bootable: bool
    local: tuple[tuple[Any, ...], ...]
    crashes: tuple[tuple[Any, ...], ...]
    links: frozenset[int] = frozenset()  # that it remembers
    serving: bool = False  # P: hosts may write
    open: bool = False  # the opener: it is at it
    active: bool = False
    # P
    told: tuple[int, ...] = ()
    volume: tuple[tuple[int, int], ...] = ()
    waiting: bool = False  # writes without an answer
    fenced: bool = False  # it knows of a higher epoch
    # I
    history: tuple[Row, ...] = ()  # durable
    numbered: int = 0
    records: int = 0  # in its journal
    validated: int = 0
    phase: Any = None
    toward: tuple[Toward, ...] = ()
    opener_link: int = 0
    incarnations: tuple[int, ...] = (0, 0)  # of the primaries, as far as it knows
    drained: bool = False  # all is durable and validated, and every secondary that is here was told
    # I and S
    promised: int = 0  # the highest epoch it knows of
    # S
    rows: tuple[Row, ...] = ()
    held: int = 0  # after a power loss now
    applied: int = 0
    number: int = 0  # of its stored epoch
    # opener
    done_at: int = -1  # the number of a drained takeover that is done
    answered: frozenset[int] = frozenset()  # nodes whose answer to what it asked last has come
    heard: frozenset[int] = frozenset()  # nodes that have greeted, or never will
    dialled: frozenset[int] = frozenset()  # nodes that it has dialled
    epoch: int = 0


def rows_of(frames: list[tuple[str, Any]]) -> tuple[Row, ...]:
    """Records among frames."""
    found = []
    for kind, frame in frames:
        if kind == "record":
            head = decode_record(memoryview(frame))
            for volume, _, _, _, _, payload in iterate_entries(head, memoryview(frame)):
                found.append(Row(head.last, head.stream, volume, bytes(payload or b"\0")[0], frame))
    return tuple(found)


def facts_of(machine: Machine) -> Facts:
    """Of one state."""
    alive = machine.role is not None
    opener = isinstance(machine, OpenerMachine)
    facts = Facts(
        alive, not alive and not opener, tuple(machine.local()) if alive else (),
        tuple(machine.crashes()) if alive else (),
    )  # fmt: skip
    if isinstance(machine, PrimaryMachine):
        facts.told, facts.volume = tuple(machine.told), tuple(sorted(machine.volume.items()))
        if alive:
            facts.serving, facts.waiting = machine.role.serving, len(machine.role.queue) > 0
            facts.fenced = machine.role.fenced
    elif isinstance(machine, IntermediateMachine):
        facts.history = rows_of(machine.frames[: machine.durable])
        if alive:
            _intermediate(machine, facts)
    elif isinstance(machine, SecondaryMachine):
        _secondary(machine, facts)
    elif isinstance(machine, OpenerMachine):
        facts.done_at = machine.done_at
        if alive:
            role = machine.role
            facts.open, facts.phase, facts.epoch = role.open, role.phase, role._epoch.number
            facts.answered = frozenset(role._answers)
            facts.heard = frozenset((*role.calls.welcomes, *role.calls.silent))
            facts.dialled = facts.heard | frozenset(role.calls.links.values())
    return facts


def _intermediate(machine: IntermediateMachine, facts: Facts) -> None:
    role = machine.role
    streams = role.streams
    facts.numbered, facts.validated, facts.phase = role.numbered, streams.validated, role.phase
    facts.records = len(machine.frames)
    facts.incarnations = tuple(role.senders.by_node[node].incarnation for node in (1, 2))
    facts.opener_link = role.opener_link
    facts.promised = max(role.state.promised.number, role.state.epoch.number, role.opening.higher.number)
    facts.drained = role.numbered == role.durable_number == streams.validated and all(
        stream.validated >= role.numbered or not stream.ready for stream in streams.by_node.values()
    )
    asked = role.numbered == role.durable_number == streams.rounds_number
    facts.toward = tuple(
        Toward(
            node, stream.link, node in role.opening._reports, stream.prepared,
            stream.ready and asked and stream.sent == stream.last == stream.durable and not stream.busy
            and stream.asked_through == role.numbered and stream.validated >= stream.prepared,
        )
        for node, stream in streams.by_node.items()
    )  # fmt: skip


def durably_held(machine: SecondaryMachine) -> int:
    """What a secondary would hold if power failed now."""
    state = decode_secondary(machine.superblock)
    durable = machine.frames[: machine.durable]
    notes = [frame[0] for kind, frame in durable if kind == "note" and frame[1] >= state.epoch.number]
    rows = [row.last for row in rows_of(durable)]
    held: int = max([state.held, state.prepared, state.validated, *notes, *rows])
    return held


def _secondary(machine: SecondaryMachine, facts: Facts) -> None:
    state = decode_secondary(machine.superblock)
    facts.rows = rows_of(machine.frames[: machine.durable])
    facts.held = durably_held(machine)
    facts.active, facts.number = state.active, state.number
    facts.volume = tuple(sorted(machine.volume.items()))
    if machine.role is not None:
        facts.applied = machine.role.applied
        facts.promised = max(machine.role.state.promised.number, machine.role.state.epoch.number)
        facts.phase = machine.role.phase


def demand(truth: bool, text: str) -> None:
    """An invariant."""
    if not truth:
        raise Violation(text)


def image(history: tuple[Row, ...], number: int, volumes: list[int]) -> tuple[tuple[int, int], ...]:
    """What volumes hold when all up to ``number`` is stored."""
    found: dict[int, int] = {}
    for row in history:
        if row.last <= number and row.volume in volumes:
            found[row.volume] = row.write
    return tuple(sorted(found.items()))


def obey(machine: Machine, outputs: list[Output]) -> str:
    """What a machine may say, whatever the others do meanwhile: what it says must be so already. The rule it breaks.

    So these rules do not depend on the order in which independent things happen (see docs/model.md).
    """
    try:
        if isinstance(machine, IntermediateMachine):
            _intermediate_obeys(machine, outputs)
        elif isinstance(machine, SecondaryMachine):
            _secondary_obeys(machine, outputs)
    except Violation as violation:
        return str(violation)
    return ""


def _said(outputs: list[Output]) -> Iterator[tuple[int, dict[str, Any]]]:
    for _, _, data in outputs:
        view = memoryview(data)
        head = decode_header(view) if data else None
        if head is not None and head.type in BULK:
            yield head.type, {"record": bytes(view[HEADER_BYTES:])}
        elif head is not None:
            yield head.type, decode_body(head, view)


def _intermediate_obeys(machine: IntermediateMachine, outputs: list[Output]) -> None:
    durable = [frame for _, frame in machine.frames[: machine.durable]]
    last = decode_record(memoryview(durable[-1])).last if durable else 0
    held = min(machine.heard.values())
    for kind, fields in _said(outputs):
        if kind == Message.ACK:
            demand(fields["number"] <= last, f"[1] {fields['number']} is acknowledged, {last} is durable")
        elif kind == Message.WELCOME and fields["batch"]:
            demand(fields["through"] <= last, f"[1] WELCOME names {fields['through']}, {last} is durable")
        elif kind == Message.RECORD:
            demand(fields["record"] in durable, "[3] a record is sent on that is not durable")
        elif kind == Message.PREPARE:
            demand(fields["number"] <= last, f"[4] PREPARE {fields['number']}, {last} is durable")
        elif kind == Message.VALIDATE:
            demand(fields["number"] <= held, f"[4] VALIDATE {fields['number']}, but all have said {held} only")


def _secondary_obeys(machine: SecondaryMachine, outputs: list[Output]) -> None:
    held = durably_held(machine)
    for kind, fields in _said(outputs):
        if kind == Message.PREPARED:
            demand(fields["number"] <= held, f"[4] PREPARED {fields['number']}, but {held} is durable")
        elif kind == Message.PROMISED:
            demand(fields["held"] <= held, f"[4] PROMISED at {fields['held']}, but {held} is durable")


def check(facts: list[Facts]) -> None:
    """In every state."""
    p1, p2, i, s1, s2, o = facts
    known = {row.write: row.last for row in i.history}
    for p in (p1, p2):
        for write in p.told:
            demand(write in known, f"[1] a host was told of write {write}, which the journal may lose")
        for _, write in p.volume:
            demand(write in known, f"[2] a P-VOL holds write {write}, the journal does not")
    raws = {row.raw for row in i.history}
    for name, s in (("s1", s1), ("s2", s2)):
        for row in s.rows:
            demand(row.raw in raws, f"[3] {name} holds a record {row.last} that is not of the history")
    if i.phase in (opening.Phase.SERVING, opening.Phase.FROZEN):
        low = min(s1.held, s2.held)
        demand(i.validated <= low or s1.active or s2.active, f"[4] validated {i.validated}, but {low} is held by all")
    for name, s in (("s1", s1), ("s2", s2)):
        if s.phase is secondary_epochs.Phase.ACTIVE:
            mine = [volume for volume, (_, owner) in VOLUMES.items() if owner == name]
            expected = image(i.history, s.number, mine)
            demand(s.volume == expected, f"[3] {name} took over at {s.number} with {s.volume}, not {expected}")
    if s1.active and s2.active:
        demand(s1.number == s2.number, f"[3] taken over at {s1.number} and at {s2.number}")
    if o.done_at >= 0:
        for write in (*p1.told, *p2.told):
            demand(known[write] <= o.done_at, f"[5, 6] write {write} is told of and lost by a drained takeover")


def check_end(facts: list[Facts]) -> None:
    """Where nothing is left to happen: all is validated and answered, or both secondaries have taken over (12)."""
    p1, p2, i, s1, s2, _ = facts
    if s1.active or s2.active:
        demand(s1.active and s2.active, "[12] one secondary has taken over, the other never will")
        return
    demand(i.phase is opening.Phase.SERVING, f"[12] the intermediate is {i.phase}")
    demand(i.validated == i.numbered, f"[12] validated {i.validated}, numbered {i.numbered}")
    for name, p in (("p1", p1), ("p2", p2)):
        demand(p.serving and not p.waiting, f"[12] {name} keeps a host waiting")
        mine = [volume for volume, (owner, _) in VOLUMES.items() if owner == name]
        demand(p.volume == image(i.history, i.numbered, mine), f"[2] the P-VOLs of {name} are not the writes in order")
    for name, s in (("s1", s1), ("s2", s2)):
        mine = [volume for volume, (_, owner) in VOLUMES.items() if owner == name]
        demand(s.applied == i.numbered, f"[12] {name} applied {s.applied} of {i.numbered}")
        demand(s.volume == image(i.history, i.numbered, mine), f"[3] the S-VOLs of {name} are not the history")


def verdict_of(facts: list[Facts]) -> tuple[Any, ...]:
    """What can be seen of an end: whom hosts were told of, what volumes hold, who is active, in which order."""
    p1, p2, i, s1, s2, o = facts
    order = tuple((row.last, row.write) for row in i.history)
    sides = tuple((s.active, s.number, s.applied, s.volume, tuple(row.last for row in s.rows)) for s in (s1, s2))
    return order, (p1.told, p1.volume), (p2.told, p2.volume), sides, (i.phase, i.validated), (o.done_at, o.phase)
