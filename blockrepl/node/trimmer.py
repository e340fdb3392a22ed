"""Gives up frames of a journal: with a superblock now and then, not for each of them."""

from __future__ import annotations

from collections.abc import Callable

from blockrepl.storage.journal_file import JournalFile

TRIM_SHARE = 16  # the superblock is written when this part of the ring can go …
TRIM_EVERY_S = 1.0  # … or when anything can go, this often


class Trimmer:
    """Trims one journal. What it gives up counts as free only when ``done`` is called: the superblock is durable."""

    def __init__(self, journal: JournalFile, state: Callable[[], bytes], done: Callable[[], None]) -> None:
        """``state`` gives the owner's blob, which speaks of durable frames only."""
        self._journal = journal
        self._state = state
        self._done = done
        self._trimmed_s = 0.0

    def trim(self, number: int, now_s: float) -> None:
        """Everything up to ``number`` may go. Raises StorageError."""
        journal = self._journal.journal
        if self._journal.failed is not None:
            return
        position = min(journal.position_after(number), journal.durable)
        gain = position - journal.head
        if gain <= 0 or (gain < journal.ring_bytes // TRIM_SHARE and now_s - self._trimmed_s < TRIM_EVERY_S):
            return
        self._trimmed_s = now_s
        self._journal.save(self._state(), trim_to=position, done=self._done)
