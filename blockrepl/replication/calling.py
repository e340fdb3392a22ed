"""Calling the members of a group together: what the openers of epochs share. No I/O.

The host of an opener dials every peer and says `connected` or `unreachable` of each.
"""

from __future__ import annotations

from typing import Any

from blockrepl.formats.link import LinkRole
from blockrepl.replication.actions import Action, Close, Send
from blockrepl.replication.greeting import Introduction


class Calls:
    """Links to peers, who greeted, and who is silent and why.

    Invariant: a peer is in ``welcomes`` or in ``silent``, or has not answered yet.
    """

    def __init__(self, group: bytes, node: int, name: str, role: LinkRole, peers: list[int]) -> None:
        self._me = Introduction(group, node, name, role)
        self.peers = peers
        self.links: dict[int, int] = {}  # link → node
        self.welcomes: dict[int, dict[str, Any]] = {}
        self.silent: dict[int, str] = {}

    def connected(self, link: int, node: int, nonce: bytes) -> list[Action]:
        """A connection to a peer is up: greet."""
        self.links[link] = node
        return [Send(link, [self._me.hello(node, nonce)])]

    def fell_silent(self, node: int, why: str) -> bool:
        """A peer does not answer; False when that is no news."""
        if node in self.silent:
            return False
        self.silent[node] = why
        self.welcomes.pop(node, None)
        return True

    @property
    def complete(self) -> bool:
        """Everybody has answered, or will not."""
        return len(self.welcomes) + len(self.silent) == len(self.peers)

    @property
    def highest_epoch(self) -> int:
        """The number of the highest epoch that anybody named."""
        return max((max(w["epoch"].number, w["promised"].number) for w in self.welcomes.values()), default=0)

    def send(self, nodes: list[int], message: bytes) -> list[Action]:
        """To each of them."""
        return [Send(link, [message]) for link, node in self.links.items() if node in nodes]

    def hang_up(self, why: str) -> list[Action]:
        """Close every link."""
        links = list(self.links)
        self.links.clear()
        return [Close(link, why) for link in links]
