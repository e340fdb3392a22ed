"""Markers on real processes: a takeover that stops at a name in the order of the writes."""

from __future__ import annotations

import json
import re
import signal

import pytest

from tests.system.conftest import MakeGroup
from tests.system.group import SECONDARIES, A, B, RealGroup, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BLOCK = 64 << 10


def put(group: RealGroup, name: str) -> int:
    """Its number."""
    done = group.cli("marker", "put", name, "--json")
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["number"])


def refused(group: RealGroup, name: str) -> str:
    done = group.cli("takeover", "--to-marker", name)
    assert done.returncode == 2, done.stdout
    return re.sub(r"\s+", " ", done.stderr)


def taken_over(group: RealGroup, name: str) -> int:
    """The number that a takeover to a marker came to."""
    done = group.cli("takeover", "--to-marker", name, "--json")
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["number"])


def read(group: RealGroup, volume: str, at: int) -> bytes:
    opened = group.open(volume, secondary=True)
    try:
        return opened.read(at, 4096)
    finally:
        opened.close()


def test_a_takeover_stops_at_a_marker_behind_which_the_group_was_split(group: RealGroup) -> None:
    data, log = group.open(A), group.open(B)
    data.write(0, b"first".ljust(4096))
    passed = put(group, "passed")
    log.write(0, b"second".ljust(4096))
    number = put(group, "before the upgrade")
    assert group.cli("marker", "wait", "before the upgrade", "-t", "60").returncode == 0
    assert group.cli("pair", "split").returncode == 0
    assert group.cli("pair", "wait", "-s", "PSUS", "-t", "60").returncode == 0
    data.write(0, b"upgraded".ljust(4096), durable=True)
    assert "s1 does not know it; s2 does not know it" in refused(group, "never put")
    why = refused(group, "passed")
    for name in SECONDARIES:
        assert f"{name} has gone beyond it, to {number}" in why
    assert f"(number {passed})" in why
    assert taken_over(group, "before the upgrade") == number
    assert read(group, A, 0) == b"first".ljust(4096)
    assert read(group, B, 0) == b"second".ljust(4096)


def test_a_takeover_stops_at_a_marker_that_all_hold_and_nobody_has_validated(make_group: MakeGroup) -> None:
    """The site burns while a secondary lags: what came behind the marker is held by both, and given up."""
    group = make_group(policy="link_timeout_s = 60.0").create().start()
    data, log = group.open(A), group.open(B)
    data.write(0, b"first".ljust(4096), durable=True)
    group.settle()
    group.signal("s2", signal.SIGSTOP)
    log.write(0, b"second".ljust(4096), durable=True)
    number = put(group, "good")
    data.write(0, b"a mistake".ljust(4096), durable=True)
    log.write(0, b"a mistake".ljust(4096), durable=True)
    last = group.marks("i1")["numbered"]
    wait_for(lambda: group.marks("i1")["sent"] == last, "all of it is on its way")
    group.kill("i1", "p1", "p2")
    group.signal("s2", signal.SIGCONT)
    for name in SECONDARIES:
        wait_for(lambda name=name: group.marks(name)["durable"] >= last, f"{name} holds all")  # type: ignore[misc]
    assert taken_over(group, "good") == number < last
    assert read(group, A, 0) == b"first".ljust(4096)
    assert read(group, B, 0) == b"second".ljust(4096)
