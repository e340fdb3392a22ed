"""One life of a group: it is made, hosts and faults work on it round after round, until a disaster ends it.

After each round what hosts were told is compared with what the images hold, on both sides.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from blockrepl.errors import BlockreplError
from scripts.torturelib.database import CorruptError, Database, image_reader, recover
from scripts.torturelib.errors import BrokenPromiseError
from scripts.torturelib.faults import Storm
from scripts.torturelib.group import INTERMEDIATE, NAMES, NODES, SITE_NAMES, Group
from scripts.torturelib.history import History, Verdict
from scripts.torturelib.hosts import Load
from scripts.torturelib.images import compare, stamps_of
from tests.demo.nbd_client import NbdVolume

FEWEST_ACKNOWLEDGED = 30
WARM_UP_S = 300.0


@dataclass
class Round:
    """What a round saw."""

    kind: str
    faults: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    writes: int = 0
    acknowledged: int = 0
    lost: int = 0  # allowed where the intermediate was lost too
    transactions: int = 0
    blocks_compared: int = 0  # that are not zeroes
    host_errors: int = 0
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


class Life:
    """``chance`` decides everything that is left to chance."""

    def __init__(self, group: Group, chance: random.Random, *, volumes: Collection[str] = NAMES) -> None:
        self.group = group
        self.chance = chance
        self.history = History()
        self.volumes = [NAMES.index(name) for name in volumes]
        self.database = set(volumes) >= {"data", "log"}
        self.committed = 0
        self.fresh = True
        self.doubtful: set[tuple[int, int]] = set()  # written in the round of the last disaster
        self.now = Round("start")  # the round under way

    # hosts

    @contextmanager
    def load(self, round_: Round, *, warm: bool = True) -> Iterator[Load]:
        """Hosts write while the block runs; then they end, and their complaints are noted."""
        seed = str(self.chance.random())
        site = self.group.direction
        load = Load(self.history, self.volumes, lambda volume: self._uri(NAMES[volume], site), seed).begin()
        database = None
        if self.database:
            database = Database(lambda name: self._uri(name, site), seed, committed=self.committed, fresh=self.fresh)
            database.start()
        try:
            if warm:
                self._warm_up(load, database)
            yield load
        finally:
            load.end()
            if database is not None:
                database.end()
                round_.transactions += database.committed - self.committed
                round_.problems += database.broken
                round_.host_errors += len(database.errors)
                self.committed, self.fresh = database.committed, database.fresh
            round_.host_errors += len(load.errors)
            round_.problems += load.broken

    def _uri(self, name: str, site: int) -> str:
        return self.group.nbd_uri(name, secondary=bool(site))

    def _warm_up(self, load: Load, database: Database | None) -> None:
        """Until they are in full swing."""
        deadline_s = time.monotonic() + WARM_UP_S
        committed = self.committed
        while self.history.acknowledged < FEWEST_ACKNOWLEDGED or (database and database.committed <= committed):
            if load.broken or (database and database.broken):
                return
            if time.monotonic() > deadline_s:
                raise BrokenPromiseError(f"hosts cannot write: {load.errors[-1:]} {database and database.errors[-1:]}")
            time.sleep(0.02)

    # checks

    def content(self, site: int) -> dict[int, list[tuple[int, int]]]:
        """What the images hold of blocks that were ever written."""
        return {
            volume: list(stamps_of(self.group.image(NAMES[volume], site), volume, blocks))
            for volume, blocks in self.history.written().items()
        }

    def check(self, round_: Round, site: int, *, may_lose: bool, spare_database: bool = False) -> Verdict:
        """Judge the images of one side."""
        where = SITE_NAMES[site]
        verdict = self.history.judge(self.content(site))
        round_.problems += [f"{where} site: {problem}" for problem in verdict.problems[:5]]
        if not round_.writes:
            round_.writes, round_.acknowledged = verdict.writes, verdict.acknowledged
        round_.blocks_compared += verdict.stamped_blocks
        round_.lost = max(round_.lost, len(verdict.lost))
        if verdict.lost and not may_lose:
            some = "; ".join(map(str, verdict.lost[:3]))
            round_.problems.append(f"{where} site: {len(verdict.lost)} acknowledged writes are missing: {some}")
        if self.database and not self.fresh and not spare_database:
            self._check_database(round_, site, may_lose=may_lose)
        return verdict

    def _check_database(self, round_: Round, site: int, *, may_lose: bool) -> None:
        where = SITE_NAMES[site]
        data, log = (self.group.image(name, site) for name in ("data", "log"))
        try:
            state = recover(image_reader(data, log))
        except CorruptError as error:
            round_.problems.append(f"{where} site: the database: {error}")
            return
        if state.last < self.committed and not may_lose:
            text = f"{where} site: the database ends at transaction {state.last}, {self.committed} was committed"
            round_.problems.append(text)
        if may_lose:
            self.committed = min(self.committed, state.last)

    def compare_ends(self, round_: Round) -> None:
        """Every block of every volume, both sides."""
        for name in NAMES:
            found = compare(self.group.image(name, 0), self.group.image(name, 1))
            round_.blocks_compared += found.nonzero_blocks
            if found.differing:
                some = ", ".join(map(str, found.differing[:8]))
                text = f"{name}: {len(found.differing)} blocks differ between the sites: {some}"
                round_.problems.append(text)

    def at_rest(self, round_: Round) -> None:
        """Everything heals and settles; both sides must hold everything acknowledged, and be the same."""
        self.group.settle()
        for site in (0, 1):
            self.check(round_, site, may_lose=False)
        self.compare_ends(round_)
        self.history.rebase(self.content(1))

    # rounds

    def storm(self, seconds: float, nodes: Collection[str] = NODES) -> Round:
        """Faults under load; afterwards nothing acknowledged is missing anywhere."""
        round_ = self.now = Round("storm")
        storm = Storm(self.group, self.chance, nodes)
        round_.faults = storm.happened
        with self.load(round_):
            storm.rage(seconds)
            self.group.heal()
        self.at_rest(round_)
        return round_

    def full_journal(self) -> Round:
        """A secondary is cut off until the journal is full and hosts wait; then it comes back."""
        round_ = self.now = Round("full journal")
        group = self.group
        away = self.chance.choice(group.targets)
        with self.load(round_):
            round_.faults.append(f"cut {away} off until the journal is full")
            group.say(round_.faults[0])
            for pair in ((away, "i1"), ("i1", away)):
                group.network.cut(*pair)
            group.wait_for(self._stalled, "the journal is full and hosts wait")
            group.heal()
        if round_.host_errors:
            round_.problems.append(f"hosts saw {round_.host_errors} errors, though the journal was only full")
        self.at_rest(round_)
        return round_

    def _stalled(self) -> bool:
        before = self.history.acknowledged
        journal = self.group.status("i1").get("journal") or {}
        time.sleep(1.0)
        return self.history.acknowledged == before and 2 * journal.get("used_bytes", 0) > journal.get("size_bytes", 1)

    def disaster(self) -> Round:
        """The primary site is lost, or cut off; the secondary site takes over and lives on."""
        kinds = ["killed", "killed", "all killed", "cut off"] + ["power loss"] * self.group.disks.lose_power
        kind = self.chance.choice(kinds)
        round_ = self.now = Round(f"disaster: {kind}")
        group = self.group
        with self.load(round_) as load:
            time.sleep(self.chance.uniform(0.2, 1.5))
            self._strike(kind, round_)
            result = self.take_over(round_)
            group.network.heal()
            time.sleep(self.chance.uniform(0.0, 1.0))  # hosts of an old site that lives go on trying
            load.ending.set()
            group.kill(group.sources)
        round_.notes["lost_writes"] = result["lost_writes"]
        group.direction = 1 - group.direction
        self.doubtful = self.history.recent()
        may_lose = kind in ("all killed", "power loss") and not result["drained"]
        self.check(round_, group.direction, may_lose=may_lose)
        self.history.rebase(self.content(group.direction))
        self._live_on(round_)
        self._old_site_returns(round_)
        self.check(round_, group.direction, may_lose=False)
        return round_

    def _strike(self, kind: str, round_: Round) -> None:
        group = self.group
        if kind == "killed":
            group.kill(group.sources)
            text = f"kill -9 {' '.join(group.sources)}"
        elif kind == "all killed":
            group.kill((*group.sources, INTERMEDIATE))
            text = f"kill -9 {' '.join(group.sources)} i1"
        elif kind == "cut off":
            text = f"{' and '.join(group.sources)} are cut off from all but their hosts"
            for node in group.sources:
                for other in (*group.targets, INTERMEDIATE):
                    group.network.cut(node, other)
                    group.network.cut(other, node)
        else:
            loss = group.cut_power(NODES, str(self.chance.random()))
            text = f"power cut everywhere ({loss}), only the other site comes back"
            group.start(*group.targets, wait=False)
            group.wait_for(lambda: all(map(group.status, group.targets)), "the other site answers")
        self.tell(round_, text)

    def tell(self, round_: Round, text: str) -> None:
        round_.faults.append(text)
        self.group.say(text)

    def take_over(self, round_: Round) -> dict[str, Any]:
        """Often the first attempt is killed in its middle; then it is repeated, led by any secondary."""
        group = self.group
        if self.chance.random() < 0.4:
            leader, victim = self.chance.choice(group.targets), self.chance.choice(group.targets)
            first = threading.Thread(target=self._attempt, args=(leader,), daemon=True)
            first.start()
            time.sleep(self.chance.uniform(0.0, 0.25))
            group.kill([victim])
            first.join()
            self.tell(round_, f"kill -9 {victim} in the middle of a takeover led by {leader}")
            group.start(victim, wait=False)
            group.wait_for(lambda: group.status(victim), f"{victim} answers")
        return dict(group.wait_for(lambda: self._attempt(self.chance.choice(group.targets)), "a takeover succeeds"))

    def _attempt(self, leader: str) -> dict[str, Any]:
        try:
            return self.group.takeover(leader)
        except BlockreplError as error:
            self.group.say(f"takeover: {error}")
            return {}

    def _live_on(self, round_: Round) -> None:
        """Hosts at the secondary site write; its nodes are killed, and come back with everything."""
        group = self.group
        if group.disks.lose_power:  # what the takeover said is durable
            loss = group.cut_power(group.sources, str(self.chance.random()))
            self.tell(round_, f"after the takeover, power cut at {' '.join(group.sources)}: {loss}")
            group.start(*group.sources)
            self.check(round_, group.direction, may_lose=False)
        with self.load(round_):
            time.sleep(self.chance.uniform(0.1, 1.0))
            victims = self.chance.choice(([group.sources[0]], [group.sources[1]], list(group.sources)))
            self.tell(round_, f"after the takeover, kill -9 {' '.join(victims)}")
            group.kill(victims)
            group.start(*victims)
        self.check(round_, group.direction, may_lose=False)
        self.history.rebase(self.content(group.direction))

    def _old_site_returns(self, round_: Round) -> None:
        """It learns that it is fenced, and lets no host in."""
        group = self.group
        group.start(wait=False)
        self.tell(round_, "the old site comes back")
        for node in group.targets:
            group.wait_for(partial(self._fenced, node), f"{node} says that it is fenced")
        for name in NAMES:
            with suppress(OSError):
                volume = NbdVolume(self._uri(name, 1 - group.direction), 2.0)
                volume.write(0, bytes(4096), durable=True)
                round_.problems.append(f"{SITE_NAMES[1 - group.direction]} site, fenced, took a write to {name}")

    def _fenced(self, node: str) -> bool:
        return "epoch" in self.group.status(node).get("reason", "")
