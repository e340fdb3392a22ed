"""What a takeover did, or would do, and what its number means for each secondary (PROTOCOL, rules 20 and 23)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Report:
    """What a takeover did, or would do. Numbers are sequence numbers."""

    dry_run: bool = False
    epoch: int = 0
    epoch_id: str = ""
    number: int = 0
    drained: bool = False  # the intermediate was alive: nothing acknowledged is lost
    without: str = ""  # why it went on without the intermediate
    pair: str = ""  # of the group, as the intermediate or else a secondary knows it
    copying: bool = False  # some secondary is between START and END
    initial: bool = False  # … of an initial copy: it has no consistent image
    rolled_back_from: int | None = None  # copying: what all hold, and go back from to ``number``
    lost_writes: int = 0  # known to have been numbered and not at all secondaries; copied blocks count too
    lost_bytes: int = 0  # of them, as far as they were counted
    counted: bool = False  # the intermediate counted hosts' writes in its journal: exactly those are lost
    lost_s: float | None = None  # from the last write kept to the newest one known to be lost; None for unknown
    alone: bool = False  # hosts of the old site may have completed writes that were never numbered
    out_of_sync_bytes: int = 0  # suspended: what the old site alone has, in blocks, as far as it is known
    split_bytes: int = 0  # what hosts at this site wrote since a split, in blocks: it stays
    discarded_writes: int = 0  # held by some secondary beyond the number
    discarded_bytes: int = 0
    members: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    completed: bool = False  # an earlier takeover was finished

    @property
    def lossless(self) -> bool:
        """It is known that nothing that was acknowledged is lost."""
        return (self.drained or self.counted) and not self.lost_writes and not self.alone

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def between(answer: dict[str, Any], number: int) -> bool:
    """Whether a secondary would at ``number`` be between START and END.

    Below its START too, if above the number that it goes back to: what it skipped over was never sent to it.
    """
    ended = answer["end"] and number >= answer["end"]
    return bool(answer["copying"] and number > answer["copy_from"] and not ended)


def reaches(answer: dict[str, Any], number: int) -> bool:
    """Whether a secondary can be brought to ``number``: forward, or back by its undo file."""
    back = answer["copying"] and not answer["initial"] and answer["copy_from"] == number
    return bool(back or answer["validated"] <= number)


def why_not_at_marker(name: str, answers: Mapping[str, dict[str, Any]]) -> str:
    """Why secondaries cannot all be brought to a marker, each by its name; empty when they can."""
    problems = []
    for node, answer in sorted(answers.items()):
        number = answer["marker"]
        if not number:
            problems.append(f"{node} does not know it")
        elif number < answer["validated"]:
            problems.append(f"{node} has gone beyond it, to {answer['validated']}")
        elif number > answer["held"]:
            problems.append(f"{node} holds all up to {answer['held']} only")
    numbers = sorted({answer["marker"] for answer in answers.values() if answer["marker"]})
    at = f" (number {', '.join(map(str, numbers))})" if numbers else ""
    if not problems and len(numbers) > 1:
        problems.append("it was put twice, and not all have got it the second time")
    return f'no stop at the marker "{name}"{at}: {"; ".join(problems)}' if problems else ""
