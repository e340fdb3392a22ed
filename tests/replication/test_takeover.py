"""The number that a takeover chooses, in every state that a copy can be in, and what it says of it."""

from __future__ import annotations

from typing import Any

import pytest

from blockrepl.formats.link import NO_EPOCH, Epoch, Message, Pair
from blockrepl.replication.takeover import Phase, Takeover
from tests.replication.roles import GROUP, MID, ONE, S1, S2, TWO, arrives, messages, report, welcome

OURS = Epoch(2, b"t" * 16)
NAMES = {MID: "i", S1: "s1", S2: "s2"}


def opener(**options: Any) -> Takeover:
    """It has greeted both secondaries; the intermediate is gone."""
    role = Takeover(
        group=GROUP, node=S1, name="s1", intermediate=MID, secondaries=[S1, S2], names=NAMES, new_id=lambda: OURS.id,
        now_s=0.0, **options,
    )  # fmt: skip
    role.unreachable(MID, "gone", 0.0)
    return greeted(role)


def greeted(role: Takeover) -> Takeover:
    for node in (S1, S2):
        role.connected(node, node, bytes(16))
        role.received(node, Message.WELCOME, report(node), 0.0)
    return role


def answer(**fields: Any) -> dict[str, Any]:
    """A secondary's PROMISED."""
    given = {"epoch": OURS, "stored": ONE, "held": 0, "validated": 0, "applied": 0, "active": False, "number": 0,
             "members": [], "numbered": 0, **fields}  # fmt: skip
    given["numbered"] = max(given["numbered"], given["held"])
    return arrives(Message.PROMISED, **given)


def copying(held: int, copy_from: int, **fields: Any) -> dict[str, Any]:
    """… between START and END."""
    return answer(held=held, **{"validated": held, "copying": True, "copy_from": copy_from, **fields})


def promised(role: Takeover, first: dict[str, Any], second: dict[str, Any]) -> int | None:
    """The number that both are told to store; None when there is none."""
    role.received(S1, Message.PROMISED, first, 0.0)
    asked = [f["number"] for _, kind, f in messages(role.received(S2, Message.PROMISED, second, 0.0))
             if kind == Message.STORE]  # fmt: skip
    assert len(set(asked)) == (1 if asked else 0)
    return asked[0] if asked else None


def stored(role: Takeover, **fields: Any) -> None:
    for node in (S1, S2):
        given = {"epoch": OURS, "applied": 0, "discarded_writes": 0, "discarded_bytes": 0, **fields}
        role.received(node, Message.STORED, arrives(Message.STORED, **given), 0.0)


# What S1 and S2 answer, the number, and what it was rolled back from. START at 51 goes back to 40, END is 90.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], int, int | None]] = [
    ("in order", answer(held=50, validated=40), answer(held=45, validated=40), 45, None),
    ("both in mid-copy", copying(70, 40), copying(80, 40), 40, 70),
    ("one has no START yet", copying(70, 40, validated=40), answer(held=45, validated=40), 40, 45),
    ("one has no START, nor anything above", copying(70, 40, validated=40), answer(held=40, validated=40), 40, None),
    ("both hold the END, one validated it", copying(95, 40, end=90), answer(held=99, validated=90), 95, None),
    ("one holds no END", copying(95, 40, end=90, validated=60), copying(80, 40), 40, 80),
    ("both are at the END exactly", copying(90, 40, end=90), copying(90, 40, end=90), 90, None),
    ("one begins a second copy, the other not", copying(99, 95, validated=95), answer(held=97, validated=95), 95, 97),
]


@pytest.mark.parametrize(("first", "second", "number", "back"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_20_nobody_is_left_between_start_and_end(
    first: dict[str, Any], second: dict[str, Any], number: int, back: int | None
) -> None:
    for one, other in ((first, second), (second, first)):
        role = opener()
        assert promised(role, one, other) == number
        assert (role.report.number, role.report.rolled_back_from) == (number, back)
        assert role.report.copying == (back is not None)


def test_20_whoever_has_ended_its_copy_does_not_go_back_with_one_that_lost_the_end() -> None:
    """It was prepared on all before anybody ended: one that does not hold it has lost what it promised."""
    role = opener()
    promised(role, copying(80, 40), answer(held=99, validated=95))
    assert (role.phase, role.problem) == (Phase.FAILED, "s2 cannot go back to 40, to which the others must")


def test_20_a_takeover_in_an_initial_copy_is_refused_without_force() -> None:
    answers = copying(70, 0, initial=True, validated=60), copying(80, 0, initial=True, validated=60)
    role = opener()
    promised(role, *answers)
    assert role.phase is Phase.FAILED
    assert "initial copy" in role.problem
    assert "--force" in role.hint
    role = opener(force=True)
    assert promised(role, *answers) == 70
    assert (role.report.initial, role.report.rolled_back_from) == (True, None)
    role = opener(dry_run=True)
    assert promised(role, *answers) == 70
    assert role.report.initial


def test_what_is_lost_is_said_in_writes_bytes_and_seconds() -> None:
    role = opener(dry_run=True)
    assert promised(role, answer(held=50, numbered=58), answer(held=45)) == 45
    stored(role, discarded_writes=5, discarded_bytes=2048, kept_ns=7_000_000_000, newest_ns=8_500_000_000)
    told = role.report
    assert role.phase is Phase.DONE
    assert (told.lost_writes, told.discarded_bytes, told.lost_s) == (13, 4096, 1.5)


def counting() -> Takeover:
    """Split at 40: the intermediate, at 90, is asked what a takeover gives up."""
    role = with_intermediate(held=90, validated=40, pair=Pair.PSUS)
    asked = promised(role, answer(held=40, validated=40), answer(held=40, validated=40))
    assert (asked, role.report.lost_writes) == (40, 50)
    return role


def counts(**fields: Any) -> dict[str, Any]:
    """The intermediate's STORED."""
    return arrives(Message.STORED, epoch=ONE, applied=0, **{"discarded_writes": 0, "discarded_bytes": 0, **fields})


@pytest.mark.parametrize("first", [True, False])
def test_what_the_intermediate_counts_in_its_journal_is_what_is_lost(first: bool) -> None:
    """START, END and copied blocks have numbers too, and are no writes of hosts."""
    role = counting()
    told = counts(discarded_writes=47, discarded_bytes=8192, kept_ns=1_000_000_000, newest_ns=3_000_000_000, whole=True)
    if not first:
        stored(role)
        assert role.phase is Phase.STORING, "the report waits for what the intermediate says"
    role.received(MID, Message.STORED, told, 0.0)
    if first:
        stored(role)
    assert role.phase is Phase.ACTIVATING
    assert (role.report.counted, role.report.lost_writes, role.report.lost_bytes) == (True, 47, 8192)
    assert role.report.lost_s == 2.0


def test_a_journal_that_gave_up_some_of_it_is_not_what_is_lost() -> None:
    role = counting()
    role.received(MID, Message.STORED, counts(discarded_writes=9, discarded_bytes=512, whole=False), 0.0)
    stored(role, discarded_bytes=7)
    assert (role.report.counted, role.report.lost_writes, role.report.lost_bytes) == (False, 50, 14)


@pytest.mark.parametrize("how", ["link", "time"])
def test_an_intermediate_that_falls_silent_while_it_counts_does_not_stop_a_takeover(how: str) -> None:
    role = counting()
    stored(role)
    if how == "link":
        role.lost(MID, 1.0)
    else:
        role.tick(1e6)
    assert role.phase is Phase.ACTIVATING
    assert (role.report.counted, role.report.lost_writes) == (False, 50)


def test_only_what_the_intermediate_vouches_for_is_called_lossless() -> None:
    """What it had beyond, and what hosts completed alone, a secondary never heard of."""
    both = answer(held=60, validated=60), answer(held=60, validated=60)
    for fence_never in (False, True):
        role = opener(fence_never=fence_never)
        promised(role, *both)
        stored(role)
        assert (role.report.lost_writes, role.report.alone, role.report.lossless) == (0, fence_never, False)
    role = with_intermediate(held=60, validated=60)
    promised(role, *both)
    stored(role)
    assert (role.report.alone, role.report.lossless) == (False, True)


@pytest.mark.parametrize(("pair", "alone"), [(Pair.PSUS, False), (Pair.PSUE, True)])
def test_hosts_may_have_gone_alone_though_nothing_that_is_numbered_is_lost(pair: Pair, alone: bool) -> None:
    role = with_intermediate(held=60, validated=60, pair=pair)
    promised(role, answer(held=60, validated=60), answer(held=60, validated=60))
    stored(role)
    assert (role.report.lost_writes, role.report.alone, role.report.lossless) == (0, alone, False)


def test_seconds_that_nobody_knows_are_not_made_up() -> None:
    role = opener(dry_run=True)
    promised(role, copying(70, 40), copying(70, 40))
    stored(role, newest_ns=8_500_000_000)
    assert (role.report.lost_writes, role.report.lost_s) == (30, None)


def drained(role: Takeover, **fields: Any) -> None:
    role.connected(MID, MID, bytes(16))
    role.received(MID, Message.WELCOME, welcome(), 0.0)
    greeted(role)
    role.received(MID, Message.PROMISED, answer(**fields), 0.0)


def opening_a_swap(*, planned: bool = True) -> Takeover:
    return Takeover(
        group=GROUP, node=S1, name="s1", intermediate=MID, secondaries=[S1, S2], names=NAMES, new_id=lambda: OURS.id,
        now_s=0.0, planned=planned,
    )  # fmt: skip


def with_intermediate(*, planned: bool = False, **fields: Any) -> Takeover:
    role = opening_a_swap(planned=planned)
    drained(role, **fields)
    return role


def test_a_pair_that_is_drained_loses_nothing() -> None:
    role = with_intermediate(held=60, validated=60)
    assert promised(role, answer(held=60, validated=60), answer(held=60, validated=60)) == 60
    stored(role)
    assert (role.report.drained, role.report.lost_writes, role.report.lost_s) == (True, 0, 0.0)


@pytest.mark.parametrize("stored_there", [NO_EPOCH, ONE])
def test_25_an_intermediate_that_did_not_number_what_they_hold_does_not_make_it_lossless(stored_there: Epoch) -> None:
    """A new, empty one, or one that a reform has not reached: it is drained of nothing."""
    role = opening_a_swap(planned=False)
    role.connected(MID, MID, bytes(16))
    role.received(MID, Message.WELCOME, welcome(), 0.0)
    for node in (S1, S2):
        role.connected(node, node, bytes(16))
        role.received(node, Message.WELCOME, {**report(node), "epoch": TWO, "promised": TWO}, 0.0)
    asked = Epoch(3, OURS.id)
    role.received(MID, Message.PROMISED, answer(epoch=asked, stored=stored_there), 0.0)
    held = answer(epoch=asked, stored=TWO, held=60, validated=60)
    assert promised(role, held, held) == 60
    stored(role, epoch=asked)
    assert (role.report.drained, role.report.counted, role.report.lossless) == (False, False, False)


@pytest.mark.parametrize("pair", [Pair.PSUS, Pair.PSUE, Pair.PFUS])
def test_a_suspended_pair_is_never_called_drained(pair: Pair) -> None:
    role = with_intermediate(held=90, validated=60, pair=pair, dirty_bytes=1 << 20)
    assert promised(role, answer(held=60, validated=60), answer(held=60, validated=60)) == 60
    assert (role.report.drained, role.report.lost_writes, role.report.pair) == (False, 30, pair.name)
    assert role.report.out_of_sync_bytes == 1 << 20


def test_in_mid_copy_the_intermediate_cannot_drain_and_the_copy_goes_back() -> None:
    role = with_intermediate(held=90, validated=70, pair=Pair.COPY)
    assert promised(role, copying(70, 40), copying(75, 40)) == 40
    assert (role.report.drained, role.report.rolled_back_from, role.report.lost_writes) == (False, 70, 50)


def test_what_hosts_wrote_at_a_split_is_told() -> None:
    role = opener(dry_run=True)
    promised(role, answer(held=50, dirty_bytes=65536), answer(held=50, dirty_bytes=131072))
    assert role.report.split_bytes == 196608


@pytest.mark.parametrize(
    "told",
    [{"pair": Pair.PSUE}, {"pair": Pair.PSUS}, {"validated": 59}, None],
    ids=["alone", "split", "behind", "lost"],
)
def test_a_takeover_that_begins_a_swap_ends_before_a_secondary_has_promised_where_it_may_lose_something(
    told: dict[str, Any] | None,
) -> None:
    role = with_intermediate(held=60, **{"validated": 60, **told}, planned=True) if told else drained_away()
    assert (role.phase, "a swap loses nothing" in role.problem) == (Phase.FAILED, True)


def drained_away() -> Takeover:
    """The beginning of a swap whose intermediate dies before it has promised."""
    role = opening_a_swap()
    role.connected(MID, MID, bytes(16))
    role.received(MID, Message.WELCOME, welcome(), 0.0)
    greeted(role)
    assert role.phase is Phase.DRAINING
    role.lost(MID, 1.0)
    return role


def test_a_swap_is_not_begun_without_the_intermediate() -> None:
    role = opening_a_swap()
    role.unreachable(MID, "refused", 0.0)
    greeted(role)
    assert (role.phase, "a swap loses nothing" in role.problem) == (Phase.FAILED, True)


def test_a_swap_whose_secondaries_are_all_brought_up_goes_on() -> None:
    role = with_intermediate(held=60, validated=60, planned=True)
    assert promised(role, answer(held=60, validated=60), answer(held=60, validated=60)) == 60
