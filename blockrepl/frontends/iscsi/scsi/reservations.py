"""Persistent reservations of one logical unit: a value, and what PERSISTENT RESERVE OUT makes of it. No I/O.

Source: SPC-4 section 5.12. A change is a new value; it holds only once it is durable (`LogicalUnit` sees to that), as
if APTPL were always set: a node's restart or a takeover is no loss of power of the logical unit, which lives as long
as its group. For the same reason a registration is an initiator port's, whatever target port it came through: after a
takeover the disk is behind another port, and its registrations and its reservation are still those of the same hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from construct import ConstructError, StreamError

from blockrepl.errors import DamagedError
from blockrepl.formats import scsi_reservation as layout
from blockrepl.formats.scsi import Asc
from blockrepl.formats.scsi_reservation import (
    ALL_REGISTRANTS,
    EXCLUSIVE_ACCESS,
    MAX_REGISTRATIONS,
    NOBODY,
    REGISTRANTS,
    OutAction,
    OutFlag,
    Type,
)
from blockrepl.frontends.iscsi.scsi.commands import Access
from blockrepl.frontends.iscsi.scsi.refusal import bad_cdb, bad_parameter, conflict, illegal

_GENERATION_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Registration:
    """Of one initiator port."""

    key: int
    relative_port: int  # the target port through which it was made
    all_ports: bool = False


@dataclass(frozen=True, slots=True)
class Reservations:
    """``holder`` is the TransportID of who holds the reservation; b"" when nobody or all registrants do.

    Invariant: ``holder`` is registered; ``type`` is NONE when there are no registrations.
    """

    generation: int = 0
    type: int = Type.NONE
    holder: bytes = b""
    aptpl: bool = False
    registrations: Mapping[bytes, Registration] = field(default_factory=dict)

    # questions

    def holds(self, port: bytes) -> bool:
        """Whether this initiator port holds the reservation."""
        if self.type in ALL_REGISTRANTS:
            return port in self.registrations
        return self.type != Type.NONE and port == self.holder

    def forbids(self, port: bytes, access: int) -> bool:
        """Whether a command conflicts (SPC-4, table 66)."""
        if access == Access.RESERVATION:
            return bool(self.registrations)
        if self.type == Type.NONE or access not in (Access.READ, Access.WRITE) or self.holds(port):
            return False
        if self.type in REGISTRANTS and port in self.registrations:
            return False
        return access == Access.WRITE or self.type in EXCLUSIVE_ACCESS

    # kept form

    def pack(self) -> bytes:
        """As it is kept with the volume."""
        ports = list(self.registrations)
        head = layout.kept_head.build(
            {
                "flags": layout.KEPT_APTPL if self.aptpl else 0,
                "type": self.type,
                "generation": self.generation,
                "holder": ports.index(self.holder) if self.holder else NOBODY,
                "count": len(ports),
            }
        )
        return b"".join(
            [
                head,
                *(
                    layout.kept_registration.build(
                        {
                            "key": each.key,
                            "relative_port": each.relative_port,
                            "flags": layout.FULL_ALL_TG_PT if each.all_ports else 0,
                            "transport_id_bytes": len(port),
                            "transport_id": port,
                        }
                    )
                    for port, each in self.registrations.items()
                ),
            ]
        )

    @classmethod
    def unpack(cls, data: bytes) -> Reservations:
        """From `pack`; of no bytes, none. Raises DamagedError."""
        if not data:
            return cls()
        try:
            head = layout.kept_head.parse(data)
            at = layout.kept_head.sizeof()
            registrations: dict[bytes, Registration] = {}
            for _ in range(head.count):
                each = layout.kept_registration.parse(data[at:])
                at += 14 + each.transport_id_bytes
                registrations[each.transport_id] = Registration(
                    each.key, each.relative_port, bool(each.flags & layout.FULL_ALL_TG_PT)
                )
            holder = b"" if head.holder == NOBODY else list(registrations)[head.holder]
            kind = Type(head.type)
        except (ConstructError, StreamError, IndexError, ValueError) as error:
            raise DamagedError(f"persistent reservations kept with the volume cannot be read: {error}") from error
        return cls(head.generation, kind, holder, bool(head.flags & layout.KEPT_APTPL), registrations)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an action comes to: the next value, and who hears of it (TransportID → additional sense code)."""

    after: Reservations
    attentions: Mapping[bytes, int] = field(default_factory=dict)
    aborts: tuple[bytes, ...] = ()  # PREEMPT AND ABORT: whose tasks end


class Request:
    """One PERSISTENT RESERVE OUT, parsed."""

    __slots__ = ("action", "action_key", "flags", "key", "move_to", "port", "relative_port", "scope", "type")

    def __init__(
        self, action: int, scope: int, kind: int, key: int, action_key: int, flags: int, port: bytes,
        relative_port: int, move_to: bytes = b"",
    ) -> None:  # fmt: skip
        self.action = action
        self.scope = scope
        self.type = kind
        self.key = key
        self.action_key = action_key
        self.flags = flags
        self.port = port
        self.relative_port = relative_port
        self.move_to = move_to


def perform(now: Reservations, request: Request) -> Outcome:
    """Raises Refusal; ``now`` itself when nothing changes."""
    if request.action in (OutAction.REGISTER, OutAction.REGISTER_AND_IGNORE_EXISTING_KEY):
        return _register(now, request)
    registration = now.registrations.get(request.port)
    if registration is None or registration.key != request.key:
        raise conflict()
    return _ACTIONS[request.action](now, request)


def _next(now: Reservations, **changes: object) -> Reservations:
    return replace(now, generation=(now.generation + 1) & _GENERATION_MASK, **changes)  # type: ignore[arg-type]


def _check_type(request: Request) -> None:
    if request.scope:
        raise bad_cdb(2, 7)
    if request.type not in Type.__members__.values() or request.type == Type.NONE:
        raise bad_cdb(2, 3)


def _register(now: Reservations, request: Request) -> Outcome:
    """SPC-4, 5.12.7: register, change a key, unregister."""
    if request.flags & OutFlag.SPEC_I_PT:
        raise bad_parameter(20, 3)
    existing = now.registrations.get(request.port)
    if request.action == OutAction.REGISTER and request.key != (existing.key if existing else 0):
        raise conflict()
    aptpl = bool(request.flags & OutFlag.APTPL)
    if request.action_key == 0:
        if existing is None:
            return Outcome(now)
        return _without(_next(now, aptpl=aptpl), [request.port], Asc.RESERVATIONS_RELEASED, request.port)
    if existing is None and len(now.registrations) >= MAX_REGISTRATIONS:
        raise illegal(Asc.INSUFFICIENT_REGISTRATION_RESOURCES)
    all_ports = bool(request.flags & OutFlag.ALL_TG_PT)
    registration = Registration(request.action_key, request.relative_port, all_ports)
    return Outcome(_next(now, aptpl=aptpl, registrations={**now.registrations, request.port: registration}))


def _without(now: Reservations, ports: list[bytes], released: int, by: bytes) -> Outcome:
    """Take registrations away, and the reservation with its last holder (SPC-4, 5.12.11.2)."""
    left = {port: each for port, each in now.registrations.items() if port not in ports}
    after = replace(now, registrations=left)
    gone = not left if now.type in ALL_REGISTRANTS else now.holder in ports
    if now.type == Type.NONE or not gone:
        return Outcome(after)
    tell = left if now.type in REGISTRANTS else {}
    return Outcome(replace(after, type=Type.NONE, holder=b""), {port: released for port in tell if port != by})


def _reserve(now: Reservations, request: Request) -> Outcome:
    _check_type(request)
    if now.type == Type.NONE:
        holder = b"" if request.type in ALL_REGISTRANTS else request.port
        return Outcome(replace(now, type=request.type, holder=holder))
    if not now.holds(request.port) or now.type != request.type:
        raise conflict()
    return Outcome(now)


def _release(now: Reservations, request: Request) -> Outcome:
    _check_type(request)
    if not now.holds(request.port):
        return Outcome(now)
    if now.type != request.type:
        raise illegal(Asc.INVALID_RELEASE_OF_PERSISTENT_RESERVATION)
    tell = now.registrations if now.type in REGISTRANTS else {}
    attentions = {port: int(Asc.RESERVATIONS_RELEASED) for port in tell if port != request.port}
    return Outcome(replace(now, type=Type.NONE, holder=b""), attentions)


def _clear(now: Reservations, request: Request) -> Outcome:
    attentions = {port: int(Asc.RESERVATIONS_PREEMPTED) for port in now.registrations if port != request.port}
    return Outcome(_next(now, type=Type.NONE, holder=b"", registrations={}), attentions)


def _preempt(now: Reservations, request: Request) -> Outcome:
    """SPC-4, 5.12.11.3 and table 68."""
    _check_type(request)
    victims = [port for port, each in now.registrations.items() if each.key == request.action_key]
    holder_key = now.registrations[now.holder].key if now.holder else 0
    if now.type in ALL_REGISTRANTS:
        takes = request.action_key == 0
        if takes:
            victims = [port for port in now.registrations if port != request.port]
    else:
        if request.action_key == 0:
            raise bad_parameter(8)
        takes = now.type != Type.NONE and request.action_key == holder_key
    if not victims and not takes:
        raise conflict()
    lost = [port for port in victims if port != request.port or not takes]
    left = {port: each for port, each in now.registrations.items() if port not in lost}
    attentions = {port: int(Asc.REGISTRATIONS_PREEMPTED) for port in lost if port != request.port}
    after = _next(now, registrations=left)
    if takes:
        holder = b"" if request.type in ALL_REGISTRANTS else request.port
        if request.type != now.type and now.type in REGISTRANTS:
            for port in left:
                if port != request.port:
                    attentions[port] = Asc.RESERVATIONS_RELEASED
        after = replace(after, type=request.type, holder=holder)
    elif now.type in ALL_REGISTRANTS and not left:
        after = replace(after, type=Type.NONE, holder=b"")
    aborts = tuple(lost) if request.action == OutAction.PREEMPT_AND_ABORT else ()
    return Outcome(after, attentions, aborts)


def _move(now: Reservations, request: Request) -> Outcome:
    """REGISTER AND MOVE (SPC-4, 5.12.8)."""
    if now.type == Type.NONE or not now.holds(request.port):
        raise conflict()
    if now.type in ALL_REGISTRANTS:
        raise conflict()
    if request.action_key == 0:
        raise bad_parameter(8)
    if request.move_to == request.port or not request.move_to:
        raise bad_parameter(24)
    registrations = dict(now.registrations)
    if request.flags & layout.UNREG:
        del registrations[request.port]
    registrations[request.move_to] = Registration(request.action_key, request.relative_port)
    aptpl = bool(request.flags & OutFlag.APTPL)
    return Outcome(_next(now, holder=request.move_to, registrations=registrations, aptpl=aptpl))


_ACTIONS: dict[int, Callable[[Reservations, Request], Outcome]] = {
    OutAction.RESERVE: _reserve,
    OutAction.RELEASE: _release,
    OutAction.CLEAR: _clear,
    OutAction.PREEMPT: _preempt,
    OutAction.PREEMPT_AND_ABORT: _preempt,
    OutAction.REGISTER_AND_MOVE: _move,
}
