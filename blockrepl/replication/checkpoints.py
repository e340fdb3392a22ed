"""A primary's checkpoint: everything of its own up to it is durable in its P-VOLs (PROTOCOL, rules 4 and 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockrepl.formats.link import Message, encode
from blockrepl.replication.actions import Action, Send

if TYPE_CHECKING:
    from blockrepl.replication.primary import Primary

Then = Callable[[float], list[Action]]
"""What follows when an action is done, given the time in seconds."""


class Checkpoints:
    """Made durable in two steps: the P-VOLs, then the number. Only then may others be told.

    Invariant: told <= state.checkpoint <= acked.
    """

    def __init__(self, owner: Primary) -> None:
        self._owner = owner
        self.told = owner.state.checkpoint
        self._under_way = False
        self._last_s = 0.0
        self._bytes = 0

    def stored(self, size_bytes: int, now_s: float) -> list[Action]:
        """So much more is in the P-VOLs, and not synced."""
        self._bytes += size_bytes
        return self.begin(now_s) if self._bytes >= self._owner.policy.checkpoint_bytes else []

    def tick(self, now_s: float) -> list[Action]:
        """Time passes."""
        owner = self._owner
        due = now_s - self._last_s >= owner.policy.checkpoint_s and owner.serving
        return self.begin(now_s) if due else []

    def begin(self, now_s: float) -> list[Action]:
        """A checkpoint at what is acknowledged now."""
        owner = self._owner
        following = not (owner.state.suspended or owner.suspending or owner.suspension.reforming)
        if self._under_way or owner.acked <= owner.state.checkpoint or not following:
            return []
        self._under_way, self._last_s, self._bytes = True, now_s, 0

        def ended(now_s: float) -> list[Action]:
            self._under_way = False
            owner.confirm()
            return self.tell()

        return self._store(ended)

    def settle(self) -> list[Action]:
        """What was replayed becomes durable; then the primary serves."""
        return self._store(self._settled)

    def _store(self, then: Then) -> list[Action]:
        owner = self._owner
        number = owner.acked  # taken before the sync (rule 4): what is stored while it runs may miss it

        return [owner.sync_volumes(lambda _: self._synced(number, then))]

    def _synced(self, number: int, then: Then) -> list[Action]:
        owner = self._owner
        owner.state.checkpoint = max(owner.state.checkpoint, number)
        owner.resyncing.remember_cursor()

        def saved(now_s: float) -> list[Action]:
            self.told = max(self.told, number)
            return then(now_s)

        return [owner.save_state(saved)]

    def _settled(self, now_s: float) -> list[Action]:
        self._last_s = now_s
        return self._owner.settled(now_s)

    def tell(self) -> list[Action]:
        """The intermediate may give up what it covers (rule 12)."""
        owner = self._owner
        if not owner.live:
            return []
        return [Send(owner.link, [encode(Message.CHECKPOINT, owner.state.epoch.number, number=self.told)])]

    def begin_anew(self) -> None:
        """What is under way will not be heard of again; the numbers may mean something else."""
        self._under_way = False
        self.told = min(self.told, self._owner.state.checkpoint)
