"""Hop 1 as the intermediate sees it: what it knows of each primary, and the credit it grants them.

Credit is counted in ring bytes of journal frames, as an absolute limit per connection. The sum of what is granted and
unused never exceeds the free ring less a reserve, so a full journal holds the hosts back and nothing else: CHECKPOINT,
heartbeats and VALIDATE pass (PROTOCOL, rule 6).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from blockrepl.formats.state import PrimaryRow


@dataclass(slots=True)
class Sender:
    """One primary.

    Invariants: durable_batch <= batch, durable_last <= last; an incarnation never goes back.
    """

    node: int
    incarnation: int = 0
    batch: int = 0  # last batch numbered, of this incarnation
    durable_batch: int = 0
    last: int = 0  # last number given to it
    durable_last: int = 0
    checkpoint: int = 0
    spilled: int = 0  # its records up to here lie beside the ring too, durably
    link: int = 0
    live: bool = False  # WELCOME was sent on this link
    credit: int = 0
    credit_used: int = 0
    heard_s: float = 0.0
    live_s: float = 0.0  # when it was last live
    stamp_ns: int = 0
    echo_ns: int = 0  # the newest of our stamps that it has echoed
    wants_bytes: int = 0  # of the record that it waits for credit for
    suspended: bool = False  # it said so: its P-VOLs are ahead of the journal
    trusted: bool = True
    resync: int = 0
    config: int = 0  # digest of the newest configuration that it has files for
    hello: dict[str, Any] | None = field(default=None)  # greeted, not welcomed yet

    def row(self) -> PrimaryRow:
        """What is kept durably: durable values only."""
        return PrimaryRow(self.node, self.incarnation, self.durable_batch, self.durable_last, self.checkpoint)


class Senders:
    """All primaries of the group."""

    def __init__(self, nodes: Iterable[int], rows: Iterable[PrimaryRow], window_bytes: int) -> None:
        self.by_node = {node: Sender(node) for node in nodes}
        self.by_link: dict[int, Sender] = {}
        self._window_bytes = window_bytes
        self.free_bytes = 0  # of the ring, less the reserve
        for row in rows:
            sender = self.by_node.setdefault(row.node, Sender(row.node))
            sender.incarnation, sender.checkpoint = row.incarnation, row.checkpoint
            sender.batch = sender.durable_batch = row.batch
            sender.last = sender.durable_last = row.last

    def recovered(self, node: int, incarnation: int, batch: int, last: int) -> None:
        """A record of this primary stands in the recovered journal; called in the journal's order."""
        sender = self.by_node.setdefault(node, Sender(node))
        if last <= sender.last:
            return
        if incarnation >= sender.incarnation:
            sender.incarnation = incarnation
            sender.batch = sender.durable_batch = batch
        sender.last = sender.durable_last = last

    def incarnate(self, sender: Sender, incarnation: int) -> None:
        """A new process of this primary: its batches count from 1."""
        sender.incarnation = incarnation
        sender.batch = sender.durable_batch = 0

    def attach(self, sender: Sender, link: int, hello: dict[str, Any], now_s: float) -> None:
        """It greeted; the older link is closed already."""
        sender.link, sender.hello, sender.live, sender.heard_s = link, hello, False, now_s
        sender.credit = sender.credit_used = 0
        sender.stamp_ns = sender.echo_ns = sender.wants_bytes = sender.config = 0
        sender.suspended, sender.trusted = hello["suspended"], hello["trusted"]
        self.by_link[link] = sender

    def detach(self, link: int) -> None:
        """The link is gone, and with it the credit it held."""
        sender = self.by_link.pop(link, None)
        if sender is not None and sender.link == link:
            sender.link, sender.hello, sender.live = 0, None, False
            sender.credit = sender.credit_used = 0

    def grant(self, sender: Sender, *, whole: bool = False) -> bool:
        """Raise the credit of one primary when half its window is used up; True when it rose by much.

        With ``whole`` also when it is not: one record may need more than the half that is left.
        """
        window = min(self._window_bytes, self.free_bytes // (2 * len(self.by_node)))
        window = max(window, sender.wants_bytes)  # a record that is larger than a window goes when the ring has room
        unused = sender.credit - sender.credit_used
        if unused * 2 > window and not whole:
            return False
        outstanding = sum(other.credit - other.credit_used for other in self.by_link.values())
        rise = min(window - unused, self.free_bytes - outstanding)
        if rise <= 0:
            return False
        sender.credit += rise
        return True

    @property
    def starving(self) -> bool:
        """A primary has a record that no credit is left for."""
        return any(s.live and s.credit - s.credit_used < s.wants_bytes for s in self.by_node.values())

    @property
    def releasable(self) -> int | None:
        """Every record up to it is durable in its own primary's P-VOL; None when all are (rule 12)."""
        waiting = [kept for s in self.by_node.values() if (kept := max(s.checkpoint, s.spilled)) < s.durable_last]
        return min(waiting) if waiting else None
