"""``replace``: put a new, empty node in the place of a lost one."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from blockrepl.cli import processes
from blockrepl.cli.asking import PATIENT_S, node_statuses
from blockrepl.cli.output import error_console
from blockrepl.cli.pair import reform
from blockrepl.cli.targets import File, Json, Target, find
from blockrepl.errors import UsageError

READY_S = 30.0


def replace(
    name: Annotated[str, typer.Option("--node", metavar="NODE", help="The node that was lost.")],
    target: Target = None,
    file: File = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Though the node has worked in this group before.")] = False,
    as_json: Json = False,
) -> None:
    """Take a new, empty node into the group, in the place of a lost one.

    Makes its files and starts it when it belongs here and has none; then what it lacks is copied.
    """
    definition = find(target, file)
    node = definition.node(name)
    if node in definition.local_nodes():
        from blockrepl.node.create import create, state_files

        missing = [path for path in state_files(definition, node) if not path.exists()]
        if len(missing) == len(state_files(definition, node)):
            if dry_run:
                raise UsageError(
                    f"{name} has no files yet, so nothing can be asked of it", hint=f"blockrepl create --node {name}"
                )
            create(definition, node)
            error_console().print(f"{name}: created in {node.directory}")
        if processes.pid_of(node) is None:
            started = processes.start(definition, node)
            processes.wait_answers(started, time.monotonic() + READY_S)
            error_console().print(f"{name}: started")
    reform(
        definition, node_statuses(definition, PATIENT_S),
        {"kind": "replace", "node": name, "dry_run": dry_run, "force": force}, as_json,
    )  # fmt: skip
