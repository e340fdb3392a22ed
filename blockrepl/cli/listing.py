"""What `ls` shows: nodes, volumes, exports, attached devices, the iSCSI target and sessions of a group."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from blockrepl.cli.asking import node_statuses, size_now, volume_entry
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
        "target": _target(definition),
        "sessions": [
            {"node": node.name, **session}
            for node in definition.nodes
            for session in statuses[node.name].get("sessions") or []
        ],
    }


def _target(definition: Definition) -> Message | None:
    """The iSCSI target and its portals; a portal group is a node, its tag the node's id."""
    portals = [
        {"node": node.name, "address": portal, "tag": node.id}
        for node in definition.nodes
        for portal in node.iscsi or ()
    ]
    return {"name": definition.target_name, "portals": portals} if portals else None


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
    """``exports`` are the URIs that can be opened now, ``attached`` the loop devices that exist now, ``paths`` the
    states of its iSCSI paths by node."""
    exports, attached, paths = [], [], {}
    for name in (volume.primary, volume.secondary):
        entry = volume_entry(statuses.get(name, {}), volume.name) or {}
        address = definition.node(name).nbd if name in statuses else None
        if entry.get("active") is True and address is not None and "nbd" in volume.frontends:
            exports.append(f"nbd://{address}/{volume.name}")
        if iscsi := entry.get("iscsi"):
            paths[name] = iscsi["state"]
            if entry.get("active") is True:
                exports.append(str(iscsi["url"]))
        if entry.get("attached"):
            attached.append(str(entry["attached"]))
    return {
        "name": volume.name,
        "size_bytes": size_now(volume, statuses),
        "primary": volume.primary,
        "secondary": volume.secondary,
        "exports": exports,
        "attached": attached,
        "lun": definition.lun_of(volume) if paths else None,
        "paths": paths,
    }


def print_listing(groups: Sequence[Message]) -> None:
    """Nodes and volumes of each group; target and sessions where there are any."""
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
        if group["target"] is not None:
            console().print(_target_table(group), sep="\n")
        if group["sessions"]:
            console().print(_session_table(group["sessions"]), sep="\n")


def _target_table(group: Message) -> Table:
    """A row for each portal, with the LUNs behind it and the states of these paths."""
    table = _table("TARGET", "NODE", "TAG", "PORTAL", "LUNS")
    for portal in group["target"]["portals"]:
        node = portal["node"]
        luns = [f"{v['lun']}={v['name']} ({v['paths'][node]})" for v in group["volumes"] if node in v["paths"]]
        name = group["target"]["name"]
        table.add_row(name, node, str(portal["tag"]), portal["address"], ", ".join(luns) or "-")
    return table


def _session_table(sessions: Sequence[Message]) -> Table:
    """Connections of hosts: of NBD by export, of iSCSI by initiator."""
    table = _table("SESSION", "NODE", "PEER", "WHO", "REQUESTS", "IN FLIGHT")
    for session in sessions:
        kind = "iscsi discovery" if session.get("discovery") else session["frontend"]
        who = session.get("initiator") or session.get("volume") or "-"
        counts = (str(session["requests"]), str(session["in_flight"]))
        table.add_row(kind, session["node"], session["peer"], who, *counts)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
