"""Runs the opener of a takeover over real links."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from blockrepl.definition import Definition, Node
from blockrepl.errors import UsageError
from blockrepl.node.control import Progress
from blockrepl.node.create import image_path
from blockrepl.node.links import LinkTable, dial
from blockrepl.node.ports import Clock
from blockrepl.replication.actions import Action, Close, Event, Send
from blockrepl.replication.takeover import OPEN, Phase, Takeover


class TakeoverRun:
    """One takeover: dials every peer, its own node among them, and feeds the role."""

    def __init__(self, definition: Definition, node: Node, links: LinkTable, clock: Clock, progress: Progress) -> None:
        self._definition = definition
        self._node = node
        self._links = links
        self._clock = clock
        self._progress = progress
        self._own: set[int] = set()
        self._finished = asyncio.Event()
        self._role: Takeover

    def owns(self, link: int) -> bool:
        """Whether a link was dialled by this takeover."""
        return link in self._own

    async def run(self, *, dry_run: bool, force: bool, writable: bool, new_id: Callable[[], bytes]) -> dict[str, Any]:
        """Returns the report as the control protocol has it. Raises UsageError when the takeover fails."""
        definition = self._definition
        targets = definition.targets(1 - self._node.site)
        self._role = Takeover(
            group=definition.group_id.bytes, node=self._node.id, name=self._node.name,
            intermediate=definition.intermediate.id, secondaries=[each.id for each in targets],
            names={each.id: each.name for each in definition.nodes}, new_id=new_id, now_s=self._clock.now_s(),
            dry_run=dry_run, force=force, writable=writable,
        )  # fmt: skip
        peers = [definition.intermediate, *targets]
        dials = [asyncio.create_task(self._dial(peer)) for peer in peers]
        try:
            await self._finished.wait()
        finally:
            for task in dials:
                task.cancel()
            for link in list(self._own):
                self._links.close(link, "the takeover ended")
        if self._role.phase is not Phase.DONE:
            raise UsageError(f"no takeover: {self._role.problem}", hint=self._role.hint)
        return self._result(started_writable=writable)

    async def _dial(self, peer: Node) -> None:
        try:
            sock = await dial(peer.address.host, peer.address.port)
        except OSError as error:
            why = error.strerror or str(error) or "no answer in time"
            self._perform(self._role.unreachable(peer.id, why, self._clock.now_s()))
            return
        connection = self._links.add(sock, greeted=True)
        self._own.add(connection.number)
        self._perform(self._role.connected(connection.number, peer.id, os.urandom(16)))

    def message(self, link: int, kind: int, fields: dict[str, Any]) -> None:
        """A message on one of its links."""
        self._perform(self._role.received(link, kind, fields, self._clock.now_s()))

    def lost(self, link: int) -> None:
        """One of its links is gone."""
        self._own.discard(link)
        self._perform(self._role.lost(link, self._clock.now_s()))

    def tick(self) -> None:
        """Time passes."""
        self._perform(self._role.tick(self._clock.now_s()))

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._links.send(action.link, action.buffers, action.chunk)
            elif isinstance(action, Close):
                self._own.discard(action.link)
                self._links.close(action.link, action.reason, action.last_words)
            elif isinstance(action, Event):
                self._progress({"step": action.text})
        self._links.settle()
        if self._role.phase not in OPEN:
            self._finished.set()

    def _result(self, *, started_writable: bool) -> dict[str, Any]:
        report = self._role.report
        definition = self._definition
        names = {each.id: each.name for each in definition.nodes}
        members = {names[member] for member in report.members}
        ends = [(volume, definition.end(volume, self._node.site)) for volume in definition.volumes if volume.replicated]
        return {
            "schema": 1,
            "group": definition.name,
            "dry_run": report.dry_run,
            "epoch": {"number": report.epoch, "id": report.epoch_id},
            "number": report.number,
            "drained": report.drained,
            "completed_earlier": report.completed,
            "lost_writes": report.lost_writes,
            "lost_bytes": report.discarded_bytes,
            "discarded_writes": report.discarded_writes,
            "missing": [names[node] for node in report.missing],
            "volumes": [
                {
                    "name": volume.name, "node": end.name, "writable": started_writable,
                    "image": str(image_path(end, volume)),
                }
                for volume, end in ends
                if end.name in members
            ],
        }  # fmt: skip
