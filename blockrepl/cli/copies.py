"""``takeover`` and ``verify``: what one does with the second copy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from blockrepl.cli.asking import PATIENT_S, STATUS_TIMEOUT_S, node_statuses, serving_node
from blockrepl.cli.client import call
from blockrepl.cli.groups import answering, targets
from blockrepl.cli.losses import what_is_lost
from blockrepl.cli.output import bytes_text, console, error_console, print_error, print_json
from blockrepl.cli.targets import File, Json, Target, find, find_volume
from blockrepl.definition import Definition, Node, Volume
from blockrepl.errors import BlockreplError, NotRunningError, UsageError
from blockrepl.node.control_messages import Message

SILENCE_S = 120.0  # a node at work says something at least this often


def takeover(
    target: Target = None,
    file: File = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and lost; change nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on without secondaries that do not answer.")] = False,
    read_only: Annotated[bool, typer.Option("--read-only", help="Hosts may read the volumes, not write.")] = False,
    to_marker: Annotated[
        str, typer.Option("--to-marker", metavar="NAME", help="Stop at a marker that all secondaries still hold.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Make the secondaries active under a new epoch.

    All at the same number. Run it at the secondary site.
    """
    definition = find(target, file)
    node = _answering_secondary(definition)
    screen = error_console()

    def step(progress: Message) -> None:
        screen.print(f"{node.name}: {progress.get('step') or progress.get('message') or progress}")

    args = {"dry_run": dry_run, "force": force, "read_only": read_only, "marker": to_marker}
    result = call(node.directory, "takeover", args, on_progress=step, timeout_s=SILENCE_S)
    if as_json:
        print_json(result)
    else:
        _tell(definition, result)


def _answering_secondary(definition: Definition) -> Node:
    """Any local one leads; it asks the others itself."""
    local = definition.local_nodes()
    secondaries = [node for site in (0, 1) for node in definition.targets(site) if node in local]
    if not secondaries:
        raise UsageError(
            "no secondary of this group belongs on this machine", hint="run takeover where one does: see `blockrepl ls`"
        )
    for timeout_s in (STATUS_TIMEOUT_S, PATIENT_S):  # one that answers soon is enough
        statuses = node_statuses(definition, timeout_s)
        followers = targets(statuses) or [each for each in answering(statuses) if each.get("role") == "secondary"]
        if followers:
            return definition.node(str(followers[0]["node"]))
    raise NotRunningError(
        f"no secondary runs here: {', '.join(node.name for node in secondaries)}",
        hint=f"start them: blockrepl up {definition.path} --node {secondaries[0].name}",
    )


def _tell(definition: Definition, result: Message) -> None:
    """What was done, or would be, and what it costs."""
    out = console()
    epoch = result.get("epoch") or {}
    would = "would be" if result.get("dry_run") else "are"
    out.print(
        f"{definition.name}: the secondaries {would} at number {_text(result.get('number'))}, "
        f"epoch {_text(epoch.get('number'))} ({str(epoch.get('id', '-'))[:8]})"
    )
    first, *more = what_is_lost(result)
    out.print(f"lost: {first}")
    for line in more:
        out.print(f"  {line}")
    if result.get("rolled_back_from") is not None:
        out.print(f"a copy had not ended: back from {result['rolled_back_from']} to {_text(result.get('number'))}")
    if result.get("initial"):
        out.print("an initial copy had not ended: the images are not consistent")
    if result.get("split_bytes"):
        out.print(f"written at this site since the split: {bytes_text(result['split_bytes'])}, in blocks; it stays")
    for volume in result.get("volumes") or []:
        access = "" if result.get("dry_run") else " read-write" if volume.get("writable") else " read-only"
        out.print(f"{volume.get('name')}: {volume.get('image')} at {volume.get('node')}{access}")


def verify(
    target: Target = None,
    volumes: Annotated[
        list[str] | None, typer.Argument(metavar="VOLUME…", help="Only these; all that have a secondary otherwise.")
    ] = None,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Compare both ends of volumes while writes go on.

    Exit 0: they are the same; 1: they differ; 2: error.
    """
    try:
        definition, chosen = _volumes(target, volumes or [], file)
        results = [_verify_one(definition, volume) for volume in chosen]
    except BlockreplError as error:
        print_error(error)
        raise typer.Exit(2) from None
    if as_json:
        print_json({"schema": 1, "group": definition.name, "volumes": results})
    else:
        for result in results:
            _tell_verified(definition, result)
    if not all(result.get("same") is True for result in results):
        raise typer.Exit(1)


def _volumes(target: str | None, names: list[str], file: Path | None) -> tuple[Definition, list[Volume]]:
    """TARGET may also be GROUP/VOLUME."""
    if target is not None and "/" in target and not target.endswith(".toml"):
        definition, volume = find_volume(target, file)
        chosen = [volume, *(definition.volume(name) for name in names)]
    else:
        definition = find(target, file)
        chosen = [definition.volume(name) for name in names]
    for volume in chosen:
        if not volume.replicated:
            raise UsageError(f"{volume.name} has no secondary to compare with")
    chosen = chosen or [volume for volume in definition.volumes if volume.replicated]
    if not chosen:
        raise UsageError(f"no volume of {definition.name} has a secondary to compare with")
    return definition, chosen


def _verify_one(definition: Definition, volume: Volume) -> Message:
    try:
        node = serving_node(definition, volume)
    except NotRunningError:
        node = definition.node(volume.primary)  # its own error says more
    if not sys.stderr.isatty():
        return call(node.directory, "verify", {"volume": volume.name}, timeout_s=SILENCE_S)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=error_console(),
        transient=True,
    )
    with bar:
        task = bar.add_task(f"{definition.name}/{volume.name}", total=volume.size_bytes)

        def step(progress: Message) -> None:
            bar.update(task, completed=progress.get("done_bytes", 0), total=progress.get("total_bytes"))

        return call(node.directory, "verify", {"volume": volume.name}, on_progress=step, timeout_s=SILENCE_S)


def _tell_verified(definition: Definition, result: Message) -> None:
    name = f"{definition.name}/{result.get('volume')}"
    if result.get("same") is True:
        console().print(f"{name}: the same, {bytes_text(result.get('compared_bytes'))} compared")
        return
    ranges = result.get("differing") or []
    total = sum(int(each.get("length_bytes", 0)) for each in ranges)
    console().print(f"{name}: differs in {bytes_text(total)}, in {len(ranges)} ranges")
    for each in ranges[:10]:
        console().print(f"  {each.get('length_bytes')} bytes at {each.get('offset_bytes')}")
    if len(ranges) > 10:
        console().print(f"  and {len(ranges) - 10} more; --json has all")


def _text(value: object) -> str:
    return "-" if value is None else str(value)
