"""What an exploration is to cover."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scope:
    """Budgets: each is spent at any moment, or never."""

    name: str
    writes: tuple[tuple[int, int], ...] = ((1, 1), (2, 2))  # (id, volume)
    crashes: int = 0  # kill -9 or power loss of any machine, which starts again at any later time
    takeovers: int = 0
    stale: int = 0  # a connection breaks: one end sees it at once, the other when it has read what was under way
    impatient: int = 0  # the intermediate's back-off runs out in the middle of a takeover
    housekeeping: bool = False  # checkpoints and syncs of S-VOLs
    reduced: bool = True  # by partial orders; see `Explorer._alone`
    victims: tuple[str, ...] = ("p1", "p2", "i", "s1", "s2")  # who may crash


SCOPES = [
    Scope("production"),
    Scope("one write, crash of a secondary", writes=((1, 1),), crashes=1, victims=("s1",)),
    Scope("one write, crash", writes=((1, 1),), crashes=1),
    Scope("one write, takeover", writes=((1, 1),), takeovers=1),
    Scope("one write, stale node", writes=((1, 1),), stale=1),
    Scope("one write, housekeeping and crash", writes=((1, 1),), crashes=1, housekeeping=True),
    Scope("crash", crashes=1),
    Scope("takeover", takeovers=1),
    Scope("stale node", stale=1),
    Scope("one write, crash and takeover", writes=((1, 1),), crashes=1, takeovers=1),
    Scope("everything", crashes=1, takeovers=1, stale=1),
]
LONG = [
    Scope("three writes", writes=((1, 1), (2, 2), (3, 1))),
    Scope("three writes, crash", writes=((1, 1), (2, 2), (3, 1)), crashes=1),
    Scope("one write, impatient takeover", writes=((1, 1),), takeovers=1, impatient=1),
    Scope("three writes, everything", writes=((1, 1), (2, 2), (3, 1)), crashes=1, takeovers=1, stale=1, impatient=1),
]
