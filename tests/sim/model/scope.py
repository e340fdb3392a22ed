"""What an exploration is to cover."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.sim.model.links import PAIRS, S1

VICTIMS = (0, 1, 2, 3, 4)  # machines that may crash; the opener dies with s1
CUTS = tuple((pair, end) for pair, ends in enumerate(PAIRS) for end in ends)


@dataclass(frozen=True)
class Scope:
    """Budgets: each is spent at any moment, or never."""

    name: str
    writes: tuple[tuple[int, int], ...] = ((1, 1), (2, 2))  # (id, volume)
    crashes: int = 0  # kill -9 or power loss of one of `victims`, which starts again at any later time
    takeovers: int = 0
    stale: int = 0  # a connection breaks: one end sees it at once, the other when it has read what was under way
    impatient: int = 0  # the intermediate's back-off runs out in the middle of a takeover
    housekeeping: bool = False  # checkpoints and syncs of S-VOLs
    victims: tuple[int, ...] = VICTIMS  # who may crash
    cuts: tuple[tuple[int, int], ...] = CUTS  # (pair, the end that sees it): which connection may break
    reduced: bool = True  # by partial orders, see `reductions.py`; and in parts
    early: bool = False  # a takeover begins at once; what the opener says may still arrive at any time

    def parts(self) -> Iterator[Scope]:
        """Reduced: one part for each machine that may crash and each connection that may break, and so no choice among
        them is left to be made; together they cover the scope. Machines that are each other's mirror image have one.
        """
        if not self.reduced:
            yield self
            return
        for victim in self._victims():
            for cut in self._cuts(victim):
                yield from self._begun(victim, cut)

    def _victims(self) -> list[int | None]:
        if not self.crashes:
            return [None]
        mirrored = (1, 4) if not self.takeovers else (1,)
        alike = self.mirrored and set(self.victims) == set(VICTIMS)
        return [victim for victim in self.victims if not (alike and victim in mirrored)]

    def _cuts(self, victim: int | None) -> list[tuple[int, int] | None]:
        if not self.stale:
            return [None]
        alike = self.mirrored and victim in (None, 2) and set(self.cuts) == set(CUTS)
        return [cut for cut in self.cuts if self.takeovers or cut[0] < 4 if not (alike and cut[0] in (1, 3, 6))]

    def _begun(self, victim: int | None, cut: tuple[int, int] | None) -> Iterator[Scope]:
        part = replace(
            self, victims=() if victim is None else (victim,), cuts=() if cut is None else (cut,),
            early=self.takeovers > 0,
        )  # fmt: skip
        yield part
        if part.early and victim == S1:  # or when it has started again
            yield replace(part, early=False)

    @property
    def mirrored(self) -> bool:
        """p1, s1 and p2, s2 have the same to do."""
        return self.writes in (((1, 1), (2, 2)), ())


ONE = ((1, 1),)
THREE = ((1, 1), (2, 2), (3, 1))
SCOPES = [
    Scope("production"),
    Scope("one write, crash of a secondary", writes=ONE, crashes=1, victims=(S1,)),
    Scope("one write, crash", writes=ONE, crashes=1),
    Scope("one write, takeover", writes=ONE, takeovers=1),
    Scope("one write, stale node", writes=ONE, stale=1),
    Scope("one write, housekeeping and crash", writes=ONE, crashes=1, housekeeping=True),
    Scope("crash", crashes=1),
    Scope("takeover", takeovers=1),
    Scope("stale node", stale=1),
    Scope("one write, crash and takeover", writes=ONE, crashes=1, takeovers=1),
    Scope("everything", crashes=1, takeovers=1, stale=1),
]
LONG = [
    Scope("three writes", writes=THREE),
    Scope("three writes, crash", writes=THREE, crashes=1),
    Scope("one write, impatient takeover", writes=ONE, takeovers=1, impatient=1),
    Scope("three writes, everything", writes=THREE, crashes=1, takeovers=1, stale=1, impatient=1),
]
