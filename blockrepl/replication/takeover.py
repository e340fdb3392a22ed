"""The opener of a takeover: brings all secondaries to one number, under a new epoch, and makes them writable.

It runs on a secondary's node, on an operator's word only (PROTOCOL, rules 22 to 24). Peers are every secondary (its own
node too, over a link like the others) and the intermediate. Steps: greet all; with the intermediate reachable, freeze
and drain it; have every secondary promise the new epoch durably; choose the highest number that all hold; store it
everywhere; activate. Each step can be repeated: a second takeover finishes what a first one left.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from blockrepl.formats.link import NO_EPOCH, Epoch, LinkRole, Message, Pair, encode
from blockrepl.replication.actions import Action, Event
from blockrepl.replication.calling import Calls
from blockrepl.replication.machine import Machine
from blockrepl.replication.takeover_report import Report, between, reaches, why_not_at_marker


class Phase(Enum):
    """Where a takeover is."""

    GREETING = "greeting"
    DRAINING = "draining the intermediate"
    PROMISING = "collecting promises"
    STORING = "rolling forward"
    ACTIVATING = "activating"
    DONE = "done"
    FAILED = "failed"


TABLE: dict[tuple[Phase, str], Phase] = {
    (Phase.GREETING, "drain"): Phase.DRAINING,
    (Phase.GREETING, "promise"): Phase.PROMISING,
    (Phase.DRAINING, "promise"): Phase.PROMISING,
    (Phase.DRAINING, "higher"): Phase.DRAINING,
    (Phase.PROMISING, "higher"): Phase.PROMISING,
    (Phase.PROMISING, "drain again"): Phase.DRAINING,
    (Phase.PROMISING, "store"): Phase.STORING,
    (Phase.STORING, "activate"): Phase.ACTIVATING,
    (Phase.STORING, "counted"): Phase.DONE,  # dry run
    (Phase.ACTIVATING, "activated"): Phase.DONE,
    **{(phase, "fail"): Phase.FAILED for phase in Phase},
}
OPEN = frozenset({Phase.GREETING, Phase.DRAINING, Phase.PROMISING, Phase.STORING, Phase.ACTIVATING})
PLANNED_HINT = "see: blockrepl status; to take over all the same: blockrepl takeover --dry-run says what that loses"
MAX_TRIES = 5  # at a number above everybody's


class Takeover:
    """One run of the opener.

    Invariant: nothing is stored before every member promised; nobody is activated before every member stored.
    """

    def __init__(
        self,
        *,
        group: bytes,
        node: int,
        name: str,
        intermediate: int,
        secondaries: list[int],
        names: dict[int, str],
        new_id: Callable[[], bytes],
        now_s: float,
        dry_run: bool = False,
        force: bool = False,
        writable: bool = True,
        marker: str = "",
        fence_never: bool = False,
        planned: bool = False,
        patience_s: float = 15.0,
    ) -> None:
        """``planned``: the beginning of a swap, which loses nothing or is not done."""
        self.calls = Calls(group, node, name, LinkRole.OPENER, [intermediate, *secondaries])
        self.intermediate = intermediate
        self.secondaries = secondaries
        self.names = names
        self.machine: Machine[Phase] = Machine(TABLE, Phase.GREETING)
        self.report = Report(dry_run=dry_run)
        self.problem = ""
        self.hint = ""
        self._new_id = new_id
        self._force = force
        self._writable = writable
        self._marker = marker
        self._fence_never = fence_never
        self._planned = planned
        self._patience_s = patience_s
        self._deadline_s = now_s + patience_s
        self._answers: dict[int, dict[str, Any]] = {}
        self._epoch: Epoch = NO_EPOCH  # our authority
        self._store_epoch: Epoch = NO_EPOCH  # what is stored: ours, or the one of a takeover to be finished
        self._tries = 0
        self._intermediate: dict[str, Any] = {}  # its PROMISED
        self._ignorant = False  # it answers, and knows nothing of what the secondaries hold
        self._kept_ns = self._newest_ns = 0
        self._counting = False  # the intermediate was asked what is lost, and has not answered

    @property
    def phase(self) -> Phase:
        """Where it is."""
        return self.machine.state

    @property
    def open(self) -> bool:
        """It has not ended."""
        return self.machine.state in OPEN

    @property
    def peers(self) -> list[int]:
        """The host dials these, and says `unreachable` of those that fail."""
        return self.calls.peers

    # peers

    def connected(self, link: int, node: int, nonce: bytes) -> list[Action]:
        """A connection to a peer is up: greet."""
        return self.calls.connected(link, node, nonce)

    def unreachable(self, node: int, why: str, now_s: float) -> list[Action]:
        """A peer does not answer."""
        if self.phase not in OPEN or not self.calls.fell_silent(node, why):
            return []
        if self.phase is Phase.GREETING:
            return self._greeted(now_s)
        if node == self.intermediate:
            if self.phase is Phase.DRAINING and self._planned:
                return self._fail("a swap loses nothing, but the intermediate went away", PLANNED_HINT)
            if self.phase is Phase.DRAINING:
                return [self._without("it went away while draining"), *self._promise("promise", now_s)]
            return self._counted(None) if self._counting else []
        return self._fail(f"{self.names[node]} went away ({why})", "run takeover again")

    def lost(self, link: int, now_s: float) -> list[Action]:
        """A link is gone."""
        node = self.calls.links.pop(link, None)
        return [] if node is None else self.unreachable(node, "the link broke", now_s)

    def _members(self) -> list[int]:
        return [node for node in self.secondaries if node in self.calls.welcomes]

    def received(self, link: int, kind: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        """A message of a peer."""
        node = self.calls.links.get(link)
        if node is None or self.phase not in OPEN:
            return []
        if kind == Message.WELCOME:
            self.calls.welcomes[node] = fields
            return self._greeted(now_s) if self.phase is Phase.GREETING else []
        if kind == Message.REFUSED:
            return self.unreachable(node, f"refused: {fields['text']}", now_s)
        if kind == Message.PROMISED:
            return self._promised(node, fields, now_s)
        if kind == Message.STORED and self.phase is Phase.STORING:
            return self._stored(node, fields)
        if kind == Message.ACTIVATED and self.phase is Phase.ACTIVATING:
            return self._activated(node, fields)
        return []

    # steps

    def _greeted(self, now_s: float) -> list[Action]:
        if not self.calls.complete:
            return []
        missing = [node for node in self.secondaries if node in self.calls.silent]
        self.report.missing = missing
        if missing and not self._force:
            who = ", ".join(f"{self.names[node]} ({self.calls.silent[node]})" for node in missing)
            return self._fail(f"a secondary is silent: {who}", "start it, or `takeover --force` to go without it")
        if not self._members():
            return self._fail("no secondary answers", "start the secondaries with `blockrepl up`")
        self._epoch = Epoch(self.calls.highest_epoch + 1, self._new_id())
        self._deadline_s = now_s + self._patience_s
        if self._marker:  # what a drain brings is beyond it
            return [Event(f"to the marker {self._marker}, without a drain"), *self._promise("promise", now_s)]
        if self.intermediate in self.calls.welcomes:
            self.machine.go("drain")
            text = "asking the intermediate" if self.report.dry_run else "freezing and draining the intermediate"
            return [Event(text), *self._ask_promise([self.intermediate])]
        if self._planned:
            return self._fail("a swap loses nothing, but the intermediate does not answer", PLANNED_HINT)
        self.report.alone = self._fence_never
        return [self._without(self.calls.silent[self.intermediate]), *self._promise("promise", now_s)]

    def _without(self, why: str) -> Action:
        self.report.without = why
        return Event(f"without the intermediate ({why})")

    def _ask_promise(self, nodes: list[int]) -> list[Action]:
        message = encode(Message.PROMISE, 0, epoch=self._epoch, dry_run=self.report.dry_run, marker=self._marker)
        return self.calls.send(nodes, message)

    def _promise(self, event: str, now_s: float) -> list[Action]:
        self.machine.go(event)
        self._answers.clear()
        self._deadline_s = now_s + self._patience_s
        return [Event("collecting the secondaries' promises"), *self._ask_promise(self._members())]

    def _promised(self, node: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        if node == self.intermediate:
            if self.phase is not Phase.DRAINING:
                return []
            if fields["epoch"] != self._epoch and not self.report.dry_run:
                return self._higher(fields["epoch"], [node], now_s)
            told = self._drained(fields)
            if self._planned and not self.report.drained:
                return self._fail(f"a swap loses nothing, but {told}", PLANNED_HINT)
            return [Event(told), *self._promise("promise", now_s)]
        binding = not (self.report.dry_run or fields["active"])
        late = binding and fields["epoch"].number < self._epoch.number  # an answer to an epoch that we gave up
        if self.phase is not Phase.PROMISING or late:
            return []
        if binding and fields["epoch"] != self._epoch:
            return self._higher(fields["epoch"], self._members(), now_s)
        self._answers[node] = fields
        return self._agree(now_s) if len(self._answers) == len(self._members()) else []

    def _drained(self, fields: dict[str, Any]) -> str:
        """The intermediate has promised: whether the secondaries have, or would have, all that was acknowledged."""
        if not self._knows(fields["stored"]):
            self._ignorant, self.report.alone = True, self._fence_never
            return "the intermediate has not numbered what the secondaries hold: it cannot say what would be lost"
        self._intermediate = fields
        report, pair = self.report, Pair(fields["pair"])
        whole = report.dry_run or fields["validated"] >= fields["held"]
        report.drained = whole and pair in (Pair.PAIR, Pair.PFUL, Pair.COPY)
        report.out_of_sync_bytes = fields["dirty_bytes"]
        report.alone = fields["alone"] or pair is Pair.PSUE
        if not report.drained:
            return f"the intermediate is frozen at {fields['held']}, but the pair is in {pair.name}"
        return f"the intermediate {'would be' if report.dry_run else 'is'} drained at {fields['held']}"

    def _knows(self, stored: Epoch) -> bool:
        """Whether it works in the secondaries' epoch: a new one does not, nor one that a reform has not reached yet.

        A takeover's epoch is none of its: a secondary that stored one had followed it until then.
        """
        worked = [self.calls.welcomes[node] for node in self._members() if self.calls.welcomes[node]["epoch"].number]
        followed = max((each["epoch"].number for each in worked if not each["rolling"]), default=min(1, len(worked)))
        return stored.number >= followed

    def _higher(self, epoch: Epoch, nodes: list[int], now_s: float) -> list[Action]:
        self._tries += 1
        if self._tries > MAX_TRIES:
            return self._fail("others keep opening epochs", "is another takeover running? then wait for it")
        self._answers.clear()
        self._epoch = Epoch(max(epoch.number, self._epoch.number) + 1, self._new_id())
        told = Event(f"epoch {epoch.number} was promised already")
        if self.phase is Phase.PROMISING and self._intermediate and not self.report.dry_run:
            # Then the intermediate has gone on meanwhile, and what it was drained of is not all any more.
            self.report.drained = False
            if self.intermediate in self.calls.links.values():
                self.machine.go("drain again")
                self._deadline_s = now_s + self._patience_s
                return [told, *self._ask_promise([self.intermediate])]
        self.machine.go("higher")
        return [told, *self._ask_promise(nodes)]

    def _agree(self, now_s: float) -> list[Action]:
        """All members promised: the highest number that every one of them holds whole."""
        answers = self._answers
        active = [answer for answer in answers.values() if answer["active"]]
        if active:
            problem = self._adopt(active)
            if problem:
                return self._fail(problem, "split brain: decide which side's data is to stay")
        else:
            self._store_epoch = self._epoch
            self.report.members = sorted(answers)
            if refusal := self._choose():
                return self._fail(*refusal)
            if self._planned and not self.report.drained:
                return self._fail("a swap loses nothing, but a copy has not ended", PLANNED_HINT)
        report = self.report
        report.epoch, report.epoch_id = self._store_epoch.number, self._store_epoch.id.hex()
        self.machine.go("store")
        self._deadline_s = now_s + self._patience_s * 4
        # Those that have stored it already too: they promised us since, and must come to its number again.
        targets = [node for node, answer in answers.items() if not answer["active"]]
        if report.dry_run and report.drained:  # a real one would bring them all up to what the intermediate holds
            targets = []
        self._answers = {node: answer for node, answer in answers.items() if node not in targets}
        actions = self._count_lost()
        if not targets and not self._counting:
            return self._activate()
        told = [Event(f"rolling all secondaries to {report.number}")] if targets else []
        return [*told, *actions, *self.calls.send(targets, self._store_message(dry_run=report.dry_run))]

    def _store_message(self, *, dry_run: bool) -> bytes:
        report = self.report
        return encode(
            Message.STORE, 0, promise=self._epoch, epoch=self._store_epoch, number=report.number, truncate=True,
            members=report.members, dry_run=dry_run,
        )  # fmt: skip

    def _count_lost(self) -> list[Action]:
        """Have the intermediate count in its journal what is given up: it alone has all of it."""
        if not self.report.lost_writes or self._ignorant or self.intermediate not in self.calls.links.values():
            return []
        self._counting = True
        return self.calls.send([self.intermediate], self._store_message(dry_run=True))

    def _counted(self, fields: dict[str, Any] | None) -> list[Action]:
        """… or it fell silent: then the report has what the secondaries know."""
        self._counting = False
        report = self.report
        if fields is not None and fields["whole"]:
            report.counted = True
            report.lost_writes, report.lost_bytes = fields["discarded_writes"], fields["discarded_bytes"]
        if fields is not None:
            self._hear_times(fields)
        return self._stored_by_all()

    def _hear_times(self, fields: dict[str, Any]) -> None:
        self._kept_ns = max(self._kept_ns, fields["kept_ns"])
        self._newest_ns = max(self._newest_ns, fields["newest_ns"])

    def _stored_by_all(self) -> list[Action]:
        return self._activate() if len(self._answers) == len(self._members()) and not self._counting else []

    def _choose(self) -> tuple[str, str] | None:
        """The number, and what it costs. Returns why there is none, and what to do about it.

        It is what every member holds whole. Where somebody would be between START and END at it, it is the number that
        the copy goes back to, for all: a member before its START has not applied anything above that either.
        """
        report, answers = self.report, self._answers
        number = min(answer["held"] for answer in answers.values())
        if self._marker:
            named = {self.names[node]: answer for node, answer in answers.items()}
            if why := why_not_at_marker(self._marker, named):
                return why, "`takeover` without --to-marker goes to the highest number that all hold"
            number = next(iter(answers.values()))["marker"]
        if report.dry_run and report.drained:
            number = max(number, self._intermediate["held"])
        inside = [answer for answer in answers.values() if between(answer, number)]
        report.pair = Pair((self._intermediate or next(iter(answers.values())))["pair"]).name
        report.split_bytes = sum(answer["dirty_bytes"] for answer in answers.values())
        report.copying, report.initial = bool(inside), any(answer["initial"] for answer in inside)
        if report.initial and not (self._force or report.dry_run):
            return (
                "an initial copy has not ended: the secondaries are at no number, there is nothing to go back to",
                "`pair wait -s PAIR` while the primary site lives; `takeover --force` takes the images as they are",
            )
        if inside and self._marker:
            who = ", ".join(self.names[node] for node, answer in answers.items() if answer in inside)
            return (
                f'at the marker "{self._marker}" ({number}) {who} would be in the middle of a copy',
                "`takeover` without --to-marker goes back to where the copy began",
            )
        if inside and not report.initial:
            report.rolled_back_from = number
            number = min(answer["copy_from"] for answer in inside)
        report.drained = report.drained and not inside
        report.number = number
        if not report.drained:
            numbered = [answer["numbered"] for answer in answers.values()]
            report.lost_writes = max(0, max([*numbered, self._intermediate.get("held", 0)]) - number)
        beyond = [self.names[node] for node, answer in answers.items() if not reaches(answer, number)]
        if beyond:
            who = ", ".join(beyond)
            return (
                f"{who} cannot go back to {number}, to which the others must",
                "start the secondaries that are missing, or take over without those: `takeover --force` there",
            )
        return None

    def _adopt(self, active: list[dict[str, Any]]) -> str:
        """Some secondary is active: finish that takeover, with its epoch and number."""
        epochs = {answer["stored"] for answer in active}
        if len(epochs) > 1:
            return f"secondaries have taken over in different epochs: {', '.join(map(str, sorted(epochs)))}"
        members = sorted(active[0]["members"])
        strangers = [self.names[node] for node in self._answers if node not in members]
        if strangers:
            return f"{', '.join(strangers)} was not part of the takeover in epoch {active[0]['stored']}"
        self._store_epoch = active[0]["stored"]
        self.report.number, self.report.members, self.report.completed = active[0]["number"], members, True
        return ""

    def _stored(self, node: int, fields: dict[str, Any]) -> list[Action]:
        report = self.report
        if node == self.intermediate:
            return self._counted(fields) if self._counting else []
        if fields["epoch"] != self._store_epoch and not report.dry_run:
            text = f"{self.names[node]} has promised epoch {fields['epoch'].number} meanwhile"
            return self._fail(text, "the intermediate may be alive and have gone on: look at status, then try again")
        report.discarded_writes += fields["discarded_writes"]
        report.discarded_bytes += fields["discarded_bytes"]
        self._hear_times(fields)
        self._answers[node] = fields
        return self._stored_by_all()

    def _activate(self) -> list[Action]:
        self._answers.clear()
        if not self.report.counted:
            self.report.lost_bytes = self.report.discarded_bytes
        if not self.report.lost_writes:
            self.report.lost_s = 0.0
        elif self._kept_ns and self._newest_ns:
            self.report.lost_s = max(0, self._newest_ns - self._kept_ns) / 1e9
        if self.report.dry_run:
            self.machine.go("counted")
            return self.calls.hang_up("dry run")
        self.machine.go("activate")
        message = encode(Message.ACTIVATE, 0, epoch=self._store_epoch, writable=self._writable)
        return [Event("activating"), *self.calls.send(self._members(), message)]

    def _activated(self, node: int, fields: dict[str, Any]) -> list[Action]:
        if fields["epoch"] != self._store_epoch:
            return self._fail(f"{self.names[node]} went on to epoch {fields['epoch'].number}", "run takeover again")
        self._answers[node] = fields
        if len(self._answers) < len(self._members()):
            return []
        self.machine.go("activated")
        return [Event(f"epoch {self._store_epoch} is open at {self.report.number}"), *self.calls.hang_up("done")]

    def _fail(self, problem: str, hint: str) -> list[Action]:
        self.machine.go("fail")
        self.problem, self.hint = problem, hint
        return [Event(f"takeover failed: {problem}"), *self.calls.hang_up(problem)]

    def tick(self, now_s: float) -> list[Action]:
        """A step that takes too long fails, or goes on without the silent ones where that is allowed."""
        if self.phase not in OPEN or now_s < self._deadline_s:
            return []
        if self.phase is Phase.GREETING:
            actions: list[Action] = []
            for node in self.peers:
                if node not in self.calls.welcomes:
                    actions += self.unreachable(node, "no answer", now_s)
            return actions
        if self.phase is Phase.DRAINING:
            if self._force:
                return [Event("the intermediate cannot drain; forced"), *self._promise("promise", now_s)]
            text = "the intermediate is alive but cannot bring all secondaries up to date in time"
            return self._fail(text, "see `status`; `takeover --force` gives up what is not at all secondaries")
        waiting = [self.names[node] for node in self._members() if node not in self._answers]
        if self._counting and not waiting:
            return [Event("the intermediate does not say what is lost"), *self._counted(None)]
        return self._fail(f"no answer from {', '.join(waiting)} while {self.phase.value}", "run takeover again")
