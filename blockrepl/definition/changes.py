"""What `blockrepl adjust` would change in a running group, and what it cannot: the file against what runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from blockrepl.definition.configuration import Configuration, VolumeRow, configuration_of
from blockrepl.definition.model import Definition, Volume
from blockrepl.errors import DefinitionError

_OTHER_NAME = "add a volume of another name, copy what it holds with a host's tools, then remove this one"
_AT_A_START = ("mode", "fence", "on_full")


class Change(NamedTuple):
    """One difference that can be brought into a running group."""

    what: str  # "volume data"
    kind: str  # "grow"
    text: str  # "grows from 64 MiB to 128 MiB"
    volume: int = 0  # id


class Plan(NamedTuple):
    """``wanted`` is what the group would run by; ``problems`` stand in the way; ``notes`` need no adjusting."""

    wanted: Configuration
    changes: list[Change]
    problems: list[DefinitionError]
    notes: list[str]


def fixed_facts(definition: Definition) -> dict[str, Any]:
    """What a running group cannot change, as a node tells it."""
    group = definition.group
    return {
        "group": {"name": group.name, "id": str(definition.group_id)}
        | {key: int(getattr(group, key)) for key in ("block_size", "bitmap_block")},
        "at_start": {key: getattr(group, key) for key in _AT_A_START},
        "nodes": [{"name": node.name, "id": node.id, "role": node.role} for node in definition.nodes],
    }


def differs(running: Configuration, definition: Definition) -> list[str]:
    """In what a node that runs by ``running`` does not do what the file says; for status and the log."""
    found = plan(definition, running, fixed_facts(definition))
    return [f"{change.what} {change.text}" for change in found.changes] + [str(problem) for problem in found.problems]


def plan(definition: Definition, running: Configuration, fixed: dict[str, Any]) -> Plan:
    """``definition`` is the file; ``running`` and ``fixed`` come from a node."""
    problems = [*_fixed_problems(definition, fixed)]
    changes: list[Change] = []
    rows = {row.name: row for row in running.volumes}
    for place, volume in enumerate(definition.volumes):
        row = rows.pop(volume.name, None)
        at = f"{definition.path}: $.volume[{place}]"
        if row is None:
            problems.append(_cannot_add(at, volume))
            continue
        problems += _volume_problems(definition, at, volume, row)
        if volume.size_bytes > row.size:
            text = f"grows from {size_text(row.size)} to {size_text(volume.size_bytes)}"
            changes.append(Change(f"volume {volume.name}", "grow", text, row.id))
    problems += [_cannot_remove(definition, row) for row in rows.values()]
    changes += _journal_changes(definition, running)
    notes = [
        f"{key} is {there!r} in the running nodes and {getattr(definition.group, key)!r} in the file: restart the nodes"
        for key, there in fixed["at_start"].items()
        if getattr(definition.group, key) != there
    ]
    return Plan(configuration_of(definition), changes, problems, notes)


def size_text(size_bytes: int) -> str:
    """As a definition writes it: nothing is rounded."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes and size_bytes % (1 << power) == 0:
            return f"{size_bytes >> power} {unit}"
    return f"{size_bytes} bytes"


def _fixed_problems(definition: Definition, fixed: dict[str, Any]) -> Iterator[DefinitionError]:
    ours, path = fixed_facts(definition), definition.path
    for key, there in fixed["group"].items():
        here = ours["group"][key]
        if here != there:
            hint = f"write {key} = {there!r} again: another {key} needs a new group, and a copy by a host's tools"
            yield DefinitionError(f"{path}: $.group.{key}", f"is {there} in the running group, not {here}", hint=hint)
    yield from _node_problems(definition, fixed["nodes"], ours["nodes"])


def _node_problems(
    definition: Definition, running: list[dict[str, Any]], ours: list[dict[str, Any]]
) -> Iterator[DefinitionError]:
    by_name, by_id = ({node[key]: node for node in running} for key in ("name", "id"))
    written = {node["name"] for node in ours}
    for place, node in enumerate(ours):
        at = f"{definition.path}: $.node[{place}]"
        there, same_id = by_name.get(node["name"]), by_id.get(node["id"])
        if there == node:
            continue
        if there is not None:
            key = "id" if there["id"] != node["id"] else "role"
            text = f"node {node['name']} has {key} {there[key]} in the running group, not {node[key]}"
            yield DefinitionError(f"{at}.{key}", text, hint=f"write {key} = {there[key]!r}")
        elif same_id is not None and same_id["name"] not in written:
            text = f"node {same_id['id']} of the running group is called {same_id['name']}, not {node['name']}"
            yield DefinitionError(f"{at}.name", text, hint=f'write name = "{same_id["name"]}": nodes keep their names')
        else:
            text = f"the running group has no node {node['name']}"
            hint = "nodes are not added to a running group: blockrepl down, create --node, up"
            yield DefinitionError(at, text, hint=hint)
    renamed = {node["id"] for node in ours}
    for node in running:
        if node["name"] not in written and node["id"] not in renamed:
            text = f"node {node['name']} of the running group is missing"
            yield DefinitionError(f"{definition.path}: $.node", text, hint="write it back: nodes do not leave online")


def _volume_problems(definition: Definition, at: str, volume: Volume, row: VolumeRow) -> Iterator[DefinitionError]:
    if volume.id != row.id:
        text = f"volume {row.name} is number {row.id} in the running group, its place in the file makes it {volume.id}"
        yield DefinitionError(f"{at}.id", text, hint=f"write id = {row.id}")
    if volume.lun is None and definition.lun_of(volume) != row.lun:
        text = f"volume {row.name} has LUN {row.lun}, its place in the file makes it {definition.lun_of(volume)}"
        yield DefinitionError(f"{at}.lun", text, hint=f"write lun = {row.lun}")
    if volume.size_bytes < row.size:
        text = f"a volume cannot shrink: {row.name} has {size_text(row.size)}, not {size_text(volume.size_bytes)}"
        hint = (
            f'write size = "{size_text(row.size).replace(" bytes", "").replace(" ", "")}"; to have less: {_OTHER_NAME}'
        )
        yield DefinitionError(f"{at}.size", text, hint=hint)
    for key, there, here in (
        ("primary", row.primary, volume.primary), ("secondary", row.secondary, volume.secondary),
    ):  # fmt: skip
        if there != here:
            text = f"a volume cannot move: the {key} of {row.name} is {there}, not {here}"
            yield DefinitionError(f"{at}.{key}", text, hint=f'write {key} = "{there}"; to move it: {_OTHER_NAME}')


def _cannot_add(at: str, volume: Volume) -> DefinitionError:
    text = f"the running group has no volume {volume.name}, and none is added to a running group yet"
    return DefinitionError(at, text, hint="leave it out, or make it a group of its own")


def _cannot_remove(definition: Definition, row: VolumeRow) -> DefinitionError:
    text = f"volume {row.name} of the running group is missing, and none is removed from a running group yet"
    return DefinitionError(f"{definition.path}: $.volume", text, hint="write it back")


def _journal_changes(definition: Definition, running: Configuration) -> Iterator[Change]:
    """Rings: how large each may be, its node says. Where they lie is between the node and the file."""
    for key, what in (("journal", "the intermediate's journal"), ("secondary_journal", "every other journal")):
        there, here = getattr(running, key), int(getattr(definition.group, key))
        if there != here:
            yield Change(what, "journal", f"has a ring of {size_text(here)} instead of {size_text(there)}")
