"""A file of the wrong shape: msgspec's message, with the place and what to write instead."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import msgspec

from blockrepl.definition.iscsi import Chap, ChapUser, Iscsi
from blockrepl.definition.model import Definition, Group, Node, Policy, Volume
from blockrepl.errors import DefinitionError

_TABLES: dict[str, type[msgspec.Struct]] = {
    "group": Group, "policy": Policy, "node": Node, "volume": Volume, "iscsi": Iscsi,
}  # fmt: skip
EXAMPLES = {
    "group": '[group] with name = "demo"',
    "node": '[[node]] with name = "p1", role = "primary", directory = "../images/demo/p1"',
    "volume": '[[volume]] with name = "data", size = "512MiB", primary = "p1", secondary = "s1"',
    "secondary": 'secondary = "NODE" for a copy, or secondary = "none" for a plain target without one',
    "primary": 'primary = "p1", the node that serves the volume',
    "size": 'size = "512MiB"',
    "role": 'role = "primary", "intermediate" or "secondary"',
    "directory": 'directory = "../images/demo/p1", relative to the definition file',
    "name": 'name = "demo"',
    "users": 'users = [{name = "host1", secret_file = "host1.secret"}]',
    "secret_file": 'secret_file = "host1.secret", relative to the definition file',
}


def shape_error(path: Path, text: str) -> DefinitionError:
    match = re.fullmatch(r"(?s)(.*?)(?: - at `(.*)`)?", text)
    assert match is not None
    message, at = match[1], match[2] or "$"
    if unknown := re.search(r"unknown field `(.*)`", message):
        known = _known_keys(at)
        near = difflib.get_close_matches(unknown[1], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return DefinitionError(f"{path}: {at}.{unknown[1]}", "unknown key", hint=hint)
    if missing := re.search(r"missing required field `(.*)`", message):
        hint = f"write {EXAMPLES.get(missing[1], missing[1])}"
        return DefinitionError(f"{path}: {at}", f"the key {missing[1]} is missing", hint=hint)
    if message.startswith("Invalid enum value"):
        allowed = _allowed_values(at)
        hint = f"one of {', '.join(allowed)}" if allowed else ""
        return DefinitionError(f"{path}: {at}", message.replace("Invalid enum value", "unknown value"), hint=hint)
    if wanted := re.search(r"Expected `(.*?)`, got `(.*?)`", message):
        nouns = {"str": "a string", "int": "an integer", "float": "a number", "object": "a table", "array": "a list"}
        nouns["bool"] = "true or false"
        kinds = [kind for kind in re.split(r" \| ", wanted[1]) if kind != "null"]
        expected = " or ".join(nouns.get(kind, kind) for kind in kinds)
        message = f"must be {expected}, is {nouns.get(wanted[2], wanted[2])}"
        key = at.rpartition(".")[2]
        hint = f"write {EXAMPLES[key]}" if key in EXAMPLES else ""
        return DefinitionError(f"{path}: {at}", message, hint=hint)
    hint = "leave the id out: it is then derived from the name" if message == "Invalid UUID" else ""
    return DefinitionError(f"{path}: {at}", message, hint=hint)


def _table_of(at: str) -> type[msgspec.Struct]:
    if at.startswith("$.iscsi.chap"):
        return ChapUser if re.match(r"\$\.iscsi\.chap\.(users\[|mutual)", at) else Chap
    return _TABLES.get(re.sub(r"^\$\.?(\w*).*$", r"\1", at), Definition)


def _known_keys(at: str) -> list[str]:
    return [name for name in _table_of(at).__struct_encode_fields__ if name != "(path)"]


def _allowed_values(at: str) -> list[str]:
    key = re.sub(r"\[\d+\]$", "", at).rpartition(".")[2]
    for field in msgspec.structs.fields(_table_of(at)):
        if field.encode_name == key:
            return re.findall(r"'([a-z]+)'", str(field.type))
    return []
