"""``adjust``: bring a running group to what its definition says now, as ``drbdadm adjust`` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from msgspec import to_builtins

from blockrepl.cli.client import call
from blockrepl.cli.output import console, error_console, print_error, print_json
from blockrepl.cli.targets import File, Json, Target, find
from blockrepl.definition import Definition, Node, configuration_from
from blockrepl.definition.changes import Plan, plan, size_text
from blockrepl.errors import BlockreplError, UsageError

PREPARE_S = 600.0  # files are written meanwhile
TAKE_S = 60.0

Report = dict[str, Any]
"""What a node answers to the control command "config"."""


def adjust(
    target: Target = None,
    file: File = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Bring a running group to what its definition says now, while hosts write.

    Exit 0: it runs as the file says; 3: the file asks for what cannot change. Every step can be repeated.
    """
    definition = find(target, file)
    nodes = definition.local_nodes()
    reports = {node.name: call(node.directory, "config") for node in nodes}
    wanted = _planned(definition, reports, as_json=as_json, dry_run=dry_run)
    asked = {"configuration": to_builtins(wanted.wanted)}
    digest = wanted.wanted.digest
    moves = _moves(definition, reports)
    for node, journal in moves:
        _say(f"{node.name}: its journal {_move_text(reports[node.name]['journal'], journal)}", as_json)
    behind = [name for name, report in reports.items() if report["digest"] != digest]
    if not behind and not wanted.changes and not moves:
        _say("nothing to change: the group runs as its definition says", as_json)
        return
    for node in nodes:
        call(node.directory, "config_prepare", {**asked, "dry_run": True})
    if behind and definition.replicated and definition.intermediate in nodes:
        call(definition.intermediate.directory, "configure", {"digest": digest, "dry_run": True})
    for node, journal in moves:
        call(node.directory, "journal_move", {**journal, "dry_run": True})
    if dry_run:
        return
    for node in nodes:
        call(node.directory, "config_prepare", asked, timeout_s=PREPARE_S)
        _say(f"{node.name}: prepared", as_json)
    for node, journal in moves:
        call(node.directory, "journal_move", journal, timeout_s=PREPARE_S)
        _say(f"{node.name}: its journal is moved", as_json)
    if behind:
        _take(definition, nodes, digest, as_json=as_json)


def _planned(definition: Definition, reports: dict[str, Report], *, as_json: bool, dry_run: bool) -> Plan:
    """Print what is to be done. Raises the first problem, after all were shown."""
    if not reports:
        raise UsageError("no node of this group belongs on this machine", hint="run this where its nodes are")
    # Who is behind says most of what is to be done; a crash in mid-adjust leaves nodes at two configurations.
    plans = [
        plan(definition, configuration_from(report["configuration"]), report["fixed"]) for report in reports.values()
    ]
    found = max(plans, key=lambda each: len(each.changes))
    problems = {str(problem): problem for each in plans for problem in each.problems}
    if as_json:
        print_json(
            {
                "schema": 1, "dry_run": dry_run,
                "changes": [each._asdict() for each in found.changes],
                "problems": [
                    {"where": each.where, "message": str(each), "hint": each.hint} for each in problems.values()
                ],
                "notes": found.notes,
            }
        )  # fmt: skip
    for note in found.notes:
        error_console().print(f"note: {note}", style="yellow")
    if problems:
        first, *others = problems.values()
        for problem in others:
            print_error(problem)
        raise first
    for change in found.changes:
        _say(f"{change.what} {change.text}", as_json)
    return found


def _moves(definition: Definition, reports: dict[str, Report]) -> list[tuple[Node, dict[str, Any]]]:
    """Journals that are not as the file says, and how it wants them; the secondaries' before the intermediate's."""
    moves = []
    for node in sorted(definition.local_nodes(), key=lambda node: node.role == "intermediate"):
        group = definition.group
        ring = int(group.journal if node.role == "intermediate" else group.secondary_journal)
        wanted = {"path": str(node.journal_path), "ring_bytes": ring}
        there = reports[node.name].get("journal")
        if there is not None and there != wanted:
            moves.append((node, wanted))
    return moves


def _move_text(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    parts = []
    if there["path"] != wanted["path"]:
        parts.append(f"moves from {there['path']} to {wanted['path']}")
    if there["ring_bytes"] != wanted["ring_bytes"]:
        parts.append(f"gets a ring of {size_text(wanted['ring_bytes'])} instead of {size_text(there['ring_bytes'])}")
    return " and ".join(parts)


def _take(definition: Definition, nodes: Sequence[Node], digest: int, *, as_json: bool) -> None:
    """Let it take effect: at its number, or at once where there is no order."""
    if not definition.replicated:
        for node in nodes:
            call(node.directory, "configure", {"digest": digest}, timeout_s=TAKE_S)
        _say("in effect", as_json)
        return
    middle = definition.intermediate
    if middle not in nodes:
        raise UsageError(
            f"prepared here; what is left is done where {middle.name} is",
            hint=f"on {middle.host}, when every machine is prepared: blockrepl adjust",
        )
    number = call(middle.directory, "configure", {"digest": digest}, timeout_s=TAKE_S)["number"]
    _say(f"in effect from number {number} on", as_json)
    _wait(nodes, digest)


def _wait(nodes: Sequence[Node], digest: int) -> None:
    """Until each has heard of it; who is away hears of it when it is back."""
    for node in nodes:
        try:
            call(node.directory, "config_wait", {"digest": digest}, timeout_s=TAKE_S)
        except BlockreplError as error:
            error_console().print(f"{node.name}: {error}", style="yellow")


def _say(text: str, as_json: bool) -> None:
    (error_console() if as_json else console()).print(text)
