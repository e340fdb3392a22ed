"""A configuration takes effect at a number: the intermediate's half, and what the others do about it (rule 26)."""

from __future__ import annotations

from typing import Any

import pytest

from blockrepl.errors import UsageError
from blockrepl.formats.link import LinkRole, Message, Pair
from blockrepl.formats.record import RecordKind, control_number
from blockrepl.replication.actions import Action, Append, TakeConfig
from blockrepl.replication.configuring import TABLE, Step
from tests.replication.roles import MID, P1, P2, S1, S2, hello, live, messages, one, primary, secondary
from tests.replication.test_pairing import LINKS, Group, kinds

OLD, NEW = 7, 8


class ConfigGroup(Group):
    """Keeps what the intermediate itself is told to take."""

    def __init__(self, **state: Any) -> None:
        self.taken: list[TakeConfig] = []
        super().__init__(**{"config": OLD, "configured": True, **state})

    def do(self, actions: list[Action]) -> list[tuple[int, int, dict[str, Any]]]:
        self.taken += [each for each in actions if isinstance(each, TakeConfig)]
        return super().do([each for each in actions if not isinstance(each, TakeConfig)])

    def prepared(self, *nodes: int, digest: int = NEW) -> None:
        """They say that they have files for it."""
        for node in nodes or (P1, P2, S1, S2):
            fields = {"digest": digest, "number": 0}
            self.do(self.role.received(LINKS[node], Message.CONFIG, fields, self.now_s))

    def records(self) -> list[Append]:
        return [each for each in self.appended if each.head.kind == RecordKind.CONFIG]


@pytest.fixture
def group() -> ConfigGroup:
    group = ConfigGroup()
    group.join()
    return group


def test_nothing_is_numbered_before_every_node_has_files_for_it(group: ConfigGroup) -> None:
    group.prepared(P1, P2, S1)
    with pytest.raises(UsageError, match="not prepared for it yet: s2"):
        group.role.configuring.configure(NEW)
    assert group.records() == []
    assert group.role.state.config == OLD


def test_it_is_one_record_in_each_stream_and_primaries_hear_of_it_only_when_it_is_validated(group: ConfigGroup) -> None:
    group.write(P1, 1)
    group.prepared()
    assert Message.CONFIG not in kinds(group.do(group.role.configuring.configure(NEW)))
    records = group.records()
    assert [(each.head.stream, each.head.first) for each in records] == [(S1, 2), (S2, 3)]
    assert {control_number(each.record) for each in records} == {NEW}
    assert Message.CONFIG not in kinds(group.tick())
    sent = group.prepare(3)
    told = [(link, fields) for link, kind, fields in sent if kind == Message.CONFIG]
    assert told == [(LINKS[node], {"digest": NEW, "number": 3}) for node in (P1, P2)]
    assert group.role.state.configured


def test_a_primary_that_was_away_hears_of_it_with_its_welcome() -> None:
    group = ConfigGroup(config=NEW, config_number=5)
    group.join()
    told = [(link, fields) for link, kind, fields in group.sent if kind == Message.CONFIG]
    assert told == [(LINKS[node], {"digest": NEW, "number": 5}) for node in (P1, P2)]


def test_asking_twice_numbers_it_once(group: ConfigGroup) -> None:
    group.prepared()
    group.do(group.role.configuring.configure(NEW))
    group.do(group.role.configuring.configure(NEW))
    group.prepare(2)
    group.do(group.role.configuring.configure(NEW))
    group.tick()
    assert len(group.records()) == 2


def test_a_record_that_a_suspension_may_have_kept_from_a_secondary_is_numbered_again(group: ConfigGroup) -> None:
    group.prepared()
    group.do(group.role.configuring.configure(NEW))
    group.do(group.role.pairing.stop_numbering("a primary is silent"))
    group.tick()
    assert group.role.configuring.step is Step.OPEN
    assert not group.role.state.configured


def test_an_intermediate_that_restarts_before_it_is_validated_numbers_it_again() -> None:
    group = ConfigGroup(config=NEW, configured=False)
    group.join()
    group.tick()
    assert group.records() == [], "nobody has said that it is prepared"
    group.prepared()
    group.tick()
    assert len(group.records()) == 2
    group.prepare(2)
    assert group.role.state.configured


@pytest.mark.parametrize("pair", [Pair.PSUS, Pair.PSUE, Pair.SMPL])
def test_a_group_that_is_not_in_pair_is_not_adjusted(pair: Pair) -> None:
    group = ConfigGroup(pair=int(pair))
    group.join()
    group.prepared()
    with pytest.raises(UsageError, match=f"adjust is not possible in state {pair.name}"):
        group.role.configuring.configure(NEW)


def test_a_node_that_is_away_keeps_it_from_taking_effect(group: ConfigGroup) -> None:
    group.prepared()
    group.do(group.role.lost(LINKS[S2], 0.0))
    with pytest.raises(UsageError, match="s2 is away"):
        group.role.configuring.configure(NEW)


def test_after_a_reform_it_is_numbered_again_for_those_who_were_not_there(group: ConfigGroup) -> None:
    group.role.begin_anew(10, [S1, S2])
    assert not group.role.state.configured
    assert group.role.state.config == OLD


def test_a_primary_takes_what_it_is_told() -> None:
    role = live(primary())
    assert role.received(1, Message.CONFIG, {"digest": NEW, "number": 3}, 0.0) == [TakeConfig(NEW, 3)]


def test_every_step_can_be_left() -> None:
    assert {step for step, _ in TABLE} == set(Step)


def test_primaries_and_secondaries_say_once_per_link_what_they_have_files_for() -> None:
    source, target = live(primary()), secondary()
    target.accepted(1, hello(LinkRole.INTERMEDIATE, MID, S1), 0.0)
    for role in (source, target):
        assert Message.CONFIG not in kinds(messages(role.tick(1.0, 1)))
        role.prepared_for(NEW)
        assert one(role.tick(2.0, 1), Message.CONFIG) == {"digest": NEW, "number": 0}
        assert Message.CONFIG not in kinds(messages(role.tick(3.0, 1)))
