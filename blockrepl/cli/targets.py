"""Finds the definition that a command is about.

Every command takes TARGET: a definition file, or the name of a group that runs here; where it is about a volume,
GROUP/VOLUME. ``-f FILE`` or BLOCKREPL_FILE names the definition once and for all, and TARGET may then be left out.
Without either it is the one group that runs here.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from blockrepl.cli import registry
from blockrepl.cli.client import is_running
from blockrepl.definition import Definition, Volume, load
from blockrepl.errors import BlockreplError, DefinitionError, UsageError

Target = Annotated[
    str | None, typer.Argument(metavar="TARGET", help="A definition file, or the name of a running group.")
]
File = Annotated[
    Path | None,
    typer.Option(
        "-f", "--file", envvar="BLOCKREPL_FILE", metavar="FILE", help="The definition, when TARGET is not it."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: integers in bytes, null for unknown.")]


def find(target: str | None, file: Path | None) -> Definition:
    """The definition meant. Raises UsageError or DefinitionError."""
    if target is None:
        return load(file) if file is not None else _only_group()
    if _is_path(target):
        return load(target)
    return _group(target, file)


def find_volume(target: str, file: Path | None) -> tuple[Definition, Volume]:
    """The volume of GROUP/VOLUME, or of VOLUME when the definition is clear otherwise."""
    group, slash, name = target.rpartition("/")
    if slash and not group:
        raise UsageError(f'"{target}" is no volume', hint="write GROUP/VOLUME, such as demo/data")
    definition = _group(group, file) if slash and not _is_path(group) else find(group or None, file)
    return definition, definition.volume(name)


def running(definition: Definition) -> bool:
    """True when any node of the group listens on this machine."""
    return any(is_running(node.directory) for node in definition.local_nodes())


def _is_path(target: str) -> bool:
    return target.endswith(".toml") or "/" in target or Path(target).is_file()


def _group(name: str, file: Path | None) -> Definition:
    """By name: -f and BLOCKREPL_FILE first, then what runs here, then targets/*.toml."""
    if file is not None:
        definition = load(file)
        if definition.name == name:
            return definition
        raise UsageError(f'{file} defines the group "{definition.name}", not "{name}"')
    noted = registry.groups()
    if name in noted:
        return load(noted[name])
    for path in sorted(Path("targets").glob("*.toml")):
        with contextlib.suppress(DefinitionError):
            definition = load(path)
            if definition.name == name:
                return definition
    known = f"known here: {', '.join(sorted(noted))}" if noted else "give its definition: -f targets/demo.toml"
    raise UsageError(f'no group "{name}" is known on this machine', hint=known)


def _only_group() -> Definition:
    alive = []
    for path in registry.groups().values():
        with contextlib.suppress(BlockreplError):
            definition = load(path)
            if running(definition):
                alive.append(definition)
    if len(alive) == 1:
        return alive[0]
    if alive:
        names = ", ".join(sorted(definition.name for definition in alive))
        raise UsageError(f"several groups run here: {names}", hint="say which: the name, or -f FILE")
    raise UsageError("no definition given, and no group runs here", hint="give one, such as targets/demo.toml")
