"""Volumes mode on real processes: what hop 2 missed is copied from the intermediate volumes, which follow everything;
the mode of a group is changed without a new copy of the secondaries (claims 4 and 14)."""

from __future__ import annotations

import filecmp
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from blockrepl.cli.client import call
from blockrepl.errors import BlockreplError
from blockrepl.node.create import create, image_path
from tests.demo.nbd_client import NbdVolume
from tests.system.conftest import MakeGroup
from tests.system.group import MIB, TIMEOUT_S, VOLUMES, OrderedLoad, RealGroup, read_bytes, wait_for, written_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
KEYS = 'mode = "volumes"'
DATA = 16 * MIB


@pytest.fixture
def group(make_group: MakeGroup) -> RealGroup:
    """In volumes mode."""
    return make_group(keys=KEYS).create().start()


def ask(group: RealGroup, command: str, **args: Any) -> dict[str, Any]:
    """A command of an operator, to the intermediate."""
    return call(group.node("i1").directory, command, args, timeout_s=TIMEOUT_S)


def wait_pair(group: RealGroup, state: str) -> None:
    wait_for(lambda: group.status("i1")["pair"] == state, state)


def wait_links(group: RealGroup) -> None:
    wait_for(lambda: all(peer["connected"] for peer in group.status("i1")["peers"]), "every link of the intermediate")


def fill(group: RealGroup, volume: str, offset: int, size: int = DATA) -> None:
    """Random bytes: they cannot be equal by chance."""
    opened = group.open(volume)
    for at in range(offset, offset + size, MIB):
        opened.write(at, os.urandom(MIB))
    opened.flush()
    opened.close()


def own_image(group: RealGroup, volume: str) -> Path:
    return image_path(group.node("i1"), group.definition.volume(volume))


def odd_ones(group: RealGroup) -> list[str]:
    """Volumes of which the three images are not the same."""
    return group.differing() + [
        name for name in VOLUMES if not filecmp.cmp(own_image(group, name), group.images(name)[0], shallow=False)
    ]


def row(group: RealGroup, volume: str) -> dict[str, Any]:
    return next(each for each in group.status("i1")["volumes"] if each["name"] == volume)


def test_a_resync_of_hop_2_reads_nothing_from_the_primaries_though_the_intermediate_is_killed(group: RealGroup) -> None:
    fill(group, "data", 0)
    fill(group, "log", 0, MIB)
    ask(group, "pair_split")
    wait_pair(group, "PSUS")
    fill(group, "data", 8 * MIB)  # more than half the ring: some of it is in bits only
    fill(group, "data", 32 * MIB)
    group.kill("i1")
    group.start("i1")
    wait_links(group)
    fill(group, "index", 5 * MIB, MIB)
    before = {name: read_bytes(group.pid(name)) for name in ("p1", "p2")}
    ask(group, "pair_resync", rate_bytes=8 * MIB)
    wait_for(lambda: (group.status("i1")["resync"] or {}).get("copied_bytes"), "the copy from the intermediate volumes")
    group.kill("i1")
    group.start("i1")
    wait_pair(group, "PAIR")
    for name in ("p1", "p2"):
        assert read_bytes(group.pid(name)) - before[name] < MIB, name
        assert "0 bytes to copy" in group.log(name)
    fill(group, "log", 7 * MIB, MIB)
    group.settle()
    wait_for(lambda: not any(group.status(name)["copying"] for name in ("s1", "s2")), "the end of the copy")
    assert odd_ones(group) == []


def test_an_intermediate_volume_can_be_looked_at_and_not_written(group: RealGroup) -> None:
    fill(group, "data", 0, MIB)
    group.settle()
    told = row(group, "data")
    assert (told["role"], told["state"], told["active"]) == ("I-VOL", "PAIR", True)

    def shown() -> list[list[str]]:
        lines = group.cli("status", str(group.path)).stdout.splitlines()
        return [line.split()[:4] for line in lines if "I-VOL" in line]

    own = wait_for(shown, "the intermediate answers in time for `status`")
    assert own[0] == ["data", "I-VOL", "i1", "PAIR"]
    opened = NbdVolume(told["nbd"], TIMEOUT_S)
    with group.images("data")[0].open("rb") as image:
        assert opened.read(0, 2 * MIB) == image.read(2 * MIB)
    with pytest.raises(OSError, match="permitted"):
        opened.write(0, b"x" * 4096)
    opened.close()


def test_a_lost_p_vol_is_made_anew_from_the_intermediate_volume(group: RealGroup) -> None:
    load = OrderedLoad(group)
    load.wait_for_more()
    running = group.cli("rebuild", "system/data")
    assert (running.returncode, "nothing is lost" in running.stderr) == (2, True)
    group.kill("p1")
    path = image_path(group.node("p1"), group.definition.volume("data"))
    path.unlink()
    with pytest.raises(BlockreplError, match="the image is missing"):
        group.start("p1")
    made = group.cli("rebuild", "system/data")
    assert made.returncode == 0, made.stderr
    assert "up system --node p1" in made.stdout
    group.start("p1")
    load.finish()
    verdict = load.judge(secondary=False)
    assert verdict.acked > 0
    assert (verdict.acked_writes_lost, verdict.order_violations) == (0, 0)
    fill(group, "data", 0, MIB)
    group.settle()
    assert odd_ones(group) == []


def test_a_target_and_a_running_node_are_not_rebuilt(group: RealGroup) -> None:
    fill(group, "data", 0, MIB)
    group.settle()
    path = group.images("data")[1]
    path.rename(path.with_suffix(".away"))
    running = group.cli("rebuild", "system/data")
    assert (running.returncode, "another process runs this node" in running.stderr) == (23, True)
    group.kill("s1")
    refused = group.cli("rebuild", "system/data")
    assert (refused.returncode, "is a target now" in refused.stderr) == (2, True)
    assert not path.exists()
    group.kill("i1")
    path.with_suffix(".away").rename(path)
    lost = group.images("data")[0]
    group.kill("p1")
    lost.unlink()
    away = group.cli("rebuild", "system/data")
    assert (away.returncode, "nbd://" in away.stderr) == (4, True)
    assert not lost.exists()


def test_the_mode_is_changed_and_nothing_is_copied_to_the_secondaries(make_group: MakeGroup) -> None:
    group = make_group(policy="checkpoint_s = 0.3").create().start()
    fill(group, "data", 0)
    fill(group, "log", 3 * MIB)
    group.settle()
    group.kill("i1")
    group.change("[policy]", f"{KEYS}\n[policy]")
    with pytest.raises(BlockreplError, match="the image is missing"):
        group.start("i1")
    create(group.definition, group.node("i1"))
    group.start("i1")
    wait_links(group)
    told = row(group, "data")
    assert (told["state"], told["active"]) == ("SMPL", False)
    before = {name: written_bytes(group.pid(name)) for name in ("s1", "s2")}
    ask(group, "pair_resync", verify=True)
    wait_pair(group, "COPY")
    assert row(group, "data")["state"] == "COPY"
    fill(group, "index", 0, MIB)
    wait_pair(group, "PAIR")
    for name in ("s1", "s2"):
        assert written_bytes(group.pid(name)) - before[name] < DATA // 2, name
    wait_for(lambda: row(group, "data")["state"] == "PAIR", "the intermediate volumes are whole")
    group.settle()
    wait_for(lambda: not any(group.status(name)["copying"] for name in ("s1", "s2")), "the end of the copy")
    assert odd_ones(group) == []
    _back_and_forth(group)


def _back_and_forth(group: RealGroup) -> None:
    """To journal mode and back: what they missed meanwhile makes the images no source."""
    group.kill("i1")
    group.change(f"{KEYS}\n", "")
    group.start("i1")
    wait_links(group)
    fill(group, "data", 0, MIB)
    group.settle()
    assert group.status("i1")["volumes"] == []
    wait_for(lambda: group.status("i1")["journal"]["used_bytes"] == 0, "the ring has given up what it held")
    group.signal("i1", signal.SIGTERM)  # a killed one may find it in the ring again
    assert group.ended("i1") == 0
    group.change("[policy]", f"{KEYS}\n[policy]")
    group.start("i1")
    wait_links(group)
    assert row(group, "data")["state"] == "SMPL"
    assert "data" in odd_ones(group)
    ask(group, "pair_split")
    fill(group, "log", 0, MIB)
    wait_pair(group, "PSUS")
    ask(group, "pair_resync", verify=True)
    wait_pair(group, "PAIR")
    group.settle()
    wait_for(lambda: not any(group.status(name)["copying"] for name in ("s1", "s2")), "the end of the copy")
    assert odd_ones(group) == []
