"""One table of transitions per state machine; an unknown pair of state and event is our own mistake."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

S = TypeVar("S", bound=Enum)


class Machine(Generic[S]):
    """A state and its table: (state, event) → next state."""

    def __init__(self, table: Mapping[tuple[S, str], S], state: S) -> None:
        self._table = table
        self.state = state

    def go(self, event: str) -> S:
        """Move by ``event``. AssertionError on a pair that the table does not have."""
        target = self._table.get((self.state, event))
        assert target is not None, f"no transition from {self.state.name} by {event!r}"
        self.state = target
        return target

    def may(self, event: str) -> bool:
        """Whether the table has this event in the present state."""
        return (self.state, event) in self._table
