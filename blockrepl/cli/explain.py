"""``explain``: why a group is in its state, what a takeover now would lose, what parted when, and what to type next."""

from __future__ import annotations

import contextlib
from typing import Any

from blockrepl.cli.asking import PATIENT_S, node_statuses
from blockrepl.cli.client import call
from blockrepl.cli.groups import (
    answering,
    epoch_number,
    group_pair,
    group_reason,
    intermediate,
    resync_progress,
    sources,
    targets,
)
from blockrepl.cli.losses import what_is_lost
from blockrepl.cli.output import bytes_text, console, print_json
from blockrepl.cli.targets import File, Json, Target, find
from blockrepl.definition import Definition
from blockrepl.errors import BlockreplError
from blockrepl.node.control_messages import Message

SHOWN_WRITES = 20
DRY_RUN_S = 60.0
MEANING = {
    "SMPL": "there is no pair: hosts write, nothing is copied, everything counts as different",
    "COPY": "a copy is under way; until it ends a takeover goes back to the number before it",
    "PAIR": "every write is at the intermediate when it completes, and follows to the secondaries in order",
    "PSUS": "split on purpose: the secondaries stay at one number",
    "PSUE": "suspended by an error",
    "PFUL": "as PAIR, but the intermediate's journal is above its high-water mark",
    "PFUS": "the journal was full: what it gave up is kept as bits; the copy comes back by itself",
    "SSWS": "the other site has taken over; its volumes are the truth now",
}


def explain(target: Target = None, file: File = None, as_json: Json = False) -> None:
    """Say why the group is in its state, and what to type next.

    What a takeover now would lose, when the sites parted, and which writes of an old primary nobody else has.
    """
    definition = find(target, file)
    document = explained(definition)
    if as_json:
        print_json(document)
    else:
        _print(document)


def explained(definition: Definition) -> Message:
    """The document of `explain --json` (docs/command-line.md)."""
    statuses = node_statuses(definition, PATIENT_S)
    pair = group_pair(statuses)
    old = _old_sources(statuses)
    unreplicated = _unreplicated(definition, old, statuses)
    document: Message = {
        "schema": 1,
        "group": definition.name,
        "pair": pair,
        "meaning": MEANING[pair],
        "reason": group_reason(statuses),
        "nodes": [_node(status) for status in statuses],
        "resync": dict(zip(("copied_bytes", "total_bytes"), resync_progress(statuses), strict=True)),
        "takeover": _takeover(definition, statuses, pair),
        "epochs": _epochs(statuses),
        "old_sources": [str(status["node"]) for status in old],
        "unreplicated": unreplicated,
    }
    document["ways"] = _ways(definition, pair, statuses, old)
    document["next"] = _next(definition, pair, statuses, old)
    return document


def _node(status: Message) -> Message:
    keys = ("node", "role", "state", "reason", "pair", "out_of_sync_bytes", "error")
    return {key: status.get(key) for key in keys if status.get(key) not in (None, "")}


def _old_sources(statuses: list[Message]) -> list[Message]:
    """Sources that work in an older epoch than the newest one: the other side has taken over."""
    served = sources(statuses)
    newest = max((epoch_number(status) for status in served), default=0)
    taken = any(status.get("suspended") == "SSWS" for status in served)
    return [status for status in served if taken and epoch_number(status) < newest]


def _unreplicated(definition: Definition, old: list[Message], statuses: list[Message]) -> list[Message]:
    """Writes of old sources above the number at which the other side took over: from what they remember, from their
    bitmaps, and from the intermediate's journal, which also knows those of a source that was restarted.
    """
    number = _taken_number(statuses)
    names = {str(status["node"]) for status in old}
    found: list[Message] = []
    for name in sorted(names):
        with contextlib.suppress(BlockreplError):
            answer = call(definition.node(name).directory, "bitmap", {})
            writes = [{"node": name, **write} for write in answer.get("open_writes") or []]
            found += [each for each in writes if None in (each["number"], number) or each["number"] > number]
            for volume in answer.get("volumes") or []:
                found += [{"node": name, "volume": volume["volume"], "number": None, **run} for run in volume["ranges"]]
    known = {(each["volume"], each["offset_bytes"], each["length_bytes"]) for each in found}
    if names and number is not None:
        for write in _journaled(definition, names, number):
            if (write["volume"], write["offset_bytes"], write["length_bytes"]) not in known:
                found.append(write)
    return found


def _journaled(definition: Definition, names: set[str], number: int) -> list[Message]:
    """Writes of these nodes above a number that the intermediate's journal has, if it lies on this machine."""
    from blockrepl.cli.journal_reader import JournalReader
    from blockrepl.formats.journal import FrameKind
    from blockrepl.formats.record import RecordKind, check_record, iterate_entries
    from blockrepl.node.config_file import journal_path
    from blockrepl.node.create import journal_identity

    node = definition.intermediate
    senders = {each.id: each.name for each in definition.nodes if each.name in names}
    volumes = {volume.id: volume.name for volume in definition.volumes}
    found: list[Message] = []
    try:
        reader = JournalReader(journal_path(definition, node), journal_identity(definition, node))
    except BlockreplError:
        return []
    try:
        for frame in reader.frames():
            if frame.kind != FrameKind.RECORD or frame.first <= number or frame.sender not in senders:
                continue
            with contextlib.suppress(BlockreplError):
                body = reader.body(frame)
                head = check_record(body)
                if head.kind == RecordKind.UPDATE:
                    found += [
                        {
                            "node": senders[frame.sender], "volume": volumes.get(volume), "number": frame.first + place,
                            "offset_bytes": offset, "length_bytes": length,
                        }
                        for place, (volume, _, _, offset, length, _) in enumerate(iterate_entries(head, body))
                    ]  # fmt: skip
    finally:
        reader.close()
    return found


def _taken_number(statuses: list[Message]) -> int | None:
    """Where the newest takeover began: what the side that took over has."""
    numbers = [status["taken_at"] for status in sources(statuses) if status.get("taken_at") is not None]
    return max(numbers, default=None)


def _takeover(definition: Definition, statuses: list[Message], pair: str) -> Message | None:
    """What one would lose now, by asking for a dry run; null where there is nothing to take over."""
    followers = targets(statuses)
    if not followers or pair == "SSWS":
        return None
    try:
        node = definition.node(str(followers[0]["node"]))
        result = call(node.directory, "takeover", {"dry_run": True}, timeout_s=DRY_RUN_S)
    except BlockreplError as error:
        return {"possible": False, "why": str(error), "hint": error.hint}
    keys = (
        "number",
        "drained",
        "lost_writes",
        "lost_bytes",
        "counted",
        "alone",
        "lossless",
        "lost_s",
        "out_of_sync_bytes",
        "rolled_back_from",
        "initial",
    )
    found = {key: result.get(key) for key in ("missing", *keys)}
    return {"possible": True, **found, "alone_bytes": _alone_bytes(definition, statuses)}


def _alone_bytes(definition: Definition, statuses: list[Message]) -> int | None:
    """What the sources' bitmaps say that only they have; None unless every one of them answers."""
    known = sources(statuses)
    direction = int(known[0].get("direction") or 0) if known else 0
    if {node.name for node in definition.sources(direction)} - {str(status["node"]) for status in known}:
        return None
    return sum(sum((status.get("out_of_sync_bytes") or {}).values()) for status in known)


def _epochs(statuses: list[Message]) -> list[Message]:
    """The history of every node as one list: an epoch, the number it ended at, and who worked in it."""
    found: dict[tuple[int, str], Message] = {}
    for status in answering(statuses):
        current = status.get("epoch")
        rows = [*(status.get("history") or []), *([{**current, "last": None}] if current else [])]
        for row in rows:
            key = (int(row["number"]), str(row["id"]))
            entry = found.setdefault(key, {"number": row["number"], "id": row["id"], "last": {}, "nodes": []})
            entry["nodes"].append(status["node"])
            if row["last"] is not None:
                entry["last"][status["node"]] = row["last"]
    return [found[key] for key in sorted(found)]


def _ways(definition: Definition, pair: str, statuses: list[Message], old: list[Message]) -> list[str]:
    """After a takeover: which side's data is to stay."""
    if pair != "SSWS":
        return []
    newer = ", ".join(str(status["node"]) for status in sources(statuses) if status not in old)
    older = ", ".join(str(status["node"]) for status in old) or "the other site"
    name = definition.name
    return [
        f"keep what {newer} wrote: `blockrepl pair resync {name} --swap`; what only {older} has is overwritten",
        f"keep what {older} has: there, `blockrepl pair resync {name} --swap --force`; "
        f"what {newer} wrote since the takeover is overwritten",
    ]


def _next(definition: Definition, pair: str, statuses: list[Message], old: list[Message]) -> list[str]:
    """Commands, the first one first."""
    name = definition.name
    down = [str(status["node"]) for status in statuses if status.get("state") == "down"]
    failed = [str(status["node"]) for status in statuses if status.get("state") == "failed"]
    steps = [f"blockrepl up {definition.path} --node {node}" for node in down]
    steps += [f"see {definition.node(node).directory / 'node.log'}, then start {node} again" for node in failed]
    middle = intermediate(statuses)
    if pair == "SSWS":
        steps.append(f"blockrepl pair resync {name} --swap")
    elif middle.get("state") == "fenced" and not down:
        steps.append(f"blockrepl replace {name} --node {middle['node']}")
    elif pair == "SMPL":
        steps.append(f"blockrepl pair create {name}")
    elif pair in ("PSUS", "PSUE") and not down:
        trusted = all(status.get("trusted") is not False for status in sources(statuses))
        steps.append(f"blockrepl pair resync {name}" + ("" if trusted else " --verify"))
    elif pair in ("COPY", "PFUS"):
        steps.append(f"blockrepl pair wait {name} -s PAIR")
    return steps


def _print(document: Message) -> None:
    out = console()
    out.print(f"{document['group']} is in {document['pair']}: {document['meaning']}.")
    if document["reason"]:
        out.print(f"why: {document['reason']}")
    for node in document["nodes"]:
        if node.get("reason") or node.get("error"):
            out.print(f"  {node['node']} ({node.get('state')}): {node.get('reason') or node.get('error')}")
    resync = document["resync"]
    if resync["total_bytes"]:
        out.print(f"copied: {bytes_text(resync['copied_bytes'])} of {bytes_text(resync['total_bytes'])}")
    _print_takeover(out, document["takeover"])
    if document["epochs"]:
        out.print("what parted when:")
    for epoch in document["epochs"]:
        ends = ", ".join(f"{node} at {last}" for node, last in epoch["last"].items())
        out.print(
            f"  epoch {epoch['number']} ({str(epoch['id'])[:8]}): {', '.join(epoch['nodes'])}"
            + (f"; ended for {ends}" if ends else "")
        )
    _print_unreplicated(out, document)
    for place, way in enumerate(document["ways"], 1):
        out.print(f"way {place}: {way}")
    for step in document["next"]:
        out.print(f"next: {step}")


def _print_takeover(out: Any, takeover: Message | None) -> None:
    if takeover is None:
        return
    if not takeover["possible"]:
        out.print(f"a takeover now: not possible: {takeover['why']}")
        return
    if takeover.get("rolled_back_from") is not None:
        out.print(f"a takeover now goes back from {takeover['rolled_back_from']} to {takeover['number']}")
    if takeover.get("initial"):
        out.print("a takeover now finds no consistent image: the initial copy has not ended")
    first, *more = what_is_lost(takeover)
    out.print(f"a takeover now loses {first} (number {takeover['number']})")
    for line in more:
        out.print(f"  {line}")


def _print_unreplicated(out: Any, document: Message) -> None:
    writes = document["unreplicated"]
    if not document["old_sources"]:
        return
    who = ", ".join(document["old_sources"])
    if not writes:
        out.print(f"{who}: no write is known that the other site lacks")
        return
    total = sum(int(write["length_bytes"]) for write in writes)
    out.print(f"{who}: {len(writes)} ranges, {bytes_text(total)}, that the other site lacks:")
    for write in writes[:SHOWN_WRITES]:
        number = write.get("number")
        known = f"number {number}" if number is not None else "never numbered"
        out.print(
            f"  {write['node']}/{write['volume']}: {write['length_bytes']} bytes at {write['offset_bytes']}, {known}"
        )
    if len(writes) > SHOWN_WRITES:
        out.print(f"  and {len(writes) - SHOWN_WRITES} more; --json has all")
