"""Planted bugs of swaps and replacements; `test_sites` says which schedule each breaks. See `planted.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from blockrepl.formats.link import Epoch
from blockrepl.replication.copying import Copying
from blockrepl.replication.primary import Primary
from blockrepl.replication.reform import Reform
from blockrepl.replication.suspension import Suspension
from tests.sim.planted import replaced


def formed_anew_at_a_number_that_nobody_was_at() -> AbstractContextManager[Any]:
    """Rule 20: a target with nothing to go back to takes the reform's number for one of its own."""
    original = Copying.reform

    def reform(self: Copying, number: int, *, initial: bool) -> None:
        original(self, number, initial=initial)
        self._owner.state.copy_from = self.spans[0].copy_from = number

    return replaced(Copying, "reform", reform)


def source_formed_anew_without_its_replay() -> AbstractContextManager[Any]:
    """Rule 7: the intermediate forgets records that a source has not read back yet."""
    return replaced(Reform, "_not_recovered", lambda self: [])


def source_formed_anew_without_a_sync() -> AbstractContextManager[Any]:
    """Rule 17: a source that never replays any more has its newest writes in the page cache only."""
    original = Primary.sync_volumes

    def sync_volumes(self: Primary, then: Any) -> Any:
        return self.save_bits(then) if self.suspension.reforming else original(self, then)

    return replaced(Primary, "sync_volumes", sync_volumes)


def bits_cleared_at_a_swap() -> AbstractContextManager[Any]:
    """Rule 21: a source that is formed anew forgets what was written there since its takeover."""
    original = Suspension.reform

    def reform(self: Suspension, epoch: Epoch, direction: int) -> Any:
        for bitmap in self._owner.bitmaps.values():
            bitmap.clear()
        return original(self, epoch, direction)

    return replaced(Suspension, "reform", reform)
