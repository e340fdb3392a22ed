"""Runs an opener of epochs (takeover, reform) over real links."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Protocol

from blockrepl.definition import Definition, Node
from blockrepl.node.control import Progress
from blockrepl.node.links import LinkTable, dial
from blockrepl.node.ports import Clock
from blockrepl.replication.actions import Action, Close, Event, Send


class Opener(Protocol):
    """What runs: `replication.takeover.Takeover`, `replication.reform.Reform`."""

    @property
    def open(self) -> bool:
        """It has not ended."""

    @property
    def peers(self) -> list[int]:
        """To be dialled."""

    def connected(self, link: int, node: int, nonce: bytes) -> list[Action]: ...
    def unreachable(self, node: int, why: str, now_s: float) -> list[Action]: ...
    def lost(self, link: int, now_s: float) -> list[Action]: ...
    def received(self, link: int, kind: int, fields: dict[str, Any], now_s: float) -> list[Action]: ...
    def tick(self, now_s: float) -> list[Action]: ...


class OpenerRun:
    """One run: dials every peer, its own node among them, and feeds the role."""

    def __init__(self, definition: Definition, node: Node, links: LinkTable, clock: Clock, progress: Progress) -> None:
        self.definition = definition
        self.node = node
        self.links = links
        self.clock = clock
        self._progress = progress
        self._own: set[int] = set()
        self._finished = asyncio.Event()
        self._role: Opener

    def owns(self, link: int) -> bool:
        """Whether a link was dialled by this run."""
        return link in self._own

    async def play(self, role: Opener) -> None:
        """Until it has ended, well or not."""
        self._role = role
        peers = [each for each in self.definition.nodes if each.id in role.peers]
        dials = [asyncio.create_task(self._dial(peer)) for peer in peers]
        try:
            await self._finished.wait()
        finally:
            for task in dials:
                task.cancel()
            for link in list(self._own):
                self.links.close(link, "the opener ended")

    async def _dial(self, peer: Node) -> None:
        try:
            sock = await dial(peer.address.host, peer.address.port)
        except OSError as error:
            why = error.strerror or str(error) or "no answer in time"
            self._perform(self._role.unreachable(peer.id, why, self.clock.now_s()))
            return
        connection = self.links.add(sock, greeted=True)
        self._own.add(connection.number)
        self._perform(self._role.connected(connection.number, peer.id, os.urandom(16)))

    def message(self, link: int, kind: int, fields: dict[str, Any]) -> None:
        """A message on one of its links."""
        self._perform(self._role.received(link, kind, fields, self.clock.now_s()))

    def lost(self, link: int) -> None:
        """One of its links is gone."""
        self._own.discard(link)
        self._perform(self._role.lost(link, self.clock.now_s()))

    def tick(self) -> None:
        """Time passes."""
        self._perform(self._role.tick(self.clock.now_s()))

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.links.send(action.link, action.buffers, action.chunk)
            elif isinstance(action, Close):
                self._own.discard(action.link)
                self.links.close(action.link, action.reason, action.last_words)
            elif isinstance(action, Event):
                self._progress({"step": action.text})
        self.links.settle()
        if not self._role.open:
            self._finished.set()
