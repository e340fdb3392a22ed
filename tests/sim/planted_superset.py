"""Planted bugs that leave a block without a bit, which invariant 7 finds before anything is lost; see `planted.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from blockrepl.replication.alone import Unconfirmed
from blockrepl.replication.pairing import Pairing
from blockrepl.replication.primary import Primary
from tests.sim.group import Options
from tests.sim.planted import Planted, replaced

SPLIT = Options(story="pairs", threads=12, ring_bytes=128 << 10, fault_every_s=0.3, faults=("kill", "power"))
ALONE = Options(story="never", threads=12, fault_every_s=0.3, faults=("isolate", "cut", "kill"))


def ring_given_up_before_its_bits() -> AbstractContextManager[Any]:
    """Rule 18: the ring gives records up as soon as they are to be turned into bits, not when these are durable."""
    original = Pairing._mark

    def mark(self: Pairing, after: int, through: int, then: Any) -> Any:
        action = original(self, after, through, then)
        self.marked = max(self.marked, through)
        return action

    return replaced(Pairing, "_mark", mark)


def alone_without_what_is_unconfirmed() -> AbstractContextManager[Any]:
    """Rule 8: a primary that goes alone sets no bits of what the secondaries may not have yet."""
    return replaced(Unconfirmed, "mark", lambda self: None)


def alone_without_what_is_pending() -> AbstractContextManager[Any]:
    """Rule 17: a primary that goes alone sets no bits of writes whose fate is open."""
    return replaced(Primary, "mark_pending", lambda self, record: None)


PLANTED: list[tuple[Planted, Options]] = [
    (ring_given_up_before_its_bits, SPLIT),
    (alone_without_what_is_unconfirmed, ALONE),
    (alone_without_what_is_pending, ALONE),
]
