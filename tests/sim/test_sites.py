"""Named schedules of groups whose sites change roles, and a few seeds of their story."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sim import planted_sites
from tests.sim.campaign import campaign
from tests.sim.data_process import DataProcess
from tests.sim.group import Options
from tests.sim.planted import Planted
from tests.sim.sites import SitesGroup
from tests.sim.transcript import Transcript

DOCUMENT = Path(__file__).parents[2] / "docs" / "planted.md"
SEEDS = int(os.environ.get("BLOCKREPL_SIM_SITES_SEEDS", "12"))


@pytest.fixture
def talk() -> Iterator[Transcript]:
    talk = Transcript("sites")
    with talk.group.limits():
        talk.group.create()
        talk.quiet()
        yield talk


def sites(talk: Transcript) -> SitesGroup:
    assert isinstance(talk.group, SitesGroup)
    return talk.group


@pytest.mark.timeout(600)
def test_no_seed_of_the_story_breaks_an_invariant() -> None:
    tally = campaign(0, SEEDS, Options(story="sites"), keep_going=True)
    assert not tally.failures, [f"{failure.text} {case.command()}" for case, failure in tally.failures]
    assert tally.counts["reforms"] > SEEDS // 3


def test_7_a_source_that_has_not_replayed_is_no_source_of_a_new_group(talk: Transcript) -> None:
    """p1 loses power behind a write; cut off from the intermediate, it waits; meanwhile s1 is to be replaced."""
    group = sites(talk)
    talk.write(1, fill=b"old")
    talk.quiet(0.1)
    p1 = group.data("p1")
    p1.cut_power()
    group.network.cut("p1", "i")
    group.operator.wipe("s1")
    p1.power_on()
    p1.boot()
    talk.quiet()
    problems: list[str] = []
    p2, asked = group.data("p2"), []  # type: tuple[DataProcess, list[str]]
    group.world.enter(p2, lambda: asked.append(p2.reform(lambda role: problems.append(role.problem), replaced=4)))
    talk.quiet()
    assert len(problems) == 1
    assert "p1 has not read back" in problems[0]
    group.network.heal_all()
    talk.quiet(2)
    group.operator.reform(problems.append, replaced="s1")
    talk.quiet(6)
    assert problems[1:] == [""]
    assert group.quiet()
    group.check_equal()


def test_25_a_takeover_right_behind_a_replacement_presents_no_torn_volumes(talk: Transcript) -> None:
    """Formed anew with nothing to go back to, and nothing was copied yet: the targets are at no number."""
    group = sites(talk)
    talk.write(1, fill=b"old")
    talk.quiet()
    group.operator.wipe("s1")
    problems: list[str] = []
    group.operator.reform(problems.append, replaced="s1")
    group.world.run(group.world.now_s + 5, lambda: bool(problems))
    assert problems == [""]
    for name in ("p1", "p2", "i"):
        group.processes[name].cut_power()
    group.operator.take_over("s2", problems.append)
    talk.quiet(5)
    assert len(problems) == 2
    assert "initial copy" in problems[1]


def test_17_a_source_formed_anew_has_its_volumes_durable(talk: Transcript) -> None:
    """Data fence: it never replays any more, so what the old journal had is on its platter first."""
    group = sites(talk)
    p1 = group.data("p1")
    assert p1.primary is not None
    role = p1.primary.role
    role.policy = replace(role.policy, checkpoint_s=1e9)  # else it is durable by chance
    talk.write(1, fill=b"old")
    talk.quiet(0.02)
    group.operator.wipe("i")
    problems: list[str] = []
    group.operator.reform(problems.append, replaced="i")
    group.world.run(group.world.now_s + 5, lambda: bool(problems))
    assert problems == [""]
    assert p1.machine.files["volume 1"].platter == p1.machine.files["volume 1"].cache


def test_21_a_takeback_brings_the_delta_and_nothing_else(talk: Transcript) -> None:
    """The old site burns; hosts write at the new one; the old one comes back as the copy."""
    group = sites(talk)
    talk.write(1, fill=b"old")
    talk.quiet()
    problems: list[str] = []
    for name in ("p1", "p2", "i"):
        group.processes[name].cut_power()
    group.operator.take_over("s1", problems.append)
    talk.quiet(2)
    newer = talk.write(1, 3, site=1, fill=b"new")
    talk.quiet()
    for name in ("p1", "p2", "i"):
        group.processes[name].power_on()
        group.processes[name].boot()
    talk.quiet(0.1)
    group.operator.swap(problems.append)
    talk.quiet(6)
    assert problems == ["", ""]
    assert group.quiet()
    group.check_equal()
    assert bytes(group.data("p1").machine.files["volume 1"].cache).startswith(newer.payloads[0])
    assert 0 < group.oracle.copied_bytes <= 1.05 * group.oracle.differed_bytes


def test_17_a_write_taken_alone_right_before_a_resync_begins_is_in_what_the_resync_brings(talk: Transcript) -> None:
    """Its bits are on their way to the disk when RESYNC comes: it is stored first, and then the P-VOLs are synced."""
    group = sites(talk)
    roles = [each.primary.role for each in (group.data("p1"), group.data("p2")) if each.primary is not None]
    middle = group.intermediate.host.role
    middle.policy = replace(middle.policy, fence_never=True)
    for each in roles:
        each.policy = replace(each.policy, fence_never=True)
    group.network.cut("p1", "i")
    talk.quiet(3)
    group.network.heal_all()
    talk.quiet()
    role = roles[0]
    assert role.suspension.completes
    assert not group.pair("resync")
    group.world.run(group.world.now_s + 5, lambda: any("i → p1" in line and "RESYNC" in line for line in talk.lines))
    newer = talk.write(1, 3, fill=b"new")
    group.world.run(group.world.now_s + 5, lambda: role.resyncing.begins)
    assert len(role.solo) == 1
    talk.quiet(4)
    assert newer.solo
    assert group.quiet()
    group.check_equal()


BREAKS: list[tuple[Planted, Callable[[Transcript], None]]] = [
    (planted_sites.formed_anew_at_a_number_that_nobody_was_at,
     test_25_a_takeover_right_behind_a_replacement_presents_no_torn_volumes),
    (planted_sites.source_formed_anew_without_its_replay,
     test_7_a_source_that_has_not_replayed_is_no_source_of_a_new_group),
    (planted_sites.source_formed_anew_without_a_sync, test_17_a_source_formed_anew_has_its_volumes_durable),
    (planted_sites.bits_cleared_at_a_swap, test_21_a_takeback_brings_the_delta_and_nothing_else),
]  # fmt: skip


@pytest.mark.parametrize(("planted", "schedule"), BREAKS, ids=[planted.__name__ for planted, _ in BREAKS])
def test_a_planted_bug_breaks_its_schedule(
    planted: Planted, schedule: Callable[[Transcript], None], talk: Transcript
) -> None:
    with planted(), pytest.raises(AssertionError):
        schedule(talk)


def test_the_document_names_the_schedule_of_such_a_bug() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| `test_sites\.(\w+)` \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == [
        (bug.__name__, (bug.__doc__ or "").strip().splitlines()[0], schedule.__name__) for bug, schedule in BREAKS
    ]


def test_a_data_node_keeps_its_role_over_a_power_cut(talk: Transcript) -> None:
    group = sites(talk)
    problems: list[str] = []
    group.operator.swap(problems.append)
    talk.quiet(5)
    assert problems == [""]
    for process in group.processes.values():
        process.cut_power()
        process.power_on()
        process.boot()
    talk.quiet(4)
    roles = {name: process.source is not None for name, process in group.processes.items()
             if isinstance(process, DataProcess)}  # fmt: skip
    assert roles == {"p1": False, "p2": False, "s1": True, "s2": True}
    assert group.quiet()
