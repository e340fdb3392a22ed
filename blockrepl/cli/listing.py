"""What `ls` shows: nodes, volumes, exports and attached devices of a group."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from blockrepl.cli.asking import node_statuses, volume_entry
from blockrepl.cli.output import bytes_text, console
from blockrepl.definition import Definition, Node, Volume
from blockrepl.node.control_messages import Message


def describe(definition: Definition) -> Message:
    """A group as one object; ``state`` is what each node says, "down" when it does not answer."""
    statuses = {status["node"]: status for status in node_statuses(definition)}
    return {
        "name": definition.name,
        "id": str(definition.group_id),
        "definition": str(definition.path),
        "nodes": [_node(node, statuses[node.name]) for node in definition.nodes],
        "volumes": [_volume(definition, volume, statuses) for volume in definition.volumes],
    }


def _node(node: Node, status: Message) -> Message:
    return {
        "name": node.name,
        "role": node.role,
        "host": node.host,
        "state": status.get("state"),
        "pid": status.get("pid"),
        "listen": node.listen,
        "nbd": node.nbd,
        "directory": str(node.directory),
    }


def _volume(definition: Definition, volume: Volume, statuses: dict[str, Message]) -> Message:
    """``exports`` are the NBD URIs that can be opened now, ``attached`` the loop devices that exist now."""
    exports, attached = [], []
    for name in (volume.primary, volume.secondary):
        entry = volume_entry(statuses.get(name, {}), volume.name) or {}
        address = definition.node(name).nbd if name in statuses else None
        if entry.get("active") is True and address is not None and "nbd" in volume.frontends:
            exports.append(f"nbd://{address}/{volume.name}")
        if entry.get("attached"):
            attached.append(str(entry["attached"]))
    return {
        "name": volume.name,
        "size_bytes": volume.size_bytes,
        "primary": volume.primary,
        "secondary": volume.secondary,
        "exports": exports,
        "attached": attached,
    }


def print_listing(groups: Sequence[Message]) -> None:
    """Two tables for each group."""
    for group in groups:
        console().print(Text.assemble((group["name"], "bold"), f"  {group['definition']}"))
        nodes = _table("NODE", "ROLE", "STATE", "PID", "LISTEN", "NBD", "DIRECTORY")
        for node in group["nodes"]:
            cells = (node[key] for key in ("name", "role", "state", "pid", "listen", "nbd", "directory"))
            nodes.add_row(*(str(cell) if cell is not None else "-" for cell in cells))
        volumes = _table("VOLUME", "SIZE", "PRIMARY", "SECONDARY", "EXPORTS", "ATTACHED")
        for volume in group["volumes"]:
            volumes.add_row(
                volume["name"],
                bytes_text(volume["size_bytes"]),
                volume["primary"],
                volume["secondary"],
                " ".join(volume["exports"]) or "-",
                " ".join(volume["attached"]) or "-",
            )
        console().print(nodes, volumes, sep="\n")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
