"""A secondary that is split from its group on purpose: at one number, its volumes perhaps written by hosts of its own.

SPLIT is stored when exactly its number is applied and durable. REJOIN ends it: the hosts are stopped, the state says
so, and then the bits of what they wrote are told (ARCHITECTURE, "Pair life"; PROTOCOL, rules 17 and 18).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Message, encode
from blockrepl.replication.actions import Action, Event, Publish, Send, SyncVolumes, Withdraw
from blockrepl.replication.bits import bit_messages

if TYPE_CHECKING:
    from blockrepl.replication.secondary import Secondary


class Splitting:
    """The split of one secondary; whether it is, is in the state."""

    def __init__(self, owner: Secondary) -> None:
        self._owner = owner
        self._asked: tuple[int, bool] | None = None

    def split(self, number: int, *, writable: bool, now_s: float) -> list[Action]:
        """SPLIT: apply to exactly ``number``, then store the split, then publish. Raises ProtocolError."""
        owner, state = self._owner, self._owner.state
        if not owner.validated <= number <= state.prepared:
            raise ProtocolError(f"SPLIT {number}: validated {owner.validated}, prepared {state.prepared} here")
        newest = owner.copying.newest
        if newest is not None and not 0 < newest.end <= owner.validated:
            raise ProtocolError(f"SPLIT {number} in mid-copy: there is no number to split at")
        if self._asked == (number, writable):
            return []
        if newest is not None:  # it came right behind the VALIDATE of that END
            self._asked = number, writable
            return owner.copying.when_applied(newest.end, lambda now_s: self._ended(number, writable, now_s))
        if state.split and (owner.applied, state.split_writable) == (number, writable):
            return []
        self._asked = number, writable

        def valid() -> bool:
            return self._asked == (number, writable) and owner.following

        def go(now_s: float) -> list[Action]:
            if not valid():
                return []
            state.split = False  # stored again below; a crash meanwhile leaves the older split
            owner.validated = max(owner.validated, number)
            owner.copying.when_applied(number, lambda _: [SyncVolumes(owner.later(synced))])
            return owner.copying.advance(now_s) + owner.copying.reached(now_s)

        def synced(_: float) -> list[Action]:
            state.applied = max(state.applied, number)
            if not valid():
                return []
            state.split, state.split_writable = True, writable
            return [owner.save(stored)]

        def stored(_: float) -> list[Action]:
            if not valid() or not state.split:
                return []
            self._asked = None
            return [Publish(), Event(f"split at {number}{', writable' if writable else ''}")]

        return [Withdraw(owner.later(go))] if state.split else go(now_s)

    def _ended(self, number: int, writable: bool, now_s: float) -> list[Action]:
        """The copy that a SPLIT found here has ended; a REJOIN may have come meanwhile, or another START."""
        owner = self._owner
        if self._asked != (number, writable):
            return []
        self._asked = None
        still = owner.following and not owner.copying.spans and owner.validated <= number <= owner.state.prepared
        return self.split(number, writable=writable, now_s=now_s) if still else []

    def end(self) -> None:
        """Split no more; the caller has withdrawn the volumes, and saves the state."""
        self._asked = None
        self._owner.state.split = self._owner.state.split_writable = False

    def rejoin(self, link: int, number: int) -> list[Action]:
        """REJOIN: stop the hosts, then say what they wrote. Whoever is not split has bits to tell all the same."""
        owner = self._owner
        self._asked = None

        def withdrawn(_: float) -> list[Action]:
            if not owner.following:
                return []
            self.end()
            return [owner.save(lambda now_s: self._tell(link, number) + owner.copying.advance(now_s))]

        if owner.state.split:
            return [Withdraw(owner.later(withdrawn))]
        return self._tell(link, number)

    def _tell(self, link: int, number: int) -> list[Action]:
        owner = self._owner
        epoch = owner.state.epoch.number
        messages = bit_messages(epoch, sorted(owner.bitmaps.items()))
        return [Send(link, [*messages, encode(Message.REJOINED, epoch, number=number)])]
