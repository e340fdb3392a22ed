"""An operator at a group that hosts use: what is typed, where hosts are, and what a takeover gave up."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from typing import Any

from scripts.torturelib.errors import BrokenPromiseError
from scripts.torturelib.group import INTERMEDIATE, NODES, PATIENCE_S, PRIMARIES, SITE_NAMES
from scripts.torturelib.healing import follow
from scripts.torturelib.life import Life
from scripts.torturelib.typed import Answer, TypedGroup

ROLLING = ("rolling forward", "stored", "taken over")  # a secondary for which a takeover is decided


class Operator:
    """``life`` knows what hosts were told. Raises BrokenPromiseError wherever what is there is not what was said."""

    def __init__(self, life: Life, group: TypedGroup) -> None:
        self._life, self._group, self._random = life, group, life.chance
        self._round = life.now
        self._hosts = ExitStack()

    # hosts

    def _hosts_begin(self) -> None:
        self._hosts = ExitStack()
        self._hosts.enter_context(self._life.load(self._round, warm=False))

    def _moved(self, what: str, *, may_lose: bool, most: int | None = None) -> None:
        """The other site is active now: hosts end, what it holds is judged, hosts begin there.

        ``most``: so many writes are given up at most, as the takeover said.
        """
        group, life = self._group, self._life
        self._hosts.close()
        group.direction = 1 - group.direction
        verdict = life.check(self._round, group.direction, may_lose=may_lose)
        if most is not None and len(verdict.lost) > most:
            self._round.problems.append(f"{what}: {len(verdict.lost)} acknowledged writes are missing, it said {most}")
        if self._round.problems:
            raise BrokenPromiseError(f"{what}: {SITE_NAMES[group.direction]} site")
        life.history.rebase(life.content(group.direction))
        self._hosts_begin()

    # looking

    def _note(self, text: str) -> None:
        self._round.faults.append(text)
        self._group.say(f"- {text}")

    def _type(self, line: str) -> Answer:
        answer = self._group.type(*line.split())
        self._note(line if answer.ok else f"{line} (ended with {answer.code})")
        if answer.code and self._random.random() < 0.4:
            follow(self._group, answer)
        return answer

    def _active_site(self) -> int:
        """Where the sources of the newest epoch are; as before when nobody answers."""
        newest, site = -1, self._group.direction
        for node in NODES:
            status = self._group.status(node)
            epoch = int((status.get("epoch") or {}).get("number") or 0)
            if node != INTERMEDIATE and status.get("incarnation") and epoch > newest:
                newest, site = epoch, 0 if node in PRIMARIES else 1
        return site

    def _decided(self) -> bool:
        """A takeover has come so far that it can only be finished."""
        return any(self._group.status(node).get("state") in ROLLING for node in self._group.targets)

    # takeovers

    def _learn(self, what: str, *, may_lose: bool) -> None:
        """After a command that may have moved the group, whether it ended well or not."""
        if self._decided():
            self._finish_takeover(what, may_lose=may_lose)
        elif self._active_site() != self._group.direction:
            self._moved(what, may_lose=may_lose)

    def _take_over(self, *, insist: bool) -> None:
        group = self._group
        self._up_targets()
        killed = self._random.random() < 0.25
        if killed:
            typed = group.begin("takeover", "--json")
            time.sleep(self._random.uniform(0.2, 2.0))
            victim = self._random.choice(group.targets)
            self._note(f"takeover, and kill -9 {victim} in its middle")
            group.kill([victim])
            answer = group.end(typed)
            self._up_targets()
            if not answer.ok and not self._decided() and not insist:
                return
        else:
            answer = self._type("takeover --json")
        if not answer.ok and (insist or self._decided()):
            self._finish_takeover("takeover", may_lose=True)
        elif answer.ok:
            self._judge(json.loads(answer.out))

    def _up_targets(self) -> None:
        """They answer, though what they are may keep them from being ready."""
        group = self._group
        down = [node for node in group.targets if node not in group.running]
        if down:
            group.start(*down, wait=False)
        group.wait_for(lambda: all(map(group.status, group.targets)), f"{' and '.join(group.targets)} answer")

    def _finish_takeover(self, what: str, *, may_lose: bool) -> None:
        """It is decided, or there is nothing else to go on with: typed until it is done."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            group = self._group
            self._up_targets()
            answer = self._type("takeover --json")
            if answer.ok:
                self._judge(json.loads(answer.out), may_lose=may_lose)
                return
            if self._active_site() != group.direction and not self._decided():
                self._moved(what, may_lose=may_lose)
                return
            time.sleep(0.5)
        raise BrokenPromiseError(f"{what}: a takeover is under way, and does not end within {PATIENCE_S:g} s")

    def _judge(self, result: dict[str, Any], *, may_lose: bool = True) -> None:
        """What it said, against what is there."""
        said = {
            key: result[key] for key in ("pair", "drained", "lossless", "counted", "lost_writes", "rolled_back_from")
        }
        self._note(f"takeover at {result['number']}: {said}")
        counted = result["counted"] and not result["alone"]
        self._moved(
            f"takeover {said}", may_lose=may_lose and not result["lossless"],
            most=result["lost_writes"] if counted else None,
        )  # fmt: skip
