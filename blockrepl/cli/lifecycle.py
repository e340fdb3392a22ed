"""``create``, ``serve``, ``up``, ``down``: the life of nodes."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from blockrepl.cli import processes, registry
from blockrepl.cli.output import console, error_console, print_error, print_json
from blockrepl.cli.targets import File, Json, Target, find
from blockrepl.definition import Definition, Node
from blockrepl.errors import BlockreplError, EpochError, UsageError

NodeOption = Annotated[str | None, typer.Option("--node", metavar="NAME", help="Only this node.")]
FENCED_WAIT_S = 1.0
START_ORDER = {"secondary": 0, "intermediate": 1, "primary": 2}  # so that each finds those it dials; `down` reverses it


def create(
    target: Target = None,
    file: File = None,
    node: NodeOption = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Take P-VOL images that hold data as they are; `pair create` copies them.")
    ] = False,
) -> None:
    """Make journals, images and identities of nodes, once.

    Nothing else ever makes them.
    """
    definition = find(target, file)
    from blockrepl.node.create import create as create_node

    made: list[str] = []
    for each in _chosen(definition, node):
        try:
            adopted = create_node(definition, each, adopt=adopt)
        except BlockreplError:
            if made:
                error_console().print(f"blockrepl: made before the error, and kept: {', '.join(made)}", style="yellow")
            raise
        made.append(each.name)
        console().print(f"{each.name}: created in {_shown(each.directory)}")
        if adopted:
            console().print(f"{each.name}: adopted {', '.join(adopted)}; when all runs: blockrepl pair create")


def serve(
    node: Annotated[str, typer.Option("--node", metavar="NAME", help="The node to run.")],
    target: Target = None,
    file: File = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Work though nobody can confirm that no other side has taken over.")
    ] = False,
) -> None:
    """Run one node in the foreground.

    Until SIGTERM, SIGINT or `blockrepl down`.
    """
    definition = find(target, file)
    chosen = definition.node(node)
    from blockrepl.node.service import run

    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {chosen.name} %(levelname)s %(message)s"
    )
    registry.register(definition)
    run(definition, chosen.name, alone=alone)


def up(
    target: Target = None,
    file: File = None,
    node: NodeOption = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="How long to wait for readiness.")
    ] = 60,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Start, and do not wait for readiness.")] = False,
    alone: Annotated[bool, typer.Option("--alone", help="As for `serve`, for every node started.")] = False,
) -> None:
    """Start every node of this machine as its own process.

    Nodes that already run are left alone.
    """
    definition = find(target, file)
    nodes = sorted(_chosen(definition, node), key=lambda each: START_ORDER[each.role])
    pids = {each.name: processes.pid_of(each) for each in nodes}
    started = []
    for each in nodes:
        if pids[each.name] is None:
            clean_leftovers(each)
            started.append(processes.start(definition, each, ("--alone",) if alone else ()))
        else:
            started.append(processes.Started(each))
    registry.register(definition)
    if not no_wait:
        _wait_all(started, time.monotonic() + timeout_s)
    for each in nodes:
        before = pids[each.name]
        console().print(f"{each.name}: already running, pid {before}" if before else f"{each.name}: started")


def down(
    target: Target = None,
    file: File = None,
    node: NodeOption = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="How long each may take before it is killed.")
    ] = 60,
) -> None:
    """Stop every node of this machine.

    Primaries first, then the intermediate, then secondaries.
    """
    definition = find(target, file)
    failure: BlockreplError | None = None
    for each in sorted(_chosen(definition, node), key=lambda each: -START_ORDER[each.role]):
        try:
            how = processes.stop(each, timeout_s)
        except BlockreplError as error:
            print_error(error)
            failure = error
            continue
        console().print(f"{each.name}: {how or 'not running'}")
        if how != "stopped":
            clean_leftovers(each)
    if failure is not None:
        raise typer.Exit(failure.exit_code)
    if node is None:
        registry.forget(definition.name)


def ls(target: Target = None, file: File = None, as_json: Json = False) -> None:
    """List nodes, volumes, exports, attached devices, the iSCSI target and sessions."""
    from blockrepl.cli.listing import describe, print_listing

    definitions = [find(target, file)] if target or file else _known()
    described = [describe(definition) for definition in definitions]
    if as_json:
        print_json({"schema": 1, "groups": described})
    elif described:
        print_listing(described)
    else:
        error_console().print("no group is known here: blockrepl ls targets/demo.toml")


def clean_leftovers(node: Node) -> None:
    """Undo loop devices and mounts that a killed process of this node left."""
    if os.geteuid() != 0 or not (node.directory / "loop").is_dir():
        return
    from blockrepl.frontends.loop.leftovers import clean_leftovers as clean

    for phrase in clean(node.directory):
        error_console().print(f"{node.name}: {phrase}", style="yellow")


def _wait_all(started: Sequence[processes.Started], deadline_s: float) -> None:
    """Wait for every node; report every failure, end with the first one's code."""
    failures: list[BlockreplError] = []
    for each in started:
        try:
            processes.wait_ready(each, deadline_s)
        except BlockreplError as error:
            failures.append(error)
            if isinstance(error, EpochError):  # the other site has taken over: primaries would wait for nothing
                deadline_s = min(deadline_s, time.monotonic() + FENCED_WAIT_S)
    for failure in failures:
        print_error(failure)
    if failures:
        if len(failures) < len(started):
            error_console().print("the other nodes run; `blockrepl down` stops them")
        raise typer.Exit(failures[0].exit_code)


def _chosen(definition: Definition, name: str | None) -> Sequence[Node]:
    """The node asked for, or all of this machine."""
    if name is not None:
        return (definition.node(name),)
    nodes = definition.local_nodes()
    if not nodes:
        hosts = ", ".join(sorted({node.host for node in definition.nodes}))
        raise UsageError(
            f"no node of {definition.path} belongs on this machine ({os.uname().nodename}): {hosts}",
            hint='run this there, or write host = "local"',
        )
    return nodes


def _known() -> list[Definition]:
    definitions = []
    for path in registry.groups().values():
        with contextlib.suppress(BlockreplError):
            definitions.append(find(str(path), None))
    return definitions


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("../..") else relative
