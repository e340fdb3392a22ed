"""kill -9 of each role under load: it resumes on its own, nothing is lost, both ends are the same."""

from __future__ import annotations

import pytest

from tests.system.group import ALL, TIMEOUT_S, A, B, OrderedLoad, RealGroup, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
VERIFIED = ("--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=32M", "--verify=crc32c", "--verify_fatal=1")


@pytest.mark.usefixtures("fio")
@pytest.mark.parametrize("victim", ["i1", "s1", "s2"])
def test_a_node_killed_under_verified_load_resumes_and_both_ends_are_the_same(group: RealGroup, victim: str) -> None:
    fio = group.fio(*VERIFIED, "--rate_iops=2000")
    wait_for(lambda: group.marks("i1")["numbered"] > 1000, "a load")
    group.kill(victim)
    assert fio.poll() is None, "the load is over already"
    group.start(victim)
    output, _ = fio.communicate(timeout=2 * TIMEOUT_S)
    assert fio.returncode == 0, output
    assert "verify" not in output.lower() or "failed" not in output.lower(), output
    assert group.settle() >= 2 * (32 << 20) // 4096
    assert group.differing() == []
    verified = group.cli("verify", str(group.path))
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_killed_primary_has_every_acknowledged_write_when_it_serves_again(group: RealGroup) -> None:
    load = OrderedLoad(group)
    load.wait_for_more(50)
    group.kill("p1")
    load.finish()
    group.start("p1")
    verdict = load.judge(secondary=False)
    assert (verdict.acked_writes_lost, verdict.order_violations) == (0, 0)
    assert verdict.acked >= 100
    group.settle()
    assert group.differing() == []


def test_a_group_killed_as_a_whole_resumes_with_everything_acknowledged_and_numbers_on(group: RealGroup) -> None:
    load = OrderedLoad(group)
    load.wait_for_more(50)
    before = group.marks("i1")["durable"]
    group.kill(*ALL)
    load.finish()
    group.start()
    assert group.settle() >= before
    verdict = load.judge(secondary=False)
    assert (verdict.acked_writes_lost, verdict.order_violations) == (0, 0)
    assert group.differing() == []
    again = OrderedLoad(group)
    again.wait_for_more(20)
    assert group.marks("i1")["numbered"] > before


def test_every_node_killed_in_turn_again_and_again_loses_nothing(group: RealGroup) -> None:
    """Hosts see errors only of their own primary; the ordered writer is begun anew after those."""
    for _ in range(2):
        for victim in ("s1", "i1", "s2", "p2"):
            load = OrderedLoad(group)
            load.wait_for_more(10)
            group.kill(victim)
            group.start(victim)
            if victim == "p2":
                load.finish()
            else:
                load.wait_for_more(10)
                load.process.kill()
                load.finish()
            verdict = load.judge(secondary=False)
            assert (verdict.acked_writes_lost, verdict.order_violations) == (0, 0), victim
    group.settle()
    assert group.differing() == []


def test_a_stopped_group_starts_again_with_its_data(group: RealGroup) -> None:
    payload = b"\xa5" * 8192
    for name in (A, B):
        volume = group.open(name)
        volume.write(1 << 20, payload, durable=True)
        volume.close()
    assert group.cli("down", str(group.path)).returncode == 0
    assert [group.ended(name) for name in ALL] == [0] * len(ALL)
    group.start()
    for name in (A, B):
        volume = group.open(name)
        assert volume.read(1 << 20, len(payload)) == payload
        volume.close()
    group.settle()
    assert group.differing() == []


def test_a_primary_that_says_ready_serves_its_exports_at_once(group: RealGroup) -> None:
    for _ in range(3):
        group.kill("p1")
        group.start("p1")
        group.open(A).close()
