"""``status``: a group as pairdisplay and drbdadm would show it. docs/status.md has the JSON."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Group as Lines
from rich.live import Live
from rich.table import Table
from rich.text import Text

from blockrepl.cli.asking import node_statuses, size_now, volume_entry
from blockrepl.cli.groups import group_pair, intermediate, resync_progress, sources
from blockrepl.cli.output import bytes_text, console, number_text, print_json
from blockrepl.cli.targets import File, Json, find
from blockrepl.definition import Definition, Volume
from blockrepl.errors import UsageError
from blockrepl.node.control_messages import Message

SCHEMA = 1
WATERMARKS = ("numbered", "durable", "prepared", "validated", "applied")
STATE_STYLES = {
    "PAIR": "green", "COPY": "cyan", "SMPL": "", "SSWS": "bold magenta", "PSUS": "yellow", "PSUE": "bold red",
    "PFUL": "yellow", "PFUS": "bold red", "down": "bold red", "silent": "bold red",
}  # fmt: skip


def status(
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="A definition file, or the name of a running group.")
    ] = None,
    interval: Annotated[
        str | None, typer.Argument(metavar="SECONDS", help="Repeat every so many seconds, until Ctrl-C.")
    ] = None,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Show pair states, watermarks, lag and journal fill.

    `status 2` repeats every 2 s.
    """
    if interval is None and target is not None and _is_number(target):
        target, interval = None, target
    definition = find(target, file)
    if interval is None:
        _show(definition, as_json)
    elif not _is_number(interval) or not 0 < float(interval) <= 86400:
        raise UsageError(f'"{interval}" is no interval', hint="write seconds, such as: blockrepl status 2")
    else:
        _repeat(definition, float(interval), as_json)


def merged(definition: Definition) -> Message:
    """The answers of all nodes as one document (docs/status.md)."""
    nodes = node_statuses(definition)
    by_name = {node["node"]: node for node in nodes}
    epochs = [node["epoch"] for node in nodes if isinstance(node.get("epoch"), dict)]
    copied, total = resync_progress(nodes)
    middle = intermediate(nodes)
    return {
        "schema": SCHEMA,
        "group": definition.name,
        "group_id": str(definition.group_id),
        "definition": str(definition.path),
        "epoch": max(epochs, key=lambda epoch: int(epoch.get("number") or 0), default=None),
        "pair": group_pair(nodes) if definition.replicated else "SMPL",
        "direction": next((node.get("direction") for node in [*sources(nodes), middle]), None),
        "out_of_sync_bytes": {
            "hop1": _hop1(nodes),
            "hop2": (middle.get("out_of_sync_bytes") or {}).get("hop2"),
        },
        "resync": {"copied_bytes": copied, "total_bytes": total} if total else None,
        "volumes": [_volume(definition, volume, by_name) for volume in definition.volumes],
        "nodes": nodes,
    }


def _hop1(nodes: list[Message]) -> int | None:
    """By the bitmaps of the sources; null when none answers."""
    known = [node["out_of_sync_bytes"] for node in sources(nodes) if isinstance(node.get("out_of_sync_bytes"), dict)]
    return sum(sum(each.values()) for each in known) if known else None


def _volume(definition: Definition, volume: Volume, nodes: dict[str, Message]) -> Message:
    """One volume with its ends (in volumes mode the intermediate too), and how far the second is behind."""
    pair = {"primary": volume.primary} | ({"secondary": volume.secondary} if volume.replicated else {})
    if volume.replicated and definition.volumes_mode:
        pair["intermediate"] = definition.intermediate.name
    ends = {}
    for role, name in pair.items():
        entry = volume_entry(nodes[name], volume.name) or {}
        ends[role] = {"node": name, "state": entry.get("state") or nodes[name].get("state")}
        ends[role] |= {key: entry.get(key) for key in ("role", "active", "attached", "nbd", "iscsi")}
    lag = _lag(definition, volume, nodes)
    return {"name": volume.name, "id": volume.id, "size_bytes": size_now(volume, nodes), **ends, "lag": lag}


def _lag(definition: Definition, volume: Volume, nodes: dict[str, Message]) -> Message | None:
    if not volume.replicated:
        return None
    for peer in nodes[definition.intermediate.name].get("peers") or []:
        if peer.get("node") in (volume.primary, volume.secondary) and "lag_writes" in peer:
            return {key: peer.get(f"lag_{key}") for key in ("writes", "bytes", "s")}
    return {"writes": None, "bytes": None, "s": None}


def _show(definition: Definition, as_json: bool) -> None:
    document = merged(definition)
    if as_json:
        print_json(document)
    else:
        console().print(_picture(document))


def _repeat(definition: Definition, interval_s: float, as_json: bool) -> None:
    """Redraw in place on a terminal, else print one after the other."""
    if as_json or not sys.stdout.isatty():
        while True:
            _show(definition, as_json)
            sys.stdout.flush()
            time.sleep(interval_s)
    with Live(_picture(merged(definition)), console=console(), auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            live.update(_picture(merged(definition)), refresh=True)


def _picture(document: Message) -> Lines:
    epoch = document["epoch"] or {}
    epoch_text = f"epoch {epoch['number']} ({str(epoch.get('id'))[:8]})" if "number" in epoch else "epoch -"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("VOLUME", "ROLE", "NODE", "STATE"):
        table.add_column(name, no_wrap=True)
    for name in (*(mark.upper() for mark in WATERMARKS), "LAG", "BYTES", "SECONDS", "JOURNAL"):
        table.add_column(name, justify="right", no_wrap=True)
    nodes = {node["node"]: node for node in document["nodes"]}
    shown: set[str] = set()
    for volume in document["volumes"]:
        for role, kind in (("primary", "P-VOL"), ("intermediate", "I-VOL"), ("secondary", "S-VOL")):
            if role in volume:
                end = volume[role]
                shown.add(end["node"])
                kind = end.get("role") or kind
                lag = volume["lag"] if kind == "S-VOL" else None
                _row(table, volume["name"], kind, nodes[end["node"]], end["state"], lag)
    for name, node in nodes.items():
        if name not in shown:
            _row(table, "-", str(node.get("role", "-")), node, node.get("state"), None)
    title = Text.assemble((str(document["group"]), "bold"), f"  {epoch_text}  {document['definition']}")
    return Lines(title, Text(_pair_text(document)), table, *_remarks(document))


def _pair_text(document: Message) -> str:
    """The group as a whole: its pair state, which way it copies, what is out of sync, how far a resync is."""
    way = {0: "primaries to secondaries", 1: "secondaries to primaries"}.get(document["direction"], "-")
    out = document["out_of_sync_bytes"]
    text = f"{document['pair']}  {way}  out of sync: hop 1 {bytes_text(out['hop1'])}, hop 2 {bytes_text(out['hop2'])}"
    if document["resync"]:
        copied, total = document["resync"]["copied_bytes"], document["resync"]["total_bytes"]
        text += f"  resync: {100 * copied // total}% of {bytes_text(total)}"
    return text


def _row(table: Table, volume: str, role: str, node: Message, state: Any, lag: Message | None) -> None:
    marks = node.get("watermarks") or {}
    journal = node.get("journal") or {}
    table.add_row(
        volume,
        role,
        str(node["node"]),
        Text(str(state or "-"), style=STATE_STYLES.get(str(state), "")),
        *(number_text(marks.get(mark)) for mark in WATERMARKS),
        number_text((lag or {}).get("writes")),
        bytes_text((lag or {}).get("bytes")),
        number_text((lag or {}).get("s")),
        _fill(journal),
    )


def _fill(journal: Message) -> str:
    used, size = journal.get("used_bytes"), journal.get("size_bytes")
    return f"{100 * used / size:.0f}%" if size and used is not None else "-"


def _remarks(document: Message) -> list[Text]:
    """One line for each thing an operator should see: nodes down, links down, a promise open."""
    remarks = []
    for node in document["nodes"]:
        if "error" in node:
            remarks.append(Text(f"{node['node']}: {node['error']}", style="red"))
        for text in (node.get("config") or {}).get("differs") or ():
            said = f"{node['node']}: the definition says otherwise: {text}"
            remarks.append(Text(said, style="yellow"))
        if reason := node.get("reason"):
            remarks.append(Text(f"{node['node']}: {reason}", style="yellow"))
        on_its_own = node.get("state") in ("fenced", "taken over")
        for peer in node.get("peers") or []:
            if peer.get("connected") is False and not on_its_own:
                remarks.append(Text(f"{node['node']}: no link to {peer.get('node')}", style="yellow"))
        if promised := node.get("promised"):
            number = promised.get("number") if isinstance(promised, dict) else promised
            own = (node.get("epoch") or {}).get("number")
            if own is not None and isinstance(number, int) and number > own:
                remarks.append(Text(f"{node['node']}: has promised epoch {number}", style="yellow"))
    return remarks


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isascii() and text.replace(".", "", 1).isdigit()
