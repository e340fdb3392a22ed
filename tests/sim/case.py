"""One run and how it ended; its command line; its story."""

from __future__ import annotations

import re
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from tests.sim.group import Group, Options, Result
from tests.sim.sites import group_for
from tests.sim.words import sentences

Within = Callable[[], AbstractContextManager[Any]]
"""What is planted while a run lasts."""


@dataclass(frozen=True)
class Failure:
    """How a run broke."""

    text: str  # class and words of the exception
    where: str  # its innermost lines
    at_s: float
    performed: tuple[int, ...]  # faults of the plan that had happened

    @property
    def kind(self) -> str:
        """What stays the same when a run is made shorter: no numbers, no names."""
        return re.sub(r"\d+|\b[ps]\d\b", "#", self.text.split(":")[0] + ": " + self.text.partition(": ")[2])[:48]


@dataclass(frozen=True)
class Case:
    """A run to be made."""

    seed: int
    options: Options
    planted: str = ""  # the name of a planted bug

    def run(self, within: Within = nullcontext, *, on_group: Callable[[Group], None] | None = None) -> Result | Failure:
        """Make it. KeyboardInterrupt passes, everything else is a failure."""
        group = group_for(self.seed, self.options)
        if on_group is not None:
            on_group(group)
        try:
            with within():
                return group.run()
        except (Exception, AssertionError) as error:
            where = "".join(traceback.format_exception(error)[-4:])
            text = f"{type(error).__name__}: {error}"
            return Failure(text, where, group.world.now_s, tuple(group.performed))

    def story(self, within: Within = nullcontext) -> Iterator[str]:
        """The run again, told: faults, messages, what hosts hear. What repeats is counted."""
        lines: list[tuple[float, str]] = []

        def listen(group: Group) -> None:
            world = group.world
            world.on_message = lambda process, peer, data: lines.extend(
                (world.now_s, line) for line in sentences(process.name, peer, data)
            )
            world.on_say = lambda who, text: lines.append((world.now_s, f"{who} {text}".strip()))

        self.run(within, on_group=listen)
        return folded(lines)

    def command(self) -> str:
        """What to type to see it again."""
        usual, options = Options(), self.options
        words = [f"scripts/simulate --seed {self.seed}"]
        for flag, name in FLAGS.items():
            value = getattr(options, name)
            if value != getattr(usual, name):
                words.append(f"{flag} {_argument(value)}")
        if options.strict:
            words.append("--strict")
        if self.planted:
            words.append(f"--planted {self.planted}")
        return " ".join(words)

    def but(self, **changes: Any) -> Case:
        """With other options."""
        return replace(self, options=replace(self.options, **changes))


FLAGS = {
    "--seconds": "seconds", "--steps": "steps", "--story": "story", "--threads": "threads", "--volumes": "volumes",
    "--ring": "ring_bytes",
    "--every": "fault_every_s", "--volumes-mode": "volumes_mode", "--duplicate": "duplicate",
    "--only": "faults", "--until": "until_s", "--faults": "keep", "--salt": "salt",
}  # fmt: skip


def _argument(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, frozenset)):
        return "'" + ",".join(str(each) for each in (sorted(value) if isinstance(value, frozenset) else value)) + "'"
    return str(value)


def folded(lines: list[tuple[float, str]]) -> Iterator[str]:
    """With the time in front; what was told a few lines ago already is counted only."""
    recent: deque[str] = deque(maxlen=30)
    count = 0
    for now_s, text in lines:
        if text in recent:
            count += 1
            continue
        if count:
            yield f"{'':10} … {count} lines like those above"
        count = 0
        recent.append(text)
        yield f"{now_s:9.4f}  {text}"
    if count:
        yield f"{'':10} … {count} lines like those above"
