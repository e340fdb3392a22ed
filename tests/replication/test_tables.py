"""The tables of transitions: what is not in them raises, and every state and event in them has a use."""

from __future__ import annotations

from collections import deque
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from blockrepl.replication import copying, opening, primary, reform, secondary_epochs, takeover
from blockrepl.replication.machine import Machine

MODULES = [primary, opening, secondary_epochs, copying, takeover, reform]
# Where a process may begin: the first, and what recovery finds.
STARTS: dict[Any, list[str]] = {
    primary: ["FRESH"],
    opening: ["STARTING"],
    secondary_epochs: ["FOLLOWING", "PROMISED", "STORING", "ACTIVE"],
    copying: ["PLAIN", "COPYING"],
    takeover: ["GREETING"],
    reform: ["GREETING"],
}

HELPERS = {"primary": ("suspension", "resyncing", "joining")}  # whose code moves a role too


def states(module: Any) -> Any:
    """The enumeration that the table is about."""
    return module.Stage if module is copying else module.Phase


by_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])


@by_module
def test_an_unknown_pair_of_state_and_event_raises(module: Any) -> None:
    events = {event for _, event in module.TABLE} | {"no such event"}
    pairs = [(state, event) for state in states(module) for event in events if (state, event) not in module.TABLE]
    assert pairs
    for state, event in pairs:
        machine: Machine[Enum] = Machine(module.TABLE, state)
        assert not machine.may(event)
        with pytest.raises(AssertionError, match="no transition"):
            machine.go(event)
        assert machine.state is state


@by_module
def test_every_state_is_reached_from_a_start(module: Any) -> None:
    reached = {states(module)[name] for name in STARTS[module]}
    waiting = deque(reached)
    while waiting:
        state = waiting.popleft()
        for (source, _), target in module.TABLE.items():
            if source is state and target not in reached:
                reached.add(target)
                waiting.append(target)
    assert reached == set(states(module))


@by_module
def test_every_event_is_one_that_the_code_has(module: Any) -> None:
    source = Path(module.__file__).read_text()
    code = source[source.index("\nclass ", source.index("\nTABLE")) :]
    for name in HELPERS.get(Path(module.__file__).stem, ()):
        code += Path(module.__file__).with_name(f"{name}.py").read_text()
    assert [event for event in {event for _, event in module.TABLE} if f'"{event}"' not in code] == []
