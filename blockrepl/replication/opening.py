"""How the intermediate comes to number writes in an epoch, and how it stops (PROTOCOL, rules 22 to 25).

A started intermediate numbers nothing until every secondary confirms that the highest epoch it knows, promised ones
included, is the intermediate's. Where that is not so (the first start; a takeover that led nowhere) it opens a higher
one by the one routine: promise, agree, store, then write. A secondary that has become active fences it for good.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

from blockrepl.errors import ProtocolError
from blockrepl.formats.link import NO_EPOCH, Epoch, Message, Pair, Refusal, encode
from blockrepl.formats.state import HISTORY_MAX, REFORMS_MAX
from blockrepl.replication.actions import Action, Close, CountAbove, Counts, Event, Forget, MarkJournal, Reformed, Send
from blockrepl.replication.machine import Machine

if TYPE_CHECKING:
    from blockrepl.replication.intermediate import Intermediate


REFORM_PATIENCE_S = 10.0  # beside the back-off, before a reform that led nowhere is superseded


class Phase(Enum):
    """Where an intermediate is."""

    STARTING = "waiting for the secondaries"
    OPENING = "opening an epoch: promises"
    STORING = "opening an epoch: storing"
    SERVING = "serving"
    FROZEN = "frozen for a takeover"
    REFORMING = "being formed anew"
    FENCED = "fenced"
    FAILED = "failed"


TABLE: dict[tuple[Phase, str], Phase] = {
    (Phase.STARTING, "all agree"): Phase.SERVING,
    (Phase.STARTING, "open"): Phase.OPENING,
    (Phase.STARTING, "freeze"): Phase.FROZEN,
    (Phase.OPENING, "promised"): Phase.STORING,
    (Phase.OPENING, "freeze"): Phase.FROZEN,
    (Phase.OPENING, "start over"): Phase.STARTING,
    (Phase.STORING, "stored"): Phase.SERVING,
    (Phase.STORING, "freeze"): Phase.FROZEN,
    (Phase.STORING, "start over"): Phase.STARTING,
    (Phase.SERVING, "freeze"): Phase.FROZEN,
    (Phase.FROZEN, "freeze"): Phase.FROZEN,
    (Phase.FROZEN, "start over"): Phase.STARTING,
    (Phase.FENCED, "freeze"): Phase.FROZEN,  # the group is formed anew, on an operator's word
    (Phase.FROZEN, "reform"): Phase.REFORMING,
    (Phase.REFORMING, "freeze"): Phase.FROZEN,  # by a later opener: the earlier one may have died
    **{(phase, "fence"): Phase.FENCED for phase in Phase if phase is not Phase.FAILED},
    **{(phase, "fail"): Phase.FAILED for phase in Phase},
}


class Opening:
    """The epochs of one intermediate.

    Invariant: SERVING implies that every secondary (but those overruled by ``alone``) confirmed our epoch as the
    highest it knows, at a time when we had promised no other.
    """

    def __init__(self, owner: Intermediate, new_id: Callable[[], bytes], *, alone: bool) -> None:
        self._owner = owner
        self._new_id = new_id
        self._alone = alone
        self.machine: Machine[Phase] = Machine(TABLE, Phase.STARTING)
        self.phase = Phase.STARTING  # where we are; an attribute, since every batch asks
        self.reason = ""
        self.higher: Epoch = NO_EPOCH  # the highest epoch anybody named
        self._reports: dict[int, dict[str, Any]] = {}  # secondary → its WELCOME, with "link"
        self._answers: set[int] = set()
        self._open_at_s = 0.0
        self._certain_by_s = 0.0
        self.opener_waits = 0  # the opener's link, while it waits for the drain
        self._asked: Epoch = NO_EPOCH
        self._store: tuple[int, dict[str, Any]] | None = None  # STORE(reform) that waits: link, fields
        self._anew = False  # a reform has our promise: that a node is active is what it is about
        self.taken_over = False  # fenced: the other site works on

    @property
    def waits(self) -> bool:
        """Somebody waits for the journal or the secondaries."""
        return bool(self.opener_waits) or self._store is not None

    def _go(self, event: str) -> None:
        self.phase = self.machine.go(event)

    # secondaries report

    def greeted(self, node: int, link: int, report: dict[str, Any], now_s: float) -> list[Action]:
        """A secondary answered our HELLO."""
        owner = self._owner
        if self.phase in (Phase.FENCED, Phase.FAILED):
            return []
        told = self._knows_more(node, report)
        if told is not None:
            return told
        owner.streams.validated = max(owner.streams.validated, report["validated"])
        self._reports[node] = {**report, "link": link}
        actions = self._learn(report["epoch"], report["promised"], active=report["active"], now_s=now_s)
        if self.phase is Phase.SERVING:
            return actions + self._join(node)
        if self.phase is Phase.FROZEN and self._fits(node):
            return actions + self._join(node)  # the drain still needs it
        return actions + self._consider(now_s)

    def _knows_more(self, node: int, report: dict[str, Any]) -> list[Action] | None:
        """What comes of it that a secondary knows more than our journal; None when it does not."""
        ours, theirs = self._owner.state.epoch, report["epoch"]
        more = report["through"] > self._owner.streams.by_node[node].durable
        if more and theirs.number > ours.number > 0:
            return self._left_out(theirs)
        if self._new and theirs.number and not report["active"]:
            if not report["rolling"]:
                return self.behind(f"{self._owner.called(node)} has worked in epoch {theirs.number}")
            if report["through"] or report["prepared"]:
                text = f"a takeover in epoch {theirs.number} was begun and has not ended"
                return self.behind(text, first="blockrepl takeover, then ")
            return None  # it came before anything was replicated: a higher epoch supersedes it
        if more:
            who = self._owner.called(node)
            return self.behind(f"{who} holds number {report['through']}, which this journal does not have")
        return None

    def refused(self, node: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """A secondary refused our HELLO."""
        actions: list[Action] = [Event(f"{self._owner.called(node)} refused: {fields['text']}")]
        active = fields["code"] == Refusal.ACTIVE
        if active or fields["code"] == Refusal.EPOCH:
            actions += self._learn(fields["epoch"], fields["promised"], active=active, now_s=now_s)
        return actions

    def parted(self, node: int, link: int, now_s: float) -> list[Action]:
        """A secondary's link is gone: what it was asked on it, it may never have heard."""
        report = self._reports.get(node)
        if report is None or report["link"] != link:
            return []
        del self._reports[node]
        if self.phase in (Phase.OPENING, Phase.STORING):
            return self._start_over(now_s, f"{self._owner.called(node)} went away")
        return []

    def met(self, epoch: Epoch, now_s: float) -> list[Action]:
        """Somebody named a higher epoch: stop acknowledging, find out."""
        return self._learn(NO_EPOCH, epoch, active=False, now_s=now_s)

    def _learn(self, stored: Epoch, promised: Epoch, *, active: bool, now_s: float) -> list[Action]:
        owner = self._owner
        ours = owner.state.epoch
        if stored.number == ours.number and stored.id != ours.id and stored.number:
            return owner.fail(f"split brain: epoch {ours} here, {stored} at a secondary")
        self.higher = max(self.higher, stored, promised)
        if active and stored.number < ours.number:
            return [Event(f"a node still works in epoch {stored}, this side in {ours}: run the swap again")]
        if active and not self._anew:
            return self._fence(stored)
        if self.higher.number > max(ours.number, owner.state.promised.number) and self.phase is Phase.SERVING:
            return self._freeze(now_s, f"epoch {self.higher} was named")
        return []

    def _fence(self, epoch: Epoch) -> list[Action]:
        if self.phase in (Phase.FENCED, Phase.FAILED):
            return []
        owner = self._owner
        self._go("fence")
        self.taken_over = True
        self.reason = f"the secondary site has taken over in epoch {epoch.number}; this side is history"
        owner.state.promised = max(owner.state.promised, self.higher)
        return [
            Event(f"fenced: {self.reason}"),
            owner.save(lambda _: []),
            *owner.dismiss_primaries(Refusal.EPOCH, self.reason),
            *owner.dismiss_opener(Refusal.STATE, self.reason),  # it waits for a drain that no secondary takes any more
        ]

    def _left_out(self, epoch: Epoch) -> list[Action]:
        """A reform has reached the targets, and not us yet: the opener comes with STORE, or it died on its way."""
        if self.phase is Phase.FENCED or self.reforming:
            return []
        self._go("fence")
        self.reason = f"the group was formed anew in epoch {epoch.number} without this intermediate: do that again"
        return [Event(self.reason), *self._owner.dismiss_primaries(Refusal.STATE, self.reason)]

    @property
    def _new(self) -> bool:
        """It has never worked: its files were just made."""
        return not (self._owner.state.epoch.number or self._owner.numbered)

    def stranger(self, fields: dict[str, Any]) -> str:
        """Why a primary has worked with another intermediate than this; empty when it may have been this one.

        Every epoch that a primary stored is in the history of its intermediate, or was promised here for a reform.
        """
        state, theirs = self._owner.state, fields["epoch"]
        if not theirs.number or self.reforming or (theirs.number > state.epoch.number and not self._new):
            return ""
        known = [state.epoch, *(epoch for epoch, _ in state.history), *state.reforms]
        forgotten = len(state.history) >= HISTORY_MAX or len(state.reforms) >= REFORMS_MAX
        return "" if theirs in known or forgotten else f"primary {fields['node']} has worked in epoch {theirs}"

    @property
    def reforming(self) -> bool:
        """A reform is under way: what others know, it has come for."""
        return self._anew or self.phase is Phase.REFORMING

    def behind(self, text: str, first: str = "") -> list[Action]:
        """Others know more than our journal (rule 10): stop for good; a new, empty one waits for its `replace`."""
        owner = self._owner
        if not self._new:
            return owner.fail(text)
        if self.phase is Phase.FENCED or self.reforming:
            return []
        self._go("fence")
        self.reason = f"this intermediate is new: {text}: {first}blockrepl replace --node {owner.name}"
        return [Event(self.reason), *owner.dismiss_primaries(Refusal.STATE, self.reason)]

    def fail(self, reason: str) -> None:
        """Stop for good."""
        self._go("fail")
        self.reason = reason

    # serving

    def _fits(self, node: int) -> bool:
        report, ours = self._reports[node], self._owner.state.epoch
        return bool(ours.number and report["epoch"] == ours and report["promised"].number <= ours.number)

    def _join(self, node: int) -> list[Action]:
        """A secondary in our epoch takes its place in the streams."""
        if not self._fits(node):
            epoch = self._reports[node]["epoch"]
            return [Event(f"{self._owner.called(node)} is in epoch {epoch}, not in ours: it gets nothing")]
        streams, report = self._owner.streams, self._reports[node]
        streams.attach(node, report["link"], report["credit"], report["through"], report["prepared"])
        actions = streams.resume(streams.by_node[node])
        return actions + self._owner.pairing.secondary_joined(streams.by_node[node])

    def _consider(self, now_s: float) -> list[Action]:
        """In STARTING: serve when all agree, open an epoch when they do not."""
        owner = self._owner
        if self.phase is not Phase.STARTING:
            return []
        if any(report["active"] for report in self._reports.values()):
            return []  # one that a reform has not reached yet: nothing can be opened with it
        everybody = len(self._reports) == len(owner.streams.by_node)
        ours = owner.state.epoch
        agreed = ours.number > 0 and self.higher.number <= ours.number and owner.state.promised.number <= ours.number
        if agreed and (everybody or self._alone) and all(self._fits(node) for node in self._reports):
            self._go("all agree")
            return self._serve(now_s)
        new = [node for node, report in self._reports.items() if not report["epoch"].number and owner.numbered]
        if new:  # an epoch with it would promise what it does not have
            self.reason = f"{self._owner.called(new[0])} is new and empty: blockrepl replace"
            return []
        if everybody and now_s >= self._open_at_s:
            return self._open()
        return []

    def _serve(self, now_s: float) -> list[Action]:
        owner = self._owner
        self.reason = ""
        actions: list[Action] = [Event(f"serving in epoch {owner.state.epoch}")]
        owner.streams.restart(owner.state.epoch.number)
        for node in list(self._reports):
            actions += self._join(node)
        return actions + owner.welcome_all()

    # opening an epoch

    def _open(self) -> list[Action]:
        owner = self._owner
        self._go("open")
        number = max(self.higher.number, owner.state.epoch.number, owner.state.promised.number) + 1
        epoch = Epoch(number, self._new_id())
        owner.state.promised = self.higher = self._asked = epoch
        self._answers.clear()
        return [Event(f"opening epoch {epoch}"), owner.save(lambda _: self._ask_promises(epoch))]

    def _ask_promises(self, epoch: Epoch) -> list[Action]:
        if self.phase is not Phase.OPENING or self._asked != epoch:
            return []
        message = encode(Message.PROMISE, epoch.number, epoch=epoch, dry_run=False)
        return [Send(report["link"], [message]) for report in self._reports.values()]

    def answered(self, node: int, link: int, kind: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """PROMISED or STORED from a secondary."""
        report = self._reports.get(node)
        if report is None or report["link"] != link or self.phase not in (Phase.OPENING, Phase.STORING):
            return []
        if fields["epoch"] != self._asked:
            self.higher = max(self.higher, fields["epoch"])
            return self._start_over(now_s, f"{self._owner.called(node)} has promised epoch {fields['epoch']}")
        if kind == Message.PROMISED and self.phase is Phase.OPENING:
            self._answers.add(node)
            return self._agree() if len(self._answers) == len(self._owner.streams.by_node) else []
        if kind == Message.STORED and self.phase is Phase.STORING:
            report["epoch"] = report["promised"] = fields["epoch"]
            self._answers.add(node)
            if len(self._answers) == len(self._owner.streams.by_node):
                self._go("stored")
                return self._serve(now_s)
        return []

    def _agree(self) -> list[Action]:
        """All have promised: store the epoch here, then everywhere."""
        owner = self._owner
        self._go("promised")
        self._answers.clear()
        if owner.state.epoch.number:
            owner.state.history.append((owner.state.epoch, owner.numbered))
        owner.state.epoch = epoch = self._asked
        return [owner.save(lambda _: self._ask_to_store(epoch))]

    def _ask_to_store(self, epoch: Epoch) -> list[Action]:
        if self.phase is not Phase.STORING or self._asked != epoch:
            return []
        owner = self._owner
        message = encode(
            Message.STORE, epoch.number, promise=epoch, epoch=epoch, number=owner.numbered, truncate=False,
            members=sorted(owner.streams.by_node), dry_run=False,
        )  # fmt: skip
        return [Send(report["link"], [message]) for report in self._reports.values()]

    def _start_over(self, now_s: float, why: str) -> list[Action]:
        """Greet every secondary anew, then decide again."""
        owner = self._owner
        self._go("start over")
        self._anew = False
        self._open_at_s = now_s + owner.policy.open_backoff_s
        links = [report["link"] for report in self._reports.values()]
        self._reports.clear()
        self.opener_waits = 0
        return [Event(f"starting over: {why}"), *(Close(link, why) for link in links)]

    # a takeover freezes us

    def asked_to_promise(self, link: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """An opener wants our promise: number nothing more, drain, then say so (rule 23)."""
        owner = self._owner
        epoch: Epoch = fields["epoch"]
        known = max(owner.state.epoch.number, owner.state.promised.number, self.higher.number)
        reform = fields["reform"] and self.phase is not Phase.FAILED
        closed = self.phase in (Phase.FENCED, Phase.FAILED, Phase.REFORMING) and not reform
        if fields["dry_run"] or closed or epoch.number <= known:
            return [Send(link, [self._promised(max(owner.state.promised, owner.state.epoch, self.higher))])]
        if reform:
            return self._promise_reform(link, epoch, now_s)
        starting = self.phase is Phase.STARTING
        owner.state.promised = self.higher = epoch
        actions = self._freeze(now_s, f"a takeover opens epoch {epoch}")
        if starting:  # those that are in our epoch can still be brought up to what this journal holds
            for node in self._reports:
                actions += self._join(node)
        return [*actions, owner.save(lambda now_s: self._promise_is_durable(link, epoch, now_s))]

    def _promise_reform(self, link: int, epoch: Epoch, now_s: float) -> list[Action]:
        """For a swap or a replacement: nothing is drained, a resync follows anyway."""
        owner = self._owner
        owner.state.promised = self.higher = epoch
        owner.state.reforms.append(epoch)
        self._anew = True
        actions = self._freeze(now_s, f"the group is formed anew in epoch {epoch}")
        self._open_at_s += REFORM_PATIENCE_S
        actions += owner.dismiss_primaries(Refusal.EPOCH, self.reason)

        def promised(now_s: float) -> list[Action]:
            return [Send(link, [self._promised(epoch)])] if owner.state.promised == epoch else []

        return [*actions, owner.save(promised)]

    def asked_to_store(self, link: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """STORE(reform): turn what the journal knows into bits, forget it, begin anew above the number (rule 25)."""
        owner = self._owner
        if fields["dry_run"]:
            return [CountAbove(fields["number"], owner.expect_counts(lambda counts: self._counted(link, counts)))]
        if not fields["reform"]:
            raise ProtocolError("STORE without reform does not belong on an intermediate's link")
        if fields["epoch"] == owner.state.epoch:
            return [Send(link, [self._stored()])]
        if fields["promise"] != owner.state.promised or self.phase is not Phase.FROZEN:
            return [Send(link, [self._not_stored(fields["epoch"])])]
        if fields["number"] < owner.numbered:
            raise ProtocolError(f"STORE at {fields['number']}, but {owner.numbered} was given here")
        self._store = link, fields
        return self._reform()

    def _reform(self) -> list[Action]:
        """Once the journal is durable: bits, then the new state, then the answer."""
        owner = self._owner
        if self._store is None or owner.durable_number < owner.numbered:
            return []
        (link, fields), self._store = self._store, None
        self._go("reform")
        pairing, state = owner.pairing, owner.state
        for volume in fields["full"]:
            if volume in pairing.bitmaps:
                pairing.bitmaps[volume].fill()

        def forgotten(now_s: float) -> list[Action]:
            return [Event(f"formed anew in epoch {state.epoch}"), Send(link, [self._stored()]), Reformed()]

        def marked(now_s: float) -> list[Action]:
            if state.promised != fields["promise"] or self.phase is not Phase.REFORMING:
                return []
            if state.epoch.number:
                state.history.append((state.epoch, owner.numbered))
            else:  # new: what the group had before it is not in its volumes
                state.filled = False
            state.filling = False
            state.epoch, state.direction = fields["epoch"], fields["direction"]
            state.pair, state.numbering, state.limited, state.auto = int(Pair.PSUE), False, False, True
            state.at = state.validated = fields["number"]
            state.start, state.end, state.resynced = 0, 0, 0
            state.verify, state.initial = fields["verify"], fields["initial"]
            state.excluded = []
            owner.begin_anew(fields["number"], fields["members"])
            return [Forget(owner.expect(forgotten))]

        kept = state.limited or state.start > 0  # what is validated may be undone, or was never sent
        after = min(pairing.marked, owner.streams.validated) if kept else owner.streams.validated
        checkpoints = {sender.node: sender.checkpoint for sender in owner.senders.by_node.values()}
        return [MarkJournal(after, owner.numbered, checkpoints, owner.expect(marked))]

    def _not_stored(self, asked: Epoch) -> bytes:
        """Names the epoch that we stand by, which is never the one asked for."""
        state = self._owner.state
        return self._stored(state.promised if state.promised != asked else state.epoch)

    def _stored(self, epoch: Epoch | None = None) -> bytes:
        owner = self._owner
        return encode(
            Message.STORED, owner.state.epoch.number, epoch=epoch or owner.state.epoch, applied=0,
            discarded_writes=0, discarded_bytes=0,
        )  # fmt: skip

    def _counted(self, link: int, counts: Counts) -> list[Action]:
        """What a takeover that leaves off at a number would give up, for its report."""
        owner = self._owner
        message = encode(
            Message.STORED, owner.state.epoch.number, epoch=owner.state.epoch, applied=0,
            discarded_writes=counts.writes, discarded_bytes=counts.size_bytes, kept_ns=counts.kept_ns,
            newest_ns=counts.newest_ns, whole=counts.whole,
        )  # fmt: skip
        return [Send(link, [message])]

    def _freeze(self, now_s: float, why: str) -> list[Action]:
        self._go("freeze")
        self.reason = why
        policy = self._owner.policy
        self._open_at_s = now_s + policy.open_backoff_s
        self._certain_by_s = now_s + min(policy.lease_s, policy.open_backoff_s / 2)
        return [Event(f"frozen: {why}")]

    def _promise_is_durable(self, link: int, epoch: Epoch, now_s: float) -> list[Action]:
        if self._owner.state.promised == epoch and self.phase is Phase.FROZEN:
            self.opener_waits = link
        return self.drained(now_s)

    def drained(self, now_s: float) -> list[Action]:
        """Answer the opener once everything numbered is durable and validated at all secondaries."""
        owner = self._owner
        if self._store is not None:
            return self._reform()
        if not self.opener_waits or self.phase is not Phase.FROZEN or owner.durable_number < owner.numbered:
            return []
        # Suspended, or between START and END, there is nothing to drain to: the secondaries stay where they are.
        if not owner.pairing.undrainable and not owner.streams.drained(owner.numbered):
            return []
        if owner.uncertain and now_s < self._certain_by_s:  # one that was sent away just now is heard of again soon
            return []
        link, self.opener_waits = self.opener_waits, 0
        self._open_at_s = now_s + owner.policy.open_backoff_s
        return [Send(link, [self._promised(owner.state.promised)])]

    def _promised(self, epoch: Epoch) -> bytes:
        owner = self._owner
        return encode(
            Message.PROMISED, owner.state.epoch.number, epoch=epoch, stored=owner.state.epoch, held=owner.numbered,
            validated=owner.streams.validated, applied=0, active=False, number=0, members=[],
            numbered=owner.numbered, direction=owner.state.direction, pair=owner.pairing.shown,
            dirty_bytes=owner.pairing.out_of_sync_bytes(), alone=bool(owner.uncertain),
        )  # fmt: skip

    def tick(self, now_s: float) -> list[Action]:
        """After the back-off, a promise that led nowhere is superseded: a failed attempt must not stop production."""
        if self.phase is Phase.FROZEN and now_s >= self._open_at_s:
            return self._start_over(now_s - self._owner.policy.open_backoff_s, "the takeover led nowhere")
        if self.phase is Phase.FROZEN and self.opener_waits:
            return self.drained(now_s)
        return self._consider(now_s)
