"""``journal``: the records of an intermediate or a secondary, for people, whether the node runs or not."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table

from blockrepl.block import Op, WriteFlag
from blockrepl.cli.journal_reader import JournalReader
from blockrepl.cli.output import bytes_text, console, print_json
from blockrepl.cli.targets import File, Json, Target, find
from blockrepl.definition import Definition, Node
from blockrepl.errors import DamagedError, UsageError
from blockrepl.formats.journal import FrameHeader, FrameKind
from blockrepl.formats.record import OP_DIGEST, RecordHead, RecordKind, check_record, iterate_entries
from blockrepl.node.config_file import journal_path
from blockrepl.node.control_messages import Message
from blockrepl.node.create import journal_identity, state_files

OP_NAMES = {int(op): op.name.lower() for op in Op} | {OP_DIGEST: "digest"}


def journal(
    target: Target = None,
    file: File = None,
    node: Annotated[
        str | None, typer.Option("--node", metavar="NAME", help="Whose journal; the intermediate's otherwise.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, metavar="N", help="Only the newest N; 0 for all.")] = 20,
    entries: Annotated[bool, typer.Option("--entries", help="Also each write of a record.")] = False,
    as_json: Json = False,
) -> None:
    """Print the records of a node's journal, oldest first.

    Reads only; the node may run or not.
    """
    definition = find(target, file)
    chosen = definition.node(node) if node is not None else definition.intermediate
    if chosen.journal_path not in state_files(definition, chosen):
        others = ", ".join(each.name for each in definition.nodes if state_files(definition, each))
        raise UsageError(f"{chosen.name} has plain volumes only, and no journal", hint=f"journals are at {others}")
    reader = JournalReader(journal_path(definition, chosen), journal_identity(definition, chosen))
    try:
        frames, left_out = _newest(reader, limit)
        summary = _summary(definition, chosen, reader, left_out)
        described = [_describe(definition, reader, frame) for frame in frames]
        described = [record for record in described if record["kind"] != "gone"]
    finally:
        reader.close()
    if as_json:
        print_json({**summary, "records": described})
    else:
        _print(summary, described, entries)


def _newest(reader: JournalReader, limit: int) -> tuple[Sequence[FrameHeader], int]:
    """The newest frames but PADs, and how many older ones there are."""
    kept: deque[FrameHeader] = deque(maxlen=limit or None)
    seen = 0
    for frame in reader.frames():
        if frame.kind != FrameKind.PAD:
            kept.append(frame)
            seen += 1
    return kept, seen - len(kept)


def _summary(definition: Definition, node: Node, reader: JournalReader, left_out: int) -> Message:
    return {
        "schema": 1,
        "group": definition.name,
        "node": node.name,
        "ring_bytes": reader.ring_bytes,
        "used_bytes": reader.end - reader.head,
        "head": reader.head,
        "tail": reader.end,
        "left_out": left_out,
    }


def _describe(definition: Definition, reader: JournalReader, frame: FrameHeader) -> Message:
    """A frame as docs/command-line.md shows it. A damaged record says so."""
    common: Message = {"position": frame.position, "first": frame.first}
    if frame.kind == FrameKind.NOTE:
        return {**common, "kind": "note"}
    names = {each.id: each.name for each in definition.nodes}
    common |= {"last": frame.first + frame.count - 1, "from": names.get(frame.sender), "to": names.get(frame.stream)}
    try:
        body = reader.body(frame)
        head = check_record(body)
    except DamagedError as error:
        gone = reader.gave_up(frame)
        return {**common, "kind": "gone" if gone else "unreadable", "error": "" if gone else str(error)}
    return {
        **common,
        "kind": RecordKind(head.kind).name.lower() if head.kind in set(RecordKind) else str(head.kind),
        "epoch": head.epoch,
        "previous": head.previous,
        "incarnation": head.incarnation,
        "batch": head.batch,
        "time_ns": head.time_ns,
        "size_bytes": head.size_bytes,
        "entries": _entries(definition, head, body),
    }


def _entries(definition: Definition, head: RecordHead, body: memoryview) -> list[Message]:
    names = {volume.id: volume.name for volume in definition.volumes}
    return [
        {
            "number": head.first + place,
            "volume": names.get(volume, str(volume)),
            "op": OP_NAMES.get(op, str(op)),
            "flags": [flag.name.lower() for flag in WriteFlag if flag and flag & flags and flag.name],
            "offset_bytes": offset,
            "length_bytes": length,
        }
        for place, (volume, op, flags, offset, length, _) in enumerate(iterate_entries(head, body))
    ]


def _print(summary: Message, records: list[Message], with_entries: bool) -> None:
    out = console()
    fill = f"{bytes_text(summary['used_bytes'])} of {bytes_text(summary['ring_bytes'])}"
    out.print(f"journal of {summary['node']}: {fill} used, positions {summary['head']} to {summary['tail']}")
    if summary["left_out"]:
        out.print(f"{summary['left_out']} older ones are not shown: --limit 0 shows all")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("NUMBERS", "TIME", "KIND", "FROM", "TO", "AFTER", "EPOCH", "BATCH", "SIZE", "WHAT"):
        table.add_column(name, justify="right" if name in ("NUMBERS", "AFTER", "EPOCH", "BATCH", "SIZE") else "left")
    for record in records:
        table.add_row(*_row(record))
        for entry in record.get("entries", []) if with_entries else []:
            table.add_row(str(entry["number"]), *[""] * 8, _entry_text(entry))
    out.print(table if records else "nothing is kept: all that was written is stored where it belongs")


def _row(record: Message) -> list[str]:
    if record["kind"] == "note":
        return [str(record["first"]), "", "note", "", "", "", "", "", "", f"prepared {record['first']}"]
    first, last = record["first"], record["last"]
    numbers = str(first) if first == last else f"{first}-{last}"
    ends = [str(record[key] or "-") for key in ("from", "to")]
    if record["kind"] == "unreadable":
        return [numbers, "", "unreadable", *ends, "", "", "", "", record["error"]]
    time = datetime.fromtimestamp(record["time_ns"] / 1e9).isoformat(sep=" ", timespec="milliseconds")
    batch = f"{record['incarnation']}.{record['batch']}"
    size = bytes_text(record["size_bytes"])
    shown = [numbers, time, record["kind"], *ends, str(record["previous"]), str(record["epoch"]), batch, size]
    return [*shown, _what(record["entries"])]


def _what(entries: list[Message]) -> str:
    """One entry as it is; of several the volumes, operations and bytes."""
    if len(entries) == 1:
        return _entry_text(entries[0])
    parts = []
    for volume, op in dict.fromkeys((entry["volume"], entry["op"]) for entry in entries):
        lengths = [entry["length_bytes"] for entry in entries if (entry["volume"], entry["op"]) == (volume, op)]
        parts.append(f"{volume}: {len(lengths)} × {op}, {bytes_text(sum(lengths))}")
    return "; ".join(parts)


def _entry_text(entry: Message) -> str:
    flags = f" {' '.join(entry['flags'])}" if entry["flags"] else ""
    return f"{entry['volume']}: {entry['op']} {entry['length_bytes']} bytes at {entry['offset_bytes']}{flags}"
