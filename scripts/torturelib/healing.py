"""Back to PAIR, as somebody gets there who knows what `explain` and the hints say, and which disk is lost."""

from __future__ import annotations

import json
import re
import shlex
import time
from typing import Any

from scripts.torturelib.errors import BrokenPromiseError
from scripts.torturelib.group import NODES, PATIENCE_S
from scripts.torturelib.typed import Answer, TypedGroup

HEALED_S = 2 * PATIENCE_S
HARMLESS = ("status", "pair wait", "pair resync", "pair create", "pair split", "explain", "up")  # never loses a write
POLL_S = 0.5


def explain(group: TypedGroup) -> dict[str, Any]:
    """What it says."""
    answer = group.type("explain", "--json")
    if not answer.ok:
        raise BrokenPromiseError(f"explain must always answer: {answer}: {answer.err}")
    found: dict[str, Any] = json.loads(answer.out)
    return found


def hinted(answer: Answer) -> tuple[str, ...]:
    """The command that a hint names, if it is one that can be typed without knowing more."""
    match = re.search(r"blockrepl ((?:[a-z]+)(?: [^`;,]*)?)", answer.hint)
    words = tuple(shlex.split(match[1])) if match else ()
    line = " ".join(words)
    wild = {"--swap", "--force", "--alone"} & set(words)
    return words if any(line.startswith(each) for each in HARMLESS) and not wild else ()


def follow(group: TypedGroup, answer: Answer) -> Answer | None:
    """Type what a hint says. A wait is cut short."""
    words = hinted(answer)
    if not words:
        return None
    if words[:2] == ("pair", "wait"):
        words = (*(word for word in words if word != "-t" and not word.isdigit()), "-t", "20")
    return group.type(*words)


class Healing:
    """``lost``: the node whose disk is gone, if any."""

    def __init__(self, group: TypedGroup, lost: str = "") -> None:
        self._group, self._lost = group, lost

    def heal(self) -> None:
        """Raises BrokenPromiseError when PAIR does not come."""
        group = self._group
        group.network.heal()
        group.go_on()
        deadline_s = time.monotonic() + HEALED_S
        document: dict[str, Any] = {}
        while time.monotonic() < deadline_s:
            document = explain(group)
            if document["pair"] == "PAIR" and not self._lost and self._all_ready():
                return
            self._step(document)
        about = {key: document.get(key) for key in ("pair", "reason", "nodes", "next")}
        raise BrokenPromiseError(f"no PAIR within {HEALED_S:g} s, whatever explain says: {about}")

    def _all_ready(self) -> bool:
        return all(self._group.status(node).get("ready") for node in NODES)

    def _step(self, document: dict[str, Any]) -> None:
        group = self._group
        down = [node for node in NODES if node not in group.running and node != self._lost]
        if down:
            group.start(*down, wait=False)
            return
        if self._lost:
            if group.type("replace", "--node", self._lost).ok:
                self._lost = ""
            else:
                time.sleep(POLL_S)
            return
        commands = [each.removeprefix("blockrepl ") for each in document["next"] if each.startswith("blockrepl ")]
        if not commands:
            time.sleep(POLL_S)
            return
        words = [word for word in shlex.split(commands[0]) if not word.endswith(".toml")]
        if words[:2] == ["pair", "wait"]:
            words += ["-t", "20"]
        answer = group.type(*words)
        if not answer.ok:
            follow(group, answer)
            time.sleep(POLL_S)
