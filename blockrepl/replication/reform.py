"""The opener of a reform: makes one side the sources and the other the targets of a group that begins anew.

It runs at a source, on an operator's word: for a swap (after a takeover the other site becomes the copy) and when a
node was replaced by an empty one. Steps: greet everybody; have everybody promise a new epoch; decide
(`reform_plan.plan`); have sources and targets store it, then the intermediate, which forgets its journal last. Each
step can be repeated, by a new run with a higher epoch (PROTOCOL, rules 22, 25). The resync follows by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from blockrepl.formats.link import NO_EPOCH, Epoch, LinkRole, Message, encode
from blockrepl.replication.actions import Action, Event
from blockrepl.replication.calling import Calls
from blockrepl.replication.machine import Machine
from blockrepl.replication.reform_plan import Plan, Question, Refused, plan


class Phase(Enum):
    """Where a reform is."""

    GREETING = "greeting"
    PROMISING = "collecting promises"
    STORING = "storing at sources and targets"
    CLOSING = "storing at the intermediate"
    DONE = "done"
    FAILED = "failed"


TABLE: dict[tuple[Phase, str], Phase] = {
    (Phase.GREETING, "promise"): Phase.PROMISING,
    (Phase.PROMISING, "higher"): Phase.PROMISING,
    (Phase.PROMISING, "store"): Phase.STORING,
    (Phase.PROMISING, "counted"): Phase.DONE,  # dry run
    (Phase.STORING, "stored"): Phase.CLOSING,
    (Phase.CLOSING, "stored"): Phase.DONE,
    **{(phase, "fail"): Phase.FAILED for phase in Phase},
}
OPEN = frozenset({Phase.GREETING, Phase.PROMISING, Phase.STORING, Phase.CLOSING})
MAX_TRIES = 5  # at a number above everybody's


class Reform:
    """One run of the opener.

    Invariant: nothing is stored before everybody promised; the intermediate forgets nothing before every source has
    stored its bits and every target has stopped its hosts.
    """

    def __init__(
        self,
        *,
        group: bytes,
        node: int,
        name: str,
        intermediate: int,
        question: Question,
        new_id: Callable[[], bytes],
        now_s: float,
        dry_run: bool = False,
        patience_s: float = 15.0,
    ) -> None:
        """``question``: who is to be source and target; see `reform_plan`."""
        data = [*question.sources, *question.targets]
        self.calls = Calls(group, node, name, LinkRole.REFORMER, [intermediate, *data])
        self.intermediate = intermediate
        self.question = question
        self.machine: Machine[Phase] = Machine(TABLE, Phase.GREETING)
        self.plan = Plan()
        self.epoch: Epoch = NO_EPOCH
        self.problem = ""
        self.hint = ""
        self._data = data
        self._new_id = new_id
        self._dry_run = dry_run
        self._patience_s = patience_s
        self._deadline_s = now_s + patience_s
        self._answers: dict[int, dict[str, Any]] = {}
        self._stored: set[int] = set()
        self._tries = 0

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
        return self._fail(f"{self.question.names[node]} went away ({why})", "start it, then run this again")

    def lost(self, link: int, now_s: float) -> list[Action]:
        """A link is gone."""
        node = self.calls.links.pop(link, None)
        return [] if node is None else self.unreachable(node, "the link broke", now_s)

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
        if kind == Message.PROMISED and self.phase is Phase.PROMISING:
            return self._promised(node, fields, now_s)
        if kind == Message.STORED and self.phase in (Phase.STORING, Phase.CLOSING):
            return self._was_stored(node, fields, now_s)
        return []

    # steps

    def _greeted(self, now_s: float) -> list[Action]:
        if not self.calls.complete:
            return []
        silent = self.calls.silent
        if silent:
            names = self.question.names
            who = ", ".join(f"{names[node]} ({why})" for node, why in sorted(silent.items()))
            up = names[min(silent)]
            return self._fail(
                f"every node is needed, silent: {who}",
                f"start it: blockrepl up --node {up}; one that is lost: blockrepl replace --node {up}",
            )
        if lacking := self._not_recovered():
            who = ", ".join(self.question.names[node] for node in lacking)
            return self._fail(
                f"{who} has not read back yet what its volumes lack: the intermediate would forget it",
                f"wait until {who} serves: blockrepl status; --force takes the volumes as they are",
            )
        self.epoch = Epoch(self.calls.highest_epoch + 1, self._new_id())
        self.machine.go("promise")
        return self._ask_promises(now_s)

    def _not_recovered(self) -> list[int]:
        """Sources that wait for their own records, which the intermediate has: asked before anything is promised.

        A new intermediate has none; then the volumes are what there is (rule 8).
        """
        if self.question.force or not self.calls.welcomes[self.intermediate]["epoch"].number:
            return []
        return [node for node in self.question.sources if not self.calls.welcomes[node]["recovered"]]

    def _ask_promises(self, now_s: float) -> list[Action]:
        self._deadline_s = now_s + self._patience_s
        self._answers.clear()
        message = encode(Message.PROMISE, 0, epoch=self.epoch, dry_run=self._dry_run, reform=True)
        return [Event("collecting promises of all nodes"), *self.calls.send(self.peers, message)]

    def _promised(self, node: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        if not self._dry_run and fields["epoch"] != self.epoch:
            if fields["epoch"].number < self.epoch.number:
                return []  # an answer to an epoch that was given up
            return self._higher(fields["epoch"], now_s)
        self._answers[node] = fields
        return self._decide(now_s) if len(self._answers) == len(self.peers) else []

    def _higher(self, epoch: Epoch, now_s: float) -> list[Action]:
        self._tries += 1
        if self._tries > MAX_TRIES:
            return self._fail("others keep opening epochs", "is a takeover or another swap running? wait for it")
        self.epoch = Epoch(epoch.number + 1, self._new_id())
        self.machine.go("higher")
        return [Event(f"epoch {epoch.number} was promised already"), *self._ask_promises(now_s)]

    def _decide(self, now_s: float) -> list[Action]:
        """All have promised: what is to be done?"""
        data = {node: answer for node, answer in self._answers.items() if node != self.intermediate}
        made = plan(self.question, data, self._answers[self.intermediate])
        if isinstance(made, Refused):
            return self._fail(made.problem, made.hint)
        self.plan = made
        if self._dry_run:
            self.machine.go("counted")
            return self.calls.hang_up("dry run")
        self.machine.go("store")
        self._deadline_s = now_s + self._patience_s * 4
        actions: list[Action] = [Event(text) for text in made.reasons]
        for nodes, source in ((self.question.sources, True), (self.question.targets, False)):
            actions += self.calls.send(nodes, self._store(source=source))
        return [*actions, Event(f"forming the group anew in epoch {self.epoch}, above {made.number}")]

    def _store(self, *, source: bool) -> bytes:
        made = self.plan
        return encode(
            Message.STORE, 0, promise=self.epoch, epoch=self.epoch, number=made.number, truncate=False,
            members=sorted(self.question.targets), dry_run=False, reform=True, direction=made.direction, source=source,
            initial=made.initial, full=made.full, verify=made.verify,
        )  # fmt: skip

    def _was_stored(self, node: int, fields: dict[str, Any], now_s: float) -> list[Action]:
        if fields["epoch"] != self.epoch:
            text = f"{self.question.names[node]} has promised epoch {fields['epoch'].number} meanwhile"
            return self._fail(text, "run this again: it opens a higher epoch")
        self._stored.add(node)
        if self.phase is Phase.STORING and self._stored >= set(self._data):
            self.machine.go("stored")
            self._deadline_s = now_s + self._patience_s * 4
            text = "the intermediate turns its journal into bits and begins anew"
            return [Event(text), *self.calls.send([self.intermediate], self._store(source=False))]
        if self.phase is Phase.CLOSING and self.intermediate in self._stored:
            self.machine.go("stored")
            return [Event(f"epoch {self.epoch} is open"), *self.calls.hang_up("done")]
        return []

    def _fail(self, problem: str, hint: str) -> list[Action]:
        self.machine.go("fail")
        self.problem, self.hint = problem, hint
        return [Event(f"failed: {problem}"), *self.calls.hang_up(problem)]

    def tick(self, now_s: float) -> list[Action]:
        """A step that takes too long fails; whatever was done by then, a new run does again."""
        if self.phase not in OPEN or now_s < self._deadline_s:
            return []
        if self.phase is Phase.GREETING:
            actions: list[Action] = []
            for node in self.peers:
                if node not in self.calls.welcomes:
                    actions += self.unreachable(node, "no answer", now_s)
            return actions
        done = self._answers if self.phase is Phase.PROMISING else self._stored
        asked = [self.intermediate] if self.phase is Phase.CLOSING else self._data
        waiting = [self.question.names[node] for node in asked if node not in done]
        return self._fail(f"no answer from {', '.join(waiting)} while {self.phase.value}", "run this again")
