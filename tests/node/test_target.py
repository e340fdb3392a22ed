"""A target through copies, splits and reforms, over power cuts (PROTOCOL, rules 18, 20 and 23)."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from blockrepl.formats.link import Epoch, Message
from blockrepl.formats.record import RecordFlag
from blockrepl.replication.actions import BecomeSource
from blockrepl.replication.copying import Stage
from blockrepl.replication.secondary import Phase
from tests.node.target_rig import OPENER, Rig, raises

COPY = int(RecordFlag.COPY)


def filled(seed: int = 1) -> Rig:
    """A target with something in it, at one number."""
    rig = Rig(seed)
    for _ in range(6):
        rig.write()
    rig.validated()
    return rig


def copying(seed: int = 1) -> tuple[Rig, int, int]:
    """… in mid-copy; the number it would go back to, and the START's."""
    rig = filled(seed)
    back = rig.number
    start = rig.start(back).number
    for _ in range(5):
        rig.write(COPY)
    rig.validated()
    return rig, back, start


def some_steps(rig: Rig, steps: str, count: int) -> None:
    """Records, copies, prepares and validations in any order, power cuts and kills between any two of their effects.

    STARTs go back to what their intermediate would name: what is numbered, or with a jump what is validated.
    """
    random = rig.random
    for _ in range(count):
        step = random.choice(steps)
        if step == "w":
            rig.write()
        elif step == "c" and rig.copy:
            rig.write(COPY)
        elif step == "s":
            jump = random.random() < 0.3
            rig.copy_from = rig.copy_from if rig.copy else max(rig.all_validated, rig.ended) if jump else rig.number
            rig.copy = rig.start(rig.copy_from, skip=7 * jump).number
        elif step == "e" and rig.copy:
            rig.ended = rig.end(rig.copy).number
            rig.copy = 0
        elif step == "p":
            rig.prepare()
        elif step == "v":
            rig.validate()
        elif step == "k":
            rig.process.kill_in = random.randint(1, 20)
        elif step == "x":
            rig.crash(power=random.random() < 0.8)
        rig.pause()
        rig.revive()
    rig.process.kill_in = 0
    rig.revive()


@pytest.mark.parametrize("seed", range(60))
def test_a_takeover_at_any_moment_gives_a_number_of_the_history(seed: int) -> None:
    rig = Rig(seed)
    some_steps(rig, "wwwwwcsepppvvvkx", rig.random.randint(5, 60))
    rig.settle()
    rig.revive()
    validated, copy = rig.role.validated, rig.role.copying.newest
    number = rig.take_over()
    assert number >= validated or number == copy.copy_from
    rig.check(number)


@pytest.mark.parametrize("seed", range(40))
def test_a_takeover_in_mid_copy_goes_back_whatever_happened_since_the_start(seed: int) -> None:
    rig = filled(seed)
    back = rig.number
    rig.copy, rig.copy_from = rig.start(back).number, back
    some_steps(rig, "wcccpvpvpvskkxx", rig.random.randint(5, 30))
    rig.prepare()
    rig.settle()
    assert rig.take_over() == back
    rig.check(back)
    assert not rig.role.state.copying
    assert rig.process.host.undo.used_bytes == 0


@pytest.mark.parametrize("seed", range(20))
def test_once_the_end_is_prepared_a_takeover_goes_forward(seed: int) -> None:
    rig, _, start = copying(seed)
    some_steps(rig, "wpvkx", 6)
    rig.end(start)
    rig.write()
    rig.prepare()
    rig.settle()
    some_steps(rig, "pvkx", rig.random.randint(0, 6))
    rig.settle()
    assert rig.take_over() == rig.number
    rig.check(rig.number)


# one thing at a time


def test_a_start_is_stored_before_anything_above_its_number_is_applied() -> None:
    rig = filled()
    back, before = rig.number, rig.images()
    rig.start(back)
    rig.write(COPY)
    rig.prepare()
    rig.settle()
    rig.validate()
    while not rig.role.state.copying:
        assert rig.images() == before
        assert rig.world.step()
    assert rig.images() == before
    rig.settle()
    assert (rig.role.copying.stage, rig.role.applied) == (Stage.COPYING, rig.number)
    rig.crash(power=True)
    assert (rig.role.state.copying, rig.role.state.copy_from) == (True, back)


def test_a_second_start_changes_nothing() -> None:
    rig, back, start = copying()
    rig.start(rig.number, skip=5)
    rig.write(COPY)
    rig.validated()
    assert (rig.role.state.copy_from, rig.role.state.start) == (back, start)
    assert rig.take_over() == back
    rig.check(back)


def test_an_end_that_not_everybody_got_to_is_none() -> None:
    """It is held here, not validated; the START after it goes back to where the first one did."""
    rig, back, start = copying()
    rig.end(start)
    rig.prepare()
    rig.settle()
    rig.start(back, skip=4)
    rig.write(COPY)
    rig.validated()
    assert rig.role.copying.stage is Stage.COPYING
    assert rig.take_over() == back
    rig.check(back)


def test_the_end_drops_the_undo_and_a_new_copy_begins_one() -> None:
    rig, _, start = copying()
    assert rig.process.host.undo.used_bytes > 4096
    end = rig.end(start).number
    rig.validated()
    assert (rig.role.state.copying, rig.role.state.end, rig.process.host.undo.used_bytes) == (False, end, 0)
    back = rig.number
    rig.start(back)
    rig.write(COPY)
    rig.validated()
    assert rig.take_over() == back
    rig.check(back)


def test_an_initial_copy_saves_nothing_and_has_no_way_back() -> None:
    rig = filled()
    start = rig.start(0, initial=True).number
    rig.write(COPY)
    rig.validated()
    assert (rig.role.state.initial, rig.process.host.undo.used_bytes) == (True, 0)
    rig.crash(power=True)
    assert rig.role.state.initial
    rig.end(start)
    rig.validated()
    assert not rig.role.state.copying
    assert rig.take_over() == rig.number
    rig.check(rig.number)


def test_a_forced_takeover_in_an_initial_copy_leaves_the_images_as_they_are() -> None:
    rig = filled()
    rig.start(0, initial=True)
    rig.write(COPY)
    rig.validated()
    assert rig.take_over(rig.number) == rig.number
    assert not rig.role.state.copying
    rig.check(rig.number)


def test_no_space_for_the_undo_file_pauses_the_copy() -> None:
    rig = filled()
    rig.start(rig.number)
    rig.write(COPY)
    rig.prepare()
    rig.settle()
    rig.process.machine.files["undo"].fail("write", after=1, times=1000, code=errno.ENOSPC)
    rig.validate()
    rig.settle()
    assert rig.role.phase is Phase.FOLLOWING
    assert rig.role.applied < rig.number
    assert "no space" in rig.process.host.paused
    rig.process.machine.files["undo"].mend()
    rig.settle()
    assert (rig.role.applied, rig.process.host.paused) == (rig.number, "")


def test_another_error_of_the_undo_file_stops_the_secondary() -> None:
    rig = filled()
    rig.start(rig.number)
    rig.write(COPY)
    rig.prepare()
    rig.settle()
    rig.process.machine.files["undo"].fail("sync", after=1, times=1, code=errno.EIO)
    rig.validate()
    rig.settle()
    assert rig.role.phase is Phase.FAILED
    assert rig.role.applied < rig.number


@pytest.mark.parametrize(("at", "skip", "words"), [(3, 5, "is applied here"), (999, 5, "only"), (999, 0, "only")])
def test_a_start_that_cannot_be_gone_back_from_is_refused(at: int, skip: int, words: str) -> None:
    rig = filled()
    assert words in raises(lambda: rig.start(at, skip=skip))
    assert not rig.role.copying.spans


def test_a_gap_is_no_jump() -> None:
    """Only a START says that what lies between is never sent."""
    rig = filled()
    record = rig.history[-1].record
    assert "follows" in raises(lambda: rig.resend(record, rig.number + 3))


# splits


def test_a_split_is_at_exactly_its_number_durably_and_then_published() -> None:
    rig = filled()
    at = rig.number
    rig.write()
    rig.prepare()
    rig.settle()
    rig.message(Message.SPLIT, number=at, writable=True)
    while not rig.splits:
        assert rig.world.step()
    assert rig.splits == [True]
    rig.crash(power=True)
    rig.settle()
    assert (rig.role.state.split, rig.splits) == (True, [True, True])
    rig.check(at)
    rig.validate()
    rig.settle()
    rig.check(at)  # what is validated later waits for REJOIN


def test_a_split_that_rejoins_stops_its_hosts_first_and_stays_joined() -> None:
    rig = filled()
    rig.message(Message.SPLIT, number=rig.number, writable=False)
    rig.settle()
    rig.message(Message.REJOIN, number=rig.number)
    rig.settle()
    assert (rig.withdrawn, rig.said[-1]) == (1, Message.REJOINED)
    rig.crash(power=True)
    rig.settle()
    assert (rig.role.state.split, rig.splits) == (False, [False])
    rig.write()
    rig.validated()
    rig.check_cache(rig.number)


def test_what_hosts_wrote_at_a_split_is_told_until_a_copy_has_ended() -> None:
    rig = filled()
    rig.message(Message.SPLIT, number=rig.number, writable=True)
    rig.settle()
    rig.role.bitmaps[2].mark(9000, 10)
    for _ in range(2):  # the answer may be lost
        rig.message(Message.REJOIN, number=rig.number)
        rig.settle()
        assert rig.said[-2:] == [Message.BITMAP, Message.REJOINED]
    start = rig.start(rig.number).number
    rig.write(COPY)
    rig.validated()
    assert rig.role.dirty_bytes == 4096
    rig.end(start)
    rig.validated()
    assert rig.role.dirty_bytes == 0
    rig.crash(power=True)
    assert rig.role.dirty_bytes == 0


def test_a_split_at_a_later_number_moves_there() -> None:
    """Suspended while something was in flight: it may still be validated, and all splits are to be at one number."""
    rig = filled()
    rig.message(Message.SPLIT, number=rig.number, writable=False)
    rig.settle()
    rig.write()
    rig.prepare()
    rig.settle()
    rig.message(Message.SPLIT, number=rig.number, writable=False)
    rig.settle()
    assert (rig.splits, rig.withdrawn) == ([False, False], 1)
    rig.check(rig.number)


def test_no_copy_begins_under_the_hosts_of_a_split() -> None:
    rig = filled()
    rig.message(Message.SPLIT, number=rig.number, writable=True)
    rig.settle()
    assert "REJOIN" in raises(lambda: rig.start(rig.number))


def test_no_split_in_mid_copy_or_beyond_what_is_prepared() -> None:
    rig = filled()
    assert "prepared" in raises(lambda: rig.message(Message.SPLIT, number=rig.number + 1, writable=False))
    rig, _, _ = copying()
    assert "mid-copy" in raises(lambda: rig.message(Message.SPLIT, number=rig.number, writable=False))


def test_a_takeover_of_a_split_secondary_stops_its_hosts_first() -> None:
    rig = filled()
    rig.message(Message.SPLIT, number=rig.number, writable=True)
    rig.settle()
    rig.act(lambda: rig.store(OPENER, truncate=True, number=rig.number, epoch=Epoch(2, b"2" * 16)))
    rig.settle()
    assert (rig.role.phase, rig.withdrawn, rig.role.state.split) == (Phase.STORED, 1, False)


# reforms


def reform(rig: Rig, number: int, *, source: bool = False, initial: bool = False) -> None:
    """STORE(reform), as its opener sends it."""
    rig.epoch = Epoch(rig.epoch.number + 1, b"r" * 16)
    more: dict[str, Any] = {"reform": True, "source": source, "initial": initial, "direction": 1}
    rig.act(lambda: rig.store(OPENER, truncate=False, number=number, epoch=rig.epoch, **more))


@pytest.mark.parametrize("seed", range(20))
def test_a_target_begins_anew_above_the_number_with_a_way_back_to_where_it_was(seed: int) -> None:
    rig = filled(seed)
    rig.write()
    rig.prepare()
    rig.settle()
    own = rig.number  # prepared, not validated: all targets hold it, so that is where they are
    reform(rig, 1000)
    if seed % 2:
        rig.world.run(rig.world.now_s + 0.5 + seed * 0.0005)
        rig.crash(power=True)
        reform(rig, 1000)
    rig.settle()
    role = rig.role
    assert (role.phase, role.received, role.state.copying, role.state.copy_from) == (Phase.FOLLOWING, 1000, True, 1000)
    assert role.state.direction == 1
    rig.check(own)
    rig.history_ends_at(own, 1000)
    rig.act(rig.connect)
    start = rig.start(1000).number
    rig.write(COPY)
    rig.validated()
    if seed % 3:
        assert rig.take_over() == 1000
        rig.check(own)
        return
    rig.end(start)
    rig.validated()
    rig.check_cache(rig.number)


def test_a_reform_in_mid_copy_keeps_the_way_back() -> None:
    rig, back, _ = copying()
    reform(rig, 1000)
    rig.settle()
    rig.history_ends_at(rig.number, 1000)
    rig.act(rig.connect)
    rig.start(1000)
    rig.write(COPY)
    rig.validated()
    assert rig.take_over() == 1000
    rig.check(back)


def test_a_reform_before_a_copy_has_begun_stops_where_it_would_go_back_to() -> None:
    """START is held, and what is in front of it not even validated: its intermediate counts on that number."""
    rig = filled()
    rig.write()
    back = rig.number
    rig.start(back)
    rig.write(COPY)
    rig.prepare()
    rig.settle()
    reform(rig, 1000)
    rig.settle()
    assert (rig.role.state.copy_from, rig.role.state.initial) == (1000, False)
    rig.check(back)


def test_a_source_becomes_a_target_and_its_hosts_are_stopped_first() -> None:
    rig = filled()
    rig.take_over()
    before = rig.images()
    rig.epoch = rig.role.state.epoch
    rig.watch()
    reform(rig, 1000, initial=True)
    rig.world.run(rig.world.now_s + 0.4)
    assert (rig.role.phase, rig.withdrawn) == (Phase.ACTIVE, 0)  # promised, and it serves on
    assert rig.role.state.promised == rig.epoch
    rig.settle()
    assert (rig.role.phase, rig.withdrawn, rig.role.state.active) == (Phase.FOLLOWING, 1, False)
    assert (rig.role.state.initial, rig.images()) == (True, before)
    rig.crash(power=True)
    assert (rig.role.phase, rig.role.received) == (Phase.FOLLOWING, 1000)


def test_a_source_stays_one_and_its_primary_is_suspended_before_the_epoch_is_stored() -> None:
    rig = filled()
    rig.take_over()
    rig.epoch = rig.role.state.epoch
    asked: list[tuple[int, Epoch]] = []

    def suspend(action: BecomeSource, done: Any) -> None:
        asked.append((action.number, rig.role.state.epoch))
        done()

    rig.process.host.on_source = suspend
    old = rig.epoch
    reform(rig, 1000, source=True)
    rig.settle()
    assert asked == [(1000, old)]
    assert (rig.role.phase, rig.role.state.epoch, rig.role.state.direction) == (Phase.ACTIVE, rig.epoch, 1)
    rig.crash(power=True)
    assert (rig.role.phase, rig.role.state.epoch) == (Phase.ACTIVE, rig.epoch)


def test_who_is_no_source_is_not_made_one_by_a_reform() -> None:
    rig = filled()
    reform(rig, 1000, source=True)
    assert "take over first" in raises(lambda: rig.settle())


def test_what_a_copys_end_made_durable_leaves_the_ring_though_nothing_follows() -> None:
    """Else its peer waits for its note of what comes next, and that for room, for ever (rules 6 and 14)."""
    rig, _, start = copying()
    rig.end(start)
    rig.validated()
    rig.crash(power=False)
    rig.settle(3.0)
    assert rig.role.state.applied == rig.number
    assert rig.process.host.journal.journal.used_bytes == 0


def test_what_is_received_takes_from_the_credit_at_once_and_not_only_at_the_next_trim() -> None:
    """Else a ring is filled to the brim with what is not validated, and its note finds no room (rule 6)."""
    rig = filled()
    rig.settle(3.0)
    journal, role = rig.process.host.journal.journal, rig.role
    while journal.free_bytes > journal.ring_bytes // 2:
        rig.write()
    rig.prepare()
    rig.settle()
    assert role._credit - role._credit_used <= journal.free_bytes
