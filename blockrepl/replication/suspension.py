"""How a primary is suspended, and what it does then: it may go on alone, with bits (PROTOCOL, rules 7, 8, 15 to 17)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockrepl.block import WriteBatch
from blockrepl.formats.link import Epoch, Pair
from blockrepl.replication.actions import Action, Close, Event, FailBatch, Reformed, SaveBits, StoreBatch
from blockrepl.replication.alone import Solo

if TYPE_CHECKING:
    from blockrepl.replication.primary import Primary


class Suspension:
    """Going alone and being alone.

    Invariant: before the first write is completed alone, the P-VOLs are durable, the bits of everything the group may
    lack are durable, and so is PSUE.
    """

    def __init__(self, owner: Primary) -> None:
        self._owner = owner

    def tick(self, now_s: float) -> list[Action]:
        """Fence never: no sooner than 2 T after the newest stamp was received; the link is closed first (rule 16)."""
        owner = self._owner
        stamp_s = owner.stamp_received_s
        if not owner.policy.fence_never or owner.fenced or stamp_s is None or owner.state.suspended:
            return []
        if now_s - stamp_s < 2 * owner.policy.lease_s:
            return []
        if owner.link:
            return [Close(owner.link, "no heartbeat for twice the lease: going on alone")]
        return self.go_alone("the intermediate is silent")

    def told(self, pair: int, number: int) -> list[Action]:
        """SUSPEND: the intermediate has stored that it numbers nothing more."""
        owner = self._owner
        owner.numbering = False
        owner.queue.rewind()
        owner.resyncing.stop()  # one that was asked for before is void; another begins with its own RESYNC
        if owner.policy.fence_never and not owner.fenced and not owner.state.suspended:
            return self.go_alone(f"the group is suspended at {number}")
        return [Event(f"{Pair(pair).name}: nothing is numbered any more; writes wait for a resync")]

    def go_alone(self, why: str) -> list[Action]:
        """Bits, P-VOLs, PSUE; then `_alone`."""
        owner = self._owner
        if not owner.machine.may("suspend"):
            return []
        owner.machine.go("suspend")
        return [Event(f"PSUE: going on alone: {why}"), *self._store(Pair.PSUE, alone=True)]

    def _store(self, pair: Pair, *, alone: bool) -> list[Action]:
        owner, state = self._owner, self._owner.state
        owner.resyncing.stop()
        state.trusted = state.trusted and owner.trusted
        owner.unconfirmed.mark()

        def bits_saved(now_s: float) -> list[Action]:
            return [owner.sync_volumes(synced)]

        def synced(now_s: float) -> list[Action]:
            state.suspended, state.alone, state.resync = int(pair), alone, 0
            return [owner.save_state(stored)]

        def stored(now_s: float) -> list[Action]:
            owner.machine.go("suspended")
            owner.unconfirmed.clear()
            # A link that SUSPEND came on is still there: a new one declares what it is now.
            closed: list[Action] = [Close(owner.link, "going on alone")] if owner.link else []
            return [*closed, *self._alone()]

        return [SaveBits(owner.expect(bits_saved))]

    def _alone(self) -> list[Action]:
        """What waits for the group completes without it."""
        owner = self._owner
        actions: list[Action] = [Event("serving alone")]
        for record in owner.queue.take_all():
            if record.batch is not None:
                actions += self.write(record.volume, record.batch, report=not record.failed)
        for volume, batch, _ in owner.locks.give_up():
            actions += self.write(volume, batch)
        owner.locks.abort()
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
            stored: list[Action] = [self._finish(solo) for solo in owner.solo.saved()]
            return [*stored, *self._save(), *owner.resyncing.proceed(now_s)]

        return [SaveBits(owner.expect(saved))]

    def _finish(self, solo: Solo) -> Action:
        if self._owner.fenced and solo.report:  # a takeover may not have it: nobody is told that it is well (rule 24)
            return FailBatch(solo.volume, solo.batch, self._owner.why_held())
        return StoreBatch(solo.volume, solo.batch, solo.report)

    def close(self, done: Callable[[], None]) -> list[Action]:
        """A clean stop: what the group may lack is stored as bits, so that they can be trusted (rule 8)."""
        owner, state = self._owner, self._owner.state
        if not owner.trusted and not state.suspended:
            return self._say(done)
        owner.unconfirmed.mark()
        for record in owner.queue:
            owner.mark_pending(record)

        def bits_saved(now_s: float) -> list[Action]:
            state.clean = True
            return [owner.save_state(lambda _: self._say(done))]

        return [SaveBits(owner.expect(bits_saved))]

    @staticmethod
    def _say(done: Callable[[], None]) -> list[Action]:
        done()
        return []

    # the group is formed anew

    def reform(self, epoch: Epoch, direction: int) -> list[Action]:
        """This primary is a source of the new group: everything the others may lack is marked; ends with `Reformed`.

        It is suspended until the resync that follows; the batch numbers begin anew with its incarnation.
        """
        owner, state = self._owner, self._owner.state
        owner.resyncing.stop()
        owner.unconfirmed.mark()
        for record in owner.queue:
            owner.mark_pending(record)
        trusted = state.trusted and (bool(state.suspended) or owner.trusted)

        def bits_saved(now_s: float) -> list[Action]:
            state.epoch, state.promised, state.direction = epoch, max(state.promised, epoch), direction
            state.suspended = state.suspended or int(Pair.PSUE)
            state.incarnation += 1
            state.detached, state.trusted, state.resync, state.checkpoint = False, trusted, 0, 0
            return [owner.save_state(stored)]

        def stored(now_s: float) -> list[Action]:
            owner.begin_anew()
            owner.resyncing.compare = True
            return [Event(f"formed anew in epoch {epoch}"), Reformed()]

        closed: list[Action] = [Close(owner.link, "the group is formed anew")] if owner.link else []
        return [*closed, SaveBits(owner.expect(bits_saved))]

    def retire(self, reason: str) -> list[Action]:
        """It becomes a target: what it has and the others lack is marked; hosts fail; ends with `Reformed`."""
        owner = self._owner
        owner.resyncing.stop()
        owner.unconfirmed.mark()
        actions: list[Action] = [Close(owner.link, reason)] if owner.link else []
        for record in owner.queue.take_all():
            owner.mark_pending(record)
            if record.batch is not None and not record.failed:
                actions.append(FailBatch(record.volume, record.batch, reason))
        actions += [FailBatch(volume, batch, reason) for volume, batch, _ in owner.locks.give_up()]
        actions += [FailBatch(solo.volume, solo.batch, reason) for solo in owner.solo.give_up() if solo.report]
        return [*actions, SaveBits(owner.expect(lambda _: [Reformed()]))]
