"""The opener of a reform: who is asked what, in which order, and what stops it."""

from __future__ import annotations

from typing import Any

from blockrepl.formats.link import NO_EPOCH, Epoch, LinkRole, Message
from blockrepl.replication.actions import Action
from blockrepl.replication.reform import MAX_TRIES, Phase, Reform
from tests.replication.roles import GROUP, said
from tests.replication.test_reform_plan import I1, NAMES, P1, P2, S1, S2, TAKEN, after_takeover, swap

ALL = [I1, S1, S2, P1, P2]


class Group:
    """A reform led by s1, its peers played by the test. The link to a node has its number."""

    def __init__(self, **more: Any) -> None:
        self.role = Reform(
            group=GROUP,
            node=S1,
            name="s1",
            intermediate=I1,
            question=swap(),
            new_id=lambda: b"r" * 16,
            now_s=0.0,
            **more,
        )
        data, middle = after_takeover()
        self.answers = {**data, I1: middle}
        self.sent: list[tuple[int, Message]] = []
        for node in self.role.peers:
            self.take(self.role.connected(node, node, b"n" * 16))

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            message = said(action)
            if message is not None:
                self.sent.append((action.link, Message(message[1])))  # type: ignore[union-attr]

    def told(self, kind: Message) -> list[int]:
        """Who was sent it, in order; forgotten afterwards."""
        found = [link for link, each in self.sent if each is kind]
        self.sent = [each for each in self.sent if each[1] is not kind]
        return found

    def hear(self, node: int, kind: Message, now_s: float = 1.0, **fields: Any) -> None:
        self.take(self.role.received(node, kind, fields, now_s))

    def greet(self, *nodes: int) -> None:
        for node in nodes or ALL:
            self.hear(node, Message.WELCOME, epoch=TAKEN, promised=TAKEN, recovered=True)

    def promise(self, *nodes: int, epoch: Epoch | None = None) -> None:
        for node in nodes or ALL:
            self.hear(node, Message.PROMISED, **{**self.answers[node], "epoch": epoch or self.role.epoch})


def test_the_intermediate_forgets_last() -> None:
    group = Group()
    assert sorted(group.told(Message.HELLO)) == sorted(ALL)
    group.greet()
    assert sorted(group.told(Message.PROMISE)) == sorted(ALL)
    assert group.role.epoch == Epoch(6, b"r" * 16)
    group.promise()
    assert sorted(group.told(Message.STORE)) == [P1, P2, S1, S2]
    for node in (P1, S2, S1):
        group.hear(node, Message.STORED, epoch=group.role.epoch)
        assert group.told(Message.STORE) == []
    group.hear(P2, Message.STORED, epoch=group.role.epoch)
    assert group.told(Message.STORE) == [I1]
    group.hear(I1, Message.STORED, epoch=group.role.epoch)
    assert group.role.phase is Phase.DONE


def test_a_dry_run_stores_nothing() -> None:
    group = Group(dry_run=True)
    group.greet()
    group.promise(epoch=TAKEN)  # nobody binds itself
    assert (group.role.phase, group.role.plan.number, group.told(Message.STORE)) == (Phase.DONE, 101, [])


def test_who_is_silent_is_named_with_what_to_type() -> None:
    group = Group()
    group.greet(I1, S1, S2, P1)
    assert group.role.phase is Phase.GREETING
    group.take(group.role.tick(16.0))
    assert (group.role.phase, group.role.problem) == (Phase.FAILED, "every node is needed, silent: p2 (no answer)")
    assert "blockrepl up --node p2" in group.role.hint
    assert group.told(Message.PROMISE) == []


def test_a_higher_epoch_that_somebody_promised_is_topped_but_not_for_ever() -> None:
    group = Group()
    group.greet()
    for attempt in range(MAX_TRIES + 1):
        assert group.role.phase is Phase.PROMISING, attempt
        group.hear(P1, Message.PROMISED, **{**group.answers[P1], "epoch": Epoch(50 + 10 * attempt, b"o" * 16)})
    assert group.role.phase is Phase.FAILED


def test_an_answer_to_an_epoch_that_was_given_up_does_not_count() -> None:
    group = Group()
    group.greet()
    first = group.role.epoch
    group.promise(I1, S1, S2, P1)
    group.hear(P2, Message.PROMISED, **{**group.answers[P2], "epoch": Epoch(9, b"o" * 16)})
    assert group.role.epoch.number == 10
    group.told(Message.PROMISE)
    group.promise(epoch=first)
    assert (group.role.phase, group.told(Message.STORE)) == (Phase.PROMISING, [])
    group.promise()
    assert sorted(group.told(Message.STORE)) == [P1, P2, S1, S2]


def test_nobody_forgets_when_a_node_has_gone_on_meanwhile_or_went_away() -> None:
    for kind in ("stored", "lost", "late"):
        group = Group()
        group.greet()
        group.promise()
        group.told(Message.STORE)
        if kind == "stored":
            group.hear(P1, Message.STORED, epoch=Epoch(8, b"o" * 16))
        elif kind == "lost":
            group.take(group.role.lost(P1, 2.0))
        else:
            group.take(group.role.tick(1000.0))
        assert (group.role.phase, group.told(Message.STORE)) == (Phase.FAILED, [])
        assert NAMES[P1] in group.role.problem


def test_it_introduces_itself_as_one_who_forms_the_group_anew() -> None:
    role = Reform(
        group=GROUP, node=S1, name="s1", intermediate=I1, question=swap(), new_id=lambda: b"r" * 16, now_s=0.0
    )
    message = said(role.connected(1, I1, b"n" * 16)[0])
    assert message is not None
    assert message[2]["role"] == LinkRole.REFORMER


def test_7_nothing_is_promised_while_a_source_has_not_read_back_what_its_volumes_lack() -> None:
    """Else the intermediate forgets it, and the targets, which have it, are overwritten."""
    group = Group()
    for node in ALL:
        group.hear(node, Message.WELCOME, epoch=TAKEN, promised=TAKEN, recovered=node != S2)
    assert group.role.phase is Phase.FAILED
    assert group.told(Message.PROMISE) == []
    assert "s2 has not read back" in group.role.problem


def test_8_beside_a_new_intermediate_there_is_nothing_to_be_read_back() -> None:
    group = Group()
    for node in ALL:
        epoch = NO_EPOCH if node == I1 else TAKEN
        group.hear(node, Message.WELCOME, epoch=epoch, promised=epoch, recovered=node != S2)
    assert group.role.phase is Phase.PROMISING
