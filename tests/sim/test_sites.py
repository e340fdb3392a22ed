"""Named schedules of groups whose sites change roles, and a few seeds of their story."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.sim.campaign import campaign
from tests.sim.data_process import DataProcess
from tests.sim.group import Options
from tests.sim.sites import SitesGroup
from tests.sim.transcript import Transcript

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
    talk.write(1)
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
    talk.write(1)
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
    p1.disk.slow_until_s = group.world.now_s + 0.2
    talk.write(1)
    talk.quiet(0.02)
    group.operator.wipe("i")
    problems: list[str] = []
    group.operator.reform(problems.append, replaced="i")
    group.world.run(group.world.now_s + 5, lambda: bool(problems))
    assert problems == [""]
    assert p1.machine.files["volume 1"].platter == p1.machine.files["volume 1"].cache


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
