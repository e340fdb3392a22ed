"""What must hold in every state of the model, and at its ends. In brackets: invariants of PROTOCOL.md's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockrepl.formats.record import decode_record, iterate_entries
from blockrepl.formats.state import decode_secondary
from blockrepl.replication import opening, secondary_epochs, takeover
from blockrepl.replication.takeover import OPEN
from tests.sim.model.machines import (
    VOLUMES,
    IntermediateMachine,
    Machine,
    OpenerMachine,
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
class Facts:
    """What the search and the rules want to know of one state of a machine."""

    alive: bool
    bootable: bool
    local: tuple[tuple[Any, ...], ...]
    crashes: tuple[tuple[Any, ...], ...]
    serving: bool = False  # P: hosts may write
    open: bool = False  # the opener: it is at it
    active: bool = False
    # P
    told: tuple[int, ...] = ()
    volume: tuple[tuple[int, int], ...] = ()
    waiting: bool = False  # writes without an answer
    # I
    history: tuple[Row, ...] = ()  # durable
    numbered: int = 0
    validated: int = 0
    phase: Any = None
    # S
    rows: tuple[Row, ...] = ()
    held: int = 0  # after a power loss now
    applied: int = 0
    number: int = 0  # of its stored epoch
    # opener
    done_at: int = -1  # the number of a drained takeover that is done


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
    elif isinstance(machine, IntermediateMachine):
        facts.history = rows_of(machine.frames[: machine.durable])
        if alive:
            role = machine.role
            facts.numbered, facts.validated, facts.phase = role.numbered, role.streams.validated, role.phase
    elif isinstance(machine, SecondaryMachine):
        _secondary(machine, facts)
    elif alive and isinstance(machine, OpenerMachine):
        facts.open = machine.role.phase in OPEN
        if machine.role.phase is takeover.Phase.DONE and machine.role.report.drained:
            facts.done_at = machine.role.report.number
    return facts


def _secondary(machine: SecondaryMachine, facts: Facts) -> None:
    state = decode_secondary(machine.superblock)
    durable = machine.frames[: machine.durable]
    notes = [frame[0] for kind, frame in durable if kind == "note" and frame[1] >= state.epoch.number]
    facts.rows = rows_of(durable)
    facts.held = max([state.held, state.prepared, state.validated, *notes, *(row.last for row in facts.rows)])
    facts.active, facts.number = state.active, state.number
    facts.volume = tuple(sorted(machine.volume.items()))
    if machine.role is not None:
        facts.applied = machine.role.applied
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
