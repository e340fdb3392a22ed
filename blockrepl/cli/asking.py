"""Asks every node of this machine at once, and knows which of them serves a volume now."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from blockrepl.cli.client import call
from blockrepl.definition import Definition, Node, Volume
from blockrepl.errors import BlockreplError, NotRunningError
from blockrepl.node.control_messages import Message

STATUS_TIMEOUT_S = 3.0
PATIENT_S = 15.0  # where something is done upon the answers: a busy node is not a silent one


def node_statuses(definition: Definition, timeout_s: float = STATUS_TIMEOUT_S) -> list[Message]:
    """One object per node of the group, in file order, as docs/status.md describes; never raises."""
    local = {node.name for node in definition.local_nodes()}
    with ThreadPoolExecutor(max_workers=max(1, len(definition.nodes))) as pool:
        return list(pool.map(lambda node: _ask(definition, node, node.name in local, timeout_s), definition.nodes))


def _ask(definition: Definition, node: Node, local: bool, timeout_s: float) -> Message:
    missing = {"schema": 1, "group": definition.name, "node": node.name, "role": node.role, "ready": False}
    if not local:
        return {**missing, "state": "elsewhere", "host": node.host}
    try:
        return call(node.directory, "status", timeout_s=timeout_s)
    except NotRunningError as error:
        return {**missing, "state": "down", "error": str(error)}
    except BlockreplError as error:
        return {**missing, "state": "silent", "error": str(error)}


def serving_node(definition: Definition, volume: Volume) -> Node:
    """Where hosts may use the volume: at its source. Raises NotRunningError."""
    statuses = {status["node"]: status for status in node_statuses(definition, PATIENT_S)}
    ends = [
        (name, volume_entry(statuses.get(name, {}), volume.name) or {}) for name in (volume.primary, volume.secondary)
    ]
    active = [(name, entry) for name, entry in ends if entry.get("active") is True]
    if active:
        return definition.node(max(active, key=lambda end: _newness(statuses[end[0]], end[1]))[0])
    states = ", ".join(
        f"{name} is {statuses[name].get('state', 'down')}"
        for name in (volume.primary, volume.secondary)
        if name in statuses
    )
    raise NotRunningError(
        f"no node of this machine serves {definition.name}/{volume.name}: {states}",
        hint=f"`blockrepl up {definition.path}` starts the nodes; `blockrepl takeover` makes the secondaries active",
    )


def _newness(status: Message, entry: Message) -> tuple[int, bool, bool]:
    """An old source may still answer after a takeover, and a split S-VOL may be used too."""
    epoch = int((status.get("epoch") or {}).get("number") or 0)
    return epoch, entry.get("state") == "SSWS", entry.get("role") == "P-VOL"


def attached_node(definition: Definition, volume: Volume) -> Node | None:
    """Where the volume has a loop device now."""
    for status in node_statuses(definition):
        entry = volume_entry(status, volume.name)
        if entry is not None and entry.get("attached"):
            return definition.node(str(status["node"]))
    return None


def volume_entry(status: Message, name: str) -> Message | None:
    """What a node's status says of one of its volumes."""
    for entry in status.get("volumes") or []:
        if entry.get("name") == name:
            return dict(entry)
    return None


def size_now(volume: Volume, statuses: dict[str, Message]) -> int:
    """What hosts see of a volume: as its nodes say, else as the definition does."""
    entries = [volume_entry(statuses.get(name, {}), volume.name) for name in (volume.primary, volume.secondary)]
    return next((int(each["size_bytes"]) for each in entries if each and "size_bytes" in each), volume.size_bytes)
