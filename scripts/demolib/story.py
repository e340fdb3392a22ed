"""One disaster from beginning to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from scripts.demolib.errors import DemoError
from scripts.demolib.group import LINE_DELAY_S, READY_S, Group
from scripts.demolib.host import Host
from tests.demo.records import Verdict

LOAD_S = 3.0  # the least
FEWEST_RECORDS = 20
FRESH_RECORDS = 3  # written during the last LINE_DELAY_S: these are on the long line when disaster strikes


@dataclass(frozen=True)
class Scenario:
    """What is lost with the primary site."""

    name: str
    title: str
    intermediate_lost: bool


SCENARIOS = (
    Scenario("intermediate-alive", "The primary site is lost, the intermediate lives", False),
    Scenario("intermediate-lost", "The primary site is lost, and the intermediate with it", True),
)


@dataclass(frozen=True)
class Outcome:
    """What a scenario showed."""

    scenario: Scenario
    verdict: Verdict
    takeover_seconds: float
    usable_seconds: float
    takeover: dict[str, Any]
    fsck: dict[str, Any]
    fio: str | None

    @property
    def problems(self) -> list[str]:
        """Where the promise was not kept."""
        verdict, problems = self.verdict, []
        if verdict.order_violations:
            problems.append(f"{verdict.order_violations} writes are there although one before them is missing")
        if verdict.acked_writes_lost and not self.scenario.intermediate_lost:
            problems.append(f"{verdict.acked_writes_lost} acknowledged writes are lost though the intermediate lives")
        problems += [f"{volume}: fsck is not clean" for volume, each in self.fsck.items() if each and not each["clean"]]
        if self.fio not in (None, "clean"):
            problems.append(f"fio found bad blocks: {self.fio}")
        return problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        verdict = asdict(self.verdict)
        return {
            "scenario": self.scenario.name,
            "ok": not self.problems,
            "acked_writes": self.verdict.acked,
            "acked_writes_lost": verdict.pop("acked_writes_lost"),
            "order_violations": verdict.pop("order_violations"),
            "takeover_seconds": round(self.takeover_seconds, 3),
            "usable_seconds": round(self.usable_seconds, 3),
            "fsck": self.fsck,
            "fio_verify": self.fio,
            "records": verdict,
            "takeover": self.takeover,
            "problems": self.problems,
        }


def play(scenario: Scenario, group: Group, host: Host, say: Callable[[str], None], *, broken: bool) -> Outcome:
    """Raises DemoError when the story cannot be told to its end."""
    group.create()
    group.up(broken=broken)
    host.settle_in()
    host.verified_write()
    say("a writer puts record i durably on data, and then, after that, on log; fio goes on writing")
    host.begin_load()
    _wait_for_mid_write(host)
    acked = sum(host.ledger.read())
    lost = [*group.definition.primaries]
    if scenario.intermediate_lost:
        lost.append(group.definition.intermediate)
    say(f"DISASTER after {acked} acknowledged records: kill -9 of {', '.join(node.name for node in lost)}")
    began_s = time.monotonic()
    group.kill(lost, cut_line=scenario.intermediate_lost)
    result = group.takeover()
    host.move()
    takeover_s = time.monotonic() - began_s
    say(f"both volumes are writable at the secondary site, {takeover_s:.2f} s after the disaster")
    host.end_load()
    fsck = host.check_file_systems()
    usable_s = time.monotonic() - began_s
    say("reading every record, and every block of fio's")
    return Outcome(scenario, host.judge(), takeover_s, usable_s, result, fsck, host.verify_fio())


def _wait_for_mid_write(host: Host) -> None:
    """Until enough was written, and the writer is in full swing: some records are younger than the line is long."""
    began_s = time.monotonic()
    history = [(began_s, 0)]
    while True:
        time.sleep(0.02)
        host.check_load()
        now_s, last = time.monotonic(), host.ledger.read()[1]
        history = [(at_s, count) for at_s, count in history if now_s - at_s <= LINE_DELAY_S] + [(now_s, last)]
        fresh = last - history[0][1]
        if now_s - began_s >= LOAD_S and last >= FEWEST_RECORDS and fresh >= FRESH_RECORDS:
            return
        if now_s - began_s > READY_S:
            raise DemoError(f"the writer is too slow: {last} records in {READY_S} s", 6)
