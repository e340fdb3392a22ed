"""The primary site is gone: what the secondary site has, and what the old site may still do."""

from __future__ import annotations

import pytest

from tests.system.conftest import MakeGroup
from tests.system.group import ALL, A, OrderedLoad, RealGroup, answers, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_takeover_with_the_intermediate_alive_has_every_acknowledged_write(group: RealGroup) -> None:
    load = OrderedLoad(group)
    load.wait_for_more(50)
    group.kill("p1", "p2")
    result = group.takeover()
    load.finish()
    assert result["drained"]
    assert result["lost_writes"] == 0
    verdict = load.judge(secondary=True)
    assert (verdict.acked_writes_lost, verdict.order_violations) == (0, 0)
    assert verdict.acked >= 100


def test_takeover_without_the_intermediate_has_a_prefix(group: RealGroup) -> None:
    load = OrderedLoad(group)
    load.wait_for_more(50)
    group.kill("p1", "p2", "i1")
    result = group.takeover()
    load.finish()
    assert not result["drained"]
    verdict = load.judge(secondary=True)
    assert verdict.order_violations == 0
    assert verdict.records_a > 0


def test_a_second_takeover_finds_the_first_and_changes_nothing(group: RealGroup) -> None:
    load = OrderedLoad(group)
    load.wait_for_more(20)
    group.kill("p1", "p2")
    first = group.takeover()
    load.finish()
    volume = group.open(A, secondary=True)
    volume.write(0, b"after the takeover".ljust(4096), durable=True)
    second = group.takeover()
    assert (second["epoch"], second["number"]) == (first["epoch"], first["number"])
    assert second["completed_earlier"]
    assert volume.read(0, 4096) == b"after the takeover".ljust(4096)
    volume.close()


def test_secondaries_that_were_killed_after_a_takeover_come_back_active_with_what_hosts_wrote(group: RealGroup) -> None:
    group.kill("p1", "p2", "i1")
    group.takeover()
    volume = group.open(A, secondary=True)
    volume.write(4096, b"new life".ljust(4096), durable=True)
    volume.close()
    group.kill("s1", "s2")
    group.start("s1", "s2")
    volume = wait_for(lambda: answers_nbd(group), "the S-VOL is served again")
    assert volume.read(4096, 4096) == b"new life".ljust(4096)
    volume.close()


def answers_nbd(group: RealGroup) -> object:
    try:
        return group.open(A, secondary=True)
    except OSError:
        return None


def test_dry_run_says_where_it_would_be_and_production_goes_on(group: RealGroup) -> None:
    load = OrderedLoad(group)
    load.wait_for_more(20)
    result = group.takeover(dry_run=True)
    assert result["dry_run"]
    assert result["lost_writes"] == 0
    load.wait_for_more(20)
    assert group.status("s1")["state"] == "following"


def test_a_living_primary_completes_no_write_after_the_takeover(make_group: MakeGroup) -> None:
    group = make_group(policy="hold_s = 1.0").create().start()
    volume = group.open(A)
    volume.write(0, b"before".ljust(4096), durable=True)
    group.takeover()
    with pytest.raises(OSError, match=r"Input/output|closed|reset"):
        volume.write(0, b"after".ljust(4096), durable=True)
    volume.close()
    other = group.open(A, secondary=True)
    assert other.read(0, 4096) == b"before".ljust(4096)
    other.close()


@pytest.mark.parametrize("intermediate_lost", [False, True])
def test_the_old_site_that_wakes_does_not_go_on(group: RealGroup, intermediate_lost: bool) -> None:
    lost = ["p1", "p2", "i1"] if intermediate_lost else ["p1", "p2"]
    group.kill(*lost)
    number = group.takeover()["number"]
    group.start(*(name for name in ALL if name in lost), wait=False)
    wait_for(
        lambda: (answers(lambda: group.status("i1")) or {}).get("state") in ("fenced", "failed"),
        "the intermediate knows that it is fenced",
    )
    wait_for(
        lambda: "epoch" in (answers(lambda: group.status("p1")) or {}).get("reason", ""),
        "the old primary says why it does not serve",
    )
    assert not group.status("p1")["ready"]
    with pytest.raises(OSError, match=r"reset|closed|refused"):
        group.open(A)
    assert group.marks("i1")["numbered"] == number
