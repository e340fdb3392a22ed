"""The layers of ARCHITECTURE.md: imports point down only, and what is sans-IO stays so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "blockrepl"

GROUND = {"errors", "chunks", "block", "stream", "bitmap"}
ALLOWED = {
    # layer: the layers that it may import, beside itself
    "__init__": set(),
    "errors": set(),
    "chunks": set(),
    "bitmap": set(),
    "block": {"chunks", "errors"},
    "stream": {"block", "chunks", "errors"},
    "definition": {"errors"},
    "formats": {"errors", "block", "chunks"},
    "storage": {"formats", *GROUND},
    "replication": {"formats", *GROUND},
    "frontends": {"formats", *GROUND},
    "node": {"definition", "formats", "storage", "replication", "frontends", *GROUND},
    "cli": {"definition", "node", "storage", "formats", "frontends", *GROUND},
}
# What a module that performs no I/O has no use for; `os` and `io` also bring files, `random` and `uuid4` chance.
IMPURE = {
    "asyncio", "socket", "select", "selectors", "time", "random", "secrets", "os", "io", "threading", "subprocess",
    "multiprocessing", "concurrent", "signal", "fcntl", "mmap", "pathlib", "shutil", "tempfile", "uvloop", "aiofiles",
    "pyroute2", "datetime", "ssl", "http", "urllib",
}  # fmt: skip
IMPURE_CALLS = {"open", "input", "print", "exec", "eval", "__import__", "uuid1", "uuid4"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The first name below the package: of blockrepl/node/control.py it is node."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_pure(path: Path) -> bool:
    """Formats, roles, and the protocol half of each front end."""
    layer = layer_of(path)
    if layer == "frontends" and "iscsi" in path.parts:
        return path.stem != "server"
    return layer in ("formats", "replication") or (layer == "frontends" and path.stem == "protocol")


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, in functions too, relative imports made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base]).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def wrong_imports(path: Path, source: str) -> list[str]:
    """What is forbidden in a module at ``path`` of this content, as file:line: what."""
    tree = ast.parse(source, str(path))
    package = ".".join(path.relative_to(ROOT).parent.parts)
    layer, where = layer_of(path), path.relative_to(ROOT)
    found = []
    for line, name in imported(tree, package):
        head, _, rest = name.partition(".")
        if head == "blockrepl":
            target = rest.partition(".")[0]
            if target in ALLOWED and target not in ALLOWED[layer] | {layer, "__init__"}:
                found.append(f"{where}:{line}: {layer} must not import {target}")
            if layer == "frontends" and _other_front_end(path, rest):
                found.append(f"{where}:{line}: front ends do not know each other: {rest}")
        elif is_pure(path) and head in IMPURE:
            found.append(f"{where}:{line}: performs no I/O, so it must not import {head}")
    if is_pure(path):
        found += [f"{where}:{line}: performs no I/O, so it must not call {name}" for line, name in impure_calls(tree)]
    return found


def _other_front_end(path: Path, target: str) -> bool:
    own = path.relative_to(PACKAGE / "frontends").parts[0]
    parts = target.split(".")
    return (
        parts[0] == "frontends" and len(parts) > 1 and (PACKAGE / "frontends" / parts[1]).is_dir() and parts[1] != own
    )


def impure_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls of builtins that do I/O, and of uuid's that differ each time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            if name in IMPURE_CALLS and (isinstance(function, ast.Name) or name.startswith("uuid")):
                yield node.lineno, name


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_pure_modules_stay_pure(path: Path) -> None:
    assert layer_of(path) in ALLOWED, f"{path}: a layer that ARCHITECTURE.md does not name"
    assert wrong_imports(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "line", "words"),
    [
        ("storage/journal.py", "from blockrepl.node import control", "storage must not import node"),
        ("storage/journal.py", "from blockrepl import replication", "storage must not import replication"),
        ("storage/journal.py", "from ..frontends import nbd", "storage must not import frontends"),
        ("replication/primary.py", "import blockrepl.storage.image", "replication must not import storage"),
        ("replication/primary.py", "def f():\n    import time", "must not import time"),
        ("replication/primary.py", "import os.path", "must not import os"),
        ("replication/primary.py", "from random import Random", "must not import random"),
        ("replication/primary.py", "open('x')", "must not call open"),
        ("replication/primary.py", "import uuid\nuuid.uuid4()", "must not call uuid4"),
        ("formats/nbd.py", "import asyncio", "must not import asyncio"),
        ("formats/nbd.py", "from blockrepl import definition", "formats must not import definition"),
        ("frontends/nbd/protocol.py", "from socket import socket", "must not import socket"),
        ("frontends/nbd/protocol.py", "from pathlib import Path", "must not import pathlib"),
        ("frontends/iscsi/session.py", "import asyncio", "must not import asyncio"),
        ("frontends/iscsi/scsi/target.py", "from time import monotonic", "must not import time"),
        ("frontends/nbd/server.py", "from blockrepl.frontends.loop import server", "do not know each other"),
        ("node/service.py", "from blockrepl.cli import main", "node must not import cli"),
        ("errors.py", "from . import block", "errors must not import block"),
    ],
)
def test_a_wrong_import_is_found(module: str, line: str, words: str) -> None:
    found = wrong_imports(PACKAGE / module, f"from __future__ import annotations\n{line}\n")
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("frontends/nbd/server.py", "import asyncio, socket, os"),
        ("frontends/nbd/server.py", "from blockrepl.frontends.nbd import protocol"),
        ("replication/primary.py", "import uuid\nuuid.UUID(int=1)\nself.open(1)"),
        ("cli/main.py", "from blockrepl.node.service import run"),
    ],
)
def test_a_right_import_is_no_finding(module: str, line: str) -> None:
    assert wrong_imports(PACKAGE / module, line) == []
