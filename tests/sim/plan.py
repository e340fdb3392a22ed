"""When what goes wrong: drawn from the seed alone, so that a fault can be left out and the others stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

KINDS = (
    "kill", "kill in mid-step", "kill two", "pause", "power", "site", "cut", "cut one way", "isolate", "reset", "late",
    "disk error", "disk broken", "disk full", "flipped bits", "slow disk", "wall clock", "clock rate", "dry run",
    "operator",
)  # fmt: skip
STORIES = ["production"] * 4 + ["attempts"] * 3 + ["disaster"] * 2 + ["planned"]
PAIR_STORIES = ["pairs", "never"]
SITES_STORIES = ["sites"]
SITES_KINDS = ("swap",) * 4 + ("burn", "take over", "replace", "replace and burn", "resync")
PAIR_SHARE = 0.4
USUAL_S = 8.0  # of faults, in a run that is not bounded by steps
STEPS_A_SECOND = 1200  # of a group at work, about
PAIR_KINDS = ("split", "resync", "resync", "verify", "resync")


@dataclass(frozen=True, slots=True)
class Planned:
    """One thing that goes wrong. ``number`` names it for as long as the seed is the same."""

    number: int
    at_s: float
    kind: str
    seed: str

    def chance(self) -> Random:
        """Where its particulars come from."""
        return Random(f"{self.seed} fault {self.number}")


def story_of(seed: int, usual: str) -> str:
    """What a run is about, where nobody says: some are about the pair's life."""
    mix = Random(f"{seed} mix")
    return mix.choice(PAIR_STORIES) if mix.random() < PAIR_SHARE else usual


def plan(
    seed: int, story: str, seconds: float, every_s: float | None, kinds: tuple[str, ...] | None, pace: float = 1.0
) -> list[Planned]:
    """What happens in ``seconds``, in order of time. ``pace``: all times between are so much of the usual ones."""
    random = Random(f"{seed} plan")
    mean_s = random.choice([0.2, 0.6, 2.0]) * pace
    some = random.sample(KINDS, random.randint(2, 7)) if random.random() < 0.5 else list(KINDS)
    first_s, story_s = random.uniform(0.3, 1.0) * pace, random.uniform(0.1, 0.5) * seconds
    kinds = kinds if kinds is not None else tuple(some)
    found: list[tuple[float, str]] = []
    at_s = first_s
    while at_s < seconds and kinds:
        found.append((at_s, random.choice(kinds)))
        at_s += random.expovariate(1 / (every_s or mean_s))
    if story == "attempts":
        while story_s < seconds:
            found.append((story_s, "attempt"))
            story_s += random.expovariate(1 / 2.5) * pace
    elif story in ("pairs", "never"):
        commands_s = story_s
        while commands_s < seconds:
            found.append((commands_s, random.choice(PAIR_KINDS)))
            commands_s += random.expovariate(1 / 0.7) * pace
        if random.random() < 0.3:
            found.append((seconds * random.uniform(0.4, 0.9), random.choice(["disaster", "takeover"])))
        mode = Random(f"{seed} mode")
        if mode.random() < 0.5:
            found += [(seconds * mode.uniform(0.1, 0.9), "mode") for _ in range(mode.choice([1, 2]))]
    elif story == "sites":
        while story_s < seconds:
            found.append((story_s, random.choice(SITES_KINDS)))
            story_s += random.expovariate(1 / 2.0)
    elif story in ("disaster", "planned"):
        found.append((story_s, "disaster" if story == "disaster" else "takeover"))
    return [Planned(n, at_s, kind, str(seed)) for n, (at_s, kind) in enumerate(sorted(found), start=1)]
