"""A running group is changed by `blockrepl adjust`: real processes, hosts writing, kill -9 in the middle (rule 26)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec import to_builtins

from blockrepl.cli.client import call
from blockrepl.definition import configuration_of
from blockrepl.errors import BlockreplError
from blockrepl.formats.scsi import Asc
from blockrepl.node.create import image_path
from tests.iscsi.initiator import Initiator
from tests.system.conftest import MakeGroup
from tests.system.group import ALL, MIB, TIMEOUT_S, A, B, OrderedLoad, RealGroup, answers, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
OLD, NEW = 64 * MIB, 96 * MIB
BLOCK = 64 << 10


def size_line(size: str) -> str:
    """Of volume data, the first in the file."""
    return f'[[volume]]\nname = "data"\nsize = "{size}"'


def ask_to_grow(group: RealGroup, old: str = "64MiB", new: str = "96MiB") -> None:
    group.change(size_line(old), size_line(new))


def adjust(group: RealGroup, *options: str) -> str:
    """Its stdout; it must end well."""
    done = group.cli("adjust", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(group: RealGroup, code: int = 3) -> str:
    done = group.cli("adjust")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


def size_at(group: RealGroup, node: str, volume: str = A) -> int:
    return next(int(row["size_bytes"]) for row in group.status(node)["volumes"] if row["name"] == volume)


def digests(group: RealGroup) -> set[str]:
    return {group.status(name)["config"]["digest"] for name in ALL}


def fill(group: RealGroup, offset: int, size: int, *, secondary: bool = False) -> bytes:
    """Random bytes, durable at the source; returns them."""
    volume = group.open(A, secondary=secondary)
    data = os.urandom(size)
    for at in range(0, size, MIB):
        volume.write(offset + at, data[at : at + MIB])
    volume.flush()
    volume.close()
    return data


def cli_json(group: RealGroup, *arguments: str) -> Any:
    done = group.cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_volume_grows_while_hosts_write_and_the_group_goes_on_in_every_way(group: RealGroup) -> None:
    load = OrderedLoad(group)
    load.wait_for_more()
    assert "nothing to change" in adjust(group)
    ask_to_grow(group)
    assert "volume data grows from 64 MiB to 96 MiB" in adjust(group, "--dry-run")
    assert {size_at(group, name) for name in ("p1", "s1")} == {OLD}
    old = group.open(A)
    adjust(group)
    load.wait_for_more()
    assert {size_at(group, name) for name in ("p1", "s1")} == {NEW}
    assert len(digests(group)) == 1
    assert old.size_bytes == OLD  # a connection keeps what it was told
    with pytest.raises(OSError, match=r"space|argument"):
        old.write(OLD, bytes(BLOCK))
    assert group.open(A).size_bytes == NEW
    assert cli_json(group, "status")["volumes"][0]["size_bytes"] == NEW
    assert cli_json(group, "ls")["groups"][0]["volumes"][0]["size_bytes"] == NEW
    data = fill(group, NEW - 4 * MIB, 4 * MIB)
    assert "nothing to change" in adjust(group)
    os.killpg(load.process.pid, 9)
    load.finish()
    group.settle()
    assert group.differing() == []
    same = cli_json(group, "verify")
    assert all(row["same"] for row in same["volumes"]) if "volumes" in same else same["same"]
    group.kill("p1", "p2")
    group.takeover()
    taken = group.open(A, secondary=True)
    assert taken.size_bytes == NEW
    assert taken.read(NEW - 4 * MIB, MIB) == data[:MIB]
    verdict = load.judge(secondary=True)
    assert (verdict.acked_writes_lost, verdict.order_violations) == (0, 0)
    assert verdict.acked


def test_a_swap_after_a_growth_saves_blocks_beyond_the_old_end_at_the_old_source(group: RealGroup) -> None:
    """A source's undo file kept the old size of a volume: as a target it died of the first block beyond it."""
    fill(group, 0, MIB)
    ask_to_grow(group)
    adjust(group)
    fill(group, OLD, 2 * MIB)
    group.settle()
    swap(group)
    assert group.open(A, secondary=True).size_bytes == NEW
    group.cli("pair", "split")
    wait_pair(group, "PSUS")
    data = fill(group, OLD + MIB, 8 * MIB, secondary=True)
    assert group.cli("pair", "resync").returncode == 0
    wait_pair(group, "PAIR")
    wait_for(lambda: not any(group.status(name)["copying"] for name in ("p1", "p2")), "the end of the copy")
    swap(group)
    volume = group.open(A)
    assert (volume.size_bytes, volume.read(OLD + MIB, MIB)) == (NEW, data[:MIB])
    group.settle()
    assert group.differing() == []


def wait_pair(group: RealGroup, state: str) -> None:
    wait_for(lambda: group.status("i1")["pair"] == state, state)


def swap(group: RealGroup) -> None:
    done = group.cli("pair", "resync", "--swap")
    assert done.returncode == 0, done.stdout + done.stderr
    wait_pair(group, "PAIR")


@pytest.mark.parametrize("victim", ["s1", "i1", "p1"])
def test_a_node_killed_in_the_middle_comes_up_right_and_the_command_is_repeated(group: RealGroup, victim: str) -> None:
    """Killed when its files are made and nothing is in effect; then while it takes effect."""
    fill(group, 0, MIB)
    ask_to_grow(group)
    prepare(group)
    group.kill(victim)
    group.start(victim)
    assert {size_at(group, name) for name in ("p1", "s1")} == {OLD}
    wait_links(group)
    commanded = start_adjust(group)
    group.kill(victim)
    commanded.communicate(timeout=TIMEOUT_S)
    group.start(victim)
    wait_links(group)
    adjust(group)
    assert {size_at(group, name) for name in ("p1", "s1")} == {NEW}
    assert len(digests(group)) == 1
    fill(group, NEW - MIB, MIB)
    group.settle()
    assert group.differing() == []


def prepare(group: RealGroup) -> None:
    """As adjust does, and no further."""
    asked = {"configuration": to_builtins(configuration_of(group.definition))}
    for name in ALL:
        call(group.node(name).directory, "config_prepare", asked, timeout_s=TIMEOUT_S)


def wait_links(group: RealGroup) -> None:
    wait_for(lambda: all(peer["connected"] for peer in group.status("i1")["peers"]), "every link of the intermediate")


def start_adjust(group: RealGroup) -> subprocess.Popen[str]:
    return group.run(["env", f"BLOCKREPL_FILE={group.path}", sys.executable, "-m", "blockrepl.cli.main", "adjust"])


def test_the_whole_group_killed_while_it_takes_effect_ends_at_one_configuration(group: RealGroup) -> None:
    data = fill(group, 0, MIB)
    ask_to_grow(group)
    commanded = start_adjust(group)
    wait_for(lambda: group.status("i1")["config"]["prepared"] or commanded.poll() is not None, "the intermediate")
    group.kill(*ALL)
    commanded.communicate(timeout=TIMEOUT_S)
    group.start()
    wait_links(group)
    adjust(group)
    assert {size_at(group, name) for name in ("p1", "s1")} == {NEW}
    fill(group, OLD, MIB)
    assert group.open(A).read(0, MIB) == data
    group.settle()
    assert group.differing() == []


def test_the_file_is_not_what_a_restarted_node_runs_by_until_it_is_adjusted(group: RealGroup) -> None:
    ask_to_grow(group)
    group.kill("p1", "s1")
    group.start("s1", "p1")
    assert group.open(A).size_bytes == OLD
    differs = group.status("p1")["config"]["differs"]
    assert differs == ["volume data grows from 64 MiB to 96 MiB"]
    assert "p1: the definition says otherwise: volume data grows" in " ".join(group.cli("status").stdout.split())


def test_a_split_group_is_not_adjusted(group: RealGroup) -> None:
    call(group.node("i1").directory, "pair_split", {}, timeout_s=TIMEOUT_S)
    wait_pair(group, "PSUS")
    ask_to_grow(group)
    words = refused(group, 2)
    assert "adjust is not possible in state PSUS" in words
    assert "blockrepl pair resync" in words
    assert {size_at(group, name) for name in ("p1", "s1")} == {OLD}


def test_what_cannot_change_is_refused_with_words_and_nothing_is_touched(group: RealGroup) -> None:
    """Every reason is in tests/test_changes.py; here is how it is told."""
    right = group.path.read_text()
    group.path.write_text(right.replace(size_line("64MiB"), size_line("32MiB")).replace('name = "log"', 'name = "lag"'))
    told = " ".join(refused(group).split())
    assert "$.volume[0].size: a volume cannot shrink: data has 64 MiB, not 32 MiB" in told
    assert 'write size = "64MiB"' in told
    assert "the running group has no volume lag" in told
    assert "volume log of the running group is missing" in told
    group.path.write_text(right.replace("[policy]", "block_size = 512\n[policy]"))
    assert "$.group.block_size: is 4096 in the running group, not 512" in " ".join(refused(group).split())
    assert len(digests(group)) == 1
    group.path.write_text(right)
    assert "nothing to change" in adjust(group)


def test_volumes_mode_grows_the_intermediate_volume_too(make_group: MakeGroup) -> None:
    group = make_group(keys='mode = "volumes"').create().start()
    ask_to_grow(group)
    adjust(group)
    assert {size_at(group, name) for name in ("p1", "s1", "i1")} == {NEW}
    fill(group, NEW - MIB, MIB)
    group.settle()
    call(group.node("i1").directory, "stop")
    group.ended("i1")
    own: Path = image_path(group.node("i1"), group.definition.volume(A))
    assert own.read_bytes() == group.images(A)[0].read_bytes()


def test_a_takeover_between_prepare_and_effect_keeps_the_old_size_and_the_swap_back_may_grow(group: RealGroup) -> None:
    data = fill(group, OLD - MIB, MIB)
    ask_to_grow(group)
    prepare(group)
    group.settle()
    group.kill("p1", "p2", "i1")
    group.takeover()
    volume = group.open(A, secondary=True)
    assert (volume.size_bytes, volume.read(OLD - MIB, MIB)) == (OLD, data)
    group.start("i1", "p1", "p2", wait=False)
    for name in ("i1", "p1", "p2"):
        wait_for(partial(running, group, name), name)
    swap(group)
    adjust(group)
    assert group.open(A, secondary=True).size_bytes == NEW
    fill(group, OLD, MIB, secondary=True)
    swap(group)
    assert group.open(A).size_bytes == NEW


def running(group: RealGroup, name: str) -> bool:
    try:
        group.status(name)
    except BlockreplError:
        return False
    return True


def test_two_volumes_grow_at_once(group: RealGroup) -> None:
    group.change('size = "64MiB"', 'size = "68MiB"')
    told = adjust(group)
    for name in (A, B, "index"):
        assert f"volume {name} grows from 64 MiB to 68 MiB" in told
    assert size_at(group, "s2", B) == size_at(group, "p2", B) == 68 * MIB


# journals


def ring_at(group: RealGroup, node: str) -> int:
    return int(group.status(node)["journal"]["size_bytes"])


def verdict_after_takeover(group: RealGroup, load: OrderedLoad) -> None:
    """What was acknowledged survives the loss of the primaries."""
    group.kill("p1", "p2")
    load.finish()
    group.takeover()
    verdict = load.judge(secondary=True)
    assert (verdict.acked_writes_lost, verdict.order_violations) == (0, 0)
    assert verdict.acked


def test_journals_grow_while_hosts_write_and_again_shrink(group: RealGroup) -> None:
    load = OrderedLoad(group)
    load.wait_for_more()
    group.change('journal = "64MiB"', 'journal = "96MiB"')  # both kinds
    told = " ".join(adjust(group).split())
    assert "i1: its journal gets a ring of 96 MiB instead of 64 MiB" in told
    assert "s1: its journal gets a ring of 96 MiB instead of 64 MiB" in told
    assert {ring_at(group, name) for name in ALL} == {96 * MIB}
    load.wait_for_more()
    group.kill(*ALL[:3])
    group.start(*ALL[:3])
    load.wait_for_more()
    assert {ring_at(group, name) for name in ALL} == {96 * MIB}
    group.change('journal = "96MiB"', 'journal = "48MiB"')
    adjust(group)
    assert {ring_at(group, name) for name in ALL} == {48 * MIB}
    load.wait_for_more(200)
    assert "nothing to change" in adjust(group)
    verdict_after_takeover(group, load)


def test_a_journal_moves_to_another_disk_while_hosts_write_and_one_valid_journal_remains(group: RealGroup) -> None:
    disk = group.folder / "disk"
    disk.mkdir()
    load = OrderedLoad(group)
    load.wait_for_more()
    for name in ("i1", "s1"):
        group.change(f'directory = "{name}"', f'directory = "{name}"\njournal = "disk/{name}"')
    told = " ".join(adjust(group, "--dry-run").split())
    assert f"from{group.folder}/i1/journalto{disk}/i1" in told.replace(" ", "")
    adjust(group)
    assert sorted(path.name for path in disk.iterdir()) == ["i1", "s1"]
    assert not (group.folder / "i1" / "journal").exists()
    load.wait_for_more()
    group.kill("i1", "s1")
    group.start("s1", "i1")
    load.wait_for_more()
    done = group.cli("journal", "--node", "i1", "--limit", "3")
    assert done.returncode == 0, done.stderr
    verdict_after_takeover(group, load)


@pytest.mark.parametrize("victim", ["i1", "s1"])
def test_a_node_killed_while_its_journal_is_moved_has_exactly_one(group: RealGroup, victim: str) -> None:
    """At moments all over the move: the new file is being written, named, noted, the old one removed."""
    (group.folder / "disk").mkdir()
    load = OrderedLoad(group)
    load.wait_for_more()
    places = [f"{group.folder}/disk/{victim}", f"{group.folder}/{victim}/journal"]
    for turn, delay_s in enumerate((0.0, 0.02, 0.05, 0.1, 0.2, 0.4)):
        move = {"path": places[turn % 2], "ring_bytes": (64 + turn) * MIB}
        command = partial(call, group.node(victim).directory, "journal_move", move)
        mover = threading.Thread(target=answers, args=(command,))
        mover.start()
        time.sleep(delay_s)
        group.kill(victim)
        mover.join(TIMEOUT_S)
        group.start(victim)
        there = call(group.node(victim).directory, "config")["journal"]["path"]
        assert [place for place in places if Path(place).exists()] == [there]
        load.wait_for_more(5)
    verdict_after_takeover(group, load)


def test_a_journal_that_cannot_be_moved_stays_where_it_is(group: RealGroup) -> None:
    right = group.path.read_text()
    load = OrderedLoad(group)
    load.wait_for_more()
    (group.folder / "taken").write_text("somebody's")
    for text, words in (
        ('directory = "i1"\njournal = "nowhere/i1"', "nowhere is not there"),
        ('directory = "i1"\njournal = "taken"', "exists already, and is not this node's journal"),
    ):
        group.path.write_text(right.replace('directory = "i1"', text))
        assert words in " ".join(refused(group, 2).split())
    group.path.write_text(right.replace('journal = "64MiB"', 'journal = "16MiB"'))
    told = " ".join(refused(group, 2).split())
    assert "is too small for writes of 4194304 bytes" in told
    assert "choose at least" in told
    group.path.write_text(right)
    load.wait_for_more()
    assert (group.folder / "taken").read_text() == "somebody's"
    assert {ring_at(group, name) for name in ALL} == {64 * MIB}


def test_credit_of_a_larger_ring_that_an_idle_primary_holds_does_not_starve_the_other(group: RealGroup) -> None:
    """Absolute credit cannot be taken back; after the ring was made smaller the links begin anew."""
    group.change('journal = "64MiB"', 'journal = "17MiB"')  # three quarters of it: just what p1 holds, and is idle
    adjust(group)
    fill_volume(group, B, 48 * MIB)
    group.settle()
    assert group.differing() == []


def fill_volume(group: RealGroup, name: str, size: int) -> None:
    volume = group.open(name)
    for at in range(0, size, MIB):
        volume.write(at, os.urandom(MIB))
    volume.flush()
    volume.close()


# front ends


def test_a_loop_device_and_an_initiator_see_the_new_size(make_group: MakeGroup) -> None:
    group = make_group(iscsi_portals=1).create().start()
    attached = group.cli("attach", f"system/{A}")
    if attached.returncode == 5:
        pytest.skip(attached.stderr)
    assert attached.returncode == 0, attached.stderr
    device = attached.stdout.strip()
    sectors = Path("/sys/block") / Path(device).name / "size"
    assert int(sectors.read_text()) * 512 == OLD
    portals = {name: next(iter(group.node(name).iscsi or ())) for name in ("p1", "s1")}
    initiators = {
        name: Initiator((portal.host, portal.port)).login(group.definition.target_name)
        for name, portal in portals.items()
    }
    for initiator in initiators.values():
        initiator.ready()
    ask_to_grow(group)
    adjust(group)
    wait_for(lambda: int(sectors.read_text()) * 512 == NEW, "the loop device's size")
    with open(device, "r+b", buffering=0) as raw:
        raw.seek(NEW - BLOCK)
        assert raw.write(b"x" * BLOCK) == BLOCK
        os.fsync(raw.fileno())
    assert group.cli("detach", f"system/{A}").returncode == 0
    assert group.open(A).read(NEW - BLOCK, BLOCK) == b"x" * BLOCK
    for name, initiator in initiators.items():  # through the path that does not serve too
        assert initiator.command(bytes(6)).sense == 6 << 16 | Asc.CAPACITY_DATA_HAS_CHANGED
        if name == "p1":
            assert initiator.capacity() == (NEW // 4096, 4096)
