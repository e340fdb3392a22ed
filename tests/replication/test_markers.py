"""Named markers in the order: one per stream with nothing between, and a takeover that stops at one."""

from __future__ import annotations

from typing import Any

import pytest

from blockrepl.errors import UsageError
from blockrepl.formats.link import LinkRole, Message
from blockrepl.formats.record import RecordKind, control_number, decode_record, marker_name
from blockrepl.replication.actions import Append, SaveState, SyncJournal
from blockrepl.replication.secondary import Secondary
from blockrepl.replication.takeover import Phase, Takeover
from blockrepl.replication.takeover_report import why_not_at_marker
from tests.replication.roles import GROUP, MID, ONE, S1, S2, arrives, hello, messages, secondary, welcome
from tests.replication.test_pairing import Group, split_group


def put(group: Group, name: str) -> list[Append]:
    before = len(group.appended)
    group.do(group.role.put_marker(name))
    return group.appended[before:]


def test_a_marker_is_one_record_in_each_stream_and_they_name_the_last_of_them() -> None:
    group = Group()
    group.join()
    group.write(1, 1)
    records = put(group, "before the upgrade")
    assert [append.head.kind for append in records] == [RecordKind.MARKER] * 2
    assert [append.head.first for append in records] == [2, 3]
    assert {append.head.stream for append in records} == {S1, S2}
    for append in records:
        assert decode_record(append.record).kind == RecordKind.MARKER
        assert control_number(append.record) == 3
        assert marker_name(append.record) == b"before the upgrade"
    assert group.role.markers == {"before the upgrade": 3}


@pytest.mark.parametrize("name", ["", "x" * 256, "a\nb"])
def test_bad_names_are_refused(name: str) -> None:
    group = Group()
    group.join()
    with pytest.raises(UsageError, match="name"):
        group.role.put_marker(name)


def test_a_marker_that_would_not_reach_the_secondaries_in_order_is_refused() -> None:
    group = split_group()
    with pytest.raises(UsageError, match="PSUS"):
        group.role.put_marker("too late")


def following(node: int, records: list[Append], validated: int) -> Secondary:
    """A secondary that has received its records of a group, and heard VALIDATE."""
    role = secondary(node)
    role.accepted(1, hello(LinkRole.INTERMEDIATE, MID, node), 0.0)
    for append in records:
        if append.head.stream == node:
            role.record(1, append.head, 1, append.record, append.chunk)
    role.state.prepared = max((append.head.last for append in records), default=0)
    role.validated = validated
    return role


def answer(role: Secondary, promise: dict[str, Any]) -> dict[str, Any]:
    """What it says to a PROMISE, once everything is durable."""
    queue = role.received_message(9, Message.PROMISE, promise, 0, 0.0)
    while queue:
        action = queue.pop(0)
        if isinstance(action, SyncJournal | SaveState):
            queue += role.done(action.token, 0.0)
        for _, kind, fields in messages([action]):
            if kind == Message.PROMISED:
                return fields
    raise AssertionError("no PROMISED")


def takeover(marker: str, validated: int) -> Takeover:
    """Record 1, marker 2 and 3, record 4; a takeover to the marker, as far as it chooses its number."""
    group = Group()
    group.join()
    group.write(1, 1)
    put(group, "m")
    group.write(1, 2)
    opener = Takeover(
        group=GROUP, node=S1, name="s1", intermediate=MID, secondaries=[S1, S2],
        names={MID: "i", S1: "s1", S2: "s2"}, new_id=lambda: b"n" * 16, now_s=0.0, marker=marker,
    )  # fmt: skip
    sent = []
    for link, node in ((1, MID), (2, S1), (3, S2)):
        opener.connected(link, node, b"n" * 16)
    for link, node in ((1, MID), (2, S1), (3, S2)):
        sent += messages(opener.received(link, Message.WELCOME, {**welcome(epoch=ONE), "node": node}, 0.0))
    assert {link for link, kind, _ in sent if kind == Message.PROMISE} == {2, 3}, "what a drain brings is beyond it"
    for link, node in ((2, S1), (3, S2)):
        (promise,) = [fields for to, kind, fields in sent if kind == Message.PROMISE and to == link]
        opener.received(link, Message.PROMISED, answer(following(node, group.appended, validated), promise), 0.0)
    return opener


def test_a_takeover_stops_at_a_marker_that_all_hold_and_none_has_passed() -> None:
    opener = takeover("m", validated=1)
    assert (opener.phase, opener.report.number) == (Phase.STORING, 3)


@pytest.mark.parametrize(
    ("name", "validated", "words"),
    [
        ("m", 4, 'no stop at the marker "m" (number 3): s1 has gone beyond it, to 4; s2 has gone beyond it, to 4'),
        ("other", 1, 'no stop at the marker "other": s1 does not know it; s2 does not know it'),
    ],
)
def test_a_marker_that_was_passed_or_never_came_is_refused_in_words(name: str, validated: int, words: str) -> None:
    opener = takeover(name, validated)
    assert (opener.phase, opener.problem) == (Phase.FAILED, words)


def held(**fields: int) -> dict[str, Any]:
    return {"marker": 7, "validated": 5, "held": 9, **fields}


def test_a_marker_that_some_secondary_holds_in_part_or_of_another_time_is_no_place_to_stop_at() -> None:
    assert why_not_at_marker("m", {"s1": held(), "s2": held(validated=7)}) == ""
    assert "s2 holds all up to 6 only" in why_not_at_marker("m", {"s1": held(), "s2": held(held=6)})
    assert "(number 7, 8): it was put twice" in why_not_at_marker("m", {"s1": held(), "s2": held(marker=8)})


def test_a_takeover_to_a_marker_in_the_middle_of_a_copy_says_so_and_does_not_go_elsewhere() -> None:
    opener = chosen("m", copying=True, copy_from=2)
    assert opener.phase is Phase.FAILED
    assert 'at the marker "m" (7) s1, s2 would be in the middle of a copy' in opener.problem
    assert chosen("m", copying=True, copy_from=7).report.number == 7


def chosen(marker: str, **more: Any) -> Takeover:
    """A takeover whose secondaries have promised the same."""
    opener = Takeover(
        group=GROUP, node=S1, name="s1", intermediate=MID, secondaries=[S1, S2],
        names={MID: "i", S1: "s1", S2: "s2"}, new_id=lambda: b"n" * 16, now_s=0.0, marker=marker,
    )  # fmt: skip
    opener.unreachable(MID, "gone", 0.0)
    for node in (S1, S2):
        opener.connected(node, node, bytes(16))
        opener.received(node, Message.WELCOME, {**welcome(epoch=ONE), "node": node}, 0.0)
    told = {"stored": ONE, "applied": 5, "active": False, "number": 0, "members": [], "numbered": 9, **held(), **more}
    for node in (S1, S2):
        opener.received(node, Message.PROMISED, arrives(Message.PROMISED, epoch=opener._epoch, **told), 0.0)
    return opener
