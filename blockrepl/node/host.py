"""A host performs the actions of a role: the half that is the same under asyncio and in the simulator."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from blockrepl.node.ports import Clock, Links, Log, Workers
from blockrepl.replication.actions import Action, Close, Event, Send

Performer = Callable[[Any], None]


class Host:
    """Performs actions in order. What an action brings about at once (more actions) comes after those that wait.

    Every entry from outside ends with `settle`, which pushes out what was queued for links and journal: one system
    call each for a whole batch.
    """

    def __init__(self, links: Links, clock: Clock, workers: Workers, log: Log) -> None:
        self.links = links
        self.clock = clock
        self.workers = workers
        self.log = log
        self._actions: deque[Action] = deque()
        self._performing = False
        self._performers: dict[type, Performer] = {Send: self._send, Close: self._close, Event: self._event}

    def perform(self, actions: list[Action]) -> None:
        """Perform, in order."""
        queue = self._actions
        queue.extend(actions)
        if self._performing:
            return
        self._performing = True
        performers = self._performers
        try:
            while queue:
                action = queue.popleft()
                performers[type(action)](action)
        finally:
            self._performing = False

    def settle(self) -> None:
        """Push out what is queued."""
        self.links.settle()

    def _send(self, action: Send) -> None:
        self.links.send(action.link, action.buffers, action.chunk)

    def _close(self, action: Close) -> None:
        self.links.close(action.link, action.reason, action.last_words)

    def _event(self, action: Event) -> None:
        self.log(action.text, action.fields)
