"""How a primary is suspended, and what it does then: it may go on alone, with bits (PROTOCOL, rules 7, 8, 15 to 17)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockrepl.block import WriteBatch
from blockrepl.formats.link import NO_EPOCH, Epoch, Pair
from blockrepl.replication.actions import Action, Event, FailBatch, Reformed, StoreBatch
from blockrepl.replication.alone import Solo

if TYPE_CHECKING:
    from blockrepl.replication.primary import Primary


class Suspension:
    """Going alone and being alone.

    Invariant: before the first write is completed alone, the P-VOLs are durable, the bits of everything the group may
    lack are durable, and so is PSUE.
    """

    def __init__(self, owner: Primary, *, asked: bool) -> None:
        """``asked``: an operator lets this process go alone before it has met the intermediate (rule 24)."""
        self._owner = owner
        self._asked = asked
        # Started while it was suspended: another side may have taken over since, and the line be cut. After a takeover
        # here (detached) none can have: that needs a reform, and every node for it.
        self.confirmed = asked or owner.state.detached or not owner.state.suspended
        self._started_s: float | None = None
        self._tick_s = 0.0
        self.reforming = False
        self.bound: Callable[[], Epoch] = lambda: NO_EPOCH  # what the node beside it has promised

    @property
    def promised(self) -> bool:
        """A reform has its node's promise, which said whether it was alone: that must stay true (rule 24)."""
        return self.bound().number > self._owner.state.epoch.number

    @property
    def was_alone(self) -> bool:
        """It has, or may have by now, completed writes without its intermediate that no resync has taken up."""
        owner, state = self._owner, self._owner.state
        return owner.suspending or (bool(state.suspended) and state.alone and not state.detached)

    @property
    def completes(self) -> bool:
        """Writes complete without the group now."""
        owner = self._owner
        free = self.confirmed and not owner.fenced and not owner.resyncing.begins
        return owner.suspended and owner.state.alone and free

    def tick(self, now_s: float) -> list[Action]:
        """Fence never: no sooner than 2 T after the newest stamp was received (rule 16)."""
        owner = self._owner
        if self._started_s is None:
            self._started_s = self._tick_s = now_s
        gap_s, self._tick_s = now_s - self._tick_s, now_s
        if gap_s > owner.policy.lease_s and owner.stamp_received_s is not None:
            owner.stamp_received_s += gap_s  # it was stopped: what came meanwhile waits to be read
        if not owner.policy.fence_never or owner.fenced or owner.state.suspended:
            return []
        since_s = owner.stamp_received_s
        if not owner.serving:
            if not self._asked:
                return []
            since_s = self._started_s if since_s is None else since_s  # what older processes received came before
        if since_s is None or now_s - since_s < 2 * owner.policy.lease_s:
            return []
        return self.go_alone("the intermediate has been silent for twice the lease")

    def told(self, number: int) -> list[Action]:
        """The intermediate has stored that it numbers nothing more after ``number``."""
        owner = self._owner
        owner.numbering = False
        owner.resyncing.stop()
        actions = owner.drop_link("suspended again") if owner.rejoining else []
        if owner.state.suspended or owner.suspending:
            return actions
        if owner.policy.fence_never and not owner.fenced and owner.serving and not self.promised:
            return [*actions, *self.go_alone(f"the group is suspended at {number}")]
        owner.queue.rewind()
        return [*actions, Event(f"{owner.pair.name}: nothing is numbered any more; writes wait for a resync")]

    def go_alone(self, why: str) -> list[Action]:
        """The link is closed first; then bits, P-VOLs, PSUE."""
        owner, state = self._owner, self._owner.state
        if not owner.may_go_alone:
            return []
        closed = owner.drop_link(f"going on alone: {why}")
        owner.machine.go("suspend")
        waiting = self._mark()
        trusted = state.trusted and owner.trusted

        def bits_saved(now_s: float) -> list[Action]:
            return [owner.sync_volumes(synced)]

        def synced(now_s: float) -> list[Action]:
            state.suspended, state.alone, state.trusted, state.resync = int(Pair.PSUE), True, trusted, 0
            return [owner.save_state(stored)]

        def stored(now_s: float) -> list[Action]:
            owner.machine.go("suspended")
            owner.unconfirmed.clear()
            return [Event("serving alone"), *self.complete_waiting()]

        for volume, batch, since_s in waiting:
            owner.enqueue(volume, batch, since_s)
        return [*closed, Event(f"PSUE: going on alone: {why}"), owner.save_bits(bits_saved)]

    def _mark(self) -> list[tuple[int, WriteBatch, float]]:
        """Bits of all that the group may lack. What was begun for the journal ends; returns what waited for a copy."""
        owner = self._owner
        owner.begin_era()
        owner.unconfirmed.mark()
        for record in owner.queue:
            owner.mark_pending(record)
        return owner.locks.void()

    def complete_waiting(self) -> list[Action]:
        """What waits for the group completes without it, before anything that comes later."""
        owner = self._owner
        actions: list[Action] = []
        if self.completes:
            for record in owner.queue.take_all():
                if record.batch is not None:
                    actions += self.write(record.volume, record.batch, report=not record.failed)
        return actions

    def write(self, volume: int, batch: WriteBatch, *, report: bool = True) -> list[Action]:
        """A write that completes alone: its bits first."""
        owner = self._owner
        if owner.solo.add(volume, batch, report=report):
            return [StoreBatch(volume, batch, report)]
        return self._save()

    def _save(self) -> list[Action]:
        owner = self._owner
        if not owner.solo.begin_save():
            return []

        def saved(now_s: float) -> list[Action]:
            stored = [action for solo in owner.solo.saved() for action in self._finish(solo)]
            return [*stored, *self._save(), *owner.resyncing.proceed(now_s)]

        return [owner.save_bits(saved, lasting=True)]

    def _finish(self, solo: Solo) -> list[Action]:
        stored = StoreBatch(solo.volume, solo.batch, solo.report)
        if self._owner.fenced and solo.report:  # a takeover may not have it: nobody is told that it is well (rule 24)
            stored.report = False
            return [FailBatch(solo.volume, solo.batch, self._owner.why_held()), stored]
        return [stored]

    def close(self, done: Callable[[], None]) -> list[Action]:
        """A clean stop: what the group may lack is stored as bits, so that they can be trusted (rule 8)."""
        owner, state = self._owner, self._owner.state
        if owner.failing or (not owner.trusted and not state.suspended):
            return self._say(done)
        owner.unconfirmed.mark()
        for record in owner.queue:
            owner.mark_pending(record)

        def bits_saved(now_s: float) -> list[Action]:
            state.clean = True
            return [owner.save_state(lambda _: self._say(done))]

        return [owner.save_bits(bits_saved)]

    @staticmethod
    def _say(done: Callable[[], None]) -> list[Action]:
        done()
        return []

    # the group is formed anew

    def reform(self, epoch: Epoch, direction: int) -> list[Action]:
        """This primary is a source of the new group: everything the others may lack is marked; ends with `Reformed`.

        It is suspended until the resync that follows; the batch numbers begin anew with its incarnation. Every member
        has promised the epoch, so nothing that others write can reach a secondary without what is written alone here.
        """
        owner, state = self._owner, self._owner.state
        alone = state.alone or owner.policy.fence_never
        closed = owner.drop_link("the group is formed anew")
        self.reforming = True
        waiting = self._mark()
        trusted = state.trusted and (bool(state.suspended) or owner.trusted)

        def bits_saved(now_s: float) -> list[Action]:
            return [owner.sync_volumes(synced)]  # it never replays any more: the old journal is history

        def synced(now_s: float) -> list[Action]:
            state.epoch, state.promised, state.direction = epoch, max(state.promised, epoch), direction
            state.suspended, state.alone, state.detached = state.suspended or int(Pair.PSUE), alone, False
            state.incarnation += 1
            state.trusted, state.resync, state.checkpoint = trusted, 0, 0
            return [owner.save_state(stored)]

        def stored(now_s: float) -> list[Action]:
            self.reforming = False
            self.confirmed = True  # by every node
            owner.begin_anew()
            owner.resyncing.compare = True
            return [Event(f"formed anew in epoch {epoch}"), *self.complete_waiting(), Reformed()]

        for volume, batch, since_s in waiting:
            owner.enqueue(volume, batch, since_s)
        return [*closed, owner.save_bits(bits_saved)]

    def retire(self, reason: str) -> list[Action]:
        """It becomes a target: what it has and the others lack is marked; hosts fail; ends with `Reformed`."""
        owner = self._owner
        actions = owner.drop_link(reason)
        waiting = self._mark()
        for record in owner.queue.take_all():
            if record.batch is not None and not record.failed:
                actions.append(FailBatch(record.volume, record.batch, reason))
        actions += [FailBatch(volume, batch, reason) for volume, batch, _ in waiting]
        actions += [FailBatch(solo.volume, solo.batch, reason) for solo in owner.solo.give_up() if solo.report]
        return [*actions, owner.save_bits(lambda _: [Reformed()])]
