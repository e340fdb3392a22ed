"""Canonical states: what cannot matter any more in these scopes is forgotten: states that differ in it are one.

Each line below says why it cannot matter. `test_reductions.py` compares the verdicts with and without.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from blockrepl.formats.link import BULK, LinkRole, Message, decode_body, decode_header, encode
from blockrepl.formats.state import decode_intermediate, encode_intermediate
from blockrepl.replication import opening, primary, takeover
from tests.sim.model.machines import (
    FREE,
    IntermediateMachine,
    Machine,
    OpenerMachine,
    PrimaryMachine,
    SecondaryMachine,
)

# What an opener reads of a WELCOME: who is there, and epochs. The numbers count in PROMISED.
_TO_OPENER = dict.fromkeys(("through", "batch", "credit", "validated", "prepared", "applied", "pair"), 0)
_DULL: dict[int, dict[str, Any]] = {
    Message.ACK: {"validated": 0},  # a primary wants it for its bits only, and here nobody suspends (fence data)
    Message.PREPARED: {"applied": 0},  # for people
    Message.PROMISED: {"applied": 0, "numbered": 0},  # for the report of what is lost
    Message.STORED: {"applied": 0, "discarded_writes": 0, "discarded_bytes": 0},  # likewise
}
_REPORT = ("through", "credit", "validated", "prepared", "active", "epoch", "promised", "link")


def canonical(data: bytes, *, to_opener: bool) -> bytes:
    """A message without what its reader does not look at."""
    view = memoryview(data)
    head = decode_header(view)
    if head.type in BULK:
        return data
    fields = decode_body(head, view)
    dull = dict(_DULL.get(head.type, {}))
    if head.type == Message.WELCOME:
        dull = _TO_OPENER if to_opener else {"applied": 0}
        if fields["role"] == LinkRole.INTERMEDIATE:
            dull = {**dull, "validated": 0}  # as in ACK
    elif head.type == Message.HELLO and fields["role"] == LinkRole.INTERMEDIATE:
        dull = {"highest": 0, "promised": fields["epoch"]}  # a secondary asks for epoch and incarnation
    return encode(Message(head.type), head.epoch, **{**fields, **dull}) if dull else data


def forget(machine: Machine) -> None:
    """In place."""
    if isinstance(machine, PrimaryMachine):
        machine.told = sorted(set(machine.told))
        machine.submitted = []
        if machine.role is not None:
            _primary(machine.role)
    elif isinstance(machine, IntermediateMachine):
        _intermediate(machine)
    elif isinstance(machine, SecondaryMachine):
        if machine.role is not None:
            _secondary(machine.role)
    elif isinstance(machine, OpenerMachine) and machine.role is not None:
        _opener(machine.role)
    for name in ("volume", "platter"):
        if hasattr(machine, name):
            setattr(machine, name, dict(sorted(getattr(machine, name).items())))


def _primary(role: Any) -> None:
    role.validated = 0  # for bits
    role.unconfirmed.clear()
    role._credit_used = 0  # the ring of the model is never full
    role.checkpoints._bytes = 0  # checkpoints come by time
    if role.phase in (primary.Phase.LIVE, primary.Phase.DETACHED):  # what was welcomed has been done
        role.joining._welcome, role.joining._nonce = {}, b""


def _intermediate(machine: IntermediateMachine) -> None:
    machine.superblock = _without_checkpoints(machine.superblock)
    if machine.saving:
        machine.saving = (_without_checkpoints(machine.saving[0]), *machine.saving[1:])
    role = machine.role
    if role is None:
        return
    for sender in role.senders.by_node.values():
        sender.checkpoint = 0  # nothing is trimmed
        sender.credit_used = 0
    role.senders.free_bytes = FREE
    for stream in role.streams.by_node.values():
        stream.applied = stream.total_writes = stream.total_bytes = 0  # for people
        stream.credit_used = 0
        stream.waiting_bytes = 0  # far from a helping
    role.streams._bytes_since_round, role.streams._last_round_s = 0, 0.0  # rounds come at any time
    if role.phase not in (opening.Phase.OPENING, opening.Phase.STORING):
        role.opening._answers = set()
    if role.phase is opening.Phase.FENCED:
        role.opening._reports = {}  # they are not asked any more
    reports = role.opening._reports
    role.opening._reports = {node: {name: reports[node][name] for name in _REPORT} for node in sorted(reports)}
    for name in ("_hello_links", "_heard_s", "_nonces"):
        setattr(role, name, dict(sorted(getattr(role, name).items())))
    for table in (role.senders, role.streams):
        table.by_link = dict(sorted(table.by_link.items()))


@lru_cache(maxsize=1 << 14)
def _without_checkpoints(superblock: bytes) -> bytes:
    state = decode_intermediate(superblock)
    for row in state.primaries:
        row.checkpoint = 0
    return encode_intermediate(state)


def _secondary(role: Any) -> None:
    role.numbered_seen = 0  # for the report of what is lost
    role._told_applied = role._unsynced_bytes = role._credit_used = 0
    role.epochs._discarded, role.epochs._counted = (0, 0, 0, 0), (0, 0)
    if not role.epochs._truncating:
        role.epochs._last_kept = 0


def _opener(role: Any) -> None:
    calls = role.calls
    report = role.report
    report.discarded_writes = report.discarded_bytes = report.lost_writes = 0
    report.epoch_id, report.pair, report.lost_s = "", "", None
    role.problem = role.hint = ""
    role._kept_ns = role._newest_ns = 0
    if not role.open:  # all links are closed: nothing follows but what the report says
        calls.links, calls.welcomes, calls.silent = {}, {}, {}
        role._answers, role._intermediate, role._tries = {}, {}, 0
        return
    if role.phase in (takeover.Phase.STORING, takeover.Phase.ACTIVATING):
        role._answers = {node: {} for node in sorted(role._answers)}  # they are counted
    else:
        role._answers = dict(sorted(role._answers.items()))
    if role.phase in (takeover.Phase.DRAINING, takeover.Phase.PROMISING):  # whether the intermediate knows them all
        kept = ("epoch", "rolling")
        calls.welcomes = {node: {name: said[name] for name in kept} for node, said in calls.welcomes.items()}
    elif role.phase is not takeover.Phase.GREETING:
        calls.welcomes = {node: {} for node in calls.welcomes}  # the epochs in them were looked at
    calls.welcomes = dict(sorted(calls.welcomes.items()))
    calls.silent = dict.fromkeys(sorted(calls.silent), "")
    calls.links = dict(sorted(calls.links.items()))
