"""What data nodes say of themselves; docs/status.md."""

from __future__ import annotations

from typing import Any

from blockrepl.formats.link import Pair
from blockrepl.node.base import epoch_json
from blockrepl.node.primary_host import PrimaryHost
from blockrepl.node.secondary_host import SecondaryHost
from blockrepl.replication import secondary
from blockrepl.replication.primary import Primary
from blockrepl.replication.secondary import Secondary


def source_pair(role: Primary) -> str:
    """Of the volumes of a primary role: its own state while it is suspended, else the group's as it was told."""
    if role.state.suspended:
        return Pair(role.state.suspended).name
    return role.pair.name if role.live else "PSUE"


def source_status(host: PrimaryHost, names: dict[int, str]) -> dict[str, Any]:
    """Of a data node whose volumes are copied from. ``names``: of volumes, by id."""
    role = host.role
    copier = role.resyncing.copier
    return {
        "state": role.phase.value,
        "reason": role.why_held(),
        "epoch": epoch_json(role.state.epoch),
        "promised": epoch_json(role.state.promised),
        "incarnation": role.state.incarnation,
        "watermarks": {
            "numbered": role.acked, "durable": role.acked, "sent": None, "prepared": None,
            "validated": role.validated, "applied": None, "checkpoint": role.state.checkpoint,
        },
        "pending": {"batches": len(role.queue), "bytes": role.queue.size_bytes},
        "pair": source_pair(role),
        "direction": role.state.direction,
        "suspended": Pair(role.state.suspended).name if role.state.suspended else None,
        "alone": role.state.alone,
        "trusted": role.state.trusted and (bool(role.state.suspended) or role.trusted),
        "out_of_sync_bytes": {names[volume]: bitmap.dirty_bytes for volume, bitmap in role.bitmaps.items()},
        "resync": {
            "id": copier.resync, "verify": copier.verify,
            "copied_bytes": copier.compared_bytes if copier.compares else copier.copied_bytes,
            "total_bytes": copier.total_bytes, "sent_bytes": copier.copied_bytes,
        }
        if copier is not None
        else None,
        "copied_bytes": host.copied_bytes,
    }  # fmt: skip


def target_pair(role: Secondary) -> str:
    """Of the volumes of a secondary role."""
    if role.phase is not secondary.Phase.FOLLOWING or not role.link:
        return "SSWS" if role.phase is secondary.Phase.ACTIVE else "PSUE"
    if role.state.split:
        return "PSUS"
    return "COPY" if role.state.copying else Pair(role.state.pair).name


def target_status(host: SecondaryHost) -> dict[str, Any]:
    """Of a data node that is copied to."""
    role = host.role
    return {
        "state": role.phase.value,
        "reason": role.reason,
        "epoch": epoch_json(role.state.epoch),
        "promised": epoch_json(role.state.promised),
        "watermarks": {
            "numbered": role.numbered_seen, "durable": max(role.state.held, role.state.prepared), "sent": None,
            "prepared": role.state.prepared, "validated": role.validated, "applied": role.applied,
            "checkpoint": role.state.applied,
        },
        "pair": Pair(role.state.pair).name,
        "direction": role.state.direction,
        "copying": role.state.copying,
        "copy_from": role.state.copy_from if role.state.copying and not role.state.initial else None,
        "copy_paused": host.paused or None,
        "undo_bytes": host.undo.used_bytes,
        "split": role.state.split,
        "out_of_sync_bytes": role.dirty_bytes,
    }  # fmt: skip
