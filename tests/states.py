"""Draws docs/states.md from the tables in the code; `python -m tests.states` writes it, a test compares it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parent.parent / "docs" / "states.md"
MACHINES = [
    ("primary", "The primary", "replication/primary.py (its parts: suspension.py, resyncing.py)"),
    ("opening", "The intermediate: epochs", "replication/opening.py"),
    ("pairing", "The intermediate: the pair", "replication/pairing.py"),
    ("configuring", "The intermediate: the configuration", "replication/configuring.py"),
    ("secondary_epochs", "The secondary: epochs", "replication/secondary_epochs.py"),
    ("copying", "The secondary: copies", "replication/copying.py"),
    ("takeover", "The opener of a takeover", "replication/takeover.py"),
    ("reform", "The opener of a swap or a replacement", "replication/reform.py"),
]
HEAD = """# States and transitions

Drawn from the tables in the code by `scripts/states`; `tests/test_states.py` sees to it that they are the same. Every
machine has one table beside it; an event that a state does not list is a mistake of ours, and ends the node.
"""


def rows(table: Mapping[tuple[Any, str], Any]) -> list[tuple[str, str, str]]:
    """(state, event, next state); an event that every state has, to one and the same, becomes one row."""
    states = {state for state, _ in table} | set(table.values())
    everywhere = {
        event
        for event in {event for _, event in table}
        if len({table.get((state, event)) for state in states}) == 1 and len(states) > 2
    }
    listed = [(state.value, event, target.value) for (state, event), target in table.items() if event not in everywhere]
    order: list[Enum] = list(next(iter(states)).__class__)
    place = {state.value: index for index, state in enumerate(order)}
    listed.sort(key=lambda row: place[row[0]])
    common = {event: target for (_, event), target in table.items() if event in everywhere}
    return listed + [("any", event, target.value) for event, target in common.items()]


def draw() -> str:
    """The whole document."""
    parts = [HEAD]
    for module, title, where in MACHINES:
        table = importlib.import_module(f"blockrepl.replication.{module}").TABLE
        parts.append(f"\n## {title}\n\n`{where}`\n\n| state | event | next |\n| --- | --- | --- |\n")
        parts += [f"| {state} | {event} | {target} |\n" for state, event, target in rows(table)]
    return "".join(parts)


if __name__ == "__main__":
    DOCUMENT.write_text(draw())
