"""Lives whose hosts use file systems on loop devices: ext4 and xfs under fio, and PostgreSQL over two volumes."""

from __future__ import annotations

import time

from scripts.demolib.host import FileHost
from scripts.torturelib.errors import BrokenPromiseError
from scripts.torturelib.faults import Storm
from scripts.torturelib.group import INTERMEDIATE, PRIMARIES, SECONDARIES
from scripts.torturelib.life import Life, Round
from scripts.torturelib.postgres import CLIENTS, Postgres

RIDDEN = (INTERMEDIATE, *SECONDARIES)  # hosts never see what happens to these
FEWEST_RECORDS, FEWEST_COMMITS = 20, 30
PATIENCE_S = 60.0


def file_systems(life: Life, seconds: float) -> Round:
    """ext4 and xfs: a storm beyond the primaries, then these are lost, and the secondary site must be whole."""
    round_ = life.now = Round("file systems")
    group = life.group
    host = FileHost(group, group.say)
    try:
        host.settle_in()
        host.verified_write()
        _caught_up(life)
        host.begin_load()
        with life.load(round_):
            _storm(life, round_, seconds)
            deadline_s = time.monotonic() + PATIENCE_S
            while host.ledger.read()[1] < FEWEST_RECORDS:
                host.check_load()
                if time.monotonic() > deadline_s:
                    raise BrokenPromiseError(f"the ordered writer is too slow: {host.ledger.read()}")
                time.sleep(0.02)
            host.check_load()
            drained = _lose_primaries(life, round_)
            life.take_over(round_)
        group.direction = 1
        host.move()
        host.end_load()
        for volume, found in host.check_file_systems().items():
            if not found["clean"]:
                round_.problems.append(f"{volume}: fsck is not clean: {found}")
        verdict = host.judge()
        if verdict.order_violations:
            round_.problems.append(f"records: {verdict.order_violations} out of order: {verdict}")
        if verdict.acked_writes_lost and drained:
            round_.problems.append(f"records: {verdict.acked_writes_lost} acknowledged ones are missing: {verdict}")
        round_.lost += verdict.acked_writes_lost
        round_.notes["records"] = verdict.acked
        fio = host.verify_fio()
        if fio not in (None, "clean"):
            round_.problems.append(f"fio at the secondary site: {fio}")
        life.check(round_, 1, may_lose=not drained)
    finally:
        host.leave()
    return round_


def database_server(life: Life, seconds: float) -> Round:
    """PostgreSQL: the same, recovered at the secondary site, where it goes on."""
    round_ = life.now = Round("PostgreSQL")
    group = life.group
    server = Postgres(group, life.chance)
    try:
        server.make()
        _caught_up(life)
        server.begin_load()
        with life.load(round_):
            _storm(life, round_, seconds)
            server.wait_for_more(FEWEST_COMMITS)
            drained = _lose_primaries(life, round_)
            life.take_over(round_)
        group.direction = 1
        server.close()
        committed = sum(server.committed.values())
        _recover(server, round_, may_lose=not drained)
        round_.notes["commits"], round_.notes["commits_lost"] = committed, committed - sum(server.committed.values())
        life.check(round_, 1, may_lose=not drained)
        server.errors.clear()
        server.begin_load()
        server.wait_for_more(FEWEST_COMMITS)
    finally:
        server.close()
    return round_


def _recover(server: Postgres, round_: Round, *, may_lose: bool) -> None:
    server.open()
    found = server.check(may_lose=may_lose)
    round_.problems += found.problems
    round_.transactions += sum(found.transactions.values())
    if len(found.transactions) < CLIENTS and not may_lose:
        round_.problems.append(f"PostgreSQL: clients are missing: {found.transactions}")


def _caught_up(life: Life) -> None:
    """What was written so far is part of whatever a takeover finds."""
    group = life.group
    numbered = group.wait_for(lambda: group.marks(INTERMEDIATE).get("numbered"), "the intermediate answers")
    group.wait_for(lambda: group.marks(INTERMEDIATE).get("validated", 0) >= numbered, "the secondaries have caught up")


def _storm(life: Life, round_: Round, seconds: float) -> None:
    storm = Storm(life.group, life.chance, RIDDEN)
    storm.happened = round_.faults
    storm.rage(seconds)
    life.group.heal()


def _lose_primaries(life: Life, round_: Round) -> bool:
    """Returns whether the intermediate can be drained."""
    drained = life.chance.random() < 0.6
    lost = list(PRIMARIES) if drained else [*PRIMARIES, INTERMEDIATE]
    life.tell(round_, f"kill -9 {' '.join(lost)}")
    life.group.kill(lost)
    return drained
