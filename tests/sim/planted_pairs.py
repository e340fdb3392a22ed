"""Planted bugs, of the pair's life mostly, each with the scenario that it breaks; see `planted.py`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from blockrepl.formats.record import RecordKind
from blockrepl.replication import takeover
from blockrepl.replication.actions import DropUndo, OpenUndo, SaveBits
from blockrepl.replication.alone import SoloWrites
from blockrepl.replication.copying import Copying
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.locks import RangeLocks
from blockrepl.replication.pairing import Pairing
from blockrepl.replication.primary import Phase, Primary
from blockrepl.replication.resyncing import Resyncing
from blockrepl.replication.secondary import Secondary
from blockrepl.replication.secondary_epochs import Epochs
from blockrepl.replication.suspension import Suspension
from tests.sim import scenarios, scenarios_epochs, scenarios_sites
from tests.sim.bits import SimBitmaps
from tests.sim.planted import Planted, replaced
from tests.sim.planted_links import (
    all_of,
    checkpoint_number_taken_after_the_sync,
    cut_tail_is_not_erased,
    prepared_kept_across_an_epoch,
    takeover_without_promise,
)


def bit_set_after_its_write() -> AbstractContextManager[Any]:
    """Rule 17: a write taken alone is stored while its bits are still on their way."""
    original = SoloWrites.add

    def add(self: SoloWrites, volume: int, batch: Any, *, report: bool = True) -> bool:
        if not original(self, volume, batch, report=report):
            self._waiting.pop()
            self.size_bytes -= batch.size_bytes
        return True

    return replaced(SoloWrites, "add", add)


def bits_cleared_before_end() -> AbstractContextManager[Any]:
    """Rule 17: the intermediate clears its bits when it has told them to the primaries."""
    original = Pairing._stored

    def stored(self: Pairing, now_s: float) -> Any:
        actions = original(self, now_s)
        if self.step.value == "copying":
            for bitmap in self.bitmaps.values():
                bitmap.clear()
            actions.append(SaveBits(self._owner.expect(lambda _: [])))
        return actions

    return replaced(Pairing, "_stored", stored)


def undo_dropped_early() -> AbstractContextManager[Any]:
    """Rule 20: a secondary drops its undo when END has come, before it is validated."""
    original = Secondary.record

    def record(self: Secondary, link: int, head: Any, *rest: Any) -> Any:
        actions = original(self, link, head, *rest)
        return [*actions, DropUndo()] if actions and head.kind == RecordKind.END else actions

    return replaced(Secondary, "record", record)


def copied_outside_the_overlap_lock() -> AbstractContextManager[Any]:
    """Rule 19: a block is read whatever writes are in flight, and writes do not wait for the copy."""

    def ready(self: RangeLocks) -> Any:
        found = [(token, lock) for token, lock in self._locks.items() if token not in self._reading]
        self._reading.update(token for token, _ in found)
        return found

    return all_of(
        replaced(RangeLocks, "ready", ready), replaced(RangeLocks, "must_wait", lambda self, volume, batch: False)
    )


def alone_before_the_lease() -> AbstractContextManager[Any]:
    """Rule 16: a primary goes alone as soon as its link is gone, its lease at the intermediate still fresh."""

    def tick(self: Suspension, now_s: float) -> Any:
        owner = self._owner
        late = owner.stamp_received_s is not None and now_s - owner.stamp_received_s > owner.policy.lease_s / 4
        return self.go_alone("it is silent") if owner.policy.fence_never and late and not owner.fenced else []

    return replaced(Suspension, "tick", tick)


def numbered_without_fresh_echoes() -> AbstractContextManager[Any]:
    """Rule 16: the intermediate numbers whether or not every primary has been heard of lately."""
    return replaced(Intermediate, "_leases_fresh", lambda self, boot_ns: True)


def psue_not_stored() -> AbstractContextManager[Any]:
    """Rule 17: PSUE is not stored before the first write is taken alone."""
    original = Primary.save_state

    def save(self: Primary, then: Any) -> Any:
        return self.sync_volumes(then) if self.suspending else original(self, then)

    return replaced(Primary, "save_state", save)


def replayed_after_psue() -> AbstractContextManager[Any]:
    """Rule 7: a primary that had stored PSUE replays the journal over what it took alone."""
    original = Primary.__init__

    def init(self: Primary, **named: Any) -> None:
        original(self, **named)
        self.machine.state = Phase.FRESH

    return replaced(Primary, "__init__", init)


def start_without_its_state() -> AbstractContextManager[Any]:
    """Rule 20: a secondary applies what comes after START before it has stored that it copies."""
    original = Copying._begin

    def begin(self: Copying, span: Any) -> Any:
        if span.initial:
            return original(self, span)
        owner, state = self._owner, self._owner.state
        self.machine.go("begin")

        def opened(now_s: float) -> Any:
            state.copying, state.copy_from, state.initial = True, span.copy_from, False
            state.start, state.end = span.start, 0
            self.machine.go("begun")
            return self._settle(now_s)

        return [OpenUndo(span.start, owner.later(opened))]

    return replaced(Copying, "_begin", begin)


def given_up_before_its_bits_are_durable() -> AbstractContextManager[Any]:
    """Rule 18: the ring gives up a record when its bits are set, and not synced."""
    original = SimBitmaps.save

    def save(self: SimBitmaps, done: Callable[[], None]) -> None:
        if not any(name.startswith("hop2") for name in self._process.machine.files):
            original(self, done)
            return
        for volume, bitmap in self.bitmaps.items():
            bitmap.changed.clear()
            self._files[volume].write(0, bytes(bitmap.bits))
        self._process.workers.later(done)

    return replaced(SimBitmaps, "save", save)


def end_counted_before_it_is_validated() -> AbstractContextManager[Any]:
    """Rule 20: a secondary takes END for valid as soon as it has prepared it."""
    original = Secondary.noted

    def noted(self: Secondary, number: int, epoch: int, now_s: float, received: int = 0) -> Any:
        actions = original(self, number, epoch, now_s, received)
        newest = self.copying.newest
        if newest is not None and newest.end and newest.end <= self.state.prepared:
            self.validated = max(self.validated, newest.end)
            actions = [*actions, *self.copying.advance(now_s)]
        return actions

    return replaced(Secondary, "noted", noted)


def journal_above_at_is_forgotten() -> AbstractContextManager[Any]:
    """Rule 18: a resync jumps over what only the journal holds, and does not turn it into bits."""
    original = Pairing._stored

    def stored(self: Pairing, now_s: float) -> Any:
        self.marked = max(self.marked, self._owner.numbered)
        return original(self, now_s)

    return replaced(Pairing, "_stored", stored)


def takeover_ignores_the_end() -> AbstractContextManager[Any]:
    """Rule 20: a takeover goes back wherever somebody copies, though END is validated."""
    return replaced(takeover, "between", lambda answer, number: answer["copying"])


def full_journal_for_ever() -> AbstractContextManager[Any]:
    """PFUS: hop 2 that was suspended by a full journal waits for an operator."""
    original = Pairing._suspend_hop2

    def suspend(self: Pairing, *args: Any) -> Any:
        actions = original(self, *args)
        self._owner.state.auto = False
        return actions

    return replaced(Pairing, "_suspend_hop2", suspend)


def own_bits_forgotten_at_a_resync() -> AbstractContextManager[Any]:
    """Rule 21: a primary copies what the intermediate's bits say, and not what it took alone."""
    original = Resyncing.begin

    def begin(self: Resyncing, fields: Any, now_s: float) -> Any:
        for bitmap in self._owner.bitmaps.values():
            bitmap.clear()
        return original(self, fields, now_s)

    return replaced(Resyncing, "begin", begin)


def target_drops_what_it_was_not_told_is_valid() -> AbstractContextManager[Any]:
    """Rules 8 and 25: formed anew, a target applies only what it knows to be validated, and drops the rest it holds."""
    original = Epochs._become_target
    validated = property(lambda role: role.validated)

    def become(self: Epochs, *args: Any) -> Any:
        with replaced(Secondary, "held", validated):
            return original(self, *args)

    return replaced(Epochs, "_become_target", become)


PLANTED: list[tuple[Planted, Callable[[], None]]] = [
    (bit_set_after_its_write, scenarios.rolling_disaster),
    (alone_before_the_lease, scenarios.rolling_disaster),
    (numbered_without_fresh_echoes, scenarios.rolling_disaster),
    (given_up_before_its_bits_are_durable, scenarios.power_cut_while_split),
    (journal_above_at_is_forgotten, scenarios.power_cut_while_split),
    (start_without_its_state, scenarios.secondary_killed_in_mid_resync),
    (undo_dropped_early, scenarios.takeover_with_an_end_that_is_not_validated),
    (end_counted_before_it_is_validated, scenarios.takeover_with_an_end_that_is_not_validated),
    (takeover_ignores_the_end, scenarios.end_validated_and_one_secondary_dies),
    (full_journal_for_ever, scenarios.full_journal),
    (bits_cleared_before_end, scenarios.primary_killed_in_mid_copy),
    (psue_not_stored, scenarios.alone_and_killed),
    (replayed_after_psue, scenarios.alone_and_killed),
    (own_bits_forgotten_at_a_resync, scenarios.solo_writes_enter_at_the_end),
    (copied_outside_the_overlap_lock, scenarios.writes_while_copying),
    (checkpoint_number_taken_after_the_sync, scenarios.power_cut_behind_a_checkpoint),
    (target_drops_what_it_was_not_told_is_valid, scenarios_sites.valid_as_only_the_sources_know),
    (cut_tail_is_not_erased, scenarios_epochs.torn_tail),
    (takeover_without_promise, scenarios_epochs.late_records_after_a_promise),
    (prepared_kept_across_an_epoch, scenarios_epochs.takeover_interrupted_behind_a_rollback),
]
