"""Reads a definition file: TOML, then its shape, then its meaning."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from blockrepl.definition.checks import problems
from blockrepl.definition.iscsi import Portals
from blockrepl.definition.model import Definition, Node, Volume
from blockrepl.definition.shape import shape_error
from blockrepl.definition.values import Address, Size, parse_address, parse_size
from blockrepl.errors import DefinitionError

MAX_FILE_BYTES = 1 << 20
Numbered = TypeVar("Numbered", Node, Volume)


def load(path: str | Path) -> Definition:
    """Read and check a definition. Raises DefinitionError for the first problem."""
    definition = _read(Path(path))
    for problem in problems(definition, str(path)):
        raise problem
    return definition


def check(path: str | Path) -> list[DefinitionError]:
    """Every problem of a file; a file that cannot be read or has a wrong shape has one."""
    try:
        definition = _read(Path(path))
    except DefinitionError as error:
        return [error]
    return list(problems(definition, str(path)))


def _read(path: Path) -> Definition:
    document = _document(path)
    base = path.resolve().parent
    if "(path)" in document:
        raise shape_error(path, "Object contains unknown field `(path)`")

    def convert(kind: type, value: Any) -> Any:
        if kind is Size:
            return parse_size(value)
        if kind is Address:
            return parse_address(value)
        if kind is Portals:
            return Portals(parse_address(each) for each in (value if isinstance(value, list) else [value]))
        if kind is Path:
            if not isinstance(value, str) or not value or "\0" in value:
                raise ValueError('a path is a string, such as "../images/demo/p1"')
            return (base / value).resolve()
        raise NotImplementedError(kind)

    try:
        definition = msgspec.convert(document, Definition, dec_hook=convert)
    except msgspec.ValidationError as error:
        raise shape_error(path, str(error)) from None
    return msgspec.structs.replace(
        definition,
        path=path.resolve(),
        nodes=_with_ids(definition.nodes),
        volumes=_with_ids(definition.volumes),
    )


def _document(path: Path) -> dict[str, Any]:
    """The TOML as it is."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise DefinitionError(str(path), "no such file", hint=_files_nearby(path)) from None
    except IsADirectoryError:
        raise DefinitionError(str(path), "is a directory", hint=_files_nearby(path / "x")) from None
    except OSError as error:
        raise DefinitionError(str(path), f"cannot be read: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise DefinitionError(str(path), "is larger than 1 MiB, so it is no definition")
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DefinitionError(f"{path}:{line}", "is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        match = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", str(error))
        where = f"{path}:{match[2]}:{match[3]}" if match else str(path)
        message = match[1] if match else str(error)
        hint = 'strings and sizes stand in "quotes"' if re.search("Invalid value|newline", message) else ""
        raise DefinitionError(where, f"no valid TOML: {message}", hint=hint) from None
    except RecursionError:
        raise DefinitionError(str(path), "no valid TOML: nested too deeply") from None


def _files_nearby(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("targets")
    names = sorted(str(found) for found in folder.glob("*.toml"))[:5] if folder.is_dir() else []
    return f"there is {', '.join(names)}" if names else "the argument is a definition such as targets/demo.toml"


def _with_ids(items: Sequence[Numbered]) -> tuple[Numbered, ...]:
    return tuple(item if item.id else msgspec.structs.replace(item, id=place) for place, item in enumerate(items, 1))
