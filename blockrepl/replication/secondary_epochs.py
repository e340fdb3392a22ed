"""The epochs of a secondary: promises, takeovers, and reforms, which may make it a target or keep it a source.

A promise ends the old epoch here: nothing of it is taken any more. A takeover stores its epoch with the number that all
are rolled to, then activates; a reform begins the group anew above a number (PROTOCOL, rules 20 to 25). A role that is
ACTIVE is a source: its node's primary serves hosts, and goes on while a reform collects promises.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Epoch, Message, encode
from blockrepl.formats.state import SecondaryState
from blockrepl.replication.actions import (
    Action,
    BecomeSource,
    Close,
    DropUndo,
    Event,
    Forget,
    HaltApply,
    OpenUndo,
    Publish,
    Reformed,
    Send,
    SyncJournal,
    SyncVolumes,
    Truncate,
    Withdraw,
)
from blockrepl.replication.machine import Machine

if TYPE_CHECKING:
    from blockrepl.replication.secondary import Secondary


class Phase(Enum):
    """Where a secondary is."""

    FOLLOWING = "following"  # takes records of its epoch
    PROMISED = "promised"  # a higher epoch is being opened
    STORING = "rolling forward"  # an epoch was stored; going to its number
    STORED = "stored"  # at the epoch's number, not yet writable
    ACTIVE = "taken over"
    FAILED = "failed"


TABLE: dict[tuple[Phase, str], Phase] = {
    (Phase.FOLLOWING, "promise"): Phase.PROMISED,
    (Phase.PROMISED, "promise"): Phase.PROMISED,
    (Phase.STORING, "promise"): Phase.PROMISED,
    (Phase.STORED, "promise"): Phase.PROMISED,
    (Phase.ACTIVE, "promise"): Phase.ACTIVE,  # to a reform: the primary beside it serves on
    (Phase.PROMISED, "go on"): Phase.FOLLOWING,
    (Phase.PROMISED, "store"): Phase.STORING,
    (Phase.STORING, "stored"): Phase.STORED,
    (Phase.STORED, "activate"): Phase.ACTIVE,
    (Phase.PROMISED, "become target"): Phase.FOLLOWING,
    (Phase.ACTIVE, "become target"): Phase.FOLLOWING,
    **{(phase, "fail"): Phase.FAILED for phase in Phase},
}


Discarded = tuple[int, int, int, int]
"""Writes and bytes discarded, times of the last record kept and of the newest one discarded; 0 where not known"""
NOTHING: Discarded = (0, 0, 0, 0)


class Epochs:
    """What a secondary promises and stores.

    Invariant: a state with a new epoch is durable before anybody is told of it, and in one write with what it does to
    the journal.
    """

    def __init__(self, owner: Secondary) -> None:
        self._owner = owner
        state = owner.state
        if state.active:
            start = Phase.ACTIVE
        elif state.rolling:
            start = Phase.STORING
        else:
            start = Phase.PROMISED if state.promised.number > state.epoch.number else Phase.FOLLOWING
        self.machine: Machine[Phase] = Machine(TABLE, start)
        self._link = 0  # whom STORED is told
        self._discarded = NOTHING
        self._counted = (0, 0)  # times of the last record kept and of the newest discarded
        self._truncating: dict[int, Callable[[int, int, float], list[Action]]] = {}
        self._last_kept = 0

    @property
    def phase(self) -> Phase:
        """Where it is."""
        return self.machine.state

    def fail(self) -> None:
        """Stop for good."""
        self.machine.go("fail")

    # promises

    def promise(self, link: int, fields: dict[str, Any]) -> list[Action]:
        """PROMISE: answered when the promise, and all that is held, are durable."""
        owner, state = self._owner, self._owner.state
        epoch: Epoch = fields["epoch"]
        marker: str = fields["marker"]
        bound = state.active and not fields["reform"]
        if fields["dry_run"] or bound or epoch.number <= max(state.promised.number, state.epoch.number):
            return [SyncJournal(owner.later(lambda _: [Send(link, [self._promised(marker)])]))]
        self.machine.go("promise")
        state.promised = epoch
        actions: list[Action] = []
        if owner.link and link != owner.link:
            actions.append(Close(owner.link, f"promised epoch {epoch}"))
            owner.link = 0
        owner.notes.clear()
        return [*actions, SyncJournal(owner.later(lambda _: self._save_promise(link, epoch, marker)))]

    def _save_promise(self, link: int, epoch: Epoch, marker: str) -> list[Action]:
        owner = self._owner
        owner.state.held = owner.received
        return [owner.save(lambda _: [Send(link, [self._promised(marker)])] if owner.state.promised == epoch else [])]

    def _promised(self, marker: str) -> bytes:
        owner, state = self._owner, self._owner.state
        copy = owner.copying.newest
        return encode(
            Message.PROMISED, state.epoch.number, epoch=max(state.promised, state.epoch), stored=state.epoch,
            held=owner.held, validated=owner.validated, applied=owner.applied, active=state.active,
            number=state.number, members=state.members, numbered=max(owner.numbered_seen, owner.held),
            direction=state.direction, pair=state.pair, copying=copy is not None,
            copy_from=copy.copy_from if copy else 0, initial=copy is not None and copy.initial,
            end=copy.end if copy else 0, trusted=owner.trusted(), alone=state.active and owner.alone(),
            marker=owner.markers.get(marker, 0), dirty_bytes=owner.dirty_bytes,
        )  # fmt: skip

    # stores

    def store(self, link: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """STORE. Raises ProtocolError on what no opener may ask for."""
        owner, state = self._owner, self._owner.state
        number: int = fields["number"]
        if fields["dry_run"]:
            return [self._dry_run(link, number)]
        if fields["reform"]:
            return self._reform(link, fields, now_s)
        if fields["epoch"] == state.epoch and self.phase in (Phase.STORING, Phase.STORED, Phase.ACTIVE):
            self._link = link
            return [] if self.phase is Phase.STORING else [self._stored()]
        if not self._is_ours(fields):
            return [self._would_store(link)]
        back = number < owner.validated and owner.copying.may_go_back(number)
        if fields["truncate"] and not (back or owner.validated <= number <= owner.held):
            raise ProtocolError(f"takeover at {number}: validated {owner.validated}, held {owner.held} here")
        if not fields["truncate"]:
            self._adopt(link, fields, owner.held)
            self.machine.go("go on")
            return [owner.save(lambda _: [self._stored()])]
        return self._take_over(link, fields, back=back, now_s=now_s)

    def _dry_run(self, link: int, number: int) -> Action:
        def counted(writes: int, size_bytes: int, _: float) -> list[Action]:
            return [self._would_store(link, (writes, size_bytes, *self._counted))]

        return self._truncate(number, counted, dry_run=True)

    def _is_ours(self, fields: dict[str, Any]) -> bool:
        return fields["promise"] == self._owner.state.promised and self.phase is Phase.PROMISED

    def _take_over(self, link: int, fields: dict[str, Any], *, back: bool, now_s: float) -> list[Action]:
        """Stop the hosts of a split; where it goes back, let what is in the air of a copy settle, and stop applying."""
        owner = self._owner

        def count(_: float) -> list[Action]:
            return [self._truncate(fields["number"], lambda w, b, now_s: self._roll(link, fields, w, b), dry_run=True)]

        def halt(now_s: float) -> list[Action]:
            return owner.copying.when_settled(lambda _: [HaltApply(owner.later(count))], now_s)

        then = halt if back else count
        if owner.state.split:
            return [Withdraw(owner.later(then))]
        return then(now_s)

    def _roll(self, link: int, fields: dict[str, Any], writes: int, size_bytes: int) -> list[Action]:
        owner, state = self._owner, self._owner.state
        number: int = fields["number"]
        if not self._is_ours(fields):
            return [self._would_store(link), *owner.copying.resume(0.0)]
        self._adopt(link, fields, number)
        owner.splitting.end()
        self._discarded = (writes, size_bytes, *self._counted)
        # With the epoch the note stands for "all of mine up to number".
        state.prepared = number
        # What a jump skipped is named by its START as the record before it, and is not held.
        owner.received = state.held = min(self._last_kept, number)
        owner.go_back(number)
        self.machine.go("store")
        closed: list[Action] = []
        if owner.link and owner.link != link:  # what we told the intermediate on it is no longer so
            closed.append(Close(owner.link, f"rolled to {number} by a takeover"))
            owner.link = 0
        return closed + self.roll_on()

    def _adopt(self, link: int, fields: dict[str, Any], last: int) -> None:
        state = self._owner.state
        if state.epoch.number and state.epoch != fields["epoch"]:
            state.history.append((state.epoch, last))
        state.epoch = fields["epoch"]
        state.number, state.members = fields["number"], fields["members"]
        state.rolling = fields["truncate"]
        self._link, self._discarded = link, NOTHING

    def follow(self, epoch: Epoch, number: int) -> None:
        """Active: the primary beside it works in this epoch now, from ``number`` on. The caller saves the state."""
        state = self._owner.state
        assert state.active
        if state.epoch.number:
            state.history.append((state.epoch, number))
        state.epoch, state.number, state.rolling = epoch, number, False
        state.promised = max(state.promised, epoch)

    def _truncate(
        self, number: int, then: Callable[[int, int, float], list[Action]], *, dry_run: bool = False
    ) -> Truncate:
        token = self._owner.token()
        self._truncating[token] = then
        return Truncate(number, token, dry_run)

    def truncated(
        self, token: int, writes: int, size_bytes: int, last: int, now_s: float, kept_ns: int, newest_ns: int
    ) -> list[Action]:
        """See `Secondary.truncated`."""
        self._last_kept, self._counted = last, (kept_ns, newest_ns)
        return self._truncating.pop(token)(writes, size_bytes, now_s)

    def roll_on(self) -> list[Action]:
        """Discard what lies beyond the epoch's number, apply what lies before it, make it durable, say so.

        Where the number is the one that a copy goes back to, what the copy overwrote is put back instead.
        """
        owner = self._owner
        number = owner.state.number

        def discarded(writes: int, size_bytes: int, now_s: float) -> list[Action]:
            copying = owner.copying
            copying.cut(number)
            if owner.state.copying and copying.may_go_back(number):
                return copying.restore(number, lambda _: self._settle(number))
            owner.validated = max(owner.validated, number)
            owner.copying.when_applied(number, lambda _: self._settle(number))
            return copying.resume(now_s) + owner.copying.reached(now_s)

        return [self._truncate(number, discarded)]

    def _settle(self, number: int) -> list[Action]:
        """All is applied: make the S-VOLs durable, so that nothing is ever redone over a host's new writes."""
        owner = self._owner

        def saved(_: float) -> list[Action]:
            if self.phase is not Phase.STORING:
                return []
            self.machine.go("stored")
            return [self._stored()]

        def synced(_: float) -> list[Action]:
            owner.state.applied = max(owner.state.applied, number)
            dropped = owner.copying.give_up()
            return [owner.save(lambda now_s: dropped + saved(now_s))]

        return [SyncVolumes(owner.later(synced))]

    def _stored(self) -> Send:
        return self._say_stored(self._link, self._owner.state.epoch, self._discarded)

    def _would_store(self, link: int, discarded: Discarded = NOTHING) -> Send:
        """The answer to a dry run, or to an opener without our promise: names the epoch that we stand by."""
        state = self._owner.state
        return self._say_stored(link, max(state.promised, state.epoch), discarded)

    def _say_stored(self, link: int, epoch: Epoch, discarded: Discarded) -> Send:
        owner = self._owner
        writes, size_bytes, kept_ns, newest_ns = discarded
        message = encode(
            Message.STORED, owner.state.epoch.number, epoch=epoch, applied=owner.applied, discarded_writes=writes,
            discarded_bytes=size_bytes, kept_ns=kept_ns, newest_ns=newest_ns,
        )  # fmt: skip
        return Send(link, [message])

    def activate(self, link: int, fields: dict[str, Any]) -> list[Action]:
        """ACTIVATE: hosts may use the volumes when that is durable."""
        owner, state = self._owner, self._owner.state
        answer = Send(link, [encode(Message.ACTIVATED, state.epoch.number, epoch=state.epoch)])
        if fields["epoch"] != state.epoch or self.phase not in (Phase.STORED, Phase.ACTIVE):
            return [answer] if fields["epoch"] != state.epoch else []
        if self.phase is Phase.STORED:
            self.machine.go("activate")
        state.active = True
        state.writable = fields["writable"]
        text = f"taken over in epoch {state.epoch} at number {state.number}"
        return [owner.save(lambda _: [Publish(), Event(text), answer])]

    # reforms

    def _reform(self, link: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        owner, state = self._owner, self._owner.state
        if fields["promise"] != state.promised or self.phase is Phase.FAILED:
            return [self._would_store(link)]
        if fields["epoch"] == state.epoch and not state.rolling:  # it is stored already: the opener asks again
            self._link, self._discarded = link, NOTHING
            return [SyncJournal(owner.later(lambda _: [self._stored()]))]
        if self.phase not in (Phase.PROMISED, Phase.ACTIVE):
            return [self._would_store(link)]
        if fields["source"]:
            return self._stay_source(link, fields)
        return self._become_target(link, fields, now_s)

    def _still(self, fields: dict[str, Any]) -> bool:
        return fields["promise"] == self._owner.state.promised and self.phase in (Phase.PROMISED, Phase.ACTIVE)

    def _stay_source(self, link: int, fields: dict[str, Any]) -> list[Action]:
        owner, state = self._owner, self._owner.state
        if not state.active:
            raise ProtocolError("only a source stays a source: take over first")

        def suspended(_: float) -> list[Action]:
            if not self._still(fields):
                return [self._would_store(link)]
            self._adopt(link, {**fields, "truncate": False}, state.number)
            state.direction = fields["direction"]
            return [owner.save(lambda _: [Event(f"source in epoch {state.epoch}"), self._stored()])]

        token = owner.later(suspended)
        return [BecomeSource(fields["epoch"], fields["number"], fields["direction"], token)]

    def _become_target(self, link: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """Stop the hosts; apply what is to be applied; begin the way back; forget the journal, all in one write."""
        owner, state = self._owner, self._owner.state
        number: int = fields["number"]

        def withdrawn(now_s: float) -> list[Action]:
            return owner.copying.when_settled(bring_up, now_s)

        def bring_up(now_s: float) -> list[Action]:
            """Bits of the sources may begin above what is validated here: they know that number before a target does.

            So it applies all it holds, unless a copy leads it back to the number that all come to be at.
            """
            if state.active:
                return apply(now_s)
            number = owner.held if fields["initial"] else owner.copying.own_number
            if number <= owner.validated and not state.split:
                return apply(now_s)
            owner.splitting.end()  # else nothing is applied
            owner.validated = max(owner.validated, number)
            state.prepared = max(state.prepared, number)  # the promise has made it all durable
            return [owner.save(apply)]  # so that no takeover goes back behind what is applied now

        def apply(now_s: float) -> list[Action]:
            copying = owner.copying
            copying.when_applied(
                owner.applied if state.active else copying.reach, lambda _: [SyncVolumes(owner.later(synced))]
            )
            return ([] if state.active else copying.advance(now_s)) + copying.reached(now_s)

        def synced(now_s: float) -> list[Action]:
            if _initial(state, fields) or state.copying:
                return forget(now_s)
            return [OpenUndo(number, owner.later(forget))]

        def forget(now_s: float) -> list[Action]:
            if not self._still(fields):
                return [self._would_store(link), *([Publish()] if state.active or state.split else [])]
            self._adopt(link, {**fields, "truncate": False}, number if state.active else owner.held)
            self._turn(fields, number)
            return [Forget(owner.later(forgotten))]

        def forgotten(_: float) -> list[Action]:
            text = f"target in epoch {state.epoch}, copying from {number}" + ", nothing to go back to" * state.initial
            return [*([DropUndo()] if state.initial else []), Reformed(), Event(text), self._stored()]

        if state.active or state.split:
            return [Withdraw(owner.later(withdrawn))]
        return withdrawn(now_s)

    def _turn(self, fields: dict[str, Any], number: int) -> None:
        """The state of a target that holds ``number`` and nothing else."""
        owner, state = self._owner, self._owner.state
        owner.splitting.end()
        owner.copying.reform(number, initial=_initial(state, fields))
        state.active = state.writable = state.rolling = False
        state.direction = fields["direction"]
        state.held = state.prepared = state.validated = state.applied = number
        owner.received = owner.validated = owner.applied = number
        owner.numbered_seen = number
        self.machine.go("become target")


def _initial(state: SecondaryState, fields: dict[str, Any]) -> bool:
    """Whether a target has nothing to go back to."""
    return bool(fields["initial"] or (state.copying and state.initial))
