"""PERSISTENT RESERVE IN and OUT: between the wire, the value in `reservations`, and the volume that keeps it."""

from __future__ import annotations

from blockrepl.block import Op, WriteBatch, WriteFlag
from blockrepl.formats import scsi_reservation as layout
from blockrepl.formats.scsi import Asc
from blockrepl.formats.scsi_reservation import OUT_LIST_BYTES, InAction, OutAction, OutFlag, Type
from blockrepl.frontends.iscsi.scsi.nexus_state import NexusState
from blockrepl.frontends.iscsi.scsi.refusal import Refusal, bad_parameter, illegal, write_refusal
from blockrepl.frontends.iscsi.scsi.reservations import Outcome, Request, Reservations, perform
from blockrepl.frontends.iscsi.scsi.transfer import add, first_error, submit
from blockrepl.frontends.iscsi.scsi.unit import PENDING, Answer, LogicalUnit
from blockrepl.frontends.iscsi.scsi.work import joined
from blockrepl.frontends.iscsi.task import Task


def reserve_in(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """PERSISTENT RESERVE IN (SPC-4, 6.15)."""
    room = int.from_bytes(task.cdb[7:9], "big")
    now = unit.reservations
    action = task.cdb[1] & 0x1F
    if action == InAction.REPORT_CAPABILITIES:
        return _capabilities(now)[:room]
    body = {InAction.READ_KEYS: _keys, InAction.READ_RESERVATION: _reservation, InAction.READ_FULL_STATUS: _full}[
        InAction(action)
    ](now)
    head: bytes = layout.in_head.build({"generation": now.generation, "additional_bytes": len(body)})
    return (head + body)[:room]


def _keys(now: Reservations) -> bytes:
    return b"".join(each.key.to_bytes(8, "big") for each in now.registrations.values())


def _reservation(now: Reservations) -> bytes:
    if now.type == Type.NONE:
        return b""
    key = now.registrations[now.holder].key if now.holder else 0
    data: bytes = layout.reservation_descriptor.build({"key": key, "type": now.type})
    return data


def _capabilities(now: Reservations) -> bytes:
    data: bytes = layout.capabilities.build(
        {
            "can": layout.ATP_C | layout.PTPL_C,
            "state": layout.TMV | layout.ALLOW_COMMANDS | (layout.PTPL_A if now.aptpl else 0),
            "types": layout.ALL_TYPES,
        }
    )
    return data


def _full(now: Reservations) -> bytes:
    return b"".join(
        layout.full_status.build(
            {
                "key": each.key,
                "flags": (layout.FULL_ALL_TG_PT if each.all_ports else 0) | (layout.R_HOLDER if now.holds(port) else 0),
                "scope_type": now.type if now.holds(port) else 0,
                "relative_port": 0 if each.all_ports else each.relative_port,
                "transport_id_bytes": len(port),
            }
        )
        + port
        for port, each in now.registrations.items()
    )


def reserve_out(unit: LogicalUnit, task: Task, state: NexusState) -> Answer:
    """PERSISTENT RESERVE OUT (SPC-4, 6.16): complete when the change is durable wherever the volume is."""
    request = parse(task, state)

    def change() -> None:
        try:
            outcome = Outcome(unit.reservations) if task.aborted else perform(unit.reservations, request)
        except Refusal as refusal:
            unit.refuse(task, refusal)
            unit.reservations_changed()
            return
        if outcome.after == unit.reservations:
            _change(unit, task, outcome)
        else:
            _keep(unit, task, outcome)

    unit.change_reservations(change)
    return PENDING


def parse(task: Task, state: NexusState) -> Request:
    """Raises Refusal."""
    cdb = task.cdb
    action = cdb[1] & 0x1F
    size = int.from_bytes(cdb[5:9], "big")
    moves = action == OutAction.REGISTER_AND_MOVE
    data = bytes(joined(task.data_out)) if task.data_out else b""
    if len(data) < size or size < OUT_LIST_BYTES or (not moves and not data[20] & OutFlag.SPEC_I_PT and size != 24):
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    nexus = state.nexus
    scope, kind = cdb[2] >> 4, cdb[2] & 0x0F
    if not moves:
        fields = layout.out_list.parse(data)
        return Request(
            action, scope, kind, fields.key, fields.action_key, fields.flags, nexus.transport_id, nexus.portal_group
        )
    fields = layout.move_list.parse(data)
    port = data[OUT_LIST_BYTES : OUT_LIST_BYTES + fields.transport_id_bytes]
    if len(port) != fields.transport_id_bytes or not 24 <= len(port) <= layout.TRANSPORT_ID_BYTES:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if port[0] != 0x45:  # iSCSI, an initiator port
        raise bad_parameter(OUT_LIST_BYTES)
    return Request(
        action, scope, kind, fields.key, fields.action_key, fields.flags, nexus.transport_id, fields.relative_port,
        port,
    )  # fmt: skip


def _keep(unit: LogicalUnit, task: Task, outcome: Outcome) -> None:
    """Make the new value durable, then let it hold."""

    def kept(batch: WriteBatch) -> None:
        error = first_error(batch)
        if error is not None:
            unit.refuse(task, write_refusal(error))
            unit.reservations_changed()
        else:
            unit.reservations = outcome.after
            _change(unit, task, outcome)

    payload = memoryview(outcome.after.pack())
    batch = WriteBatch(kept)
    add(batch, Op.METADATA, 0, len(payload), payload, int(WriteFlag.FUA))
    submit(unit, batch)


def _change(unit: LogicalUnit, task: Task, outcome: Outcome) -> None:
    """Tell everybody, end the tasks that were preempted, end the command."""
    unit.attend(dict(outcome.attentions))
    victims = [each for each in unit.outstanding() if each.nexus.transport_id in outcome.aborts and each is not task]

    def ended() -> None:
        unit.finish(task)
        unit.reservations_changed()

    if victims:
        unit.abort(victims, task.nexus, ended)
    else:
        ended()
