"""Life after life, each of a kind and with means by chance, until the time or the rounds are over."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from blockrepl.errors import BlockreplError
from scripts.demolib.errors import DemoError
from scripts.demolib.host import why_no_loop
from scripts.interrupts import uninterrupted
from scripts.torturelib import pair, postgres
from scripts.torturelib.disks import Disks, Platters
from scripts.torturelib.errors import BrokenPromiseError, TortureError
from scripts.torturelib.file_life import database_server, file_systems
from scripts.torturelib.group import NODES, Group
from scripts.torturelib.life import Life, Round
from scripts.torturelib.network import Lines, Namespaces, Network
from scripts.torturelib.typed import TypedGroup
from scripts.torturelib.walk import MODE, Walk

WALK_VOLUME_MIB = 160
WALK_POLICY = {"hold_s": "10.0", "lease_s": "1.5"}
JOURNAL, SMALL_JOURNAL = "64MiB", "24MiB"


HOSTS_WITH_FILES = {"files": file_systems, "postgres": database_server}


@dataclass(frozen=True)
class Lives:
    """How long they are."""

    storm_s: tuple[float, float] = (3.0, 9.0)
    most_storms: int = 4
    swaps: int = 3
    solos: int = 3
    walk_steps: int = 22
    steps: tuple[int, int] = (2, 7)  # of a walk, from one time at rest to the next


LONG, SHORT = Lives(), Lives((1.0, 4.0), 1, 1, 1, 4, (4, 6))


@dataclass
class Means:
    """What this machine allows."""

    home: Path
    why_no_namespaces: str
    why_no_loop: str
    why_no_postgres: str

    @classmethod
    def here(cls, home: Path, why_no_namespaces: str) -> Means:
        """Found out."""
        return cls(home, why_no_namespaces, why_no_loop(), postgres.why_not() or why_no_loop())

    def why_not(self, kind: str) -> str:
        """Why a life of this kind cannot be had; empty if it can."""
        return {"power": self.why_no_loop, "files": self.why_no_loop, "postgres": self.why_no_postgres}.get(kind, "")

    def network(self) -> Network:
        """As good as can be had."""
        return Lines(NODES) if self.why_no_namespaces else Namespaces(NODES)

    def __str__(self) -> str:
        network = f"proxies ({self.why_no_namespaces})" if self.why_no_namespaces else "network namespaces"
        loop = f"no file systems, no power loss ({self.why_no_loop})" if self.why_no_loop else "loop devices"
        return "; ".join(filter(None, (network, loop, self.why_no_postgres)))


class Campaign:
    """Performs rounds; `rounds` holds what they saw."""

    KINDS: ClassVar[tuple[str, ...]] = ("power", "walk", "takeback", "files", "solo", "kills", "postgres", "small")

    def __init__(
        self, means: Means, seed: int, only: str | None, keep: Path | None, *, verbose: bool, bug: str,
        short: bool = False,
    ) -> None:  # fmt: skip
        kinds = [kind for kind in self.KINDS if not means.why_not(kind)]
        if only is not None and only not in kinds:
            raise TortureError(f"no life of kind {only} here: {', '.join(kinds)} ({means})", 2)
        self._means = means
        self._seed = seed
        self._kinds = [only] if only else kinds
        self._keep = keep
        self._verbose = verbose
        self._bug = bug
        self._long = SHORT if short else LONG
        self._lives = 0
        self._rounds_left: int | None = None
        self._deadline_s: float | None = None
        self.rounds: list[Round] = []

    @property
    def ok(self) -> bool:
        """Nothing was found."""
        return not any(round_.problems for round_ in self.rounds)

    def run(self, rounds: int | None, deadline_s: float | None) -> None:
        """Until either is over. Stops at the first broken promise."""
        self._rounds_left, self._deadline_s = rounds, deadline_s
        while self.ok and not self._done():
            chance = random.Random(f"{self._seed}/{self._lives}")
            kind = self._kinds[self._lives % len(self._kinds)]
            self._lives += 1
            self._live(kind, chance)

    def _done(self) -> bool:
        late = self._deadline_s is not None and time.monotonic() >= self._deadline_s
        return late or (self._rounds_left is not None and len(self.rounds) >= self._rounds_left)

    def _live(self, kind: str, chance: random.Random) -> None:
        if kind == "walk":
            self._walk(chance)
            return
        blocks = chance.random() < 0.5
        # Where a suspension is not what the round is about, it would only make losses legal.
        keys = [f'on_full = "{"block" if blocks or kind != "small" else "suspend"}"']
        keys += ['fence = "never"'] * (kind == "solo")
        with self._group(kind, keys) as group:
            group.create()
            group.start()
            if kind in HOSTS_WITH_FILES:
                life = Life(group, chance, volumes=["index"])
                self._round(group, life, lambda: HOSTS_WITH_FILES[kind](life, chance.uniform(*self._long.storm_s)))
                return
            life = Life(group, chance)
            if kind == "takeback":
                self._swap_to_and_fro(group, life)
                return
            if kind == "solo":
                self._alone(group, life)
                return
            for _ in range(chance.randint(1, self._long.most_storms)):
                if not self._done():
                    self._round(group, life, lambda: life.storm(chance.uniform(*self._long.storm_s)))
            if kind == "small" and not self._done():
                full = life.full_journal if blocks else lambda: pair.full_and_suspended(life)
                self._round(group, life, full)
            if not self._done():
                self._round(group, life, life.disaster)

    def _walk(self, chance: random.Random) -> None:
        """An operator's random walk; a round is what lies between two times at rest."""
        volumes_mode, never, blocks = (chance.random() < 0.5 for _ in range(3))
        keys = [f'on_full = "{"block" if blocks else "suspend"}"', f'fence = "{"never" if never else "data"}"']
        keys.append(MODE[volumes_mode])
        with self._group("walk", keys) as group:
            assert isinstance(group, TypedGroup)
            group.create()
            group.start()
            life = Life(group, chance)
            walk = Walk(life, group, volumes_mode=volumes_mode)
            self._round(group, life, walk.begin)
            steps = 0
            while steps < self._long.walk_steps and self.ok and not self._done():
                some = chance.randint(*self._long.steps)
                steps += some
                self._round(group, life, partial(walk.play, some))

    def _swap_to_and_fro(self, group: Group, life: Life) -> None:
        """Split and resync, then takeover and takeback, several times in a row."""
        rounds = [lambda: pair.split_and_resync(life)]
        for _ in range(self._long.swaps):
            rounds += [life.disaster, lambda: pair.take_back(life)]
        for play in rounds:
            if not self._done():
                self._round(group, life, play)

    def _alone(self, group: Group, life: Life) -> None:
        for _ in range(self._long.solos):
            if not self._done() and group.direction == 0:
                self._round(group, life, lambda: pair.rolling_disaster(life))

    @contextmanager
    def _group(self, kind: str, keys: list[str]) -> Iterator[Group]:
        home = self._means.home / f"life{self._lives}"
        home.mkdir()
        disks = (Platters if kind == "power" else Disks)(home, NODES)
        network = self._means.network()
        journal = SMALL_JOURNAL if kind == "small" else JOURNAL
        if kind == "walk":
            group: Group = TypedGroup(
                home, network, disks, self._say, journal=journal, keys=keys, policy=WALK_POLICY,
                volume_mib=WALK_VOLUME_MIB,
            )  # fmt: skip
        else:
            group = Group(home, network, disks, self._say, journal=journal, keys=keys, bug=self._bug)
        try:
            yield group
        finally:
            with uninterrupted():
                group.close()
                shutil.rmtree(home, ignore_errors=True)

    def _round(self, group: Group, life: Life, play: Callable[[], Round]) -> None:
        if not self.ok:
            return
        began_s = time.monotonic()
        try:
            round_ = play()
        except (BrokenPromiseError, BlockreplError, DemoError, TortureError) as error:
            round_ = life.now
            round_.problems.append(str(error))
        round_.seconds = round(time.monotonic() - began_s, 2)
        round_.notes["life"] = self._lives
        round_.notes["disks"] = group.disks.kind
        self.rounds.append(round_)
        self._print(round_)
        if round_.problems:
            self._keep_logs(group)

    def _say(self, text: str) -> None:
        if self._verbose:
            print(f"    {text}", flush=True)

    def _print(self, round_: Round) -> None:
        verdict = "ok" if not round_.problems else "BROKEN"
        print(
            f"{len(self.rounds):4} {round_.kind:26} {round_.seconds:5.1f} s  {len(round_.faults):2} faults  "
            f"{round_.acknowledged:6} of {round_.writes:6} writes acknowledged, {round_.lost} lost; "
            f"{round_.transactions:5} transactions; {round_.blocks_compared:6} blocks compared  {verdict}",
            flush=True,
        )
        if round_.problems:
            for fault in round_.faults:
                print(f"     {fault}")
            for problem in round_.problems:
                print(f"     BROKEN: {problem}", flush=True)

    def _keep_logs(self, group: Group) -> None:
        for node in NODES:
            text = group.log_tail(node, 100_000 if self._keep else 12)
            if self._keep is not None:
                self._keep.mkdir(parents=True, exist_ok=True)
                (self._keep / f"{node}.log").write_text(text)
            else:
                print(f"--- {node}\n{text}", file=sys.stderr)

    def summary(self) -> str:
        """One line."""
        seconds = sum(round_.seconds for round_ in self.rounds)
        return (
            f"{len(self.rounds)} rounds of {self._lives} lives in {seconds / 60:.1f} min: "
            f"{sum(len(round_.faults) for round_ in self.rounds)} faults, "
            f"{sum(round_.acknowledged for round_ in self.rounds)} writes and "
            f"{sum(round_.transactions for round_ in self.rounds)} transactions acknowledged, "
            f"{sum(round_.blocks_compared for round_ in self.rounds)} blocks that are not zeroes compared: "
            + ("every promise kept" if self.ok else f"BROKEN (seed {self._seed})")
        )
