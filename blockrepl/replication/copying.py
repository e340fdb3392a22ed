"""A secondary between START and END: not at a number of its own, but with a way back to one (PROTOCOL, rule 20).

START(n) is stored durably, and the undo file begun, before anything above n is applied; END is stored when the images
are durable behind it, and only then the undo file goes. Two STARTs without an END between them are one copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from blockrepl.errors import ProtocolError
from blockrepl.formats.record import RecordFlag, RecordHead, RecordKind
from blockrepl.replication.actions import Action, Apply, DropUndo, Event, OpenUndo, RestoreUndo, SaveBits, SyncVolumes
from blockrepl.replication.machine import Machine

if TYPE_CHECKING:
    from blockrepl.replication.secondary import Secondary

Then = Callable[[float], list[Action]]


class Stage(Enum):
    """Where applying is."""

    PLAIN = "in order"
    BEGINNING = "beginning a copy"  # undo file and state are being stored
    COPYING = "copying"
    ENDING = "ending a copy"  # images and state are being stored
    RESTORING = "going back"


TABLE: dict[tuple[Stage, str], Stage] = {
    (Stage.PLAIN, "begin"): Stage.BEGINNING,
    (Stage.BEGINNING, "begun"): Stage.COPYING,
    (Stage.COPYING, "end"): Stage.ENDING,
    (Stage.ENDING, "ended"): Stage.PLAIN,
    (Stage.COPYING, "restore"): Stage.RESTORING,
    (Stage.RESTORING, "restored"): Stage.PLAIN,
    (Stage.COPYING, "give up"): Stage.PLAIN,  # a forced takeover in mid-copy
    (Stage.PLAIN, "reform"): Stage.COPYING,  # this node becomes a target
    (Stage.COPYING, "reform"): Stage.COPYING,
}


@dataclass(slots=True)
class Span:
    """A copy that this secondary has heard of, begun here or not."""

    start: int  # number of its START
    copy_from: int  # the number it would go back to
    initial: bool  # nothing to go back to
    end: int = 0  # number of its END, when that is held

    @property
    def before(self) -> int:
        """What may be applied before it begins."""
        return self.start - 1 if self.initial else self.copy_from


class Copying:
    """The copies of one secondary, oldest first; all but the first have not begun.

    Invariant: in COPYING and later the first span is in the state, durably; above its ``copy_from`` nothing was
    applied before that.
    """

    def __init__(self, owner: Secondary) -> None:
        self._owner = owner
        state = owner.state
        self.machine: Machine[Stage] = Machine(TABLE, Stage.COPYING if state.copying else Stage.PLAIN)
        self.spans: deque[Span] = deque()
        if state.copying:
            self.spans.append(Span(state.start, state.copy_from, state.initial))
        self._asked = state.applied  # highest number that the host was asked to apply
        self._when_settled: list[Then] = []
        self._waiting: list[tuple[int, Then]] = []  # for a number to be applied

    @property
    def stage(self) -> Stage:
        """Where applying is."""
        return self.machine.state

    @property
    def settled(self) -> bool:
        """Nothing of a copy's begin or end is in the air."""
        return self.stage in (Stage.PLAIN, Stage.COPYING)

    @property
    def busy(self) -> bool:
        """A copy just begins or ends."""
        return self.stage in (Stage.BEGINNING, Stage.ENDING)

    @property
    def newest(self) -> Span | None:
        """The copy that what is held ends in, or after."""
        return self.spans[-1] if self.spans else None

    @property
    def reach(self) -> int:
        """How far what is validated can be applied."""
        validated = self._owner.validated
        for index, span in enumerate(self.spans):
            if (index or self.stage is Stage.PLAIN) and validated < span.start:
                return min(validated, span.before)
        return validated

    @property
    def own_number(self) -> int:
        """Where this secondary is in order, or comes to be: all it holds, or what a copy goes back to.

        All it holds also behind an END: that may be valid, and the sources' bits gone. 0 where a copy has begun: then
        only the way back leads to a number.
        """
        newest = self.newest
        if newest is None or newest.end:
            return self._owner.held
        begun = self.stage is not Stage.PLAIN and len(self.spans) == 1
        return 0 if begun else newest.before

    # what is held

    def check_start(self, head: RecordHead, number: int, *, jump: bool) -> None:
        """Whether a START may be taken that goes back to ``number``. Raises ProtocolError."""
        owner, newest = self._owner, self.newest
        if owner.state.split:
            raise ProtocolError(f"START {head.first}, but {owner.name} is split: REJOIN comes first")
        if head.flags & RecordFlag.INITIAL:
            return
        if self._goes_lower(number) and max(owner.applied, self._asked) > number:
            raise ProtocolError(f"START {head.first} would go back to {number}, more is applied here")
        if newest is not None and not newest.end:
            return
        if number >= head.first or (jump and number > owner.held):
            raise ProtocolError(f"START {head.first} would go back to {number}, but only {owner.held} is held here")
        if newest is None and owner.applied > number:
            raise ProtocolError(f"START {head.first} would go back to {number}, {owner.applied} is applied here")

    def heard(self, head: RecordHead, number: int) -> None:
        """A START or END is held; ``number`` as `formats.record.control_number` gives it."""
        newest = self.newest
        if head.last <= self._owner.state.applied:  # found at start: the state says so already
            return
        if head.kind == RecordKind.END:
            if newest is not None and not newest.end:
                newest.end = head.last
            return
        if self._goes_lower(number):
            self.spans[0].copy_from = number  # not everybody got as far as that START
            while len(self.spans) > 1:
                self.spans.pop()
            self.spans[0].end = 0
            return
        if newest is not None and (not newest.end or number < newest.end):
            newest.end = 0  # one copy goes on: not everybody got as far as that END
            return
        self.spans.append(Span(head.first, number, bool(head.flags & RecordFlag.INITIAL)))

    def _goes_lower(self, number: int) -> bool:
        """Whether a START means that nobody has begun the copies held here, and all go back to less than they said."""
        first = self.spans[0] if self.spans and self.stage is Stage.PLAIN else None
        return first is not None and not first.initial and number < first.copy_from

    def cut(self, number: int) -> None:
        """What lies above ``number`` is discarded."""
        begun = 0 if self.stage is Stage.PLAIN else 1
        while len(self.spans) > begun and self.spans[-1].start > number:
            self.spans.pop()
        if self.spans and self.spans[-1].end > number:
            self.spans[-1].end = 0
        self._asked = min(self._asked, number)

    # applying

    def advance(self, now_s: float) -> list[Action]:
        """Apply what is validated, as far as the next START or END; see to those. A split stays at its number."""
        owner = self._owner
        if owner.state.split:
            return []
        if not self.spans:
            return self._apply(owner.validated, undo=False) if self.stage is Stage.PLAIN else []
        span = self.spans[0]
        if self.stage is Stage.PLAIN:
            limit = min(owner.validated, span.before)
            if owner.validated < span.start or owner.applied < limit:
                return self._apply(limit, undo=False)
            return self._begin(span)
        if self.stage is Stage.COPYING:
            if span.end and owner.applied >= span.end:
                return self._end(span)
            if not span.initial and owner.applied < span.copy_from:
                # After a power cut: what the images lack up to there is no part of the copy; no undo goes before it.
                return self._apply(span.copy_from, undo=False)
            limit = min(owner.validated, span.end) if span.end else owner.validated
            return self._apply(limit, undo=not span.initial)
        return []

    def _apply(self, number: int, *, undo: bool) -> list[Action]:
        if number <= self._asked:
            return []
        self._asked = number
        return [Apply(number, undo)]

    def resume(self, now_s: float) -> list[Action]:
        """After `HaltApply`: what the host was asked for is forgotten."""
        self._asked = self._owner.applied
        return self.advance(now_s)

    def when_settled(self, then: Then, now_s: float) -> list[Action]:
        """``then`` when nothing of a copy's begin or end is in the air any more."""
        if self.settled:
            return then(now_s)
        self._when_settled.append(then)
        return []

    def _settle(self, now_s: float) -> list[Action]:
        waiting, self._when_settled = self._when_settled, []
        actions = [action for then in waiting for action in then(now_s)]
        return actions + self.advance(now_s) + self.reached(now_s)

    def was_applied(self, now_s: float) -> list[Action]:
        """The owner's ``applied`` rose. Hot: every round comes here, mostly with nothing to do."""
        actions = self.advance(now_s) if self.spans else []
        return actions + self.reached(now_s) if self._waiting else actions

    def when_applied(self, number: int, then: Then) -> list[Action]:
        """``then`` when records up to ``number`` are applied; whoever asks calls `reached` once everything is set."""
        self._waiting.append((number, then))
        return []

    def reached(self, now_s: float) -> list[Action]:
        """Who waits for what is applied goes on, unless a copy just begins or ends."""
        if self.busy:
            return []
        applied = self._owner.applied
        ready = [then for number, then in self._waiting if number <= applied]
        self._waiting = [item for item in self._waiting if item[0] > applied]
        return [action for then in ready for action in then(now_s)]

    def _begin(self, span: Span) -> list[Action]:
        owner, state = self._owner, self._owner.state
        self.machine.go("begin")

        def stored(now_s: float) -> list[Action]:
            self.machine.go("begun")
            return [Event(f"copying: a takeover would go back to {span.copy_from}"), *self._settle(now_s)]

        def opened(_: float) -> list[Action]:
            state.copying, state.copy_from, state.initial = True, span.copy_from, span.initial
            state.start, state.end = span.start, 0
            return [owner.save(stored)]

        return opened(0.0) if span.initial else [OpenUndo(span.start, owner.later(opened))]

    def _end(self, span: Span) -> list[Action]:
        """The END is applied: images first, then the state, then the undo file and the bits go (rules 17 and 20)."""
        owner, state = self._owner, self._owner.state
        self.machine.go("end")
        number = span.end

        def synced(_: float) -> list[Action]:
            state.applied = max(state.applied, number)
            state.copying, state.initial, state.end = False, False, number
            return [owner.save(stored)]

        def stored(now_s: float) -> list[Action]:
            self.machine.go("ended")
            self.spans.popleft()
            text = f"the copy has ended: in order again from {number}"
            return [DropUndo(), *self._clear_bits(), Event(text), *self._settle(now_s)]

        return [SyncVolumes(owner.later(synced))]

    def _clear_bits(self) -> list[Action]:
        bitmaps = [bitmap for bitmap in self._owner.bitmaps.values() if bitmap.count]
        for bitmap in bitmaps:
            bitmap.clear()
        return [SaveBits(self._owner.later(lambda _: []))] if bitmaps else []

    # going back, and other ends

    def may_go_back(self, number: int) -> bool:
        """Whether ``number`` is where a copy goes back to that is under way or about to begin."""
        span = self.spans[0] if self.spans else None
        return span is not None and not span.initial and span.copy_from == number

    def restore(self, number: int, then: Then) -> list[Action]:
        """Undo all that the copy has overwritten; the state says so before ``then``. Can be repeated after a crash."""
        owner, state = self._owner, self._owner.state
        self.machine.go("restore")

        def restored(_: float) -> list[Action]:
            state.copying, state.initial, state.applied = False, False, number
            return [owner.save(stored)]

        def stored(now_s: float) -> list[Action]:
            self.machine.go("restored")
            self.spans.clear()
            owner.applied = owner.validated = self._asked = number
            return [DropUndo(), Event(f"went back to {number}"), *then(now_s), *self._settle(now_s)]

        undo = RestoreUndo(owner.later(restored))
        if owner.applied >= number:
            return [undo]
        # After a power cut the images may lack some of what was applied before the copy began.
        return [Apply(number), *self.when_applied(number, lambda _: [undo])]

    def give_up(self) -> list[Action]:
        """A forced takeover in mid-copy: the images stay as they are. The caller saves the state."""
        if self.stage is not Stage.COPYING:
            return []
        self.machine.go("give up")
        self.spans.clear()
        self._owner.state.copying = self._owner.state.initial = False
        return [DropUndo()]

    def reform(self, number: int, *, initial: bool) -> None:
        """This node holds ``number`` now, and copies from it. The caller saves the state.

        ``initial``: what it holds is no number's content, that of ``number`` neither.
        """
        state = self._owner.state
        if not (state.copying and not initial):  # else the undo file that there is leads back to ``number``
            state.start = number
        state.copying, state.copy_from, state.initial, state.end = True, 0 if initial else number, initial, 0
        self.machine.go("reform")
        self.spans.clear()
        self.spans.append(Span(state.start, state.copy_from, initial))
        self._asked = number
