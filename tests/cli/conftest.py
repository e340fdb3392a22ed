"""A group of fake nodes in a temporary directory, and a way to run commands in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from blockrepl.cli import main, processes
from blockrepl.definition import Definition, Node, load
from scripts.ports import free_ports
from tests.patience import patient

FAKE = Path(__file__).parent / "fake_node.py"
NODES = (("p1", "primary"), ("p2", "primary"), ("i1", "intermediate"), ("s1", "secondary"), ("s2", "secondary"))


class Result(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


class FakeGroup:
    """A definition on disk whose nodes are tests/cli/fake_node.py."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "group.toml"
        ports = iter(free_ports(len(NODES) * 2))
        lines = ['[group]\nname = "demo"']
        for name, role in NODES:
            lines.append(f'[[node]]\nname = "{name}"\nrole = "{role}"\ndirectory = "{name}"')
            lines.append("" if role == "primary" else f'listen = "127.0.0.1:{next(ports)}"')
            lines.append("" if role == "intermediate" else f'nbd = "127.0.0.1:{next(ports)}"')
            (folder / name).mkdir()
        for name, primary, secondary in (("data", "p1", "s1"), ("log", "p2", "s2"), ("tmp", "p2", "none")):
            lines.append(f'[[volume]]\nname = "{name}"\nsize = "1MiB"')
            lines.append(f'primary = "{primary}"\nsecondary = "{secondary}"')
        self.path.write_text("\n".join(lines))
        self.definition: Definition = load(self.path)

    def node(self, name: str) -> Node:
        return self.definition.node(name)

    def plan(self, name: str, **plan: Any) -> None:
        """What the fake node is to do, see fake_node.py."""
        (self.node(name).directory / "fake.json").write_text(json.dumps(plan))

    def requests(self, name: str) -> list[Any]:
        """The commands that reached the node, with their arguments."""
        log = self.node(name).directory / "requests.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(autouse=True)
def own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKREPL_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("BLOCKREPL_FILE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``blockrepl ARGS…`` here; its exit code and what it printed."""

    def command(*args: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["blockrepl", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return command


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGroup]:
    fake = FakeGroup(tmp_path)

    def command(definition: Definition, node: Node) -> list[str]:
        return [sys.executable, str(FAKE), str(definition.path), node.name, "serve", "blockrepl.cli.main"]

    monkeypatch.setattr(processes, "serve_command", command)
    monkeypatch.setattr(processes, "TERM_S", patient(2.0))
    yield fake
    for node in fake.definition.nodes:
        processes.stop(node, 2.0)
